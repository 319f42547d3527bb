"""A server with OpenAI's chat API that sends the replies of a test."""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Reply:
    """A response of the server. `length` is the Content-Length header, `seconds` the delay before the response."""

    body: str | bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    seconds: float = 0.0


def said(content: Any, reason: str | None = "stop", **more: Any) -> Reply:
    """Returns a response with one answer of the assistant."""
    message = {"role": "assistant", "content": content, **more}
    return Reply(json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}]}))


def failed(status: int, message: str = "out of order", **headers: str) -> Reply:
    """Returns an error response."""
    return Reply(json.dumps({"error": {"message": message, "type": "x", "code": status}}), status, headers)


class Endpoint(ThreadingHTTPServer):
    """Sends what `script` returns for the number and the body of a request. Records all requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script: Callable[[int, dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.lock, self.closing = script, threading.Lock(), threading.Event()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = Reply(json.dumps({"object": "list", "data": [{"id": "first"}, {"id": "second"}]}))
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that disconnect early."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def endpoint(self) -> Endpoint:
        assert isinstance(self.server, Endpoint)
        return self.server

    def do_GET(self) -> None:
        self.send(self.endpoint.models if self.path == "/v1/models" else failed(404))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self.send(failed(404, "no such path"))
        with self.endpoint.lock:
            number = len(self.endpoint.bodies)
            self.endpoint.bodies.append(body)
            self.endpoint.keys.append(self.headers["Authorization"])
            self.endpoint.now += 1
            self.endpoint.most = max(self.endpoint.most, self.endpoint.now)
        try:
            reply = self.endpoint.script(number, body)
            self.endpoint.closing.wait(reply.seconds)
        finally:
            with self.endpoint.lock:
                self.endpoint.now -= 1
        return self.send(reply)

    def send(self, reply: Reply) -> None:
        body = reply.body.encode() if isinstance(reply.body, str) else reply.body
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if reply.length is None else reply.length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.close_connection or reply.length is not None

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name in the base class
        """Logs nothing, because the tests read the recorded requests."""


@contextlib.contextmanager
def serving(script: Callable[[int, dict[str, Any]], Reply] | list[Reply] | Reply) -> Iterator[Endpoint]:
    """Runs a server on a free port. `script` is a function, a list of replies in order, or one reply for all."""
    if isinstance(script, Reply):
        endpoint = Endpoint(lambda _, __: script)
    else:
        endpoint = Endpoint((lambda number, _: script[number]) if isinstance(script, list) else script)
    with endpoint:
        thread = threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield endpoint
        finally:
            endpoint.closing.set()
            endpoint.shutdown()
            thread.join()


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the client retry without waiting, and hides the user's OpenAI settings from it."""
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.002)
    monkeypatch.setattr("thinkpo_jax.inference.openai_engine.PAUSE_SECONDS", 0.001)
