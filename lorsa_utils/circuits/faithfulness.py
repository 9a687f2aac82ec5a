"""How much of a behaviour a small set of nodes carries: curves against circuit size, with intervals; Lorsa, SAE, MHSA and random sets.

For a circuit C at the chosen layers and the metric M (mean over held-out prompts),

    faithfulness f(C) = (M(only C) - M(none)) / (M(all) - M(none))       1: C alone does what all nodes do
    completeness c(C) = (M(all but C) - M(none)) / (M(all) - M(none))    0: nothing is left without C

`only C` removes all nodes but C, errors too (with `keep_errors` they stay); `none` removes all nodes. Under resampling
`none` gives each layer's output on the corrupted prompt whatever the kind of units, so that all kinds share one scale.
(Wang et al. 2022; Marks et al. 2024.)

Circuits are the first nodes of a ranking made on other prompts. The area under a curve is over the logarithm of the
size, divided by its range, so that it is a mean faithfulness; curves are linear between measured sizes. Sizes are
numbers of nodes or, in the other table, of weights that the nodes are computed with. Intervals are a bootstrap over
prompts: prompts of all seeds are drawn together, each evaluated with the circuit that its own seed's discovery prompts
gave; differences between kinds are taken within a draw.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lorsa_utils import store
from lorsa_utils.circuits import nodes as circuits
from lorsa_utils.circuits.nodes import Baseline, SparseModel, SparseNodes
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.tasks import Task
from lorsa_utils.models import LanguageModel
from lorsa_utils.stats import Interval, percentile_interval

N_DRAWS = 1000


# ---- curves


def ranking(scores: Tensor, error_nodes: Sequence[int]) -> list[int]:
    """Nodes by the size of their mean score, largest first: scores [n_prompts, n_nodes]; error nodes and nodes without any are left out."""
    means = scores.mean(dim=0)
    size = means.abs()
    size[list(error_nodes)] = 0
    order = size.argsort(descending=True)
    return [int(number) for number in order[: int((size > 0).sum())]]


def random_order(order: Sequence[int], seed: int) -> list[int]:
    """The same nodes in random order: what a set of the same size reaches that was drawn from all nodes that do anything."""
    generator = torch.Generator().manual_seed(seed)
    return [order[int(i)] for i in torch.randperm(len(order), generator=generator)]


@dataclass(frozen=True)
class Curve:
    """Metric of every prompt for nested circuits."""

    sizes: tuple[int, ...]
    """Nodes in each circuit."""
    parameters: tuple[float, ...]
    """Weights that they are computed with."""
    only: Tensor = field(repr=False)
    """[n_sizes, n_prompts], metric with the circuit alone."""
    without: Tensor | None = field(repr=False)
    """[n_sizes, n_prompts], metric with all but the circuit; None when it was not measured."""
    all: Tensor = field(repr=False)
    """[n_prompts], metric of the untouched model."""
    none: Tensor = field(repr=False)
    """[n_prompts], metric with all nodes removed."""


def measure_curve(
    sparse: SparseModel,
    task: Task,
    order: Sequence[int],
    sizes: Sequence[int],
    instead: Baseline,
    name: str = "logit_difference",
    completeness: bool = True,
    keep_errors: bool = False,
    ends: Curve | None = None,
    batch_size: int = 32,
) -> Curve:
    """Faithfulness and completeness of the first nodes of a ranking.

    Args:
        sparse: the model.
        task: held-out prompts.
        order: ranking made on other prompts.
        sizes: of circuits; those beyond the ranking are left out.
        instead: for the held-out prompts.
        name: of the metric.
        completeness: measure that as well (as many passes again).
        keep_errors: let the error nodes be part of every circuit.
        ends: another curve on the same prompts, whose `all` and `none` need not be measured again.
        batch_size: prompts at a time.

    Raises:
        UserError: removing all nodes changes nothing, so that there is no behaviour to explain at these layers.
    """
    sizes = [size for size in sizes if size <= len(order)]
    if not sizes:
        raise UserError(f"The ranking has {len(order)} nodes; ask for circuits of at most so many.")
    errors = sparse.mask(sparse.error_nodes)
    chosen = torch.stack([sparse.mask(list(order[:size])) for size in sizes])
    outside = ~(chosen | errors) if keep_errors else ~chosen
    sets = [outside, *([chosen] if completeness else [])]
    sets += [] if ends else [sparse.mask([])[None], torch.ones_like(chosen[:1])]
    reference = circuits.clean_logits(sparse.model, task, batch_size) if name == "kl" else None
    found = circuits.measure(sparse, task, torch.cat(sets), instead, name, reference, batch_size)
    everything, none = (ends.all, ends.none) if ends else (found[-2], found[-1])
    if abs(float((everything - none).mean())) < 1e-6:
        raise UserError(
            "Removing all nodes of these layers does not change the metric, so no circuit can be found in them; choose others."
        )
    parameters, n = tuple(float(sparse.parameters(order[:size])) for size in sizes), len(sizes)
    return Curve(tuple(sizes), parameters, found[:n], found[n : 2 * n] if completeness else None, everything, none)


def measure_local_curve(
    sparse: SparseModel,
    task: Task,
    sizes: Sequence[int],
    instead: Baseline,
    ends: Curve | None = None,
    batch_size: int = 32,
) -> Curve:
    """Faithfulness of circuits of single prompts: each prompt's nodes are ranked by gradient times activation on that very prompt.

    Sparse units are made to differ between prompts, so that what one prompt needs may be a small set where what all
    prompts need is not. Nothing is held out, the ranking is by gradients and the test by removal. `parameters` are
    means over prompts; the errors are removed.

    Args:
        sparse: the model.
        task: prompts.
        sizes: of circuits.
        instead: for the prompts.
        ends: see `measure_curve`.
        batch_size: prompts at a time.
    """
    scores = circuits.attribute(sparse, task, instead, batch_size=max(1, batch_size // 2))
    orders = [ranking(row[None], sparse.error_nodes) for row in scores]
    sizes = [size for size in sizes if size <= min(map(len, orders))]
    if not sizes:
        raise UserError(
            f"A prompt has {min(map(len, orders))} nodes that do anything; ask for circuits of at most so many."
        )
    chosen = torch.stack([torch.stack([sparse.mask(order[:size]) for order in orders]) for size in sizes])
    every = torch.ones_like(chosen[:1])
    found = circuits.measure(
        sparse, task, torch.cat([~chosen, *([] if ends else [~every, every])]), instead, batch_size=batch_size
    )
    everything, none = (ends.all, ends.none) if ends else (found[-2], found[-1])
    parameters = tuple(float(np.mean([sparse.parameters(order[:size]) for order in orders])) for size in sizes)
    return Curve(tuple(sizes), parameters, found[: len(sizes)], None, everything, none)


def pool(curves: Sequence[Curve]) -> Curve:
    """The curves of several seeds as one over all their prompts; parameters are their mean."""
    first = curves[0]
    if any(curve.sizes != first.sizes for curve in curves):
        common = min((curve.sizes for curve in curves), key=len)
        return pool([_first_sizes(curve, len(common)) for curve in curves])
    without = (
        None
        if first.without is None
        else torch.cat([curve.without for curve in curves if curve.without is not None], dim=1)
    )
    parameters = tuple(float(np.mean([curve.parameters[i] for curve in curves])) for i in range(len(first.sizes)))
    only, everything, none = (
        torch.cat([getattr(curve, name) for curve in curves], dim=-1) for name in ("only", "all", "none")
    )
    return Curve(first.sizes, parameters, only, without, everything, none)


def _first_sizes(curve: Curve, n: int) -> Curve:
    without = None if curve.without is None else curve.without[:n]
    return Curve(curve.sizes[:n], curve.parameters[:n], curve.only[:n], without, curve.all, curve.none)


def draws(n_prompts: int, seed: int = 0, n_draws: int = N_DRAWS) -> Tensor:
    """Prompts drawn again with replacement, [n_draws + 1, n_prompts]; row 0 is the prompts themselves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.arange(n_prompts)[None], torch.randint(n_prompts, (n_draws, n_prompts), generator=generator)]
    )


def shares(values: Tensor, curve: Curve, drawn: Tensor) -> Tensor:
    """(M - M(none)) / (M(all) - M(none)) for values [n_sizes, n_prompts] in every draw: [n_draws + 1, n_sizes]."""
    means = values.double()[:, drawn].mean(dim=2).T
    everything, none = (side.double()[drawn].mean(dim=1)[:, None] for side in (curve.all, curve.none))
    return (means - none) / (everything - none)


def interval(over_draws: Tensor) -> Interval:
    """The first draw is the value, the others [n_draws + 1] give the interval."""
    return percentile_interval(float(over_draws[0]), over_draws[1:])


def curve_table(curves: Mapping[str, Curve], seed: int = 0) -> pd.DataFrame:
    """Faithfulness and completeness of several kinds with intervals.

    Returns:
        columns `nodes` (name of the curve), `size`, `parameters`, `faithfulness`, `low`, `high`, `completeness`,
        `completeness_low`, `completeness_high` (NaN where it was not measured).
    """
    rows = []
    for name, curve in curves.items():
        drawn = draws(len(curve.all), seed)
        faithful = shares(curve.only, curve, drawn)
        left = None if curve.without is None else shares(curve.without, curve, drawn)
        for i, (size, parameters) in enumerate(zip(curve.sizes, curve.parameters, strict=True)):
            one = interval(faithful[:, i])
            other = Interval(math.nan, math.nan, math.nan) if left is None else interval(left[:, i])
            row = {
                "nodes": name,
                "size": size,
                "parameters": parameters,
                "faithfulness": one.value,
                "low": one.low,
                "high": one.high,
            }
            rows.append(
                row | {"completeness": other.value, "completeness_low": other.low, "completeness_high": other.high}
            )
    return pd.DataFrame(rows)


def areas(curve: Curve, over: str, low: float, high: float, drawn: Tensor) -> Tensor:
    """Area under the faithfulness curve between two sizes, over the logarithm, in every draw: [n_draws + 1].

    Args:
        curve: measured; at sizes below its first it is 0 at size 0 nodes, that is, the first value holds.
        over: `sizes` or `parameters`.
        low: where the area begins.
        high: where it ends; beyond the curve's last size the last value holds.
        drawn: of `draws`.
    """
    values = shares(curve.only, curve, drawn).numpy()
    places = np.log(np.asarray(getattr(curve, over), dtype=float))
    grid = np.linspace(math.log(low), math.log(high), 65)
    lines = np.stack([np.interp(grid, places, row) for row in values])
    return torch.from_numpy(np.trapezoid(lines, grid, axis=1) / (grid[-1] - grid[0]))


def area_table(
    curves: Mapping[str, Curve], over: str = "sizes", against: str = "Lorsa heads", seed: int = 0
) -> pd.DataFrame:
    """Areas of several kinds over the range of sizes that all of them have, and what `against` has more than each, with intervals.

    Returns:
        columns `nodes`, `from`, `to`, `area`, `low`, `high`, `lead` (area of `against` minus this one's), `lead_low`,
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
    found = {name: areas(curve, over, low, high, drawn) for name, curve in curves.items()}
    rows = []
    for name, area in found.items():
        one, lead = interval(area), interval(found[against] - area)
        row = {"nodes": name, "from": low, "to": high, "area": one.value, "low": one.low, "high": one.high}
        rows.append(row | {"lead": lead.value, "lead_low": lead.low, "lead_high": lead.high})
    return pd.DataFrame(rows)


def minimality(
    sparse: SparseModel,
    task: Task,
    circuit: Sequence[int],
    instead: Baseline,
    name: str = "logit_difference",
    batch_size: int = 32,
) -> pd.DataFrame:
    """What each node of a circuit adds to it: the fall of faithfulness when it is left out, one row a node (`node`, `adds`).

    A circuit is minimal when no node can be left out for nothing.
    """
    every = sparse.mask([])
    inside = sparse.mask(list(circuit))
    without = [~(inside & ~sparse.mask([node])) for node in circuit]
    reference = circuits.clean_logits(sparse.model, task, batch_size) if name == "kl" else None
    found = circuits.measure(
        sparse, task, torch.stack([every, ~every, ~inside, *without]), instead, name, reference, batch_size
    )
    whole, none, own, *rest = found.double().mean(dim=1).tolist()
    adds = [(own - value) / (whole - none) for value in rest]
    return pd.DataFrame({"node": [str(sparse.node(node)) for node in circuit], "adds": adds})


# ---- agreement, stability


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation; NaN for fewer than three values."""
    return float(pd.Series(one).rank().corr(pd.Series(other[: len(one)]).rank())) if len(one) > 2 else math.nan


def agreement(exact: Tensor, estimates: Mapping[str, Tensor]) -> pd.DataFrame:
    """How well estimated effects of some nodes agree with exact ones, all [n_nodes] means over prompts.

    Returns:
        columns `estimate`, `rank_correlation` (Spearman), `correlation` (Pearson), `slope` (of exact on estimated,
        through 0) and `n`.
    """
    rows = []
    for name, found in estimates.items():
        one, other = exact.double().numpy(), found.double().numpy()
        rank = rank_correlation(one, other)
        straight = float(np.corrcoef(one, other)[0, 1]) if len(one) > 2 else math.nan
        slope = float((one * other).sum() / max((other * other).sum(), 1e-30))
        rows.append(
            {"estimate": name, "rank_correlation": rank, "correlation": straight, "slope": slope, "n": len(one)}
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def match_units(one: SparseModel, other: SparseModel, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every node of one model the node of the other, in the same layer, that writes most nearly the same direction.

    Args:
        one: with Lorsa heads or SAE features.
        other: the same or another kind, at the same layers.
        among: mask [n_nodes] of nodes of the other that may be matched; all without it.

    Returns:
        match [n_nodes] and cosine [n_nodes]; error nodes match error nodes with cosine 1.
    """
    if list(one.layers) != list(other.layers):
        raise UserError("The two models have different layers taken apart; give modules for the same layers.")
    match, cosine = torch.zeros(one.n_nodes, dtype=torch.long), torch.ones(one.n_nodes)
    for layer, columns in one.columns.items():
        sides = [model.layers[layer] for model in (one, other)]
        if not all(isinstance(nodes, SparseNodes) for nodes in sides):
            raise UserError("MHSA heads have no write direction of their own; match Lorsa heads or SAE features.")
        write = [torch.nn.functional.normalize(side.module.W_O.detach(), dim=1) for side in sides]  # type: ignore
        first = other.columns[layer].start
        alike = write[0] @ write[1].T
        if among is not None:
            alike[:, ~among[first : other.columns[layer].stop - 1]] = -torch.inf
        best = alike.max(dim=1)
        match[columns.start : columns.stop - 1] = (best.indices + first).cpu()
        cosine[columns.start : columns.stop - 1] = best.values.cpu()
        match[columns.stop - 1] = other.columns[layer].stop - 1
    return match, cosine


def stability(
    one: SparseModel, other: SparseModel, scores: Tensor, other_scores: Tensor, n: int = 50
) -> dict[str, float]:
    """Do two trainings give the same circuit?

    Args:
        one: with the first modules.
        other: with the second.
        scores: effects of the nodes of the first, [n_prompts, n_nodes], on some prompts.
        other_scores: of the second, on the same prompts.
        n: nodes of the circuit.

    Returns:
        `matched` (share of the first n nodes whose match, cosine at least 0.7, is among the first 2n of the other),
        `cosine` (mean of the n nodes with their matches), `rank_correlation` (Spearman of the effects of the n nodes
        and of their matches), `chance_cosine` and `chance_rank_correlation` (the same with random nodes of the second
        that do anything in the place of matches).
    """
    order, other_order = ranking(scores, one.error_nodes)[:n], ranking(other_scores, other.error_nodes)
    match, cosine = match_units(one, other)
    mine, theirs = scores.mean(dim=0)[order].numpy(), other_scores.mean(dim=0)
    likely = set(other_order[: 2 * n])
    matched = [int(match[node]) in likely and float(cosine[node]) >= 0.7 for node in order]
    by_chance = [random_order(other_order, seed)[: len(order)] for seed in range(20)]
    chance = [rank_correlation(mine[: len(some)], theirs[some].numpy()) for some in by_chance]
    return {
        "n": len(order),
        "matched": float(np.mean(matched)),
        "cosine": float(cosine[order].mean()),
        "rank_correlation": rank_correlation(mine, theirs[match[order]].numpy()),
        "chance_rank_correlation": float(np.nanmean(chance)),
        "chance_cosine": float(np.mean([_cosines(one, other, order, some) for some in by_chance])),
    }


@torch.no_grad()
def _cosines(one: SparseModel, other: SparseModel, nodes: Sequence[int], others: Sequence[int]) -> float:
    values = []
    for a, b in zip(nodes, others, strict=False):
        writes = []
        for model, number in ((one, a), (other, b)):
            layer, unit = model.node(number)
            writes.append(model.layers[layer].module.W_O[unit])  # type: ignore[attr-defined]
        values.append(float(torch.nn.functional.cosine_similarity(writes[0], writes[1], dim=0)))
    return float(np.mean(values))


def error_shares(
    sparse: SparseModel, task: Task, instead: Baseline, name: str = "logit_difference", batch_size: int = 32
) -> pd.DataFrame:
    """How much of the behaviour the error terms carry as more layers are taken apart, from the last layer backwards.

    Returns:
        one row for each number of layers: `layers` (how many), `first` (the earliest of them), `errors` (fall of the
        metric when their errors are removed, as a share of the fall when all their nodes are) and `units` (the same for
        all their units).
    """
    sets = [sparse.mask([])]
    for layer in reversed(sparse.layers):
        mine = torch.cat(
            [torch.arange(columns.start, columns.stop) for other, columns in sparse.columns.items() if other >= layer]
        )
        every = sparse.mask(mine)
        errors = sparse.mask([sparse.columns[other].stop - 1 for other in sparse.layers if other >= layer])
        sets += [errors, every & ~errors, every]
    reference = circuits.clean_logits(sparse.model, task, batch_size) if name == "kl" else None
    found = circuits.measure(sparse, task, torch.stack(sets), instead, name, reference, batch_size).double().mean(dim=1)
    rows = []
    for number, layer in enumerate(reversed(sparse.layers)):
        by_errors, by_units, fall = (float(found[0] - value) for value in found[1 + 3 * number : 4 + 3 * number])
        rows.append(
            {"layers": number + 1, "first": layer, "errors": by_errors / fall, "units": by_units / fall, "fall": fall}
        )
    return pd.DataFrame(rows)


# ---- features that several heads write together


@torch.no_grad()
def collective_effects(
    lorsa: SparseModel,
    sae: SparseModel,
    task: Task,
    nodes: Sequence[int],
    heads_needed: Sequence[int],
    kind: str = "resample",
    batch_size: int = 32,
) -> pd.DataFrame:
    """Is a feature that several MHSA heads write together one unit? Remove it as one, as an SAE feature, head by head.

    For every chosen Lorsa head the fall of the metric when the following is resampled: the Lorsa head; the SAE feature
    that writes most nearly its direction among those that do anything on the task; of each MHSA head the part along its
    write direction (the largest is shown).

    Args:
        lorsa: with Lorsa heads.
        sae: with SAE features at the same layers.
        task: prompts.
        nodes: of `lorsa`.
        heads_needed: MHSA heads that each of them comes from (`correspondence.heads_needed`).
        kind: of ablation.
        batch_size: prompts at a time.

    Returns:
        one row a node: `node`, `mhsa_heads`, effects `lorsa`, `sae`, `mhsa`, `sae_cosine`, `sae_share`, `mhsa_share`
        (of Lorsa's effect).
    """
    model = lorsa.model
    instead, instead_sae = circuits.baseline(lorsa, task, kind), circuits.baseline(sae, task, kind)
    match, cosine = match_units(lorsa, sae, rank_scores(sae, task, "logit_difference", kind).abs().sum(dim=0) > 0)
    own = circuits.effects(lorsa, task, nodes, instead, batch_size=batch_size).mean(dim=1)
    features = circuits.effects(sae, task, match[list(nodes)].tolist(), instead_sae, batch_size=batch_size).mean(dim=1)
    places = [lorsa.node(node) for node in nodes]
    single: dict[int, float] = {}
    for layer in sorted({place.layer for place in places}):
        mine = [number for number, place in enumerate(places) if place.layer == layer]
        write = lorsa.layers[layer].module.W_O[[places[number].unit for number in mine]]  # type: ignore[attr-defined]
        found = _largest_head_effects(model, task, layer, torch.nn.functional.normalize(write, dim=1), batch_size)
        single |= dict(zip(mine, found, strict=True))
    rows = []
    for number, node in enumerate(nodes):
        effect = float(own[number])
        row = {
            "node": str(places[number]),
            "mhsa_heads": int(heads_needed[number]),
            "lorsa": effect,
            "sae": float(features[number]),
        }
        row |= {"sae_cosine": float(cosine[node]), "mhsa": single[number]}
        rows.append(row | {"sae_share": float(features[number]) / effect, "mhsa_share": single[number] / effect})
    return pd.DataFrame(rows)


def _largest_head_effects(
    model: LanguageModel, task: Task, layer: int, directions: Tensor, batch_size: int
) -> list[float]:
    """Largest fall of the logit difference when one MHSA head's part along a direction is the corrupted prompt's, for each [n, d_model].

    To first order, by the gradient at the clean prompt: the parts are small, and there are many of them.
    """
    site = model.site(layer)
    total = torch.zeros(site.n_heads, len(directions), device=directions.device)
    heads = circuits.take_apart(model, [layer])
    for first in range(0, len(task), batch_size):
        part = task.rows(slice(first, first + batch_size))
        gradient = circuits.gradients(heads, part, "logit_difference", {}, [layer], None)[layer]
        clean, corrupted = (
            site.head_outputs(model.capture(side, [layer])[layer][0].float()) for side in (part.clean, part.corrupted)
        )
        total += torch.einsum("blhd,nd,ble,ne->hn", clean - corrupted, directions, gradient, directions)
    effects = total / len(task)
    return effects.gather(0, effects.abs().argmax(dim=0, keepdim=True))[0].tolist()


# ---- the whole comparison


def usual_sizes(n_nodes: int) -> list[int]:
    """Circuit sizes to measure: powers of 2 where there are few nodes (MHSA heads), else powers of 4 up to 1,024."""
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
    """Curves of several kinds of nodes on one task, for one draw of prompts.

    Half of the prompts rank the nodes, the other half measures the circuits.

    Args:
        kinds: name to model, with the same layers taken apart.
        task: prompts of one seed.
        name: of the metric.
        ablation: see `circuits.baseline`.
        seed: of the random sets.
        random: kinds (all by default) of which random sets of the same sizes are measured as well, faithfulness alone,
            as `random <name>`.
        exact_up_to: rank by exact effects where there are no more nodes than this, else by gradient times activation.
        batch_size: prompts at a time.

    Returns:
        name to curve.
    """
    discovery, held_out = task.split()
    found: dict[str, Curve] = {}
    for label, sparse in kinds.items():
        order = ranking(rank_scores(sparse, discovery, name, ablation, exact_up_to, batch_size), sparse.error_nodes)
        instead, sizes = circuits.baseline(sparse, held_out, ablation), usual_sizes(sparse.n_nodes)
        # Without any node all kinds give the corrupted layers under resampling, so the first curve's ends serve all.
        ends = next(iter(found.values()), None) if ablation == "resample" else None
        found[label] = measure_curve(sparse, held_out, order, sizes, instead, name, ends=ends, batch_size=batch_size)
        if random is None or label in random:
            drawn, known = random_order(order, seed), found[label]
            found[f"random {label}"] = measure_curve(
                sparse, held_out, drawn, sizes, instead, name, False, False, known, batch_size
            )
    return found


def rank_scores(
    sparse: SparseModel,
    task: Task,
    name: str = "logit_difference",
    ablation: str = "resample",
    exact_up_to: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """Effects of all nodes on some prompts, [n_prompts, n_nodes]: exact ones where the nodes are few, else gradient times activation."""
    instead = circuits.baseline(sparse, task, ablation)
    if sparse.n_nodes <= exact_up_to:
        return circuits.effects(sparse, task, range(sparse.n_nodes), instead, name, batch_size).T
    reference = circuits.clean_logits(sparse.model, task, batch_size) if name == "kl" else None
    return circuits.attribute(sparse, task, instead, name, 1, max(1, batch_size // 2), reference)


def save_curves(curves: Mapping[str, Curve], path: str | Path) -> None:
    """Write curves as one safetensors file."""
    tensors, about = {}, {}
    for number, (name, curve) in enumerate(curves.items()):
        about[name] = json.dumps({"number": number, "sizes": curve.sizes, "parameters": curve.parameters})
        for part in ("only", "without", "all", "none"):
            if (value := getattr(curve, part)) is not None:
                tensors[f"{name}.{part}"] = value.clone()  # curves share their ends, a file may not
    store.write_tensors(path, tensors, about)


def load_curves(path: str | Path) -> dict[str, Curve]:
    """Read what `save_curves` wrote."""
    tensors = store.read_tensors(path)
    found = {}
    header = {name: json.loads(text) for name, text in store.read_tensor_metadata(path).items()}
    for name, about in sorted(header.items(), key=lambda item: item[1]["number"]):
        parts = [tensors.get(f"{name}.{part}") for part in ("only", "without", "all", "none")]
        found[name] = Curve(tuple(about["sizes"]), tuple(about["parameters"]), *parts)  # type: ignore[arg-type]
    return found
