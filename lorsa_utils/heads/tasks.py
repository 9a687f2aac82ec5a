"""Tasks for circuit discovery: pairs of a clean and a corrupted prompt of equal length.

They differ in what decides the answer, so giving nodes their corrupted outputs on clean prompts moves the metric.

| task | clean | corrupted | source |
|---|---|---|---|
| induction | r1 .. rn r1 .. rk says r(k+1) | the first half in another order: other followers | Elhage et al. 2021 |
| indirect_object | Mary and John went .., and John gave .. to: Mary | .. and Mary gave .. to: John | Wang et al. 2022 |
| successor | Monday, Tuesday, Wednesday, : Thursday | another stretch of the same series | Gould et al. 2023 |
| greater_than | from the year 1742 to the year 17: a digit above 4 | from the year 1702 | Hanna et al. 2023 |
| agreement | The cars near the tree: are | The car near the tree: is | Linzen et al. 2016 |
| subtoken_induction | .. [ Marion] .. [Mar] says [ion] | another word in its place | paper, Sec. 6 |
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import prompts
from lorsa_utils.heads.prompts import Vocabulary, draw, fill, listed, pad, pick, require

LEAST_ACCURACY = 0.75
"""Share of prompts on which a model that can do the task prefers the right answer; chance is 1/2."""
METRICS = ("logit_difference", "loss", "kl")


@dataclass(frozen=True, repr=False)
class Task:
    """Pairs of prompts of one task."""

    name: str
    clean: Tensor
    """[n, length] int64, padded on the right."""
    corrupted: Tensor
    """[n, length]."""
    position: Tensor
    """[n], last token of each prompt before the padding."""
    answers: Tensor
    """[n, most answers], right tokens after the clean prompt, padded with -1."""
    wrong: Tensor
    """[n, most wrong answers], padded with -1."""

    def __len__(self) -> int:
        return len(self.clean)

    def rows(self, rows: slice | Tensor) -> Task:
        """Some of the pairs."""
        sides = (self.clean, self.corrupted, self.position, self.answers, self.wrong)
        return Task(self.name, *(side[rows] for side in sides))

    def split(self) -> tuple[Task, Task]:
        """Pairs to discover circuits on (even numbers) and held-out ones (odd)."""
        return self.rows(slice(0, None, 2)), self.rows(slice(1, None, 2))


def metric(name: str, logits: Tensor, task: Task, reference: Tensor | None = None) -> Tensor:
    """A number for each prompt, larger when the model does the task better, from logits after it [n, vocabulary].

    `logit_difference`: log-sum-exp of the right answers' logits minus that of the wrong ones'; `loss`: minus the
    cross-entropy of the right answers, in nats; `kl`: minus the KL divergence from the untouched model, in nats, whose
    logits are the `reference`.

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
    """Share of prompts on which right answers are together more likely than wrong ones."""
    return float((metric("logit_difference", logits, task) > 0).double().mean())


def require_able(name: str, accuracy: float) -> None:
    """Raise a `UserError` for a task that the model cannot do."""
    if accuracy < LEAST_ACCURACY:
        raise UserError(
            f"The model prefers the right answer on only {accuracy:.0%} of the prompts of {name} (chance is 50 %, "
            f"{LEAST_ACCURACY:.0%} are asked for), so there is no circuit to find; choose another task."
        )


# ---- building


class Pair(NamedTuple):
    """A clean prompt and its corrupted partner."""

    clean: Sequence[int]
    corrupted: Sequence[int]
    answers: Sequence[int]
    wrong: Sequence[int]


def _task(name: str, pairs: Sequence[Pair]) -> Task:
    """Pad pairs to a task; a `UserError` for unusable ones."""
    if not pairs:
        raise UserError(f"Task {name} has no prompt; give at least one.")
    for pair in pairs:
        if len(pair.clean) != len(pair.corrupted):
            raise UserError(
                f"A clean prompt of {name} has {len(pair.clean)} tokens and its corrupted one {len(pair.corrupted)}; "
                "nodes are exchanged position by position, so give pairs of equal length in tokens."
            )
        if set(pair.answers) & set(pair.wrong):
            raise UserError(
                f"A prompt of {name} has a token that is both a right and a wrong answer; give different ones."
            )
    clean, corrupted, answers, wrong = zip(*pairs, strict=True)
    position = torch.tensor([len(row) - 1 for row in clean])
    return Task(name, pad(clean), pad(corrupted), position, pad(answers, -1), pad(wrong, -1))


def from_texts(vocabulary: Vocabulary, name: str, pairs: Sequence[Mapping[str, Any]]) -> Task:
    """Your own task, from the texts `clean`, `corrupted`, `answer` and `wrong` (answers with their leading space).

    Raises:
        UserError: no pair, a missing text, an answer of several tokens or both right and wrong, or prompts of a pair
            that differ in length in tokens.
    """
    rows = []
    for number, pair in enumerate(pairs, start=1):
        if missing := [key for key in ("clean", "corrupted", "answer", "wrong") if not isinstance(pair.get(key), str)]:
            raise UserError(
                f"Pair {number} of {name} has no text under {missing[0]!r}; give clean, corrupted, answer and wrong."
            )
        answer, wrong = (_one_token(vocabulary, pair[key], f"pair {number} of {name}") for key in ("answer", "wrong"))
        clean, corrupted = (vocabulary.start + vocabulary.encode(pair[key]) for key in ("clean", "corrupted"))
        rows.append(Pair(clean, corrupted, [answer], [wrong]))
    return _task(name, rows)


def _one_token(vocabulary: Vocabulary, text: str, where: str) -> int:
    ids = vocabulary.encode(text)
    if len(ids) != 1:
        pieces = " + ".join(repr(vocabulary.tokenizer.decode([index])) for index in ids)
        raise UserError(
            f"The answer {text!r} of {where} is {len(ids)} tokens ({pieces}); give one that is a single token."
        )
    return ids[0]


# ---- tasks: endless pairs


def induction(vocabulary: Vocabulary, rng: Generator) -> Iterator[Pair]:
    """Ten random tokens, then the first five of them once more.

    When corrupted, the last token has another follower at another place, so that heads that look up its place matter.
    """
    again, pool = 5, require(10, list(vocabulary.texts), "different tokens")
    while True:
        first = other = draw(rng, pool, 10)
        place = again
        while place in (again, 10) or other[place] == first[again]:
            other = [first[int(i)] for i in rng.permutation(10)]
            place = other.index(first[again - 1]) + 1
        clean, corrupted = (vocabulary.start + half + first[:again] for half in (first, other))
        yield Pair(clean, corrupted, [first[again]], [other[place]])


def indirect_object(vocabulary: Vocabulary, rng: Generator) -> Iterator[Pair]:
    """Two names, one of them again; asks for the other."""
    names = prompts.names(vocabulary)
    while True:
        template = pick(rng, prompts.TEMPLATES)
        a, b = draw(rng, names, 2)
        giver, receiver = (a, b) if rng.integers(2) else (b, a)
        clean, corrupted = (fill(template, vocabulary, {"A": a, "B": b, "S": name})[0] for name in (giver, receiver))
        yield Pair(clean, corrupted, [receiver], [giver])


def successor(vocabulary: Vocabulary, rng: Generator) -> Iterator[Pair]:
    """Three members of a series; asks for the next."""
    comma = vocabulary.encode(",")[0]
    stretches = [stretch.tokens for stretch in prompts.stretches(vocabulary).values()]
    require(1, stretches, "series (days, letters, ...) of single tokens")
    while True:
        stretch = pick(rng, stretches)
        begins = draw(rng, range(len(stretch) - 3), 2)
        opening = vocabulary.start + vocabulary.encode(pick(rng, prompts.OPENINGS[1:]))
        clean, corrupted = (
            opening + [token for member in stretch[b : b + 3] for token in (member, comma)] for b in begins
        )
        yield Pair(clean, corrupted, [stretch[begins[0] + 3]], [stretch[begins[1] + 3]])


_EVENTS = ("war", "project", "journey", "reign", "study", "trial", "drought", "contract")


def greater_than(vocabulary: Vocabulary, rng: Generator) -> Iterator[Pair]:
    """The third digit of a later year, for tokenizers that cut numbers into digits.

    Digits above the first year's are right, those below wrong; when corrupted, the first year's third digit is 0.
    """
    digits = list(vocabulary.singles("0123456789", "").values())
    if len(digits) < 10 or len(vocabulary.encode("1742")) != 4:
        raise UserError("needs a tokenizer that cuts numbers into single digits.")
    while True:
        event = pick(rng, _EVENTS)
        century, third, last = int(rng.integers(11, 19)), int(rng.integers(3, 8)), int(rng.integers(1, 9))
        text = f"The {event} lasted from the year {century}{{}}{last} to the year {century}"
        clean, corrupted = (vocabulary.start + vocabulary.encode(text.format(digit)) for digit in (third, 0))
        yield Pair(clean, corrupted, digits[third + 1 :], digits[:third])


_NOUNS = listed("car dog book girl boy friend teacher house farmer doctor key picture tree river king")
_BETWEEN = ("near the{M}", "behind the{M}", "next to the{M}", "that the{M} likes", "in front of the{M}")


def agreement(vocabulary: Vocabulary, rng: Generator) -> Iterator[Pair]:
    """The verb's number agrees with the subject, not with a noun in between."""
    nouns = [list(vocabulary.singles((noun, noun + "s")).values()) for noun in _NOUNS]
    whole = [numbers for numbers in nouns if len(numbers) == 2]
    verbs = list(vocabulary.singles(("is", "are")).values())
    if len(whole) < 4 or len(verbs) < 2:
        raise UserError("needs nouns whose singular and plural are single tokens, and ` is` and ` are`.")
    while True:
        subject, middle = draw(rng, whole, 2)
        number, template = int(rng.integers(2)), pick(rng, _BETWEEN)
        between = middle[0] if "likes" in template else pick(rng, middle)
        clean, corrupted = (
            fill("The{S} " + template, vocabulary, {"S": subject[i], "M": between})[0] for i in (number, 1 - number)
        )
        yield Pair(clean, corrupted, [verbs[number]], [verbs[1 - number]])


def subtoken_induction(vocabulary: Vocabulary, rng: Generator) -> Iterator[Pair]:
    """A word as one token, later its first part; asks for the second."""
    split = prompts.split_words(vocabulary)
    while True:
        word, other = draw(rng, split, 2)
        if word.second != other.second and word.first != other.first:
            filler = draw(rng, [index for index in vocabulary.words if index not in (word.whole, other.whole)], 10)
            clean, corrupted = (
                [*vocabulary.start, *filler[:5], inside, *filler[5:], word.first]
                for inside in (word.whole, other.whole)
            )
            yield Pair(clean, corrupted, [word.second], [other.second])


TASKS: dict[str, Callable[[Vocabulary, Generator], Iterator[Pair]]] = {
    task.__name__: task for task in (induction, indirect_object, successor, greater_than, agreement, subtoken_induction)
}


def make(name: str, vocabulary: Vocabulary, n: int = 64, seed: int = 0) -> Task:
    """`n` pairs of a task.

    Raises:
        UserError: there is no such task, or the tokenizer lacks what it needs.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}.")
    try:
        pairs = list(itertools.islice(TASKS[name](vocabulary, np.random.default_rng(seed)), n))
    except UserError as error:
        raise UserError(f"Task {name} {error}") from error
    return _task(name, pairs)


def from_file(vocabulary: Vocabulary, path: str | Path) -> Task:
    """`from_texts` of a JSON Lines file, named after it.

    Raises:
        UserError: the file cannot be read, has fewer than two pairs, or see `from_texts`.
    """
    file = Path(path)
    try:
        pairs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"Cannot read {file} ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON lines ({error}); write one object per line.") from error
    if len(pairs) < 2 or not all(isinstance(pair, dict) for pair in pairs):
        raise UserError(
            f"{file} needs at least two pairs, one JSON object per line: half of them rank nodes, half measure."
        )
    return from_texts(vocabulary, file.stem, pairs)
