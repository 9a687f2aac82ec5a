"""Judges: prompts, parsing, the file of answers, a local model's logits, and a chat endpoint that misbehaves."""

import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from chat_server import ChatServer, chat_server
from hypothesis import given, settings
from hypothesis import strategies as st
from judged_text import planted_sets
from tiny_models import save_tiny_model

from lorsa_utils import models
from lorsa_utils.autointerp import judges, study
from lorsa_utils.autointerp.examples import Budget
from lorsa_utils.autointerp.judges import Answers, Explanation, LocalJudge, OpenAIJudge, ReplayJudge
from lorsa_utils.exceptions import UserError

KEY = "sk-very-secret-0123456789"
QUESTION = judges.verdict_request("detection", "digits", ["a 1", "b", "c"])
OTHER = judges.verdict_request("detection", "digits", ["d", "e"])


class FastJudge(OpenAIJudge):
    attempts, first_delay, longest_delay, timeout = 4, 0.01, 0.05, 5.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    with chat_server() as state:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", state.url)
        yield state


def asked(path: Path | None = None, concurrency: int = 2) -> FastJudge:
    return FastJudge("test-model", Answers(path), concurrency)


# ---- parsing


@pytest.mark.parametrize("answer", [" [1,0,1]\n", "```json\n[1, 0, 1]\n```", "```\n[true, false, true]\n```"])
def test_lists_are_read(answer: str) -> None:
    assert judges.parse_numbers(answer, 3, 1) == [1, 0, 1]


STRANGE = ("[1, 0", "[1, 0]", "[1, 0, 1, 1]", "[1, 0, 2]", "[1, 0, -1]", '[1, 0, "1"]', "[1, 0, null]", "[1, 0, NaN]")


@pytest.mark.parametrize("answer", ["", *STRANGE, "I can't do that.", "The answer is [1, 0, 1], since [2] is so."])
def test_other_answers_are_no_lists(answer: str) -> None:
    assert judges.parse_numbers(answer, 3, 1) is None


@settings(max_examples=30)
@given(st.text(max_size=60))
def test_no_answer_breaks_the_parser(answer: str) -> None:
    judges.parse_numbers(answer, 3, 1)
    judges.parse_explanation(answer)


def test_explanations_are_read_or_nothing_is() -> None:
    for answer in ("EXPLANATION: digits", "Let me think.\nEXPLANATION: **digits**\n"):
        assert judges.parse_explanation(answer) == "digits"
    assert not any(judges.parse_explanation(answer) is not None for answer in ("EXPLANATION:", "digits", ""))


def test_texts_cannot_change_a_prompt() -> None:
    request = judges.verdict_request("detection", "$texts $n", ["$explanation", "a\n2. b"])
    assert "unit: $texts $n" in request.messages[1][1]
    assert "1. $explanation\n2. a\\n2. b\n" in request.messages[1][1]


def test_the_explainer_sees_marks_sources_and_silent_texts_of_the_first_half_alone() -> None:
    unit = next(unit for unit in planted_sets().units if unit.unit == 1)
    prompt = judges.explain_request(unit).messages[1][1]
    assert prompt.count("[10]") == prompt.count('(from ",")') == judges.SHOWN_STRONGEST + judges.SHOWN_WEAKER
    active, silent = prompt.split("silent, some")
    assert "«" in active
    assert "«" not in silent
    assert not any(unit.second.marked(row) in prompt for row in range(len(unit.second)))


# ---- file of answers


def test_answers_are_found_again_and_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(Answers(path)) as answers:
        answers.put("a", "one\ntwo", kind="k", model="m")
        answers.put("b", "«x»", kind="k", model="m")
        with pytest.raises(UserError, match="Another run is writing"):
            Answers(path)
    path.write_bytes(path.read_bytes() + b'{"key": "c", "ans')
    with closing(Answers(path)) as again:
        assert {key: record["answer"] for key, record in again.records.items()} == {"a": "one\ntwo", "b": "«x»"}
        again.put("c", "three")
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"key": "a", "answer": "x"}\nnonsense\n')
    with pytest.raises(UserError, match="Line 2 of .* is damaged"):
        ReplayJudge(tmp_path / "answers.jsonl")


# ---- chat endpoint


@pytest.mark.parametrize("mishaps", [[], ["status 503", "status 408", "status 429"], ["cut", "status 500", "hangup"]])
def test_mishaps_are_asked_again(server: ChatServer, mishaps: list[str]) -> None:
    server.mishaps = list(mishaps)
    judge = asked()
    assert judge.ask([QUESTION]) == ["[1, 0, 0]"]
    assert server.answered.total() == judge.tally.calls == 1
    assert len(server.prompts) == 1 + len(mishaps)
    assert server.keys == {f"Bearer {KEY}"}


def test_one_retry_after_holds_all_threads(server: ChatServer) -> None:
    server.mishaps = ["status 429 0.6"]
    judge = asked()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(judge.ask, [QUESTION])
        while not server.prompts:
            time.sleep(0.01)
        time.sleep(0.1)
        began = time.monotonic()
        assert judge.ask([OTHER]) == ["[1, 0]"]
        assert 0.3 < time.monotonic() - began < 3
        assert held.result() == ["[1, 0, 0]"]


def test_retry_after_is_a_number_or_a_date() -> None:
    when = datetime.now(UTC) + timedelta(seconds=100)
    assert 98 < judges.retry_after_seconds(format_datetime(when, usegmt=True)) <= 100
    assert [judges.retry_after_seconds(text) for text in ("7", "-3", "soon", "")] == [7, 0, 0, 0]


def test_a_server_that_wants_max_completion_tokens_gets_it(server: ChatServer) -> None:
    server.new_limit = True
    assert asked().ask([QUESTION, OTHER]) == ["[1, 0, 0]", "[1, 0]"]
    assert len(server.prompts) == 3


def test_a_slow_answer_times_out_and_is_asked_again(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastJudge, "timeout", 0.5)
    server.mishaps = ["slow 1.5"]
    assert asked().ask([QUESTION]) == ["[1, 0, 0]"]
    assert len(server.prompts) == 2


@pytest.mark.parametrize(
    ("mishap", "n", "sentence"),
    [
        ("status 401", 1, "refuses the key"),
        ("status 404", 1, "does not know this address or model"),
        ("status 400", 1, "does not accept the request"),
        ("status 429 7200", 1, "asks to wait 7200 seconds; answers so far are kept"),
        ("status 500", 4, "HTTP status 500 4 times; answers so far are kept"),
    ],
)
def test_what_cannot_succeed_is_not_repeated(server: ChatServer, mishap: str, n: int, sentence: str) -> None:
    server.mishaps = [mishap] * 10
    with pytest.raises(UserError, match=sentence) as caught:
        asked().ask([QUESTION])
    assert len(server.prompts) == n
    assert KEY not in str(caught.value)
    assert server.url not in str(caught.value)


def test_the_key_follows_no_redirect(server: ChatServer) -> None:
    with chat_server() as elsewhere:
        server.mishaps = [f"redirect {elsewhere.url}/chat/completions"]
        with pytest.raises(UserError, match="redirects"):
            asked().ask([QUESTION])
        assert elsewhere.prompts == []


@pytest.mark.parametrize("missing", ["OPENAI_API_KEY", "OPENAI_BASE_URL"])
def test_a_missing_variable_is_named(server: ChatServer, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=missing):
        asked()


def test_unreadable_answers_and_refusals_are_left_out_not_wrong(server: ChatServer) -> None:
    server.mishaps = ["refusal"]
    judge, digits, windows = asked(), Explanation("digits"), planted_sets().units[0].second
    assert np.isnan(judge.verdicts(digits, windows[:1])).all()
    assert judge.verdicts(digits, windows[:3]).tolist() == [1, 0, 0]
    server.content = lambda prompt: "[1, 0"
    assert np.isnan(judge.verdicts(digits, windows[:3], windows.values[:3] > 0)).all()
    assert (judge.tally.failed, judge.tally.asked) == (2, 3)


FEW = Budget(units=3, shown=12, contrast=12, scored=8, least=8)


def study_once(folder: Path) -> tuple[OpenAIJudge, pd.DataFrame]:
    judge = asked(folder / "answers.jsonl", concurrency=3)
    with closing(judge.answers):
        return judge, study.study([planted_sets(budget=FEW)], judge, progress=False)


def test_a_second_run_asks_nothing_and_a_recording_repeats_it(server: ChatServer, tmp_path: Path) -> None:
    first, table = study_once(tmp_path)
    assert first.tally.calls == server.answered.total() > 0
    assert max(server.answered.values()) == 1
    assert 1 < server.most <= 3
    again, same = study_once(tmp_path)
    assert again.tally.calls == 0
    assert server.answered.total() == first.tally.calls
    assert same.equals(table)
    replay = ReplayJudge(tmp_path / "answers.jsonl")
    assert study.study([planted_sets(budget=FEW)], replay, progress=False).equals(table)
    with pytest.raises(UserError, match="The recording has no answer"):
        study.study([planted_sets(seed=1, budget=FEW)], replay, progress=False)


def test_too_many_unreadable_answers_stop_a_study(server: ChatServer, tmp_path: Path) -> None:
    plain = server.content
    server.content = lambda prompt: plain(prompt) if "EXPLANATION" in prompt else "no idea"
    with pytest.raises(UserError, match="could not be read, more than 5%"):
        study_once(tmp_path)


def test_killed_in_the_middle_nothing_is_lost_or_repeated(server: ChatServer, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:3]))}
    script = f"import pathlib, test_judges\ntest_judges.study_once(pathlib.Path({str(tmp_path)!r}))"
    server.stop_after = 11
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    deadline, path, written = time.monotonic() + 60, tmp_path / "answers.jsonl", 0
    # Until the process has written what was answered, and hangs on what is not.
    while time.monotonic() < deadline and not server.stop_after <= written == server.answered.total():
        time.sleep(0.05)
        written = path.read_text().count("\n") if path.is_file() else 0
    process.kill()
    process.wait()
    before = dict(server.answered)
    assert sum(before.values()) >= 11
    server.stop_after = None
    server.released.set()
    judge, table = study_once(tmp_path)
    assert max(server.answered.values()) == 1, "a question that was answered is not asked again"
    assert set(before) <= set(server.answered)
    assert judge.tally.calls == len(server.answered) - len(before), "nothing that was answered is lost"
    assert table["detection"].notna().all()


def test_the_key_is_in_no_file_and_no_log(
    server: ChatServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    server.mishaps = ["status 500", "status 429 0", "cut"]
    judge, _ = study_once(tmp_path)
    server.mishaps = ["status 403"]
    with pytest.raises(UserError) as caught:
        judge.ask([OTHER])
    server.mishaps = ["hangup"] * 4
    with pytest.raises(UserError, match="no connection") as lost:
        judge.ask([OTHER])
    said = [*capfd.readouterr(), caplog.text, repr(judge)]
    said += ["".join(traceback.format_exception(error.value)) for error in (caught, lost)]
    said += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(list(tmp_path.rglob("*"))) >= 1
    for secret in (KEY, server.url, server.url.removeprefix("http://")):
        assert not any(secret in text for text in said)


# ---- local model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> models.LanguageModel:
    return models.load_model(save_tiny_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=4096))


class SingleLetters(LocalJudge):
    """The byte tokenizer has no token for whole words, so these stand in for yes and no."""

    def _single(self, *words: str) -> list[int]:
        return {"Y": [10], "N": [20]}.get(words[0][0], [30])


def test_verdicts_are_read_from_the_logits_of_the_last_token(tiny: models.LanguageModel) -> None:
    judge = SingleLetters(tiny, Answers(None), batch_size=3)
    texts = ("a", "some longer text", "b 1", "c" * 40)
    requests = [judges.render("detection_one", 1, explanation="digits", text=text) for text in texts]
    for request, answer in zip(requests, judge.ask(requests), strict=True):
        ids = torch.tensor([tiny.tokenizer.encode(judge.prompt(request), add_special_tokens=False)])
        logits = tiny.logits(ids)[0, -1]
        assert float(answer) == pytest.approx(float((logits[10] - logits[20]).sigmoid()), abs=1e-5)


def test_local_answers_are_stored_and_replayed(tiny: models.LanguageModel, tmp_path: Path) -> None:
    sets = [planted_sets(budget=Budget(units=2, shown=8, contrast=8, scored=8, least=8))]
    scorers = ("detection", "simulation")
    judge = SingleLetters(tiny, Answers(tmp_path / "answers.jsonl"))
    with closing(judge.answers):
        table = study.study(sets, judge, scorers, progress=False)
        calls = judge.tally.calls
        again = study.study(sets, judge, scorers, progress=False)
    assert judge.tally.calls == calls > 0
    assert judge.tally.failed <= 0.05 * judge.tally.asked
    replay = ReplayJudge(tmp_path / "answers.jsonl")
    for same in (again, study.study(sets, replay, scorers, progress=False)):
        assert same.equals(table)


def test_what_a_judge_cannot_do_is_refused(tiny: models.LanguageModel) -> None:
    with pytest.raises(UserError, match="no single token for 'Yes'"):
        LocalJudge(tiny, Answers(None))
    with pytest.raises(UserError, match="only apply explanations that it made itself"):
        judges.RulesJudge().verdicts(Explanation("digits"), planted_sets().units[0].second)
