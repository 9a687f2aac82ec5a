"""What each unit does on running text, in one pass, and the table of all heads of a layer (`lorsa heads`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import families, prompts
from lorsa_utils.heads.families import FAMILIES, SCORES, Discovery
from lorsa_utils.heads.units import LorsaHeads, Removals, Rows, Unembedding, Units
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import LanguageModel
from lorsa_utils.text import Sequences


@dataclass(frozen=True)
class Survey:
    """What each unit does on running text. Made by `survey`."""

    facts: pd.DataFrame
    """One row a unit: `frequency` (share of counted tokens where it is active), `mean_activation` and `max_activation` (where active),
    and, over its mass where active, `distance` (mean tokens back), `first_share`, `previous_share`, `self_share`. For a
    dead unit `frequency` and `max_activation` are 0 and the rest NaN."""
    places: Tensor = field(repr=False)
    """[n_units, n_contexts, 2], sequence and position of its largest activations, each from another sequence; -1 where there are none."""
    peaks: Tensor = field(repr=False)
    """[n_units, n_contexts], those activations."""
    sampled: Tensor = field(repr=False)
    """[n_units, n_samples, 2], sequence and position of tokens drawn at random from those where it is active, each from another
    sequence; -1 where there are no more."""
    samples: Tensor = field(repr=False)
    """[n_units, n_samples], activations there."""
    n_tokens: int
    """Counted tokens."""


_MAPS = ("distance", "first_share", "previous_share", "self_share")


@torch.no_grad()
def survey(
    model: LanguageModel,
    layer: int,
    units: Units,
    sequences: Sequences,
    n_contexts: int = 12,
    batch_size: int = 8,
    progress: bool = True,
    n_samples: int = 32,
    seed: int = 0,
) -> Survey:
    """One pass over text; memory does not grow with it.

    Args:
        model: the language model.
        layer: of the units.
        units: what to look at.
        sequences: the text.
        n_contexts: places of the largest activations to keep for each unit.
        batch_size: sequences at a time.
        progress: show a bar.
        n_samples: active tokens to draw for each unit.
        seed: of that draw.

    Raises:
        UserError: the text holds no counted token.
    """
    if sequences.n_tokens == 0:
        raise UserError("There is not one counted token in this text; give a longer text.")
    length = sequences.tokens.shape[1]
    maps = _text_maps(length).to(model.device)
    sums = torch.zeros(len(_MAPS) + 3, units.n, dtype=torch.float64)
    top, drawn = _Best(units.n, n_contexts), _Best(units.n, n_samples)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=len(sequences.tokens), unit="seq", desc="text", disable=not progress)
    for first in range(0, len(sequences.tokens), batch_size):
        tokens = sequences.tokens[first : first + batch_size].to(model.device, torch.long)
        x, y = (side.float() for side in model.capture(tokens, [layer])[layer])
        batch = units.prepare(x, y)
        for place in range(len(tokens)):
            positions = sequences.mask[first + place].nonzero()[:, 0].to(x.device)
            if len(positions):
                rows = units.rows(batch, place, positions, maps[:, positions])
                sums += _row_sums(rows)
                activation = rows.activation.cpu().float()
                top.add(activation, activation, positions.cpu(), first + place)
                # The largest of random keys makes a draw in which every active token counts alike, however long the
                # text.
                keys = torch.rand(activation.shape, generator=generator) * (activation > 0)
                drawn.add(keys, activation, positions.cpu(), first + place)
            bar.update()
    bar.close()
    active, activation, total, *masses = sums
    facts = {
        "frequency": active / sequences.n_tokens,
        "mean_activation": activation / active,
        "max_activation": top.values.amax(dim=1),
    }
    facts |= {name: mass / total for name, mass in zip(_MAPS, masses, strict=True)}
    table = pd.DataFrame({name: value.double().numpy() for name, value in facts.items()})
    return Survey(table, top.places, top.values, drawn.places, drawn.values, sequences.n_tokens)


def _text_maps(length: int) -> Tensor:
    """Distance back, first token, previous token, the token itself: [4, length, length], rows are queries."""
    places = torch.arange(length)
    back = (places[:, None] - places).clamp_min(0)
    first = (places == 0).expand(length, length)
    return torch.stack([back.float(), first.float(), (back == 1).float(), torch.eye(length)])


def _row_sums(rows: Rows) -> Tensor:
    """Sums over queries: active, activation, total mass, and the mass on every map."""
    sides = [rows.activation > 0, rows.activation, rows.total, *rows.mass]
    return torch.stack([side.sum(dim=0).double() for side in sides]).cpu()


class _Best:
    """For each unit the places with the largest keys, at most one in a sequence, sorted."""

    def __init__(self, n_units: int, n: int) -> None:
        self.keys, self.values, self.places = (
            torch.zeros(n_units, n),
            torch.zeros(n_units, n),
            torch.full((n_units, n, 2), -1),
        )

    def add(self, keys: Tensor, values: Tensor, positions: Tensor, number: int) -> None:
        """One sequence: keys (0 where there is nothing) and values [n_queries, n_units] at positions [n_queries]."""
        highest, where = keys.max(dim=0)
        new = torch.stack([torch.full_like(where, number), positions[where]], dim=1).masked_fill(
            (highest <= 0)[:, None], -1
        )
        self.keys, order = torch.cat([self.keys, highest[:, None]], dim=1).topk(self.keys.shape[1], dim=1)
        self.values = torch.cat([self.values, values.gather(0, where[None]).T], dim=1).gather(1, order)
        self.places = torch.cat([self.places, new[:, None]], dim=1).gather(1, order[:, :, None].expand(-1, -1, 2))


# ---- table


def table(
    discovery: Discovery,
    found: Survey,
    units: LorsaHeads,
    model: LanguageModel,
    sequences: Sequences,
    n_tokens: int = 10,
) -> pd.DataFrame:
    """Everything known of each head of a Lorsa, one row a head, ready for Parquet.

    Args:
        discovery: names and scores.
        found: what heads do on text.
        units: the heads.
        model: for the unembedding and the text of tokens.
        sequences: the text of `found`.
        n_tokens: how many top and bottom tokens.

    Returns:
        `head`, `group`, `family` ("" without a name), `families` (all of them, most specific first), `dead`, the
        columns of `Survey.facts`, `top_logits` and `bottom_logits` (tokens that w_o raises and lowers most), `contexts`
        (text with the peak in «»), and `<family>_<score>` on the confirmation half for every family looked for.
    """
    rows = pd.DataFrame({"head": np.arange(units.n)})
    rows["group"] = rows["head"] // units.lorsa.config.group_size
    named = [discovery.families(head) for head in range(units.n)]
    rows["family"] = [names[0] if names else "" for names in named]
    rows["families"] = ["; ".join(names) for names in named]
    rows["dead"] = (found.facts["frequency"] == 0).to_numpy()
    rows = pd.concat([rows, found.facts], axis=1)
    unembedding, text = Unembedding(model), _token_texts(model.tokenizer)
    for name, largest in (("top_logits", True), ("bottom_logits", False)):
        chosen = unembedding.top_tokens(units.lorsa.W_O.detach(), n_tokens, largest)
        rows[name] = [[text[token] for token in row] for row in chosen.tolist()]
    rows["contexts"] = contexts(found, sequences, model.tokenizer)
    confirmed = discovery.scores.query("half == 'confirmation'")
    wide = confirmed.pivot(index="unit", columns="family", values=[*SCORES]).reindex(range(units.n))
    wide.columns = [f"{family}_{name}" for name, family in wide.columns]
    order = [f"{family}_{name}" for family in FAMILIES for name in SCORES]
    return pd.concat([rows, wide[[name for name in order if name in wide and not wide[name].isna().all()]]], axis=1)


def _token_texts(tokenizer: Any) -> dict[int, str]:
    size = max(tokenizer.get_vocab().values()) + 1
    decoded = tokenizer.batch_decode([[index] for index in range(size)])
    return dict(enumerate(decoded)) | dict.fromkeys(range(size, size + 4096), "")  # models pad their vocabulary


def contexts(
    found: Survey, sequences: Sequences, tokenizer: Any, n: int = 4, before: int = 16, after: int = 4
) -> list[list[str]]:
    """Texts around the `n` largest activations of every unit, the peak in «»."""
    texts: list[str] = []
    owners: list[int] = []
    for unit, places in enumerate(found.places[:, :n].tolist()):
        for row, position in places:
            if row >= 0:
                ids, counted = sequences.tokens[row], sequences.mask[row]
                around = [
                    range(max(0, position - before), position),
                    [position],
                    range(position + 1, min(position + 1 + after, len(ids))),
                ]
                parts = [tokenizer.decode([int(ids[i]) for i in part if counted[i]]) for part in around]
                texts.append(f"{parts[0]}«{parts[1]}»{parts[2]}")
                owners.append(unit)
    result: list[list[str]] = [[] for _ in range(len(found.places))]
    for unit, text in zip(owners, texts, strict=True):
        result[unit].append(text)
    return result


# ---- a whole layer


REMOVAL_PAIRS = 24
"""Pairs of prompts on which the removal of a head is measured in the table."""


class Layer(NamedTuple):
    """All that `describe` finds out about the heads of one Lorsa."""

    table: pd.DataFrame
    """Of `table`, with `effect` and `effect_error`: what removing this head alone does to the loss at labelled queries of its family, in
    nats, for the heads that were removed (NaN for the others)."""
    discovery: Discovery
    survey: Survey
    prompts: prompts.Prompts


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
) -> Layer:
    """The whole way from a trained Lorsa to the table of its heads.

    Args:
        model: the language model.
        layer: of the Lorsa.
        lorsa: takes raw activations.
        sequences: running text, read once.
        documents: (id, text), for the families that need passages of real text.
        removed: heads of each family whose removal is measured, in the order of `Discovery.units`; each costs one pass
            of the model over `REMOVAL_PAIRS` pairs of prompts. Families that predict no token are left out.
        others: other kinds of units of the layer, to be scored on the same prompts, see `families.discover`.
        scale: factor on the number of prompts, see `prompts.standard`.
        seed: of prompts, nulls and shuffles.
        batch_size: sequences at a time.
        progress: show bars.

    Raises:
        UserError: the text is empty, or no head is ever active on it.
    """
    units = LorsaHeads(lorsa)
    found = survey(model, layer, units, sequences, batch_size=batch_size, progress=progress)
    if bool((found.facts["frequency"] == 0).all()):
        raise UserError(
            "No head is active anywhere on this text: all are dead, or the module belongs to another model; train it again."
        )
    bos_id = int(sequences.tokens[0, 0]) if sequences.bos_policy == "prepend" else None
    vocabulary = prompts.Vocabulary(model.tokenizer, bos_id)
    try:
        texts = prompts.passages(documents, vocabulary, 96, seed=seed)
    except UserError:
        texts = []  # the families that need passages are skipped, with a sentence
    made = prompts.standard(vocabulary, texts, seed, scale)
    few = slice(0, 16)
    null = families.random_lorsa(lorsa, model, layer, sequences.tokens[few].long(), sequences.mask[few], seed)
    options: dict[str, Any] = {"others": others, "batch_size": 2 * batch_size, "seed": seed, "progress": progress}
    discovery = families.discover(model, layer, units, made.sets, LorsaHeads(null), skipped=made.skipped, **options)
    rows = table(discovery, found, units, model, sequences)
    rows["effect"] = rows["effect_error"] = np.nan
    for family, each in tqdm(made.sets.items(), desc="removals", disable=not progress):
        mine = [head for head in discovery.units(family) if rows.loc[head, "family"] == family][:removed]
        if each.predicts and mine:
            second = _thinned(families.halves(each)[1], REMOVAL_PAIRS)
            effects = Removals(model, layer, second, 2 * batch_size).effects(
                units, {str(head): [head] for head in mine}
            )
            rows.loc[mine, "effect"], rows.loc[mine, "effect_error"] = (
                effects["labelled"].to_numpy(),
                effects["labelled_error"].to_numpy(),
            )
    return Layer(rows, discovery, found, made)


def _thinned(each: prompts.PromptSet, n: int) -> prompts.PromptSet:
    """About `n` pairs, evenly from all: the series of one family follow each other."""
    pairs = each.pair.unique()
    kept = pairs[torch.linspace(0, len(pairs) - 1, min(n, len(pairs))).round().long()]
    return each.keep_pairs(lambda pair: torch.isin(pair, kept))
