"""Rules: planted units are explained in the right words; conditions hold where they should."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged_text import FIRST_WORD, SAID, planted_sets

from lorsa_utils.autointerp import rules, study
from lorsa_utils.autointerp.examples import N_SOURCES, WIDTH, Corpus, Windows
from lorsa_utils.autointerp.judges import RulesJudge
from lorsa_utils.autointerp.rules import Condition, Term

STRINGS = {0: " the", 1: ",", 2: "7", 3: " cats", 4: " (", 5: ")", 6: ' "', 7: "\n", 8: " Paris", 9: "ing"}
BEGINNING = "among the first eight tokens of the text"
CORPUS = Corpus(np.zeros((1, 1), dtype=int), np.ones((1, 1), dtype=bool), STRINGS)


def windows_of(row: list[int], opens: bool = True) -> Windows:
    tokens = np.array([row + [-1] * (WIDTH - len(row))])
    nothing, one = np.full((1, N_SOURCES), -1), np.zeros(1, dtype=int)
    values, kind = np.zeros((1, WIDTH)), np.array(["random"])
    return Windows(CORPUS, tokens, values, np.array([opens]), kind, one - 1, one, nothing, nothing * 0.0)


def firing_in(windows: Windows, active: np.ndarray, values: np.ndarray) -> Windows:
    kind, quantile = np.where(active, "active", "random"), np.where(active, 0, -1)
    return dataclasses.replace(windows, kind=kind, values=values, quantile=quantile)


def where(condition: Condition, row: list[int], opens: bool = True) -> list[int]:
    return np.flatnonzero(rules.predict((Term((condition,), 0.5),), windows_of(row, opens))[0]).tolist()


@pytest.mark.parametrize(
    ("condition", "row", "expected"),
    [
        (("token", 1), [0, 1, 3, 1], [1, 3]),
        (("token", "a digit"), [0, 2, 3, 2], [1, 3]),
        (("token", "a capitalised word"), [8, 3, 8], [0, 2]),
        (("previous", 1), [1, 0, 3, 1], [1]),
        (("previous", "a digit"), [2, 0, 3], [1]),
        (("next", 1), [0, 1, 3], [0]),
        (("two back", 0), [0, 1, 3, 3], [2]),
        (("recent", 1), [1] + [3] * 10, list(range(1, 9))),
        (("earlier", 1), [1] + [3] * 10, list(range(1, 11))),
        (("state", "that occurred earlier"), [0, 3, 0, 8], [2]),
        (("state", "right after a token that occurred earlier"), [0, 3, 0, 8, 1], [3]),
        (("state", "whose next token followed it earlier, too"), [0, 3, 8, 0, 3], [3]),
        (("state", "that followed the same token earlier"), [0, 3, 8, 0, 3], [4]),
        (("state", "inside brackets"), [4, 3, 0, 5, 3], [1, 2]),
        (("state", "inside quotation marks"), [6, 3, 6, 0], [1]),
        (("state", "at the very beginning of the text"), [0, 3, 8], [0]),
        (("state", BEGINNING), [3] * 10, list(range(8))),
    ],
)
def test_conditions_hold_where_they_should(
    condition: tuple[str, int | str], row: list[int], expected: list[int]
) -> None:
    assert where(Condition(*condition), row) == expected


def test_a_cut_text_has_no_beginning() -> None:
    assert where(Condition("state", BEGINNING), [3] * 10, opens=False) == []


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=WIDTH))
def test_conditions_never_hold_where_there_is_no_token(row: list[int]) -> None:
    relations = [Condition(relation, what) for relation in rules.RELATIONS for what in (1, "a punctuation mark")]
    for condition in [*relations, *rules._View(windows_of(row)).candidates()]:
        assert all(place < len(row) for place in where(condition, row))


def test_every_class_has_a_token_and_none_holds_for_no_token() -> None:
    classes = rules.token_classes(CORPUS)
    assert not any(held[-1] for held in classes.values())
    assert classes["a digit"][2]


def test_planted_units_are_explained_and_score_above_nine_tenths() -> None:
    scores = study.study([planted_sets()], RulesJudge(), progress=False).set_index("unit")
    assert (scores[["detection", "fuzzing", "simulation"]] > 0.9).all(axis=None)
    assert (scores["shuffled"] < 0.7).all()
    assert scores["explanation"].to_dict() == dict(enumerate(SAID))


def test_learning_ignores_the_order_of_windows() -> None:
    windows = planted_sets().units[0].first
    order = np.random.default_rng(1).permutation(len(windows))
    texts = {rules.describe(rules.learn(same), windows.corpus.strings) for same in (windows, windows[order])}
    assert len(texts) == 1


def test_noise_gets_no_score() -> None:
    rng, judge = np.random.default_rng(0), RulesJudge()
    scores = []
    for unit in planted_sets().units:
        for _ in range(4):
            # Active windows are dealt out at random: there is nothing to find.
            halves = {}
            for name in ("first", "second"):
                half = getattr(unit, name)
                active, values = rng.permutation(half.active), np.zeros_like(half.values)
                values[active, half.peak[active]] = 1.0
                halves[name] = firing_in(half, active, values)
            noise = dataclasses.replace(unit, **halves)
            scores.append(study.score_unit(judge, judge.explain(noise), noise, ("detection",), 0)["detection"])
    assert 0.4 < np.mean(scores) < 0.6


def test_words_of_a_set_are_found() -> None:
    windows = planted_sets().units[0].first
    values = np.isin(windows.tokens, FIRST_WORD + np.arange(40)).astype(float)
    active = values.any(axis=1)
    changed = firing_in(windows, active, values)
    holds = rules.predict(rules.learn(changed), changed).any(axis=1)
    assert np.mean(holds[active]) > 0.2
    assert not holds[~active].all()


def test_no_rule_says_so_and_is_never_active() -> None:
    assert rules.describe((), STRINGS) == "No rule was found."
    assert not rules.predict((), windows_of([0, 1])).any()
