"""Examples of what units do: one pass over text, the same for Lorsa heads and SAE features.

Each activation of a random sample of units is recorded with the three tokens that it came from most: by the z pattern
of a Lorsa head, by an SAE feature's attribution through the layer's own attention (see `units`).

A window is `BEFORE` tokens, a token, and `AFTER` tokens. Active ones stand around the strongest activation in each
block of `BLOCK` tokens, by which they are divided into quantiles. In silent ones, a quarter of each kind, the unit is
never active:

- same token: around a token on which the unit is active elsewhere;
- same source: around a token that has, at the usual distance, a source that the unit reads elsewhere;
- neighbour: around an activation of the recorded unit with the most similar write direction;
- random: anywhere, also in place of missing ones.

Explanations are made from one half of the sequences and scored on the other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
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
    """A Lorsa or an SAE for raw activations of one attention layer."""

    name: str
    layer: int
    module: Lorsa | SAE


@dataclass(frozen=True)
class Budget:
    """Sizes per dictionary."""

    units: int = 100
    """Units explained, drawn from those with enough examples."""
    shown: int = 40
    """Active windows for the explanation: a quarter the strongest, the rest over all quantiles."""
    contrast: int = 60
    """Silent windows for the explanation."""
    scored: int = 30
    """Active windows to score on, equally many from every quantile, and as many silent ones."""
    quantiles: int = 10
    least: int = 12
    """Active and silent windows that a unit must have in each half."""
    oversampling: int = 4
    """Units recorded per explained one: some are dead, too rare or too dense."""


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """The text of a pass."""

    tokens: np.ndarray
    """[n_sequences, length]; a flat place is an index of `tokens.ravel()`."""
    mask: np.ndarray
    """Counted tokens."""
    strings: Mapping[int, str]

    @classmethod
    def decoded(cls, tokens: np.ndarray, mask: np.ndarray, tokenizer: Any) -> Corpus:
        """With texts from a tokenizer."""
        ids = np.unique(tokens[mask]).tolist()
        return cls(tokens, mask, dict(zip(ids, tokenizer.batch_decode([[index] for index in ids]), strict=True)))

    @property
    def length(self) -> int:
        """Of a sequence."""
        return self.tokens.shape[1]

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """First counted position of each sequence and the one after its last, [n_sequences, 2]."""
        return np.stack([self.mask.argmax(axis=1), self.length - self.mask[:, ::-1].argmax(axis=1)], axis=1)

    def places(self, token: int) -> np.ndarray:
        """Flat places of a token id."""
        return np.flatnonzero((self.tokens == token) & self.mask)

    def span(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and end (exclusive) of the windows around flat places."""
        rows, positions = np.divmod(places, self.length)
        begin = np.maximum(positions - BEFORE, self.bounds[rows, 0])
        end = np.minimum(positions + AFTER + 1, self.bounds[rows, 1])
        return rows * self.length + begin, rows * self.length + end


@dataclass(frozen=True, eq=False, repr=False)
class Firings:
    """Activations of one dictionary's recorded units, one row each, sorted by unit and place."""

    dictionary: Dictionary
    corpus: Corpus
    units: np.ndarray
    number: np.ndarray
    """Index in `units`."""
    place: np.ndarray
    """Flat place."""
    value: np.ndarray
    """Activation times the norm of the write direction."""
    sources: np.ndarray
    """Positions of the largest masses, largest first, [n, N_SOURCES]."""
    shares: np.ndarray
    """Their shares of the mass, [n, N_SOURCES]."""

    @functools.cached_property
    def similarity(self) -> np.ndarray:
        """Cosines of write directions, [n_units, n_units], -1 on the diagonal."""
        weights = self.dictionary.module.W_O.detach()
        directions = functional.normalize(weights[torch.from_numpy(self.units).to(weights.device)].float(), dim=1)
        return (directions @ directions.T).fill_diagonal_(-1).cpu().numpy()

    def of(self, number: int) -> slice:
        """Rows of one unit."""
        return slice(*np.searchsorted(self.number, [number, number + 1]))


# ---- one pass

Rows = tuple[np.ndarray, ...]
"""`number`, `place`, `value`, `sources` and `shares` of `Firings`."""
Masses = Callable[[Tensor, Tensor], Tensor]
"""From units [n] and positions [n] to what each source token adds, [n, length]."""


@torch.no_grad()
def record_firings(
    source: ActivationSource,
    dictionaries: Sequence[Dictionary],
    sites: Mapping[int, AttentionSite],
    tokenizer: Any,
    budget: Budget,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> list[Firings]:
    """One pass of text that no dictionary was trained on; UserError if it is empty, or no dictionary is given."""
    if not dictionaries or source.n_tokens == 0:
        raise UserError("There is nothing to explain: give at least one trained module and a text with counted tokens.")
    drawn = []
    for dictionary in dictionaries:
        shuffled = torch.randperm(dictionary.module.n_units, generator=torch.Generator().manual_seed(seed))
        drawn.append(shuffled[: budget.units * budget.oversampling].sort().values)
    rows: list[list[Rows]] = [[] for _ in dictionaries]
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    layers = sorted({dictionary.layer for dictionary in dictionaries})
    with tqdm(total=source.n_sequences, unit="seq", desc="examples", disable=not progress) as bar:
        for batch in source.batches(batch_size, layers=layers):
            for dictionary, units, recorded in zip(dictionaries, drawn, rows, strict=True):
                recorded.append(_record(dictionary, sites[dictionary.layer], batch, units, len(tokens)))
            tokens += [*batch.tokens.cpu().numpy()]
            masks += [*batch.mask.cpu().numpy()]
            bar.update(len(batch.tokens))
    corpus, firings = Corpus.decoded(np.stack(tokens), np.stack(masks), tokenizer), []
    for dictionary, units, recorded in zip(dictionaries, drawn, rows, strict=True):
        number, place, value, sources, shares = (np.concatenate(side) for side in zip(*recorded, strict=True))
        by_unit = np.lexsort((place, number))
        sides = (side[by_unit] for side in (number, place, value, sources.astype(np.int32), shares))
        firings.append(Firings(dictionary, corpus, units.numpy(), *sides))
    return firings


def _record(dictionary: Dictionary, site: AttentionSite, batch: ActivationBatch, drawn: Tensor, n_before: int) -> Rows:
    """Of a batch after `n_before` sequences."""
    module, device = dictionary.module, dictionary.module.W_O.device
    x, y = (side[dictionary.layer].to(device).float() for side in (batch.inputs, batch.outputs))
    number = torch.full((module.n_units,), -1, dtype=torch.long, device=device)
    number[drawn.to(device)] = torch.arange(len(drawn), device=device)
    norms, mask, length = module.W_O.norm(dim=1), batch.mask.to(device), x.shape[1]
    size = max(1, _VALUES_AT_ONCE // (length * site.n_heads))
    rows = []
    for row in range(len(x)):
        here = slice(row, row + 1)
        if isinstance(module, Lorsa):
            pre, masses = _lorsa_masses(module, x[here])
        else:
            pre, masses = module.pre_activations(y[here]), _sae_masses(module, site, x[here])
        indices, values = (side[0] for side in module.select(pre))
        position, slot = ((values != 0) & (number[indices] >= 0) & mask[row, :, None]).nonzero(as_tuple=True)
        unit = indices[position, slot]
        value = values[position, slot].abs() * norms[unit]
        chunks = zip(unit.split(size), position.split(size), strict=True)
        sources, shares = map(torch.cat, zip(*(_largest(masses(*chunk)) for chunk in chunks), strict=True))
        rows.append((number[unit], (n_before + row) * length + position, value, sources, shares))
    return tuple(torch.cat(side).cpu().numpy() for side in zip(*rows, strict=True))


def _largest(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and shares of the largest, [n, length] to [n, N_SOURCES] each."""
    top = mass.abs().topk(N_SOURCES, dim=1)
    return top.indices, top.values / mass.abs().sum(dim=1, keepdim=True).clamp_min(1e-30)


def _lorsa_masses(module: Lorsa, x: Tensor) -> tuple[Tensor, Masses]:
    """z of all heads [1, length, n_ov], and their z patterns."""
    q, k, v = (side[0] for side in module.attention_inputs(x))
    pattern = ops.attention_pattern(q, k, module.attn_scale)
    z = (pattern @ v).transpose(0, 1).flatten(1)[None]
    by_head, size = v.transpose(1, 2).flatten(0, 1), module.config.group_size
    return z, lambda heads, positions: pattern[heads // size, positions] * by_head[heads]


def _sae_masses(module: SAE, site: AttentionSite, x: Tensor) -> Masses:
    pattern, values = site.pattern(x)[0], site.values(x)[0]

    def masses(features: Tensor, positions: Tensor) -> Tensor:
        distinct, index = features.unique(return_inverse=True)
        sent = torch.einsum("hle,hed,fd->hlf", values, site.W_O.to(values), module.W_E[distinct])
        return torch.einsum("hnl,hln->nl", pattern[:, positions], sent[:, :, index])

    return masses


def planted(corpus: Corpus, active: Sequence[np.ndarray], sources_back: Sequence[int]) -> Firings:
    """Made-up units: each is active in a bool [n_sequences, length], its source is `sources_back` tokens earlier."""
    n = len(active)
    dictionary = Dictionary("planted", -1, SAE(SAEConfig(d_model=n, n_features=n, k=1)))
    with torch.no_grad():
        dictionary.module.W_O.copy_(torch.eye(n))
    number, place = np.nonzero((np.stack(active) & corpus.mask).reshape(n, -1))
    source = np.maximum(place % corpus.length - np.asarray(sources_back)[number], 0).astype(np.int32)
    value = np.ones(len(place), dtype=np.float32)
    shares = np.tile(np.eye(1, N_SOURCES, dtype=np.float32), (len(place), 1))
    return Firings(dictionary, corpus, np.arange(n), number, place, value, source[:, None].repeat(N_SOURCES, 1), shares)


_ARRAYS = ("units", "number", "place", "value", "sources", "shares")


def save(path: str | Path, firings: Sequence[Firings]) -> None:
    """Write the firings of one pass as a safetensors file."""
    arrays = {"tokens": firings[0].corpus.tokens, "mask": firings[0].corpus.mask}
    arrays |= {f"{index}.{name}": getattr(side, name) for index, side in enumerate(firings) for name in _ARRAYS}
    store.write_tensors(path, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def load(path: str | Path, dictionaries: Sequence[Dictionary], tokenizer: Any) -> list[Firings]:
    """What `save` wrote, for the same dictionaries; UserError if the file is missing or damaged."""
    arrays = {name: tensor.numpy() for name, tensor in store.read_tensors(path).items()}
    corpus = Corpus.decoded(arrays["tokens"], arrays["mask"], tokenizer)
    sides = ([arrays[f"{index}.{name}"] for name in _ARRAYS] for index in range(len(dictionaries)))
    return [Firings(dictionary, corpus, *side) for dictionary, side in zip(dictionaries, sides, strict=True)]


# ---- windows


@dataclass(frozen=True, eq=False, repr=False)
class Windows:
    """One unit's windows of text, one row each."""

    corpus: Corpus
    tokens: np.ndarray
    """[n, WIDTH], -1 where there is no text; text starts at column 0."""
    values: np.ndarray
    """Activations, [n, WIDTH]."""
    opens: np.ndarray
    """Whether the window begins where its text begins."""
    kind: np.ndarray
    """Of `KINDS`."""
    quantile: np.ndarray
    """0 for the weakest active windows, -1 for silent ones."""
    peak: np.ndarray
    """Column of the token that the window stands around."""
    sources: np.ndarray
    """Token ids of the peak's main sources or -1, [n, N_SOURCES]."""
    shares: np.ndarray
    """[n, N_SOURCES]."""

    @property
    def active(self) -> np.ndarray:
        """Bool [n]."""
        return self.kind == KINDS[0]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: np.ndarray) -> Windows:
        arrays = {name: getattr(self, name)[rows] for name in self.__dataclass_fields__ if name != "corpus"}
        return dataclasses.replace(self, **arrays)

    def pieces(self, row: int) -> list[str]:
        """Token texts of one window."""
        return [self.corpus.strings[int(token)] for token in self.tokens[row] if token >= 0]

    def marked(self, row: int, marks: np.ndarray | None = None) -> str:
        """The text with marked columns, bool [WIDTH], in «», after an ellipsis if it was cut off in front."""
        pieces = self.pieces(row)
        if marks is not None:
            pieces = [f"«{piece}»" if mark else piece for piece, mark in zip(pieces, marks, strict=False)]
        return ("" if self.opens[row] else "…") + "".join(pieces)


@dataclass(frozen=True, eq=False, repr=False)
class UnitExamples:
    """One unit and its windows."""

    unit: int
    group: int
    """QK group of a Lorsa head, -1 for an SAE feature."""
    frequency: float
    """Share of counted tokens where it is active."""
    maximum: float
    first: Windows
    """For explanations."""
    second: Windows
    """For scores."""


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Examples of one dictionary's units."""

    dictionary: Dictionary
    units: list[UnitExamples]
    """Units to explain, in random order."""
    relatives: list[int]
    """Index of another unit for each: of its QK group if possible, with the most similar write direction."""
    left_out: dict[str, int]
    """Units with too few examples: `dead`, `too few active windows`, `too few silent windows`."""
    eligible: int


def examples(firings: Firings, budget: Budget, seed: int = 0) -> Examples:
    """Windows of randomly drawn units that have enough of them; UserError if none has."""
    rng = np.random.default_rng(seed)
    half = rng.permutation(len(firings.corpus.tokens)) % 2
    units: dict[int, UnitExamples] = {}
    left_out = {"dead": 0, "too few active windows": 0, "too few silent windows": 0}
    for number in rng.permutation(len(firings.units)).tolist():
        drawn = _Sampler(firings, number, half, budget, seed).examples()
        if isinstance(drawn, str):
            left_out[drawn] += 1
        else:
            units[number] = drawn
    dictionary = firings.dictionary
    if not units:
        raise UserError(
            f"No unit of {dictionary.name} at layer {dictionary.layer} is active "
            f"in {budget.least} windows of each half; give a longer text."
        )
    numbers = list(units)[: budget.units]
    chosen = [units[number] for number in numbers]
    relatives = _relatives(firings.similarity[np.ix_(numbers, numbers)], np.array([unit.group for unit in chosen]))
    return Examples(dictionary, chosen, relatives, left_out, len(units))


def _relatives(similarity: np.ndarray, groups: np.ndarray) -> list[int]:
    """The most similar other unit, of the same group if there is one; -1 is no group."""
    nearness = similarity + 3 * ((groups[:, None] == groups) & (groups != -1))
    np.fill_diagonal(nearness, -np.inf)
    return nearness.argmax(axis=1).tolist()


class _Sampler:
    """Draws windows of one unit. A peak is an index of its activations."""

    def __init__(self, firings: Firings, number: int, half: np.ndarray, budget: Budget, seed: int) -> None:
        rows = firings.of(number)
        self.firings, self.number, self.budget = firings, number, budget
        self.corpus, self.half = firings.corpus, np.repeat(half, firings.corpus.length)
        self.unit = int(firings.units[number])
        self.places, self.values = firings.place[rows], firings.value[rows]
        self.sources, self.shares = firings.sources[rows], firings.shares[rows]
        self.rng = np.random.default_rng([seed, self.unit])

    def examples(self) -> UnitExamples | str:
        """Windows of both halves, or why there are too few."""
        if len(self.places) == 0:
            return "dead"
        budget = self.budget
        peaks = find_peaks(self.places, self.values, self.corpus.length)
        strength = self.values[peaks]
        quantile = np.argsort(np.argsort(strength, kind="stable")) * budget.quantiles // len(peaks)
        first, second = (np.flatnonzero(self.half[self.places[peaks]] == side) for side in (0, 1))
        if min(len(first), len(second)) < budget.least:
            return "too few active windows"
        ranked = first[np.argsort(-strength[first], kind="stable")]
        top = budget.shown // 4
        first = np.concatenate([ranked[:top], spread(quantile, ranked[top:], budget.shown - top, self.rng)])
        second = spread(quantile, second, budget.scored, self.rng)
        windows = []
        for side, (chosen, n_silent) in enumerate(((first, budget.contrast), (second, len(second)))):
            silent = self._silent_places(peaks[first], side, n_silent)
            if sum(map(len, silent.values())) < min(budget.least, n_silent):
                return "too few silent windows"
            windows.append(self._windows(peaks[chosen], quantile[chosen], silent))
        module = self.firings.dictionary.module
        group = self.unit // module.config.group_size if isinstance(module, Lorsa) else -1
        frequency = len(self.places) / int(self.corpus.mask.sum())
        return UnitExamples(self.unit, group, frequency, float(self.values.max()), *windows)

    def _silent_places(self, peaks: np.ndarray, side: int, n: int) -> dict[str, np.ndarray]:
        """About `n` places for silent windows in one half, by kind."""
        candidates = self._hard_places(peaks) | {"random": np.flatnonzero(self.corpus.mask)}
        silent: dict[str, np.ndarray] = {}
        for kind, places in candidates.items():
            size = n // len(candidates) if kind != "random" else n - sum(map(len, silent.values()))
            places = self.rng.permutation(places[self.half[places] == side])[: 50 * n]
            n_before_window, n_before_end = (np.searchsorted(self.places, edge) for edge in self.corpus.span(places))
            silent[kind] = places[n_before_window == n_before_end][:size]
        return silent

    def _hard_places(self, peaks: np.ndarray) -> dict[str, np.ndarray]:
        """Places for windows of each hard kind; `peaks` are of the first half."""
        firings, corpus, flat = self.firings, self.corpus, self.corpus.tokens.ravel()
        places, length = self.places[peaks], corpus.length
        nowhere = np.zeros(0, dtype=np.int64)
        own = [corpus.places(token) for token, _ in Counter(flat[places].tolist()).most_common(8)]
        back = places % length - self.sources[peaks, 0]
        near = (back > 0) & (back <= BEFORE) & corpus.mask.ravel()[places - back]
        read = []
        for token, _ in Counter(flat[(places - back)[near]].tolist()).most_common(8):
            around = corpus.places(token)
            moved = around + self.rng.choice(back[near & (flat[places - back] == token)], len(around))
            inside = moved // length == around // length
            read.append(moved[inside & corpus.mask.ravel()[np.minimum(moved, flat.size - 1)]])
        neighbour = firings.of(int(firings.similarity[self.number].argmax())) if len(firings.units) > 1 else slice(0)
        return {
            "same token": np.concatenate([nowhere, *own]),
            "same source": np.concatenate([nowhere, *read]),
            "neighbour": firings.place[neighbour],
        }

    def _windows(self, peaks: np.ndarray, quantile: np.ndarray, silent: Mapping[str, np.ndarray]) -> Windows:
        corpus, places = self.corpus, self.places
        around = np.concatenate([places[peaks], *silent.values()]).astype(np.int64)
        n_silent = len(around) - len(peaks)
        begin, end = corpus.span(around)
        columns = begin[:, None] + np.arange(WIDTH)
        inside = columns < end[:, None]
        columns = np.minimum(columns, corpus.tokens.size - 1)
        nearest = np.searchsorted(places, columns).clip(max=len(places) - 1)
        row, sources = places[peaks, None] // corpus.length, self.sources[peaks]
        source_tokens = np.where(corpus.mask[row, sources], corpus.tokens[row, sources], -1)
        return Windows(
            corpus,
            tokens=np.where(inside, corpus.tokens.ravel()[columns], -1).astype(np.int64),
            values=np.where(inside & (places[nearest] == columns), self.values[nearest], 0.0),
            opens=begin % corpus.length == corpus.bounds[begin // corpus.length, 0],
            kind=np.repeat([KINDS[0], *silent], [len(peaks), *map(len, silent.values())]),
            quantile=np.pad(quantile, (0, n_silent), constant_values=-1),
            peak=around - begin,
            sources=np.pad(source_tokens, ((0, n_silent), (0, 0)), constant_values=-1),
            shares=np.pad(self.shares[peaks], ((0, n_silent), (0, 0))),
        )


def find_peaks(places: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """Indices of the strongest activation in each block; of two that are near, the stronger."""
    block = places // length * (length // BLOCK + 1) + places % length // BLOCK
    order = np.lexsort((-values, block))
    peaks = np.sort(order[np.unique(block[order], return_index=True)[1]])
    near = (np.diff(places[peaks]) < BLOCK // 2) & (np.diff(places[peaks] // length) == 0)
    rises = np.diff(values[peaks]) > 0
    return peaks[~(np.append(near & rises, False) | np.append(False, near & ~rises))]


def spread(quantile: np.ndarray, among: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """At most `n` of the indices `among`, spread equally over the quantiles."""
    among = rng.permutation(among)
    turn = pd.Series(among).groupby(quantile[among]).cumcount()
    return among[np.lexsort((rng.random(len(among)), turn))[:n]]
