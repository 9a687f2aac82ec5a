"""How much of a behaviour a small set of nodes carries: curves against circuit size, with intervals.

For a circuit C at the chosen layers and the metric M (mean over held-out prompts; Wang et al. 2022, Marks et al. 2024),

    faithfulness f(C) = (M(only C) - M(none)) / (M(all) - M(none))       1: C alone does what all nodes do
    completeness c(C) = (M(all but C) - M(none)) / (M(all) - M(none))    0: nothing is left without C

`only C` removes all other nodes, errors too. Under resampling `none` gives each layer's output on the corrupted prompt,
so all kinds of units share one scale.

Circuits are the first nodes of a ranking made on other prompts. The area under a curve (linear between measured sizes)
is over the logarithm of the size, divided by its range: a mean faithfulness. Sizes are numbers of nodes or of weights.
Intervals are a bootstrap over the prompts of all seeds, each with its own seed's circuit; differences between kinds are
taken within a draw.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lorsa_utils import store
from lorsa_utils.circuits.nodes import Elsewhere, SparseModel, attribute, baseline, effects, measure
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.tasks import Task
from lorsa_utils.stats import N_DRAWS, Interval, sample_interval

# ---- rankings


def ranking(scores: Tensor, error_nodes: Sequence[int]) -> list[int]:
    """Units by the size of their mean score, largest first, zeros left out: scores [n_prompts, n_nodes]."""
    size = scores.mean(dim=0).abs()
    size[list(error_nodes)] = 0
    order = size.argsort(descending=True)
    return [int(number) for number in order[: int((size > 0).sum())]]


def random_order(order: Sequence[int], seed: int) -> list[int]:
    """The same nodes in random order; random circuits are thus of nodes that have an effect."""
    generator = torch.Generator().manual_seed(seed)
    return [order[int(i)] for i in torch.randperm(len(order), generator=generator)]


def rank_scores(
    sparse: SparseModel,
    task: Task,
    name: str = "logit_difference",
    ablation: str = "resample",
    exact_up_to: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """Effects of all nodes, [n_prompts, n_nodes]: exact up to `exact_up_to` nodes, else gradient times activation."""
    instead = baseline(sparse, task, ablation)
    if sparse.n_nodes <= exact_up_to:
        return effects(sparse, task, range(sparse.n_nodes), instead, name, batch_size).T
    return attribute(sparse, task, instead, name, 1, max(1, batch_size // 2))


# ---- curves


@dataclass(frozen=True)
class Curve:
    """Metric of every prompt for nested circuits."""

    sizes: tuple[int, ...]
    parameters: tuple[float, ...]
    """Weights of each circuit's nodes."""
    only: Tensor = field(repr=False)
    """[n_sizes, n_prompts], metric with the circuit alone."""
    without: Tensor | None = field(repr=False)
    """[n_sizes, n_prompts], metric with all but the circuit; None when not measured."""
    all: Tensor = field(repr=False)
    """[n_prompts], metric of the untouched model."""
    none: Tensor = field(repr=False)
    """[n_prompts], metric with all nodes removed."""

    def first(self, n: int) -> Curve:
        """The curve at its first `n` sizes."""
        without = None if self.without is None else self.without[:n]
        return replace(self, sizes=self.sizes[:n], parameters=self.parameters[:n], only=self.only[:n], without=without)


def measure_curve(
    sparse: SparseModel,
    task: Task,
    orders: Sequence[Sequence[int]],
    sizes: Sequence[int],
    instead: Elsewhere,
    name: str = "logit_difference",
    completeness: bool = True,
    ends: Curve | None = None,
    batch_size: int = 32,
) -> Curve:
    """Metric with and without the first nodes of a ranking.

    `orders` is one ranking, made on other prompts, or one for each prompt; sizes beyond the shortest are left out.
    `ends` is a curve on the same prompts whose `all` and `none` are reused. Completeness doubles the passes.

    Raises:
        UserError: a ranking is shorter than all sizes, or removing all nodes does not change the metric.
    """
    shortest = min(map(len, orders))
    sizes = [size for size in sizes if size <= shortest]
    if not sizes:
        raise UserError(f"The ranking has {shortest} nodes; ask for circuits of at most {shortest}.")
    chosen = torch.stack([torch.stack([sparse.mask(order[:size]) for order in orders]) for size in sizes])
    chosen = chosen[:, 0] if len(orders) == 1 else chosen
    nothing = torch.zeros_like(chosen[:1])
    sets = [~chosen, *([chosen] if completeness else []), *([] if ends else [nothing, ~nothing])]
    values = measure(sparse, task, torch.cat(sets), instead, name, batch_size)
    everything, none = (ends.all, ends.none) if ends else (values[-2], values[-1])
    if abs(float((everything - none).mean())) < 1e-6:
        raise UserError(
            "Removing all nodes of these layers does not change the metric, so no circuit can be found in them; "
            "choose others."
        )
    parameters = tuple(float(np.mean([sparse.parameters(order[:size]) for order in orders])) for size in sizes)
    n = len(sizes)
    return Curve(tuple(sizes), parameters, values[:n], values[n : 2 * n] if completeness else None, everything, none)


def pool(curves: Sequence[Curve]) -> Curve:
    """The curves of several seeds as one over all their prompts; parameters are averaged."""
    n = min(len(curve.sizes) for curve in curves)
    curves = [curve.first(n) for curve in curves]
    without = [curve.without for curve in curves if curve.without is not None]
    return Curve(
        curves[0].sizes,
        tuple(np.mean([curve.parameters for curve in curves], axis=0).tolist()),
        torch.cat([curve.only for curve in curves], dim=1),
        torch.cat(without, dim=1) if without else None,
        torch.cat([curve.all for curve in curves]),
        torch.cat([curve.none for curve in curves]),
    )


# ---- tables


def draws(n_prompts: int, seed: int = 0, n_draws: int = N_DRAWS) -> Tensor:
    """Bootstrap draws of prompts, [n_draws + 1, n_prompts]; row 0 is the prompts themselves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.arange(n_prompts)[None], torch.randint(n_prompts, (n_draws, n_prompts), generator=generator)]
    )


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


def areas(curve: Curve, over: str, low: float, high: float, drawn: Tensor) -> Tensor:
    """Area under the faithfulness curve from size `low` to `high`, [n_draws + 1], flat outside the measured sizes.

    `over` is `sizes` or `parameters`.
    """
    values = shares(curve.only, curve, drawn).numpy()
    places = np.log(np.asarray(getattr(curve, over), dtype=float))
    grid = np.linspace(math.log(low), math.log(high), 65)
    lines = np.stack([np.interp(grid, places, row) for row in values])
    return torch.from_numpy(np.trapezoid(lines, grid, axis=1) / (grid[-1] - grid[0]))


def area_table(
    curves: Mapping[str, Curve], over: str = "sizes", against: str = "Lorsa heads", seed: int = 0
) -> pd.DataFrame:
    """Areas over the range of sizes that all kinds have, with intervals.

    Columns `nodes`, `from`, `to`, `area`, `low`, `high`, `lead` (area of `against` minus this one's), `lead_low`,
    `lead_high`.

    Raises:
        UserError: the kinds have no common range, or different prompts.
    """
    low = max(getattr(curve, over)[0] for curve in curves.values())
    high = min(getattr(curve, over)[-1] for curve in curves.values())
    if not low < high:
        raise UserError(f"These curves have no range of {over} in common; measure them at more sizes.")
    if len({len(curve.all) for curve in curves.values()}) > 1:
        raise UserError("These curves were measured on different prompts; measure all kinds on the same ones.")
    drawn = draws(len(curves[against].all), seed)
    by_kind = {name: areas(curve, over, low, high, drawn) for name, curve in curves.items()}
    rows = [
        (name, low, high, *sample_interval(area), *sample_interval(by_kind[against] - area))
        for name, area in by_kind.items()
    ]
    columns = ["nodes", "from", "to", "area", "low", "high", "lead", "lead_low", "lead_high"]
    return pd.DataFrame(rows, columns=columns)


def error_shares(
    sparse: SparseModel, task: Task, instead: Elsewhere, name: str = "logit_difference", batch_size: int = 32
) -> pd.DataFrame:
    """How much of the behaviour the errors carry as more layers are decomposed, from the last layer backwards.

    Columns `layers` (how many), `first` (the earliest), `errors` and `units` (the metric's fall without them, as a
    share of `fall`), `fall` (without both).
    """
    errors, number = sparse.mask(sparse.error_nodes), torch.arange(sparse.n_nodes, device=sparse.model.device)
    sets = [sparse.mask([])]
    for layer in reversed(sparse.layers):
        later = number >= sparse.columns[layer].start
        sets += [later & errors, later & ~errors, later]
    values = measure(sparse, task, torch.stack(sets), instead, name, batch_size).double().mean(dim=1)
    rows = []
    falls = (values[0] - values[1:]).view(-1, 3).tolist()
    for n, (layer, (by_errors, by_units, fall)) in enumerate(zip(reversed(sparse.layers), falls, strict=True), 1):
        rows.append((n, layer, by_errors / fall, by_units / fall, fall))
    return pd.DataFrame(rows, columns=["layers", "first", "errors", "units", "fall"])


# ---- two dictionaries


@torch.no_grad()
def match_units(sparse: SparseModel, other: SparseModel, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every node, the node of `other` in the same layer whose write direction has the largest cosine.

    `among` is a mask [n_nodes] of nodes of `other` that may be matched; all without it. Returns match and cosine,
    [n_nodes] each; error nodes match error nodes with cosine 1.
    """
    match, cosine = torch.zeros(sparse.n_nodes, dtype=torch.long), torch.ones(sparse.n_nodes)
    for layer, columns in sparse.columns.items():
        first, error = other.columns[layer].start, other.columns[layer].stop - 1
        alike = write_directions(sparse, layer) @ write_directions(other, layer).T
        if among is not None:
            alike[:, ~among[first:error]] = -torch.inf
        best = alike.max(dim=1)
        match[columns] = torch.cat([best.indices.cpu() + first, torch.tensor([error])])
        cosine[columns.start : columns.stop - 1] = best.values.cpu()
    return match, cosine


def write_directions(sparse: SparseModel, layer: int) -> Tensor:
    """What units of a layer write, scaled to norm 1: [n_units, d_model]."""
    return torch.nn.functional.normalize(sparse.layers[layer].module.W_O.detach(), dim=1)  # type: ignore[attr-defined]


# ---- the whole comparison


def usual_sizes(n_nodes: int) -> list[int]:
    """Circuit sizes: powers of 2 for at most 256 nodes (MHSA heads), else powers of 4 up to 1,024."""
    return [2**i for i in range(11) if 2**i <= n_nodes] if n_nodes <= 256 else [4**i for i in range(6)]


def compare(
    kinds: Mapping[str, SparseModel],
    task: Task,
    name: str = "logit_difference",
    ablation: str = "resample",
    seed: int = 0,
    random: Sequence[str] | None = None,
    exact_up_to: int = 0,
    batch_size: int = 32,
) -> dict[str, Curve]:
    """Curves of several kinds of nodes of the same layers: half of the prompts rank nodes, half measure circuits.

    For the kinds in `random` (all by default) the faithfulness of random nodes is measured too, as `random <name>`.
    `exact_up_to` is as in `rank_scores`.
    """
    discovery, held_out = task.split()
    curves: dict[str, Curve] = {}
    for label, sparse in kinds.items():
        order = ranking(rank_scores(sparse, discovery, name, ablation, exact_up_to, batch_size), sparse.error_nodes)
        instead, sizes = baseline(sparse, held_out, ablation), usual_sizes(sparse.n_nodes)
        # Without any node all kinds give the corrupted layers under resampling, so the first curve's ends serve all.
        ends = next(iter(curves.values()), None) if ablation == "resample" else None
        curves[label] = measure_curve(sparse, held_out, [order], sizes, instead, name, ends=ends, batch_size=batch_size)
        if random is None or label in random:
            drawn = [random_order(order, seed)]
            curves[f"random {label}"] = measure_curve(
                sparse, held_out, drawn, sizes, instead, name, False, curves[label], batch_size
            )
    return curves


_SIDES = ("only", "without", "all", "none")


def save_curves(curves: Mapping[str, Curve], path: str | Path) -> None:
    """Write curves as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    for number, (name, curve) in enumerate(curves.items()):
        about[name] = json.dumps({"number": number, "sizes": curve.sizes, "parameters": curve.parameters})
        sides = {f"{name}.{side}": getattr(curve, side) for side in _SIDES}
        # Curves share their ends, a file may not.
        tensors |= {key: value.clone() for key, value in sides.items() if value is not None}
    store.write_tensors(path, tensors, about)


def load_curves(path: str | Path) -> dict[str, Curve]:
    """Read what `save_curves` wrote."""
    tensors = store.read_tensors(path)
    header = {name: json.loads(text) for name, text in store.read_tensor_metadata(path).items()}
    return {
        name: Curve(
            tuple(about["sizes"]),
            tuple(about["parameters"]),
            *(tensors.get(f"{name}.{side}") for side in _SIDES),  # type: ignore[arg-type]
        )
        for name, about in sorted(header.items(), key=lambda item: item[1]["number"])
    }
