"""A local HTTP server that plays a chat endpoint and answers every question after a script of mishaps."""

import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def answer_for(prompt: str) -> str:
    """A well-formed answer: yes to the first text of each question, no to the others; a fixed explanation."""
    if "EXPLANATION:" in prompt:
        return "EXPLANATION: tokens after a comma"
    numbers = re.search(r"JSON list of (\d+)", prompt)
    n = int(numbers[1]) if numbers else 0
    return json.dumps([1] + [0] * (n - 1))


class ChatServer:
    """State that tests look at."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.prompts: list[str] = []
        """Every question that arrived."""
        self.answered: Counter[str] = Counter()
        """Questions that got a whole answer."""
        self.keys: set[str] = set()
        self.mishaps: list[str] = []
        """Played one by one, each on the next request."""
        self.now = self.most = 0
        """Requests in the server's hands: now, and at most."""
        self.new_limit = False
        """Whether `max_tokens` is refused in favour of `max_completion_tokens`."""
        self.stop_after: int | None = None
        """Answers after which the server leaves its callers hanging."""
        self.released = threading.Event()
        self.content: Callable[[str], str] = answer_for
        self.url = ""

    def body(self, prompt: str, **message: Any) -> bytes:
        content = {"role": "assistant", "content": self.content(prompt), **message}
        return json.dumps({"choices": [{"message": content, "finish_reason": "stop"}]}).encode()


@contextlib.contextmanager
def chat_server() -> Iterator[ChatServer]:
    """The server at a free port; `url` is what OPENAI_BASE_URL is to be."""
    state = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = "\n".join(message["content"] for message in request["messages"])
            with state.lock:
                state.now += 1
                state.most = max(state.most, state.now)
                state.keys.add(self.headers["Authorization"])
                state.prompts.append(prompt)
                mishap = state.mishaps.pop(0) if state.mishaps else ""
                hang = state.stop_after is not None and sum(state.answered.values()) >= state.stop_after
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if hang:
                    state.released.wait(60)
                elif state.new_limit and "max_tokens" in request:
                    self.send(400, b'{"error": "use max_completion_tokens"}')
                else:
                    self.play(mishap, prompt)
            with state.lock:
                state.now -= 1

        def play(self, mishap: str, prompt: str) -> None:
            kind, _, detail = mishap.partition(" ")
            refusal = {"refusal": "I cannot help with that.", "content": None} if kind == "refusal" else {}
            whole = state.body(prompt, **refusal)
            if kind == "status":
                code, _, header = detail.partition(" ")
                self.send(int(code), b'{"error": "no"}', {"Retry-After": header} if header else {})
            elif kind == "redirect":
                self.send(307, b"", {"Location": detail})
            elif kind == "cut":
                self.send(200, whole[: len(whole) // 2])
            elif kind == "hangup":
                self.close_connection = True
                self.connection.close()
            else:
                if kind == "slow":
                    time.sleep(float(detail))
                with state.lock:
                    state.answered[prompt] += 1
                self.send(200, whole)

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
