"""Prompts with labelled positions, and what they are built of: words, names, series, passages of real text.

A query is a token position where a behaviour should show (labelled) or should not (a control). A labelled query has
sources, the positions that a head with this behaviour attends to, and the behaviour predicts the token after it.
Prompts come in pairs with both; the shuffled-label null swaps the labels within a pair.

A `UserError` says what a tokenizer lacks; `families` and `tasks` put the name of the family or task in front.
"""

from __future__ import annotations

import itertools
import operator
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class PromptSet:
    """Prompts of one family with labelled positions."""

    tokens: Tensor
    """[n, length] int64, padded on the right with the last token of the row."""
    row: Tensor
    """[n_queries], prompt of each query, ascending."""
    position: Tensor
    """[n_queries]."""
    sources: Tensor
    """[n_queries, length] bool, the predicted sources; all False at controls."""
    pair: Tensor
    """[n_queries], number of its pair; pairs are independent draws."""
    kind: np.ndarray
    """[n_queries], such as the series or the kind of control."""
    predicts: bool = True
    """Whether the family predicts the token after a labelled query."""

    @cached_property
    def positive(self) -> Tensor:
        """[n_queries] bool, False on controls."""
        return self.sources.any(dim=1)

    @property
    def has_controls(self) -> bool:
        """Whether any query is a control."""
        return not bool(self.positive.all())

    @property
    def predicted(self) -> Tensor:
        """[n_queries], the token after each query (its own where nothing follows)."""
        return self.tokens[self.row, (self.position + 1).clamp(max=self.tokens.shape[1] - 1)]

    def where(self, queries: Tensor) -> PromptSet:
        """Some of the queries, [n_queries] bool, with their prompts."""
        rows, row = torch.unique(self.row[queries], return_inverse=True)
        columns = {name: getattr(self, name)[queries] for name in ("position", "sources", "pair")}
        return replace(self, tokens=self.tokens[rows], row=row, kind=self.kind[queries.numpy()], **columns)

    def halves(self) -> tuple[PromptSet, PromptSet]:
        """Discovery half (even pair numbers) and confirmation half (odd ones)."""
        return self.where(self.pair % 2 == 0), self.where(self.pair % 2 == 1)


class Prompt(NamedTuple):
    """One prompt of a pair."""

    ids: Sequence[int]
    queries: Mapping[int, Sequence[int]]
    """Positions to their sources; controls have none."""
    kind: str = ""


def prompt_set(pairs: Iterable[Sequence[Prompt]], predicts: bool = True) -> PromptSet:
    """Pairs of prompts, padded."""
    rows = [(pair, prompt) for pair, prompts in enumerate(pairs) for prompt in prompts]
    tokens = pad([prompt.ids for _, prompt in rows])
    queries = [(row, at, pair, prompt) for row, (pair, prompt) in enumerate(rows) for at in prompt.queries]
    sources = torch.zeros(len(queries), tokens.shape[1], dtype=torch.bool)
    for number, (_, at, _, prompt) in enumerate(queries):
        sources[number, list(prompt.queries[at])] = True
    row, position, pair = torch.tensor([query[:3] for query in queries]).T
    return PromptSet(tokens, row, position, sources, pair, np.array([prompt.kind for *_, prompt in queries]), predicts)


def pad(rows: Sequence[Sequence[int]], fill: int | None = None) -> Tensor:
    """One tensor of rows padded on the right with `fill`, or else with the last token of each."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[row[-1] if fill is None else fill] * (length - len(row))] for row in rows])


# ---- tokenizers


class Vocabulary:
    """What prompts need of a tokenizer. `bos_id`, in front of every prompt, is the one from the module's training."""

    def __init__(self, tokenizer: Any, bos_id: int | None) -> None:
        self.tokenizer, self.bos_id = tokenizer, bos_id

    @property
    def start(self) -> list[int]:
        """What every prompt begins with."""
        return [] if self.bos_id is None else [self.bos_id]

    @cached_property
    def texts(self) -> dict[int, str]:
        """Text of every token that is not special and has whole characters."""
        special = set(self.tokenizer.all_special_ids)
        ids = sorted(index for index in self.tokenizer.get_vocab().values() if index not in special)
        decoded = self.tokenizer.batch_decode([[index] for index in ids], clean_up_tokenization_spaces=False)
        return {index: text for index, text in zip(ids, decoded, strict=True) if text and "\ufffd" not in text}

    @cached_property
    def words(self) -> list[int]:
        """Tokens that are a space and at least three plain letters."""
        return [index for index, text in self.texts.items() if re.fullmatch(" [A-Za-z]{3,}", text)]

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def single(self, text: str) -> int | None:
        """The token that is exactly `text`, if there is one."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 and self.texts.get(ids[0]) == text else None

    def singles(self, texts: Sequence[str], prefix: str = " ") -> dict[str, int]:
        """Those of `texts` that are one token after `prefix`."""
        ids = {text: self.single(prefix + text) for text in texts}
        return {text: index for text, index in ids.items() if index is not None}


def require(n: int, items: list[T], what: str) -> list[T]:
    """The items; a `UserError` where there are fewer than `n`."""
    if len(items) < n:
        raise UserError(f"needs {n} {what}, this tokenizer has {len(items)}.")
    return items


def draw(rng: np.random.Generator, pool: Sequence[T], n: int) -> list[T]:
    """`n` entries of a pool, without replacement."""
    return [pool[int(index)] for index in rng.choice(len(pool), n, replace=False)]


def pick(rng: np.random.Generator, pool: Sequence[T]) -> T:
    """One entry of a pool."""
    return pool[int(rng.integers(len(pool)))]


# ---- passages of real text


class Passage(NamedTuple):
    """Consecutive tokens of one document."""

    document: str
    ids: tuple[int, ...]


def passages(
    documents: Sequence[tuple[str, str]],
    vocabulary: Vocabulary,
    n: int,
    length: int = 96,
    seed: int = 0,
) -> list[Passage]:
    """Up to `n` passages of `length` tokens (no BOS), at most 8 of one document (id, text), from as many as possible.

    Raises:
        UserError: no document is long enough.
    """
    rng = np.random.default_rng(seed)
    special = set(vocabulary.tokenizer.all_special_ids)
    rounds: list[list[Passage]] = [[] for _ in range(8)]
    for index in rng.permutation(len(documents)):
        name, text = documents[index]
        ids = [token for token in vocabulary.encode(text[: 12 * length * len(rounds)]) if token not in special]
        for number in range(min(len(rounds), len(ids) // length)):
            rounds[number].append(Passage(name, tuple(ids[number * length : (number + 1) * length])))
        if len(rounds[0]) >= n:
            break
    if not rounds[0]:
        raise UserError(f"The text has no document of {length} tokens; give longer documents.")
    return [passage for members in rounds for passage in members][:n]


# ---- sentences and names


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


NAMES = listed(
    """Mary John Tom James Anna Paul Mark Sarah David Peter Alice Emma Jack Kate Laura Henry Lucy George Jane Robert
    Susan Michael Adam Ben Emily Simon Martin Rachel Alex Daniel Maria Thomas William Charles Richard Joseph"""
)
# {A} and {B} are two names, {S} the one that is repeated; the query is the last token.
TEMPLATES = (
    "Then,{A} and{B} went to the store, and{S} gave a bottle of milk to",
    "When{A} and{B} drove to the station,{S} handed the tickets to",
    "Last week{A} and{B} walked to the school, and{S} showed the new garden to",
    "After{A} and{B} got to the office,{S} read the long letter to",
    "While{A} and{B} ran to the beach,{S} told an old story to",
    "The day{A} and{B} came to the house,{S} sold the small car to",
)


def names(vocabulary: Vocabulary) -> list[int]:
    """First names that are single tokens."""
    return require(8, list(vocabulary.singles(NAMES).values()), "first names that are single tokens")


def fill(template: str, vocabulary: Vocabulary, slots: Mapping[str, int]) -> tuple[list[int], dict[str, int]]:
    """Token ids of a template with its slots (`A` for `{A}`) filled, and the position of every slot."""
    ids, places = list(vocabulary.start), {}
    for part in re.split(r"(\{\w\})", template):
        if part.startswith("{"):
            places[part[1]] = len(ids)
            ids.append(slots[part[1]])
        elif part:
            ids += vocabulary.encode(part)
    return ids, places


# ---- series

SERIES: dict[str, tuple[str, ...]] = {
    "days": listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "months": listed("January February March April May June July August September October November December"),
    "letters": tuple(string.ascii_uppercase),
    "numerals": tuple(str(number) for number in range(1, 31)),
    "number words": listed("one two three four five six seven eight nine ten eleven twelve"),
    "ordinals": listed("first second third fourth fifth sixth seventh eighth ninth tenth"),
    "roman numerals": listed("I II III IV V VI VII VIII IX X XI XII"),
}
OPENINGS = ("", "Here is the list:", "In this order:", "We count:", "They come one by one:", "As follows:")


class Stretch(NamedTuple):
    """Consecutive members of a series that are single tokens after a space or an empty prefix."""

    tokens: list[int]
    prefix: str


def stretches(vocabulary: Vocabulary) -> dict[str, Stretch]:
    """The longest stretch of every series, where it has at least five members."""
    longest = {}
    for name, members in SERIES.items():
        runs = []
        # Tokenizers that cut digits one by one have no " 7"; there the list goes without spaces.
        for prefix in (" ", ""):
            tokens = [vocabulary.single(prefix + member) for member in members]
            for _, run in itertools.groupby(tokens, lambda token: token is None):
                runs.append(Stretch([token for token in run if token is not None], prefix))
        longest[name] = max(runs, key=lambda stretch: len(stretch.tokens))
    return {name: stretch for name, stretch in longest.items() if len(stretch.tokens) >= 5}


# ---- words in one token and in two


class SplitWord(NamedTuple):
    """A word that is one token after a space and two tokens without it."""

    whole: int
    first: int
    second: int


def split_words(vocabulary: Vocabulary) -> list[SplitWord]:
    """Words such as ` Marion` (one token) that are two tokens without the space (`Mar`, `ion`).

    Only capitalised ones where there are 100 of them, because many others are fragments of longer words.
    """
    words = vocabulary.words
    bare = [vocabulary.texts[index][1:] for index in words]
    cut = vocabulary.tokenizer(bare, add_special_tokens=False)["input_ids"] if bare else []
    split = [SplitWord(whole, *ids) for whole, ids in zip(words, cut, strict=True) if len(ids) == 2]
    require(16, split, "words with and without a space to split")
    capitalised = [word for word in split if vocabulary.texts[word.whole][1].isupper()]
    return capitalised if len(capitalised) >= 100 else split


# ---- arithmetic

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
