"""Head discovery: which unit of an attention layer does what, with thresholds from nulls and names that hold on unseen prompts.

The way of a name, for one family (see `prompts`):

1. *Scores* of every unit on half of the prompt pairs (the discovery half, even pair numbers):
   share      z-pattern mass on the predicted sources / mass on all sources, both summed over labelled queries where it
              is active
   precision  mean activation at labelled queries / (that + mean activation at controls); chance is 1/2
   recall     share of labelled queries where it is active with more than half of its mass on the predicted sources
   auc        chance that its activation at a labelled query exceeds that at a control (ties count half); in families
              without controls: that its mass on the predicted sources exceeds that on as many random earlier positions
   logit      mean direct effect on the logit of the predicted token, minus that on the predicted token of another
              prompt
2. *Bars*: floors in `FAMILIES` that the meaning of the name asks for: half of the pattern on the source, three times as
   active as at controls, an effect on the logit of the right sign. Where more than `NULL_RATE` of the heads of a
   randomly initialised Lorsa of the same shape clear all floors on the same prompts, the bar of the share is raised
   until no more do.
3. *Confirmation* on the other half: the unit must clear the same bars again, and each of its scores must differ from
   what shuffled labels give: labelled against control swapped within pairs, predicted against random sources, own
   against another prompt's token. p-values come from sign flips of whole pairs (queries of one prompt are not
   independent), the largest of a unit's p-values counts, and Holm's method over all units and families that reached
   this step keeps the chance of even one wrong name at `ERROR_RATE`. Holm, because it needs no assumption on how heads
   depend on each other, and they share patterns and text.

Numbers in tables are those of the confirmation half, which no unit was chosen on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.prompts import PromptSet
from lorsa_utils.heads.units import Removals, Unembedding, Units, by_pair, final_norm
from lorsa_utils.initialize import initialize
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import LanguageModel
from lorsa_utils.stats import N_FLIPS, auc, holm, sign_flip_p

NULL_RATE = 0.001
"""Share of random-init heads that may clear all bars of a family."""
ERROR_RATE = 0.05
"""Chance that a table holds even one name that shuffled labels would have given."""
MIN_SUPPORT = 8
"""A unit, real or random, is judged when it is active at a labelled query of at least so many pairs; fewer cannot be significant."""
SCORES = ("share", "precision", "recall", "auc", "logit")


class Family(NamedTuple):
    """What a name asks for."""

    label: str
    """For people."""
    share: float
    """Least share of the z pattern on the predicted sources."""
    precision: float = 0.75
    """Least precision (three times as active on labelled positions as on controls); without effect in families without controls."""
    logit_sign: int = 0
    """1: must raise the predicted token, -1: must lower it, 0: what it writes does not matter."""
    raised: bool = True
    """Whether the null raises the bar.

    Not for names that only describe where a head looks: a random head that rests on the first token is a sink too (how
    many of them do is in `Discovery.bars`)."""


# From the most to the least specific: a unit that earns several names is shown under the first, all are listed.
FAMILIES: dict[str, Family] = {
    "subtoken_induction": Family("subtoken induction", 0.5, logit_sign=1),
    "copy_suppression": Family("copy suppression", 0.5, logit_sign=-1),
    "name_mover": Family("name mover", 0.5, logit_sign=1),
    "successor": Family("successor", 0.5, logit_sign=1),
    "arithmetic": Family("arithmetic", 0.5),
    "induction": Family("induction", 0.5),
    "duplicate_token": Family("duplicate token", 0.5),
    "previous_token": Family("previous token", 0.5),
    "attention_sink": Family("attention sink", 0.5, raised=False),
    "thematic_anchor": Family("thematic anchor", 0.5),
    "local": Family("local/positional", 0.75, raised=False),
}


# ---- reading


@dataclass(frozen=True)
class Reading:
    """What units of one kind did on the prompts of one family. Masses and effects are at labelled queries alone."""

    prompts: PromptSet = field(repr=False)
    activation: Tensor = field(repr=False)
    """[n_queries, n_units]."""
    at_source: Tensor = field(repr=False)
    """[n_labelled, n_units], mass on the predicted sources."""
    at_random: Tensor = field(repr=False)
    """[n_labelled, n_units], mass on random earlier positions, scaled to as many as there are predicted sources."""
    total: Tensor = field(repr=False)
    """[n_labelled, n_units], mass on all sources."""
    logit: Tensor | None = field(repr=False)
    """[n_labelled, n_units], direct effect on the logit of the predicted token; None where the family predicts none."""
    logit_other: Tensor | None = field(repr=False)
    """[n_labelled, n_units], the same for the predicted token of another prompt."""


@torch.no_grad()
def read(
    model: LanguageModel,
    layer: int,
    kinds: Mapping[str, Units],
    prompts: PromptSet,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Reading]:
    """Read several kinds of units on the same prompts, in one pass of the model.

    Args:
        model: the language model; the whole of it runs where the family predicts a token, else it stops at `layer`.
        layer: where the units are.
        kinds: name to units.
        prompts: of one family.
        batch_size: prompts at a time.
        seed: of the random sources and the exchange of predicted tokens, which are the same for all kinds.
    """
    generator = torch.Generator().manual_seed(seed)
    others = _random_sources(prompts, generator)
    # The scale makes random masses comparable where there were fewer random positions than sources.
    scale = prompts.sources.sum(dim=1) / others.sum(dim=1).clamp_min(1)
    maps = torch.stack([prompts.sources.float(), others.float() * scale[:, None]])
    wanted = (prompts.predicted, _exchange(prompts, generator)) if prompts.predicts else ()
    unembedding = Unembedding(model)
    parts: dict[str, list[list[Tensor]]] = {name: [] for name in kinds}
    order = []
    for batch in torch.arange(len(prompts.tokens)).split(batch_size):
        x, y, residual = _layer_and_residual(model, layer, prompts.tokens[batch], prompts.predicts)
        prepared = {name: units.prepare(x, y) for name, units in kinds.items()}
        for place, number in enumerate(batch.tolist()):
            queries = (prompts.row == number).nonzero()[:, 0]
            order.append(queries)
            positions, labelled = prompts.position[queries].to(x.device), prompts.positive[queries].to(x.device)
            directions = [
                unembedding.directions(residual[place, positions[labelled]], tokens[queries].to(x.device)[labelled])
                for tokens in wanted
            ]
            for name, units in kinds.items():
                rows = units.rows(prepared[name], place, positions, maps[:, queries].to(x.device))
                pieces = [rows.activation, *(one[labelled] for one in (*rows.mass, rows.total))]
                value = rows.value[labelled]
                pieces += [units.along(prepared[name], place, positions[labelled], value, each) for each in directions]
                parts[name].append([piece.cpu() for piece in pieces])
    return {name: _reading(prompts, torch.cat(order), pieces) for name, pieces in parts.items()}


def _reading(prompts: PromptSet, order: Tensor, pieces: list[list[Tensor]]) -> Reading:
    """Put what was read row by row back into the order of the queries."""
    joined = [torch.cat(side) for side in zip(*pieces, strict=True)]
    labelled = order[prompts.positive[order]]
    sides = [joined[0][order.argsort()], *(side[labelled.argsort()] for side in joined[1:])]
    return Reading(prompts, *sides, *([None, None] if len(sides) == 4 else []))


def _random_sources(prompts: PromptSet, generator: torch.Generator) -> Tensor:
    """For each query as many earlier positions as it has sources, none of them a source (fewer where there are no more)."""
    length = prompts.sources.shape[1]
    open_to = (torch.arange(length) <= prompts.position[:, None]) & ~prompts.sources
    keys = torch.rand(prompts.sources.shape, generator=generator).masked_fill(~open_to, 2.0)
    rank = keys.argsort(dim=1).argsort(dim=1)
    return (rank < prompts.sources.sum(dim=1, keepdim=True)) & open_to


def _exchange(prompts: PromptSet, generator: torch.Generator) -> Tensor:
    """Predicted tokens dealt out anew among labelled queries, [n_queries]."""
    tokens = prompts.predicted.clone()
    labelled = prompts.positive.nonzero()[:, 0]
    tokens[labelled] = tokens[labelled[torch.randperm(len(labelled), generator=generator)]]
    return tokens


def _layer_and_residual(model: LanguageModel, layer: int, tokens: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer reads and writes and, when the `whole` model is to run (else empty), what its last norm reads."""
    if not whole:
        x, y = (side.float() for side in model.capture(tokens, [layer])[layer])
        return x, y, x[:0]
    found: dict[str, Tensor] = {}

    def observe(attn_input: Tensor, attn_output: Tensor) -> Tensor:
        found["x"], found["y"] = attn_input, attn_output
        return attn_output

    def before_norm(module: Any, arguments: tuple[Tensor, ...]) -> None:
        found["residual"] = arguments[0]

    hook = final_norm(model).register_forward_pre_hook(before_norm)
    try:
        with model.splice({layer: observe}):
            model.logits(tokens, [0])
    finally:
        hook.remove()
    return found["x"].float(), found["y"].float(), found["residual"].float()


# ---- scores


def score(reading: Reading, queries: Tensor | None = None) -> pd.DataFrame:
    """Scores of every unit, one row a unit (see the module's docstring), and the columns `active`, `support` and `size`.

    Args:
        reading: of one family.
        queries: mask [n_queries] of those that count; all without it.

    Returns:
        NaN where a score is not defined: `share` of a unit that is never active, `precision` without controls, `logit`
        without prediction. `active` is the share of labelled queries where the unit is active, `support` the number of
        pairs with such a query, `size` the mean activation at labelled queries (how much the unit writes there).
    """
    prompts = reading.prompts
    queries = torch.ones_like(prompts.positive) if queries is None else queries
    kept = queries[prompts.positive]
    if not bool(kept.any()):
        raise UserError(f"No labelled position of family {prompts.family} is left; make more prompts.")
    labelled = reading.activation[prompts.positive & queries]
    at_source, at_random, total = (side[kept] for side in (reading.at_source, reading.at_random, reading.total))
    result = {"share": at_source.sum(dim=0) / total.sum(dim=0)}
    if prompts.has_controls:
        controls = reading.activation[~prompts.positive & queries]
        means = labelled.mean(dim=0), controls.mean(dim=0)
        result["precision"] = means[0] / (means[0] + means[1])
        result["auc"] = auc(labelled, controls)
    else:
        result["precision"] = torch.full_like(result["share"], torch.nan)
        result["auc"] = auc(at_source, at_random)
    result["recall"] = ((labelled > 0) & (at_source > 0.5 * total)).double().mean(dim=0)
    result["logit"] = torch.full_like(result["share"], torch.nan)
    if reading.logit is not None and reading.logit_other is not None:
        result["logit"] = (reading.logit[kept] - reading.logit_other[kept]).mean(dim=0)
    result["active"] = (labelled > 0).double().mean(dim=0)
    result["support"] = (by_pair(labelled, prompts.pair[prompts.positive & queries]) > 0).sum(dim=0)
    result["size"] = labelled.double().mean(dim=0)
    return pd.DataFrame({name: result[name].double().numpy() for name in (*SCORES, "active", "support", "size")})


def halves(prompts: PromptSet) -> tuple[PromptSet, PromptSet]:
    """The discovery half (even pair numbers) and the confirmation half (odd ones)."""
    return prompts.keep_pairs(lambda pair: pair % 2 == 0), prompts.keep_pairs(lambda pair: pair % 2 == 1)


def p_values(
    reading: Reading,
    chosen: Sequence[int],
    sign: int,
    queries: Tensor | None = None,
    seed: int = 0,
    n_flips: int = N_FLIPS,
) -> np.ndarray:
    """For each chosen unit the largest of its p-values against shuffled labels, [n_chosen].

    Per pair of prompts, three differences: mass on predicted minus random sources; mean activation at labelled queries
    minus controls (where there are any); direct effect on the own minus another prompt's token (where `sign` is not 0).
    Under the null each pair's difference is as likely to have the other sign. The statistic is sum(d) / sqrt(sum(d^2)),
    the p-value one-sided.

    Args:
        reading: of one family.
        chosen: units.
        sign: of the effect on logits that the family asks for; 0 leaves it out.
        queries: mask [n_queries] of those that count; all without it.
        seed: of the flips.
        n_flips: how many; no p-value is below 1 / (n_flips + 1).
    """
    prompts, units = reading.prompts, torch.tensor(list(chosen), dtype=torch.long)
    queries = torch.ones_like(prompts.positive) if queries is None else queries
    kept = queries[prompts.positive]
    labelled = prompts.positive & queries
    pairs = prompts.pair[labelled]
    differences = [by_pair((reading.at_source - reading.at_random)[kept][:, units], pairs)]
    if prompts.has_controls:
        controls = ~prompts.positive & queries
        means = [by_pair(reading.activation[side][:, units], prompts.pair[side]) for side in (labelled, controls)]
        differences.append(means[0] - means[1])
    if sign and reading.logit is not None and reading.logit_other is not None:
        differences.append(sign * by_pair((reading.logit - reading.logit_other)[kept][:, units], pairs))
    return np.max([sign_flip_p(one, seed, n_flips) for one in differences], axis=0)


# ---- discovery


@dataclass(frozen=True)
class Discovery:
    """Names of units and everything they rest on. Made by `discover`."""

    scores: pd.DataFrame
    """Columns `unit`, `family`, `half` (`discovery`, `confirmation`) and those of `score`."""
    bars: pd.DataFrame
    """One row a family: `share_floor`, `share` (the bar), `precision`, `null_rate` (share of judged random-init heads that clear all
    floors) and `n_null` (how many are judged, see `MIN_SUPPORT`; 0 without a null)."""
    names: pd.DataFrame
    """One row for each unit and family that cleared the bars on the discovery half: `unit`, `family`, `series`, `p`, `confirmed`
    (cleared them again) and `named` (also significant by Holm's method)."""
    null: pd.DataFrame
    """As `scores`, for the random-init Lorsa; empty without one."""
    others: dict[str, pd.DataFrame]
    """As `scores`, for each other kind of units that read the same prompts."""
    skipped: dict[str, str]
    """Families without prompts, and why."""

    def families(self, unit: int) -> list[str]:
        """Every family of a unit, the most specific first."""
        return [family for family in FAMILIES if family in self._named.get(unit, ())]

    @cached_property
    def _named(self) -> dict[int, set[str]]:
        """Families of each unit that has a name."""
        return self.names[self.names["named"].astype(bool)].groupby("unit")["family"].agg(set).to_dict()

    def units(self, family: str) -> list[int]:
        """Named units of a family, by what they write from the predicted sources (share times size, confirmation half), most first."""
        named = set(self.names.query("family == @family and named")["unit"])
        rows = self.scores.query("family == @family and half == 'confirmation'").set_index("unit")
        worth = rows["share"] * rows["size"]
        return [int(unit) for unit in worth.sort_values(ascending=False).index if unit in named]

    def halves(self, family: str, kind: str | None = None) -> dict[str, pd.DataFrame]:
        """The scores of one family, of the units or of another `kind`: half to a table indexed by unit."""
        scores = self.scores if kind is None else self.others[kind]
        mine = scores[scores["family"] == family].drop(columns="family").set_index("unit")
        return {half: mine[mine["half"] == half].drop(columns="half") for half in ("discovery", "confirmation")}

    def counts(self) -> dict[str, int]:
        """Named units of every family that was looked for."""
        return {family: len(self.units(family)) for family in FAMILIES if family in set(self.scores["family"])}


def random_lorsa(lorsa: Lorsa, model: LanguageModel, layer: int, tokens: Tensor, mask: Tensor, seed: int = 0) -> Lorsa:
    """A Lorsa of the same shape with random weights, matched in scale to the layer: the null of every score.

    Args:
        lorsa: whose shape to take.
        model: the language model.
        layer: of the Lorsa.
        tokens: some text, [n, length].
        mask: its counted tokens, [n, length].
        seed: of the weights.
    """
    x, y = (side.float() for side in model.capture(tokens, [layer])[layer])
    null = Lorsa(lorsa.config).to(x.device)
    null.fold(initialize(null, model.site(layer), x, y, mask.to(x.device), "random", seed))
    return null.requires_grad_(False)


def discover(
    model: LanguageModel,
    layer: int,
    units: Units,
    sets: Mapping[str, PromptSet],
    null: Units | None = None,
    *,
    others: Mapping[str, Units] | None = None,
    skipped: Mapping[str, str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Discovery:
    """Score all units on all families and name those that clear every bar on both halves of the prompts.

    Args:
        model: the language model.
        layer: where the units are.
        units: Lorsa heads, SAE features or MHSA heads.
        sets: prompts of each family (`prompts.standard`).
        null: a random-init Lorsa's heads; without it bars are the floors of `FAMILIES` alone.
        others: name (not `units` or `null`) to other kinds of units, scored on the same prompts in the same pass, but
            not named.
        skipped: families without prompts, passed on to the result.
        batch_size: prompts in one model pass.
        seed: of everything that is shuffled.
        progress: show a bar.

    Raises:
        UserError: a family is unknown.
    """
    if unknown := set(sets) - set(FAMILIES):
        raise UserError(f"Family {sorted(unknown)[0]!r} is unknown; known are {', '.join(FAMILIES)}.")
    kinds = {"units": units, **(others or {})}
    tables: dict[str, list[pd.DataFrame]] = {kind: [] for kind in (*kinds, "null")}
    bars: list[dict[str, Any]] = []
    found: list[pd.DataFrame] = []
    for family, prompts in tqdm(sets.items(), desc="families", disable=not progress):
        first, second = halves(prompts)
        readings = read(model, layer, kinds | ({} if null is None else {"null": null}), first, batch_size, seed)
        held_back = read(model, layer, kinds, second, batch_size, seed + 1)
        scored, confirmed = ({kind: score(one) for kind, one in half.items()} for half in (readings, held_back))
        for half, each in (("discovery", scored), ("confirmation", confirmed)):
            for kind, values in each.items():
                tables[kind].append(values.rename_axis("unit").reset_index().assign(family=family, half=half))
        own = _bars(family, scored.get("null"))
        bars.append({"family": family, **own})
        found.append(
            _candidates((readings["units"], scored["units"]), (held_back["units"], confirmed["units"]), own, seed)
        )
    candidates = pd.concat(found, ignore_index=True)
    candidates["named"] = candidates["confirmed"] & holm(candidates["p"].to_numpy(), ERROR_RATE)
    scores = {kind: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame() for kind, parts in tables.items()}
    mine, chance = scores.pop("units"), scores.pop("null")
    return Discovery(mine, pd.DataFrame(bars), candidates, chance, scores, dict(skipped or {}))


def _bars(family: str, null: pd.DataFrame | None) -> dict[str, float]:
    """One row of `Discovery.bars`."""
    wanted = FAMILIES[family]
    bars = {
        "share_floor": wanted.share,
        "share": wanted.share,
        "precision": wanted.precision,
        "null_rate": float("nan"),
        "n_null": 0,
    }
    if null is None:
        return bars
    judged = int((null["support"] >= MIN_SUPPORT).sum())
    passing = np.sort(null["share"].to_numpy()[_clears(null, family, bars)])[::-1]
    allowed = int(NULL_RATE * judged)
    if wanted.raised and len(passing) > allowed:
        bars["share"] = float(np.nextafter(passing[allowed], 2.0))
    return bars | {"null_rate": len(passing) / max(1, judged), "n_null": judged}


def _clears(table: pd.DataFrame, family: str, bars: Mapping[str, float]) -> np.ndarray:
    """Units above every bar, [n_units] bool; precision is not asked for in families without controls."""
    passed = (table["support"].to_numpy() >= MIN_SUPPORT) & (table["share"].to_numpy() >= bars["share"])
    if not table["precision"].isna().all():
        passed &= table["precision"].to_numpy() >= bars["precision"]
    sign = FAMILIES[family].logit_sign
    return passed & (sign * table["logit"].to_numpy() > 0) if sign else passed


def _candidates(
    discovery: tuple[Reading, pd.DataFrame],
    confirmation: tuple[Reading, pd.DataFrame],
    bars: Mapping[str, float],
    seed: int,
) -> pd.DataFrame:
    """Units that clear the bars on the discovery half, on all prompts or on one series, and how they do on the other half."""
    family = discovery[0].prompts.family
    columns = {"unit": int, "family": str, "series": str, "p": float, "confirmed": bool}
    tables = [pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})]
    members = [_series(reading.prompts) for reading, _ in (discovery, confirmation)]
    for series in members[0].keys() & members[1].keys():
        if series:
            first, second = (
                score(half[0], masks[series]) for half, masks in zip((discovery, confirmation), members, strict=True)
            )
        else:
            first, second = discovery[1], confirmation[1]
        chosen = np.flatnonzero(_clears(first, family, bars))
        if len(chosen):
            p = p_values(confirmation[0], chosen.tolist(), FAMILIES[family].logit_sign, members[1][series], seed)
            cleared = _clears(second, family, bars)[chosen]
            tables.append(
                pd.DataFrame({"unit": chosen, "family": family, "series": series, "p": p, "confirmed": cleared})
            )
    return pd.concat(tables[1:] or tables, ignore_index=True)


def _series(prompts: PromptSet) -> dict[str, Tensor]:
    """All queries and, in a family made of several series, those of each series with their controls."""
    masks = {"": torch.ones_like(prompts.positive)}
    kinds = [kind for kind, positive in zip(prompts.kinds(), prompts.positive.tolist(), strict=True) if positive]
    if len(set(kinds)) > 1:
        for kind in sorted(set(kinds)):
            pairs = {pair for pair, other in zip(prompts.pair.tolist(), prompts.kinds(), strict=True) if other == kind}
            masks[kind] = torch.tensor([pair in pairs for pair in prompts.pair.tolist()])
    return masks


# ---- cleaner than MHSA?


def compare(scores: Mapping[str, Mapping[str, pd.DataFrame]], n: int = 1) -> pd.DataFrame:
    """The best units of each kind side by side.

    Args:
        scores: kind to half (`discovery`, `confirmation`) to the table of `score`, all of one family.
        n: units of each kind.

    Returns:
        columns `kind`, `unit`, those of `score` and `f1` (harmonic mean of precision and recall; share and recall where
        there are no controls) on the confirmation half. Units are chosen by f1 on the discovery half.
    """
    rows = []
    for kind, halves in scores.items():
        best = f1(halves["discovery"]).sort_values(ascending=False).index[:n]
        chosen = halves["confirmation"].loc[best]
        rows.append(chosen.assign(f1=f1(chosen)).rename_axis("unit").reset_index().assign(kind=kind))
    table = pd.concat(rows, ignore_index=True)
    return table[["kind", "unit", *(name for name in table.columns if name not in ("kind", "unit"))]]


def f1(scores: pd.DataFrame) -> pd.Series:
    """Harmonic mean of precision (share, where there are no controls) and recall; 0 where either is not defined."""
    side = scores["share"] if scores["precision"].isna().all() else scores["precision"]
    return (2 * side * scores["recall"] / (side + scores["recall"])).fillna(0.0)


def carried(
    model: LanguageModel,
    layer: int,
    kinds: Mapping[str, tuple[Units, Sequence[int]]],
    whole: Units,
    prompts: PromptSet,
    tops: Sequence[int] = (1, 3, 10),
    batch_size: int = 16,
) -> pd.DataFrame:
    """How much of what a layer does for a family its first units carry, for each kind of units.

    Args:
        model: the language model.
        layer: where the units are.
        kinds: name to (units, ranking of some of them, the best first).
        whole: all units whose removal takes the whole layer away: the MHSA heads, mean-ablated.
        prompts: of the family; those that no unit was chosen on (`halves`).
        tops: how many of the first units to remove together; more than a ranking has are left out, one pass of the
            model each.
        batch_size: prompts at a time.

    Returns:
        columns `kind`, `top`, the fields of `units.Effect`, and `share`: `labelled` over that of removing the whole
        layer (the row `whole layer`). Shares may exceed 1: other units of the layer may work against the first ones.
    """
    removals, parts = Removals(model, layer, prompts, batch_size), []
    for name, (units, ranking) in kinds.items():
        sets = {str(top): list(ranking[:top]) for top in tops if top <= len(ranking)}
        parts.append(removals.effects(units, sets).assign(kind=name))
    everything = removals.effects(whole, {"all": range(whole.n)}).assign(kind="whole layer")
    table = pd.concat([*parts, everything], ignore_index=True).rename(columns={"removed": "top"}).drop(columns="n")
    table["share"] = table["labelled"] / float(everything["labelled"].iloc[0])
    return table[["kind", "top", *(name for name in table.columns if name not in ("kind", "top"))]]
