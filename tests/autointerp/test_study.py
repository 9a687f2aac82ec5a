"""Scores, baselines, tests and the command: by hand, by property, and on planted units."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chat_server import answer_for, chat_server
from hypothesis import given
from hypothesis import strategies as st
from judged_text import BUDGET, FIRST_WORD, make_corpus, planted_sets
from tiny_models import save_tiny_model

from lorsa_utils import stats
from lorsa_utils.autointerp import examples, study
from lorsa_utils.autointerp.examples import Budget, UnitExamples, Windows
from lorsa_utils.autointerp.judges import Answers, Explanation, Judge, OpenAIJudge
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit.cli import main
from lorsa_utils.stats import Interval


def test_scores_by_hand() -> None:
    truth = np.array([True, True, True, True, False, False])
    verdicts = np.array([1.0, 1.0, 0.9, 0.0, 1.0, 0.2])
    assert study.balanced_accuracy(truth, verdicts).value == pytest.approx((3 / 4 + 1 / 2) / 2)
    truth = np.array([True, True, False, False])
    assert study.verdict_auc(truth, np.array([0.9, 0.4, 0.4, 0.1])) == pytest.approx(3.5 / 4)
    assert study.balanced_accuracy(truth, np.array([1.0, math.nan, 0.0, math.nan])).value == 1, "NaN is left out"
    assert math.isnan(study.balanced_accuracy(truth, np.array([1.0, 1.0, math.nan, math.nan])).value)
    assert study.correlation(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0])) == pytest.approx(1)
    assert study.correlation(np.array([0.0, 1.0]), np.array([1.0, 1.0])) == 0
    assert math.isnan(study.correlation(np.array([0.0, 1.0]), np.array([math.nan, 1.0])))


@given(st.lists(st.booleans(), min_size=2, max_size=40), st.floats(0, 1))
def test_a_constant_answer_gets_one_half(truth: list[bool], answer: float) -> None:
    score = study.balanced_accuracy(np.array(truth), np.full(len(truth), answer)).value
    assert math.isnan(score) if len(set(truth)) == 1 else score == 0.5


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_interval_holds_the_score(pairs: list[tuple[bool, bool]]) -> None:
    truth, verdicts = (np.array(side) for side in zip(*pairs, strict=True))
    score = study.balanced_accuracy(truth, verdicts.astype(float))
    if not math.isnan(score.value):
        assert 0 <= score.low <= score.value + 1e-9
        assert score.value - 1e-9 <= score.high <= 1


def test_half_of_the_marks_are_right_and_as_many_tokens_are_marked() -> None:
    for unit in planted_sets().units:
        windows = unit.second[unit.second.active]
        marks, correct = study.fuzzing_marks(windows, np.random.default_rng(0))
        assert correct.sum() == len(windows) // 2
        assert marks.any(axis=1).all()
        for row in range(len(windows)):
            at = windows.values[row][marks[row]]
            assert (at > 0).all() if correct[row] else (at == 0).all()
            assert (windows.tokens[row][marks[row]] >= 0).all()


def word_sets(n_units: int = 16) -> examples.Examples:
    """Units that fire on a twentieth of the words each: explanations differ from unit to unit."""
    corpus = make_corpus(400)
    groups = np.where(corpus.tokens >= FIRST_WORD, corpus.tokens % 60, -1)
    active = [groups == number for number in range(n_units)]
    return examples.examples(examples.planted(corpus, active, [0] * n_units), BUDGET)


class KnowsAll(Judge):
    """Explains a unit by its number and reads the truth from the windows: what scores a perfect explanation gets."""

    name = "knows all"

    def explain(self, unit: UnitExamples) -> Explanation:
        return Explanation(str(unit.unit))

    def verdicts(self, explanation: Explanation, windows: Windows, marks: np.ndarray | None = None) -> np.ndarray:
        fires = self.simulate(explanation, windows) > 0
        return (fires if marks is None else fires & marks).any(axis=1).astype(float)

    def simulate(self, explanation: Explanation, windows: Windows) -> np.ndarray:
        return ((windows.tokens >= FIRST_WORD) & (windows.tokens % 60 == int(explanation.text))).astype(float)


def test_a_perfect_explanation_scores_one_and_a_shuffled_one_a_half() -> None:
    words = word_sets()
    scores = study.study([words], KnowsAll(), progress=False)
    assert (scores[["detection", "fuzzing"]] == 1).all().all()
    assert np.allclose(scores["simulation"], 1)
    assert 0.45 <= scores["shuffled"].mean() <= 0.55
    assert 0.45 <= scores["relative"].mean() <= 0.55
    assert study.constant_answer(words) == 0.5


def test_shuffled_explanations_are_everybodys_once_and_nobodys_own() -> None:
    explanations = [Explanation("x") if index != 3 else None for index in range(7)]
    dealt = study.strangers(explanations, 0)
    assert sorted(dealt) == list(range(7))
    assert [index for index, other in enumerate(dealt) if index == other] == [3]


def test_what_cannot_be_scored_or_compared_is_refused() -> None:
    with pytest.raises(UserError, match="'recall' is unknown; known are detection, fuzzing, simulation"):
        study.study([], KnowsAll(), ("recall",))
    with pytest.raises(UserError, match="No layer has scores of both"):
        study.compare_dictionaries(table_of(0.1).query("dictionary == 'SAE'"))


# ---- statistics


def table_of(gap: float) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    parts = []
    for layer in (0, 1):
        for name, mean in (("Lorsa", 0.6 + gap), ("SAE", 0.6)):
            values = {"frequency": rng.random(100), "detection": rng.normal(mean, 0.1, 100)}
            parts.append(pd.DataFrame({"dictionary": name, "layer": layer, **values}))
    return pd.concat(parts, ignore_index=True)


def test_a_true_difference_wins_and_no_difference_ties() -> None:
    wins, losses = (study.compare_dictionaries(table_of(gap), scorers=("detection",)) for gap in (0.1, -0.1))
    assert wins["outcome"].tolist() == wins["outcome_holm"].tolist() == ["win", "win"]
    assert ((wins["low"] < 0.1) & (wins["high"] > 0.1)).all()
    assert np.allclose(wins["effect"], 1, atol=0.4)
    assert losses["outcome"].tolist() == ["loss", "loss"]
    counts = study.outcomes(losses).set_index("where")
    assert counts.loc["here", "loss"] == 2
    assert counts.loc["paper", ["win", "loss", "tie"]].tolist() == [6, 3, 15]


def test_tests_are_wrong_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    p = [stats.permutation_p(*rng.normal(size=(2, 20)), seed=seed, n_draws=400) for seed in range(300)]
    paired = [stats.paired_p(rng.normal(size=20), seed=seed, n_flips=400) for seed in range(300)]
    for values in (p, paired):
        assert 0.02 < np.mean(np.array(values) < 0.05) < 0.09


def test_permutation_p_by_hand() -> None:
    # All 3 of 3 against all 3 of 3: 2 of the 20 ways to deal are as extreme.
    assert stats.permutation_p(np.array([1.0, 2.0, 3.0]), np.array([7.0, 8.0, 9.0])) == pytest.approx(0.1, abs=0.02)
    assert stats.permutation_p(np.ones(5), np.ones(4)) == 1


def test_mean_interval_leaves_nan_out() -> None:
    assert stats.bootstrap_mean(np.array([1.0, math.nan, 1.0])) == Interval(1.0, 1.0, 1.0)
    assert math.isnan(stats.bootstrap_mean(np.array([math.nan])).value)


# ---- cost


def test_the_estimate_is_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def content(prompt: str) -> str:
        words = f"EXPLANATION: {'explanation ' * 24}{len(server.prompts)}"
        return words if "EXPLANATION:" in prompt else answer_for(prompt)

    monkeypatch.setenv("OPENAI_API_KEY", "k")
    sets = [planted_sets(budget=Budget(units=3, shown=12, contrast=12, scored=10, least=8))]
    with chat_server() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        server.content = content
        study.study(sets, OpenAIJudge("m", Answers(None), concurrency=1), progress=False)
    calls, read = len(server.prompts), sum(len(prompt) - 1 for prompt in server.prompts) // 4
    sentence = study.estimate(sets, prices=(1000.0, 2000.0))
    assert sentence.startswith(f"At most {calls} questions, {read + 8 * calls:,} tokens to read and ")
    written = int(sentence.split()[-9].replace(",", ""))
    assert sentence.endswith(f", about {(read + 8 * calls + 2 * written) / 1000:.2f} at the given prices.")


# ---- command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Lorsa and an SAE of one layer of a tiny model, trained for a moment on a text file."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny_model(folder / "model", "llama")
    rng = np.random.default_rng(0)
    words = ["river", "stone", "light", "paper", "garden", "winter", "market", "7", "street,", "cloud."]
    for number in range(6):
        (folder / f"text{number}.txt").write_text(" ".join(rng.choice(words, 1500)) + "\n")
    common = ["--model", str(folder / "model"), "--text", *(str(path) for path in sorted(folder.glob("*.txt")))]
    sizes = {"layer": 1, "n-heads": 16, "k": 4, "tokens": 3000, "context": 64, "held-out-tokens": 500}
    common += ["--device", "cpu", *(part for name, size in sizes.items() for part in (f"--{name}", str(size)))]
    for kind, extra in (("lorsa", ["--n-qk", "4"]), ("sae", [])):
        assert main(["train", *common, *extra, "--kind", kind, "--out", str(folder / kind)]) == 0
    return [folder / "lorsa", folder / "sae"]


def command(runs: list[Path], out: Path, *extra: str) -> list[str]:
    return ["autointerp", *map(str, runs), "--out", str(out), "--units", "4", "--tokens", "6000", "--json", *extra]


def test_command_compares_two_runs(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(runs, tmp_path / "out")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "proxy" in answer["judge"]
    assert {row["dictionary"] for row in answer["scores"]} == {"Lorsa", "SAE"}
    assert {row["score"] for row in answer["scores"]} >= {"detection", "fuzzing", "simulation", "shuffled", "relative"}
    assert len(answer["tests"]) == 3
    assert answer["constant"] == 0.5
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert len(scores) == len(scores[["dictionary", "unit"]].drop_duplicates())
    assert len(pd.read_csv(tmp_path / "out" / "tests.csv")) == 3


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("--scorers recall", "'recall' is unknown"),
        ("--backend openai", "--judge-model"),
        ("--backend openai --judge-model m", "$OPENAI_API_KEY is not set"),
        ("--backend replay", "--answers"),
        ("--backend replay --answers nowhere.jsonl", "no recorded answers"),
    ],
)
def test_command_refuses_with_one_sentence(
    runs: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, extra: str, sentence: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(command(runs, runs[0].parent / "out", *extra.split())) == 1
    assert sentence in capsys.readouterr().err


def test_command_asks_an_endpoint_only_after_a_yes(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with chat_server() as server:
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        options = ("--backend", "openai", "--judge-model", "m", "--scorers", "detection", "--prices", "0.15,0.60")
        asked = command(runs, tmp_path / "out", *options)
        assert main(asked) == 1
        assert "add --yes" in capsys.readouterr().err
        monkeypatch.setattr("sys.stdin", io.StringIO("no\n"))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        assert main(asked) == 1
        assert "Nothing was asked" in capsys.readouterr().err
        assert server.prompts == []
        assert main([*asked, "--yes"]) == 0
        assert "at the given prices" in capsys.readouterr().err
        assert len(server.prompts) > 0
        again = ("--backend", "replay", "--answers", str(tmp_path / "out" / "answers.jsonl"), "--scorers", "detection")
        assert main(command(runs, tmp_path / "again", *again)) == 0
    first, second = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("out", "again"))
    pd.testing.assert_frame_equal(first, second)
