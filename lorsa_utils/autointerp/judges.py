"""Judges explain units and say, from an explanation, where a unit is active.

Every answer of a language model is stored at once (`Answers`) under a hash of model, prompt and parameters, so a second
run asks nothing again, and a killed run resumes at the first unanswered question. An unreadable answer is NaN, never a
wrong answer; `Judge.tally` counts them.
"""

from __future__ import annotations

import abc
import contextlib
import email.utils
import functools
import json
import logging
import math
import os
import re
import string
import threading
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import filelock
import numpy as np
import tenacity
import torch
from typing_extensions import override

from lorsa_utils import store
from lorsa_utils.autointerp import rules
from lorsa_utils.autointerp.examples import WIDTH, UnitExamples, Windows
from lorsa_utils.autointerp.rules import Rule
from lorsa_utils.exceptions import UserError

if TYPE_CHECKING:
    import httpx

    from lorsa_utils.models import LanguageModel

SCORERS = ("detection", "fuzzing", "simulation")
MAX_FAILED, FEWEST_TO_STOP = 0.05, 40
"""Share of unreadable answers above which a study is stopped, and answers before it may be stopped while it runs."""
SHOWN_STRONGEST, SHOWN_WEAKER, SHOWN_SILENT = 7, 3, 5
LEAST_SHARE = 0.05
"""Share of the mass from which a source is shown to the explainer."""
PER_CALL = 5
"""Texts in one question to a chat endpoint."""


class Explanation(NamedTuple):
    """Of a unit."""

    text: str
    rule: Rule | None = None


class Tally:
    """Counts answers asked for, unreadable ones, and questions to a language model; thread-safe."""

    def __init__(self) -> None:
        self.asked = self.failed = self.calls = 0
        self._lock = threading.Lock()

    def add(self, asked: int = 0, failed: int = 0, calls: int = 0) -> None:
        """Raise the counts."""
        with self._lock:
            self.asked += asked
            self.failed += failed
            self.calls += calls

    def check(self, final: bool = False) -> None:
        """UserError if more than `MAX_FAILED` of the answers cannot be read."""
        if self.asked >= (1 if final else FEWEST_TO_STOP) and self.failed > MAX_FAILED * self.asked:
            raise UserError(
                f"{self.failed} of {self.asked} answers of the judge could not be read, more than {MAX_FAILED:.0%}; "
                "use another judge model."
            )


class Judge(abc.ABC):
    """Explains units, and applies explanations to windows."""

    name: str
    is_proxy = False
    """Whether it stands in for a language model."""
    concurrency = 1
    """Units at a time."""

    def __init__(self) -> None:
        self.tally = Tally()

    @abc.abstractmethod
    def explain(self, unit: UnitExamples) -> Explanation | None:
        """From the first half's windows; None if unreadable."""

    @abc.abstractmethod
    def verdicts(self, explanation: Explanation, windows: Windows, marks: np.ndarray | None = None) -> np.ndarray:
        """Whether the unit is active in each window, [n], from 0 to 1 (above 0.5 is yes), NaN for no answer.

        With `marks`, bool [n, WIDTH]: whether the marked tokens are those where it is active.
        """

    @abc.abstractmethod
    def simulate(self, explanation: Explanation, windows: Windows) -> np.ndarray:
        """Activation over the unit's largest at each token, [n, WIDTH]; NaN in rows without a readable answer."""


class RulesJudge(Judge):
    """Learns and applies `rules`: a proxy without a language model."""

    name = "rules"
    is_proxy = True

    @override
    def explain(self, unit: UnitExamples) -> Explanation:
        self.tally.add(1)
        rule = rules.learn(unit.first)
        return Explanation(rules.describe(rule, unit.first.corpus.strings), rule)

    @override
    def verdicts(self, explanation: Explanation, windows: Windows, marks: np.ndarray | None = None) -> np.ndarray:
        holds = self.simulate(explanation, windows) > 0
        if marks is None:
            return holds.any(axis=1).astype(float)
        return ((holds & marks).sum(axis=1) * 2 >= np.maximum(1, marks.sum(axis=1))).astype(float)

    @override
    def simulate(self, explanation: Explanation, windows: Windows) -> np.ndarray:
        if explanation.rule is None:
            raise UserError(
                "The rules judge can only apply explanations that it made itself; judge texts with another backend."
            )
        self.tally.add(len(windows))
        return rules.predict(explanation.rule, windows)


# ---- questions and answers


class Request(NamedTuple):
    """A question to a language model."""

    kind: str
    """Name of the prompt file."""
    messages: tuple[tuple[str, str], ...]
    """(role, text)."""
    max_tokens: int


@functools.cache
def _templates() -> dict[str, tuple[str, ...]]:
    """(system, user) by kind."""
    files = resources.files("lorsa_utils.autointerp").joinpath("templates").iterdir()
    texts = {file.name.removesuffix(".txt"): file.read_text(encoding="utf-8") for file in files}
    return {kind: tuple(map(str.strip, text.split("\n---\n"))) for kind, text in texts.items()}


def prompts_sha256() -> str:
    """Of all prompt files, reported with results."""
    return store.sha256_json(_templates())


def render(kind: str, max_tokens: int, **values: Any) -> Request:
    """Fill a prompt file; placeholders inside values stay as they are."""
    system, user = _templates()[kind]
    return Request(kind, (("system", system), ("user", string.Template(user).substitute(values))), max_tokens)


def evenly(rows: np.ndarray, n: int) -> np.ndarray:
    """At most `n` of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]


def explain_request(unit: UnitExamples) -> Request:
    """With the strongest windows, some weaker and silent ones, and their sources."""
    windows, peaks = unit.first, unit.first.values.max(axis=1)
    ranked = np.argsort(-peaks, kind="stable")[: windows.active.sum()]
    strongest, weaker = ranked[:SHOWN_STRONGEST], evenly(ranked[SHOWN_STRONGEST:], SHOWN_WEAKER)
    active = []
    for row in [*strongest, *weaker]:
        sources = [
            json.dumps(windows.corpus.strings[token], ensure_ascii=False)
            for token, share in zip(windows.sources[row].tolist(), windows.shares[row], strict=True)
            if token in windows.corpus.strings and share >= LEAST_SHARE
        ]
        origin = f" (from {', '.join(sources)})" if sources else ""
        text = windows.marked(row, windows.values[row] > 0.3 * peaks[row])
        active.append(f"[{round(10 * peaks[row] / unit.maximum)}] {text}{origin}")
    silent = [windows.marked(row) for row in evenly(np.flatnonzero(~windows.active), SHOWN_SILENT)]
    return render("explain", 50, active=_lines(active), silent=_lines(silent))


def verdict_request(kind: str, explanation: str, texts: Sequence[str]) -> Request:
    """Detection or fuzzing of some texts."""
    numbered = _lines([f"{number}. {text}" for number, text in enumerate(texts, start=1)])
    return render(kind, 12 + 4 * len(texts), explanation=explanation, n=len(texts), texts=numbered)


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(text.replace("\n", "\\n") for text in texts)


def parse_explanation(answer: str) -> str | None:
    """The line after EXPLANATION:, None when it is missing or empty."""
    match = re.search(r"EXPLANATION:\s*(.+)", answer)
    return (match[1].strip().strip("`*\"' ") if match else "") or None


def parse_numbers(answer: str, n: int, highest: int) -> list[float] | None:
    """A JSON list of `n` numbers from 0 to `highest`, possibly in a code fence; None otherwise."""
    match = re.fullmatch(r"\s*(?:```\w*\s*)?(\[[^\[\]]*\])\s*(?:```)?\s*", answer)
    with contextlib.suppress(ValueError):
        values = json.loads(match[1]) if match else []
        if len(values) == n and all(isinstance(value, int | float) and 0 <= value <= highest for value in values):
            return [float(value) for value in values]
    return None


def read_answers(path: str | Path) -> dict[str, dict[str, Any]]:
    """Recorded answers by their keys; UserError if the file is missing, or a line is damaged."""
    if not Path(path).is_file():
        raise UserError(f"There are no recorded answers at {path}; give the answers.jsonl of an earlier run.")
    records = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"Line {number} of {path} is damaged; delete that line.") from error
    return records


class Answers:
    """Answers on disk, one JSON object per line; one process at a time may write."""

    def __init__(self, path: str | Path | None) -> None:
        """In memory without a path; UserError if another process writes to the file, or a line is damaged."""
        self.records: dict[str, dict[str, Any]] = {}
        self._lock, self._open = threading.Lock(), contextlib.ExitStack()
        self._file: BinaryIO | None = None
        if path is None:
            return
        path = Path(path)
        store.require_writable(path.parent)
        try:
            self._open.enter_context(filelock.FileLock(f"{path}.lock").acquire(timeout=0))
        except filelock.Timeout as error:
            raise UserError(f"Another run is writing to {path}; wait for it, or choose another folder.") from error
        content = path.read_bytes() if path.is_file() else b""
        if not content.endswith(b"\n"):  # a killed run can leave half a line at the end
            store.write_bytes(path, content[: content.rfind(b"\n") + 1])
        self._file = self._open.enter_context(open(path, "ab"))  # noqa: SIM115
        self.records = read_answers(path)

    def close(self) -> None:
        """Let other processes write."""
        self._open.close()

    def put(self, key: str, answer: str, **facts: Any) -> None:
        """Store an answer, on disk when this returns."""
        record = {"key": key, "answer": answer, **facts}
        with self._lock:
            self.records[key] = record
            if self._file is not None:
                self._file.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())


class TextJudge(Judge):
    """Prompts a language model."""

    one_by_one = False
    """Whether each text is a question, answered by a probability; else up to PER_CALL are, by a JSON list."""

    def __init__(self, model: str, answers: Answers) -> None:
        super().__init__()
        self.name = self.model = model
        self.answers = answers

    def key(self, request: Request) -> str:
        """Under which the answer is stored."""
        return store.sha256_json(
            {"model": self.model, "messages": request.messages, "max_tokens": request.max_tokens, "temperature": 0}
        )

    @abc.abstractmethod
    def complete(self, requests: Sequence[Request]) -> Iterable[str]:
        """Ask the model at least one question, all of one kind; an empty answer is a refusal."""

    def ask(self, requests: Sequence[Request]) -> list[str]:
        """Stored answers where there are any; others are stored as they come."""
        keys, records = [self.key(request) for request in requests], self.answers.records
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in records}
        if missing:
            answers = self.complete(list(missing.values()))
            for (key, request), answer in zip(missing.items(), answers, strict=True):
                self.answers.put(key, answer, kind=request.kind, model=self.model)
                self.tally.add(calls=1)
        return [str(records[key]["answer"]) for key in keys]

    @override
    def explain(self, unit: UnitExamples) -> Explanation | None:
        text = parse_explanation(self.ask([explain_request(unit)])[0])
        self.tally.add(1, int(text is None))
        return None if text is None else Explanation(text)

    def numbers(self, answer: str, n: int, highest: int) -> list[float]:
        """Read from an answer and counted; NaN if unreadable."""
        values = parse_numbers(f"[{answer}]" if self.one_by_one else answer, n, highest)
        self.tally.add(1, int(values is None))
        return [math.nan] * n if values is None else values

    @override
    def verdicts(self, explanation: Explanation, windows: Windows, marks: np.ndarray | None = None) -> np.ndarray:
        """With `one_by_one`, relative to a contentless text (Zhao et al. 2021, "Calibrate before use")."""
        kind = "detection" if marks is None else "fuzzing"
        texts = [windows.marked(row, None if marks is None else marks[row]) for row in range(len(windows))]
        if not self.one_by_one:
            chunks = [texts[first : first + PER_CALL] for first in range(0, len(texts), PER_CALL)]
            answers = self.ask([verdict_request(kind, explanation.text, chunk) for chunk in chunks])
            lists = [self.numbers(answer, len(chunk), 1) for chunk, answer in zip(chunks, answers, strict=True)]
            return np.concatenate(lists)
        requests = [render(f"{kind}_one", 1, explanation=explanation.text, text=text) for text in (*texts, "N/A")]
        *answers, contentless = self.ask(requests)
        values = [self.numbers(answer, 1, 1)[0] for answer in answers]
        values += parse_numbers(f"[{contentless}]", 1, 1) or [math.nan]
        p = np.clip(values, 1e-6, 1 - 1e-6)
        logits = np.log(p / (1 - p))
        return 1 / (1 + np.exp(logits[-1] - logits[:-1]))

    @override
    def simulate(self, explanation: Explanation, windows: Windows) -> np.ndarray:
        requests, sizes = [], (windows.tokens >= 0).sum(axis=1).tolist()
        for row, n in enumerate(sizes):
            tokens = "\n".join(json.dumps(piece, ensure_ascii=False) for piece in windows.pieces(row))
            kind = "simulation_one" if self.one_by_one else "simulation"
            requests.append(render(kind, 12 + 4 * n, explanation=explanation.text, n=n, tokens=tokens))
        result = np.zeros((len(windows), WIDTH))
        for row, answer in enumerate(self.ask(requests)):
            result[row, : sizes[row]] = np.array(self.numbers(answer, sizes[row], 10)) / 10
        return result


class ReplayJudge(TextJudge):
    """Repeats answers recorded by another judge."""

    def __init__(self, recording: str | Path, model: str | None = None) -> None:
        """Of the answers.jsonl of a run; UserError as `read_answers`, or if it is to choose between several models."""
        answers = Answers(None)
        answers.records = read_answers(recording)
        models = sorted({str(record["model"]) for record in answers.records.values()})
        if model is None and len(models) != 1:
            raise UserError(
                f"{recording} holds answers of {len(models)} models ({', '.join(models)}); name one of them."
            )
        super().__init__(model or models[0], answers)
        self.name = f"{self.model} (replayed)"
        kinds = {str(record["kind"]) for record in answers.records.values() if record["model"] == self.model}
        self.one_by_one = any(kind.endswith("_one") for kind in kinds)

    @override
    def complete(self, requests: Sequence[Request]) -> Iterable[str]:
        raise UserError(
            f"The recording has no answer to a question of the {requests[0].kind} stage; "
            "use the settings that it was made with."
        )


# ---- local


class LocalJudge(TextJudge):
    """A causal model on this machine, which explains greedily; other answers are read from logits."""

    one_by_one = True

    def __init__(self, model: LanguageModel, answers: Answers, batch_size: int = 16) -> None:
        """Asked through its chat template if it has one; UserError if its tokenizer has no token for "yes" or "no"."""
        super().__init__(f"{model.name} {model.fingerprint[:8]}", answers)
        self.language_model, self.batch_size = model, batch_size
        self._yes, self._no = (
            self._single(word, word.lower(), f" {word}", f" {word.lower()}") for word in ("Yes", "No")
        )
        self._digits = [self._single(str(digit))[0] for digit in range(10)]

    def _single(self, *words: str) -> list[int]:
        ids = sorted({ids[0] for ids in map(self._ids, words) if len(ids) == 1})
        if not ids:
            raise UserError(
                f"{self.language_model.name} has no single token for {words[0]!r}; use another model as judge."
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.language_model.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, request: Request) -> str:
        """What the model reads."""
        tokenizer = self.language_model.tokenizer
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": role, "content": text} for role, text in request.messages]
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return "\n\n".join(text for _, text in request.messages) + "\n\nAnswer:"

    @override
    def complete(self, requests: Sequence[Request]) -> Iterable[str]:
        single = {"explain": self._generated, "simulation_one": self._simulated}.get(requests[0].kind)
        if single:
            yield from map(single, requests)
            return
        for first in range(0, len(requests), self.batch_size):
            probabilities = self._probabilities(requests[first : first + self.batch_size])
            yield from (f"{probability:.6f}" for probability in probabilities)

    def _generated(self, request: Request) -> str:
        model = self.language_model
        ids = torch.tensor([self._ids(self.prompt(request) + "EXPLANATION:")], device=model.device)
        if ids.shape[1] + request.max_tokens > model.context_length:
            return ""
        generated = model.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        text = str(model.tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
        return "EXPLANATION: " + (text.strip().splitlines() or [""])[0]

    @torch.no_grad()
    def _probabilities(self, requests: Sequence[Request]) -> list[float]:
        """Probabilities of yes among yes and no; the prompts' common beginning is computed once."""
        model, device = self.language_model.model, self.language_model.device
        prompts = [self._ids(self.prompt(request)) for request in requests]
        shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        tails = [ids[shared:] for ids in prompts]
        width = max(map(len, tails))
        batch = torch.tensor([ids + [0] * (width - len(ids)) for ids in tails], device=device)
        past = None
        if shared:
            prefix = torch.tensor([prompts[0][:shared]], device=device)
            past = model.base_model(input_ids=prefix, use_cache=True).past_key_values
            past.batch_repeat_interleave(len(tails))
        outputs = model.base_model(input_ids=batch, past_key_values=past, use_cache=past is not None)
        last = outputs.last_hidden_state[torch.arange(len(tails)), [len(ids) - 1 for ids in tails]]
        logits = model.get_output_embeddings()(last).float()
        yes, no = (logits[:, ids].logsumexp(dim=1) for ids in (self._yes, self._no))
        return (yes - no).sigmoid().tolist()

    @torch.no_grad()
    def _simulated(self, request: Request) -> str:
        """Expected digit after each token: one pass over all lines, each with a question mark as its number."""
        model = self.language_model.model
        ids, places = self._ids(self.prompt(request)), []
        for piece in request.messages[1][1].rpartition("one token a line:")[2].strip("\n").split("\n"):
            ids += self._ids(f"{piece}\t")
            places.append(len(ids) - 1)
            ids += self._ids("?\n")
        inputs = torch.tensor([ids], device=self.language_model.device)
        hidden = model.base_model(input_ids=inputs).last_hidden_state[0, places]
        logits = model.get_output_embeddings()(hidden).float()[:, self._digits]
        expected = logits.softmax(dim=1) @ torch.arange(10.0, device=logits.device)
        return ", ".join(f"{value:.3f}" for value in expected.tolist())


# ---- openai


class _Unanswered(UserError):
    """To be asked again; the message is shown after the last attempt."""


class OpenAIJudge(TextJudge):
    """Any server with OpenAI's chat endpoint (`$OPENAI_BASE_URL`/chat/completions).

    Address and key come from the environment and stay in memory: neither is stored, logged or shown. No redirect is
    followed, so the key goes to that address alone. A Retry-After holds all threads.
    """

    attempts = 8
    first_delay = 1.0
    """Seconds before the second attempt, then doubled."""
    longest_delay = 60.0
    """Where doubling stops; a Retry-After may be longer."""
    longest_retry_after = 900.0
    """The judge gives up when a server asks for more."""
    timeout = 120.0

    def __init__(self, model: str, answers: Answers, concurrency: int = 4) -> None:
        """At most `concurrency` questions are in flight; UserError if a variable is missing or not usable."""
        import httpx  # here: it draws a random number on import, which importing this package must not do

        super().__init__(model, answers)
        self.concurrency = concurrency
        key, base = os.environ.get("OPENAI_API_KEY", "").strip(), os.environ.get("OPENAI_BASE_URL", "").strip()
        if not key:
            raise UserError(
                "$OPENAI_API_KEY is not set; set it to the key of the endpoint (any text for a server without keys)."
            )
        if not base.startswith(("http://", "https://")):
            raise UserError(
                "$OPENAI_BASE_URL is not set to an http(s) address; set it to one that ends before /chat/completions."
            )
        if not all(32 < ord(character) < 127 for character in key + base):
            raise UserError(
                "$OPENAI_API_KEY or $OPENAI_BASE_URL contains a character that cannot be sent; copy them again."
            )
        for logger in ("httpx", "httpcore"):  # they log every address
            logging.getLogger(logger).setLevel(logging.WARNING)
        self._endpoint = base.rstrip("/") + "/chat/completions"
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(self.timeout, pool=None),
            limits=httpx.Limits(max_connections=concurrency),
            follow_redirects=False,
        )
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Unanswered),
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=tenacity.wait_exponential(self.first_delay, self.longest_delay)
            + tenacity.wait_random(0, self.first_delay / 4),
            reraise=True,
        )
        self._no_answer = (httpx.HTTPError, httpx.InvalidURL)
        self._resume_at = 0.0
        self._limit_name = "max_tokens"

    @override
    def complete(self, requests: Sequence[Request]) -> Iterable[str]:
        """UserError if the server refuses the key or the request, or gives no complete answer after all attempts."""
        return (self._retrying(self._attempt, request) for request in requests)

    def _attempt(self, request: Request) -> str:
        while (left := self._resume_at - time.monotonic()) > 0:
            time.sleep(left)
        response = self._post(request)
        if response is not None and response.status_code == 400 and "max_completion_tokens" in response.text:
            self._limit_name = "max_completion_tokens"
            response = self._post(request)
        if response is None:
            reason = "no connection, or no answer in time"
        elif response.status_code == 200:
            if (answer := _content(response.content)) is not None:
                return answer
            reason = "an answer that was cut"
        elif response.status_code in (408, 409, 425, 429) or response.status_code >= 500:
            self._hold_all(retry_after_seconds(response.headers.get("Retry-After", "")))
            reason = f"HTTP status {response.status_code}"
        else:
            raise UserError(_refused(response.status_code))
        raise _Unanswered(
            f"The endpoint gave {reason} {self.attempts} times; "
            "answers so far are kept, run the same command again later."
        )

    def _post(self, request: Request) -> httpx.Response | None:
        """None if it fails: an exception of the client would show the address."""
        content = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in request.messages],
            "temperature": 0,
            self._limit_name: request.max_tokens,
        }
        with contextlib.suppress(*self._no_answer):
            return self._client.post(self._endpoint, json=content)
        return None

    def _hold_all(self, seconds: float) -> None:
        if seconds > self.longest_retry_after:
            raise UserError(
                f"The endpoint asks to wait {seconds:.0f} seconds; "
                "answers so far are kept, run the same command again then."
            )
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)


def _refused(status: int) -> str:
    what, advice = "does not accept the request", "check the model's name and what it supports"
    if status in (401, 403):
        what, advice = "refuses the key", "check $OPENAI_API_KEY"
    elif 300 <= status < 400:
        what, advice = "redirects", "set $OPENAI_BASE_URL to the address that it moved to"
    elif status == 404:
        what, advice = "does not know this address or model", "check $OPENAI_BASE_URL and the model's name"
    return f"The endpoint {what} (HTTP status {status}); {advice}."


def _content(body: bytes) -> str | None:
    """Text of a chat completion, empty for a refusal; None for an incomplete body."""
    try:
        message = json.loads(body)["choices"][0]["message"]
        return "" if message.get("refusal") else str(message.get("content") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def retry_after_seconds(header: str) -> float:
    """Seconds of a Retry-After header (number or date); 0 if it is neither."""
    seconds = 0.0
    with contextlib.suppress(ValueError, OverflowError):
        if date := email.utils.parsedate_tz(header):
            seconds = email.utils.mktime_tz(date) - time.time()
    with contextlib.suppress(ValueError):
        seconds = float(header)
    return max(0.0, seconds)
