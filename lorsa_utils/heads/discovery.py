"""Head discovery: which unit of a layer does what, with thresholds from nulls and names that hold on unseen prompts.

For each family (see `families`):

1. *Scores* of every unit on the discovery half of the prompt pairs (even pair numbers):
   share      z-pattern mass on the predicted sources / mass on all sources, both summed over labelled queries
   precision  mean activation at labelled queries / (that + mean activation at controls); chance is 1/2
   recall     share of labelled queries where it is active with more than half of its mass on the predicted sources
   auc        chance that its activation at a labelled query exceeds that at a control (ties count half); in families
              without controls: that its mass on the predicted sources exceeds that on as many random earlier positions
   logit      mean direct effect on the logit of the predicted token, minus that on another prompt's predicted token
2. *Bars*: the floors in `FAMILIES`. Where more than `NULL_RATE` of the heads of a randomly initialised Lorsa of the
   same shape clear all floors, the bar of the share is raised until no more do (except if `Family.raised` is False).
3. *Confirmation* on the other half: the unit must clear the same bars again and differ from shuffled labels (labelled
   against control, predicted against random sources, own against another prompt's token). p-values come from sign
   flips of whole pairs, because queries of one prompt are not independent, and a unit's largest p-value counts. Holm's
   method over all units and families that get this far keeps the chance of even one wrong name at `ERROR_RATE`; it
   assumes nothing about how heads depend on each other, and they share patterns and text.

Tables show the scores of the confirmation half, on which no unit was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.families import FAMILIES, LEAST_PRECISION
from lorsa_utils.heads.prompts import PromptSet
from lorsa_utils.heads.units import Unembedding, Units, by_pair, final_norm
from lorsa_utils.initialize import initialize
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import LanguageModel
from lorsa_utils.stats import auc, holm, sign_flip_p

NULL_RATE = 0.001
"""Share of random-init heads that may clear all bars of a family."""
ERROR_RATE = 0.05
"""Chance of even one false name in a table."""
MIN_SUPPORT = 8
"""Pairs with an active labelled query that a unit needs to be judged; fewer cannot be significant."""


# ---- responses


@dataclass(frozen=True, repr=False)
class Responses:
    """What units of one kind did on the prompts of one family, [n_labelled, n_units] except for `activation`."""

    prompts: PromptSet
    activation: Tensor
    """[n_queries, n_units]."""
    at_source: Tensor
    """Mass on the predicted sources."""
    at_random: Tensor
    """Mass on random earlier positions, scaled to the number of predicted sources."""
    total: Tensor
    """Mass on all sources."""
    logit: Tensor
    """Direct effect on the predicted token's logit less that on another prompt's; NaN where none is predicted."""

    def where(self, queries: Tensor) -> Responses:
        """Some of the queries, [n_queries] bool."""
        labelled = queries[self.prompts.positive]
        sides = {name: getattr(self, name)[labelled] for name in ("at_source", "at_random", "total", "logit")}
        return replace(self, prompts=self.prompts.where(queries), activation=self.activation[queries], **sides)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row per unit.

        Columns: `SCORES` (see the module docstring; NaN where undefined, such as `precision` without controls),
        `active` (share of labelled queries where it is active), `support` (number of pairs with such a query) and
        `size` (mean activation at labelled queries).
        """
        prompts, at_source, total = self.prompts, self.at_source, self.total
        labelled, controls = self.activation[prompts.positive], self.activation[~prompts.positive]
        if prompts.has_controls:
            means = labelled.mean(dim=0), controls.mean(dim=0)
            precision, area = means[0] / (means[0] + means[1]), auc(labelled, controls)
        else:
            precision, area = torch.full_like(labelled[0], torch.nan), auc(at_source, self.at_random)
        columns = {
            "share": at_source.sum(dim=0) / total.sum(dim=0),
            "precision": precision,
            "recall": ((labelled > 0) & (at_source > 0.5 * total)).double().mean(dim=0),
            "auc": area,
            "logit": self.logit.mean(dim=0),
            "active": (labelled > 0).double().mean(dim=0),
            "support": (by_pair(labelled, prompts.pair[prompts.positive]) > 0).sum(dim=0),
            "size": labelled.double().mean(dim=0),
        }
        return pd.DataFrame({name: values.double().numpy() for name, values in columns.items()})


@torch.no_grad()
def read(
    model: LanguageModel,
    layer: int,
    kinds: Mapping[str, Units],
    prompts: PromptSet,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Responses]:
    """Read several kinds of units (by name) on the prompts of one family, in one pass of the model.

    The model stops at `layer` unless the family predicts a token. All kinds get the same random sources and tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    others = _random_sources(prompts, generator)
    # The scale makes random masses comparable where there were fewer random positions than sources.
    scale = prompts.sources.sum(dim=1) / others.sum(dim=1).clamp_min(1)
    maps = torch.stack([prompts.sources.float(), others.float() * scale[:, None]])
    tokens = [prompts.predicted, _exchange(prompts, generator)] if prompts.predicts else []
    unembedding = Unembedding(model)
    sides: dict[str, list[list[Tensor]]] = {name: [] for name in kinds}
    for batch in torch.arange(len(prompts.tokens)).split(batch_size):
        x, y, residual = _layer_and_residual(model, layer, prompts.tokens[batch], prompts.predicts)
        prepared = {name: units.prepare(x, y) for name, units in kinds.items()}
        for place, number in enumerate(batch.tolist()):
            queries = prompts.row == number
            positions, labelled = prompts.position[queries].to(x.device), prompts.positive[queries].to(x.device)
            asked = positions[labelled]
            directions = [
                unembedding.directions(residual[place, asked], side[queries].to(x.device)[labelled]) for side in tokens
            ]
            for name, units in kinds.items():
                rows = units.rows(prepared[name], place, positions, maps[:, queries].to(x.device))
                at_source, at_random, total, value = (side[labelled] for side in (*rows.mass, rows.total, rows.value))
                effects = [units.along(prepared[name], place, asked, value, direction) for direction in directions]
                logit = effects[0] - effects[1] if effects else torch.full_like(value, torch.nan)
                fields = (rows.activation, at_source, at_random, total, logit)
                sides[name].append([side.cpu() for side in fields])
    return {name: Responses(prompts, *map(torch.cat, zip(*rows, strict=True))) for name, rows in sides.items()}


def _random_sources(prompts: PromptSet, generator: torch.Generator) -> Tensor:
    """For each query as many other earlier positions as it has sources (or all there are)."""
    length = prompts.sources.shape[1]
    open_to = (torch.arange(length) <= prompts.position[:, None]) & ~prompts.sources
    keys = torch.rand(prompts.sources.shape, generator=generator).masked_fill(~open_to, 2.0)
    rank = keys.argsort(dim=1).argsort(dim=1)
    return (rank < prompts.sources.sum(dim=1, keepdim=True)) & open_to


def _exchange(prompts: PromptSet, generator: torch.Generator) -> Tensor:
    """Predicted tokens permuted among labelled queries, [n_queries]."""
    tokens = prompts.predicted.clone()
    labelled = prompts.positive.nonzero()[:, 0]
    tokens[labelled] = tokens[labelled[torch.randperm(len(labelled), generator=generator)]]
    return tokens


def _layer_and_residual(model: LanguageModel, layer: int, tokens: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer reads and writes and what the last norm reads (empty unless the `whole` model runs)."""
    if not whole:
        x, y = (side.float() for side in model.capture(tokens, [layer])[layer])
        return x, y, x[:0]
    seen: list[Tensor] = []

    def observe(attn_input: Tensor, attn_output: Tensor) -> Tensor:
        seen.extend((attn_input, attn_output))
        return attn_output

    hook = final_norm(model).register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        with model.splice({layer: observe}):
            model.logits(tokens, [0])
    finally:
        hook.remove()
    x, y, residual = (side.float() for side in seen)
    return x, y, residual


def p_values(responses: Responses, chosen: Sequence[int], sign: int, seed: int = 0) -> np.ndarray:
    """Largest one-sided p-value of each chosen unit over the differences of the module docstring, [n_chosen].

    Effects on logits count unless `sign` (the family's `logit_sign`) is 0.
    """
    prompts, units = responses.prompts, torch.tensor(list(chosen), dtype=torch.long)
    labelled, controls = prompts.positive, ~prompts.positive
    differences = [by_pair((responses.at_source - responses.at_random)[:, units], prompts.pair[labelled])]
    if prompts.has_controls:
        means = [by_pair(responses.activation[side][:, units], prompts.pair[side]) for side in (labelled, controls)]
        differences.append(means[0] - means[1])
    if sign:
        differences.append(sign * by_pair(responses.logit[:, units], prompts.pair[labelled]))
    return np.max([sign_flip_p(difference, seed) for difference in differences], axis=0)


# ---- discovery


@dataclass(frozen=True)
class Discovery:
    """Names of units and the scores that they rest on."""

    scores: pd.DataFrame
    """Columns `unit`, `family`, `half` (`discovery` or `confirmation`) and those of `Responses.scores`."""
    bars: pd.DataFrame
    """One row per family: `share_floor`, `share` (the bar), `precision`, `n_null` (judged random-init heads, see
    `MIN_SUPPORT`) and `null_rate` (share of them that clear all floors)."""
    names: pd.DataFrame
    """One row per unit, family and `series` ("" for all) that cleared the bars on the discovery half, with `p`,
    `confirmed` (cleared them again) and `named` (also significant by Holm's method)."""
    null: pd.DataFrame
    """As `scores`, for the random-init Lorsa; empty without one."""
    others: dict[str, pd.DataFrame]
    """As `scores`, for each other kind of units."""
    skipped: dict[str, str]
    """Families without prompts, and why."""

    def families(self, unit: int) -> list[str]:
        """Names of a unit, the most specific first."""
        return [family for family in FAMILIES if family in self._named.get(unit, ())]

    @cached_property
    def _named(self) -> dict[int, set[str]]:
        return self.names[self.names["named"].astype(bool)].groupby("unit")["family"].agg(set).to_dict()

    def units(self, family: str) -> list[int]:
        """Named units of a family, by how much they write from the predicted sources (share times size)."""
        named = set(self.names.query("family == @family and named")["unit"])
        rows = self.scores.query("family == @family and half == 'confirmation'").set_index("unit")
        worth = rows["share"] * rows["size"]
        return [int(unit) for unit in worth.sort_values(ascending=False).index if unit in named]

    def halves(self, family: str, kind: str | None = None) -> dict[str, pd.DataFrame]:
        """Half to the scores of one family, indexed by unit, for the units or another `kind`."""
        scores = self.scores if kind is None else self.others[kind]
        mine = scores[scores["family"] == family].drop(columns="family").set_index("unit")
        return {half: mine[mine["half"] == half].drop(columns="half") for half in ("discovery", "confirmation")}

    def counts(self) -> dict[str, int]:
        """Number of named units per family."""
        return {family: len(self.units(family)) for family in FAMILIES if family in set(self.scores["family"])}


def random_lorsa(lorsa: Lorsa, model: LanguageModel, layer: int, tokens: Tensor, mask: Tensor, seed: int = 0) -> Lorsa:
    """The null: a Lorsa of the same shape with random weights, matched in scale to the layer."""
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
    """Score all units on the prompts of every family (`families.standard`) and name those that clear every bar.

    Without the `null` (heads of `random_lorsa`), the bars are the floors of `FAMILIES`. `others`, kinds of units by
    name, are scored in the same pass but not named.

    Raises:
        UserError: a family is unknown, or has too few prompts for two halves.
    """
    if unknown := set(sets) - set(FAMILIES):
        raise UserError(f"Family {sorted(unknown)[0]!r} is unknown; known are {', '.join(FAMILIES)}.")
    kinds = {"units": units, **(others or {})}
    scores: dict[str, list[pd.DataFrame]] = {kind: [] for kind in (*kinds, "null")}
    bars, candidates = [], list[pd.DataFrame]()
    for family, prompts in tqdm(sets.items(), desc="families", disable=not progress):
        halves = []
        for number, (half, part) in enumerate(zip(("discovery", "confirmation"), prompts.halves(), strict=True)):
            if not len(part.tokens):
                raise UserError(f"No labelled position of family {family} is left; make more prompts.")
            judged = kinds if null is None or number else kinds | {"null": null}
            responses = read(model, layer, judged, part, batch_size, seed + number)
            halves.append(responses["units"])
            for kind, side in responses.items():
                scores[kind].append(side.scores.rename_axis("unit").reset_index().assign(family=family, half=half))
        bars.append({"family": family, **_bars(family, None if null is None else scores["null"][-1])})
        candidates += _candidates(family, halves, bars[-1], seed)
    dtypes = {"unit": int, "family": str, "series": str, "p": float, "confirmed": bool}
    names = pd.concat(candidates or [pd.DataFrame(columns=[*dtypes]).astype(dtypes)], ignore_index=True)
    names["named"] = names["confirmed"] & holm(names["p"].to_numpy(), ERROR_RATE)
    tables = {kind: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame() for kind, parts in scores.items()}
    own, chance = tables.pop("units"), tables.pop("null")
    return Discovery(own, pd.DataFrame(bars), names, chance, tables, dict(skipped or {}))


def _bars(family: str, null: pd.DataFrame | None) -> dict[str, Any]:
    """A row of `Discovery.bars`, from the scores of random heads."""
    entry = FAMILIES[family]
    bars = {"share_floor": entry.share, "share": entry.share, "precision": LEAST_PRECISION}
    if null is None:
        return bars | {"null_rate": float("nan"), "n_null": 0}
    judged = int((null["support"] >= MIN_SUPPORT).sum())
    passing = np.sort(null["share"].to_numpy()[_clears(null, family, bars)])[::-1]
    allowed = int(NULL_RATE * judged)
    if entry.raised and len(passing) > allowed:
        bars["share"] = float(np.nextafter(passing[allowed], 2.0))
    return bars | {"null_rate": len(passing) / max(1, judged), "n_null": judged}


def _clears(scores: pd.DataFrame, family: str, bars: Mapping[str, float]) -> np.ndarray:
    """Units above every bar, [n_units] bool; precision counts only in families with controls."""
    passed = (scores["support"].to_numpy() >= MIN_SUPPORT) & (scores["share"].to_numpy() >= bars["share"])
    if not scores["precision"].isna().all():
        passed &= scores["precision"].to_numpy() >= bars["precision"]
    sign = FAMILIES[family].logit_sign
    return passed & (sign * scores["logit"].to_numpy() > 0) if sign else passed


def _candidates(family: str, halves: Sequence[Responses], bars: Mapping[str, Any], seed: int) -> list[pd.DataFrame]:
    """Rows of `Discovery.names` for one family, without `named`."""
    rows, (first, second) = [], [_by_series(half) for half in halves]
    for series in (name for name in first if name in second):
        chosen = np.flatnonzero(_clears(first[series].scores, family, bars))
        if len(chosen):
            p = p_values(second[series], chosen.tolist(), FAMILIES[family].logit_sign, seed)
            cleared = _clears(second[series].scores, family, bars)[chosen]
            row = {"unit": chosen, "family": family, "series": series, "p": p, "confirmed": cleared}
            rows.append(pd.DataFrame(row))
    return rows


def _by_series(responses: Responses) -> dict[str, Responses]:
    """All ("") and, in a family of several series, those of each series with its controls."""
    prompts, parts = responses.prompts, {"": responses}
    series = sorted(set(prompts.kind[prompts.positive.numpy()]))
    if len(series) > 1:
        for name in series:
            pairs = prompts.pair[torch.from_numpy(prompts.kind == name)]
            parts[str(name)] = responses.where(torch.isin(prompts.pair, pairs))
    return parts
