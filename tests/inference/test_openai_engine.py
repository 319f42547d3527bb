"""A server's answers come one by one, whatever the network does; every failure is a message that helps."""

import asyncio
import contextlib
import gzip
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import openai
import pytest
from support.server import Endpoint, Reply, failed, fast_retries, said, serving  # noqa: F401

from thinkpo_jax.data.chat_tokenizer import Message
from thinkpo_jax.inference.openai_engine import ServerAnswer, ServerConfig, request_completions
from thinkpo_jax.inference.sampling import SamplingConfig
from thinkpo_jax.runtime.config import RunError, UserError, parse_config

pytestmark = pytest.mark.usefixtures("fast_retries")
SAMPLING = SamplingConfig(temperature=0.6, top_p=0.9, max_new_tokens=77)


def config(url: str, **changes: Any) -> ServerConfig:
    return ServerConfig(**{"url": url, "model": "tiny", "retries": 3, "timeout": 120.0, **changes})


def question(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def ask(endpoint: Endpoint | str, *texts: str, seed: int = 0, **changes: Any) -> dict[int, ServerAnswer]:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    return dict(request_completions(config(url, **changes), [question(text) for text in texts], SAMPLING, seed=seed))


def echo(_: int, body: dict[str, Any]) -> Reply:
    return said(body["messages"][-1]["content"].upper())


def test_every_conversation_gets_its_answer_and_its_index() -> None:
    with serving(echo) as endpoint:
        answers = ask(endpoint, *(f"q{i}" for i in range(50)), concurrency=8)
    assert answers == {i: ServerAnswer(f"Q{i}", finished=True) for i in range(50)}


def test_no_conversation_asks_nothing() -> None:
    with serving(echo) as endpoint:
        assert ask(endpoint) == {}
        assert endpoint.bodies == []


def test_answers_come_as_they_arrive() -> None:
    last = threading.Event()

    def script(_: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        assert text != "slow" or last.wait(10)
        return said(text)

    with serving(script) as endpoint:
        answers = request_completions(config(endpoint.url), [question("slow"), question("quick")], SAMPLING, seed=0)
        assert next(answers)[0] == 1
        last.set()
        assert next(answers)[0] == 0
        assert list(answers) == []


def test_what_the_server_receives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " secret\n")
    conversation: list[Message] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?\n"}]
    with serving(said("2")) as endpoint:
        list(request_completions(config(endpoint.url, api_key_variable="MY_KEY"), [conversation], SAMPLING, seed=5))
        ask(endpoint, "x", api_key_variable="MY_OTHER_KEY")
    (first, _), keys = endpoint.bodies, endpoint.keys
    assert 0 <= first.pop("seed") < 2**31
    assert first == {
        "model": "tiny", "messages": conversation, "temperature": 0.6, "top_p": 0.9, "max_tokens": 77, "n": 1
    }  # fmt: skip
    assert keys == ["Bearer secret", "Bearer none"]


def test_a_seed_depends_on_the_seed_and_the_conversation_alone() -> None:
    with serving(said("")) as endpoint:
        ask(endpoint, "a", "b", seed=1)
        ask(endpoint, "b", seed=1)
        ask(endpoint, "a", seed=2)
    seeds = {}
    for number, body in enumerate(endpoint.bodies):
        seeds.setdefault((body["messages"][0]["content"], number == 3), []).append(body["seed"])
    assert len(seeds["b", False]) == 2
    assert {key: len(set(values)) for key, values in seeds.items()} == dict.fromkeys(seeds, 1)
    assert len({values[0] for values in seeds.values()}) == 3


def test_requests_under_way_reach_the_limit_and_never_pass_it() -> None:
    together = threading.Barrier(4)

    def script(*_: Any) -> Reply:
        together.wait(120)  # breaks where four are not under way at once
        reply = said("ok")
        reply.seconds = 0.1  # a fifth would be seen
        return reply

    with serving(script) as endpoint:
        assert len(ask(endpoint, *map(str, range(20)), concurrency=4)) == 20
    assert endpoint.most == 4


def test_stopping_early_cancels_and_starts_nothing_more() -> None:
    def script(number: int, _: dict[str, Any]) -> Reply:
        return said("ok") if number == 0 else Reply("", seconds=600)

    with serving(script) as endpoint:
        answers = request_completions(config(endpoint.url, concurrency=4), [question("x")] * 100, SAMPLING, seed=0)
        next(answers)
        start = time.monotonic()
        answers.close()
        assert time.monotonic() - start < 60
        time.sleep(0.5)  # what was sent before it was closed may still arrive
        started = len(endpoint.bodies)
        time.sleep(0.3)
        assert len(endpoint.bodies) == started <= 4


def test_ctrl_c_ends_promptly() -> None:
    def script(*_: Any) -> Reply:
        os.kill(os.getpid(), signal.SIGINT)
        return Reply("", seconds=600)

    with serving(script) as endpoint:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask(endpoint, "x", timeout=600.0)
        assert time.monotonic() - start < 60


def test_a_notebook_whose_event_loop_runs_can_ask() -> None:
    async def cell() -> dict[int, ServerAnswer]:
        return ask(endpoint, "a")

    with serving(echo) as endpoint:
        assert asyncio.run(cell()) == {0: ServerAnswer("A", finished=True)}


CUT = Reply('{"choices": [', length=1000)
TRANSIENT = {
    "429": failed(429, Retry_After="0"), "408": failed(408), "409": failed(409), "500": failed(500), "503": failed(503),
    "html": Reply("<html>Bad gateway</html>", headers={"Content-Type": "text/html"}), "empty": Reply(""), "cut": CUT,
    "no choices": Reply('{"choices": []}'), "a list": Reply("[1]"), "an error": Reply('{"error": "busy"}'),
    "no message": Reply('{"choices": [{}]}'), "null": said(None), "a number": said(7), "parts": said([{"text": "x"}]),
    "text": Reply('{"choices": "abc"}'), "deep": Reply("[" * 100_000), "binary": Reply(b"\xff\xfe\x00"),
    "no gzip": Reply("plain", headers={"Content-Encoding": "gzip"}), "digits": Reply("9" * 5000),
}  # fmt: skip


@pytest.mark.parametrize("reply", TRANSIENT.values(), ids=list(TRANSIENT))
def test_what_passes_is_asked_again(reply: Reply) -> None:
    with serving([reply, reply, said("good")]) as endpoint:
        assert ask(endpoint, "x") == {0: ServerAnswer("good", finished=True)}
    assert len({body["seed"] for body in endpoint.bodies}) == 1


@pytest.mark.parametrize("reply", TRANSIENT.values(), ids=list(TRANSIENT))
def test_what_does_not_pass_is_a_run_error_after_all_tries(reply: Reply) -> None:
    with serving(reply) as endpoint, pytest.raises(RunError) as caught:
        ask(endpoint, "x")
    assert len(endpoint.bodies) == 4
    assert endpoint.url in str(caught.value)
    assert "4 tries" in str(caught.value)
    assert "What was answered is kept; run the same command again." in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_failures_and_nonsense_count_as_tries_together() -> None:
    with serving(lambda number, _: failed(500) if number % 2 else Reply("?")) as endpoint, pytest.raises(RunError):
        ask(endpoint, "x", retries=5)
    assert len(endpoint.bodies) == 6


def test_an_error_shows_what_came() -> None:
    with serving(Reply("<html>" + "a" * 200)) as endpoint, pytest.raises(RunError) as caught:
        ask(endpoint, "x")
    assert repr("<html>" + "a" * 74) in str(caught.value)
    assert "a" * 75 not in str(caught.value)
    with serving(failed(503, "the engine is asleep")) as endpoint, pytest.raises(RunError, match=r"503.*engine is as"):
        ask(endpoint, "x", retries=0)


def test_a_server_that_is_too_slow() -> None:
    with serving(Reply("", seconds=600)) as endpoint, pytest.raises(RunError, match=r"no answer within 1 s, in 2 t"):
        ask(endpoint, "x", timeout=1.0, retries=1)
    assert len(endpoint.bodies) == 2
    with serving(lambda number, _: said("now") if number else Reply("", seconds=600)) as endpoint:
        assert ask(endpoint, "x", timeout=1.0) == {0: ServerAnswer("now", finished=True)}


def test_nobody_listens_or_nobody_is_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RunError, match=rf"{url}.*[Cc]onnection.*4 tries.*kept"):
        ask(url, "x")
    with pytest.raises(RunError, match=r"nowhere\.invalid.*kept"):
        ask("http://nowhere.invalid/v1", "x", retries=0)


def test_something_that_speaks_no_http() -> None:
    def talk() -> None:
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(RunError, match="2 tries"):
            ask(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "x", retries=1)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_accepted(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(failed(status, "bad key")) as endpoint:
        with pytest.raises(UserError, match=rf"{endpoint.url}.*{status}.*bad key.*OPENAI_API_KEY is not set.*tiny"):
            ask(endpoint, "x")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        with pytest.raises(UserError, match=r"OPENAI_API_KEY is not accepted") as caught:
            ask(endpoint, "x")
    assert "secret" not in str(caught.value)
    assert len(endpoint.bodies) == 2
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(UserError, match=r"OPENAI_API_KEY.*characters"):
        ask(endpoint, "x")


def test_a_model_that_is_not_there() -> None:
    with serving(failed(404, "The model does not exist")) as endpoint:
        with pytest.raises(UserError, match=rf"{endpoint.url}.*404.*no model tiny.*first, second"):
            ask(endpoint, "x")
        for reply in (failed(500), Reply("<html>"), Reply('{"data": [1]}'), Reply("[]"), Reply('{"data": null}'), CUT):
            endpoint.models = reply
            with pytest.raises(UserError, match=r"no model tiny.*ends in /v1"):
                ask(endpoint, "x")
        with pytest.raises(UserError, match=r"404 \(no such path\)"):
            ask(endpoint.url.removesuffix("/v1"), "x")


@pytest.mark.parametrize("status", [302, 304, 402, 405, 418])
def test_another_status_is_a_user_error(status: int) -> None:
    with serving(failed(status, "odd")) as endpoint, pytest.raises(UserError, match=f"HTTP {status}"):
        ask(endpoint, "x")


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_conversation_does_not_stop_the_others(status: int) -> None:
    def script(_: int, body: dict[str, Any]) -> Reply:
        long = body["messages"][0]["content"] == "long"
        return failed(status, "too long\n" + "b" * 500) if long else said("ok")

    with serving(script) as endpoint:
        answers = ask(endpoint, "a", "long", "b", concurrency=1)
    assert [answers[i] for i in (0, 2)] == [ServerAnswer("ok", finished=True)] * 2
    assert answers[1] == ServerAnswer("", finished=False, refused="too long " + "b" * 191)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"detail": [{"loc": "n"}]}', "[{'loc': 'n'}]"), ("<b>no</b>", "<b>no</b>"), ("", "no reason given"),
        ('{"object": "error", "message": "old"}', "old"), ('["a"]', "['a']"), ('{"error": null}', "no reason given"),
    ],
)  # fmt: skip
def test_any_form_of_a_refusal_is_shown(body: str, reason: str) -> None:
    with serving(Reply(body, 400)) as endpoint:
        assert ask(endpoint, "x")[0].refused == reason


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (said(""), ServerAnswer("", True)),
        (said("half", "length"), ServerAnswer("half", False)),
        (said(None, "length", reasoning_content="hm"), ServerAnswer("", False)),
        (said("x", None), ServerAnswer("x", True)),
        (said("a\ud800é"), ServerAnswer("a?é", True)),
        (said(None, "content_filter"), ServerAnswer("", False, "the server's content filter")),
    ],
)
def test_unusual_answers(reply: Reply, answer: ServerAnswer) -> None:
    with serving(reply) as endpoint:
        assert ask(endpoint, "x") == {0: answer}
    assert len(endpoint.bodies) == 1


def test_a_conversation_that_is_no_utf8_is_refused_unasked() -> None:
    with serving(echo) as endpoint:
        answers = ask(endpoint, "\ud800", "b")
    assert answers[1] == ServerAnswer("B", finished=True)
    assert "UTF-8" in (answers[0].refused or "")


def test_a_compressed_answer() -> None:
    reply = said("x")
    assert isinstance(reply.body, str)
    packed = Reply(gzip.compress(reply.body.encode()), headers={"Content-Encoding": "gzip"})
    with serving(packed) as endpoint:
        assert ask(endpoint, "x") == {0: ServerAnswer("x", finished=True)}


def test_answers_that_came_are_given_before_an_error() -> None:
    def script(_: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        if text == "first":
            return said(text)
        reply = failed(401) if text == "bad" else said(text)
        reply.seconds = 0.3
        return reply

    with serving(script) as endpoint:
        texts = ["first", "bad", "good", "bad", "good"]
        answers = request_completions(config(endpoint.url), [question(text) for text in texts], SAMPLING, seed=0)
        assert next(answers)[0] == 0
        time.sleep(1)  # all others arrive
        assert {next(answers)[0], next(answers)[0]} == {2, 4}
        with pytest.raises(UserError):
            next(answers)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r'pip install "thinkpo_jax\[server\]"'):
        ask("http://127.0.0.1:1/v1", "x")


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000/v1", "ftp://a/v1", "http://", "http:///v1", "http://a:b/v1", "http://[::1/v1", "http://a b/v1",
     "http://a:99999", "http://a:0", "http://.x/v1", f"http://{'a' * 70}.com", "http://a\x00/v1", "http://a\n"],
)  # fmt: skip
def test_a_wrong_url_is_named(url: str) -> None:
    with pytest.raises(UserError, match="url: expected a base URL"):
        parse_config(ServerConfig, {"url": url, "model": "m"}, source="run.yaml")


@pytest.mark.parametrize(
    "url", ["http://localhost:8000/v1", "https://api.openai.com/v1/", "http://[::1]:80", "http://a_b"]
)
def test_a_right_url_is_taken(url: str) -> None:
    assert parse_config(ServerConfig, {"url": url, "model": "m"}, source="x").url == url
    openai.AsyncOpenAI(base_url=url, api_key="none")


@pytest.mark.parametrize(
    "wrong", [{"concurrency": 0}, {"concurrency": 1025}, {"timeout": 0.0}, {"retries": -1}, {"retries": 101}, {"n": 1}]
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        parse_config(ServerConfig, {"url": "http://a", "model": "m", **wrong}, source="run.yaml")
