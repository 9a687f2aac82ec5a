"""Examples of what units do, for automated interpretability: one pass over text, the same for Lorsa heads and SAE features.

The pass records, for a random sample of the units of every dictionary, each token where the unit is kept, its
activation (times the norm of what it writes) and the three source tokens that it came from: of the z pattern for a
Lorsa head, of the attribution through the layer's own attention for an SAE feature (see `units`). Time is linear in the
text, memory in the activations of the sampled units.

A window is `BEFORE` tokens, a token, and `AFTER` tokens. Active windows stand around the strongest activation in each
block of `BLOCK` tokens; their quantile is that of this activation among all such windows of the unit. In silent windows
the unit is not active at all. Three quarters of them are hard:

- same token: around a token on which the unit is active elsewhere;
- same source: around a token that has, at the usual distance, a source that the unit reads elsewhere;
- neighbour: around an activation of the recorded unit with the most similar write direction;
- random: anywhere.

Explanations are made from one half of the sequences and scored on the other.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lorsa_utils import ops, store
from lorsa_utils.activations import ActivationBatch, ActivationSource
from lorsa_utils.config import SAEConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import SAE, Lorsa
from lorsa_utils.models import AttentionSite

BEFORE, AFTER, BLOCK = 24, 7, 32
WIDTH = BEFORE + 1 + AFTER
N_SOURCES = 3
KINDS = ("active", "same token", "same source", "neighbour", "random")
_VALUES_AT_ONCE = 1 << 24


class Dictionary(NamedTuple):
    """Units to explain: a Lorsa or an SAE of one attention layer."""

    name: str
    """For tables, as `Lorsa`."""
    layer: int
    """Where it stands."""
    module: Lorsa | SAE
    """Takes raw activations."""


@dataclass(frozen=True)
class Budget:
    """How many units and windows; the same for every dictionary."""

    units: int = 100
    """Units explained in each dictionary, drawn at random from those with enough examples."""
    shown: int = 40
    """Active windows of the first half, from which an explanation is made: the strongest quarter, the rest over all quantiles."""
    contrast: int = 60
    """Silent windows of the first half."""
    scored: int = 30
    """Active windows of the second half, equally many from every quantile, and as many silent ones."""
    quantiles: int = 10
    """Classes of activation."""
    least: int = 12
    """Active windows, and silent ones, that a unit must have in each half."""
    oversampling: int = 4
    """Units recorded for each one explained: some are dead, too rare or too dense."""


@dataclass(frozen=True)
class Text:
    """The text of the pass."""

    tokens: np.ndarray = field(repr=False)
    """Token ids, [n_sequences, length]."""
    mask: np.ndarray = field(repr=False)
    """Counted tokens, bool [n_sequences, length]."""
    strings: Mapping[int, str] = field(repr=False)
    """Text of every token id that occurs."""

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """First counted position of each sequence and the one after its last, [n_sequences, 2]."""
        length = self.mask.shape[1]
        return np.stack([self.mask.argmax(axis=1), length - self.mask[:, ::-1].argmax(axis=1)], axis=1)

    @functools.cached_property
    def by_token(self) -> dict[int, np.ndarray]:
        """Flat places of every counted token id."""
        flat = np.where(self.mask, self.tokens, -1).ravel()
        order = np.argsort(flat, kind="stable")
        ids, firsts = np.unique(flat[order], return_index=True)
        return {
            int(token): places for token, places in zip(ids, np.split(order, firsts[1:]), strict=True) if token >= 0
        }

    def span(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and end (exclusive) of the window around flat places, as flat places."""
        rows, positions = np.divmod(places, self.tokens.shape[1])
        begin = np.maximum(positions - BEFORE, self.bounds[rows, 0])
        end = np.minimum(positions + AFTER + 1, self.bounds[rows, 1])
        return rows * self.tokens.shape[1] + begin, rows * self.tokens.shape[1] + end


@dataclass(frozen=True)
class Firings:
    """Where the recorded units of one dictionary are active. Rows are sorted by unit."""

    dictionary: Dictionary = field(repr=False)
    units: np.ndarray
    """Recorded units."""
    unit: np.ndarray = field(repr=False)
    """Of each activation, its unit's place in `units`."""
    place: np.ndarray = field(repr=False)
    """Flat place of the token in the text."""
    value: np.ndarray = field(repr=False)
    """Activation times the norm of the write direction."""
    sources: np.ndarray = field(repr=False)
    """Positions in the sequence of the largest masses, largest first, [n, N_SOURCES]."""
    shares: np.ndarray = field(repr=False)
    """Their shares of the mass on all source tokens, [n, N_SOURCES]."""
    similarity: np.ndarray = field(repr=False)
    """Cosines of write directions, [n_units, n_units], -1 on the diagonal."""

    def of(self, number: int) -> slice:
        """Rows of one unit."""
        return slice(*np.searchsorted(self.unit, [number, number + 1]))


# ---- one pass


@torch.no_grad()
def collect(
    source: ActivationSource,
    dictionaries: Sequence[Dictionary],
    sites: Mapping[int, AttentionSite],
    tokenizer: Any,
    budget: Budget | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Text, list[Firings]]:
    """One pass over activations for all dictionaries of all layers.

    Args:
        source: activations of text that no dictionary was trained on (a cache's held-out split, or a stream).
        dictionaries: what to record.
        sites: the attention layers, which SAE features are traced back through.
        tokenizer: for the text of tokens.
        budget: decides how many units are recorded.
        batch_size: sequences at a time.
        seed: of the draw of units.
        progress: show a bar.

    Raises:
        UserError: the text is empty, or no dictionary is given.
    """
    budget = budget or Budget()
    if not dictionaries or source.n_tokens == 0:
        raise UserError("There is nothing to explain: give at least one trained module and a text with counted tokens.")
    drawn = [_draw_units(dictionary, budget, seed) for dictionary in dictionaries]
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in dictionaries]
    tokens: list[Tensor] = []
    masks: list[Tensor] = []
    layers = sorted({dictionary.layer for dictionary in dictionaries})
    bar = tqdm(total=source.n_sequences, unit="seq", desc="examples", disable=not progress)
    for batch in source.batches(batch_size, layers=layers):
        first = sum(len(part) for part in tokens)
        for number, dictionary in enumerate(dictionaries):
            found[number].append(_record(dictionary, sites[dictionary.layer], batch, drawn[number], first))
        tokens.append(batch.tokens.cpu())
        masks.append(batch.mask.cpu())
        bar.update(len(batch.tokens))
    bar.close()
    text = _text(torch.cat(tokens).numpy(), torch.cat(masks).numpy(), tokenizer)
    length = text.tokens.shape[1]
    return text, [_firings(*parts, length) for parts in zip(dictionaries, drawn, found, strict=True)]


def _draw_units(dictionary: Dictionary, budget: Budget, seed: int) -> Tensor:
    n = dictionary.module.n_units
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: min(n, budget.units * budget.oversampling)].sort().values


def _text(tokens: np.ndarray, mask: np.ndarray, tokenizer: Any) -> Text:
    ids = np.unique(tokens[mask]).tolist()
    return Text(tokens, mask, dict(zip(ids, tokenizer.batch_decode([[index] for index in ids]), strict=True)))


def _record(
    dictionary: Dictionary, site: AttentionSite, batch: ActivationBatch, drawn: Tensor, first: int
) -> tuple[np.ndarray, ...]:
    """Activations of the drawn units on one batch: number of the unit, sequence, position, value, sources, shares."""
    module, device = dictionary.module, dictionary.module.W_O.device
    x, y = (side[dictionary.layer].to(device).float() for side in (batch.inputs, batch.outputs))
    number = torch.full((module.n_units,), -1, dtype=torch.long, device=device)
    number[drawn.to(device)] = torch.arange(len(drawn), device=device)
    norms, mask = module.W_O.norm(dim=1), batch.mask.to(device)
    parts = []
    for row in range(len(x)):
        if isinstance(module, Lorsa):
            pre, split = _lorsa_parts(module, x[row : row + 1])
        else:
            pre, split = module.pre_activations(y[row : row + 1]), _sae_masses(module, site, x[row : row + 1])
        indices, values = (side[0] for side in module.select(pre))
        position, slot = ((values != 0) & (number[indices] >= 0) & mask[row, :, None]).nonzero(as_tuple=True)
        unit = indices[position, slot]
        value = values[position, slot].abs() * norms[unit]
        size = max(1, _VALUES_AT_ONCE // (x.shape[1] * site.n_heads))
        top = [_largest(split(*some)) for some in zip(unit.split(size), position.split(size), strict=True)]
        sources, shares = (torch.cat(side) for side in zip(*top, strict=True))
        parts.append((number[unit], torch.full_like(position, row + first), position, value, sources, shares))
    return tuple(torch.cat(side).cpu().numpy() for side in zip(*parts, strict=True))


def _largest(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Places and shares of the largest masses of [n, length], [n, N_SOURCES] each; a short text's missing ones have share 0."""
    mass = mass.abs()
    top = mass.topk(min(N_SOURCES, mass.shape[1]), dim=1)
    shares = top.values / mass.sum(dim=1, keepdim=True).clamp_min(1e-30)
    missing = (0, N_SOURCES - top.indices.shape[1])
    return torch.nn.functional.pad(top.indices, missing), torch.nn.functional.pad(shares, missing)


def _lorsa_parts(module: Lorsa, x: Tensor) -> tuple[Tensor, Any]:
    """z of all heads [1, length, n_ov], and a function from heads [n] and positions [n] to their z patterns [n, length]."""
    q, k, v = module.attention_inputs(x)
    step = max(1, _VALUES_AT_ONCE // x.shape[1] ** 2)
    groups = [slice(first, first + step) for first in range(0, q.shape[1], step)]
    pattern = torch.cat([ops.attention_pattern(q[:, some], k[:, some], module.attn_scale)[0] for some in groups])
    z = (pattern @ v[0]).transpose(0, 1).flatten(1)[None]
    by_head, size = v[0].transpose(1, 2).flatten(0, 1), module.config.group_size
    return z, lambda heads, positions: pattern[heads // size, positions] * by_head[heads]


def _sae_masses(module: SAE, site: AttentionSite, x: Tensor) -> Any:
    """A function from features [n] and positions [n] to what each source token adds to them [n, length]."""
    pattern, values = site.pattern(x)[0], site.values(x)[0]

    def split(features: Tensor, positions: Tensor) -> Tensor:
        names, place = features.unique(return_inverse=True)
        sent = torch.einsum("hle,hed,fd->hlf", values, site.W_O.to(values), module.W_E[names])
        return torch.einsum("hnl,hln->nl", pattern[:, positions], sent[:, :, place])

    return split


def _firings(dictionary: Dictionary, drawn: Tensor, found: Sequence[tuple[np.ndarray, ...]], length: int) -> Firings:
    number, row, position, value, sources, shares = (np.concatenate(parts) for parts in zip(*found, strict=True))
    place = row * length + position
    order = np.lexsort((place, number))
    directions = torch.nn.functional.normalize(
        dictionary.module.W_O.detach()[drawn.to(dictionary.module.W_O.device)].float(), dim=1
    )
    similarity = (directions @ directions.T).fill_diagonal_(-1).cpu().numpy()
    return Firings(
        dictionary,
        drawn.numpy(),
        number[order],
        place[order],
        value[order],
        sources[order].astype(np.int32),
        shares[order],
        similarity,
    )


def planted(text: Text, active: Sequence[np.ndarray], sources_back: Sequence[int]) -> Firings:
    """Units that are known because they were made up: to see whether explanations and scores find what is there.

    Args:
        text: of a pass, or made by hand.
        active: where each unit is active, bool [n_sequences, length] each.
        sources_back: how many tokens before an active one each unit's source stands.
    """
    n = len(active)
    dictionary = Dictionary("planted", -1, SAE(SAEConfig(d_model=n, n_features=n, k=1)))
    parts = []
    for number, (where, back) in enumerate(zip(active, sources_back, strict=True)):
        row, position = np.nonzero(where & text.mask)
        sources = np.repeat(np.maximum(position - back, 0)[:, None], N_SOURCES, axis=1)
        shares = np.zeros((len(row), N_SOURCES), dtype=np.float32)
        shares[:, 0] = 1
        parts.append((np.full(len(row), number), row, position, np.ones(len(row), dtype=np.float32), sources, shares))
    with torch.no_grad():
        dictionary.module.W_O.copy_(torch.eye(n))
    return _firings(dictionary, torch.arange(n), parts, text.tokens.shape[1])


def save(path: str | Path, text: Text, firings: Sequence[Firings]) -> None:
    """Write what the pass recorded as one safetensors file."""
    tensors = {"tokens": torch.from_numpy(text.tokens), "mask": torch.from_numpy(text.mask)}
    for number, one in enumerate(firings):
        tensors |= {f"{number}.{name}": torch.from_numpy(np.ascontiguousarray(getattr(one, name))) for name in _ARRAYS}
    store.write_tensors(path, tensors)


def load(path: str | Path, dictionaries: Sequence[Dictionary], tokenizer: Any) -> tuple[Text, list[Firings]]:
    """Read what `save` wrote for the same dictionaries in the same order.

    Raises:
        UserError: the file is missing, damaged, or was made of other dictionaries.
    """
    tensors = {name: tensor.numpy() for name, tensor in store.read_tensors(path).items()}
    if (
        any(f"{number}.units" not in tensors for number in range(len(dictionaries)))
        or f"{len(dictionaries)}.units" in tensors
    ):
        raise UserError(f"{path} was made of other dictionaries; delete it and collect again.")
    firings = [
        Firings(one, *(tensors[f"{number}.{name}"] for name in _ARRAYS)) for number, one in enumerate(dictionaries)
    ]
    return _text(tensors["tokens"], tensors["mask"], tokenizer), firings


_ARRAYS = ("units", "unit", "place", "value", "sources", "shares", "similarity")


# ---- windows


@dataclass(frozen=True)
class Windows:
    """Pieces of text and what one unit does there, one row a window."""

    tokens: np.ndarray = field(repr=False)
    """Token ids, -1 where there is no text, [n, WIDTH]; text starts at column 0."""
    values: np.ndarray = field(repr=False)
    """Activations, [n, WIDTH]."""
    opens: np.ndarray
    """Whether the window begins where its text begins, bool [n]."""
    kind: np.ndarray
    """Of `KINDS`, [n]."""
    quantile: np.ndarray
    """Of active windows, 0 the weakest; -1 for silent ones, [n]."""
    peak: np.ndarray = field(repr=False)
    """Column that the window stands around, [n]."""
    sources: np.ndarray = field(repr=False)
    """Token ids of the peak's main sources, -1 where there are none, [n, N_SOURCES]."""
    shares: np.ndarray = field(repr=False)
    """Their shares of the mass, [n, N_SOURCES]."""

    @property
    def active(self) -> np.ndarray:
        """Whether the unit is active in a window, bool [n]."""
        return self.kind == KINDS[0]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: np.ndarray) -> Windows:
        """Some windows, by a mask or by indices."""
        return Windows(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def pieces(self, row: int, strings: Mapping[int, str]) -> list[str]:
        """The text of one window, token by token."""
        return [strings[int(token)] for token in self.tokens[row] if token >= 0]

    def marked(self, row: int, strings: Mapping[int, str], marks: np.ndarray | None = None) -> str:
        """The text of one window; marked columns (bool [WIDTH]), if any, in «»; an ellipsis where text was cut off in front."""
        pieces = self.pieces(row, strings)
        if marks is not None:
            pieces = [f"«{piece}»" if mark else piece for piece, mark in zip(pieces, marks, strict=False)]
        return ("" if self.opens[row] else "…") + "".join(pieces)


@dataclass(frozen=True)
class UnitExamples:
    """One unit and its windows."""

    unit: int
    """Head or feature."""
    group: int
    """QK group of a Lorsa head, -1 for an SAE feature."""
    frequency: float
    """Share of counted tokens where it is active."""
    maximum: float
    """Largest activation seen."""
    first: Windows
    """What explanations are made from."""
    second: Windows
    """What they are scored on."""


@dataclass(frozen=True)
class Examples:
    """Examples of one dictionary's units. Made by `examples`."""

    dictionary: Dictionary = field(repr=False)
    units: list[UnitExamples] = field(repr=False)
    """Those to explain, in random order."""
    relatives: list[int]
    """For each, the place in `units` of another one: of its family or QK group if there is one, then by similarity of what they write."""
    left_out: dict[str, int]
    """Recorded units that were not drawn from, by reason: `dead`, `too few active windows`, `too few silent windows`."""
    eligible: int
    """Recorded units with enough examples."""


def examples(
    firings: Firings, text: Text, budget: Budget | None = None, seed: int = 0, families: Mapping[int, str] | None = None
) -> Examples:
    """Windows of a random sample of the units that have enough of them.

    Args:
        firings: of one dictionary.
        text: of the pass.
        budget: how many units and windows.
        seed: of the sample, the halves and the windows.
        families: unit to family, where it is known (column `family` of `lorsa heads`); relatives are then sought in the
            family first.

    Raises:
        UserError: no recorded unit has enough examples.
    """
    budget = budget or Budget()
    rng = np.random.default_rng(seed)
    half = rng.permutation(len(text.tokens)) % 2
    units: list[UnitExamples] = []
    numbers: list[int] = []
    left_out = Counter({"dead": 0, "too few active windows": 0, "too few silent windows": 0})
    eligible = 0
    for number in rng.permutation(len(firings.units)):
        made = _unit_examples(
            firings, int(number), text, half, budget, np.random.default_rng([seed, int(firings.units[number])])
        )
        if isinstance(made, str):
            left_out[made] += 1
        else:
            eligible += 1
            if len(units) < budget.units:
                units.append(made)
                numbers.append(int(number))
    if not units:
        raise UserError(
            f"No unit of {firings.dictionary.name} at layer {firings.dictionary.layer} is active in {budget.least} windows of each half; "
            "give a longer text."
        )
    known = families or {}
    kinds = {name: -2 - number for number, name in enumerate(sorted(set(known.values()) - {""}))}
    groups = np.array([kinds.get(known.get(unit.unit, ""), unit.group) for unit in units])
    return Examples(
        firings.dictionary,
        units,
        _relatives(firings.similarity[np.ix_(numbers, numbers)], groups),
        dict(left_out),
        eligible,
    )


def _relatives(similarity: np.ndarray, groups: np.ndarray) -> list[int]:
    """The most similar other unit, before all others those of the same group (-1 is none)."""
    same = (groups[:, None] == groups) & (groups != -1)
    nearness = similarity + 3 * same
    np.fill_diagonal(nearness, -np.inf)
    return [int(index) for index in nearness.argmax(axis=1)]


def _unit_examples(
    firings: Firings, number: int, text: Text, half: np.ndarray, budget: Budget, rng: np.random.Generator
) -> Any:
    """The examples of one unit, or the reason why it has too few."""
    rows = firings.of(number)
    places, values = firings.place[rows], firings.value[rows]
    if len(places) == 0:
        return "dead"
    length = text.tokens.shape[1]
    peaks = _peaks(places, values, length)
    order = np.argsort(np.argsort(values[peaks], kind="stable"))
    quantile = order * budget.quantiles // len(peaks)
    sides = half[places[peaks] // length]
    if min((sides == 0).sum(), (sides == 1).sum()) < budget.least:
        return "too few active windows"
    chosen = [
        _for_explanation(values[peaks], quantile, np.flatnonzero(sides == 0), budget, rng),
        _evenly(quantile, np.flatnonzero(sides == 1), budget.scored, rng),
    ]
    first_peaks = peaks[chosen[0]]
    silent = _silent(places, text)
    windows = []
    for side, n in ((0, budget.contrast), (1, len(chosen[1]))):
        hard = _hard_places(firings, number, rows, first_peaks, text, rng)
        hard["random"] = np.flatnonzero(text.mask.ravel())
        found = _silent_places(hard, silent, half, side, length, n, rng)
        if sum(len(part) for part in found.values()) < min(budget.least, n):
            return "too few silent windows"
        windows.append(_windows(firings, rows, text, peaks[chosen[side]], quantile[chosen[side]], found))
    lorsa = firings.dictionary.module
    unit = int(firings.units[number])
    group = unit // lorsa.config.group_size if isinstance(lorsa, Lorsa) else -1
    return UnitExamples(unit, group, len(places) / int(text.mask.sum()), float(values.max()), *windows)


def _peaks(places: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """Rows of the strongest activation in each block of each sequence; of two that are near, the stronger."""
    block = places // length * (length // BLOCK + 1) + places % length // BLOCK
    order = np.lexsort((-values, block))
    peaks = np.sort(order[np.unique(block[order], return_index=True)[1]])
    near = (np.diff(places[peaks]) < BLOCK // 2) & (np.diff(places[peaks] // length) == 0)
    rises = np.diff(values[peaks]) > 0
    return peaks[~(np.append(near & rises, False) | np.append(False, near & ~rises))]


def _evenly(quantile: np.ndarray, among: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` of the rows `among` at most, as many from every quantile as there are."""
    among = rng.permutation(among)
    turn = np.zeros(len(among), dtype=int)
    for value in np.unique(quantile[among]):
        mine = quantile[among] == value
        turn[mine] = np.arange(mine.sum())
    return among[np.lexsort((rng.random(len(among)), turn))[:n]]


def _for_explanation(
    values: np.ndarray, quantile: np.ndarray, among: np.ndarray, budget: Budget, rng: np.random.Generator
) -> np.ndarray:
    """The strongest rows, then others over all quantiles."""
    ranked = among[np.argsort(-values[among], kind="stable")]
    top = budget.shown // 4
    return np.concatenate([ranked[:top], _evenly(quantile, ranked[top:], budget.shown - top, rng)])


def _silent(places: np.ndarray, text: Text) -> Any:
    """A function from flat places to whether the unit is silent in the windows around them."""
    count = np.zeros(text.tokens.size + 1, dtype=np.int32)
    count[places + 1] = 1
    count = count.cumsum()

    def check(around: np.ndarray) -> np.ndarray:
        begin, end = text.span(around)
        return count[end] == count[begin]

    return check


def _hard_places(
    firings: Firings, number: int, rows: slice, peaks: np.ndarray, text: Text, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Places that windows of each hard kind may stand around, in both halves.

    What is hard is judged by the first half's `peaks` alone.
    """
    flat, length = text.tokens.ravel(), text.tokens.shape[1]
    places, sources = firings.place[rows][peaks], firings.sources[rows][peaks, 0]
    own = [token for token, _ in Counter(flat[places].tolist()).most_common(8)]
    nowhere = np.zeros(0, dtype=np.int64)
    same_source = [nowhere]
    back = places % length - sources
    near = (back > 0) & (back <= BEFORE) & text.mask.ravel()[places - back]
    for token, _ in Counter(flat[(places - back)[near]].tolist()).most_common(8):
        distances = back[near & (flat[places - back] == token)]
        around = text.by_token[token]
        moved = around + rng.choice(distances, len(around))
        same_source.append(
            moved[(moved // length == around // length) & text.mask.ravel()[np.minimum(moved, flat.size - 1)]]
        )
    neighbour = firings.of(int(firings.similarity[number].argmax())) if len(firings.units) > 1 else slice(0, 0)
    return {
        "same token": np.concatenate([nowhere, *(text.by_token[token] for token in own)]),
        "same source": np.concatenate(same_source),
        "neighbour": firings.place[neighbour],
    }


def _silent_places(
    candidates: Mapping[str, np.ndarray],
    silent: Any,
    half: np.ndarray,
    side: int,
    length: int,
    n: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """About `n` places of silent windows in one half, equally many of each kind; what a kind lacks is made up for by random ones."""
    found: dict[str, np.ndarray] = {}
    for kind, places in candidates.items():
        wanted = n // len(candidates) if kind != "random" else n - sum(len(part) for part in found.values())
        mine = rng.permutation(places[half[places // length] == side])[: 50 * n]
        found[kind] = mine[silent(mine)][:wanted] if len(mine) else mine
    return found


def _windows(
    firings: Firings, rows: slice, text: Text, peaks: np.ndarray, quantile: np.ndarray, silent: Mapping[str, np.ndarray]
) -> Windows:
    """Active windows around a unit's `peaks` (of its rows), then silent ones."""
    places, values = firings.place[rows], firings.value[rows]
    around = np.concatenate([places[peaks], *silent.values()]).astype(np.int64)
    kind = np.repeat([KINDS[0], *silent], [len(peaks), *(len(part) for part in silent.values())])
    begin, end = text.span(around)
    columns = begin[:, None] + np.arange(WIDTH)
    inside = columns < end[:, None]
    columns = np.minimum(columns, text.tokens.size - 1)
    tokens = np.where(inside, text.tokens.ravel()[columns], -1)
    found = np.minimum(np.searchsorted(places, columns), len(places) - 1)
    activation = np.where(inside & (places[found] == columns), values[found], 0.0)
    length = text.tokens.shape[1]
    n_silent = len(around) - len(peaks)
    row = places[peaks, None] // length
    sources = np.where(text.mask[row, firings.sources[rows][peaks]], text.tokens[row, firings.sources[rows][peaks]], -1)
    return Windows(
        tokens.astype(np.int64),
        activation,
        begin % length == text.bounds[begin // length, 0],
        kind,
        np.concatenate([quantile, np.full(n_silent, -1)]),
        around - begin,
        np.concatenate([sources, np.full((n_silent, N_SOURCES), -1)]),
        np.concatenate([firings.shares[rows][peaks], np.zeros((n_silent, N_SOURCES), dtype=np.float32)]),
    )
