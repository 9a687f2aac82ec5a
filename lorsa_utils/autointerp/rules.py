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
from collections.abc import Callable, Mapping, Sequence
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

Test = Callable[[str, str], bool]
"""Takes a token's text as it is and stripped."""


def _word_of(words: str) -> Test:
    known = frozenset(words.split())
    return lambda text, word: word.lower() in known


def _ends_in(ending: str) -> Test:
    return lambda text, word: len(word) > len(ending) and text.endswith(ending)


SHAPES: dict[str, tuple[str, Test]] = {
    "digit": ("a digit", lambda text, word: word.isdigit()),
    "numeral": (
        "a number word",
        _word_of(
            "one two three four five six seven eight nine ten hundred thousand million billion first second third"
        ),
    ),
    "capitalised": ("a capitalised word", lambda text, word: word[:1].isupper() and word[1:].islower()),
    "upper": ("a word in capitals", lambda text, word: len(word) > 1 and word.isalpha() and text.isupper()),
    "letter": ("a single letter", lambda text, word: len(word) == 1 and word.isalpha()),
    "word": (
        "the beginning of a lower-case word",
        lambda text, word: text[:1] == " " and text[1:].isalpha() and text[1:].islower(),
    ),
    "piece": ("a later piece of a word", lambda text, word: text[:1].isalpha()),
    "short piece": (
        "a later piece of a word, of at most two letters",
        lambda text, word: text.isalpha() and len(text) < 3,
    ),
    "long": ("a word of eight letters or more", lambda text, word: word.isalpha() and len(word) > 7),
    "punctuation": ("a punctuation mark", lambda text, word: bool(word) and set(word) <= set(string.punctuation)),
    "sentence end": ("the end of a sentence", lambda text, word: word[-1:] in (".", "!", "?")),
    "opening": ("an opening bracket", lambda text, word: word[-1:] in ("(", "[", "{")),
    "closing": ("a closing bracket", lambda text, word: word[:1] in (")", "]", "}")),
    "quote": ("a quotation mark", lambda text, word: bool(set(text) & set("\"'`“”‘’"))),
    "dash": ("a dash or hyphen", lambda text, word: word in ("-", "–", "—", "--")),
    "newline": ("a line break", lambda text, word: "\n" in text),
    "space": ("white space", lambda text, word: text.isspace()),
    "symbol": ("a mathematical sign", lambda text, word: bool(word) and set(word) <= set("+-*/=<>^|&%~")),
    "underscore": ("an underscore", lambda text, word: "_" in text),
    "not ascii": ("a character outside ASCII", lambda text, word: not text.isascii()),
    "determiner": ("a determiner", _word_of("a an the this that these those each every some any no all both")),
    "preposition": (
        "a preposition",
        _word_of(
            "of in to for with on at by from as into about between through over under after before during against "
            "within without"
        ),
    ),
    "pronoun": (
        "a pronoun",
        _word_of("he she it they we you i him her them us me his its their our your my who whom whose"),
    ),
    "auxiliary": (
        "an auxiliary verb",
        _word_of(
            "is are was were be been being has have had do does did will would can could may might shall should must"
        ),
    ),
    "conjunction": (
        "a conjunction",
        _word_of("and or but nor so because although while if when where than that which"),
    ),
    "calendar": (
        "a word of dates",
        _word_of(
            "january february march april may june july august september october november december monday tuesday "
            "wednesday thursday friday saturday sunday century year years day days month months"
        ),
    ),
    **{
        f"-{ending}": (f"a piece that ends in -{ending}", _ends_in(ending))
        for ending in ("ing", "ed", "s", "ly", "ion", "er", "al", "y", "e")
    },
}
"""English names and tests of token classes."""

_SHAPE_NAMES = tuple(SHAPES)

STATES = {
    "repeated": "that occurred earlier",
    "after repeated": "right after a token that occurred earlier",
    "same as then": "that followed the same token earlier",
    "before same": "whose next token followed it earlier, too",
    "in brackets": "inside brackets",
    "in quotes": "inside quotation marks",
    "first": "at the very beginning of the text",
    "beginning": "among the first eight tokens of the text",
}
"""Conditions on a token's place, and their English after a noun."""

_OFFSETS = {"token": 0, "previous": 1, "next": -1, "two back": 2}
_REACH = {"recent": RECENT, "earlier": WIDTH}
RELATIONS = (*_OFFSETS, *_REACH)


class Condition(NamedTuple):
    """One condition on a token."""

    where: str
    """From `RELATIONS`, or `state`."""
    what: int | str
    """A token id or a class of `SHAPES`; for `state` one of `STATES`."""


class Term(NamedTuple):
    """Conditions that hold together."""

    conditions: tuple[Condition, ...]
    strength: float
    """Mean activation over the unit's largest where they held in learning."""


class Rule(NamedTuple):
    """Holds at a token where one of its terms does."""

    terms: tuple[Term, ...]


@functools.lru_cache(maxsize=16)
def token_classes(corpus: Corpus) -> np.ndarray:
    """Which of `SHAPES` every token id is, bool [n_ids + 1, n_classes]; the last row is for no token (-1)."""
    table = np.zeros((max(corpus.strings, default=0) + 2, len(SHAPES)), dtype=bool)
    for token, text in corpus.strings.items():
        table[token] = [test(text, text.strip()) for _, test in SHAPES.values()]
    return table


# ---- conditions


def _shifted(values: np.ndarray, by: int, fill: int | bool) -> np.ndarray:
    """Moved right by `by` columns, [n, WIDTH, ...]."""
    result = np.roll(values, by, axis=1)
    result[:, : max(by, 0)] = fill
    result[:, values.shape[1] + min(by, 0) :] = fill
    return result


def _related(where: str, holds: np.ndarray) -> np.ndarray:
    """Where `holds` is true of a token in the relation `where`, [n, WIDTH, ...] to the same."""
    if where in _OFFSETS:
        return _shifted(holds, _OFFSETS[where], False)
    count = np.zeros((holds.shape[0], holds.shape[1] + 1, *holds.shape[2:]), dtype=np.int16)
    np.cumsum(holds, axis=1, out=count[:, 1:])
    columns = np.arange(holds.shape[1])
    return count[:, columns] > count[:, np.maximum(columns - _REACH[where], 0)]


def _inside(opening: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """Columns after an opening mark that is not closed yet."""
    result = np.zeros(opening.shape, dtype=bool)
    is_open = np.zeros(len(opening), dtype=bool)
    for column in range(opening.shape[1]):
        is_open = is_open & ~closing[:, column]
        result[:, column] = is_open
        is_open = is_open | opening[:, column]
    return result


class _View:
    def __init__(self, windows: Windows) -> None:
        self.windows, self.tokens = windows, windows.tokens
        self.real = self.tokens >= 0
        self.classes = token_classes(windows.corpus)[self.tokens]

    @functools.cached_property
    def states(self) -> dict[str, np.ndarray]:
        """Bool [n, WIDTH] each."""
        tokens, real, columns = self.tokens, self.real, np.arange(WIDTH)
        same = (tokens[:, :, None] == tokens[:, None, :]) & (columns[:, None] > columns) & real[:, :, None]
        before = np.where(same, columns, -1).max(axis=2)  # the last earlier occurrence
        repeated = before >= 0
        after_it = np.take_along_axis(tokens, np.minimum(before + 1, WIDTH - 1), axis=1)
        next_same = repeated & (after_it >= 0) & (after_it == _shifted(tokens, -1, -1))
        opening, closing, quote = (
            self.classes[..., _SHAPE_NAMES.index(name)] for name in ("opening", "closing", "quote")
        )
        starts = self.windows.opens[:, None] & real
        return {
            "repeated": repeated,
            "after repeated": _shifted(repeated, 1, False) & real,
            "same as then": _shifted(next_same, 1, False),
            "before same": next_same,
            "in brackets": _inside(opening, closing) & real,
            "in quotes": ((np.cumsum(quote, axis=1) - quote) % 2 == 1) & real & ~quote,
            "first": starts & (columns == 0),
            "beginning": starts & (columns < 8),
        }

    def holds(self, condition: Condition) -> np.ndarray:
        """Bool [n, WIDTH]."""
        where, what = condition
        if where == "state":
            return self.states[str(what)]
        here = self.classes[..., _SHAPE_NAMES.index(what)] if isinstance(what, str) else self.tokens == what
        return _related(where, here) & self.real

    def candidates(self) -> tuple[list[Condition], np.ndarray]:
        """Conditions worth trying, and where each holds, bool [n, WIDTH, n_conditions]."""
        conditions: list[Condition] = []
        holds = []
        for where, n in _TRIED.items():
            tokens = self._frequent_tokens(where, n)
            conditions += [Condition(where, token) for token in tokens]
            holds.append(_related(where, self.tokens[..., None] == np.array(tokens, dtype=np.int64)))
            if where in ("token", "previous", "next", "recent"):
                conditions += [Condition(where, name) for name in _SHAPE_NAMES]
                holds.append(_related(where, self.classes))
        conditions += [Condition("state", name) for name in self.states]
        holds.append(np.stack(list(self.states.values()), axis=2))
        return conditions, np.concatenate(holds, axis=2) & self.real[..., None]

    def _frequent_tokens(self, where: str, n: int) -> list[int]:
        """The `n` ids whose share of active windows, in this relation, most exceeds that of silent windows, anywhere.

        In `recent` and `earlier` the peaks' main sources count once more.
        """
        windows, tokens = self.windows, self.tokens
        row, column = np.nonzero((windows.values > 0) & self.real)
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
        return sorted(worth, key=lambda token: (-worth[token], token))[:n]


_TRIED = {"token": 32, "previous": 16, "next": 12, "two back": 8, "recent": 24, "earlier": 24}
"""Token ids tried."""


def _count_windows(rows: np.ndarray, tokens: np.ndarray) -> Counter[int]:
    real = tokens >= 0
    codes = np.unique((np.broadcast_to(rows, tokens.shape)[real] << 32) + tokens[real])
    return Counter((codes & 0xFFFFFFFF).tolist())


# ---- learning


class Hits(NamedTuple):
    """Windows in which each of m terms holds."""

    active: np.ndarray
    """At an active token, bool [n_active, m]."""
    silent: np.ndarray
    """Anywhere, bool [n_silent, m]."""


class _Counts:
    def __init__(self, holds: np.ndarray, windows: Windows) -> None:
        active = windows.active
        row, column = np.nonzero((windows.values[active] > 0) & (windows.tokens[active] >= 0))
        self.at_active, self.row, self.n_active = holds[active][row, column], row, int(active.sum())
        self.at_silent = holds[~active]

    def joined(self, conditions: Sequence[int]) -> Hits:
        chosen = list(conditions)
        here = self.at_active[:, chosen].all(axis=1)
        row, column = np.nonzero(self.at_silent[:, :, chosen].all(axis=2))
        return Hits(
            _any_by_row(self.at_active[here], self.row[here], self.n_active),
            _any_by_row(self.at_silent[row, column], row, len(self.at_silent)),
        )


def _any_by_row(holds: np.ndarray, row: np.ndarray, n: int) -> np.ndarray:
    """[n_tokens, m] with sorted rows [n_tokens] to [n, m]."""
    result = np.zeros((n, holds.shape[1]), dtype=bool)
    if len(row):
        rows, starts = np.unique(row, return_index=True)
        result[rows] = np.logical_or.reduceat(holds, starts, axis=0)
    return result


def learn(windows: Windows) -> Rule:
    """Learn a rule; it has no terms when nothing tells active from silent windows."""
    conditions, holds = _View(windows).candidates()
    counts = _Counts(holds, windows)
    singles = counts.joined([])
    covered, wrong = np.zeros(counts.n_active, dtype=bool), np.zeros(len(counts.at_silent), dtype=bool)
    maximum = max(float(windows.values.max()), 1e-30)
    terms: list[Term] = []
    while len(terms) < MAX_TERMS:
        term, gain = _best_term(counts, singles, covered, wrong)
        if gain <= 0:
            break
        hits = counts.joined(term[:-1]) if len(term) > 1 else singles
        covered |= hits.active[:, term[-1]]
        wrong |= hits.silent[:, term[-1]]
        where = holds[:, :, list(term)].all(axis=2)
        strength = float(windows.values[where].mean() / maximum) if where.any() else 0.0
        terms.append(Term(tuple(conditions[index] for index in term), strength))
    return Rule(tuple(terms))


def _gains(hits: Hits, covered: np.ndarray, wrong: np.ndarray, n_conditions: int) -> np.ndarray:
    """Rise of the objective for each term, less its cost and an allowance for chance."""
    new, harm = (hits.active & ~covered[:, None]).mean(axis=0), (hits.silent & ~wrong[:, None]).mean(axis=0)
    error = np.sqrt(_variance(new, len(covered)) + _variance(harm, len(wrong))) / 2
    return (new - harm) / 2 - CAUTION[n_conditions - 1] * error - COST * n_conditions


def _variance(share: np.ndarray, n: int) -> np.ndarray:
    """Variance of a share, above zero even for 0 and 1 (Agresti and Coull's estimate)."""
    near = (share * n + 2) / (n + 4)
    return near * (1 - near) / (n + 4)


def _best_term(counts: _Counts, singles: Hits, covered: np.ndarray, wrong: np.ndarray) -> tuple[tuple[int, ...], float]:
    """Beam search."""
    gains = _gains(singles, covered, wrong, 1)
    best: tuple[int, ...] = (int(gains.argmax()),)
    best_gain = float(gains.max())
    # What hits many active windows may become good once another condition rules silent ones out.
    many = (singles.active & ~covered[:, None]).sum(axis=0).argsort()[::-1]
    starts = [*gains.argsort()[::-1][: BEAM // 2].tolist(), *many[: BEAM // 2].tolist()]
    beam: list[tuple[int, ...]] = [(index,) for index in dict.fromkeys(starts)]
    for length in range(2, MAX_CONDITIONS + 1):
        longer: dict[tuple[int, ...], float] = {}
        for term in beam:
            gains = _gains(counts.joined(term), covered, wrong, length)
            gains[list(term)] = -1.0
            for index in gains.argsort()[::-1][:3].tolist():
                longer[tuple(sorted((*term, index)))] = float(gains[index])
        ranked = sorted(longer, key=lambda term: -longer[term])
        if ranked and longer[ranked[0]] > best_gain:
            best, best_gain = ranked[0], longer[ranked[0]]
        beam = ranked[: BEAM // 3]
    return best, best_gain


def predict(rule: Rule, windows: Windows) -> np.ndarray:
    """Predicted activation over the unit's largest, 0 where the rule does not hold: [n, WIDTH]."""
    view = _View(windows)
    result = np.zeros(windows.tokens.shape)
    for term in rule.terms:
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
}


def _noun(what: int | str, strings: Mapping[int, str]) -> str:
    if isinstance(what, str):
        return SHAPES[what][0]
    shown = strings.get(what, "?").replace("\n", "\\n").replace("\t", "\\t")
    return f'"{shown}"'


def describe(rule: Rule, strings: Mapping[int, str]) -> str:
    """The rule as a sentence."""
    if not rule.terms:
        return "No rule was found."
    plain: list[str] = []
    others: list[str] = []
    for term in rule.terms:
        nouns = [_noun(what, strings) for where, what in term.conditions if where == "token"]
        phrases = [_PHRASES[where].format(_noun(what, strings)) for where, what in term.conditions if where in _PHRASES]
        phrases += [STATES[str(what)] for where, what in term.conditions if where == "state"]
        if phrases or len(nouns) > 1:
            others.append(" ".join([" that is also ".join(nouns) or "a token", ", and ".join(phrases)]).strip())
        else:
            plain += nouns
    return "Active on " + "; or on ".join(filter(None, [" or ".join(plain), *others])) + "."
