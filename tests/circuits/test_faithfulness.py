"""Curves of planted circuits, shares and areas by hand, stability of a relabelled module."""

import copy
import dataclasses

import numpy as np
import planted
import pytest
import torch
from definitions import definitions
from hypothesis import given
from hypothesis import strategies as st
from test_nodes import KINDS, planted_sparse

from lorsa_utils.circuits import faithfulness
from lorsa_utils.circuits.faithfulness import Curve
from lorsa_utils.circuits.nodes import Experiment, SparseModel
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.units import LorsaHeads
from lorsa_utils.models import LanguageModel

NOTEBOOK = definitions("08_circuits", "area_table", "match_units", "write_directions")


@pytest.fixture(scope="module")
def sparse(model: LanguageModel) -> SparseModel:
    return planted_sparse(model, "lorsa")


def curve_of(experiment: Experiment, sizes: list[int], seed: int | None = None) -> Curve:
    order = faithfulness.ranking(experiment.attribute(steps=4), experiment.sparse.error_nodes)
    order = order if seed is None else faithfulness.random_order(order, seed)
    return faithfulness.measure_curve(experiment, [order], sizes)


def changed(sparse: SparseModel, layer: int, change: str) -> SparseModel:
    """Planted Lorsas of which one writes half as much, or has its heads relabelled."""
    lorsa = copy.deepcopy(sparse.layers[layer].module)  # type: ignore[attr-defined]
    with torch.no_grad():
        if change == "half":
            lorsa.W_O *= 0.5
        else:
            lorsa.W_O[: planted.N] = lorsa.W_O[: planted.N].flip(0).clone()
    return SparseModel(sparse.model, {**sparse.layers, layer: LorsaHeads(lorsa)})


TASK = planted.planted_task(n=8)


def test_planted_circuit_is_faithful_and_complete(sparse: SparseModel) -> None:
    experiment = Experiment(sparse, planted.planted_task(n=2, repeat=True))
    table = faithfulness.curve_table({"Lorsa heads": curve_of(experiment, [1, 2, 3, 4])})
    # Two heads do it, and two more (of the corrupted prompt) must not get in their way.
    assert table["faithfulness"].iloc[-1] == pytest.approx(1, abs=0.03)
    assert table["completeness"].iloc[-1] == pytest.approx(0, abs=0.2)
    assert table["faithfulness"].iloc[0] < 0.9


def test_random_sets_are_worse(sparse: SparseModel) -> None:
    experiment, sizes = Experiment(sparse, TASK), [1, 4, 8, 16]
    curves = {"Lorsa heads": curve_of(experiment, sizes), "random": curve_of(experiment, sizes, seed=0)}
    table = NOTEBOOK.area_table(curves).set_index("nodes")
    ours, other = table.loc["Lorsa heads"], table.loc["random"]
    assert ours["area"] > other["area"]
    assert (ours["lead"], other["lead"]) == (0, pytest.approx(ours["area"] - other["area"]))
    assert table["area"].between(table["low"], table["high"]).all()


def test_errors_are_nodes(sparse: SparseModel) -> None:
    shares = faithfulness.error_shares(Experiment(changed(sparse, 1, "half"), TASK)).set_index("layers")
    assert shares.loc[1, "errors"] == pytest.approx(0.5, abs=0.1)
    assert list(shares["first"]) == [1, 0]
    good = faithfulness.error_shares(Experiment(sparse, TASK))
    assert good["errors"].abs().max() < 0.02
    assert good["units"].min() > 0.9


def by_hand(only: list[float], n_prompts: int = 3, sizes: tuple[int, ...] = (1, 2, 4)) -> Curve:
    values, weights = torch.tensor(only)[:, None].expand(-1, n_prompts), tuple(10.0 * size for size in sizes)
    return Curve(sizes, weights, values, None, torch.ones(n_prompts), torch.zeros(n_prompts))


def test_areas_by_hand() -> None:
    rising, flat, late = by_hand([0.0, 0.5, 1.0]), by_hand([0.2, 0.2, 0.2]), by_hand([0.0, 1.0, 1.0])
    short = by_hand([0.0, 0.5], sizes=(1, 2))
    area = NOTEBOOK.area_table({"x": rising, "flat": flat}, against="x").set_index("nodes")["area"]
    assert area.tolist() == pytest.approx([0.5, 0.2])
    assert NOTEBOOK.area_table({"flat": flat}, "parameters", "flat")["area"].item() == pytest.approx(0.2)
    table = NOTEBOOK.area_table({"Lorsa heads": late, "x": short}).set_index("nodes")
    assert table.loc["x", "area"] == pytest.approx(0.25), "over the sizes that both have"
    assert table.loc["x", "lead"] == pytest.approx(0.25)
    with pytest.raises(UserError, match="no range of sizes in common"):
        NOTEBOOK.area_table({"Lorsa heads": short, "x": by_hand([0.0, 1.0], sizes=(4, 8))})


@given(seed=st.integers(0, 20), n=st.integers(2, 9))
def test_shares_are_ratios_of_means(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    only, everything, none = (torch.rand(*shape, generator=generator) for shape in ((2, n), (n,), (n,)))
    everything = everything + 3
    curve = Curve((1, 2), (1.0, 2.0), only, None, everything, none)
    drawn = faithfulness.shares(only, curve, faithfulness.draws(n, n_draws=20))
    wanted = (only.mean(dim=1) - none.mean()) / (everything.mean() - none.mean())
    assert torch.allclose(drawn[0], wanted.double(), atol=1e-6)
    assert drawn.shape == (21, 2)


def test_pooled_curves_hold_all_prompts() -> None:
    both = faithfulness.pool([by_hand([0.0, 0.5, 1.0]), by_hand([0.2, 0.4], n_prompts=2, sizes=(1, 2))])
    assert both.sizes == (1, 2)
    assert both.only.tolist() == pytest.approx(np.array([[0.0] * 3 + [0.2] * 2, [0.5] * 3 + [0.4] * 2]))
    assert len(both.all) == 5


def test_heads_of_a_relabelled_lorsa_are_matched(sparse: SparseModel) -> None:
    other = changed(changed(sparse, 0, "relabelled"), 1, "relabelled")
    match, cosine = NOTEBOOK.match_units(sparse, other)
    assert match[:3].tolist() == [31, 30, 29]
    assert match[sparse.error_nodes].tolist() == other.error_nodes
    assert float(cosine[: planted.N].min()) > 0.999
    few = other.mask([3, *other.error_nodes, other.columns[1].start])
    assert NOTEBOOK.match_units(sparse, other, few)[0][:3].tolist() == [3, 3, 3], "only these may be matched"


def test_comparison_of_kinds(model: LanguageModel) -> None:
    kinds = {kind: planted_sparse(model, kind) for kind in KINDS}
    curves = faithfulness.compare(kinds, TASK, seed=1)
    assert list(curves) == ["lorsa", "random lorsa", "sae", "random sae", "mhsa", "random mhsa"]
    assert curves["mhsa"].sizes[:4] == (1, 2, 4, 8)
    assert len(curves["mhsa"].all) == 4, "half of the prompts are held out"
    assert float(faithfulness.curve_table(curves).query("nodes == 'mhsa' and size == 4")["faithfulness"].iloc[0]) > 0.9
    assert [curve.without is None for curve in curves.values()] == [False, True] * 3


def test_few_nodes_are_ranked_by_removing_each(model: LanguageModel) -> None:
    sparse = planted_sparse(model, "mhsa")
    experiment = Experiment(sparse, planted.planted_task(n=4))
    exact, estimated = (faithfulness.rank_scores(experiment, exact_up_to) for exact_up_to in (10, 0))
    assert torch.allclose(exact[:, 3], experiment.effects([3])[0])
    assert exact.shape == estimated.shape
    assert not torch.allclose(exact, estimated)
    assert {str(sparse.node(i)) for i in faithfulness.ranking(exact, sparse.error_nodes)[:3]} == {"0.0", "0.1", "1.2"}


def test_circuits_of_single_prompts_are_small(sparse: SparseModel) -> None:
    experiment = Experiment(sparse, planted.planted_task(n=6))
    orders = [faithfulness.ranking(row[None], sparse.error_nodes) for row in experiment.attribute()]
    local = faithfulness.measure_curve(experiment, orders, [1, 2, 4, 8], completeness=False)
    table = faithfulness.curve_table({"one prompt": local, "all prompts": curve_of(experiment, [1, 2, 4, 8])})
    shares = table.set_index(["nodes", "size"])["faithfulness"]
    assert shares["one prompt", 8] > 0.95
    assert shares["one prompt", 8] > shares["all prompts", 8] + 0.1, "each prompt needs other tokens' heads"
    # One prompt alone: the same as its circuit measured by itself.
    alone = faithfulness.measure_curve(experiment.rows(slice(2, 3)), orders[2:3], [4])
    assert torch.allclose(alone.only[0, 0], local.only[2, 2], atol=1e-3)
    assert faithfulness.measure_curve(experiment, orders, [4], ends=local).none is local.none


def test_bad_input_is_refused_in_one_sentence(sparse: SparseModel) -> None:
    with pytest.raises(UserError, match="The ranking has 2 nodes; ask for circuits of at most 2"):
        faithfulness.measure_curve(Experiment(sparse, TASK), [[1, 2]], [5])
    same = dataclasses.replace(TASK, corrupted=TASK.clean)
    with pytest.raises(UserError, match="does not change the metric"):
        faithfulness.measure_curve(Experiment(sparse, same), [[1, 2]], [1])
