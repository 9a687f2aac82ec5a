"""Short readable rules for when a unit is active, learned from windows of text without a language model.

One of a rule's terms must hold at a token; a term is one to three conditions on the token, its neighbours and the text
before it, all inside the window. Rules are a proxy: they find forms and words, not meanings.

Greedy learning tries all single conditions, and the best of them joined with all others. The term that most raises

    (share of active windows where the rule holds at an active token
     + share of silent windows where it holds nowhere) / 2

is added, until none raises it by more than its length costs.
"""

from __future__ import annotations

import functools
import string
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lorsa_utils.autointerp.examples import WIDTH, Corpus, Windows

RECENT = 8
"""Tokens that "shortly before" reaches back."""
MAX_TERMS = 4
MAX_CONDITIONS = 3
COST = 0.01
"""Rise of the objective that each condition must bring."""
BEAM = 20
CAUTION = (1.0, 1.5, 2.0)
"""Standard errors by which a term of one, two or three conditions must beat nothing; long terms are many."""


# ---- classes of tokens

_NUMERALS = "one two three four five six seven eight nine ten hundred thousand million billion first second third"
_WORDS = {
    "a determiner": "a an the this that these those each every some any no all both",
    "a preposition": "of in to for with on at by from as into about between through over under after before during "
    "against within without",
    "a pronoun": "he she it they we you i him her them us me his its their our your my who whom whose",
    "an auxiliary verb": "is are was were be been being has have had do does did will would can could may might shall "
    "should must",
    "a conjunction": "and or but nor so because although while if when where than that which",
    "a word of dates": "january february march april may june july august september october november december monday "
    "tuesday wednesday thursday friday saturday sunday century year years day days month months",
}
_ENDINGS = ("ing", "ed", "s", "ly", "ion", "er", "al", "y", "e")


def classes_of(text: str) -> dict[str, bool]:
    """English names of token classes, and whether a token is of each."""
    word, tail = text.strip(), text[1:]
    letters, lower = word.isalpha(), word.lower()
    return {
        "a digit": word.isdigit(),
        "a number word": lower in _NUMERALS.split(),
        "a capitalised word": word[:1].isupper() and word[1:].islower(),
        "a word in capitals": len(word) > 1 and letters and text.isupper(),
        "a single letter": len(word) == 1 and letters,
        "the beginning of a lower-case word": text[:1] == " " and tail.isalpha() and tail.islower(),
        "a later piece of a word": text[:1].isalpha(),
        "a later piece of a word, of at most two letters": text.isalpha() and len(text) < 3,
        "a word of eight letters or more": letters and len(word) > 7,
        "a punctuation mark": bool(word) and set(word) <= set(string.punctuation),
        "the end of a sentence": word[-1:] in (".", "!", "?"),
        "an opening bracket": word[-1:] in ("(", "[", "{"),
        "a closing bracket": word[:1] in (")", "]", "}"),
        "a quotation mark": bool(set(text) & set("\"'`“”‘’")),
        "a dash or hyphen": word in ("-", "–", "—", "--"),
        "a line break": "\n" in text,
        "white space": text.isspace(),
        "a mathematical sign": bool(word) and set(word) <= set("+-*/=<>^|&%~"),
        "an underscore": "_" in text,
        "a character outside ASCII": not text.isascii(),
        **{name: lower in words.split() for name, words in _WORDS.items()},
        **{f"a piece that ends in -{end}": len(word) > len(end) and text.endswith(end) for end in _ENDINGS},
    }


_OFFSETS = {"token": 0, "previous": 1, "next": -1, "two back": 2}
_REACH = {"recent": RECENT, "earlier": WIDTH}
RELATIONS = {"token": 32, "previous": 16, "next": 12, "two back": 8, "recent": 24, "earlier": 24}
"""Relations, and how many token ids are tried in each."""
_WITH_CLASSES = ("token", "previous", "next", "recent")
"""Relations in which classes are tried, too."""


class Condition(NamedTuple):
    """One condition on a token."""

    where: str
    """From `RELATIONS`, or `state`."""
    what: int | str
    """A token id or a name of `classes_of`; for `state` one of `_View.states`."""


class Term(NamedTuple):
    """Conditions that hold together."""

    conditions: tuple[Condition, ...]
    strength: float
    """Mean activation over the unit's largest where they held in learning."""


Rule = tuple[Term, ...]
"""Holds at a token where one of its terms does."""


@functools.lru_cache(maxsize=16)
def token_classes(corpus: Corpus) -> dict[str, np.ndarray]:
    """Which token ids are of each class, bool [n_ids + 1]; the last is no token (-1)."""
    table = {name: np.zeros(max(corpus.strings, default=0) + 2, dtype=bool) for name in classes_of("")}
    for token, text in corpus.strings.items():
        for name, is_one in classes_of(text).items():
            table[name][token] = is_one
    return table


# ---- conditions


def _shifted(values: np.ndarray, by: int, fill: int | bool) -> np.ndarray:
    """[n, WIDTH], moved right by `by` columns."""
    result = np.roll(values, by, axis=1)
    result[:, : max(by, 0)] = fill
    result[:, values.shape[1] + min(by, 0) :] = fill
    return result


def _inside(opening: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """Columns after an opening mark that is not closed yet."""
    columns = np.arange(WIDTH)
    opened, closed = (np.maximum.accumulate(np.where(mark, columns, -1), axis=1) for mark in (opening, closing))
    opened = _shifted(opened, 1, -1)
    return (opened >= 0) & (opened >= closed)


class _View:
    def __init__(self, windows: Windows) -> None:
        self.windows, self.tokens = windows, windows.tokens
        self.real = self.tokens >= 0
        self.classes = token_classes(windows.corpus)

    @functools.cached_property
    def states(self) -> dict[str, np.ndarray]:
        """Conditions on a token's place, by their English after a noun, bool [n, WIDTH]."""
        tokens, columns = self.tokens, np.arange(WIDTH)
        same = (tokens[:, :, None] == tokens[:, None, :]) & (columns[:, None] > columns) & self.real[:, :, None]
        before = np.where(same, columns, -1).max(axis=2)  # the last earlier occurrence
        repeated = before >= 0
        after_it = np.take_along_axis(tokens, np.minimum(before + 1, WIDTH - 1), axis=1)
        next_same = repeated & (after_it >= 0) & (after_it == _shifted(tokens, -1, -1))
        marks = ("an opening bracket", "a closing bracket", "a quotation mark")
        opening, closing, quote = (self.classes[name][tokens] for name in marks)
        starts = self.windows.opens[:, None] & (columns < 8)
        return {
            "that occurred earlier": repeated,
            "right after a token that occurred earlier": _shifted(repeated, 1, False),
            "that followed the same token earlier": _shifted(next_same, 1, False),
            "whose next token followed it earlier, too": next_same,
            "inside brackets": _inside(opening, closing),
            "inside quotation marks": ((np.cumsum(quote, axis=1) - quote) % 2 == 1) & ~quote,
            "at the very beginning of the text": starts & (columns == 0),
            "among the first eight tokens of the text": starts,
        }

    def holds(self, condition: Condition) -> np.ndarray:
        """Bool [n, WIDTH]."""
        where, what = condition
        if where == "state":
            return self.states[str(what)] & self.real
        here = self.classes[what][self.tokens] if isinstance(what, str) else self.tokens == what
        if where in _OFFSETS:
            return _shifted(here, _OFFSETS[where], False) & self.real
        count = np.pad(np.cumsum(here, axis=1), ((0, 0), (1, 0)))
        columns = np.arange(WIDTH)
        return (count[:, columns] > count[:, np.maximum(columns - _REACH[where], 0)]) & self.real

    def candidates(self) -> list[Condition]:
        """Conditions worth trying."""
        conditions: list[Condition] = []
        for where, n in RELATIONS.items():
            whats = [*self._frequent_tokens(where)[:n], *(self.classes if where in _WITH_CLASSES else ())]
            conditions += [Condition(where, what) for what in whats]
        return [*conditions, *(Condition("state", name) for name in self.states)]

    def _frequent_tokens(self, where: str) -> list[int]:
        """Ids by how far their share of active windows, in this relation, exceeds that of silent windows, anywhere.

        In `recent` and `earlier` the peaks' main sources count once more.
        """
        windows, tokens = self.windows, self.tokens
        row, column = np.nonzero(windows.values > 0)
        sources: Counter[int] = Counter()
        if where in _OFFSETS:
            active = _count_windows(row, _shifted(tokens, _OFFSETS[where], -1)[row, column])
        else:
            earlier = np.maximum(column[:, None] - np.arange(1, 1 + _REACH[where]), 0)
            active = _count_windows(row[:, None], tokens[row[:, None], earlier])
            sources.update(windows.sources[:, 0].tolist())
        silent_rows = np.flatnonzero(~windows.active)
        silent = _count_windows(silent_rows[:, None], tokens[silent_rows])
        n_active, n_silent = max(1, int(windows.active.sum())), max(1, len(silent_rows))
        worth = {
            token: (count + sources[token]) / n_active - silent[token] / n_silent
            for token, count in active.items()
            if count > 1
        }
        return sorted(worth, key=lambda token: (-worth[token], token))


def _count_windows(rows: np.ndarray, tokens: np.ndarray) -> Counter[int]:
    real = tokens >= 0
    codes = np.unique((np.broadcast_to(rows, tokens.shape)[real] << 32) + tokens[real])
    return Counter((codes & 0xFFFFFFFF).tolist())


# ---- learning


class _Learner:
    """Learns from `holds` [n, WIDTH, n_conditions], at active tokens of active windows and all tokens of silent ones.

    A term is a tuple of condition numbers.
    """

    def __init__(self, holds: np.ndarray, windows: Windows) -> None:
        self.active = windows.active
        self.row, column = np.nonzero((windows.values > 0) | ~self.active[:, None])
        self.holds = holds[self.row, column]
        self.covered = np.zeros(len(windows), dtype=bool)
        """Windows in which a chosen term holds."""
        self.singles = self.hits(())

    def hits(self, term: tuple[int, ...]) -> np.ndarray:
        """Windows in which the term and each condition hold together, bool [n, n_conditions]."""
        here = self.holds[:, list(term)].all(axis=1)
        result = np.zeros((len(self.active), self.holds.shape[1]), dtype=bool)
        rows, starts = np.unique(self.row[here], return_index=True)
        if len(rows):
            result[rows] = np.logical_or.reduceat(self.holds[here], starts, axis=0)
        return result

    def gains(self, hits: np.ndarray, n_conditions: int) -> np.ndarray:
        """Rise of the objective for each term, less its cost and an allowance for chance."""
        new = hits & ~self.covered[:, None]
        (good, good_variance), (harm, harm_variance) = (_share(new[side]) for side in (self.active, ~self.active))
        error = np.sqrt(good_variance + harm_variance) / 2
        return (good - harm) / 2 - CAUTION[n_conditions - 1] * error - COST * n_conditions

    def best_term(self) -> tuple[tuple[int, ...], float]:
        """The term of most gain, and its gain, by beam search."""
        gains = self.gains(self.singles, 1)
        best: tuple[int, ...] = (int(gains.argmax()),)
        best_gain = float(gains.max())
        # What hits many active windows may become good once another condition rules silent ones out.
        many = self.singles[self.active & ~self.covered].sum(axis=0).argsort()[::-1]
        starts = [*gains.argsort()[::-1][: BEAM // 2].tolist(), *many[: BEAM // 2].tolist()]
        beam: list[tuple[int, ...]] = [(index,) for index in dict.fromkeys(starts)]
        for length in range(2, MAX_CONDITIONS + 1):
            longer: dict[tuple[int, ...], float] = {}
            for term in beam:
                gains = self.gains(self.hits(term), length)
                gains[list(term)] = -1.0
                for index in gains.argsort()[::-1][:3].tolist():
                    longer[tuple(sorted((*term, index)))] = float(gains[index])
            ranked = sorted(longer, key=lambda term: -longer[term])
            if ranked and longer[ranked[0]] > best_gain:
                best, best_gain = ranked[0], longer[ranked[0]]
            beam = ranked[: BEAM // 3]
        return best, best_gain


def _share(hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of windows, and its variance, above zero even for 0 and 1 (Agresti and Coull's estimate)."""
    n, share = len(hits), hits.mean(axis=0)
    near = (share * n + 2) / (n + 4)
    return share, near * (1 - near) / (n + 4)


def learn(windows: Windows) -> Rule:
    """Learn a rule; it has no terms when nothing tells active from silent windows."""
    view = _View(windows)
    conditions = view.candidates()
    holds = np.stack([view.holds(condition) for condition in conditions], axis=2)
    learner = _Learner(holds, windows)
    maximum = max(float(windows.values.max()), 1e-30)
    terms: list[Term] = []
    while len(terms) < MAX_TERMS:
        term, gain = learner.best_term()
        if gain <= 0:
            break
        learner.covered |= learner.hits(term)[:, term[0]]
        where = holds[:, :, list(term)].all(axis=2)
        strength = float(windows.values[where].mean() / maximum) if where.any() else 0.0
        terms.append(Term(tuple(conditions[index] for index in term), strength))
    return tuple(terms)


def predict(rule: Rule, windows: Windows) -> np.ndarray:
    """Predicted activation over the unit's largest, 0 where the rule does not hold: [n, WIDTH]."""
    view = _View(windows)
    result = np.zeros(windows.tokens.shape)
    for term in rule:
        holds = np.logical_and.reduce([view.holds(condition) for condition in term.conditions])
        result = np.maximum(result, holds * max(term.strength, 1e-6))
    return result


# ---- English

_PHRASES = {
    "previous": "right after {}",
    "next": "right before {}",
    "two back": "two tokens after {}",
    "recent": f"with {{}} among the {RECENT} tokens before",
    "earlier": "with {} earlier in the text",
    "state": "{}",
}


def describe(rule: Rule, strings: Mapping[int, str]) -> str:
    """The rule as a sentence."""
    if not rule:
        return "No rule was found."

    def english(what: int | str) -> str:
        if isinstance(what, str):
            return what
        shown = strings.get(what, "?").replace("\n", "\\n").replace("\t", "\\t")
        return f'"{shown}"'

    plain: list[str] = []
    others: list[str] = []
    for term in rule:
        nouns = [english(what) for where, what in term.conditions if where == "token"]
        phrases = [_PHRASES[where].format(english(what)) for where, what in term.conditions if where != "token"]
        if phrases or len(nouns) > 1:
            others.append(" ".join([" that is also ".join(nouns) or "a token", ", and ".join(phrases)]).strip())
        else:
            plain += nouns
    return "Active on " + "; or on ".join(filter(None, [" or ".join(plain), *others])) + "."
