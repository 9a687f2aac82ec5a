"""Tasks for circuit discovery: prompts in pairs, clean and corrupted, with the right answer of each.

A pair has the same length and differs in what decides the answer. The wrong answer of a clean prompt is the right one
of its corrupted partner, so that replacing what a node does on the clean prompt by what it does on the corrupted one
moves the metric from one to the other.

| task | clean | corrupted | source |
|---|---|---|---|
| induction | r1 .. rn r1 .. rk says r(k+1) | the first half in another order: rk is followed by another token | Elhage et al. 2021 |
| indirect_object | Then, Mary and John went .., and John gave .. to: Mary | .. and Mary gave .. to: John | Wang et al. 2022 |
| successor | Monday, Tuesday, Wednesday, : Thursday | another stretch of the same series | Gould et al. 2023 |
| greater_than | from the year 1742 to the year 17: a digit above 4, not below | from the year 1702 | Hanna et al. 2023 |
| agreement | The cars near the tree: are | The car near the tree: is | Linzen et al. 2016 |
| subtoken_induction | .. [ Marion] .. [Mar] says [ion] | another word in its place | paper, Sec. 6 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import prompts
from lorsa_utils.heads.prompts import Vocabulary

LEAST_ACCURACY = 0.75
"""A task counts as one that the model can do when it prefers the right answer to the wrong one on so many prompts; chance is 1/2."""
METRICS = ("logit_difference", "loss", "kl")


@dataclass(frozen=True)
class Task:
    """Pairs of prompts of one task."""

    name: str
    clean: Tensor = field(repr=False)
    """[n, length] int64, padded on the right."""
    corrupted: Tensor = field(repr=False)
    """[n, length], the partner of each."""
    position: Tensor = field(repr=False)
    """[n], last token of each prompt; what follows it is padding."""
    answers: Tensor = field(repr=False)
    """[n, most answers], right tokens after the clean prompt, -1 where there are fewer."""
    wrong: Tensor = field(repr=False)
    """[n, most wrong answers], wrong tokens, -1 where there are fewer."""

    def __len__(self) -> int:
        return len(self.clean)

    def rows(self, rows: slice | Tensor) -> Task:
        """Some of the pairs."""
        parts = {name: getattr(self, name)[rows] for name in ("clean", "corrupted", "position", "answers", "wrong")}
        return replace(self, **parts)

    def split(self) -> tuple[Task, Task]:
        """Pairs to discover circuits on (even numbers) and held-out pairs (odd numbers)."""
        return self.rows(slice(0, None, 2)), self.rows(slice(1, None, 2))


def metric(name: str, logits: Tensor, task: Task, reference: Tensor | None = None) -> Tensor:
    """A number for each prompt that is larger when the model does the task better.

    Args:
        name: `logit_difference`: log-sum-exp of the right answers' logits minus that of the wrong ones' (with one
            answer each, the difference of two logits); `loss`: minus the cross-entropy of the right answers, in nats;
            `kl`: minus the KL divergence from the untouched model's distribution, in nats.
        logits: after each prompt, [n, vocabulary].
        task: with n prompts.
        reference: the untouched model's logits, [n, vocabulary]; `kl` needs them.

    Returns:
        [n].

    Raises:
        UserError: unknown metric, or `kl` without a reference.
    """
    if name == "logit_difference":
        return _together(logits, task.answers) - _together(logits, task.wrong)
    if name == "loss":
        return _together(logits, task.answers) - logits.logsumexp(dim=-1)
    if name == "kl" and reference is not None:
        own, other = logits.log_softmax(dim=-1), reference.to(logits.device).log_softmax(dim=-1)
        return -(other.exp() * (other - own)).sum(dim=-1)
    if name == "kl":
        raise UserError("The metric kl needs the untouched model's logits as reference.")
    raise UserError(f"Metric {name!r} is not one of {', '.join(METRICS)}.")


def _together(logits: Tensor, tokens: Tensor) -> Tensor:
    tokens = tokens.to(logits.device)
    chosen = logits.gather(1, tokens.clamp_min(0))
    return chosen.masked_fill(tokens < 0, -torch.inf).logsumexp(dim=-1)


def accuracy(logits: Tensor, task: Task) -> float:
    """Share of prompts on which the right answers are together more likely than the wrong ones."""
    return float((metric("logit_difference", logits, task) > 0).double().mean())


def require_able(name: str, found: float, least: float = LEAST_ACCURACY) -> None:
    """Refuse a task that the model cannot do.

    Raises:
        UserError: says the accuracy.
    """
    if found < least:
        raise UserError(
            f"The model prefers the right answer on only {found:.0%} of the prompts of {name} (chance is 50 %, {least:.0%} are asked for), "
            "so there is no circuit to find; choose another task."
        )


# ---- building


class _Pairs:
    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[tuple[list[int], list[int], list[int], list[int]]] = []

    def add(self, sides: Sequence[Sequence[int]], answers: Sequence[int], wrong: Sequence[int]) -> None:
        clean, corrupted = sides
        if len(clean) != len(corrupted):
            raise UserError(
                f"A clean prompt of {self.name} has {len(clean)} tokens and its corrupted one {len(corrupted)}; nodes are exchanged "
                "position by position, so give pairs of equal length in tokens."
            )
        if set(answers) & set(wrong):
            raise UserError(
                f"A prompt of {self.name} has a token that is both a right and a wrong answer; give different ones."
            )
        self.rows.append(([int(i) for i in clean], [int(i) for i in corrupted], list(answers), list(wrong)))

    def build(self) -> Task:
        if not self.rows:
            raise UserError(f"Task {self.name} has no prompt; give at least one.")
        clean, corrupted, answers, wrong = zip(*self.rows, strict=True)
        position = torch.tensor([len(row) - 1 for row in clean])
        return Task(self.name, _pad(clean), _pad(corrupted), position, _pad(answers, -1), _pad(wrong, -1))


def _pad(rows: Sequence[Sequence[int]], fill: int | None = None) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[row[-1] if fill is None else fill] * (length - len(row))] for row in rows])


def from_texts(vocabulary: Vocabulary, name: str, pairs: Sequence[Mapping[str, Any]]) -> Task:
    """A task of one's own, from texts.

    Args:
        vocabulary: of the model.
        name: for tables.
        pairs: dicts with the keys `clean`, `corrupted`, `answer` and `wrong`; answers include their leading space.

    Raises:
        UserError: a key is missing, an answer is not one token, or the prompts of a pair differ in length.
    """
    built = _Pairs(name)
    for number, pair in enumerate(pairs, start=1):
        if missing := [key for key in ("clean", "corrupted", "answer", "wrong") if not isinstance(pair.get(key), str)]:
            raise UserError(
                f"Pair {number} of {name} has no text under {missing[0]!r}; give clean, corrupted, answer and wrong."
            )
        tokens = [_one_token(vocabulary, pair[key], f"pair {number} of {name}") for key in ("answer", "wrong")]
        sides = [vocabulary.start + vocabulary.encode(pair[key]) for key in ("clean", "corrupted")]
        built.add(sides, tokens[:1], tokens[1:])
    return built.build()


def _one_token(vocabulary: Vocabulary, text: str, where: str) -> int:
    ids = vocabulary.encode(text)
    if len(ids) != 1:
        pieces = " + ".join(repr(vocabulary.tokenizer.decode([index])) for index in ids)
        raise UserError(
            f"The answer {text!r} of {where} is {len(ids)} tokens ({pieces}); give one that is a single token."
        )
    return ids[0]


# ---- tasks


def induction(vocabulary: Vocabulary, n: int, seed: int, length: int = 10, again: int = 5) -> Task:
    """Random tokens, and the first `again` of them once more; `length` tokens in the first half.

    In the corrupted half the last token has another follower, at another place, so that heads which look up its place
    matter too.
    """
    rng = np.random.default_rng(seed)
    pool = prompts._random_pool(vocabulary, length, "induction")
    built = _Pairs("induction")
    for _ in range(n):
        first = prompts._draw(rng, pool, length)
        while True:
            other = [first[int(i)] for i in rng.permutation(length)]
            place = other.index(first[again - 1]) + 1
            if place < length and place != again and other[place] != first[again]:
                break
        tail = first[:again]
        built.add([vocabulary.start + half + tail for half in (first, other)], [first[again]], [other[place]])
    return built.build()


def indirect_object(vocabulary: Vocabulary, n: int, seed: int) -> Task:
    """Two names, one of them again: the other one is asked for."""
    names = list(vocabulary.singles(prompts.NAMES).values())
    if len(names) < 8:
        raise UserError(
            f"Task indirect_object needs 8 first names that are single tokens, this tokenizer has {len(names)}."
        )
    rng = np.random.default_rng(seed)
    built = _Pairs("indirect_object")
    for _ in range(n):
        template = prompts.TEMPLATES[int(rng.integers(len(prompts.TEMPLATES)))]
        one, other = prompts._draw(rng, names, 2)
        giver, receiver = (one, other) if rng.integers(2) else (other, one)
        sides = [
            prompts._fill(template, vocabulary, {"{A}": one, "{B}": other, "{S}": again})[0]
            for again in (giver, receiver)
        ]
        built.add(sides, [receiver], [giver])
    return built.build()


def successor(vocabulary: Vocabulary, n: int, seed: int) -> Task:
    """Three members of a series; the next one is asked for."""
    rng = np.random.default_rng(seed)
    comma = vocabulary.encode(",")[0]
    stretches = []
    for members in prompts.SERIES.values():
        found = max((prompts._stretch(vocabulary, members, prefix) for prefix in (" ", "")), key=len)
        stretches += [found] if len(found) >= 5 else []
    if not stretches:
        raise UserError("Task successor needs a series (days, letters, ...) of single tokens, this tokenizer has none.")
    built = _Pairs("successor")
    for _ in range(n):
        stretch = stretches[int(rng.integers(len(stretches)))]
        begins = rng.choice(len(stretch) - 3, 2, replace=False)
        opening = vocabulary.start + vocabulary.encode(prompts.OPENINGS[int(rng.integers(1, len(prompts.OPENINGS)))])
        sides = [opening + [token for member in stretch[b : b + 3] for token in (member, comma)] for b in begins]
        built.add(sides, [stretch[begins[0] + 3]], [stretch[begins[1] + 3]])
    return built.build()


_EVENTS = ("war", "project", "journey", "reign", "study", "trial", "drought", "contract")


def greater_than(vocabulary: Vocabulary, n: int, seed: int) -> Task:
    """Years that end later than they begin: third digit of the second year, for tokenizers that cut numbers into digits.

    Right are the digits above the first year's, wrong those below; the corrupted prompt's first year has its third
    digit at 0, so that every digit is a possible end.
    """
    digits = vocabulary.singles("0123456789", "")
    if len(digits) < 10 or len(vocabulary.encode("1742")) != 4:
        raise UserError("Task greater_than needs a tokenizer that cuts numbers into single digits.")
    rng = np.random.default_rng(seed)
    built = _Pairs("greater_than")
    for _ in range(n):
        event = _EVENTS[int(rng.integers(len(_EVENTS)))]
        century, third, last = int(rng.integers(11, 19)), int(rng.integers(3, 8)), int(rng.integers(1, 9))
        texts = [
            f"The {event} lasted from the year {century}{digit}{last} to the year {century}" for digit in (third, 0)
        ]
        right = [digits[str(digit)] for digit in range(third + 1, 10)]
        sides = [vocabulary.start + vocabulary.encode(text) for text in texts]
        built.add(sides, right, [digits[str(digit)] for digit in range(third)])
    return built.build()


_NOUNS = (
    "car",
    "dog",
    "book",
    "girl",
    "boy",
    "friend",
    "teacher",
    "house",
    "farmer",
    "doctor",
    "key",
    "picture",
    "tree",
    "river",
    "king",
)
_BETWEEN = ("near the{M}", "behind the{M}", "next to the{M}", "that the{M} likes", "in front of the{M}")


def agreement(vocabulary: Vocabulary, n: int, seed: int) -> Task:
    """Number of subject and verb, with a noun in between."""
    nouns = {noun: (vocabulary.single(" " + noun), vocabulary.single(" " + noun + "s")) for noun in _NOUNS}
    whole = [(one, many) for one, many in nouns.values() if one is not None and many is not None]
    verbs = vocabulary.single(" is"), vocabulary.single(" are")
    if len(whole) < 4 or verbs[0] is None or verbs[1] is None:
        raise UserError("Task agreement needs nouns whose singular and plural are single tokens, and ` is` and ` are`.")
    rng = np.random.default_rng(seed)
    built = _Pairs("agreement")
    for _ in range(n):
        subject, middle = (whole[int(i)] for i in rng.choice(len(whole), 2, replace=False))
        number, template = int(rng.integers(2)), _BETWEEN[int(rng.integers(len(_BETWEEN)))]
        slots = {"{M}": middle[0] if "likes" in template else middle[int(rng.integers(2))]}
        sides = [
            prompts._fill("The{S} " + template, vocabulary, slots | {"{S}": subject[i]})[0]
            for i in (number, 1 - number)
        ]
        built.add(sides, [verbs[number] or 0], [verbs[1 - number] or 0])
    return built.build()


def subtoken_induction(vocabulary: Vocabulary, n: int, seed: int) -> Task:
    """A word as one token, and later its first part; the second part is asked for."""
    found = prompts.split_words(vocabulary)
    if len(found) < 16:
        raise UserError(
            f"Task subtoken_induction needs 16 words with and without a space to split, this tokenizer has {len(found)}."
        )
    rng = np.random.default_rng(seed)
    built = _Pairs("subtoken_induction")
    while len(built.rows) < n:
        word, other = (found[int(index)] for index in rng.choice(len(found), 2, replace=False))
        if word.second == other.second or word.first == other.first:
            continue
        filler = prompts._draw(rng, [index for index in vocabulary.words if index not in (word.whole, other.whole)], 10)
        sides = [
            [*vocabulary.start, *filler[:5], inside, *filler[5:], word.first] for inside in (word.whole, other.whole)
        ]
        built.add(sides, [word.second], [other.second])
    return built.build()


TASKS: dict[str, Callable[[Vocabulary, int, int], Task]] = {
    "induction": induction,
    "indirect_object": indirect_object,
    "successor": successor,
    "greater_than": greater_than,
    "agreement": agreement,
    "subtoken_induction": subtoken_induction,
}
"""Name to (vocabulary, number of pairs, seed) -> `Task`."""


def make(name: str, vocabulary: Vocabulary, n: int = 64, seed: int = 0) -> Task:
    """The prompts of a task.

    Raises:
        UserError: there is no such task, or the tokenizer lacks what it needs.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name](vocabulary, n, seed)
