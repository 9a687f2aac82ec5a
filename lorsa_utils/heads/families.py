"""Head families: for each known behaviour its test prompts, what its name means, and what a head must do to earn it.

To add one, write a function that yields pairs of prompts under `@family(...)`. They stand here from the most to the
least specific: a unit with several names is shown under the first.

Sources: induction and previous-token heads: Elhage et al. 2021, Olsson et al. 2022; name movers and duplicate tokens:
Wang et al. 2022; copy suppression: McDougall et al. 2023; successors: Gould et al. 2023; attention sinks: Xiao et al.
2023; subtoken induction, arithmetic heads and thematic anchors: the paper (items P9 to P11).
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import prompts
from lorsa_utils.heads.prompts import OPERATORS, Passage, Prompt, PromptSet, Vocabulary, draw, pick, require

SCORES = ("share", "precision", "recall", "auc", "logit")
"""Scores of a unit for each family, see `discovery`."""
LEAST_PRECISION = 0.75
"""Floor: three times as active on labelled positions as on controls."""
LOCAL_WINDOW = 8
"""A local head looks at the query itself or at up to this many tokens before it."""
FAR = 32
"""A thematic anchor looks back more than this many tokens."""
TAIL = 24
"""Tokens at the end of a passage that a thematic anchor is asked about."""

Pairs = Iterator[Sequence[Prompt]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A behaviour of heads: its prompts, and what its name asks of a head."""

    pairs: Callable[..., Pairs]
    """From (vocabulary, rng, n_pairs) and, with `needs_text`, passages."""
    label: str
    meaning: str
    """A clause that follows "... head:" on its page."""
    stream: int
    """Random stream, unique to the family; prompts are made in this order."""
    needs_text: bool = False
    predicts: bool = True
    """Whether it predicts the token after a labelled query."""
    n_pairs: int = 96
    """Pairs of prompts (of each series, for successors) at scale 1."""
    least_pairs: int = 16
    """At any scale."""
    share: float = 0.5
    """Floor of this score (see `discovery`)."""
    logit_sign: int = 0
    """1: must raise the predicted token, -1: must lower it, 0: either."""
    raised: bool = True
    """Whether the null raises the bar; not where the name only says where a head looks, because a random head that
    looks at the first token is a sink too."""

    def __call__(
        self, vocabulary: Vocabulary, n_pairs: int, seed: int = 0, passages: Sequence[Passage] = (), **options: Any
    ) -> PromptSet:
        """Prompts of `n_pairs` pairs; `options` are those of the family's function.

        Raises:
            UserError: what the tokenizer or the passages lack.
        """
        if self.needs_text and not passages:
            raise UserError("needs passages of real text; give a longer text.")
        text = {"passages": passages} if self.needs_text else {}
        return prompts.prompt_set(
            self.pairs(vocabulary, np.random.default_rng(seed), n_pairs, **text, **options), self.predicts
        )

    def make(self, vocabulary: Vocabulary, passages: Sequence[Passage], scale: float = 1.0, seed: int = 0) -> PromptSet:
        """`scale` times `n_pairs` pairs."""
        n_pairs = max(self.least_pairs, round(scale * self.n_pairs))
        return self(vocabulary, n_pairs, 1000 * seed + self.stream, passages)


FAMILIES: dict[str, Family] = {}


def family(**settings: Any) -> Callable[[Callable[..., Pairs]], Family]:
    """Decorator that makes a `Family` with these settings of a function; its label is the function's name."""

    def register(pairs: Callable[..., Pairs]) -> Family:
        name = pairs.__name__
        FAMILIES[name] = Family(pairs=pairs, **{"label": name.replace("_", " "), **settings})
        return FAMILIES[name]

    return register


# ---- words


@family(
    meaning="an earlier word began with the current piece of a word; "
    "it looks at the piece that followed there and raises it",
    stream=9,
    logit_sign=1,
)
def subtoken_induction(vocabulary: Vocabulary, rng: Generator, n_pairs: int) -> Pairs:
    """Context `[ Marion] ... [Mar]`: the query attends to the whole word and predicts its second part `[ion]`.

    Two controls per pair, in place of the whole word: another word (`random`), and the parts `[Mar][ion]`, which
    ordinary induction would use (`token`).
    """
    split = prompts.split_words(vocabulary)
    for _ in range(n_pairs):
        word, other = draw(rng, split, 2)
        filler = draw(rng, [index for index in vocabulary.words if index not in (word.whole, other.whole)], 12)
        contexts = {"subtoken": [word.whole], "random": [other.whole], "token": [word.first, word.second]}
        pair = []
        for kind, inserted in contexts.items():
            before, after = filler[: 6 - len(inserted)], filler[6:]
            ids = vocabulary.start + before + inserted + after + [word.first, word.second]
            sources = (len(vocabulary.start) + 5,) if kind == "subtoken" else ()
            pair.append(Prompt(ids, {len(ids) - 2: sources}, kind))
        yield pair


@family(
    meaning="it looks at earlier copies of a token the model is about to say, and lowers that token",
    stream=7,
    logit_sign=-1,
)
def copy_suppression(vocabulary: Vocabulary, rng: Generator, n_pairs: int) -> Pairs:
    """The prompts of `name_mover`; the head lowers the name that the model is about to repeat."""
    return name_mover.pairs(vocabulary, rng, n_pairs)


@family(meaning="it looks at the name that the sentence needs next and raises it", stream=6, logit_sign=1)
def name_mover(vocabulary: Vocabulary, rng: Generator, n_pairs: int) -> Pairs:
    """Indirect objects: `Then, Mary and John went .., and John gave .. to` attends to ` Mary` and says it.

    The control has other words in the places of the names.
    """
    names = prompts.names(vocabulary)
    pools = {"names": names, "words": [token for token in vocabulary.words if token not in names]}
    for _ in range(n_pairs):
        template, pair = pick(rng, prompts.TEMPLATES), []
        receiver_slot, giver_slot = "AB" if rng.integers(2) else "BA"
        for kind, pool in pools.items():
            giver, receiver = draw(rng, pool, 2)
            ids, places = prompts.fill(template, vocabulary, {receiver_slot: receiver, giver_slot: giver, "S": giver})
            sources = (places[receiver_slot],) if kind == "names" else ()
            pair.append(Prompt([*ids, receiver], {len(ids) - 1: sources}, kind))
        yield pair


@family(
    meaning="it looks at an item of a series and raises the next one (Monday, Tuesday)",
    stream=8,
    n_pairs=32,
    logit_sign=1,
)
def successor(vocabulary: Vocabulary, rng: Generator, n_pairs: int) -> Pairs:
    """`Monday, Tuesday, Wednesday,`: the last comma attends to the member before it and predicts the next.

    Controls are lists of unrelated words. `n_pairs` pairs of each series that the tokenizer has as single tokens.
    """
    comma, usable = vocabulary.encode(",")[0], []
    for name, (stretch, prefix) in prompts.stretches(vocabulary).items():
        members = {token for series in prompts.SERIES.values() for token in vocabulary.singles(series, prefix).values()}
        # Where lists go without spaces, small letters replace words.
        pool = vocabulary.words if prefix else vocabulary.singles(string.ascii_lowercase, "").values()
        unrelated = [token for token in pool if token not in members]
        if len(unrelated) >= 8:
            usable += [(name, stretch, unrelated)] * n_pairs
    for name, stretch, unrelated in require(1, usable, "series (days, letters, ...) of single tokens"):
        begin = int(rng.integers(len(stretch) - 3))
        opening, pair = vocabulary.start + vocabulary.encode(pick(rng, prompts.OPENINGS)), []
        for listed, kind in ((stretch[begin : begin + 4], name), (draw(rng, unrelated, 4), "unrelated words")):
            ids = opening + [token for member in listed for token in (member, comma)][:-1]
            query = len(ids) - 2
            pair.append(Prompt(ids, {query: (query - 1,) if kind == name else ()}, kind))
        yield pair


@family(meaning="it looks at the numbers of a sum", stream=10)
def arithmetic(vocabulary: Vocabulary, rng: Generator, n_pairs: int) -> Pairs:
    """`36+62=`: the sign attends to the operands and predicts the answer; controls have letters for digits."""
    symbols = vocabulary.singles([*string.digits, *string.ascii_lowercase, *OPERATORS, "="], "")
    require(40, list(symbols), "single tokens for digits, letters and signs")
    letters, first = [symbols[letter] for letter in string.ascii_lowercase], len(vocabulary.start)
    for _ in range(n_pairs):
        sign = pick(rng, tuple(OPERATORS))
        a, b = (int(number) for number in sorted(rng.integers(10, 100, 2), reverse=True))
        numbers = [vocabulary.encode(str(number)) for number in (a, b)]
        words = [draw(rng, letters, len(digits)) for digits in numbers]
        answer, pair = vocabulary.encode(str(OPERATORS[sign](a, b)))[0], []
        for (left, right), kind in ((numbers, "numbers"), (words, "letters")):
            ids = [*vocabulary.start, *left, symbols[sign], *right, symbols["="]]
            end = len(ids) - 1
            sources = [i for i in range(first, end) if i != first + len(left)] if kind == "numbers" else []
            pair.append(Prompt([*ids, answer], {end: sources}, kind))
        yield pair


# ---- random tokens


@family(meaning="after A B ... A it looks at B, the token that followed the last time", stream=0)
def induction(vocabulary: Vocabulary, rng: Generator, n_pairs: int, length: int = 16, offset: int = 1) -> Pairs:
    """Random tokens twice, `r1 .. rn r1 .. rn`: a query r_k attends to the first r_(k+1), which it predicts.

    Controls are the first half, and the second half after another first half `s1 .. sn`.
    """
    first, pool = len(vocabulary.start), require(2 * length, list(vocabulary.texts), "different tokens")
    for _ in range(n_pairs):
        tokens = draw(rng, pool, 2 * length)
        repeated, other = tokens[:length], tokens[length:]
        labelled = {first + length + k: (first + k + offset,) for k in range(length - 1)}
        yield [
            Prompt(
                vocabulary.start + repeated + repeated,
                labelled | dict.fromkeys(range(first, first + length - 1), ()),
                "repeated",
            ),
            Prompt(vocabulary.start + other + repeated, dict.fromkeys(labelled, ()), "not repeated"),
        ]


@family(meaning="it looks at an earlier copy of the current token", stream=1, predicts=False, n_pairs=48, least_pairs=8)
def duplicate_token(vocabulary: Vocabulary, rng: Generator, n_pairs: int) -> Pairs:
    """The prompts of `induction`; the query r_k attends to the earlier r_k itself."""
    return induction.pairs(vocabulary, rng, n_pairs, offset=0)


# ---- real text: sources depend on positions alone, so that but for anchors there are no controls


@family(meaning="it looks at the token just before", stream=2, needs_text=True, predicts=False)
def previous_token(
    vocabulary: Vocabulary, rng: Generator, n_pairs: int, passages: Sequence[Passage], per_passage: int = 8
) -> Pairs:
    """Every query attends to the token before it."""
    return _positional(vocabulary, rng, passages[:n_pairs], lambda i: range(i - 1, i), per_passage)


@family(
    meaning="it looks at the first token, whatever the text says",
    stream=3,
    needs_text=True,
    predicts=False,
    raised=False,
)
def attention_sink(vocabulary: Vocabulary, rng: Generator, n_pairs: int, passages: Sequence[Passage]) -> Pairs:
    """Every query attends to the first token (BOS, where there is one)."""
    return _positional(vocabulary, rng, passages[:n_pairs], lambda i: range(1))


@family(meaning="it looks far back, at words of the passage's topic", stream=5, needs_text=True, predicts=False)
def thematic_anchor(vocabulary: Vocabulary, rng: Generator, n_pairs: int, passages: Sequence[Passage]) -> Pairs:
    """The end of a passage after its own beginning; controls have the beginning of another document.

    Queries are new tokens among the last `TAIL` (so that induction and duplicate-token heads find nothing) and attend
    more than `FAR` tokens back.

    Raises:
        UserError: there are fewer than two documents, a passage has fewer than `FAR` + `TAIL` tokens, or fewer than two
            passages have enough new words at the end.
    """
    if len({passage.document for passage in passages}) < 2:
        raise UserError("needs passages from two documents or more.")
    if min(len(passage.ids) for passage in passages) < FAR + TAIL:
        raise UserError(f"needs passages of {FAR + TAIL} tokens.")
    first, made = max(1, len(vocabulary.start)), 0
    for passage in passages:
        swapped = pick(rng, [other for other in passages if other.document != passage.document]).ids
        own, other = (vocabulary.start + [*begin[:-TAIL], *passage.ids[-TAIL:]] for begin in (passage.ids, swapped))
        fresh = [i for i in range(len(own) - TAIL, len(own)) if own[i] not in own[:i] and other[i] not in other[:i]]
        if len(fresh) >= 4 and made < n_pairs:
            places = sorted(draw(rng, fresh, min(8, len(fresh))))
            yield [
                Prompt(own, {i: range(first, i - FAR) for i in places}, "own beginning"),
                Prompt(other, dict.fromkeys(places, ()), "other beginning"),
            ]
            made += 1
    if made < 2:
        raise UserError("found no passage with enough new words at its end.")


@family(
    label="local/positional",
    meaning="it looks at the last few tokens, whatever they are",
    stream=4,
    needs_text=True,
    predicts=False,
    share=0.75,
    raised=False,
)
def local(vocabulary: Vocabulary, rng: Generator, n_pairs: int, passages: Sequence[Passage]) -> Pairs:
    """Every query attends to itself or to the `LOCAL_WINDOW` tokens before it."""
    return _positional(vocabulary, rng, passages[:n_pairs], lambda i: range(i - LOCAL_WINDOW, i + 1))


def _positional(
    vocabulary: Vocabulary,
    rng: Generator,
    passages: Sequence[Passage],
    sources: Callable[[int], range],
    per_passage: int = 8,
) -> Pairs:
    for passage in passages:
        ids = vocabulary.start + list(passage.ids)
        half = len(ids) // 2
        places = sorted(draw(rng, range(min(2 * LOCAL_WINDOW, half), len(ids)), min(per_passage, half)))
        yield [Prompt(ids, {place: sources(place) for place in places})]


# ---- topics


def topic_words(passages: Sequence[Passage], vocabulary: Vocabulary) -> list[set[int]]:
    """Topic words of every passage, as token ids.

    Words of four or more letters that occur twice or more in the passage and in at most a fifth of the documents (or in
    one).
    """
    documents: dict[str, set[int]] = {}
    for passage in passages:
        documents.setdefault(passage.document, set()).update(passage.ids)
    spread = Counter(token for ids in documents.values() for token in ids)
    words = {token for token in vocabulary.words if len(vocabulary.texts[token]) > 4}
    rare = words & {token for token, n in spread.items() if n <= max(1.0, 0.2 * len(documents))}
    counts = [Counter(passage.ids) for passage in passages]
    return [{token for token in rare & count.keys() if count[token] >= 2} for count in counts]


def topic_prompts(
    passages: Sequence[Passage], vocabulary: Vocabulary, scrambled: bool = False, seed: int = 0
) -> PromptSet:
    """Queries before topic words that come back, and as many controls before other words (paper item P10).

    Sources are the occurrences of all topic words more than `FAR` tokens back, one of them the predicted word itself.
    The `share` of a head on these prompts is its topic consistency.

    Passages should have 192 tokens or more; each is a pair of its own with at most 8 labelled queries in its second
    half, and there are at most 48. `scrambled` puts the first half in random order.

    Raises:
        UserError: no passage has a topic word that comes back.
    """
    pairs = list(islice(_topic_pairs(passages, vocabulary, scrambled, np.random.default_rng(seed)), 48))
    if not pairs:
        raise UserError(
            "No passage has a topic word that comes back far from where it stood; give more or longer texts."
        )
    return prompts.prompt_set(pairs)


def _topic_pairs(passages: Sequence[Passage], vocabulary: Vocabulary, scrambled: bool, rng: Generator) -> Pairs:
    first = len(vocabulary.start)
    for passage, topic in zip(passages, topic_words(passages, vocabulary), strict=True):
        ids = vocabulary.start + list(passage.ids)
        middle = len(ids) // 2
        if scrambled:
            ids[first:middle] = [int(token) for token in rng.permutation(ids[first:middle])]
        far = {i: [j for j in range(max(1, first), i - FAR) if ids[j] in topic] for i in range(middle, len(ids) - 1)}
        labelled = [i for i, sources in far.items() if ids[i + 1] in topic & {ids[j] for j in sources}]
        others = [i for i in far if ids[i + 1] not in topic and vocabulary.texts.get(ids[i + 1], "")[:1] == " "]
        if n := min(len(labelled), len(others), 8):
            queries, controls = (sorted(draw(rng, side, n)) for side in (labelled, others))
            yield [Prompt(ids, {i: far[i] for i in queries} | dict.fromkeys(controls, []), "text")]


# ---- all of them


class Prompts(NamedTuple):
    """Prompts by family, and why others have none."""

    sets: dict[str, PromptSet]
    skipped: dict[str, str]


def standard(vocabulary: Vocabulary, passages: Sequence[Passage], seed: int = 0, scale: float = 1.0) -> Prompts:
    """The prompts of every family that the tokenizer and the passages allow, about 75,000 tokens at scale 1."""
    sets, skipped = {}, {}
    for name, entry in sorted(FAMILIES.items(), key=lambda item: item[1].stream):
        try:
            sets[name] = entry.make(vocabulary, passages, scale, seed)
        except UserError as error:
            skipped[name] = f"Family {name} {error} The family is skipped."
    return Prompts(sets, skipped)
