"""Rules: planted units are explained in the right words; conditions hold where they should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged_text import FIRST_WORD, planted_sets

from lorsa_utils.autointerp import rules, study
from lorsa_utils.autointerp.examples import N_SOURCES, WIDTH, Corpus, Windows
from lorsa_utils.autointerp.judges import RulesJudge
from lorsa_utils.autointerp.rules import Condition, Rule, Term

STRINGS = {0: " the", 1: ",", 2: "7", 3: " cats", 4: " (", 5: ")", 6: ' "', 7: "\n", 8: " Paris", 9: "ing"}
CORPUS = Corpus(np.zeros((1, 1), dtype=int), np.ones((1, 1), dtype=bool), STRINGS)


def windows_of(rows: list[list[int]], opens: bool = True) -> Windows:
    tokens = np.full((len(rows), WIDTH), -1)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    n = len(rows)
    nothing = np.full((n, N_SOURCES), -1)
    return Windows(
        CORPUS,
        tokens,
        np.zeros((n, WIDTH)),
        np.full(n, opens),
        np.full(n, "random"),
        np.full(n, -1),
        np.zeros(n, dtype=int),
        nothing,
        nothing * 0.0,
    )


def where(condition: Condition, row: list[int], opens: bool = True) -> list[int]:
    rule = Rule((Term((condition,), 0.5),))
    return np.flatnonzero(rules.predict(rule, windows_of([row], opens))[0]).tolist()


@pytest.mark.parametrize(
    ("condition", "row", "expected"),
    [
        (Condition("token", 1), [0, 1, 3, 1], [1, 3]),
        (Condition("token", "digit"), [0, 2, 3, 2], [1, 3]),
        (Condition("token", "capitalised"), [8, 3, 8], [0, 2]),
        (Condition("previous", 1), [1, 0, 3, 1], [1]),
        (Condition("previous", "digit"), [2, 0, 3], [1]),
        (Condition("next", 1), [0, 1, 3], [0]),
        (Condition("two back", 0), [0, 1, 3, 3], [2]),
        (Condition("recent", 1), [1] + [3] * 10, list(range(1, 9))),
        (Condition("earlier", 1), [1] + [3] * 10, list(range(1, 11))),
        (Condition("state", "repeated"), [0, 3, 0, 8], [2]),
        (Condition("state", "after repeated"), [0, 3, 0, 8, 1], [3]),
        (Condition("state", "before same"), [0, 3, 8, 0, 3], [3]),
        (Condition("state", "same as then"), [0, 3, 8, 0, 3], [4]),
        (Condition("state", "in brackets"), [4, 3, 0, 5, 3], [1, 2]),
        (Condition("state", "in quotes"), [6, 3, 6, 0], [1]),
        (Condition("state", "first"), [0, 3, 8], [0]),
        (Condition("state", "beginning"), [3] * 10, list(range(8))),
    ],
)
def test_conditions_hold_where_they_should(condition: Condition, row: list[int], expected: list[int]) -> None:
    assert where(condition, row) == expected


def test_a_cut_text_has_no_beginning() -> None:
    assert where(Condition("state", "beginning"), [3] * 10, opens=False) == []


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=WIDTH))
def test_conditions_never_hold_where_there_is_no_token(row: list[int]) -> None:
    for relation in rules.RELATIONS:
        for what in (1, "punctuation"):
            assert all(place < len(row) for place in where(Condition(relation, what), row))
    for state in rules.STATES:
        assert all(place < len(row) for place in where(Condition("state", state), row))


def test_every_class_has_a_token_and_none_holds_for_no_token() -> None:
    classes = rules.token_classes(CORPUS)
    assert not classes[-1].any()
    assert classes[2][list(rules.SHAPES).index("digit")]


def test_planted_units_are_explained_and_score_above_nine_tenths() -> None:
    examples = planted_sets()
    judge = RulesJudge()
    said = {}
    for unit in examples.units:
        explanation = judge.explain(unit)
        scores = study.score_unit(judge, explanation, unit, ("detection", "fuzzing", "simulation"), 0)
        assert min(scores[name] for name in ("detection", "fuzzing", "simulation")) > 0.9
        said[unit.unit] = explanation.text
    assert said == {
        0: "Active on a digit.",
        1: 'Active on a token right after ",".',
        2: "Active on a token that occurred earlier.",
    }


def test_learning_ignores_the_order_of_windows() -> None:
    examples = planted_sets()
    windows = examples.units[0].first
    order = np.random.default_rng(1).permutation(len(windows))
    texts = {rules.describe(rules.learn(same), windows.corpus.strings) for same in (windows, windows[order])}
    assert len(texts) == 1


def test_noise_gets_no_score() -> None:
    examples = planted_sets()
    rng = np.random.default_rng(0)
    scores = []
    for unit in examples.units:
        for _ in range(4):
            # Active windows are dealt out at random: there is nothing to find.
            halves = []
            for half in (unit.first, unit.second):
                kind, values = rng.permutation(half.kind), np.zeros_like(half.values)
                values[kind == "active", half.peak[kind == "active"]] = 1.0
                quantile = np.where(kind == "active", 0, -1)
                halves.append(dataclasses.replace(half, kind=kind, values=values, quantile=quantile))
            noise = dataclasses.replace(unit, first=halves[0], second=halves[1])
            judge = RulesJudge()
            score = study.score_unit(judge, judge.explain(noise), noise, ("detection",), 0)
            scores.append(score["detection"])
    assert 0.4 < np.mean(scores) < 0.6


def test_words_of_a_set_are_found() -> None:
    examples = planted_sets()
    words = FIRST_WORD + np.arange(40)
    windows = examples.units[0].first
    values = np.isin(windows.tokens, words).astype(float)
    active = values.any(axis=1)
    changed = dataclasses.replace(
        windows, values=values, kind=np.where(active, "active", "random"), quantile=np.where(active, 0, -1)
    )
    rule = rules.learn(changed)
    holds = rules.predict(rule, changed).any(axis=1)
    assert np.mean(holds[active]) > 0.2
    assert not holds[~active].all()


def test_no_rule_says_so_and_is_never_active() -> None:
    rule = Rule(())
    assert rules.describe(rule, STRINGS) == "No rule was found."
    assert not rules.predict(rule, windows_of([[0, 1]])).any()
