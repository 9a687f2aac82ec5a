"""Test text for known attention behaviours: seeded generators whose token positions carry labels.

Each generator makes one `PromptSet`. A query is a token position at which a behaviour should show (a labelled position)
or, matched to it, should not (a control). Labelled queries name the source positions that a head with this behaviour
attends to, and the token after a query is the one that the behaviour predicts. Prompts come in pairs that hold both
labelled positions and controls: swapping the two labels within a pair is what the shuffled-label null does.

Generators work with any tokenizer. Where one lacks what a family needs (names that are single tokens, say), they raise
a `UserError` of one sentence and `standard` skips the family.

Sources: induction and previous-token heads: Elhage et al. 2021, Olsson et al. 2022; name movers and duplicate tokens:
Wang et al. 2022; copy suppression: McDougall et al. 2023; successors: Gould et al. 2023; attention sinks: Xiao et al.
2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError

LOCAL_WINDOW = 8
"""A head is local when it looks at the query itself or at one of so many tokens before it."""
FAR = 32
"""A thematic anchor looks back further than so many tokens."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one family with labelled positions."""

    family: str
    """Key of the family, such as `induction`."""
    tokens: Tensor = field(repr=False)
    """[n, length] int64, padded on the right (with the last token of the row; nothing is ever read there)."""
    row: Tensor = field(repr=False)
    """[n_queries], prompt of each query."""
    position: Tensor = field(repr=False)
    """[n_queries], its position in the prompt."""
    positive: Tensor = field(repr=False)
    """[n_queries] bool, True on labelled positions, False on controls."""
    sources: Tensor = field(repr=False)
    """[n_queries, length] bool, the positions that the family predicts as sources; all False at controls."""
    pair: Tensor = field(repr=False)
    """[n_queries], number of the pair of each query; pairs are independent draws."""
    kind: tuple[str, ...] = field(repr=False)
    """[n], what each prompt is: the series of a successor prompt, the kind of control."""
    predicts: bool = True
    """Whether the token after a labelled query is what the family predicts (for its direct logit effect and loss)."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts, padding included: what a pass over them costs."""
        return self.tokens.numel()

    @property
    def has_controls(self) -> bool:
        """Whether activations on labelled positions can be compared with controls."""
        return not bool(self.positive.all())

    @property
    def predicted(self) -> Tensor:
        """[n_queries], the token after each query (the query itself where nothing follows)."""
        after = (self.position + 1).clamp(max=self.tokens.shape[1] - 1)
        return self.tokens[self.row, after]

    def kinds(self) -> list[str]:
        """Kind of each query's prompt, [n_queries]."""
        return [self.kind[index] for index in self.row.tolist()]

    def keep_pairs(self, keep: Callable[[Tensor], Tensor]) -> PromptSet:
        """The prompts of some pairs: `keep` maps pair numbers to True or False."""
        queries = keep(self.pair)
        rows = torch.unique(self.row[queries])
        number = torch.full((len(self.tokens),), -1)
        number[rows] = torch.arange(len(rows))
        return PromptSet(
            self.family,
            self.tokens[rows],
            number[self.row[queries]],
            self.position[queries],
            self.positive[queries],
            self.sources[queries],
            self.pair[queries],
            tuple(self.kind[index] for index in rows.tolist()),
            self.predicts,
        )


class Query(NamedTuple):
    """One labelled position or control of a prompt that is being built."""

    position: int
    sources: tuple[int, ...] = ()
    """None at a control."""


class _Builder:
    """Collects prompts of one family and pads them to a `PromptSet`."""

    def __init__(self, family: str, predicts: bool = True) -> None:
        self.family, self.predicts = family, predicts
        self.rows: list[list[int]] = []
        self.kind: list[str] = []
        self.queries: list[tuple[int, int, Query]] = []

    def add(self, ids: Sequence[int], queries: Sequence[Query], pair: int, kind: str = "") -> None:
        self.queries += [(len(self.rows), pair, query) for query in queries]
        self.rows.append([int(token) for token in ids])
        self.kind.append(kind)

    def build(self) -> PromptSet:
        length = max(len(row) for row in self.rows)
        tokens = torch.tensor([row + [row[-1]] * (length - len(row)) for row in self.rows])
        sources = torch.zeros(len(self.queries), length, dtype=torch.bool)
        for number, (_, _, query) in enumerate(self.queries):
            sources[number, list(query.sources)] = True
        row, pair = (torch.tensor([entry[side] for entry in self.queries]) for side in (0, 1))
        position = torch.tensor([query.position for _, _, query in self.queries])
        return PromptSet(
            self.family,
            tokens,
            row,
            position,
            sources.any(dim=1),
            sources,
            pair,
            tuple(self.kind),
            predicts=self.predicts,
        )


class Vocabulary:
    """What the generators ask a tokenizer for."""

    def __init__(self, tokenizer: Any, bos_id: int | None) -> None:
        """Wrap a Hugging Face tokenizer.

        Args:
            tokenizer: any tokenizer.
            bos_id: token in front of every prompt, None for none; the one that the module was trained with.
        """
        self.tokenizer, self.bos_id = tokenizer, bos_id

    @property
    def start(self) -> list[int]:
        """What every prompt begins with."""
        return [] if self.bos_id is None else [self.bos_id]

    @cached_property
    def texts(self) -> dict[int, str]:
        """Text of every token that is ordinary: not special, and whole characters."""
        special = set(self.tokenizer.all_special_ids)
        ids = sorted(index for index in self.tokenizer.get_vocab().values() if index not in special)
        decoded = self.tokenizer.batch_decode([[index] for index in ids], clean_up_tokenization_spaces=False)
        return {index: text for index, text in zip(ids, decoded, strict=True) if text and "\ufffd" not in text}

    @cached_property
    def words(self) -> list[int]:
        """Tokens that are a space and a word of at least three plain letters."""
        return [index for index, text in self.texts.items() if text[0] == " " and len(text) > 3 and _is_plain(text[1:])]

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def single(self, text: str) -> int | None:
        """The token that is exactly `text`, if there is one."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 and self.texts.get(ids[0]) == text else None

    def singles(self, texts: Sequence[str], prefix: str = " ") -> dict[str, int]:
        """Those of `texts` that are one token after `prefix`."""
        found = {text: self.single(prefix + text) for text in texts}
        return {text: index for text, index in found.items() if index is not None}


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isalpha()


def _draw(rng: np.random.Generator, pool: Sequence[int], n: int) -> list[int]:
    """`n` different entries of a pool."""
    return [int(index) for index in rng.choice(np.asarray(pool), n, replace=False)]


# ---- random tokens


def _random_pool(vocabulary: Vocabulary, needed: int, family: str) -> list[int]:
    pool = list(vocabulary.texts)
    if len(pool) < needed:
        raise UserError(
            f"Family {family} needs {needed} different tokens, this tokenizer has {len(pool)}; the family is skipped."
        )
    return pool


def induction(vocabulary: Vocabulary, n_pairs: int = 96, seed: int = 0, length: int = 16) -> PromptSet:
    """Repeated random tokens `r1 .. rn r1 ..

    rn`; in the second half the query r_k attends to the first r_(k+1) and predicts it.

    Controls are the first half, and the same tokens at the same places after another first half `s1 .. sn`.
    """
    return _repeated(vocabulary, "induction", 1, n_pairs, seed, length)


def duplicate_token(vocabulary: Vocabulary, n_pairs: int = 96, seed: int = 1, length: int = 16) -> PromptSet:
    """The prompts of `induction`; the query r_k attends to the earlier r_k itself."""
    return _repeated(vocabulary, "duplicate_token", 0, n_pairs, seed, length)


def _repeated(vocabulary: Vocabulary, family: str, offset: int, n_pairs: int, seed: int, length: int) -> PromptSet:
    rng = np.random.default_rng(seed)
    pool = _random_pool(vocabulary, 2 * length, family)
    first = len(vocabulary.start)
    builder = _Builder(family, predicts=offset == 1)
    for pair in range(n_pairs):
        drawn = _draw(rng, pool, 2 * length)
        repeated, other = drawn[:length], drawn[length:]
        labelled = [Query(first + length + k, (first + k + offset,)) for k in range(length - 1)]
        controls = [Query(first + k) for k in range(length - 1)]
        builder.add(vocabulary.start + repeated + repeated, labelled + controls, pair, "repeated")
        builder.add(
            vocabulary.start + other + repeated, [Query(query.position) for query in labelled], pair, "not repeated"
        )
    return builder.build()


# ---- positions


class Passage(NamedTuple):
    """Consecutive tokens of one document."""

    document: str
    ids: tuple[int, ...]


def passages(
    documents: Sequence[tuple[str, str]],
    vocabulary: Vocabulary,
    n: int,
    length: int = 96,
    per_document: int = 8,
    seed: int = 0,
) -> list[Passage]:
    """Up to `n` passages of real text, from as many documents as possible.

    Args:
        documents: (id, text) of each.
        vocabulary: of the model.
        n: how many.
        length: tokens in a passage, without BOS.
        per_document: at most so many from one document.
        seed: of the order.

    Raises:
        UserError: no document is long enough.
    """
    rng = np.random.default_rng(seed)
    special = set(vocabulary.tokenizer.all_special_ids)
    rounds: list[list[Passage]] = [[] for _ in range(per_document)]
    for index in rng.permutation(len(documents)):
        name, text = documents[index]
        ids = [token for token in vocabulary.encode(text[: 12 * length * per_document]) if token not in special]
        for number in range(min(per_document, len(ids) // length)):
            rounds[number].append(Passage(name, tuple(ids[number * length : (number + 1) * length])))
        if len(rounds[0]) >= n:
            break
    found = [passage for some in rounds for passage in some][:n]
    if not found:
        raise UserError(f"The text has no document of {length} tokens; give longer documents.")
    return found


def _positional(
    family: str,
    vocabulary: Vocabulary,
    texts: Sequence[Passage],
    seed: int,
    sources: Callable[[int], range],
    per_passage: int = 8,
) -> PromptSet:
    """Queries anywhere past the first tokens of real text; what they attend to depends on positions alone, so there are no controls."""
    rng = np.random.default_rng(seed)
    builder = _Builder(family, predicts=False)
    for pair, passage in enumerate(texts):
        ids = vocabulary.start + list(passage.ids)
        places = sorted(
            _draw(rng, range(min(2 * LOCAL_WINDOW, len(ids) // 2), len(ids)), min(per_passage, len(ids) // 2))
        )
        builder.add(ids, [Query(place, tuple(sources(place))) for place in places], pair)
    return builder.build()


def previous_token(vocabulary: Vocabulary, texts: Sequence[Passage], seed: int = 2, per_passage: int = 8) -> PromptSet:
    """Real text; every query attends to the token before it; `per_passage` queries in each passage."""
    return _positional("previous_token", vocabulary, texts, seed, lambda i: range(i - 1, i), per_passage)


def attention_sink(vocabulary: Vocabulary, texts: Sequence[Passage], seed: int = 3) -> PromptSet:
    """Real text; every query attends to the first token of the sequence (BOS, where there is one)."""
    return _positional("attention_sink", vocabulary, texts, seed, lambda i: range(1))


def local(vocabulary: Vocabulary, texts: Sequence[Passage], seed: int = 4) -> PromptSet:
    """Real text; every query attends to itself or to the `LOCAL_WINDOW` tokens before it."""
    return _positional("local", vocabulary, texts, seed, lambda i: range(i - LOCAL_WINDOW, i + 1))


def thematic_anchor(
    vocabulary: Vocabulary, texts: Sequence[Passage], n_pairs: int = 48, seed: int = 5, tail: int = 24
) -> PromptSet:
    """The end of a passage after its own beginning, against the same end after the beginning of another document.

    Labelled queries lie in the last `tail` tokens, on tokens that occur nowhere before (so that neither induction nor
    duplicate-token heads have anything to find), and attend further back than `FAR` tokens. Controls: the same tokens
    at the same places.

    Raises:
        UserError: the passages come from one document alone, or are shorter than `FAR` + `tail` tokens.
    """
    if len({passage.document for passage in texts}) < 2:
        raise UserError("Family thematic_anchor needs passages from two documents or more; the family is skipped.")
    if min(len(passage.ids) for passage in texts) < FAR + tail:
        raise UserError(f"Family thematic_anchor needs passages of {FAR + tail} tokens; the family is skipped.")
    rng = np.random.default_rng(seed)
    first = len(vocabulary.start)
    builder = _Builder("thematic_anchor", predicts=False)
    pair = 0
    for passage in texts:
        others = [other for other in texts if other.document != passage.document]
        swapped = others[int(rng.integers(len(others)))].ids
        ids = [vocabulary.start + list(begin[:-tail]) + list(passage.ids[-tail:]) for begin in (passage.ids, swapped)]
        end = len(ids[0])
        fresh = [i for i in range(end - tail, end) if all(row[i] not in row[:i] for row in ids)]
        if len(fresh) < 4 or pair == n_pairs:
            continue
        places = sorted(_draw(rng, fresh, min(8, len(fresh))))
        builder.add(ids[0], [Query(i, tuple(range(max(first, 1), i - FAR))) for i in places], pair, "own beginning")
        builder.add(ids[1], [Query(i) for i in places], pair, "other beginning")
        pair += 1
    if pair < 2:
        raise UserError(
            "Family thematic_anchor found no passage with enough new words at its end; the family is skipped."
        )
    return builder.build()


# ---- names

NAMES = (
    *(
        "Mary",
        "John",
        "Tom",
        "James",
        "Anna",
        "Paul",
        "Mark",
        "Sarah",
        "David",
        "Peter",
        "Alice",
        "Emma",
        "Jack",
        "Kate",
        "Laura",
    ),
    *(
        "Henry",
        "Lucy",
        "George",
        "Jane",
        "Robert",
        "Susan",
        "Michael",
        "Adam",
        "Ben",
        "Emily",
        "Simon",
        "Martin",
        "Rachel",
        "Alex",
    ),
    *("Daniel", "Maria", "Thomas", "William", "Charles", "Richard", "Joseph"),
)
# {A} and {B} are the two names in either order, {S} is the one named again; the query is the last token.
TEMPLATES = (
    "Then,{A} and{B} went to the store, and{S} gave a bottle of milk to",
    "When{A} and{B} drove to the station,{S} handed the tickets to",
    "Last week{A} and{B} walked to the school, and{S} showed the new garden to",
    "After{A} and{B} got to the office,{S} read the long letter to",
    "While{A} and{B} ran to the beach,{S} told an old story to",
    "The day{A} and{B} came to the house,{S} sold the small car to",
)


def name_mover(vocabulary: Vocabulary, n_pairs: int = 96, seed: int = 6) -> PromptSet:
    """Indirect objects: `Then, Mary and John went to the store, and John gave a bottle of milk to` attends to ` Mary` and says it.

    Both orders of the names. The control is the same sentence with other words in the places of the names.
    """
    return _indirect_objects("name_mover", vocabulary, n_pairs, seed)


def copy_suppression(vocabulary: Vocabulary, n_pairs: int = 96, seed: int = 7) -> PromptSet:
    """The prompts of `name_mover`, where the model is about to repeat a name; the head attends to it and makes it less likely."""
    return _indirect_objects("copy_suppression", vocabulary, n_pairs, seed)


def _indirect_objects(family: str, vocabulary: Vocabulary, n_pairs: int, seed: int) -> PromptSet:
    names = list(vocabulary.singles(NAMES).values())
    if len(names) < 8:
        raise UserError(
            f"Family {family} needs 8 first names that are single tokens, this tokenizer has {len(names)}; it is skipped."
        )
    in_names = set(names)
    words = [token for token in vocabulary.words if token not in in_names]
    rng = np.random.default_rng(seed)
    builder = _Builder(family)
    for pair in range(n_pairs):
        template, first_is_receiver = TEMPLATES[int(rng.integers(len(TEMPLATES)))], bool(rng.integers(2))
        for pool, kind in ((names, "names"), (words, "words")):
            giver, receiver = _draw(rng, pool, 2)
            order = {"{A}": receiver, "{B}": giver} if first_is_receiver else {"{A}": giver, "{B}": receiver}
            ids, places = _fill(template, vocabulary, order | {"{S}": giver})
            source = places["{A}" if first_is_receiver else "{B}"]
            builder.add([*ids, receiver], [Query(len(ids) - 1, (source,) if kind == "names" else ())], pair, kind)
    return builder.build()


def _fill(template: str, vocabulary: Vocabulary, slots: dict[str, int]) -> tuple[list[int], dict[str, int]]:
    """Token ids of a template whose slots are single tokens, and the position of every slot."""
    ids, places = list(vocabulary.start), {}
    rest = template
    while rest:
        slot = min((name for name in slots if name in rest), key=rest.index, default="")
        text, rest = rest.split(slot, 1) if slot else (rest, "")
        ids += vocabulary.encode(text) if text else []
        if slot:
            places[slot] = len(ids)
            ids.append(slots[slot])
    return ids, places


# ---- successors

SERIES: dict[str, tuple[str, ...]] = {
    "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "months": (
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "numerals": tuple(str(number) for number in range(1, 31)),
    "number words": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    "ordinals": ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    "roman numerals": ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII"),
}
OPENINGS = ("", "Here is the list:", "In this order:", "We count:", "They come one by one:", "As follows:")


def successor(vocabulary: Vocabulary, n_pairs: int = 32, seed: int = 8) -> PromptSet:
    """Three members of a series, `Monday, Tuesday, Wednesday,`: the comma attends to the last member and predicts the next one.

    Controls are lists of unrelated words in the same form. Seven series, `n_pairs` prompts of each that the tokenizer
    has as single tokens (the longest stretch that it has).
    """
    rng = np.random.default_rng(seed)
    builder = _Builder("successor")
    pair = 0
    for name, members in SERIES.items():
        # Tokenizers that cut digits one by one have no " 7"; there the list goes without spaces.
        stretch, prefix = max(
            ((_stretch(vocabulary, members, prefix), prefix) for prefix in (" ", "")), key=lambda found: len(found[0])
        )
        in_series = {token for others in SERIES.values() for token in vocabulary.singles(others, prefix).values()}
        unrelated = [index for index in _fitting(vocabulary, prefix) if index not in in_series]
        if len(stretch) < 5 or len(unrelated) < 8:
            continue
        for _ in range(n_pairs):
            begin = int(rng.integers(len(stretch) - 3))
            opening = vocabulary.start + vocabulary.encode(OPENINGS[int(rng.integers(len(OPENINGS)))])
            for listed, kind in ((stretch[begin : begin + 4], name), (_draw(rng, unrelated, 4), "unrelated words")):
                ids = opening + [token for member in listed for token in (member, vocabulary.encode(",")[0])][:-1]
                query = len(ids) - 2
                builder.add(ids, [Query(query, (query - 1,) if kind == name else ())], pair, kind)
            pair += 1
    if not builder.rows:
        raise UserError(
            "Family successor needs a series (days, letters, ...) of single tokens, this tokenizer has none; it is skipped."
        )
    return builder.build()


def _stretch(vocabulary: Vocabulary, members: Sequence[str], prefix: str) -> list[int]:
    """The longest run of members that are single tokens after `prefix`."""
    best: list[int] = []
    run: list[int] = []
    for member in members:
        token = vocabulary.single(prefix + member)
        run = [*run, token] if token is not None else []
        best = max(best, run, key=len)
    return best


def _fitting(vocabulary: Vocabulary, prefix: str) -> list[int]:
    """Control words for lists: ordinary words after a space, or small letters where lists go without spaces."""
    if prefix:
        return vocabulary.words
    return list(vocabulary.singles([chr(code) for code in range(ord("a"), ord("z") + 1)], "").values())


# ---- subtoken induction


class SplitWord(NamedTuple):
    """A word that is one token after a space and two tokens without it."""

    whole: int
    first: int
    second: int


def split_words(vocabulary: Vocabulary) -> list[SplitWord]:
    """Words such as ` Marion`, one token, whose bare form `Marion` the tokenizer cuts into two, `Mar` and `ion`.

    Capitalised words alone where there are 100 of them: among the others many are fragments of longer words.
    """
    words = vocabulary.words
    bare = [vocabulary.texts[index][1:] for index in words]
    cut = vocabulary.tokenizer(bare, add_special_tokens=False)["input_ids"] if bare else []
    found = [SplitWord(whole, *ids) for whole, ids in zip(words, cut, strict=True) if len(ids) == 2]
    names = [word for word in found if vocabulary.texts[word.whole][1].isupper()]
    return names if len(names) >= 100 else found


def subtoken_induction(vocabulary: Vocabulary, n_pairs: int = 96, seed: int = 9) -> PromptSet:
    """Context `[ Marion] ... [Mar]`: the query attends to the whole word and predicts its second part `[ion]`.

    Two controls a pair: another word in the place of the whole one (random), and the parts `[Mar][ion]` in its place,
    which ordinary induction would use (token induction).
    """
    found = split_words(vocabulary)
    if len(found) < 16:
        raise UserError(
            f"Family subtoken_induction needs 16 words with and without a space to split, this tokenizer has {len(found)}; it is skipped."
        )
    rng = np.random.default_rng(seed)
    builder = _Builder("subtoken_induction")
    for pair in range(n_pairs):
        word, other = (found[int(index)] for index in rng.choice(len(found), 2, replace=False))
        filler = _draw(rng, [index for index in vocabulary.words if index not in (word.whole, other.whole)], 12)
        place = len(vocabulary.start) + 5
        contexts = {"subtoken": [word.whole], "random": [other.whole], "token": [word.first, word.second]}
        for kind, inserted in contexts.items():
            before, after = filler[: 6 - len(inserted)], filler[6:]
            ids = vocabulary.start + before + inserted + after + [word.first, word.second]
            builder.add(ids, [Query(len(ids) - 2, (place,) if kind == "subtoken" else ())], pair, kind)
    return builder.build()


# ---- arithmetic

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


class ArithmeticGrid(NamedTuple):
    """One prompt for every pair of operands."""

    operator: str
    """`+`, `-` or `*`."""
    tokens: Tensor
    """[n, length] int64, right-padded."""
    a: Tensor
    """[n], first operand of each prompt."""
    b: Tensor
    """[n], second operand."""
    equals: Tensor
    """[n], position of `=`."""
    answer: Tensor
    """[n], first token of the answer, which is not part of the prompt."""


def arithmetic_grid(
    vocabulary: Vocabulary,
    operator: str = "+",
    low: int = 0,
    high: int = 99,
    form: str = "{a}{operator}{b}=",
    shots: str = "",
) -> ArithmeticGrid:
    """`a+b=` for all operands from `low` to `high`, whether the tokenizer cuts numbers into digits or not.

    Args:
        vocabulary: of the model.
        operator: a key of `OPERATORS`.
        low: smallest operand.
        high: largest operand.
        form: of a prompt; it must end in `=`.
        shots: text in front, solved examples for instance.

    Raises:
        UserError: unknown operator, an impossible range, or a tokenizer without digits.
    """
    if operator not in OPERATORS:
        raise UserError(f"Operator {operator!r} is not one of {', '.join(OPERATORS)}.")
    if not 0 <= low < high:
        raise UserError(f"Operands must run from 0 or more upwards, not from {low} to {high}.")
    rows, answers = [], []
    opening = vocabulary.start + (vocabulary.encode(shots) if shots else [])
    for a in range(low, high + 1):
        for b in range(low, high + 1):
            rows.append(opening + vocabulary.encode(form.format(a=a, operator=operator, b=b)))
            answers.append(vocabulary.encode(str(OPERATORS[operator](a, b)))[0])
    if vocabulary.texts.get(rows[0][-1], "")[-1:] != "=":
        raise UserError(
            "Arithmetic needs a tokenizer in which prompts end in '='; this one merges it, so the family is skipped."
        )
    length = max(len(row) for row in rows)
    tokens = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows])
    operands = torch.cartesian_prod(torch.arange(low, high + 1), torch.arange(low, high + 1))
    ends = torch.tensor([len(row) - 1 for row in rows])
    return ArithmeticGrid(operator, tokens, operands[:, 0], operands[:, 1], ends, torch.tensor(answers))


def arithmetic(vocabulary: Vocabulary, n_pairs: int = 96, seed: int = 10) -> PromptSet:
    """`36+62=`: the equals sign attends to the operands and predicts the answer's first token; controls have letters for digits.

    Raises:
        UserError: digits or letters are not single tokens.
    """
    digits = vocabulary.singles("0123456789", "")
    letters = vocabulary.singles([chr(code) for code in range(ord("a"), ord("z") + 1)], "")
    signs = {text: vocabulary.single(text) for text in (*OPERATORS, "=")}
    if len(digits) < 10 or len(letters) < 10 or None in signs.values():
        raise UserError(
            "Family arithmetic needs single tokens for digits, letters and signs, which this tokenizer lacks; it is skipped."
        )
    rng = np.random.default_rng(seed)
    builder = _Builder("arithmetic")
    first = len(vocabulary.start)
    for pair in range(n_pairs):
        operator = tuple(OPERATORS)[int(rng.integers(3))]
        a, b = (int(number) for number in sorted(rng.integers(10, 100, 2), reverse=True))
        numbers = [vocabulary.encode(str(number)) for number in (a, b)]
        symbols = [_draw(rng, list(letters.values()), len(part)) for part in numbers]
        answer = vocabulary.encode(str(OPERATORS[operator](a, b)))[0]
        for parts, kind in ((numbers, "numbers"), (symbols, "letters")):
            ids = [*vocabulary.start, *parts[0], int(signs[operator] or 0), *parts[1], int(signs["="] or 0)]
            end = len(ids) - 1
            sources = [i for i in range(first, end) if i != first + len(parts[0])]
            builder.add([*ids, answer], [Query(end, tuple(sources) if kind == "numbers" else ())], pair, kind)
    return builder.build()


# ---- all of them


class Prompts(NamedTuple):
    """What `standard` could make."""

    sets: dict[str, PromptSet]
    """Family to prompts."""
    skipped: dict[str, str]
    """Family to the sentence that says why there are none."""


def standard(vocabulary: Vocabulary, texts: Sequence[Passage], seed: int = 0, scale: float = 1.0) -> Prompts:
    """The prompts of every family that the tokenizer and the text allow.

    Args:
        vocabulary: of the model.
        texts: passages of real text; without any, the families that need them are skipped.
        seed: of all draws; families have streams of their own.
        scale: factor on the number of pairs (1 is about 75,000 tokens in all).
    """
    many, few = (max(16, round(scale * n)) for n in (96, 32))
    some = list(texts)[:many]
    makers: dict[str, Callable[[int], PromptSet]] = {
        "induction": lambda s: induction(vocabulary, many, s),
        "duplicate_token": lambda s: duplicate_token(vocabulary, many // 2, s),
        "previous_token": lambda s: previous_token(vocabulary, some, s),
        "attention_sink": lambda s: attention_sink(vocabulary, some, s),
        "local": lambda s: local(vocabulary, some, s),
        "thematic_anchor": lambda s: thematic_anchor(vocabulary, texts, many, s),
        "name_mover": lambda s: name_mover(vocabulary, many, s),
        "copy_suppression": lambda s: copy_suppression(vocabulary, many, s),
        "successor": lambda s: successor(vocabulary, few, s),
        "subtoken_induction": lambda s: subtoken_induction(vocabulary, many, s),
        "arithmetic": lambda s: arithmetic(vocabulary, many, s),
    }
    needs_text = {"previous_token", "attention_sink", "local", "thematic_anchor"}
    sets, skipped = {}, {}
    for number, (family, make) in enumerate(makers.items()):
        if family in needs_text and not texts:
            skipped[family] = f"Family {family} needs passages of real text; give a longer text."
            continue
        try:
            sets[family] = make(1000 * seed + number)
        except UserError as error:
            skipped[family] = str(error)
    return Prompts(sets, skipped)
