"""How much of a behaviour a small set of nodes carries: curves against circuit size, with intervals.

For a circuit C at the chosen layers and the metric M (mean over held-out prompts; Wang et al. 2022, Marks et al. 2024),

    faithfulness f(C) = (M(only C) - M(none)) / (M(all) - M(none))       1: C alone does what all nodes do
    completeness c(C) = (M(all but C) - M(none)) / (M(all) - M(none))    0: nothing is left without C

`only C` removes all other nodes, errors too. Under resampling `none` gives each layer's output on the corrupted prompt,
so all kinds of units share one scale. Circuits are the first nodes of a ranking made on other prompts. Intervals are a
bootstrap over the prompts of all seeds, each with its own seed's circuit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lorsa_utils.circuits.nodes import Experiment, SparseModel
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.tasks import Task
from lorsa_utils.stats import N_DRAWS, Interval, sample_interval

# ---- rankings


def ranking(scores: Tensor, error_nodes: Sequence[int]) -> list[int]:
    """Units by the size of their mean score, largest first, zeros left out: scores [n_prompts, n_nodes]."""
    size = scores.mean(dim=0).abs()
    size[list(error_nodes)] = 0
    return size.argsort(descending=True)[: int((size > 0).sum())].tolist()


def random_order(order: Sequence[int], seed: int) -> list[int]:
    """Of nodes that have an effect, so that random circuits are made of such."""
    generator = torch.Generator().manual_seed(seed)
    return [order[int(i)] for i in torch.randperm(len(order), generator=generator)]


def rank_scores(experiment: Experiment, exact_up_to: int = 0) -> Tensor:
    """Effects of all nodes, [n_prompts, n_nodes]: exact up to `exact_up_to` nodes, else gradient times activation."""
    n_nodes = experiment.sparse.n_nodes
    return experiment.effects(range(n_nodes)).T if n_nodes <= exact_up_to else experiment.attribute()


# ---- curves


class Curve(NamedTuple):
    """Metric of every prompt for nested circuits, [n_sizes, n_prompts] or [n_prompts]."""

    sizes: tuple[int, ...]
    parameters: tuple[float, ...]
    """Weights of each circuit's nodes."""
    only: Tensor
    """With the circuit alone."""
    without: Tensor | None
    """With all but the circuit; None when not measured."""
    all: Tensor
    """Of the untouched model."""
    none: Tensor
    """With all nodes removed."""


def measure_curve(
    experiment: Experiment,
    orders: Sequence[Sequence[int]],
    sizes: Sequence[int],
    completeness: bool = True,
    ends: Curve | None = None,
) -> Curve:
    """Metric with and without the first nodes of a ranking.

    `orders` is one ranking or one for each prompt; sizes beyond the shortest are left out. `ends` is a curve on the
    same prompts whose `all` and `none` are reused. Completeness doubles the passes.

    Raises:
        UserError: a ranking is shorter than all sizes, or removing all nodes does not change the metric.
    """
    sparse, shortest = experiment.sparse, min(map(len, orders))
    sizes = [size for size in sizes if size <= shortest]
    if not sizes:
        raise UserError(f"The ranking has {shortest} nodes; ask for circuits of at most {shortest}.")
    chosen = torch.stack([torch.stack([sparse.mask(order[:size]) for order in orders]) for size in sizes])
    chosen = chosen[:, 0] if len(orders) == 1 else chosen
    nothing = torch.zeros_like(chosen[:1])
    values = experiment.measure(
        torch.cat([~chosen, *([chosen] if completeness else []), *([] if ends else [nothing, ~nothing])])
    )
    everything, none = (ends.all, ends.none) if ends else (values[-2], values[-1])
    if abs(float((everything - none).mean())) < 1e-6:
        raise UserError(
            "Removing all nodes of these layers does not change the metric, so no circuit can be found in them; "
            "choose others."
        )
    parameters = tuple(float(np.mean([sparse.parameters(order[:size]) for order in orders])) for size in sizes)
    only, without = values[: len(sizes)], values[len(sizes) : 2 * len(sizes)] if completeness else None
    return Curve(tuple(sizes), parameters, only, without, everything, none)


def pool(curves: Sequence[Curve]) -> Curve:
    """The curves of several seeds as one over all their prompts; parameters are averaged."""
    n = min(len(curve.sizes) for curve in curves)
    without = [curve.without[:n] for curve in curves if curve.without is not None]
    return Curve(
        curves[0].sizes[:n],
        tuple(np.mean([curve.parameters[:n] for curve in curves], axis=0).tolist()),
        torch.cat([curve.only[:n] for curve in curves], dim=1),
        torch.cat(without, dim=1) if without else None,
        torch.cat([curve.all for curve in curves]),
        torch.cat([curve.none for curve in curves]),
    )


# ---- tables


def draws(n_prompts: int, seed: int = 0, n_draws: int = N_DRAWS) -> Tensor:
    """Bootstrap draws of prompts, [n_draws + 1, n_prompts]; row 0 is the prompts themselves."""
    drawn = torch.randint(n_prompts, (n_draws, n_prompts), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.arange(n_prompts)[None], drawn])


def shares(values: Tensor, curve: Curve, drawn: Tensor) -> Tensor:
    """(M - M(none)) / (M(all) - M(none)) in every draw: [n_sizes, n_prompts] to [n_draws + 1, n_sizes]."""
    means = values.double()[:, drawn].mean(dim=2).T
    everything, none = (side.double()[drawn].mean(dim=1)[:, None] for side in (curve.all, curve.none))
    return (means - none) / (everything - none)


def curve_table(curves: Mapping[str, Curve], seed: int = 0) -> pd.DataFrame:
    """Faithfulness and completeness with intervals, one row per curve and size.

    Columns `nodes` (name of the curve), `size`, `parameters`, `faithfulness`, `low`, `high`, `completeness`,
    `completeness_low`, `completeness_high` (NaN where not measured).
    """
    rows = []
    for name, curve in curves.items():
        drawn = draws(len(curve.all), seed)
        faithful = shares(curve.only, curve, drawn)
        left = None if curve.without is None else shares(curve.without, curve, drawn)
        for i, (size, parameters) in enumerate(zip(curve.sizes, curve.parameters, strict=True)):
            complete = Interval(math.nan) if left is None else sample_interval(left[:, i])
            rows.append((name, size, parameters, *sample_interval(faithful[:, i]), *complete))
    columns = ["nodes", "size", "parameters", "faithfulness", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "completeness", "completeness_low", "completeness_high"])


def error_shares(experiment: Experiment) -> pd.DataFrame:
    """How much of the behaviour the errors carry as more layers are decomposed, from the last layer backwards.

    Columns `layers` (how many), `first` (the earliest), `errors` and `units` (the metric's fall without them, as a
    share of `fall`), `fall` (without both).
    """
    sparse, layers = experiment.sparse, [*reversed(experiment.sparse.layers)]
    errors, number = sparse.mask(sparse.error_nodes), torch.arange(sparse.n_nodes, device=sparse.model.device)
    later = [number >= sparse.columns[layer].start for layer in layers]
    sets = [sparse.mask([]), *(nodes for after in later for nodes in (after & errors, after & ~errors, after))]
    values = experiment.measure(torch.stack(sets)).double().mean(dim=1)
    errors_fall, units_fall, fall = (values[0] - values[1:]).view(-1, 3).T.numpy()
    shares = {"errors": errors_fall / fall, "units": units_fall / fall, "fall": fall}
    return pd.DataFrame({"layers": range(1, 1 + len(layers)), "first": layers, **shares})


# ---- the whole comparison


def usual_sizes(n_nodes: int) -> list[int]:
    """Circuit sizes: powers of 2 for at most 256 nodes (MHSA heads), else powers of 4 up to 1,024."""
    return [2**i for i in range(11) if 2**i <= n_nodes] if n_nodes <= 256 else [4**i for i in range(6)]


def compare(
    kinds: Mapping[str, SparseModel],
    task: Task,
    seed: int = 0,
    random: Sequence[str] | None = None,
    exact_up_to: int = 0,
    ablation: str = "resample",
    **options: Any,
) -> dict[str, Curve]:
    """Curves of several kinds of nodes of the same layers: half of the prompts rank nodes, half measure circuits.

    For the kinds in `random` (all by default) the faithfulness of random nodes is measured too, as `random <name>`.
    `exact_up_to` is as in `rank_scores`, `options` as in `nodes.Experiment`.
    """
    curves: dict[str, Curve] = {}
    for label, sparse in kinds.items():
        discovery, held_out = (Experiment(sparse, half, ablation, **options) for half in task.split())
        order, sizes = ranking(rank_scores(discovery, exact_up_to), sparse.error_nodes), usual_sizes(sparse.n_nodes)
        # Without any node all kinds give the corrupted layers under resampling, so the first curve's ends serve all.
        ends = next(iter(curves.values()), None) if ablation == "resample" else None
        curves[label] = measure_curve(held_out, [order], sizes, ends=ends)
        if random is None or label in random:
            curves[f"random {label}"] = measure_curve(
                held_out, [random_order(order, seed)], sizes, completeness=False, ends=curves[label]
            )
    return curves
