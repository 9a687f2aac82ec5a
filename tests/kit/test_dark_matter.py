"""Error statistics against planted errors, of which the shared part is known."""

import math
from pathlib import Path

import pytest
import torch
from tiny_heads import random_heads
from tiny_models import save_tiny_model
from torch import Tensor
from toys import ToySource, random_lorsa, random_sae, random_sequences

from lorsa_utils import metrics
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import dark_matter
from lorsa_utils.kit.dark_matter import LayerErrors
from lorsa_utils.lorsa import SAE, Lorsa
from lorsa_utils.models import load_model

D, N_SEQUENCES, LENGTH = 24, 60, 100


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(shared: float) -> LayerErrors:
    """Errors a and b of energy 1 with the part `shared` of it in common, and sizes that differ from token to token."""
    n = N_SEQUENCES * LENGTH
    common, own_a, own_b = (normal(n, D, seed=seed) / math.sqrt(D) for seed in (1, 2, 3))
    size = 1 + normal(n, 1, seed=4).abs()
    a, b = (size * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own) for own in (own_a, own_b))
    sequence = torch.arange(N_SEQUENCES).repeat_interleave(LENGTH)
    positions = torch.arange(1, LENGTH + 1).repeat(N_SEQUENCES)
    deviations = size * torch.nn.functional.normalize(normal(n, D, seed=6))
    errors, tokens = {"a": a, "b": b}, torch.zeros(n).long()
    return LayerErrors(normal(n, D, seed=5), deviations, torch.zeros(D), errors, tokens, positions, sequence)


@pytest.mark.parametrize("shared", [0.0, 0.3, 0.8])
def test_planted_shared_part_is_found_and_the_control_finds_none(shared: float) -> None:
    data = planted(shared)
    found = dark_matter.compare(data, "a", "b")
    assert found["cosine"].value == pytest.approx(shared, abs=0.02)
    assert found["shared_energy"].low - 0.01 <= shared <= found["shared_energy"].high + 0.01
    if shared == 0:
        assert found["norm_correlation"].value > 0.8, "the size of the targets explains the norms"
        assert abs(found["correlation_at_equal_size"].value) < 0.05
    elif shared == 0.8:
        assert found["correlation_at_equal_size"].low > 0.3
    for control in dark_matter.compare(data, "a", "b", elsewhere=True).values():
        assert abs(control.value) < 0.05
        assert control.low < control.value < control.high


def test_statistics_equal_their_formulas() -> None:
    data = planted(0.4)
    a, b, y = data.errors["a"], data.errors["b"], data.deviations
    found = {name: statistic.value for name, statistic in dark_matter.compare(data, "a", "b").items()}
    stacked = torch.stack([a.norm(dim=1), b.norm(dim=1)])
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b).mean()), abs=1e-12)
    assert found["shared_energy"] == pytest.approx(float((a * b).sum() / (a * a).sum()), abs=1e-12)
    assert found["norm_correlation"] == pytest.approx(float(torch.corrcoef(stacked)[0, 1]), abs=1e-10)
    # A partial correlation is the correlation of what a regression on the third variable leaves.
    third = torch.stack([torch.ones(len(y), dtype=y.dtype), y.norm(dim=1).log()], dim=1)
    logs = stacked.log().T
    rest = logs - third @ torch.linalg.lstsq(third, logs).solution
    assert found["correlation_at_equal_size"] == pytest.approx(float(torch.corrcoef(rest.T)[0, 1]), abs=1e-8)


def test_intervals_are_those_of_sequences() -> None:
    # Every token of a sequence says the same, so 60 sequences are 60 observations, not 6000.
    level = normal(N_SEQUENCES, seed=0)
    sequence = torch.arange(N_SEQUENCES).repeat_interleave(LENGTH)
    sums = dark_matter.resampled({"x": level[sequence], "n": torch.ones(len(sequence))}, sequence)
    means = sums["x"] / sums["n"]
    assert float(means[0]) == pytest.approx(float(level.mean()), abs=1e-12)
    assert float(means[1:].std()) == pytest.approx(float(level.std()) / math.sqrt(N_SEQUENCES), rel=0.1)


def test_tokens_elsewhere_are_of_other_sequences() -> None:
    sequence = torch.tensor([7, 7, 7, 7, 2])
    assert (sequence[dark_matter.tokens_elsewhere(sequence)] != sequence).all()


def test_ridge_finds_a_linear_part_and_nothing_in_noise() -> None:
    data = planted(0.0)
    linear = data.inputs @ normal(D, D, seed=8) / math.sqrt(D)
    found = dark_matter.predictability(data.inputs, linear + normal(len(linear), D, seed=9), data.sequence)
    assert found.low < 0.5 < found.high + 0.02
    assert abs(found.value - 0.5) < 0.03
    assert abs(dark_matter.predictability(data.inputs, normal(len(linear), seed=10), data.sequence).value) < 0.02
    assert dark_matter.predictability(data.inputs, linear + 3, data.sequence).value > 0.999999, "the least penalty"
    with pytest.raises(UserError, match="at least 10 sequences, and there are 3"):
        dark_matter.predictability(data.inputs[:300], linear[:300], data.sequence[:300])


def test_collected_errors_are_those_of_the_evaluation() -> None:
    source = ToySource(12, 9, layers=(0, 1))
    pair: dict[str, Lorsa | SAE] = {"a": random_lorsa(), "b": random_sae()}
    data = dark_matter.collect(pair, source, 1, 10**6, batch_size=5)
    whole = metrics.evaluate_activations({name: (1, module) for name, module in pair.items()}, source)
    for name, result in whole.items():
        fvu = data.errors[name].square().sum() / data.deviations.square().sum()
        assert float(fvu) == pytest.approx(result["fvu"], rel=1e-4)
    assert len(data.tokens) == source.n_tokens
    assert torch.equal(data.sequence.unique(), torch.arange(12))
    assert data.positions.min() >= 1
    part = dark_matter.collect(pair, source, 1, 10, batch_size=5)
    assert torch.equal(part.sequence.unique(), torch.arange(5))
    assert torch.allclose(part.errors["a"], data.errors["a"][: len(part.tokens)], atol=1e-6)
    with pytest.raises(UserError, match="fewer than two"):
        dark_matter.collect(pair, ToySource(1, 9, layers=(1,)), 1, 10)


def test_shared_part_and_its_remainder_split_the_error() -> None:
    a, b = normal(50, D, seed=1), normal(50, D, seed=2)
    shared = dark_matter.shared_part(a, b)
    assert torch.allclose(((a - shared) * b).sum(dim=1), torch.zeros(50, dtype=a.dtype), atol=1e-12)
    cosine = torch.cosine_similarity(a, b)
    assert torch.allclose(shared.square().sum(dim=1) / a.square().sum(dim=1), cosine**2, atol=1e-12)
    assert torch.allclose(dark_matter.shrunk(a, b).norm(dim=1), (a - shared).norm(dim=1), atol=1e-12)
    assert torch.equal(dark_matter.shared_part(a, torch.zeros_like(b)), torch.zeros_like(a))


def test_replaced_losses_equal_those_of_the_evaluation(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_model(tmp_path / "model")))
    sequences = random_sequences(5, 20)
    pair = {"a": random_heads(model.site(1)), "b": random_sae(d_model=model.d_model)}
    _, output = model.capture(sequences.tokens, [1])[1]
    mean = output[sequences.mask].mean(dim=0)
    losses = dark_matter.replaced_losses(model, 1, pair["a"], pair["b"], mean, sequences, batch_size=2)
    assert set(losses) == {"original", "counted", *dark_matter.VARIANTS}
    for name, key in (("a", "ce_spliced"), ("original", "ce"), ("mean output", "ce_mean_ablated")):
        expected = metrics.evaluate(pair["a"], 1, model, sequences)[key]
        assert float(losses[name].sum() / losses["counted"].sum()) == pytest.approx(expected, rel=1e-5)
    same = dark_matter.replaced_losses(model, 1, pair["a"], pair["a"], mean, sequences)
    for name in ("a with the shared part", "a, shrunk as much"):
        assert torch.allclose(same[name], same["original"], rtol=1e-4), "all of its error is shared with itself"
    assert torch.allclose(same["a without the shared part only"], same["a"], rtol=1e-4)
