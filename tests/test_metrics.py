"""Numbers computed by hand, the two fixed points, and what must not matter: batch size and padding."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from refusals import refused
from tiny_models import save_tiny_model
from torch import Tensor
from toys import ToySource, random_lorsa, random_sae, random_sequences, sequences_of

from lorsa_utils.activations import ActivationStream
from lorsa_utils.lorsa import SparseModule, SparseOutput
from lorsa_utils.metrics import Mean, Reconstruction, evaluate, evaluate_activations
from lorsa_utils.models import LanguageModel, load_model

KEYS = {"fvu", "fvu_token_mean", "cosine", "l0", "dead_fraction", "n_tokens"}


def output(y: Tensor, indices: Sequence[Any] | None = None, values: Sequence[Any] | None = None) -> SparseOutput:
    kept = torch.tensor(indices) if indices is not None else torch.zeros(*y.shape[:2], 1, dtype=torch.long)
    active = torch.tensor(values) if values is not None else torch.ones(*y.shape[:2], 1)
    return SparseOutput(y, kept, active, kept[..., :0], active[..., :0])


def measured(y: Tensor, predicted: SparseOutput, mask: Tensor) -> dict[str, float]:
    mean = Mean()
    mean.update(y, mask)
    sums = Reconstruction(mean.value(), n_units=4)
    sums.update(y, predicted, mask)
    return sums.result()


# ---- by hand

TARGETS = torch.tensor([[[99.0, 99.0], [0.0, 0.0], [4.0, 0.0], [2.0, 6.0], [77.0, 7.0]]])
MASK = torch.tensor([[False, True, True, True, False]])
"""Mean (2, 2) over the three counted tokens; squared deviations 8, 8 and 16."""


def test_by_hand() -> None:
    predicted = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [4.0, 3.0], [2.0, 6.0], [0.0, 0.0]]])
    kept = [[[3, 3], [0, 1], [1, 0], [0, 2], [3, 3]]]
    active = [[[9.0, 9.0], [1.0, 0.0], [2.0, -1.0], [5.0, 0.0], [9.0, 9.0]]]
    found = measured(TARGETS, output(predicted, kept, active), MASK)
    assert found.keys() == KEYS
    assert found["fvu"] == pytest.approx((4 + 9 + 0) / 32)
    assert found["fvu_token_mean"] == pytest.approx((4 / 8 + 9 / 8 + 0) / 3)
    assert found["cosine"] == pytest.approx((0 + 4 / 5 + 1) / 3)
    assert found["l0"] == pytest.approx((1 + 2 + 1) / 3)
    assert found["dead_fraction"] == 2 / 4  # heads 2 (kept, never active) and 3 (active on uncounted tokens alone)
    assert found["n_tokens"] == 3


def test_a_perfect_prediction_and_the_mean() -> None:
    found = measured(TARGETS, output(TARGETS), MASK)
    assert (found["fvu"], found["fvu_token_mean"]) == (0, 0)
    assert measured(TARGETS[:, 2:4], output(TARGETS[:, 2:4]), MASK[:, 2:4])["cosine"] == pytest.approx(1)
    mean = TARGETS[MASK].mean(dim=0).expand_as(TARGETS)
    found = measured(TARGETS, output(mean), MASK)
    assert (found["fvu"], found["fvu_token_mean"]) == (1, 1)
    assert measured(TARGETS, output(2 * mean - TARGETS), MASK)["fvu"] == pytest.approx(4)


def test_no_deviation_to_measure_is_a_sentence() -> None:
    with refused(r"FVU is undefined"):
        measured(torch.ones(1, 3, 2), output(torch.ones(1, 3, 2)), torch.ones(1, 3, dtype=torch.bool))


# ---- over whole sources


def test_batch_size_does_not_matter() -> None:
    source = ToySource(11, 9, layers=(0, 1))
    modules = {"lorsa": (0, random_lorsa()), "sae": (1, random_sae()), "transcoder": (0, random_sae(kind="transcoder"))}
    at_once = evaluate_activations(modules, source, batch_size=11)
    for batch_size in (1, 4):
        found = evaluate_activations(modules, source, batch_size)
        for name, numbers in at_once.items():
            assert found[name] == pytest.approx(numbers, rel=1e-5)
            assert found[name]["n_tokens"] == source.n_tokens


def test_padding_does_not_matter() -> None:
    """The same text with more padding, whose activations are anything."""
    source, longer = ToySource(7, 9), ToySource(7, 14)
    for side, filler in ((longer.inputs, 100.0), (longer.outputs, -50.0)):
        side[0].fill_(filler)
    longer.inputs[0][:, :9], longer.outputs[0][:, :9] = source.inputs[0], source.outputs[0]
    longer.mask = torch.cat([source.mask, torch.zeros(7, 5, dtype=torch.bool)], dim=1)
    for module in (random_lorsa(), random_sae()):
        short = evaluate_activations({"m": (0, module)}, source)["m"]
        assert evaluate_activations({"m": (0, module)}, longer)["m"] == pytest.approx(short, rel=1e-5)


# ---- spliced in


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama"), device="cpu")


class Fixed(torch.nn.Module):
    """Stands for an SAE that writes what `rule` makes of the layer's output."""

    config, n_units = random_sae(d_model=64).config, 24
    input_from = SparseModule.input_from

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rule, self.b_O = rule, torch.zeros(64)

    def forward(self, x: Tensor, *options: Any) -> SparseOutput:
        return output(self.rule(x))


def test_a_perfect_module_recovers_all_and_the_mean_nothing(lm: LanguageModel) -> None:
    sequences = random_sequences(7, 16)
    perfect = evaluate(Fixed(lambda y: y), 1, lm, sequences, batch_size=3)
    assert perfect.keys() == KEYS | {"ce", "ce_spliced", "ce_mean_ablated", "ce_recovered"}
    assert perfect["ce_spliced"] == perfect["ce"]
    assert (perfect["ce_recovered"], perfect["fvu"]) == (1, 0)
    assert abs(perfect["ce_mean_ablated"] - perfect["ce"]) > 1e-2
    mean = lm.capture(sequences.tokens.long(), [1])[1][1][sequences.mask].mean(dim=0)
    flat = evaluate(Fixed(lambda y: mean.expand_as(y)), 1, lm, sequences, batch_size=3)
    assert flat["ce_spliced"] == pytest.approx(flat["ce_mean_ablated"], abs=1e-6)
    assert flat["ce_recovered"] == pytest.approx(0, abs=1e-4)
    assert flat["fvu"] == pytest.approx(1, abs=1e-6)


def test_losses_are_those_of_the_model(lm: LanguageModel) -> None:
    """Cross-entropy over counted next tokens, computed here from the logits."""
    sequences = random_sequences(5, 16)
    tokens, counted = sequences.tokens.long(), sequences.mask[:, 1:]
    found = evaluate(Fixed(lambda y: 0.5 * y), 1, lm, sequences, batch_size=2)

    def halved(attn_input: Tensor, attn_output: Tensor) -> Tensor:
        return torch.where(sequences.mask[..., None], 0.5 * attn_output, attn_output)

    for name, replacement in (("ce", lambda attn_input, attn_output: attn_output), ("ce_spliced", halved)):
        with lm.splice({1: replacement}), torch.no_grad():
            losses = -lm.logits(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        assert found[name] == pytest.approx(float(losses[counted].double().mean()), rel=1e-5)
    gap = found["ce_mean_ablated"] - found["ce"]
    assert found["ce_recovered"] == pytest.approx((found["ce_mean_ablated"] - found["ce_spliced"]) / gap)


def test_splicing_does_not_depend_on_batch_size_or_padding(lm: LanguageModel) -> None:
    sequences = random_sequences(7, 16)
    longer = sequences_of(
        torch.cat([sequences.tokens.long(), torch.full((7, 6), 258)], dim=1),
        torch.cat([sequences.mask, torch.zeros(7, 6, dtype=torch.bool)], dim=1),
    )
    module = random_lorsa(d_model=64)
    with torch.no_grad():
        module.W_O.mul_(0.01)
    found = evaluate(module, 1, lm, sequences, batch_size=7)
    assert evaluate(module, 1, lm, sequences, batch_size=2) == pytest.approx(found, rel=1e-4)
    assert evaluate(module, 1, lm, longer, batch_size=3) == pytest.approx(found, rel=1e-4)
    assert found["n_tokens"] == sequences.n_tokens


def test_splicing_and_activations_measure_the_same(lm: LanguageModel) -> None:
    """And the model is left as it was."""
    sequences, module = random_sequences(5, 16), random_lorsa(d_model=64)
    before = lm.logits(sequences.tokens.long())
    spliced = evaluate(module, 2, lm, sequences, batch_size=2)
    assert torch.equal(lm.logits(sequences.tokens.long()), before)
    alone = evaluate_activations({"m": (2, module)}, ActivationStream(lm, sequences, [2]), 5)["m"]
    assert {name: spliced[name] for name in KEYS} == pytest.approx(alone, rel=1e-5)


def test_no_text_is_a_sentence(lm: LanguageModel) -> None:
    empty = sequences_of(torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.bool))
    with refused(r"not one counted token"):
        evaluate(random_lorsa(d_model=64), 0, lm, empty)
