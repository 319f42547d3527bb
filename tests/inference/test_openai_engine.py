"""The client yields the answers of a server as they arrive. Each failure gives a message that says what to do."""

import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.server import Endpoint, Reply, failed, fast_retries, said, serving  # noqa: F401

from thinkpo_jax.data.chat_template import Message, ThinkingFormat
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig
from thinkpo_jax.inference.openai_engine import ServerConfig, ServerEngine
from thinkpo_jax.runtime.config import RunError, UserError

pytestmark = pytest.mark.usefixtures("fast_retries")
SAMPLING = SamplingConfig(temperature=0.6, top_p=0.9, max_new_tokens=77)


def config(url: str, **changes: Any) -> ServerConfig:
    return ServerConfig(**{"url": url, "model": "tiny", "retries": 3, "timeout": 120.0, **changes})


def user_says(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def start(endpoint: Endpoint | str, *texts: str, seed: int = 0, **changes: Any) -> Generator[tuple[str, Completion]]:
    """Sends one request for each text. Its key is the index of the text."""
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    requests = [Request(str(i), user_says(text)) for i, text in enumerate(texts)]
    return ServerEngine(config(url, **changes), ThinkingFormat()).generate(requests, SAMPLING, seed=seed)


def ask(endpoint: Endpoint | str, *texts: str, seed: int = 0, **changes: Any) -> dict[int, Completion]:
    return {int(key): completion for key, completion in start(endpoint, *texts, seed=seed, **changes)}


def echo(_: int, body: dict[str, Any]) -> Reply:
    return said(body["messages"][-1]["content"].upper())


def test_every_conversation_gets_its_own_answer() -> None:
    with serving(echo) as endpoint:
        answers = ask(endpoint, *(f"q{i}" for i in range(50)), concurrency=8)
    assert answers == {i: Completion(text=f"Q{i}", finish_reason="stop") for i in range(50)}


def test_without_conversations_no_request_is_sent() -> None:
    with serving(echo) as endpoint:
        assert ask(endpoint) == {}
        assert endpoint.bodies == []


def test_answers_are_yielded_as_they_arrive() -> None:
    last = threading.Event()

    def script(_: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        assert text != "slow" or last.wait(10)
        return said(text)

    with serving(script) as endpoint:
        answers = start(endpoint, "slow", "quick")
        assert next(answers)[0] == "1"
        last.set()
        assert next(answers)[0] == "0"
        assert list(answers) == []


def test_the_request_holds_the_settings_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " secret\n")
    conversation: list[Message] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?\n"}]
    with serving(said("2")) as endpoint:
        settings = config(endpoint.url, api_key_variable="MY_KEY", template_arguments={"enable_thinking": False})
        list(ServerEngine(settings, ThinkingFormat()).generate([Request("a", conversation)], SAMPLING, seed=5))
        ask(endpoint, "x", api_key_variable="MY_OTHER_KEY")
    (first, _), keys = endpoint.bodies, endpoint.keys
    assert 0 <= first.pop("seed") < 2**31
    assert first == {
        "model": "tiny", "messages": conversation, "temperature": 0.6, "top_p": 0.9, "max_tokens": 77, "n": 1,
        "chat_template_kwargs": {"enable_thinking": False}
    }  # fmt: skip
    assert keys == ["Bearer secret", "Bearer none"]


def test_the_seed_of_a_request_depends_only_on_the_seed_and_the_conversation() -> None:
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


def test_samples_of_a_conversation_have_different_seeds_and_sample_0_keeps_its_seed() -> None:
    requests = [Request(f"{text}{sample}", user_says(text), sample) for text in "ab" for sample in range(3)]
    with serving(said("")) as endpoint:
        list(ServerEngine(config(endpoint.url, concurrency=1), ThinkingFormat()).generate(requests, SAMPLING, seed=3))
        ask(endpoint, "a", seed=3)
    seeds = [body["seed"] for body in endpoint.bodies]
    assert len(set(seeds)) == 6
    digest = hashlib.sha256(json.dumps([3, [["user", "a"]]]).encode()).digest()
    assert seeds[0] == seeds[6] == int.from_bytes(digest[:4], "big") >> 1


def test_further_sampling_parameters_are_sent_if_they_are_set() -> None:
    sampling = SamplingConfig(temperature=0.6, top_k=5, min_p=0.1, stop=("\n\n", "Q:"), max_new_tokens=77)
    requests = [Request("a", user_says("a"), max_new_tokens=9), Request("b", user_says("b"), max_new_tokens=99)]
    with serving(said("")) as endpoint:
        list(ServerEngine(config(endpoint.url, concurrency=1), ThinkingFormat()).generate(requests, sampling, seed=0))
    first, second = endpoint.bodies
    assert (first["top_k"], first["min_p"], first["stop"]) == (5, 0.1, ["\n\n", "Q:"])
    assert (first["max_tokens"], second["max_tokens"]) == (9, 77)


def test_the_tokenizer_counts_the_tokens_of_an_answer_with_its_thought(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(byte_tokenizer(tmp_path))
    replies = [said("four", reasoning_content="hm", reason="length"), said(""), failed(400)]
    requests = [Request(str(i), user_says("2+2?")) for i in range(3)]
    with serving(replies) as endpoint:
        engine = ServerEngine(config(endpoint.url, concurrency=1), tokenizer.thinking, tokenizer)
        thought, empty, refused = (completion for _, completion in engine.generate(requests, SAMPLING, seed=0))
    assert thought == Completion("<think>\nhm\n</think>\n\nfour", len("<think>\nhm\n</think>\n\nfour"), "length")
    assert empty == Completion("", 0, "stop")
    assert (refused.error, refused.num_tokens) == ("out of order", 0)


def test_the_number_of_running_requests_reaches_the_limit_and_never_exceeds_it() -> None:
    four_requests = threading.Barrier(4)

    def script(*_: Any) -> Reply:
        four_requests.wait(120)  # breaks unless four requests run at the same time
        reply = said("ok")
        reply.seconds = 0.1  # long enough that a fifth would be counted
        return reply

    with serving(script) as endpoint:
        assert len(ask(endpoint, *map(str, range(20)), concurrency=4)) == 20
    assert endpoint.most == 4


def test_closing_the_generator_cancels_requests_and_starts_no_more() -> None:
    def script(number: int, _: dict[str, Any]) -> Reply:
        return said("ok") if number == 0 else Reply("", seconds=600)

    with serving(script) as endpoint:
        answers = start(endpoint, *["x"] * 100, concurrency=4)
        next(answers)
        begin = time.monotonic()
        answers.close()
        assert time.monotonic() - begin < 60
        time.sleep(0.5)  # a request that was sent before may still arrive
        started = len(endpoint.bodies)
        time.sleep(0.3)
        assert len(endpoint.bodies) == started <= 4


def test_ctrl_c_stops_at_once() -> None:
    def script(*_: Any) -> Reply:
        os.kill(os.getpid(), signal.SIGINT)
        return Reply("", seconds=600)

    with serving(script) as endpoint:
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask(endpoint, "x", timeout=600.0)
        assert time.monotonic() - begin < 60


def test_requests_work_inside_a_running_event_loop_as_in_a_notebook() -> None:
    async def cell() -> dict[int, Completion]:
        return ask(endpoint, "a")

    with serving(echo) as endpoint:
        assert asyncio.run(cell()) == {0: Completion(text="A", finish_reason="stop")}


CUT = Reply('{"choices": [', length=1000)
TRANSIENT = {
    "429": failed(429, Retry_After="0"), "408": failed(408), "409": failed(409), "500": failed(500), "503": failed(503),
    "html": Reply("<html>Bad gateway</html>", headers={"Content-Type": "text/html"}), "empty": Reply(""), "cut": CUT,
    "no choices": Reply('{"choices": []}'), "a list": Reply("[1]"), "an error": Reply('{"error": "busy"}'),
    "no message": Reply('{"choices": [{}]}'), "null": said(None), "a number": said(7), "parts": said([{"text": "x"}]),
    "a number after a thought": said(7, reasoning="hm"), "parts after a thought": said([{}], reasoning="hm"),
    "text": Reply('{"choices": "abc"}'), "deep": Reply("[" * 100_000), "binary": Reply(b"\xff\xfe\x00"),
    "no gzip": Reply("plain", headers={"Content-Encoding": "gzip"}), "digits": Reply("9" * 5000),
}  # fmt: skip


@pytest.mark.parametrize("reply", TRANSIENT.values(), ids=list(TRANSIENT))
def test_transient_failures_and_malformed_answers_are_retried(reply: Reply) -> None:
    with serving([reply, reply, said("good")]) as endpoint:
        assert ask(endpoint, "x") == {0: Completion(text="good", finish_reason="stop")}
    assert len({body["seed"] for body in endpoint.bodies}) == 1


@pytest.mark.parametrize("reply", TRANSIENT.values(), ids=list(TRANSIENT))
def test_a_failure_that_stays_is_a_run_error_after_all_tries(reply: Reply) -> None:
    with serving(reply) as endpoint, pytest.raises(RunError) as caught:
        ask(endpoint, "x")
    assert len(endpoint.bodies) == 4
    assert endpoint.url in str(caught.value)
    assert "4 tries" in str(caught.value)
    assert "The answers so far are saved. Run the same command again to resume." in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_failures_and_malformed_answers_share_the_number_of_tries() -> None:
    with serving(lambda number, _: failed(500) if number % 2 else Reply("?")) as endpoint, pytest.raises(RunError):
        ask(endpoint, "x", retries=5)
    assert len(endpoint.bodies) == 6


def test_an_error_quotes_the_start_of_the_response() -> None:
    with serving(Reply("<html>" + "a" * 200)) as endpoint, pytest.raises(RunError) as caught:
        ask(endpoint, "x")
    assert repr("<html>" + "a" * 74) in str(caught.value)
    assert "a" * 75 not in str(caught.value)
    with serving(failed(503, "the engine is asleep")) as endpoint, pytest.raises(RunError, match=r"503.*engine is as"):
        ask(endpoint, "x", retries=0)


def test_a_timeout_is_retried_and_then_reported() -> None:
    with serving(Reply("", seconds=600)) as endpoint, pytest.raises(RunError, match=r"no answer within 1 s .*, in 2 t"):
        ask(endpoint, "x", timeout=1.0, retries=1)
    assert len(endpoint.bodies) == 2
    with serving(lambda number, _: said("now") if number else Reply("", seconds=600)) as endpoint:
        assert ask(endpoint, "x", timeout=1.0) == {0: Completion(text="now", finish_reason="stop")}


def test_a_server_that_cannot_be_reached_is_reported() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RunError, match=rf"{url}.*[Cc]onnection.*4 tries.*saved"):
        ask(url, "x")
    with pytest.raises(RunError, match=r"nowhere\.invalid.*saved"):
        ask("http://nowhere.invalid/v1", "x", retries=0)


def test_a_server_without_http_is_reported() -> None:
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
def test_a_rejected_key_names_the_variable_and_hides_the_key(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_unknown_model_lists_the_models_of_the_server() -> None:
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
def test_any_other_error_status_is_a_user_error(status: int) -> None:
    with serving(failed(status, "odd")) as endpoint, pytest.raises(UserError, match=f"HTTP {status}"):
        ask(endpoint, "x")


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_rejected_conversation_does_not_stop_the_others(status: int) -> None:
    def script(_: int, body: dict[str, Any]) -> Reply:
        long = body["messages"][0]["content"] == "long"
        return failed(status, "too long\n" + "b" * 500) if long else said("ok")

    with serving(script) as endpoint:
        answers = ask(endpoint, "a", "long", "b", concurrency=1)
    assert [answers[i] for i in (0, 2)] == [Completion(text="ok", finish_reason="stop")] * 2
    assert answers[1] == Completion(error="too long " + "b" * 191)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"detail": [{"loc": "n"}]}', "[{'loc': 'n'}]"), ("<b>no</b>", "<b>no</b>"), ("", "no reason given"),
        ('{"object": "error", "message": "old"}', "old"), ('["a"]', "['a']"), ('{"error": null}', "no reason given"),
    ],
)  # fmt: skip
def test_the_reason_of_a_rejection_is_found_in_any_format(body: str, reason: str) -> None:
    with serving(Reply(body, 400)) as endpoint:
        assert ask(endpoint, "x")[0].error == reason


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (said(""), Completion(text="", finish_reason="stop")),
        (said("half", "length"), Completion(text="half", finish_reason="length")),
        (said(None, "length", reasoning_content="hm"), Completion(text="<think>\nhm", finish_reason="length")),
        (said("4", reasoning="2+2"), Completion(text="<think>\n2+2\n</think>\n\n4")),
        (said("4", thinking="", reasoning_content=None), Completion(text="4")),
        (said("\n", "length", reasoning="hm"), Completion(text="<think>\nhm", finish_reason="length")),
        (said(None, "stop", reasoning="hm"), Completion(error="the server sent a thought without an answer")),
        (
            said("<think>a</think>4", reasoning_content="b"),
            Completion(error="the server sent a thought in a field of its own, and <think> in the text too"),
        ),
        (said("x", None), Completion(text="x", finish_reason="stop")),
        (said("a\ud800é"), Completion(text="a?é", finish_reason="stop")),
        (said(None, "content_filter"), Completion(error="the server's content filter stopped the answer")),
    ],
)
def test_empty_truncated_and_filtered_answers(reply: Reply, answer: Completion) -> None:
    with serving(reply) as endpoint:
        assert ask(endpoint, "x") == {0: answer}
    assert len(endpoint.bodies) == 1


def test_a_conversation_that_is_not_utf8_gets_an_error_and_is_not_sent() -> None:
    with serving(echo) as endpoint:
        answers = ask(endpoint, "\ud800", "b")
    assert answers[1] == Completion(text="B", finish_reason="stop")
    assert "UTF-8" in (answers[0].error or "")


def test_a_compressed_answer_is_read() -> None:
    reply = said("x")
    assert isinstance(reply.body, str)
    packed = Reply(gzip.compress(reply.body.encode()), headers={"Content-Encoding": "gzip"})
    with serving(packed) as endpoint:
        assert ask(endpoint, "x") == {0: Completion(text="x", finish_reason="stop")}


def test_answers_that_arrived_are_yielded_before_an_error() -> None:
    def script(_: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        if text == "first":
            return said(text)
        reply = failed(401) if text == "bad" else said(text)
        reply.seconds = 0.3
        return reply

    with serving(script) as endpoint:
        texts = ["first", "bad", "good", "bad", "good"]
        answers = start(endpoint, *texts)
        assert next(answers)[0] == "0"
        time.sleep(1)  # all others arrive
        assert {next(answers)[0], next(answers)[0]} == {"2", "4"}
        with pytest.raises(UserError):
            next(answers)


def test_a_missing_package_is_reported_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r'pip install "thinkpo_jax\[server\]"'):
        ask("http://127.0.0.1:1/v1", "x")
