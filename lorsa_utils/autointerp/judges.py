"""Judges: who explains a unit and who says, from an explanation, where the unit is active.

Four backends behind one interface (`Judge`):

- `RulesJudge` learns a rule (`rules`) and applies it. No language model: a proxy that knows forms and words, not
  meanings.
- `LocalJudge` is any chat model through transformers. It writes explanations; verdicts are read from the logits of the
  allowed words.
- `OpenAIJudge` is any server with OpenAI's chat endpoint. Address and key come from $OPENAI_BASE_URL and
  $OPENAI_API_KEY alone; neither is stored, logged or shown.
- `ReplayJudge` repeats recorded answers.

Every answer of a language model is kept in a file (`Answers`) under a hash of model, prompt and parameters, as soon as
it is there: a second run asks nothing again, and a killed run goes on with the first question that was not answered.
`ReplayJudge` reads the same file.

An answer that cannot be read is NaN, never a wrong answer. `Judge.tally` counts them.
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
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import httpx
import numpy as np
import tenacity
from typing_extensions import override

from lorsa_utils import store
from lorsa_utils.autointerp import rules
from lorsa_utils.autointerp.examples import WIDTH, UnitExamples, Windows
from lorsa_utils.autointerp.rules import Lexicon, Rule
from lorsa_utils.exceptions import UserError

if TYPE_CHECKING:
    from lorsa_utils.models import LanguageModel

SCORERS = ("detection", "fuzzing", "simulation")
MAX_FAILED = 0.05
"""Share of unreadable answers above which a study is stopped."""
FEWEST_TO_STOP = 40
"""Answers that must have been asked for before the share counts, while a study runs."""
SHOWN_ACTIVE, SHOWN_SILENT = 10, 5
LEAST_SHARE = 0.05
"""A source that is shown to the explainer has this share of the mass, at least."""
PER_CALL = 5
"""Texts in one question to a chat endpoint."""


@dataclass(frozen=True)
class Explanation:
    """What somebody says about a unit."""

    text: str
    """For people and language models."""
    rule: Rule | None = None
    """For `RulesJudge`."""


@dataclass
class Tally:
    """Answers asked for, and how many of them could not be read."""

    asked: int = 0
    failed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, asked: int, failed: int) -> None:
        """Count; safe from several threads."""
        with self._lock:
            self.asked += asked
            self.failed += failed

    def check(self, final: bool = False) -> None:
        """Stop a study whose answers cannot be read.

        Raises:
            UserError: more than `MAX_FAILED` of them could not.
        """
        if self.asked >= (1 if final else FEWEST_TO_STOP) and self.failed > MAX_FAILED * self.asked:
            raise UserError(
                f"{self.failed} of {self.asked} answers of the judge could not be read, more than {MAX_FAILED:.0%}; "
                "use another judge model."
            )


class Judge(abc.ABC):
    """Explains units, and applies explanations to windows.

    Verdicts are numbers from 0 to 1 (above one half means yes), NaN for none.
    """

    name: str
    """For tables."""
    is_proxy = False
    """Whether it stands in for a language model."""
    concurrency = 1
    """Units it works on at a time."""

    def __init__(self) -> None:
        self.tally = Tally()

    @abc.abstractmethod
    def explain(self, unit: UnitExamples, strings: Mapping[int, str]) -> Explanation | None:
        """An explanation from the first half's windows; None when the answer cannot be read."""

    @abc.abstractmethod
    def detect(self, explanation: Explanation, windows: Windows, strings: Mapping[int, str]) -> np.ndarray:
        """Whether the unit is active anywhere in each window, [n]."""

    @abc.abstractmethod
    def fuzz(
        self, explanation: Explanation, windows: Windows, marks: np.ndarray, strings: Mapping[int, str]
    ) -> np.ndarray:
        """Whether the marked tokens (bool [n, WIDTH]) are those where it is active, [n]."""

    @abc.abstractmethod
    def simulate(self, explanation: Explanation, windows: Windows, strings: Mapping[int, str]) -> np.ndarray:
        """Activation over the largest at each token, [n, WIDTH]; NaN in rows without a readable answer."""


# ---- rules


class RulesJudge(Judge):
    """Rules that are learned, not written; see `rules`."""

    name = "rules"
    is_proxy = True

    def __init__(self) -> None:
        super().__init__()
        self._lexicons: dict[int, tuple[Mapping[int, str], Lexicon]] = {}

    def _lexicon(self, strings: Mapping[int, str]) -> Lexicon:
        # The mapping is kept beside its lexicon, so that its id stays its own.
        if id(strings) not in self._lexicons:
            self._lexicons[id(strings)] = (strings, Lexicon(strings))
        return self._lexicons[id(strings)][1]

    def explain(self, unit: UnitExamples, strings: Mapping[int, str]) -> Explanation:
        """See `Judge.explain`."""
        rule = rules.learn(unit.first, self._lexicon(strings))
        self.tally.add(1, 0)
        return Explanation(rules.describe(rule, strings), rule)

    def _predict(self, explanation: Explanation, windows: Windows, strings: Mapping[int, str]) -> np.ndarray:
        if explanation.rule is None:
            raise UserError(
                "The rules judge can only apply explanations that it made itself; judge texts with another backend."
            )
        self.tally.add(len(windows), 0)
        return rules.predict(explanation.rule, windows, self._lexicon(strings))

    def detect(self, explanation: Explanation, windows: Windows, strings: Mapping[int, str]) -> np.ndarray:
        """See `Judge.detect`."""
        return (self._predict(explanation, windows, strings) > 0).any(axis=1).astype(float)

    def fuzz(
        self, explanation: Explanation, windows: Windows, marks: np.ndarray, strings: Mapping[int, str]
    ) -> np.ndarray:
        """See `Judge.fuzz`: the rule holds at most of the marks, or at half of them."""
        holds = self._predict(explanation, windows, strings) > 0
        return ((holds & marks).sum(axis=1) * 2 >= np.maximum(1, marks.sum(axis=1))).astype(float)

    def simulate(self, explanation: Explanation, windows: Windows, strings: Mapping[int, str]) -> np.ndarray:
        """See `Judge.simulate`."""
        return self._predict(explanation, windows, strings)


# ---- prompts and answers


@dataclass(frozen=True)
class Request:
    """One question to a language model."""

    kind: str
    """Template it was made from."""
    messages: tuple[tuple[str, str], ...]
    """Pairs of role and text."""
    max_tokens: int
    """Longest answer."""


@functools.cache
def _template(name: str) -> tuple[str, str]:
    """The two parts of a prompt file: system and user."""
    system, user = (
        resources.files("lorsa_utils.autointerp")
        .joinpath("templates", f"{name}.txt")
        .read_text(encoding="utf-8")
        .split("\n---\n")
    )
    return system.strip(), user.strip()


def prompts_sha256() -> str:
    """Hash of all prompt files, to be told with results."""
    names = ("explain", *SCORERS, *(f"{scorer}_one" for scorer in SCORERS))
    return store.sha256_json({name: _template(name) for name in names})


def render(kind: str, max_tokens: int, **values: Any) -> Request:
    """Fill a prompt file. Values are inserted as they are: a text cannot add placeholders of its own."""
    system, user = _template(kind)
    filled = re.sub(r"\$(\w+)", lambda match: str(values[match[1]]), user)
    return Request(kind, (("system", system), ("user", filled)), max_tokens)


def explain_request(unit: UnitExamples, strings: Mapping[int, str]) -> Request:
    """The question for an explanation: the strongest windows, some weaker ones, some silent ones; sources where they are known."""
    windows = unit.first
    ranked = np.flatnonzero(windows.active)[np.argsort(-windows.values[windows.active].max(axis=1), kind="stable")]
    strongest = ranked[: SHOWN_ACTIVE - 3]
    others = ranked[len(strongest) :]
    chosen = [*strongest, *others[np.linspace(0, len(others) - 1, min(3, len(others))).astype(int)]]
    active = []
    for row in chosen:
        peak = windows.values[row].max()
        known = zip(windows.sources[row], windows.shares[row], strict=True)
        sources = [
            json.dumps(strings[int(token)], ensure_ascii=False)
            for token, share in known
            if int(token) in strings and share >= LEAST_SHARE
        ]
        of = f" (from {', '.join(sources)})" if sources else ""
        scale = round(10 * peak / unit.maximum)
        active.append(
            f"[{scale}] {windows.marked(row, strings, windows.values[row] > 0.3 * peak)}{of}".replace("\n", "\\n")
        )
    silent = [windows.marked(row, strings).replace("\n", "\\n") for row in np.flatnonzero(~windows.active).tolist()]
    spread = [
        silent[index] for index in np.linspace(0, len(silent) - 1, min(SHOWN_SILENT, len(silent))).astype(int).tolist()
    ]
    return render("explain", 50, active="\n".join(active), silent="\n".join(spread))


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}. {text}".replace("\n", "\\n") for number, text in enumerate(texts, start=1))


def parse_explanation(answer: str) -> str | None:
    """What stands behind EXPLANATION:, in one line; None when it is missing or empty."""
    match = re.search(r"EXPLANATION:\s*(.+)", answer)
    text = match[1].strip().strip("`*\"' ") if match else ""
    return text or None


def parse_numbers(answer: str, n: int, highest: int) -> list[float] | None:
    """A JSON list of `n` numbers from 0 to `highest`, with or without a fence around it; None for anything else."""
    match = re.fullmatch(r"\s*(?:```\w*\s*)?(\[[^\[\]]*\])\s*(?:```)?\s*", answer)
    try:
        values = json.loads(match[1]) if match else None
    except ValueError:
        return None
    if (
        values is None
        or len(values) != n
        or not all(isinstance(value, int | float) and 0 <= value <= highest for value in values)
    ):
        return None
    return [float(value) for value in values]


class Answers:
    """Answers on disk, one JSON object a line, appended and flushed one by one. One process at a time may write."""

    def __init__(self, path: str | Path | None, read_only: bool = False) -> None:
        """Open a file; in memory alone without a path.

        Raises:
            UserError: another process writes to it, or it is damaged before its last line.
        """
        self.path = Path(path) if path is not None else None
        self._known: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._handle: Any = None
        if self.path is None:
            return
        if read_only and not self.path.is_file():
            raise UserError(f"There are no recorded answers at {self.path}; give the answers.jsonl of an earlier run.")
        if not read_only:
            self._open()
        if self.path.is_file():
            self._read()

    def _open(self) -> None:
        from filelock import FileLock, Timeout

        assert self.path is not None
        store.require_writable(self.path.parent)
        self._file_lock = FileLock(f"{self.path}.lock")
        try:
            self._file_lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"Another run is writing to {self.path}; wait for it, or choose another folder.") from error
        if self.path.is_file():
            # A killed run can leave half a line at the end.
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                store.write_bytes(self.path, content[: content.rfind(b"\n") + 1])
        self._handle = open(self.path, "ab")  # noqa: SIM115

    def _read(self) -> None:
        assert self.path is not None
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                self._known[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"Line {number} of {self.path} is damaged; delete that line.") from error

    def close(self) -> None:
        """Let other processes write."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
            self._file_lock.release()

    def get(self, key: str) -> str | None:
        """The answer kept under a key."""
        with self._lock:
            record = self._known.get(key)
        return None if record is None else str(record["answer"])

    def put(self, key: str, answer: str, **facts: Any) -> None:
        """Keep an answer: it is on the disk when this returns."""
        record = {"key": key, "answer": answer, **facts}
        with self._lock:
            self._known[key] = record
            if self._handle is not None:
                self._handle.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
                self._handle.flush()
                os.fsync(self._handle.fileno())

    def __len__(self) -> int:
        return len(self._known)


class TextJudge(Judge):
    """What judges that read prompts share: how questions are put and answers read, and the file of answers."""

    one_by_one = False
    """Whether each text is a question of its own, answered with a probability; else up to PER_CALL texts, answered with a JSON list."""

    def __init__(self, model: str, answers: Answers) -> None:
        super().__init__()
        self.name = self.model = model
        self.answers = answers
        self.calls = 0
        self._count = threading.Lock()

    def key(self, request: Request) -> str:
        """Hash of model, prompt and parameters."""
        return store.sha256_json(
            {"model": self.model, "messages": request.messages, "max_tokens": request.max_tokens, "temperature": 0}
        )

    @abc.abstractmethod
    def complete(self, request: Request) -> str:
        """Ask the model. An empty text stands for a refusal."""

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        """Ask several questions, whose answers are kept one by one."""
        return [self._kept(request, self.complete(request)) for request in requests]

    def _kept(self, request: Request, answer: str) -> str:
        self.answers.put(self.key(request), answer, kind=request.kind, model=self.model)
        with self._count:
            self.calls += 1
        return answer

    def ask(self, requests: Sequence[Request]) -> list[str]:
        """Answers to questions, from the file where they are there."""
        answers = {request: self.answers.get(self.key(request)) for request in requests}
        missing = [request for request, answer in answers.items() if answer is None]
        answers |= dict(zip(missing, self.complete_all(missing), strict=True))
        return [str(answers[request]) for request in requests]

    def explain(self, unit: UnitExamples, strings: Mapping[int, str]) -> Explanation | None:
        """See `Judge.explain`."""
        text = parse_explanation(self.ask([explain_request(unit, strings)])[0])
        self.tally.add(1, int(text is None))
        return None if text is None else Explanation(text)

    def _verdicts(self, kind: str, explanation: Explanation, texts: Sequence[str]) -> np.ndarray:
        if self.one_by_one:
            return self._probabilities(kind, explanation, texts)
        pieces = [texts[first : first + PER_CALL] for first in range(0, len(texts), PER_CALL)]
        answers = self.ask([verdict_request(kind, explanation.text, some) for some in pieces])
        verdicts: list[float] = []
        for some, answer in zip(pieces, answers, strict=True):
            values = parse_numbers(answer, len(some), 1)
            self.tally.add(1, int(values is None))
            verdicts += values or [math.nan] * len(some)
        return np.array(verdicts)

    def _probabilities(self, kind: str, explanation: Explanation, texts: Sequence[str]) -> np.ndarray:
        """Probabilities of yes, measured from the answer to a text without content (Zhao et al.

        2021, "Calibrate before use").
        """
        asked = [render(f"{kind}_one", 1, explanation=explanation.text, text=text) for text in (*texts, "N/A")]
        values = [parse_numbers(f"[{answer}]", 1, 1) for answer in self.ask(asked)]
        self.tally.add(len(texts), sum(value is None for value in values[:-1]))
        p = np.clip([math.nan if value is None else value[0] for value in values], 1e-6, 1 - 1e-6)
        logits = np.log(p / (1 - p))
        return 1 / (1 + np.exp(logits[-1] - logits[:-1]))

    def detect(self, explanation: Explanation, windows: Windows, strings: Mapping[int, str]) -> np.ndarray:
        """See `Judge.detect`."""
        return self._verdicts("detection", explanation, [windows.marked(row, strings) for row in range(len(windows))])

    def fuzz(
        self, explanation: Explanation, windows: Windows, marks: np.ndarray, strings: Mapping[int, str]
    ) -> np.ndarray:
        """See `Judge.fuzz`."""
        return self._verdicts(
            "fuzzing", explanation, [windows.marked(row, strings, marks[row]) for row in range(len(windows))]
        )

    def simulate(self, explanation: Explanation, windows: Windows, strings: Mapping[int, str]) -> np.ndarray:
        """See `Judge.simulate`."""
        result = np.full((len(windows), WIDTH), math.nan)
        pieces = [windows.pieces(row, strings) for row in range(len(windows))]
        answers = self.ask([simulation_request(explanation.text, some, self.one_by_one) for some in pieces])
        for row, (some, answer) in enumerate(zip(pieces, answers, strict=True)):
            values = parse_numbers(f"[{answer}]" if self.one_by_one else answer, len(some), 10)
            self.tally.add(1, int(values is None))
            if values is not None:
                result[row] = 0
                result[row, : len(some)] = np.array(values) / 10
        return result


def verdict_request(kind: str, explanation: str, texts: Sequence[str]) -> Request:
    """The question of the detection or fuzzing scorer about some texts."""
    return render(kind, 12 + 4 * len(texts), explanation=explanation, n=len(texts), texts=_numbered(texts))


def simulation_request(explanation: str, pieces: Sequence[str], one_by_one: bool = False) -> Request:
    """The question of the simulation scorer about one text."""
    listed = "\n".join(json.dumps(piece, ensure_ascii=False) for piece in pieces)
    kind = "simulation_one" if one_by_one else "simulation"
    return render(kind, 12 + 4 * len(pieces), explanation=explanation, n=len(pieces), tokens=listed)


class ReplayJudge(TextJudge):
    """Answers recorded by another judge; asks nobody."""

    def __init__(self, recording: str | Path, model: str | None = None) -> None:
        """Read a recording.

        Args:
            recording: the answers.jsonl of a run.
            model: whose answers to repeat, when several models are in it.

        Raises:
            UserError: the file is missing or damaged, or holds other models than that one.
        """
        answers = Answers(recording, read_only=True)
        models = sorted({str(record["model"]) for record in answers._known.values()})
        if model is None and len(models) != 1:
            raise UserError(
                f"{recording} holds answers of {len(models)} models ({', '.join(models)}); name one of them."
            )
        super().__init__(model or models[0], answers)
        self.name = f"{self.model} (replayed)"
        self.one_by_one = any(
            str(record["kind"]).endswith("_one") for record in answers._known.values() if record["model"] == self.model
        )

    def complete(self, request: Request) -> str:
        """See `TextJudge.complete`.

        Raises:
            UserError: always; what is not recorded cannot be answered.
        """
        raise UserError(
            f"The recording has no answer to a question of the {request.kind} stage; use the settings that it was made with."
        )


# ---- local

_YES, _NO = ("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no")


class LocalJudge(TextJudge):
    """A chat model on this machine.

    Explanations are generated greedily; verdicts and simulations are read from logits.
    """

    one_by_one = True

    def __init__(self, model: LanguageModel, answers: Answers, batch_size: int = 16) -> None:
        """Wrap a language model.

        Args:
            model: any causal model; one with a chat template is asked through it.
            answers: where answers are kept.
            batch_size: texts in one forward pass.

        Raises:
            UserError: its tokenizer has no token for "yes" or "no".
        """
        super().__init__(f"{model.name} {model.fingerprint[:8]}", answers)
        self.language_model, self.batch_size = model, batch_size
        self._yes, self._no = (self._single(words) for words in (_YES, _NO))
        self._digits = [self._single((str(digit),))[0] for digit in range(10)]

    def _single(self, words: Sequence[str]) -> list[int]:
        encoded = [self.language_model.tokenizer.encode(word, add_special_tokens=False) for word in words]
        ids = sorted({ids[0] for ids in encoded if len(ids) == 1})
        if not ids:
            raise UserError(
                f"{self.language_model.name} has no single token for {words[0]!r}; use another model as judge."
            )
        return ids

    def prompt(self, request: Request) -> str:
        """The text that the model reads."""
        tokenizer = self.language_model.tokenizer
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": role, "content": text} for role, text in request.messages]
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return "\n\n".join(text for _, text in request.messages) + "\n\nAnswer:"

    def complete(self, request: Request) -> str:
        """See `TextJudge.complete`."""
        return self._generated(request) if request.kind == "explain" else self._simulated(request)

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        """See `TextJudge.complete_all`."""
        if not all(request.kind in ("detection_one", "fuzzing_one") for request in requests):
            return super().complete_all(requests)
        answers: list[str] = []
        for first in range(0, len(requests), self.batch_size):
            some = requests[first : first + self.batch_size]
            answers += [self._kept(*pair) for pair in zip(some, self._decided(some), strict=True)]
        return answers

    def _ids(self, text: str) -> list[int]:
        return list(self.language_model.tokenizer.encode(text, add_special_tokens=False))

    def _generated(self, request: Request) -> str:
        import torch

        ids = torch.tensor([self._ids(self.prompt(request) + "EXPLANATION:")], device=self.language_model.device)
        if ids.shape[1] + request.max_tokens > self.language_model.context_length:
            return ""
        made = self.language_model.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        text = str(self.language_model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        return "EXPLANATION: " + (text.strip().splitlines() or [""])[0]

    def _decided(self, requests: Sequence[Request]) -> list[str]:
        """Probability of yes among yes and no. What all prompts begin with is computed once."""
        import torch

        prompts = [self._ids(self.prompt(request)) for request in requests]
        shared = min(_common(prompts), min(len(ids) for ids in prompts) - 1)
        model, device = self.language_model.model, self.language_model.device
        tails = [ids[shared:] for ids in prompts]
        width = max(len(ids) for ids in tails)
        batch = torch.tensor([ids + [0] * (width - len(ids)) for ids in tails], device=device)
        with torch.no_grad():
            past = None
            if shared:
                prefix = torch.tensor([prompts[0][:shared]], device=device)
                past = model.base_model(input_ids=prefix, use_cache=True).past_key_values
                past.batch_repeat_interleave(len(tails))
            hidden = model.base_model(
                input_ids=batch, past_key_values=past, use_cache=past is not None
            ).last_hidden_state
            last = hidden[torch.arange(len(tails)), [len(ids) - 1 for ids in tails]]
            logits = model.get_output_embeddings()(last).float()
        yes, no = (logits[:, ids].logsumexp(dim=1) for ids in (self._yes, self._no))
        return [f"{p:.6f}" for p in (yes - no).sigmoid().tolist()]

    def _simulated(self, request: Request) -> str:
        """Expected digit behind each token: all lines are read at once, with a question mark in place of every number."""
        import torch

        head, listed = self.prompt(request), request.messages[1][1].rpartition("one token a line:")[2]
        ids, places = self._ids(head), []
        for piece in listed.strip("\n").split("\n"):
            ids += self._ids(f"{piece}\t")
            places.append(len(ids) - 1)
            ids += self._ids("?\n")
        with torch.no_grad():
            hidden = self.language_model.model.base_model(
                input_ids=torch.tensor([ids], device=self.language_model.device)
            ).last_hidden_state
            logits = self.language_model.model.get_output_embeddings()(hidden[0, places]).float()[:, self._digits]
        expected = logits.softmax(dim=1) @ torch.arange(10.0, device=logits.device)
        return ", ".join(f"{value:.3f}" for value in expected.tolist())


def _common(lists: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    for place, column in enumerate(zip(*lists, strict=False)):
        if len(set(column)) > 1:
            return place
    return min(len(one) for one in lists)


# ---- openai


class Retries(NamedTuple):
    """How a chat endpoint is asked again; delays in seconds."""

    attempts: int = 8
    first_delay: float = 1.0
    """Before the second attempt; doubled for each further one."""
    longest_delay: float = 60.0
    """Where doubling stops; a Retry-After of the server may be longer."""
    longest_retry_after: float = 900.0
    """A server that asks for more is given up."""
    timeout: float = 120.0
    """To wait for an answer."""


class _Unanswered(Exception):
    """No whole answer this time, and why; `retry_after` are the seconds that the server asks to wait, if it does."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class OpenAIJudge(TextJudge):
    """Any server with OpenAI's chat endpoint (`$OPENAI_BASE_URL`/chat/completions).

    The address and the key are read from the environment and stay in memory. No message of this class contains them,
    and no redirect is followed, so the key goes to that address alone.
    """

    def __init__(self, model: str, answers: Answers, concurrency: int = 4, retries: Retries | None = None) -> None:
        """Read the environment; nothing is sent yet.

        Args:
            model: name that the server knows.
            answers: where answers are stored.
            concurrency: questions in flight at a time, at most.
            retries: when and how often a question is asked again.

        Raises:
            UserError: $OPENAI_API_KEY or $OPENAI_BASE_URL is missing or not usable.
        """
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
        """The model's answer.

        Raises:
            UserError: the server refuses the key or the request, or gives no whole answer after all attempts.
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
        """Exponential with jitter; none after a Retry-After, since that holds all threads."""
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
    """The text of a chat completion, empty for a refusal; None when the body is not a whole one."""
    try:
        message = json.loads(body)["choices"][0]["message"]
        return "" if message.get("refusal") else str(message.get("content") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def retry_after_seconds(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None when it is missing or neither."""
    if not header:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(header))
    with contextlib.suppress(ValueError):
        when = email.utils.parsedate_to_datetime(header)
        return max(0.0, (when - datetime.datetime.now(when.tzinfo or datetime.UTC)).total_seconds())
    return None
