"""What each unit does on running text, and the table of all heads of a layer (`lorsa heads`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import discovery, families
from lorsa_utils.heads.discovery import Discovery
from lorsa_utils.heads.families import FAMILIES, SCORES
from lorsa_utils.heads.prompts import Passage, PromptSet, Vocabulary, passages
from lorsa_utils.heads.units import LorsaHeads, Removals, Unembedding, Units
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import LanguageModel
from lorsa_utils.text import Sequences

N_CONTEXTS, N_SAMPLES = 12, 32


@dataclass(frozen=True, repr=False)
class Survey:
    """What each unit does on running text."""

    facts: pd.DataFrame
    """One row per unit: `frequency` (share of counted tokens where it is active), `mean_activation` (where active),
    `max_activation` and, over its mass, `distance` (mean tokens back), `first_share`, `previous_share`, `self_share`.
    For a dead unit `frequency` and `max_activation` are 0 and the rest NaN."""
    places: Tensor
    """[n_units, N_CONTEXTS, 2], sequence and position of its largest activations, one per sequence; -1 for none."""
    peaks: Tensor
    """[n_units, N_CONTEXTS], activations at `places`."""
    sampled: Tensor
    """[n_units, N_SAMPLES, 2], as `places` for randomly drawn active tokens."""
    samples: Tensor
    """[n_units, N_SAMPLES], activations at `sampled`."""
    n_tokens: int


@torch.no_grad()
def survey(
    model: LanguageModel,
    layer: int,
    units: Units,
    sequences: Sequences,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> Survey:
    """One pass over text; memory does not grow with its length.

    Raises:
        UserError: the text holds no counted token.
    """
    if sequences.n_tokens == 0:
        raise UserError("There is not one counted token in this text; give a longer text.")
    length = sequences.tokens.shape[1]
    places = torch.arange(length, device=model.device)
    back = (places[:, None] - places).clamp_min(0)
    maps = {
        "distance": back,
        "first_share": (places == 0).expand(length, length),
        "previous_share": back == 1,
        "self_share": torch.eye(length, device=model.device),
    }
    stacked = torch.stack([weights.float() for weights in maps.values()])
    sums = torch.zeros(3 + len(maps), units.n, dtype=torch.float64)
    top, drawn = _Largest(units.n, N_CONTEXTS), _Largest(units.n, N_SAMPLES)
    generator, number = torch.Generator().manual_seed(seed), 0
    bar = tqdm(total=len(sequences.tokens), unit="seq", desc="text", disable=not progress)
    for tokens, mask in sequences.batches(batch_size, model.device):
        x, y = (side.float() for side in model.capture(tokens, [layer])[layer])
        batch = units.prepare(x, y)
        for place, counted in enumerate(mask):
            positions = counted.nonzero()[:, 0]
            if len(positions):
                rows = units.rows(batch, place, positions, stacked[:, positions])
                sides = (rows.activation > 0, rows.activation, rows.total, *rows.mass)
                sums += torch.stack([side.sum(dim=0).double() for side in sides]).cpu()
                activation = rows.activation.cpu().float()
                top.add(activation, activation, positions.cpu(), number)
                # The largest of random keys are a uniform draw of active tokens, however long the text.
                keys = torch.rand(activation.shape, generator=generator) * (activation > 0)
                drawn.add(keys, activation, positions.cpu(), number)
            number += 1
            bar.update()
    bar.close()
    active, activation, total, *masses = sums
    frequency, largest = active / sequences.n_tokens, top.values.amax(dim=1)
    facts = {"frequency": frequency, "mean_activation": activation / active, "max_activation": largest}
    facts |= {name: mass / total for name, mass in zip(maps, masses, strict=True)}
    table = pd.DataFrame({name: values.double().numpy() for name, values in facts.items()})
    return Survey(table, top.places, top.values, drawn.places, drawn.values, sequences.n_tokens)


class _Largest:
    """For each unit the places with the largest keys, at most one per sequence, sorted."""

    def __init__(self, n_units: int, n: int) -> None:
        self.keys, self.values = torch.zeros(2, n_units, n)
        self.places = torch.full((n_units, n, 2), -1)

    def add(self, keys: Tensor, values: Tensor, positions: Tensor, number: int) -> None:
        """One sequence: keys (0 for none) and values [n_queries, n_units] at positions [n_queries]."""
        highest, where = keys.max(dim=0)
        new = torch.stack([torch.full_like(where, number), positions[where]], dim=1)
        new = new.masked_fill((highest <= 0)[:, None], -1)
        self.keys, order = torch.cat([self.keys, highest[:, None]], dim=1).topk(self.keys.shape[1], dim=1)
        self.values = torch.cat([self.values, values.gather(0, where[None]).T], dim=1).gather(1, order)
        self.places = torch.cat([self.places, new[:, None]], dim=1).gather(1, order[:, :, None].expand(-1, -1, 2))


# ---- a whole layer


REMOVAL_PAIRS = 24
"""Pairs of prompts on which `describe` measures the removal of a head."""


class Description(NamedTuple):
    """What `describe` finds out about the heads of one Lorsa."""

    table: pd.DataFrame
    """That of `table`, with `effect` and `effect_error`: change of loss in nats at labelled queries of its family when
    this head alone is removed (NaN for heads that were not)."""
    discovery: Discovery


def describe(
    model: LanguageModel,
    layer: int,
    lorsa: Lorsa,
    sequences: Sequences,
    documents: Sequence[tuple[str, str]],
    *,
    removed: int = 3,
    others: Mapping[str, Units] | None = None,
    scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Description:
    """From a trained Lorsa to the table of its heads.

    `sequences` are running text; `documents` (id, text) supply the families that need passages. The first `removed`
    heads (by `Discovery.units`) of each family that predicts a token are removed one at a time, each for one pass over
    `REMOVAL_PAIRS` pairs. `others` as in `discovery.discover`, `scale` as in `families.standard`.

    Raises:
        UserError: the text is empty, or no head is ever active on it.
    """
    units = LorsaHeads(lorsa)
    seen = survey(model, layer, units, sequences, batch_size=batch_size, progress=progress)
    if bool((seen.facts["frequency"] == 0).all()):
        raise UserError(
            "No head is active anywhere on this text: all are dead, or the module belongs to another model; "
            "train it again."
        )
    bos_id = int(sequences.tokens[0, 0]) if sequences.bos_policy == "prepend" else None
    vocabulary, texts = Vocabulary(model.tokenizer, bos_id), list[Passage]()
    with contextlib.suppress(UserError):  # without passages, families that need them are skipped
        texts = passages(documents, vocabulary, 96, seed=seed)
    made = families.standard(vocabulary, texts, seed, scale)
    null = discovery.random_lorsa(lorsa, model, layer, sequences.tokens[:16].long(), sequences.mask[:16], seed)
    options: dict[str, Any] = {"others": others, "batch_size": 2 * batch_size, "seed": seed, "progress": progress}
    names = discovery.discover(model, layer, units, made.sets, LorsaHeads(null), skipped=made.skipped, **options)
    rows = table(names, seen, units, model, sequences)
    rows["effect"] = rows["effect_error"] = np.nan
    for family, prompts in tqdm(made.sets.items(), desc="removals", disable=not progress):
        heads = [head for head in names.units(family) if rows.loc[head, "family"] == family][:removed]
        if prompts.predicts and heads:
            removals = Removals(model, layer, _thinned(prompts.halves()[1], REMOVAL_PAIRS), 2 * batch_size)
            effects = removals.effects(units, {str(head): [head] for head in heads})
            rows.loc[heads, ["effect", "effect_error"]] = effects[["labelled", "labelled_error"]].to_numpy()
    return Description(rows, names)


def _thinned(prompts: PromptSet, n: int) -> PromptSet:
    """At most `n` pairs, spread evenly because the series of one family follow each other."""
    pairs = prompts.pair.unique()
    chosen = pairs[torch.linspace(0, len(pairs) - 1, min(n, len(pairs))).round().long()]
    return prompts.where(torch.isin(prompts.pair, chosen))


def table(
    names: Discovery, seen: Survey, units: LorsaHeads, model: LanguageModel, sequences: Sequences
) -> pd.DataFrame:
    """Everything known about each head of a Lorsa, one row per head, ready for Parquet.

    Columns: `head`, `group`, `family` ("" without a name), `families` (all, most specific first), `dead`, those of
    `Survey.facts`, `top_logits` and `bottom_logits` (the ten tokens that w_o raises and lowers most), `contexts`
    (text with the peak in «»), and `<family>_<score>` on the confirmation half.
    """
    rows = pd.DataFrame({"head": np.arange(units.n)})
    rows["group"] = rows["head"] // units.lorsa.config.group_size
    of_heads = [names.families(head) for head in range(units.n)]
    rows["family"] = [members[0] if members else "" for members in of_heads]
    rows["families"] = ["; ".join(members) for members in of_heads]
    rows["dead"] = (seen.facts["frequency"] == 0).to_numpy()
    rows = pd.concat([rows, seen.facts], axis=1)
    unembedding, text = Unembedding(model), functools.cache(lambda token: model.tokenizer.decode([token]))
    for column, largest in (("top_logits", True), ("bottom_logits", False)):
        tokens = unembedding.top_tokens(units.lorsa.W_O.detach(), 10, largest)
        rows[column] = [[text(token) for token in row] for row in tokens.tolist()]
    rows["contexts"] = [
        [_context(sequences, row, position, model.tokenizer) for row, position in places if row >= 0]
        for places in seen.places[:, :4].tolist()
    ]
    confirmed = names.scores.query("half == 'confirmation'")
    wide = confirmed.pivot(index="unit", columns="family", values=[*SCORES]).reindex(range(units.n))
    wide.columns = [f"{family}_{name}" for name, family in wide.columns]
    order = [f"{family}_{name}" for family in FAMILIES for name in SCORES]
    return pd.concat([rows, wide.reindex(columns=order).dropna(axis=1, how="all")], axis=1)


def _context(sequences: Sequences, row: int, position: int, tokenizer: Any) -> str:
    """The text around a token, with the token in «»."""
    ids, counted = sequences.tokens[row], sequences.mask[row]
    spans = slice(max(0, position - 16), position), slice(position, position + 1), slice(position + 1, position + 5)
    return "{}«{}»{}".format(*(tokenizer.decode(ids[span][counted[span]].tolist()) for span in spans))


def read_table(path: str | Path) -> pd.DataFrame:
    """The Parquet table of heads that `lorsa heads` wrote.

    Raises:
        UserError: the file is missing or no such table.
    """
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table of heads; make it with `lorsa heads`.") from error
    if not {"head", "families"} <= set(rows):
        raise UserError(f"{path} is no table of heads; make it with `lorsa heads`.")
    return rows
