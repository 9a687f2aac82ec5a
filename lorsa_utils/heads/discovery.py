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

from collections import defaultdict
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
from lorsa_utils.heads.families import FAMILIES
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


@dataclass(frozen=True)
class Responses:
    """What units of one kind did on the prompts of one family, [n_labelled, n_units] except for `activation`."""

    prompts: PromptSet = field(repr=False)
    activation: Tensor = field(repr=False)
    """[n_queries, n_units]."""
    at_source: Tensor = field(repr=False)
    """Mass on the predicted sources."""
    at_random: Tensor = field(repr=False)
    """Mass on random earlier positions, scaled to the number of predicted sources."""
    total: Tensor = field(repr=False)
    """Mass on all sources."""
    logit: Tensor | None = field(repr=False, default=None)
    """Direct effect on the predicted token's logit; None where the family predicts none."""
    logit_other: Tensor | None = field(repr=False, default=None)
    """The same for another prompt's predicted token."""


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
    tokens = {"logit": prompts.predicted, "logit_other": _exchange(prompts, generator)} if prompts.predicts else {}
    unembedding = Unembedding(model)
    chunks: dict[str, dict[str, list[Tensor]]] = {name: defaultdict(list) for name in kinds}
    order = []
    for batch in torch.arange(len(prompts.tokens)).split(batch_size):
        x, y, residual = _layer_and_residual(model, layer, prompts.tokens[batch], prompts.predicts)
        prepared = {name: units.prepare(x, y) for name, units in kinds.items()}
        for place, number in enumerate(batch.tolist()):
            queries = (prompts.row == number).nonzero()[:, 0]
            order.append(queries)
            positions, labelled = prompts.position[queries].to(x.device), prompts.positive[queries].to(x.device)
            asked = positions[labelled]
            directions = {
                key: unembedding.directions(residual[place, asked], side[queries].to(x.device)[labelled])
                for key, side in tokens.items()
            }
            for name, units in kinds.items():
                rows = units.rows(prepared[name], place, positions, maps[:, queries].to(x.device))
                at_source, at_random, total, value = (side[labelled] for side in (*rows.mass, rows.total, rows.value))
                fields = {"activation": rows.activation, "at_source": at_source, "at_random": at_random, "total": total}
                for key, direction in directions.items():
                    fields[key] = units.along(prepared[name], place, asked, value, direction)
                for key, values in fields.items():
                    chunks[name][key].append(values.cpu())
    # Back from the order of prompts into that of the queries.
    queries = torch.cat(order)
    places = {True: queries.argsort(), False: queries[prompts.positive[queries]].argsort()}
    return {
        name: Responses(prompts, **{key: torch.cat(side)[places[key == "activation"]] for key, side in fields.items()})
        for name, fields in chunks.items()
    }


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
    seen: dict[str, Tensor] = {}

    def observe(attn_input: Tensor, attn_output: Tensor) -> Tensor:
        seen["x"], seen["y"] = attn_input, attn_output
        return attn_output

    def before_norm(module: Any, arguments: tuple[Tensor, ...]) -> None:
        seen["residual"] = arguments[0]

    hook = final_norm(model).register_forward_pre_hook(before_norm)
    try:
        with model.splice({layer: observe}):
            model.logits(tokens, [0])
    finally:
        hook.remove()
    return seen["x"].float(), seen["y"].float(), seen["residual"].float()


# ---- scores


def score(responses: Responses, queries: Tensor | None = None) -> pd.DataFrame:
    """Scores of every unit on some queries [n_queries] bool or all, one row per unit.

    Columns: `SCORES` (see the module docstring; NaN where undefined, such as `precision` without controls), `active`
    (share of labelled queries where it is active), `support` (number of pairs with such a query) and `size` (mean
    activation at labelled queries).
    """
    prompts = responses.prompts
    queries = torch.ones_like(prompts.positive) if queries is None else queries
    counted, undefined = queries[prompts.positive], torch.full((responses.activation.shape[1],), torch.nan)
    if not bool(counted.any()):
        raise UserError(f"No labelled position of family {prompts.family} is left; make more prompts.")
    labelled = responses.activation[prompts.positive & queries]
    at_source, at_random, total = (
        side[counted] for side in (responses.at_source, responses.at_random, responses.total)
    )
    if prompts.has_controls:
        controls = responses.activation[~prompts.positive & queries]
        means = labelled.mean(dim=0), controls.mean(dim=0)
        precision, area = means[0] / (means[0] + means[1]), auc(labelled, controls)
    else:
        precision, area = undefined, auc(at_source, at_random)
    logit = undefined
    if responses.logit is not None and responses.logit_other is not None:
        logit = (responses.logit[counted] - responses.logit_other[counted]).mean(dim=0)
    columns = {
        "share": at_source.sum(dim=0) / total.sum(dim=0),
        "precision": precision,
        "recall": ((labelled > 0) & (at_source > 0.5 * total)).double().mean(dim=0),
        "auc": area,
        "logit": logit,
        "active": (labelled > 0).double().mean(dim=0),
        "support": (by_pair(labelled, prompts.pair[prompts.positive & queries]) > 0).sum(dim=0),
        "size": labelled.double().mean(dim=0),
    }
    return pd.DataFrame({name: values.double().numpy() for name, values in columns.items()})


def p_values(
    responses: Responses, chosen: Sequence[int], sign: int, queries: Tensor | None = None, seed: int = 0
) -> np.ndarray:
    """Largest one-sided p-value of each chosen unit over the differences of the module docstring, [n_chosen].

    Effects on logits count unless `sign` (the family's `logit_sign`) is 0. `queries` are [n_queries] bool or all.
    """
    prompts, units = responses.prompts, torch.tensor(list(chosen), dtype=torch.long)
    queries = torch.ones_like(prompts.positive) if queries is None else queries
    counted, labelled, controls = queries[prompts.positive], prompts.positive & queries, ~prompts.positive & queries
    pairs = prompts.pair[labelled]
    differences = [by_pair((responses.at_source - responses.at_random)[counted][:, units], pairs)]
    if prompts.has_controls:
        means = [by_pair(responses.activation[side][:, units], prompts.pair[side]) for side in (labelled, controls)]
        differences.append(means[0] - means[1])
    if sign and responses.logit is not None and responses.logit_other is not None:
        differences.append(sign * by_pair((responses.logit - responses.logit_other)[counted][:, units], pairs))
    return np.max([sign_flip_p(difference, seed) for difference in differences], axis=0)


# ---- discovery


@dataclass(frozen=True)
class Discovery:
    """Names of units and the scores that they rest on."""

    scores: pd.DataFrame
    """Columns `unit`, `family`, `half` (`discovery` or `confirmation`) and those of `score`."""
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


class _Half(NamedTuple):
    responses: Responses
    scores: pd.DataFrame


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
        UserError: a family is unknown.
    """
    if unknown := set(sets) - set(FAMILIES):
        raise UserError(f"Family {sorted(unknown)[0]!r} is unknown; known are {', '.join(FAMILIES)}.")
    kinds = {"units": units, **(others or {})}
    with_null = kinds if null is None else kinds | {"null": null}
    scores: dict[str, list[pd.DataFrame]] = {kind: [] for kind in (*kinds, "null")}
    bars, candidates = [], []
    for family, prompts in tqdm(sets.items(), desc="families", disable=not progress):
        judged: dict[str, _Half] = {}
        for number, (half, part) in enumerate(zip(("discovery", "confirmation"), prompts.halves(), strict=True)):
            read_kinds = kinds if number else with_null
            for kind, responses in read(model, layer, read_kinds, part, batch_size, seed + number).items():
                table = score(responses)
                scores[kind].append(table.rename_axis("unit").reset_index().assign(family=family, half=half))
                if kind == "units":
                    judged[half] = _Half(responses, table)
        bars.append({"family": family, **_bars(family, None if null is None else scores["null"][-1])})
        candidates.append(_candidates(family, judged["discovery"], judged["confirmation"], bars[-1], seed))
    names = pd.concat(candidates, ignore_index=True)
    names["named"] = names["confirmed"] & holm(names["p"].to_numpy(), ERROR_RATE)
    tables = {kind: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame() for kind, parts in scores.items()}
    own, chance = tables.pop("units"), tables.pop("null")
    return Discovery(own, pd.DataFrame(bars), names, chance, tables, dict(skipped or {}))


def _bars(family: str, null: pd.DataFrame | None) -> dict[str, Any]:
    """A row of `Discovery.bars`, from the scores of random heads."""
    entry = FAMILIES[family]
    bars = {"share_floor": entry.share, "share": entry.share, "precision": entry.precision}
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


def _candidates(family: str, first: _Half, second: _Half, bars: Mapping[str, Any], seed: int) -> pd.DataFrame:
    """Rows of `Discovery.names` for one family, without `named`."""
    columns = {"unit": int, "family": str, "series": str, "p": float, "confirmed": bool}
    tables = [pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})]
    masks = _series(first.responses.prompts), _series(second.responses.prompts)
    for series in (name for name in masks[0] if name in masks[1]):
        scores, confirmation = (
            score(half.responses, mask[series]) if series else half.scores
            for half, mask in zip((first, second), masks, strict=True)
        )
        chosen = np.flatnonzero(_clears(scores, family, bars))
        if len(chosen):
            sign = FAMILIES[family].logit_sign
            p = p_values(second.responses, chosen.tolist(), sign, masks[1][series], seed)
            cleared = _clears(confirmation, family, bars)[chosen]
            row = {"unit": chosen, "family": family, "series": series, "p": p, "confirmed": cleared}
            tables.append(pd.DataFrame(row))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def _series(prompts: PromptSet) -> dict[str, Tensor]:
    """Masks of all queries ("") and, in a family of several series, of each series with its controls."""
    masks = {"": torch.ones_like(prompts.positive)}
    kinds = np.array(prompts.kinds())
    series = sorted(set(kinds[prompts.positive.numpy()]))
    if len(series) > 1:
        for name in series:
            masks[str(name)] = torch.isin(prompts.pair, prompts.pair[torch.from_numpy(kinds == name)])
    return masks
