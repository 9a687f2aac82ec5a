"""Short readable rules for when a unit is active, learned from windows of text: explanations without a language model.

A rule is a list of terms, one of which must hold at a token; a term is one to three conditions on the token, its
neighbours and the text before it. All that a rule looks at can be seen in the window, so a rule knows what any other
judge of the window knows. Rules are a proxy: they find forms and words, not meanings.

Learning is greedy. At each step all single conditions, and the best of them joined with all others, are counted at once
over all windows; the term that raises

    (share of active windows where the rule holds at an active token + share of silent windows where it holds nowhere) /
    2

most is added, until no term raises it by more than its length costs.
"""

from __future__ import annotations

import functools
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lorsa_utils.autointerp.examples import WIDTH, Windows

RECENT = 8
"""Tokens before the current one that "shortly before" means."""
MAX_TERMS = 4
MAX_CONDITIONS = 3
COST = 0.01
"""Rise of the objective that each condition has to bring."""
BEAM = 20
CAUTION = (1.0, 1.5, 2.0)
"""Standard errors by which a term of one, two or three conditions must be better than nothing: there are many more of the long ones."""


# ---- classes of tokens


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words("a an the this that these those each every some any no all both")
_PREPOSITIONS = _words(
    "of in to for with on at by from as into about between through over under after before during against within without"
)
_PRONOUNS = _words("he she it they we you i him her them us me his its their our your my who whom whose")
_AUXILIARIES = _words(
    "is are was were be been being has have had do does did will would can could may might shall should must"
)
_CONJUNCTIONS = _words("and or but nor so because although while if when where than that which")
_CALENDAR = _words(
    "january february march april may june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday century year years day days month months"
)
_NUMERALS = _words(
    "one two three four five six seven eight nine ten hundred thousand million billion first second third"
)

Test = Callable[[str], bool]

SHAPES: dict[str, tuple[str, Test]] = {
    "digit": ("a digit", lambda s: s.strip().isdigit()),
    "numeral": ("a number word", lambda s: s.strip().lower() in _NUMERALS),
    "capitalised": ("a capitalised word", lambda s: s.strip()[:1].isupper() and s.strip()[1:].islower()),
    "upper": ("a word in capitals", lambda s: len(s.strip()) > 1 and s.strip().isalpha() and s.isupper()),
    "letter": ("a single letter", lambda s: len(s.strip()) == 1 and s.strip().isalpha()),
    "word": (
        "the beginning of a lower-case word",
        lambda s: s[:1] == " " and len(s) > 1 and s[1:].isalpha() and s[1:].islower(),
    ),
    "piece": ("a later piece of a word", lambda s: s[:1].isalpha()),
    "short piece": ("a later piece of a word, of at most two letters", lambda s: s.isalpha() and len(s) < 3),
    "long": ("a word of eight letters or more", lambda s: s.strip().isalpha() and len(s.strip()) > 7),
    "punctuation": (
        "a punctuation mark",
        lambda s: bool(s.strip()) and all(c in string.punctuation for c in s.strip()),
    ),
    "sentence end": ("the end of a sentence", lambda s: s.strip()[-1:] in (".", "!", "?") and s.strip()[-1:] != ""),
    "opening": ("an opening bracket", lambda s: s.strip()[-1:] in tuple("([{") and s.strip() != ""),
    "closing": ("a closing bracket", lambda s: s.strip()[:1] in tuple(")]}") and s.strip() != ""),
    "quote": ("a quotation mark", lambda s: any(c in s for c in "\"'`“”‘’")),
    "dash": ("a dash or hyphen", lambda s: s.strip() in ("-", "–", "—", "--")),
    "newline": ("a line break", lambda s: "\n" in s),
    "space": ("white space", lambda s: s != "" and not s.strip()),
    "symbol": ("a mathematical sign", lambda s: s.strip() != "" and all(c in "+-*/=<>^|&%~" for c in s.strip())),
    "underscore": ("an underscore", lambda s: "_" in s),
    "not ascii": ("a character outside ASCII", lambda s: not s.isascii()),
    "determiner": ("a determiner", lambda s: s.strip().lower() in _DETERMINERS),
    "preposition": ("a preposition", lambda s: s.strip().lower() in _PREPOSITIONS),
    "pronoun": ("a pronoun", lambda s: s.strip().lower() in _PRONOUNS),
    "auxiliary": ("an auxiliary verb", lambda s: s.strip().lower() in _AUXILIARIES),
    "conjunction": ("a conjunction", lambda s: s.strip().lower() in _CONJUNCTIONS),
    "calendar": ("a word of dates", lambda s: s.strip().lower() in _CALENDAR),
    **{
        f"-{ending}": (
            f"a piece that ends in -{ending}",
            functools.partial(lambda end, s: len(s.strip()) > len(end) and s.endswith(end), ending),
        )
        for ending in ("ing", "ed", "s", "ly", "ion", "er", "al", "y", "e")
    },
}
"""Class to its name for people and its test on the text of a token."""

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
"""Conditions on a token's place, and how they read behind its noun."""

RELATIONS = ("token", "previous", "next", "two back", "recent", "earlier")


class Condition(NamedTuple):
    """One condition on a token."""

    where: str
    """Of `RELATIONS`, or `state`."""
    what: int | str
    """A token id, or a class of `SHAPES` (or one of `STATES`)."""


class Term(NamedTuple):
    """Conditions that hold together."""

    conditions: tuple[Condition, ...]
    strength: float
    """Mean activation, over the unit's largest, at the tokens where they held in learning."""


@dataclass(frozen=True)
class Rule:
    """Holds at a token where one of its terms does."""

    terms: tuple[Term, ...]


class Lexicon:
    """Which classes every token of a text belongs to."""

    def __init__(self, strings: Mapping[int, str]) -> None:
        self.strings = strings
        # Row -1 stands for "no token" and belongs to no class.
        self.table = np.zeros((max(strings, default=0) + 2, len(_SHAPE_NAMES)), dtype=bool)
        for token, text in strings.items():
            self.table[token] = [test(text) for _, test in SHAPES.values()]

    def classes(self, tokens: np.ndarray) -> np.ndarray:
        """[...] token ids (-1 for none) to [..., n_classes] bool."""
        return self.table[tokens]


# ---- conditions


def _shifted(tokens: np.ndarray, by: int) -> np.ndarray:
    """Tokens moved right by `by` columns (left when negative), -1 where nothing is known."""
    result = np.full_like(tokens, -1)
    if by > 0:
        result[:, by:] = tokens[:, :-by]
    else:
        result[:, :by] = tokens[:, -by:]
    return result


def _earlier(holds: np.ndarray, reach: int) -> np.ndarray:
    """Whether `holds` [n, WIDTH, ...] was true in one of the `reach` columns before each column."""
    count = np.zeros((holds.shape[0], holds.shape[1] + 1, *holds.shape[2:]), dtype=np.int16)
    np.cumsum(holds, axis=1, out=count[:, 1:])
    columns = np.arange(holds.shape[1])
    return count[:, columns] > count[:, np.maximum(columns - reach, 0)]


def _repeats(tokens: np.ndarray) -> np.ndarray:
    """Column of the last earlier occurrence of each token in its window, -1 where there is none: [n, WIDTH]."""
    columns = np.arange(tokens.shape[1])
    same = (tokens[:, :, None] == tokens[:, None, :]) & (columns[:, None] > columns) & (tokens[:, :, None] >= 0)
    return np.where(same, columns, -1).max(axis=2)


def _inside(opening: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """Columns behind an opening mark that is not closed yet."""
    depth = np.zeros(opening.shape, dtype=bool)
    open_now = np.zeros(len(opening), dtype=bool)
    for column in range(opening.shape[1]):
        open_now = open_now & ~closing[:, column]
        depth[:, column] = open_now
        open_now = open_now | opening[:, column]
    return depth


def _states(windows: Windows, lexicon: Lexicon) -> dict[str, np.ndarray]:
    """Every state, bool [n, WIDTH]."""
    tokens = windows.tokens
    before = _repeats(tokens)
    rows = np.arange(len(tokens))[:, None]
    following = np.where(before >= 0, tokens[rows, np.minimum(before + 1, tokens.shape[1] - 1)], -1)
    real = tokens >= 0
    next_same = real & (before >= 0) & (following == _shifted(tokens, -1)) & (following >= 0)
    shapes = lexicon.classes(tokens)
    opening, closing, quote = (shapes[..., _SHAPE_NAMES.index(name)] for name in ("opening", "closing", "quote"))
    odd = (np.cumsum(quote, axis=1) - quote) % 2 == 1
    columns = np.arange(tokens.shape[1])
    starts = windows.opens[:, None] & real
    return {
        "repeated": before >= 0,
        "after repeated": (_shifted(before + 1, 1) > 0) & real,
        "same as then": _shift_bool(next_same),
        "before same": next_same,
        "in brackets": _inside(opening, closing) & real,
        "in quotes": odd & real & ~quote,
        "first": starts & (columns == 0),
        "beginning": starts & (columns < 8),
    }


def _shift_bool(holds: np.ndarray) -> np.ndarray:
    result = np.zeros_like(holds)
    result[:, 1:] = holds[:, :-1]
    return result


class _View:
    """Windows, and whatever conditions ask about them, computed once."""

    def __init__(self, windows: Windows, lexicon: Lexicon) -> None:
        self.windows, self.lexicon = windows, lexicon
        self.tokens = windows.tokens
        self.real = self.tokens >= 0

    @functools.cached_property
    def states(self) -> dict[str, np.ndarray]:
        return _states(self.windows, self.lexicon)

    @functools.cached_property
    def moved(self) -> dict[str, np.ndarray]:
        return {name: _shifted(self.tokens, by) if by else self.tokens for name, by in _OFFSETS.items()}

    def shapes(self, where: str) -> np.ndarray:
        """All classes in one relation, bool [n, WIDTH, n_classes]."""
        if where in _REACH:
            return _earlier(self.lexicon.classes(self.tokens), _REACH[where])
        return self.lexicon.classes(self.moved[where])

    def token(self, where: str, tokens: np.ndarray) -> np.ndarray:
        """Some token ids [m] in one relation, bool [n, WIDTH, m]."""
        if where in _REACH:
            return _earlier(self.tokens[..., None] == tokens, _REACH[where])
        return self.moved[where][..., None] == tokens

    def holds(self, condition: Condition) -> np.ndarray:
        """One condition, bool [n, WIDTH]."""
        where, what = condition
        if where == "state":
            return self.states[str(what)]
        if isinstance(what, str):
            column = _SHAPE_NAMES.index(what)
            here = self.lexicon.classes(self.tokens if where in _REACH else self.moved[where])[..., column]
            found = _earlier(here, _REACH[where]) if where in _REACH else here
        else:
            found = self.token(where, np.array([what]))[..., 0]
        return found & self.real


_OFFSETS = {"token": 0, "previous": 1, "next": -1, "two back": 2}
_REACH = {"recent": RECENT, "earlier": WIDTH}


# ---- learning


_TRIED = {"token": 32, "previous": 16, "next": 12, "two back": 8, "recent": 24, "earlier": 24}
"""Token ids tried in each relation."""


def _candidates(view: _View, windows: Windows) -> tuple[list[Condition], np.ndarray]:
    """Conditions worth trying for one unit, and where each holds, bool [n, WIDTH, n_conditions]."""
    conditions: list[Condition] = []
    parts = []
    for where, n in _TRIED.items():
        tokens = _telling(view, windows, where, n)
        if tokens:
            conditions += [Condition(where, token) for token in tokens]
            parts.append(view.token(where, np.array(tokens)))
        if where in ("token", "previous", "next", "recent"):
            conditions += [Condition(where, name) for name in _SHAPE_NAMES]
            parts.append(view.shapes(where))
    conditions += [Condition("state", name) for name in view.states]
    parts.append(np.stack(list(view.states.values()), axis=2))
    return conditions, np.concatenate(parts, axis=2) & view.real[..., None]


def _telling(view: _View, windows: Windows, where: str, n: int) -> list[int]:
    """The `n` token ids that stand in a relation to active tokens in more active windows than they occur in silent ones.

    For what came before, the main sources of the peaks count once more.
    """
    row, column = np.nonzero((windows.values > 0) & view.real)
    n_active, n_silent = max(1, int(windows.active.sum())), max(1, int((~windows.active).sum()))
    if where in _REACH:
        pairs = _pairs(
            row[:, None],
            view.tokens[row[:, None], np.maximum(column[:, None] - np.arange(1, 1 + min(_REACH[where], WIDTH)), 0)],
        )
        sources = windows.sources[:, 0]
        near = Counter(int(token) for token in sources if token >= 0)
    else:
        pairs, near = _pairs(row, view.moved[where][row, column]), Counter()
    active = Counter(token for _, token in pairs)
    silent_rows = np.flatnonzero(~windows.active)
    silent = Counter(token for _, token in _pairs(silent_rows[:, None], view.tokens[silent_rows]))
    worth = {
        token: (count + near[token]) / n_active - silent[token] / n_silent
        for token, count in active.items()
        if count > 1
    }
    return sorted(worth, key=lambda token: (-worth[token], token))[:n]


def _pairs(row: np.ndarray, tokens: np.ndarray) -> set[tuple[int, int]]:
    """Different pairs of a row and a token id in it."""
    rows = np.broadcast_to(row, tokens.shape).ravel().astype(np.int64)
    codes = np.unique((rows << 32) + tokens.ravel())
    return {(int(code >> 32), int(code & 0xFFFFFFFF)) for code in codes if code & 0xFFFFFFFF < 1 << 31}


class _Counts:
    """Windows that terms hold in: active ones where they hold at an active token, silent ones where they hold anywhere."""

    def __init__(self, holds: np.ndarray, windows: Windows) -> None:
        order = np.argsort(~windows.active, kind="stable")  # active windows first, so that their numbers are 0, 1, ...
        holds, windows = holds[order], windows[order]
        is_active = windows.active
        row, column = np.nonzero((windows.values > 0) & (windows.tokens >= 0) & is_active[:, None])
        self.at_active, self.row = np.ascontiguousarray(holds[row, column]), row
        self.n_active = int(is_active.sum())
        self.at_silent = np.ascontiguousarray(holds[~is_active])

    @staticmethod
    def _by_window(holds: np.ndarray, row: np.ndarray, n: int) -> np.ndarray:
        """Whether anything holds among the tokens of each window: [n_tokens, m] with sorted rows [n_tokens] to [n, m]."""
        found = np.zeros((n, holds.shape[1]), dtype=bool)
        if len(row):
            names, starts = np.unique(row, return_index=True)
            found[names] = np.logical_or.reduceat(holds, starts, axis=0)
        return found

    def of(self, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where the conjunction of some conditions and each condition hits, by window: [n_active, m], [n_silent, m]."""
        here = self.at_active[:, list(chosen)].all(axis=1)
        row, column = np.nonzero(self.at_silent[:, :, list(chosen)].all(axis=2))
        silent = self._by_window(self.at_silent[row, column], row, len(self.at_silent))
        return self._by_window(self.at_active[here], self.row[here], self.n_active), silent


def learn(windows: Windows, lexicon: Lexicon) -> Rule:
    """A rule for one unit from windows of its first half; without terms when nothing tells active windows from silent ones."""
    view = _View(windows, lexicon)
    conditions, holds = _candidates(view, windows)
    counts = _Counts(holds, windows)
    singles = counts.of([])
    covered, wrong = np.zeros(counts.n_active, dtype=bool), np.zeros(len(counts.at_silent), dtype=bool)
    terms: list[tuple[int, ...]] = []
    while len(terms) < MAX_TERMS:
        term, gain = _best_term(counts, singles, covered, wrong)
        if not term or gain <= 0:
            break
        terms.append(term)
        active, silent = counts.of(term[:-1]) if len(term) > 1 else singles
        covered |= active[:, term[-1]]
        wrong |= silent[:, term[-1]]
    maximum = max(float(windows.values.max()), 1e-30)
    return Rule(tuple(_with_strength(term, conditions, holds, windows, maximum) for term in terms))


def _gains(
    hits: tuple[np.ndarray, np.ndarray], covered: np.ndarray, wrong: np.ndarray, n_conditions: int
) -> np.ndarray:
    """Rise of the objective for each of m terms, less what its conditions cost and what chance could do among so many terms."""
    active, silent = hits
    new, harm = (active & ~covered[:, None]).mean(axis=0), (silent & ~wrong[:, None]).mean(axis=0)
    error = np.sqrt(_variance(new, len(covered)) + _variance(harm, len(wrong))) / 2
    return (new - harm) / 2 - CAUTION[n_conditions - 1] * error - COST * n_conditions


def _variance(share: np.ndarray, n: int) -> np.ndarray:
    """Of a share of n windows; a little above zero also where the share is 0 or 1 (Agresti and Coull's estimate)."""
    near = (share * n + 2) / (n + 4)
    return near * (1 - near) / (n + 4)


def _best_term(
    counts: _Counts, singles: tuple[np.ndarray, np.ndarray], covered: np.ndarray, wrong: np.ndarray
) -> tuple[tuple[int, ...], float]:
    """The best term of up to `MAX_CONDITIONS`, by beam search."""
    gains = _gains(singles, covered, wrong, 1)
    best: tuple[int, ...] = (int(gains.argmax()),)
    best_gain = float(gains.max())
    # What hits many active windows may become good once another condition rules silent ones out.
    many = (singles[0] & ~covered[:, None]).sum(axis=0).argsort()[::-1][: BEAM // 2]
    beam: list[tuple[int, ...]] = [
        (int(i),) for i in dict.fromkeys([*gains.argsort()[::-1][: BEAM // 2].tolist(), *many.tolist()])
    ]
    for length in range(2, MAX_CONDITIONS + 1):
        found: dict[tuple[int, ...], float] = {}
        for term in beam:
            joined = _gains(counts.of(term), covered, wrong, length)
            joined[list(term)] = -1.0
            for index in joined.argsort()[::-1][:3]:
                found[tuple(sorted((*term, int(index))))] = float(joined[index])
        ranked = sorted(found, key=lambda term: -found[term])
        if ranked and found[ranked[0]] > best_gain:
            best, best_gain = ranked[0], found[ranked[0]]
        beam = ranked[: BEAM // 3]
    return best, best_gain


def _with_strength(
    term: Sequence[int], conditions: Sequence[Condition], holds: np.ndarray, windows: Windows, maximum: float
) -> Term:
    where = holds[:, :, list(term)].all(axis=2)
    return Term(
        tuple(conditions[index] for index in term),
        float(windows.values[where].mean() / maximum) if where.any() else 0.0,
    )


def predict(rule: Rule, windows: Windows, lexicon: Lexicon) -> np.ndarray:
    """Predicted activation over the unit's largest at every token, 0 where the rule does not hold: [n, WIDTH]."""
    view = _View(windows, lexicon)
    result = np.zeros(windows.tokens.shape)
    for term in rule.terms:
        holds = np.logical_and.reduce([view.holds(condition) for condition in term.conditions])
        result = np.maximum(result, holds * max(term.strength, 1e-6))
    return result


# ---- English


def _quoted(text: str) -> str:
    shown = text.replace("\n", "\\n").replace("\t", "\\t")
    return f'"{shown}"'


def _noun(what: int | str, strings: Mapping[int, str]) -> str:
    return SHAPES[what][0] if isinstance(what, str) else _quoted(strings.get(what, "?"))


_PHRASES = {
    "previous": "right after {}",
    "next": "right before {}",
    "two back": "two tokens after {}",
    "recent": "with {} among the " + str(RECENT) + " tokens before",
    "earlier": "with {} earlier in the text",
}


def _term_text(term: Term, strings: Mapping[int, str]) -> str:
    here = [_noun(c.what, strings) for c in term.conditions if c.where == "token"]
    rest = [_PHRASES[c.where].format(_noun(c.what, strings)) for c in term.conditions if c.where in _PHRASES]
    rest += [STATES[str(c.what)] for c in term.conditions if c.where == "state"]
    return " ".join([" that is also ".join(here) or "a token", ", and ".join(rest)]).strip()


def describe(rule: Rule, strings: Mapping[int, str]) -> str:
    """The rule as a sentence."""
    if not rule.terms:
        return "No rule was found."
    plain = [
        term.conditions[0].what
        for term in rule.terms
        if len(term.conditions) == 1 and term.conditions[0].where == "token"
    ]
    parts = [" or ".join(_noun(what, strings) for what in plain)] if plain else []
    parts += [
        _term_text(term, strings)
        for term in rule.terms
        if len(term.conditions) > 1 or term.conditions[0].where != "token"
    ]
    return "Active on " + "; or on ".join(parts) + "."
