"""Judges explain units and say, from an explanation, where a unit is active.

- `RulesJudge` learns and applies a rule (`rules`): a proxy without a language model.
- `LocalJudge` is any causal model through transformers; verdicts are read from logits.
- `OpenAIJudge` is any server with OpenAI's chat endpoint.
- `ReplayJudge` repeats recorded answers.

Every answer of a language model is stored at once (`Answers`) under a hash of model, prompt and parameters, so a second
run asks nothing again, and a killed run resumes at the first unanswered question. An unreadable answer is NaN, never a
wrong answer; `Judge.tally` counts them.
"""

from __future__ import annotations

import abc
import contextlib
import datetime
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
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

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
MAX_FAILED = 0.05
"""Share of unreadable answers above which a study is stopped."""
FEWEST_TO_STOP = 40
"""Answers before a running study may be stopped."""
SHOWN_STRONGEST, SHOWN_WEAKER, SHOWN_SILENT = 7, 3, 5
LEAST_SHARE = 0.05
"""Share of the mass from which a source is shown to the explainer."""
PER_CALL = 5
"""Texts in one question to a chat endpoint."""


class Explanation(NamedTuple):
    """What a judge says about a unit."""

    text: str
    rule: Rule | None = None


class Tally:
    """Counts answers asked for, unreadable ones, and questions to a language model."""

    def __init__(self) -> None:
        self.asked = self.failed = self.calls = 0
        self._lock = threading.Lock()

    def add(self, asked: int = 0, failed: int = 0, calls: int = 0) -> None:
        """Thread-safe."""
        with self._lock:
            self.asked += asked
            self.failed += failed
            self.calls += calls

    def check(self, final: bool = False) -> None:
        """Raise a UserError if more than `MAX_FAILED` of the answers cannot be read."""
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
        """An explanation from the first half's windows; None if unreadable."""

    @abc.abstractmethod
    def verdicts(self, explanation: Explanation, windows: Windows, marks: np.ndarray | None = None) -> np.ndarray:
        """Whether the unit is active in each window, [n], from 0 to 1 (above 0.5 is yes), NaN for no answer.

        With `marks` (bool [n, WIDTH]): whether the marked tokens are those where it is active.
        """

    @abc.abstractmethod
    def simulate(self, explanation: Explanation, windows: Windows) -> np.ndarray:
        """Activation over the unit's largest at each token, [n, WIDTH]; NaN in rows without a readable answer."""


class RulesJudge(Judge):
    """Learns rules (`rules`)."""

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
    """One question to a language model."""

    kind: str
    """Name of the template."""
    messages: tuple[tuple[str, str], ...]
    """(role, text)."""
    max_tokens: int


@functools.cache
def _template(name: str) -> tuple[str, str]:
    path = resources.files("lorsa_utils.autointerp").joinpath("templates", f"{name}.txt")
    system, user = path.read_text(encoding="utf-8").split("\n---\n")
    return system.strip(), user.strip()


def prompts_sha256() -> str:
    """Hash of all prompt files, reported with results."""
    names = ("explain", *SCORERS, *(f"{scorer}_one" for scorer in SCORERS))
    return store.sha256_json({name: _template(name) for name in names})


def render(kind: str, max_tokens: int, **values: Any) -> Request:
    """Fill a prompt file; placeholders inside values stay as they are."""
    system, user = _template(kind)
    return Request(kind, (("system", system), ("user", string.Template(user).substitute(values))), max_tokens)


def evenly(rows: np.ndarray, n: int) -> np.ndarray:
    """At most `n` of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]


def explain_request(unit: UnitExamples) -> Request:
    """The question for an explanation, with the strongest windows, some weaker and silent ones, and their sources."""
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
    """The detection or fuzzing question about some texts."""
    numbered = _lines([f"{number}. {text}" for number, text in enumerate(texts, start=1)])
    return render(kind, 12 + 4 * len(texts), explanation=explanation, n=len(texts), texts=numbered)


def simulation_request(explanation: str, pieces: Sequence[str], kind: str = "simulation") -> Request:
    """The simulation question about one text."""
    tokens = "\n".join(json.dumps(piece, ensure_ascii=False) for piece in pieces)
    return render(kind, 12 + 4 * len(pieces), explanation=explanation, n=len(pieces), tokens=tokens)


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(text.replace("\n", "\\n") for text in texts)


def parse_explanation(answer: str) -> str | None:
    """The line after EXPLANATION:, None when it is missing or empty."""
    match = re.search(r"EXPLANATION:\s*(.+)", answer)
    return (match[1].strip().strip("`*\"' ") if match else "") or None


def parse_numbers(answer: str, n: int, highest: int) -> list[float] | None:
    """A JSON list of `n` numbers from 0 to `highest`, possibly in a code fence; None otherwise."""
    match = re.fullmatch(r"\s*(?:```\w*\s*)?(\[[^\[\]]*\])\s*(?:```)?\s*", answer)
    try:
        values = json.loads(match[1]) if match else []
    except ValueError:
        return None
    readable = len(values) == n and all(isinstance(value, int | float) and 0 <= value <= highest for value in values)
    return [float(value) for value in values] if readable else None


class Answers:
    """Answers on disk, one JSON object per line; one process at a time may write."""

    def __init__(self, path: str | Path | None, read_only: bool = False) -> None:
        """Open a file; without a path, keep answers in memory.

        Raises:
            UserError: another process writes to it, there is nothing to read, or a line is damaged.
        """
        self.records: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        if path is None:
            return
        path = Path(path)
        if not read_only:
            self._open(path)
        elif not path.is_file():
            raise UserError(f"There are no recorded answers at {path}; give the answers.jsonl of an earlier run.")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"Line {number} of {path} is damaged; delete that line.") from error

    def _open(self, path: Path) -> None:
        store.require_writable(path.parent)
        self._file_lock = filelock.FileLock(f"{path}.lock")
        try:
            self._file_lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(f"Another run is writing to {path}; wait for it, or choose another folder.") from error
        content = path.read_bytes() if path.is_file() else b""
        if not content.endswith(b"\n"):  # a killed run can leave half a line at the end
            store.write_bytes(path, content[: content.rfind(b"\n") + 1])
        self._file = open(path, "ab")  # noqa: SIM115

    def close(self) -> None:
        """Let other processes write."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._file_lock.release()

    def get(self, key: str) -> str | None:
        """The stored answer, if any."""
        record = self.records.get(key)
        return None if record is None else str(record["answer"])

    def put(self, key: str, answer: str, **facts: Any) -> None:
        """Store an answer, on disk when this returns."""
        record = {"key": key, "answer": answer, **facts}
        with self._lock:
            self.records[key] = record
            if self._file is not None:
                self._file.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())

    def __len__(self) -> int:
        return len(self.records)


class TextJudge(Judge):
    """Shared by judges that prompt a language model."""

    one_by_one = False
    """Whether each text is its own question, answered by a probability; else up to PER_CALL, by a JSON list."""

    def __init__(self, model: str, answers: Answers) -> None:
        super().__init__()
        self.name = self.model = model
        self.answers = answers

    def key(self, request: Request) -> str:
        """Hash of model, prompt and parameters."""
        return store.sha256_json(
            {"model": self.model, "messages": request.messages, "max_tokens": request.max_tokens, "temperature": 0}
        )

    @abc.abstractmethod
    def complete(self, request: Request) -> str:
        """Ask the model. An empty text is a refusal."""

    def complete_all(self, requests: Sequence[Request]) -> None:
        """Ask several questions, storing each answer."""
        for request in requests:
            self.put(request, self.complete(request))

    def put(self, request: Request, answer: str) -> None:
        """Store and count an answer."""
        self.answers.put(self.key(request), answer, kind=request.kind, model=self.model)
        self.tally.add(calls=1)

    def ask(self, requests: Sequence[Request]) -> list[str]:
        """Answers to questions, stored ones where possible."""
        answers = {request: self.answers.get(self.key(request)) for request in requests}
        missing = [request for request, answer in answers.items() if answer is None]
        self.complete_all(missing)
        answers |= {request: str(self.answers.records[self.key(request)]["answer"]) for request in missing}
        return [str(answers[request]) for request in requests]

    @override
    def explain(self, unit: UnitExamples) -> Explanation | None:
        text = parse_explanation(self.ask([explain_request(unit)])[0])
        self.tally.add(1, int(text is None))
        return None if text is None else Explanation(text)

    def _numbers(self, answer: str, n: int, highest: int) -> list[float]:
        values = parse_numbers(f"[{answer}]" if self.one_by_one else answer, n, highest)
        self.tally.add(1, int(values is None))
        return [math.nan] * n if values is None else values

    @override
    def verdicts(self, explanation: Explanation, windows: Windows, marks: np.ndarray | None = None) -> np.ndarray:
        kind = "detection" if marks is None else "fuzzing"
        texts = [windows.marked(row, None if marks is None else marks[row]) for row in range(len(windows))]
        return self.verdicts_on(kind, explanation.text, texts)

    def verdicts_on(self, kind: str, explanation: str, texts: Sequence[str]) -> np.ndarray:
        """Verdicts [n]; probabilities are relative to a contentless text (Zhao et al. 2021, "Calibrate before use")."""
        if not self.one_by_one:
            chunks = [texts[first : first + PER_CALL] for first in range(0, len(texts), PER_CALL)]
            answers = self.ask([verdict_request(kind, explanation, chunk) for chunk in chunks])
            lists = [self._numbers(answer, len(chunk), 1) for chunk, answer in zip(chunks, answers, strict=True)]
            return np.concatenate(lists)
        requests = [render(f"{kind}_one", 1, explanation=explanation, text=text) for text in (*texts, "N/A")]
        *answers, contentless = self.ask(requests)
        values = [self._numbers(answer, 1, 1)[0] for answer in answers]
        values += parse_numbers(f"[{contentless}]", 1, 1) or [math.nan]
        p = np.clip(values, 1e-6, 1 - 1e-6)
        logits = np.log(p / (1 - p))
        return 1 / (1 + np.exp(logits[-1] - logits[:-1]))

    @override
    def simulate(self, explanation: Explanation, windows: Windows) -> np.ndarray:
        pieces = [windows.pieces(row) for row in range(len(windows))]
        kind = "simulation_one" if self.one_by_one else "simulation"
        answers = self.ask([simulation_request(explanation.text, row, kind) for row in pieces])
        result = np.zeros((len(windows), WIDTH))
        for row, answer in enumerate(answers):
            values = self._numbers(answer, len(pieces[row]), 10)
            result[row, : len(values)] = np.array(values) / 10
        return result


class ReplayJudge(TextJudge):
    """Repeats answers recorded by another judge."""

    def __init__(self, recording: str | Path, model: str | None = None) -> None:
        """Read the answers.jsonl of a run.

        Raises:
            UserError: the file is missing or damaged, or holds several models and `model` is not given.
        """
        answers = Answers(recording, read_only=True)
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
    def complete(self, request: Request) -> str:
        raise UserError(
            f"The recording has no answer to a question of the {request.kind} stage; "
            "use the settings that it was made with."
        )


# ---- local


class LocalJudge(TextJudge):
    """A model on this machine, which explains greedily; other answers are read from logits."""

    one_by_one = True

    def __init__(self, model: LanguageModel, answers: Answers, batch_size: int = 16) -> None:
        """Wrap a causal model, asked through its chat template if it has one.

        Raises:
            UserError: its tokenizer has no token for "yes" or "no".
        """
        super().__init__(f"{model.name} {model.fingerprint[:8]}", answers)
        self.language_model, self.batch_size = model, batch_size
        self._yes, self._no = (
            self._single((word, word.lower(), f" {word}", f" {word.lower()}")) for word in ("Yes", "No")
        )
        self._digits = [self._single((str(digit),))[0] for digit in range(10)]

    def _single(self, words: Sequence[str]) -> list[int]:
        ids = sorted({ids[0] for ids in map(self._ids, words) if len(ids) == 1})
        if not ids:
            raise UserError(
                f"{self.language_model.name} has no single token for {words[0]!r}; use another model as judge."
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.language_model.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, request: Request) -> str:
        """The text that the model reads."""
        tokenizer = self.language_model.tokenizer
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": role, "content": text} for role, text in request.messages]
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return "\n\n".join(text for _, text in request.messages) + "\n\nAnswer:"

    @override
    def complete(self, request: Request) -> str:
        return self._generated(request) if request.kind == "explain" else self._simulated(request)

    @override
    def complete_all(self, requests: Sequence[Request]) -> None:
        if not all(request.kind in ("detection_one", "fuzzing_one") for request in requests):
            return super().complete_all(requests)
        for first in range(0, len(requests), self.batch_size):
            batch = requests[first : first + self.batch_size]
            for request, probability in zip(batch, self._probabilities(batch), strict=True):
                self.put(request, f"{probability:.6f}")
        return None

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


class Retries(NamedTuple):
    """How a chat endpoint is retried; delays in seconds."""

    attempts: int = 8
    first_delay: float = 1.0
    """Before the second attempt, then doubled."""
    longest_delay: float = 60.0
    """Where doubling stops; a Retry-After may be longer."""
    longest_retry_after: float = 900.0
    """The judge gives up when a server asks for more."""
    timeout: float = 120.0


class _Unanswered(Exception):
    """`retry_after`: seconds that the server asks to wait."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class OpenAIJudge(TextJudge):
    """Any server with OpenAI's chat endpoint (`$OPENAI_BASE_URL`/chat/completions).

    Address and key come from the environment and stay in memory: neither is stored, logged or shown. No redirect is
    followed, so the key goes to that address alone.
    """

    def __init__(self, model: str, answers: Answers, concurrency: int = 4, retries: Retries | None = None) -> None:
        """Read the environment; at most `concurrency` questions are in flight.

        Raises:
            UserError: $OPENAI_API_KEY or $OPENAI_BASE_URL is missing or not usable.
        """
        import httpx  # here: it draws a random number on import, which importing this package must not do

        super().__init__(model, answers)
        self.concurrency, self.retries = concurrency, retries or Retries()
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
            timeout=httpx.Timeout(self.retries.timeout, pool=None),
            limits=httpx.Limits(max_connections=concurrency),
            follow_redirects=False,
        )
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Unanswered),
            stop=tenacity.stop_after_attempt(self.retries.attempts),
            wait=self._delay,
            retry_error_callback=self._give_up,
        )
        self._resume_at = 0.0
        self._limit_name = "max_tokens"

    @override
    def complete(self, request: Request) -> str:
        """Ask the endpoint, with retries.

        Raises:
            UserError: the server refuses the key or the request, or gives no complete answer after all attempts.
        """
        return str(self._retrying(self._attempt, request))

    def _attempt(self, request: Request) -> str:
        while (left := self._resume_at - time.monotonic()) > 0:
            time.sleep(left)
        response = self._post(request, self._limit_name)
        if response.status_code == 400 and "max_completion_tokens" in response.text:
            self._limit_name = "max_completion_tokens"
            response = self._post(request, self._limit_name)
        status = response.status_code
        if status == 200:
            answer = _content(response.content)
            if answer is None:
                raise _Unanswered("an answer that was cut")
            return answer
        if status not in (408, 409, 425, 429) and status < 500:
            raise UserError(_refused(status))
        retry_after = retry_after_seconds(response.headers.get("Retry-After"))
        if retry_after is not None:
            if retry_after > self.retries.longest_retry_after:
                raise UserError(
                    f"The endpoint asks to wait {retry_after:.0f} seconds; "
                    "answers so far are kept, run the same command again then."
                )
            self._resume_at = max(self._resume_at, time.monotonic() + retry_after)  # all threads wait
        raise _Unanswered(f"HTTP status {status}", retry_after)

    def _post(self, request: Request, limit_name: str) -> httpx.Response:
        import httpx

        content = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in request.messages],
            "temperature": 0,
            limit_name: request.max_tokens,
        }
        with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL):
            return self._client.post(self._endpoint, json=content)
        raise _Unanswered("no connection, or no answer in time")

    def _delay(self, state: tenacity.RetryCallState) -> float:
        """No delay after a Retry-After, which holds all threads."""
        if state.outcome is not None and state.outcome.exception().retry_after is not None:  # type: ignore[union-attr]
            return 0.0
        first, longest = self.retries.first_delay, self.retries.longest_delay
        return (tenacity.wait_exponential(first, longest) + tenacity.wait_random(0, first / 4))(state)

    def _give_up(self, state: tenacity.RetryCallState) -> NoReturn:
        reason = state.outcome.exception() if state.outcome else "no answer"
        raise UserError(
            f"The endpoint gave {reason} {state.attempt_number} times; "
            "answers so far are kept, run the same command again later."
        )


def _refused(status: int) -> str:
    if status in (401, 403):
        return f"The endpoint refuses the key (HTTP status {status}); check $OPENAI_API_KEY."
    if 300 <= status < 400:
        return f"The endpoint redirects (HTTP status {status}); set $OPENAI_BASE_URL to the address that it moved to."
    if status == 404:
        return (
            "The endpoint does not know this address or model (HTTP status 404); "
            "check $OPENAI_BASE_URL and the model's name."
        )
    return (
        f"The endpoint does not accept the request (HTTP status {status}); check the model's name and what it supports."
    )


def _content(body: bytes) -> str | None:
    """Text of a chat completion, empty for a refusal; None for an incomplete body."""
    try:
        message = json.loads(body)["choices"][0]["message"]
        return "" if message.get("refusal") else str(message.get("content") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def retry_after_seconds(header: str | None) -> float | None:
    """Seconds of a Retry-After header (number or date); None if it is missing or neither."""
    if not header:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(header))
    with contextlib.suppress(ValueError):
        when = email.utils.parsedate_to_datetime(header)
        return max(0.0, (when - datetime.datetime.now(when.tzinfo or datetime.UTC)).total_seconds())
    return None
