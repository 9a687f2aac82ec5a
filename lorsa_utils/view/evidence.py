"""Everything that a page shows about a head of a Lorsa, gathered for many heads in one pass over the text.

For a head h of QK group g, at a query i of one text (paper, Sec. 5):

    activation  z_i * ||w_o||, 0 where h is not among the K kept heads of the token
    z pattern   z_ij = A_ij v_j * ||w_o||, an exact split over sources j: sum_j z_ij is the activation before the
                selection
    attention   A_ij, the pattern of the group, which all of its heads share

A context is a window of a text around one token: `top` ones hold the largest activations, `sample` ones an active token
drawn at random, one from each stretch of the ordered activations, `random` ones any token at all, so that silence shows
too. Of the sources before the window only the first token, where attention likes to rest, and the surroundings of the
main ones are kept apart; the others are added up in one column.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.families import FAMILIES, SCORES
from lorsa_utils.heads.survey import Survey
from lorsa_utils.heads.units import LorsaHeads, Unembedding
from lorsa_utils.lorsa import SAE, Lorsa, SparseModule
from lorsa_utils.models import LanguageModel, Replacement
from lorsa_utils.text import Sequences

BEFORE, AFTER = 100, 10
"""Tokens of a context before and after the token it was chosen for, as in the authors' interface."""
MAIN_SOURCES, MAIN_SHARE = 4, 0.05
"""A token's main sources: at most so many, each with at least such a share of its z pattern (in absolute values)."""
AROUND = (8, 3)
"""Tokens that are kept before and after a main source."""
N_TOP, N_SAMPLES, N_RANDOM = 10, 8, 4
N_TOKENS = 10
"""Tokens that w_o raises and lowers most."""
N_FEATURES = 8
"""Nearest features of an SAE."""


class Place(NamedTuple):
    """One token of the text, and why it was chosen."""

    kind: str
    """`top`, `sample` or `random`."""
    rank: float
    """For samples, the share of the head's active tokens that are less active; else 0."""
    row: int
    """Number of the sequence."""
    position: int
    """In the sequence."""


@dataclass(frozen=True)
class Context:
    """A window of one text as one head sees it: n tokens, m columns of sources."""

    place: Place
    tokens: list[str]
    """Text of the sources, [m]; the last n of them are the window's tokens, "" those added up."""
    positions: list[int]
    """Position of each source in its sequence, [m]; -1 for those added up, always the second column if there are any."""
    peak: int
    """The token it was chosen for, counted from the window's first."""
    activation: Tensor = field(repr=False)
    """[n], 0 where the head is not kept."""
    z_pattern: Tensor = field(repr=False)
    """[n, m], each row sums to the activation before the selection."""
    attention: Tensor = field(repr=False)
    """[n, m], each row sums to 1."""
    v: Tensor = field(repr=False)
    """[m], v_j * ||w_o||, so that z_ij = A_ij v_j; 0 for those added up."""

    @property
    def n_before(self) -> int:
        """Columns of sources before the window."""
        return len(self.tokens) - len(self.activation)

    @property
    def main_sources(self) -> list[int]:
        """Columns of the main sources of the token it was chosen for, the largest first."""
        return main_sources(self.z_pattern[self.peak])


class Feature(NamedTuple):
    """A feature of an SAE near a head."""

    number: int
    cosine: float
    tokens: list[str]
    """What its write direction raises."""


@dataclass(frozen=True)
class Head:
    """What is known of one head. Made by `collect`."""

    model: str
    layer: int
    head: int
    n_heads: int
    group: int
    n_tokens: int
    """Counted tokens of the text that facts come from."""
    facts: dict[str, float]
    """Of `Survey.facts`."""
    families: list[str]
    """Names in words, the most specific first; empty without a name."""
    named: bool
    """Whether names were looked for."""
    scores: dict[str, dict[str, float]]
    """Family in words to its scores on unseen prompts, for the head's families."""
    effect: tuple[float, float] | None
    """Increase of the loss on prompts of its first family when the head alone is removed, in nats, with its standard error."""
    raised: list[tuple[str, float]]
    """Tokens with the largest logits of w_o (before the last norm's scale) and those logits."""
    lowered: list[tuple[str, float]]
    contexts: list[Context] = field(repr=False)
    """The `top` ones by activation, then `sample` by activation, then `random`."""
    siblings: pd.DataFrame = field(repr=False)
    """Heads of its group, one row each: `head`, `families`, `frequency`, `cos_o` and `cos_v` (cosine of write and read directions with
    this head's), `tokens`."""
    written_features: list[Feature] | None = None
    """Features of an SAE on the layer's output whose write directions are nearest w_o; None without an SAE."""
    read_features: list[Feature] | None = None
    """Features of a transcoder on the layer's input whose read directions are nearest w_v; None without one."""
    shares: list[float] | None = None
    """Share of each MHSA head in what this head writes (`correspondence.mhsa_shares`)."""
    explanation: str | None = None
    score: float | None = None
    """Of the explanation, balanced accuracy; 1/2 is chance."""

    @property
    def dead(self) -> bool:
        """Whether it was never active on the text."""
        return self.facts["frequency"] == 0


class ReadOnce(LanguageModel):
    """A language model that remembers what one layer read and wrote: a text that was captured once costs no second pass.

    Only `capture` of that layer remembers, and not inside `splice`. Beyond `limit` bytes, texts are read again.
    """

    def __init__(self, model: LanguageModel, layer: int, limit: int = 1 << 30) -> None:
        vars(self).update(vars(model))
        self._layer, self._room, self._spliced = layer, limit, False
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}

    def capture(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """See `LanguageModel.capture`."""
        if list(layers) != [self._layer] or self._spliced or tokens.ndim != 2:
            return super().capture(tokens, layers)
        keys = [row.long().cpu().numpy().tobytes() for row in tokens]
        found = {key: self._known[key] for key in keys if key in self._known}
        if missing := [number for number, key in enumerate(keys) if key not in found]:
            sides = super().capture(tokens[missing], layers)[self._layer]
            for place, number in enumerate(missing):
                found[keys[number]] = pair = (sides[0][place].clone(), sides[1][place].clone())
                size = 2 * pair[0].numel() * pair[0].element_size()
                if size <= self._room:
                    self._known[keys[number]], self._room = pair, self._room - size
        x, y = (torch.stack([found[key][side] for key in keys]) for side in (0, 1))
        return {self._layer: (x, y)}

    @contextlib.contextmanager
    def splice(self, replacements: Mapping[int, Replacement]) -> Iterator[None]:
        """See `LanguageModel.splice`."""
        self._spliced = True
        try:
            with super().splice(replacements):
                yield
        finally:
            self._spliced = False


# ---- tokens


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token.

    A character split over several tokens stands at the last of them; the others show their bytes in hexadecimal.
    """
    texts = [tokenizer.decode([index]) for index in ids]
    first = 0
    while first < len(texts):
        if "\ufffd" not in texts[first]:
            first += 1
            continue
        last, whole = _whole_characters(tokenizer, ids, first)
        raw = [tokenizer.convert_ids_to_tokens(int(index)) for index in ids[first:last]]
        texts[first:last] = [_hexadecimal(piece) for piece in raw]
        if whole:
            texts[last - 1] = whole
        first = last
    return texts


def _whole_characters(tokenizer: Any, ids: Sequence[int], first: int) -> tuple[int, str]:
    """Where the run of tokens from `first` on ends that is text only together, and that text; one token and "" when there is none."""
    for last in range(first + 2, min(first + 5, len(ids) + 1)):
        text = tokenizer.decode(list(ids[first:last]))
        if "\ufffd" not in text:
            return last, text
    return first + 1, ""


def _hexadecimal(piece: str | None) -> str:
    """A token of a byte-level vocabulary as the bytes it stands for."""
    return "".join(f"⟨{_BYTE_OF[character]:02X}⟩" if character in _BYTE_OF else character for character in piece or "")


def _byte_characters() -> dict[str, int]:
    """Characters that byte-level vocabularies write bytes with: printable Latin-1 as itself, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


# ---- places


def choose_places(found: Survey, head: int, sequences: Sequences, seed: int = 0) -> list[Place]:
    """Which tokens a head is shown at. Random ones are the same for all heads."""
    places = [Place("top", 0.0, row, position) for row, position in found.places[head, :N_TOP].tolist() if row >= 0]
    drawn = [
        (value, place)
        for value, place in zip(found.samples[head].tolist(), found.sampled[head].tolist(), strict=True)
        if value > 0
    ]
    drawn.sort(reverse=True)
    # The middle of each of as many equal stretches of the ordered draws.
    middles = sorted({int((number + 0.5) * len(drawn) / N_SAMPLES) for number in range(N_SAMPLES)}) if drawn else []
    places += [Place("sample", 1 - (number + 0.5) / len(drawn), *drawn[number][1]) for number in middles]
    counted = sequences.mask.nonzero()
    chosen = torch.randperm(len(counted), generator=torch.Generator().manual_seed(seed))[:N_RANDOM]
    return places + [Place("random", 0.0, row, position) for row, position in counted[chosen].tolist()]


@torch.no_grad()
def read_context(
    lorsa: Lorsa,
    head: int,
    x: Tensor,
    kept: tuple[Tensor, Tensor],
    ids: Sequence[int],
    place: Place,
    tokenizer: Any,
    before: int = BEFORE,
    after: int = AFTER,
) -> Context:
    """One window of one text.

    Args:
        lorsa: takes raw activations.
        head: of it.
        x: attention input of the text, [length, d_model].
        kept: heads and activations of `lorsa.encode`, each [length, k].
        ids: tokens of the text; what follows them in x is padding.
        place: the token in the middle.
        tokenizer: of the model.
        before: tokens of the window before that one.
        after: and after it.
    """
    start, end = max(0, place.position - before), min(place.position + after + 1, len(ids))
    norm = lorsa.W_O[head].norm()
    attention = lorsa.attention_pattern(x[None], head // lorsa.config.group_size)[0, start:end, :end]
    v = (x[:end] @ lorsa.W_V[head] + lorsa.b_V[head]) * norm
    activation = ((kept[0][start:end] == head) * kept[1][start:end]).sum(dim=-1) * norm
    apart = _apart((attention[place.position - start] * v), start)
    added_up = sorted(set(range(start)) - set(apart))
    columns = [*apart[:1], *([-1] if added_up else []), *apart[1:], *range(start, end)]

    def folded(sides: Tensor, total: Tensor) -> Tensor:
        """Columns of [n, end], with the total of those added up, [n, 1]."""
        parts = [sides[:, [column]] if column >= 0 else total for column in columns[: len(columns) - end + start]]
        return torch.cat([*parts, sides[:, start:]], dim=1).cpu()

    z = attention * v
    texts = iter(token_texts(tokenizer, [int(ids[column]) for column in columns if column >= 0]))
    return Context(
        place,
        ["" if column < 0 else next(texts) for column in columns],
        columns,
        place.position - start,
        activation.cpu(),
        folded(z, z[:, added_up].sum(dim=1, keepdim=True)),
        folded(attention, attention[:, added_up].sum(dim=1, keepdim=True)),
        folded(v[None], v.new_zeros(1, 1))[0],
    )


def main_sources(z: Tensor) -> list[int]:
    """The main sources in a row of a z pattern [m], the largest first."""
    sizes = z.abs()
    order = sizes.argsort(descending=True)[:MAIN_SOURCES].tolist()
    return [source for source in order if float(sizes[source]) >= MAIN_SHARE * float(sizes.sum()) > 0]


def _apart(z: Tensor, start: int) -> list[int]:
    """Positions before the window that are not added up, for a row z [end] of the z pattern."""
    around = [range(source - AROUND[0], source + AROUND[1] + 1) for source in main_sources(z) if 0 < source < start]
    return sorted({0, *(position for some in around for position in some if 0 <= position < start)}) if start else []


# ---- heads


@torch.no_grad()
def collect(
    model: LanguageModel,
    layer: int,
    lorsa: Lorsa,
    chosen: Sequence[int],
    found: Survey,
    sequences: Sequences,
    *,
    table: pd.DataFrame | None = None,
    shares: Tensor | None = None,
    sae: SAE | None = None,
    input_sae: SAE | None = None,
    explanations: Mapping[int, tuple[str | None, float | None]] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Head]:
    """What there is to know of some heads; the text is read once for all of them, and only where something is shown.

    Args:
        model: the language model.
        layer: of the Lorsa.
        lorsa: takes raw activations.
        chosen: heads.
        found: survey of all heads on `sequences`.
        sequences: the text.
        table: of `survey.describe`, for names and scores.
        shares: of `correspondence.mhsa_shares`, [n_heads, n_mhsa_heads].
        sae: an SAE on the layer's output, for the nearest features of w_o.
        input_sae: a transcoder on the layer's input, for the nearest features of w_v.
        explanations: head to an explanation and its score.
        batch_size: sequences at a time.
        seed: of random contexts.
        progress: show a bar.

    Yields:
        one `Head` for each of `chosen`, in this order.

    Raises:
        UserError: there is no such head, or what was given does not belong together.
    """
    units = LorsaHeads(lorsa)
    units.check(chosen)
    _check(found, units, sequences, table, shares, sae, input_sae)
    contexts = _contexts(
        model,
        layer,
        lorsa,
        {head: choose_places(found, head, sequences, seed) for head in chosen},
        sequences,
        batch_size,
        progress,
    )
    words, groups = _Words(model), {}
    for head in chosen:
        group = head // lorsa.config.group_size
        if group not in groups:
            groups[group] = _group(lorsa, group, found, table, words)
        row = None if table is None else table.iloc[head]
        mine = None if shares is None or bool(shares[head].isnan().any()) else shares[head].tolist()
        explanation, score = (explanations or {}).get(head, (None, None))
        raised, lowered = words.ends(lorsa.W_O[head])
        yield Head(
            model=Path(model.name).name if Path(model.name).exists() else model.name,
            layer=layer,
            head=head,
            n_heads=units.n,
            group=group,
            n_tokens=found.n_tokens,
            facts={str(name): float(value) for name, value in found.facts.iloc[head].items()},
            families=_families(row),
            named=row is not None,
            scores=_scores(row),
            effect=None
            if row is None or not np.isfinite(row.get("effect", np.nan))
            else (float(row["effect"]), float(row["effect_error"])),
            raised=raised,
            lowered=lowered,
            contexts=contexts[head],
            siblings=_siblings(lorsa, head, groups[group]),
            written_features=None if sae is None else _nearest(lorsa.W_O[head], sae.W_O, sae, words),
            read_features=None if input_sae is None else _nearest(lorsa.W_V[head], input_sae.W_E, input_sae, words),
            shares=mine,
            explanation=explanation,
            score=score,
        )


def _check(
    found: Survey,
    units: LorsaHeads,
    sequences: Sequences,
    table: pd.DataFrame | None,
    shares: Tensor | None,
    sae: SAE | None,
    input_sae: SAE | None,
) -> None:
    if len(found.facts) != units.n or int(found.places[..., 0].max()) >= len(sequences.tokens):
        raise UserError("This survey is of other heads or of another text; make it again with survey.survey.")
    if (table is not None and len(table) != units.n) or (shares is not None and len(shares) != units.n):
        raise UserError(
            f"The table of heads belongs to another module than this one with {units.n} heads; make it with `lorsa heads`."
        )
    d_model = units.lorsa.config.d_model
    for module, kind, what in (
        (sae, "sae", "an SAE of the layer's output"),
        (input_sae, "transcoder", "a transcoder on the layer's input"),
    ):
        if module is not None and (module.config.kind != kind or module.config.d_model != d_model):
            raise UserError(
                f"This is a {module.config.kind} of width {module.config.d_model}; give {what}, of width {d_model}."
            )


def _contexts(
    model: LanguageModel,
    layer: int,
    lorsa: Lorsa,
    places: Mapping[int, list[Place]],
    sequences: Sequences,
    batch_size: int,
    progress: bool,
) -> dict[int, list[Context]]:
    """Contexts of some heads, in the order of their places; each sequence is read once."""
    wanted: dict[int, list[tuple[int, int, Place]]] = {}
    for head, some in places.items():
        for number, place in enumerate(some):
            wanted.setdefault(place.row, []).append((head, number, place))
    ends = {
        row: min(max(place.position for *_, place in some) + AFTER + 1, sequences.tokens.shape[1])
        for row, some in wanted.items()
    }
    rows = sorted(wanted, key=lambda row: (ends[row], row))
    done: dict[tuple[int, int], Context] = {}
    bar = tqdm(total=len(rows), unit="seq", desc="contexts", disable=not progress)
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        tokens = sequences.tokens[batch].to(model.device, torch.long)
        # Which heads are kept is needed no further than the last token shown.
        inputs = model.capture(tokens, [layer])[layer][0][:, : ends[batch[-1]]].float()
        indices, values = lorsa.encode(inputs)
        for number, row in enumerate(batch):
            counted = int(sequences.mask[row].nonzero().max()) + 1  # what comes after is padding
            ids, kept = sequences.tokens[row, :counted].tolist(), (indices[number], values[number])
            for head, index, place in wanted[row]:
                done[head, index] = read_context(lorsa, head, inputs[number], kept, ids, place, model.tokenizer)
            bar.update()
    bar.close()
    return {head: [done[head, number] for number in range(len(some))] for head, some in places.items()}


class _Words:
    """From write directions to tokens in text."""

    def __init__(self, model: LanguageModel) -> None:
        self.unembedding, self.tokenizer = Unembedding(model), model.tokenizer

    def _named(self, values: Tensor, indices: Tensor) -> list[tuple[str, float]]:
        return [(self.text(index), value) for index, value in zip(indices.tolist(), values.tolist(), strict=True)]

    def text(self, index: int) -> str:
        """A token alone; models pad their vocabulary with some that have no text."""
        return token_texts(self.tokenizer, [index])[0]

    def ends(self, direction: Tensor) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """Tokens that a direction [d_model], taken at norm 1, raises and lowers most, with their logits."""
        logits = self.unembedding.logits(normalize(direction[None], dim=1))[0]
        return self._named(*logits.topk(N_TOKENS)), self._named(*logits.topk(N_TOKENS, largest=False))

    def raised(self, directions: Tensor, n: int = 4) -> list[list[str]]:
        """The first tokens that each direction [n, d_model] raises."""
        return [[self.text(index) for index in row] for row in self.unembedding.top_tokens(directions, n).tolist()]


def _families(row: Any) -> list[str]:
    return [] if row is None or not row["families"] else [FAMILIES[name].label for name in row["families"].split("; ")]


def _scores(row: Any) -> dict[str, dict[str, float]]:
    """Scores of the head's own families."""
    if row is None or not row["families"]:
        return {}
    found = {}
    for family in row["families"].split("; "):
        values = {score: row.get(f"{family}_{score}", np.nan) for score in SCORES}
        found[FAMILIES[family].label] = {score: float(value) for score, value in values.items() if np.isfinite(value)}
    return found


def _group(lorsa: Lorsa, group: int, found: Survey, table: pd.DataFrame | None, words: _Words) -> pd.DataFrame:
    """One row for each head of a group."""
    size = lorsa.config.group_size
    heads = range(group * size, (group + 1) * size)
    rows = pd.DataFrame({"head": list(heads)})
    rows["families"] = "" if table is None else [", ".join(_families(table.iloc[head])) for head in heads]
    rows["frequency"] = found.facts["frequency"].iloc[heads.start : heads.stop].to_numpy()
    return rows.assign(tokens=words.raised(lorsa.W_O[heads.start : heads.stop]))


def _siblings(lorsa: Lorsa, head: int, group: pd.DataFrame) -> pd.DataFrame:
    """The other heads of the group, with their cosines."""
    mine = group["head"].tolist()
    cosines = [normalize(side[mine], dim=1) @ normalize(side[head], dim=0) for side in (lorsa.W_O, lorsa.W_V)]
    rows = group.assign(cos_o=cosines[0].cpu().numpy(), cos_v=cosines[1].cpu().numpy())
    return rows[rows["head"] != head].reset_index(drop=True)


def _nearest(direction: Tensor, directions: Tensor, module: SparseModule, words: _Words) -> list[Feature]:
    """Features whose directions [n_features, d_model] have the largest cosine with `direction`."""
    cosines, numbers = (normalize(directions, dim=1) @ normalize(direction, dim=0)).topk(
        min(N_FEATURES, len(directions))
    )
    tokens = words.raised(module.W_O[numbers])
    return [Feature(*row) for row in zip(numbers.tolist(), cosines.tolist(), tokens, strict=True)]
