"""Nodes sum to the layer, removing nothing changes nothing, planted circuits are found whole and alone."""

from pathlib import Path

import planted
import pytest
import torch
from tiny_models import random_tokens, save_tiny_model
from torch import Tensor

from lorsa_utils.activations import ActivationBatch
from lorsa_utils.circuits.nodes import Experiment, SparseModel, baseline, clean_logits, decompose, last_logits
from lorsa_utils.config import SAEConfig, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import tasks
from lorsa_utils.heads.units import Activity, LorsaHeads, MHSAHeads, SAEFeatures, Units
from lorsa_utils.initialize import initialize
from lorsa_utils.lorsa import SAE, Lorsa
from lorsa_utils.models import LanguageModel, load_model
from lorsa_utils.training import Run, RunSpec

LAYERS = (0, 2)
KINDS = ("lorsa", "sae", "mhsa")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp(request.param), request.param), device="cpu")


@pytest.fixture(scope="module", params=KINDS)
def sparse(request: pytest.FixtureRequest, tiny: LanguageModel) -> SparseModel:
    return SparseModel(tiny, {layer: random_units(tiny, layer, request.param) for layer in LAYERS})


def random_units(model: LanguageModel, layer: int, kind: str) -> Units:
    site = model.site(layer)
    if kind == "mhsa":
        return MHSAHeads(site)
    x, y = (side.float() for side in model.capture(random_tokens(4, 12), [layer])[layer])
    counted = torch.ones(4, 12, dtype=torch.bool)
    if kind == "lorsa":
        lorsa = Lorsa(Lorsa.config_for_site(site, 4 * site.d_head, 4, 6))
        initialize(lorsa, site, x, y, counted, "mhsa", 0)
        return LorsaHeads(lorsa.requires_grad_(False))
    sae = SAE(SAEConfig(d_model=model.d_model, n_features=48, k=6))
    initialize(sae, site, x, y, counted, "mhsa", 0)
    return SAEFeatures(sae.requires_grad_(False), site)


SIDES, NUMBERS = random_tokens(10, 9).chunk(2), torch.arange(10)[:, None].chunk(2)
TASK = tasks.Task("random", *SIDES, torch.tensor([8, 8, 8, 8, 6]), *NUMBERS)
ONE_PAIR = planted.planted_task(n=2, repeat=True)


def test_nodes_sum_to_the_layer(sparse: SparseModel) -> None:
    tokens = random_tokens(3, 10)
    for layer, activity in sparse.read(tokens).items():
        y, units = sparse.model.capture(tokens, [layer])[layer][1], sparse.layers[layer]
        every, single = (torch.zeros(1, 1, units.n + 1, dtype=torch.bool) for _ in range(2))
        every[:], single[..., 2] = True, True
        bias = units.site.b_O if isinstance(units, MHSAHeads) else units.module.b_O  # type: ignore[attr-defined]
        assert torch.allclose(activity.written(every) + bias, y, atol=1e-4)
        direction = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(0)).expand_as(y)
        one_by_one = activity.along(direction)
        for mask, parts in ((every, one_by_one.sum(dim=-1)), (single, one_by_one[..., 2])):
            assert torch.allclose(parts, (activity.written(mask) * direction).sum(dim=-1), atol=1e-3)


def test_removing_nothing_is_bit_equal_and_all_is_the_corrupted_layer(sparse: SparseModel) -> None:
    tiny, experiment = sparse.model, Experiment(sparse, TASK)
    untouched = clean_logits(tiny, TASK)
    with torch.no_grad(), sparse.removed(sparse.mask([])[None], experiment.instead):
        assert torch.equal(last_logits(tiny, TASK), untouched)
    outputs = {layer: y for layer, (_, y) in tiny.capture(TASK.corrupted, LAYERS).items()}
    every = torch.ones(1, sparse.n_nodes, dtype=torch.bool)
    with torch.no_grad(), tiny.splice({layer: lambda x, y, layer=layer: outputs[layer] for layer in LAYERS}):
        wanted = tasks.metric("logit_difference", last_logits(tiny, TASK), TASK)
    assert torch.allclose(experiment.measure(every)[0], wanted, atol=1e-3)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_batched_sets_are_the_single_ones(sparse: SparseModel, ablation: str) -> None:
    experiment = Experiment(sparse, TASK, ablation)
    sets = torch.rand(3, sparse.n_nodes, generator=torch.Generator().manual_seed(1)) < 0.5
    together = Experiment(sparse, TASK, ablation, batch_size=2).measure(sets)
    for row, nodes in zip(together, sets, strict=True):
        assert torch.allclose(row, experiment.measure(nodes[None])[0], atol=1e-4)
    # Position by position: the same set everywhere is the set.
    with torch.no_grad(), sparse.removed(sets[:1, None].expand(1, 9, -1), experiment.instead):
        logits = last_logits(sparse.model, TASK)
    assert torch.allclose(tasks.metric("logit_difference", logits, TASK), together[0], atol=1e-4)


def test_attribution_agrees_with_a_small_step(sparse: SparseModel) -> None:
    # Of a node that changes little, effect and attribution are nearly the same.
    near = {layer: Shrunk(activity, 1e-3) for layer, activity in sparse.read(TASK.clean).items()}
    experiment, few = Experiment(sparse, TASK, near), [0, 1, 2, sparse.n_nodes - 2]
    assert torch.allclose(experiment.attribute()[:, few].T, experiment.effects(few), atol=3e-4, rtol=0.1)


def test_attribution_of_a_batch_does_not_mix_prompts(sparse: SparseModel) -> None:
    for steps in (1, 3):
        together, apart = (Experiment(sparse, TASK, batch_size=n).attribute(steps) for n in (32, 1))
        assert torch.allclose(together, apart, atol=1e-3)


class Shrunk(Activity):
    """Another activity, a little smaller."""

    def __init__(self, activity: Activity, share: float) -> None:
        self.activity, self.share = activity, share

    def written(self, mask: Tensor) -> Tensor:
        return (1 - self.share) * self.activity.written(mask)

    def along(self, direction: Tensor) -> Tensor:
        return (1 - self.share) * self.activity.along(direction)

    def rows(self, rows: Tensor | slice) -> Activity:
        return Shrunk(self.activity.rows(rows), self.share)


def test_integrated_gradients_of_a_whole_layer_add_up(tiny: LanguageModel) -> None:
    sparse = SparseModel(tiny, {1: random_units(tiny, 1, "lorsa")})
    experiment, every = Experiment(sparse, TASK), torch.ones(sparse.n_nodes, dtype=torch.bool)
    untouched, removed = experiment.measure(torch.stack([~every, every]))
    estimates = experiment.attribute(steps=40).sum(dim=1)
    assert torch.allclose(estimates, untouched - removed, atol=0.02 * float((untouched - removed).abs().max()))


# ---- planted circuits


def planted_sparse(model: LanguageModel, kind: str) -> SparseModel:
    make = {"lorsa": lambda layer: planted.planted_lorsa(model, layer), "sae": planted.planted_sae}
    with torch.no_grad():
        if kind == "mhsa":
            return decompose(model, (0, 1))
        return decompose(model, {layer: make[kind](layer).requires_grad_(False) for layer in (0, 1)})


def test_planted_model_does_induction(model: LanguageModel) -> None:
    task = planted.planted_task()
    logits = clean_logits(model, task)
    assert tasks.accuracy(logits, task) == 1
    assert (logits.argmax(dim=1) == task.answers[:, 0]).all()


def found_nodes(sparse: SparseModel, ablation: str) -> set[str]:
    """Nodes whose exact effect is more than 5 % of the metric."""
    exact = Experiment(sparse, ONE_PAIR, ablation).effects(range(sparse.n_nodes)).mean(dim=1)
    size = float(tasks.metric("logit_difference", clean_logits(sparse.model, ONE_PAIR), ONE_PAIR).mean())
    return {str(sparse.node(number)) for number in (exact.abs() > 0.05 * size).nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_planted_induction_is_found_whole_and_alone(model: LanguageModel, ablation: str) -> None:
    before, after, wrong = int(ONE_PAIR.clean[0, 2]), int(ONE_PAIR.answers[0, 0]), int(ONE_PAIR.wrong[0, 0])
    if ablation == "zero":
        assert found_nodes(planted_sparse(model, "sae"), ablation) == {f"0.{before}", f"1.{after}"}
    others = {f"1.{wrong}"} if ablation == "resample" else set()
    assert found_nodes(planted_sparse(model, "lorsa"), ablation) - others == {f"0.{before}", f"1.{after}"}


def test_the_same_circuit_takes_one_more_mhsa_head(model: LanguageModel) -> None:
    # Under zero ablation half of a feature is nearly as good as all of it: neither head looks needed.
    assert found_nodes(planted_sparse(model, "mhsa"), "resample") == {"0.0", "0.1", "1.2"}
    assert found_nodes(planted_sparse(model, "mhsa"), "zero") == {"1.2"}


def test_training_finds_the_feature_of_two_heads_as_one_unit(model: LanguageModel) -> None:
    site, generator = model.site(0), torch.Generator().manual_seed(0)

    def batch(n: int) -> ActivationBatch:
        tokens = torch.randint(0, planted.N, (n, 10), generator=generator)
        x, y = model.capture(tokens, [0])[0]
        counted = torch.ones_like(tokens, dtype=torch.bool)
        return ActivationBatch(tokens, counted, {0: x}, {0: y}, counted)

    train = TrainConfig(tokens=200 * 320, batch_size=32, lr=5e-3, aux_k=16, dead_window=1000)
    spec = RunSpec("planted", 0, Lorsa.config_for_site(site, 4 * planted.N, 4, 1), train, Path())
    run = Run(spec, {}, torch.device("cpu"))
    run.start(site, batch(64))
    for _ in range(200):
        run.train_step(batch(32))
    sparse = decompose(model, {0: run.finished_module().requires_grad_(False)})
    exact = Experiment(sparse, ONE_PAIR).effects(range(sparse.n_nodes)).mean(dim=1)
    size = float(tasks.metric("logit_difference", clean_logits(model, ONE_PAIR), ONE_PAIR).mean())
    assert int((exact.abs() > 0.05 * size).sum()) == 1, "two MHSA heads are one Lorsa head"
    assert float(exact.max()) > 0.9 * size
    assert int(exact.argmax()) not in sparse.error_nodes


def test_path_goes_through_the_second_head_alone(model: LanguageModel) -> None:
    sparse, task = planted_sparse(model, "mhsa"), planted.planted_task(n=4)
    experiment, (first, second) = Experiment(sparse, task), (sparse.columns[layer].start for layer in (0, 1))
    senders = [first + head for head in planted.FIRST_LAYER]
    through = [experiment.path_effect(senders, [second + head]).mean() for head in range(4)]
    total = experiment.measure(torch.stack([sparse.mask([]), sparse.mask(senders)])).mean(dim=1)
    assert torch.allclose(through[2], total[0] - total[1], rtol=0.02)
    assert all(abs(float(through[head])) < 0.01 * float(through[2]) for head in (0, 1, 3))
    assert abs(float(experiment.path_effect(senders, []).mean())) < 0.01 * float(through[2])


def test_parameters_touched(model: LanguageModel) -> None:
    lorsa, mhsa, sae = (planted_sparse(model, kind) for kind in ("lorsa", "mhsa", "sae"))
    d, n = planted.D_MODEL, planted.N
    assert lorsa.parameters([0, 1]) == 2 * 2 * d + 2 * d * n, "a group shares queries and keys"
    assert lorsa.parameters([0, n]) == 2 * 2 * d + 2 * 2 * d * n
    assert mhsa.parameters([0, 1]) == 8 * d * n
    assert sae.parameters([0, 1]) == 4 * d + 16 * d * n
    assert lorsa.parameters(lorsa.error_nodes) == 0


def test_bad_input_is_refused_in_one_sentence(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="not one of zero, mean and resample"):
        baseline(planted_sparse(model, "lorsa"), planted.planted_task(n=2), "noise")
    with pytest.raises(UserError, match="at least one layer"):
        decompose(model, {})
    for config, sentence in (
        (SAEConfig(d_model=planted.D_MODEL, n_features=4, k=2, kind="transcoder"), "transcoder"),
        (SAEConfig(d_model=16, n_features=4, k=2), "width 16"),
    ):
        with pytest.raises(UserError, match=sentence):
            decompose(model, {0: SAE(config)})
