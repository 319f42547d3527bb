"""A server of the OpenAI protocol that replies as a test says."""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from thinkpo_jax.inference import openai_engine as server


@dataclass
class Reply:
    """What the server sends; `length` is what it claims to send, `seconds` how long it thinks."""

    body: str | bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    seconds: float = 0.0


def said(content: Any, reason: str | None = "stop", **more: Any) -> Reply:
    message = {"role": "assistant", "content": content, **more}
    return Reply(json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}]}))


def failed(status: int, message: str = "out of order", **headers: str) -> Reply:
    return Reply(json.dumps({"error": {"message": message, "type": "x", "code": status}}), status, headers)


class Endpoint(ThreadingHTTPServer):
    """Replies as `script` says, which is given the request's number and its body; keeps all requests."""

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
        """A client that has left is no error here."""


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

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name of the base)
        """Nothing: the tests look at what was kept."""


@contextlib.contextmanager
def serving(script: Callable[[int, dict[str, Any]], Reply] | list[Reply] | Reply) -> Iterator[Endpoint]:
    """A server on a free port: a function, a list of replies in their order, or always the same."""
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
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.002)
    monkeypatch.setattr(server, "PAUSE_SECONDS", 0.001)
