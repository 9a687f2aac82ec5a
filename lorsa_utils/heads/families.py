"""Head families: for each known behaviour its test prompts, what its name means, and what a head must do to earn it.

To add one, write a function that builds a `PromptSet` and an entry of `FAMILIES`.

Sources: induction and previous-token heads: Elhage et al. 2021, Olsson et al. 2022; name movers and duplicate tokens:
Wang et al. 2022; copy suppression: McDougall et al. 2023; successors: Gould et al. 2023; attention sinks: Xiao et al.
2023; subtoken induction, arithmetic heads and thematic anchors: the paper (items P9 to P11).
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import prompts
from lorsa_utils.heads.prompts import OPERATORS, Builder, Passage, PromptSet, Queries, Vocabulary, draw, require

SCORES = ("share", "precision", "recall", "auc", "logit")
"""Scores of a unit for each family, see `discovery`."""
LOCAL_WINDOW = 8
"""A local head looks at the query itself or at up to this many tokens before it."""
FAR = 32
"""A thematic anchor looks back more than this many tokens."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A behaviour of heads: its prompts, and what its name asks of a head."""

    label: str
    meaning: str
    """A clause that follows "... head:" on its page."""
    prompts: Callable[..., PromptSet]
    """From (vocabulary, n_pairs, seed) or, with `needs_text`, (vocabulary, passages, n_pairs, seed).

    Raises a `UserError` that says what the tokenizer or the passages lack."""
    stream: int
    """Random stream, unique to the family; prompts are made in this order."""
    needs_text: bool = False
    n_pairs: int = 96
    """Pairs of prompts (of each series, for successors) at scale 1."""
    least_pairs: int = 16
    """At any scale."""
    share: float = 0.5
    """Floor of this score, as `precision` (see `discovery`)."""
    precision: float = 0.75
    """0.75: three times as active on labelled positions as on controls."""
    logit_sign: int = 0
    """1: must raise the predicted token, -1: must lower it, 0: either."""
    raised: bool = True
    """Whether the null raises the bar; not where the name only says where a head looks, because a random head that
    looks at the first token is a sink too."""

    def make(self, vocabulary: Vocabulary, passages: Sequence[Passage], scale: float = 1.0, seed: int = 0) -> PromptSet:
        """`scale` times `n_pairs` pairs of prompts."""
        text = (passages,) if self.needs_text else ()
        n_pairs = max(self.least_pairs, round(scale * self.n_pairs))
        return self.prompts(vocabulary, *text, n_pairs, 1000 * seed + self.stream)


# ---- random tokens


def induction(vocabulary: Vocabulary, n_pairs: int, seed: int = 0, length: int = 16) -> PromptSet:
    """Random tokens twice, `r1 .. rn r1 .. rn`: a query r_k attends to the first r_(k+1), which it predicts.

    Controls are the first half, and the second half after another first half `s1 .. sn`.
    """
    return _repeated("induction", 1, vocabulary, n_pairs, seed, length)


def duplicate_token(vocabulary: Vocabulary, n_pairs: int, seed: int = 0) -> PromptSet:
    """The prompts of `induction`; the query r_k attends to the earlier r_k itself."""
    return _repeated("duplicate_token", 0, vocabulary, n_pairs, seed)


def _repeated(family: str, offset: int, vocabulary: Vocabulary, n_pairs: int, seed: int, length: int = 16) -> PromptSet:
    rng, first = np.random.default_rng(seed), len(vocabulary.start)
    pool = prompts.random_pool(vocabulary, 2 * length, f"Family {family}")
    builder = Builder(family, predicts=offset == 1)
    for pair in range(n_pairs):
        tokens = draw(rng, pool, 2 * length)
        repeated, other = tokens[:length], tokens[length:]
        labelled: Queries = {first + length + k: (first + k + offset,) for k in range(length - 1)}
        controls: Queries = dict.fromkeys(range(first, first + length - 1), ())
        builder.add(vocabulary.start + repeated + repeated, labelled | controls, pair, "repeated")
        builder.add(vocabulary.start + other + repeated, dict.fromkeys(labelled, ()), pair, "not repeated")
    return builder.build()


# ---- positions


def previous_token(
    vocabulary: Vocabulary, passages: Sequence[Passage], n_pairs: int, seed: int = 0, per_passage: int = 8
) -> PromptSet:
    """Real text; every query attends to the token before it."""
    return _positional("previous_token", lambda i: range(i - 1, i), vocabulary, passages[:n_pairs], seed, per_passage)


def attention_sink(vocabulary: Vocabulary, passages: Sequence[Passage], n_pairs: int, seed: int = 0) -> PromptSet:
    """Real text; every query attends to the first token (BOS, where there is one)."""
    return _positional("attention_sink", lambda i: range(1), vocabulary, passages[:n_pairs], seed)


def local(vocabulary: Vocabulary, passages: Sequence[Passage], n_pairs: int, seed: int = 0) -> PromptSet:
    """Real text; every query attends to itself or to the `LOCAL_WINDOW` tokens before it."""
    return _positional("local", lambda i: range(i - LOCAL_WINDOW, i + 1), vocabulary, passages[:n_pairs], seed)


def _positional(
    family: str,
    sources: Callable[[int], range],
    vocabulary: Vocabulary,
    passages: Sequence[Passage],
    seed: int,
    per_passage: int = 8,
) -> PromptSet:
    """Sources depend on positions alone, so there are no controls."""
    rng = np.random.default_rng(seed)
    builder = Builder(family, predicts=False)
    for pair, passage in enumerate(passages):
        ids = vocabulary.start + list(passage.ids)
        half = len(ids) // 2
        places = sorted(draw(rng, range(min(2 * LOCAL_WINDOW, half), len(ids)), min(per_passage, half)))
        builder.add(ids, {place: sources(place) for place in places}, pair)
    return builder.build()


# ---- topics


def thematic_anchor(
    vocabulary: Vocabulary, passages: Sequence[Passage], n_pairs: int, seed: int = 0, tail: int = 24
) -> PromptSet:
    """The end of a passage after its own beginning; controls have the beginning of another document.

    Queries are new tokens among the last `tail` (so that induction and duplicate-token heads find nothing) and attend
    more than `FAR` tokens back.

    Raises:
        UserError: there are fewer than two documents, a passage has fewer than `FAR` + `tail` tokens, or fewer than two
            passages have enough new words at the end.
    """
    who = "Family thematic_anchor"
    if len({passage.document for passage in passages}) < 2:
        raise UserError(f"{who} needs passages from two documents or more.")
    if min(len(passage.ids) for passage in passages) < FAR + tail:
        raise UserError(f"{who} needs passages of {FAR + tail} tokens.")
    rng, first = np.random.default_rng(seed), max(1, len(vocabulary.start))
    builder, pair = Builder("thematic_anchor", predicts=False), 0
    for passage in passages:
        others = [other for other in passages if other.document != passage.document]
        swapped = others[int(rng.integers(len(others)))].ids
        own, other = (vocabulary.start + [*begin[:-tail], *passage.ids[-tail:]] for begin in (passage.ids, swapped))
        fresh = [i for i in range(len(own) - tail, len(own)) if own[i] not in own[:i] and other[i] not in other[:i]]
        if len(fresh) < 4 or pair == n_pairs:
            continue
        places = sorted(draw(rng, fresh, min(8, len(fresh))))
        builder.add(own, {i: range(first, i - FAR) for i in places}, pair, "own beginning")
        builder.add(other, dict.fromkeys(places, ()), pair, "other beginning")
        pair += 1
    if pair < 2:
        raise UserError(f"{who} found no passage with enough new words at its end.")
    return builder.build()


def topic_words(
    passages: Sequence[Passage], vocabulary: Vocabulary, least: int = 2, rare: float = 0.2
) -> list[set[int]]:
    """Topic words of every passage, as token ids.

    Words of four or more letters that occur at least `least` times in the passage and in at most a `rare` share of
    documents (or in one).
    """
    documents: dict[str, set[int]] = {}
    for passage in passages:
        documents.setdefault(passage.document, set()).update(passage.ids)
    spread = Counter(token for ids in documents.values() for token in ids)
    words = {token for token in vocabulary.words if len(vocabulary.texts[token]) > 4}
    rare_words = words & {token for token, n in spread.items() if n <= max(1.0, rare * len(documents))}
    counts = [Counter(passage.ids) for passage in passages]
    return [{token for token in rare_words & count.keys() if count[token] >= least} for count in counts]


def topic_prompts(
    passages: Sequence[Passage],
    vocabulary: Vocabulary,
    n_pairs: int = 48,
    per_passage: int = 8,
    scrambled: bool = False,
    seed: int = 0,
) -> PromptSet:
    """Queries before topic words that come back, and as many controls before other words (paper item P10).

    Sources are the occurrences of all topic words more than `FAR` tokens back, one of them the predicted word itself.
    The `share` of a head on these prompts is its topic consistency.

    Passages should have 192 tokens or more; each is a pair of its own with at most `per_passage` labelled queries in
    its second half. `scrambled` puts the first half in random order.

    Raises:
        UserError: no passage has a topic word that comes back.
    """
    rng, first = np.random.default_rng(seed), len(vocabulary.start)
    builder = Builder("thematic_anchor")
    for passage, topic in zip(passages, topic_words(passages, vocabulary), strict=True):
        ids = vocabulary.start + list(passage.ids)
        middle = len(ids) // 2
        if scrambled:
            ids[first:middle] = [int(token) for token in rng.permutation(ids[first:middle])]
        far = {i: [j for j in range(max(1, first), i - FAR) if ids[j] in topic] for i in range(middle, len(ids) - 1)}
        labelled = [i for i, sources in far.items() if ids[i + 1] in topic & {ids[j] for j in sources}]
        others = [i for i in far if ids[i + 1] not in topic and vocabulary.texts.get(ids[i + 1], "")[:1] == " "]
        n = min(len(labelled), len(others), per_passage)
        if n and len(builder.rows) < n_pairs:
            queries, controls = (
                [side[index] for index in sorted(rng.choice(len(side), n, replace=False))]
                for side in (labelled, others)
            )
            builder.add(ids, {i: far[i] for i in queries} | dict.fromkeys(controls, []), len(builder.rows), "text")
    if not builder.rows:
        raise UserError(
            "No passage has a topic word that comes back far from where it stood; give more or longer texts."
        )
    return builder.build()


# ---- words


def name_mover(vocabulary: Vocabulary, n_pairs: int, seed: int = 0) -> PromptSet:
    """Indirect objects: `Then, Mary and John went .., and John gave .. to` attends to ` Mary` and says it.

    The control has other words in the places of the names.
    """
    return _indirect_objects("name_mover", vocabulary, n_pairs, seed)


def copy_suppression(vocabulary: Vocabulary, n_pairs: int, seed: int = 0) -> PromptSet:
    """The prompts of `name_mover`; the head lowers the name that the model is about to repeat."""
    return _indirect_objects("copy_suppression", vocabulary, n_pairs, seed)


def _indirect_objects(family: str, vocabulary: Vocabulary, n_pairs: int, seed: int) -> PromptSet:
    names = prompts.names(vocabulary, f"Family {family}")
    in_names = set(names)
    pools = {"names": names, "words": [token for token in vocabulary.words if token not in in_names]}
    rng, builder = np.random.default_rng(seed), Builder(family)
    for pair in range(n_pairs):
        template = prompts.TEMPLATES[int(rng.integers(len(prompts.TEMPLATES)))]
        receiver_slot, giver_slot = "AB" if rng.integers(2) else "BA"
        for kind, pool in pools.items():
            giver, receiver = draw(rng, pool, 2)
            ids, places = prompts.fill(template, vocabulary, {receiver_slot: receiver, giver_slot: giver, "S": giver})
            sources = (places[receiver_slot],) if kind == "names" else ()
            builder.add([*ids, receiver], {len(ids) - 1: sources}, pair, kind)
    return builder.build()


def successor(vocabulary: Vocabulary, n_pairs: int, seed: int = 0) -> PromptSet:
    """`Monday, Tuesday, Wednesday,`: the last comma attends to the member before it and predicts the next.

    Controls are lists of unrelated words. `n_pairs` pairs of each series that the tokenizer has as single tokens.
    """
    rng, builder, pair = np.random.default_rng(seed), Builder("successor"), 0
    comma = vocabulary.encode(",")[0]
    for name, (stretch, prefix) in prompts.stretches(vocabulary).items():
        members = {token for series in prompts.SERIES.values() for token in vocabulary.singles(series, prefix).values()}
        # Where lists go without spaces, small letters replace words.
        pool = vocabulary.words if prefix else vocabulary.singles(string.ascii_lowercase, "").values()
        unrelated = [token for token in pool if token not in members]
        if len(unrelated) < 8:
            continue
        for _ in range(n_pairs):
            begin = int(rng.integers(len(stretch) - 3))
            opening = vocabulary.start + vocabulary.encode(prompts.OPENINGS[int(rng.integers(len(prompts.OPENINGS)))])
            for listed, kind in ((stretch[begin : begin + 4], name), (draw(rng, unrelated, 4), "unrelated words")):
                ids = opening + [token for member in listed for token in (member, comma)][:-1]
                query = len(ids) - 2
                builder.add(ids, {query: (query - 1,) if kind == name else ()}, pair, kind)
            pair += 1
    require(1, builder.rows, "series (days, letters, ...) of single tokens", "Family successor")
    return builder.build()


def subtoken_induction(vocabulary: Vocabulary, n_pairs: int, seed: int = 0) -> PromptSet:
    """Context `[ Marion] ... [Mar]`: the query attends to the whole word and predicts its second part `[ion]`.

    Two controls per pair, in place of the whole word: another word (`random`), and the parts `[Mar][ion]`, which
    ordinary induction would use (`token`).
    """
    split = prompts.split_words(vocabulary, "Family subtoken_induction")
    rng, builder = np.random.default_rng(seed), Builder("subtoken_induction")
    for pair in range(n_pairs):
        word, other = (split[int(index)] for index in rng.choice(len(split), 2, replace=False))
        filler = draw(rng, [index for index in vocabulary.words if index not in (word.whole, other.whole)], 12)
        contexts = {"subtoken": [word.whole], "random": [other.whole], "token": [word.first, word.second]}
        for kind, inserted in contexts.items():
            before, after = filler[: 6 - len(inserted)], filler[6:]
            ids = vocabulary.start + before + inserted + after + [word.first, word.second]
            sources = (len(vocabulary.start) + 5,) if kind == "subtoken" else ()
            builder.add(ids, {len(ids) - 2: sources}, pair, kind)
    return builder.build()


def arithmetic(vocabulary: Vocabulary, n_pairs: int, seed: int = 0) -> PromptSet:
    """`36+62=`: the sign attends to the operands and predicts the answer; controls have letters for digits."""
    symbols = vocabulary.singles([*string.digits, *string.ascii_lowercase, *OPERATORS, "="], "")
    require(40, symbols, "single tokens for digits, letters and signs", "Family arithmetic")
    letters = [symbols[letter] for letter in string.ascii_lowercase]
    rng, builder, first = np.random.default_rng(seed), Builder("arithmetic"), len(vocabulary.start)
    for pair in range(n_pairs):
        sign = tuple(OPERATORS)[int(rng.integers(3))]
        a, b = (int(number) for number in sorted(rng.integers(10, 100, 2), reverse=True))
        numbers = [vocabulary.encode(str(number)) for number in (a, b)]
        words = [draw(rng, letters, len(digits)) for digits in numbers]
        answer = vocabulary.encode(str(OPERATORS[sign](a, b)))[0]
        for (left, right), kind in ((numbers, "numbers"), (words, "letters")):
            ids = [*vocabulary.start, *left, symbols[sign], *right, symbols["="]]
            end = len(ids) - 1
            sources = [i for i in range(first, end) if i != first + len(left)] if kind == "numbers" else []
            builder.add([*ids, answer], {end: sources}, pair, kind)
    return builder.build()


# ---- all of them

# From the most to the least specific: a unit with several names is shown under the first.
FAMILIES: dict[str, Family] = {
    "subtoken_induction": Family(
        label="subtoken induction",
        meaning="an earlier word began with the current piece of a word; "
        "it looks at the piece that followed there and raises it",
        prompts=subtoken_induction,
        stream=9,
        logit_sign=1,
    ),
    "copy_suppression": Family(
        label="copy suppression",
        meaning="it looks at earlier copies of a token the model is about to say, and lowers that token",
        prompts=copy_suppression,
        stream=7,
        logit_sign=-1,
    ),
    "name_mover": Family(
        label="name mover",
        meaning="it looks at the name that the sentence needs next and raises it",
        prompts=name_mover,
        stream=6,
        logit_sign=1,
    ),
    "successor": Family(
        label="successor",
        meaning="it looks at an item of a series and raises the next one (Monday, Tuesday)",
        prompts=successor,
        stream=8,
        n_pairs=32,
        logit_sign=1,
    ),
    "arithmetic": Family(label="arithmetic", meaning="it looks at the numbers of a sum", prompts=arithmetic, stream=10),
    "induction": Family(
        label="induction",
        meaning="after A B ... A it looks at B, the token that followed the last time",
        prompts=induction,
        stream=0,
    ),
    "duplicate_token": Family(
        label="duplicate token",
        meaning="it looks at an earlier copy of the current token",
        prompts=duplicate_token,
        stream=1,
        n_pairs=48,
        least_pairs=8,
    ),
    "previous_token": Family(
        label="previous token",
        meaning="it looks at the token just before",
        prompts=previous_token,
        stream=2,
        needs_text=True,
    ),
    "attention_sink": Family(
        label="attention sink",
        meaning="it looks at the first token, whatever the text says",
        prompts=attention_sink,
        stream=3,
        needs_text=True,
        raised=False,
    ),
    "thematic_anchor": Family(
        label="thematic anchor",
        meaning="it looks far back, at words of the passage's topic",
        prompts=thematic_anchor,
        stream=5,
        needs_text=True,
    ),
    "local": Family(
        label="local/positional",
        meaning="it looks at the last few tokens, whatever they are",
        prompts=local,
        stream=4,
        needs_text=True,
        share=0.75,
        raised=False,
    ),
}


class Prompts(NamedTuple):
    """Prompts by family, and why others have none."""

    sets: dict[str, PromptSet]
    skipped: dict[str, str]


def standard(vocabulary: Vocabulary, passages: Sequence[Passage], seed: int = 0, scale: float = 1.0) -> Prompts:
    """The prompts of every family that the tokenizer and the passages allow, about 75,000 tokens at scale 1."""
    sets, skipped = {}, {}
    for name, family in sorted(FAMILIES.items(), key=lambda item: item[1].stream):
        try:
            if family.needs_text and not passages:
                raise UserError(f"Family {name} needs passages of real text; give a longer text.")
            sets[name] = family.make(vocabulary, passages, scale, seed)
        except UserError as error:
            skipped[name] = f"{error} The family is skipped."
    return Prompts(sets, skipped)
