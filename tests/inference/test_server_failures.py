"""A request that fails for ever does not end an evaluation. A server that fails for ever does."""

from typing import Any

import pytest
from support.server import Reply, failed, said, serving

from thinkpo_jax.data.chat_template import ThinkingFormat
from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig
from thinkpo_jax.inference.openai_engine import MAX_FAILURES_IN_A_ROW, ServerConfig, ServerEngine
from thinkpo_jax.runtime.config import RunError

pytestmark = pytest.mark.usefixtures("fast_retries")


def _ask(url: str, *texts: str, received: dict[str, Completion] | None = None, **keys: Any) -> dict[str, Completion]:
    """Sends one request after the other. Returns the completion of each text."""
    config = ServerConfig.model_validate({"url": url, "model": "tiny", "concurrency": 1, "retries": 0} | keys)
    received = {} if received is None else received
    requests = [Request(text, [{"role": "user", "content": text}]) for text in texts]
    for key, completion in ServerEngine(config, ThinkingFormat()).generate(requests, SamplingConfig(), seed=0):
        received[key] = completion
    return received


def _reply(bad: Reply) -> Any:
    return lambda _, body: bad if "bad" in body["messages"][-1]["content"] else said("good")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (failed(500), "HTTP 500"),
        (Reply("?"), "expected a chat completion"),
        (Reply("", seconds=600), "no answer within 1 s"),
    ],
)
@pytest.mark.parametrize("texts", [("bad", "a", "b"), ("a", "bad", "b"), ("a", "b", "bad")])
def test_a_request_that_always_fails_is_an_error_of_its_own(bad: Reply, reason: str, texts: tuple[str, ...]) -> None:
    with serving(_reply(bad)) as endpoint:
        completions = _ask(endpoint.url, *texts, timeout=1.0)
    assert completions.keys() == set(texts)
    error = completions.pop("bad").error
    assert error is not None
    assert reason in error
    assert "Run the same command" not in error
    assert {completion.text for completion in completions.values()} == {"good"}


def test_failures_in_a_row_end_the_engine_after_the_answers_before_them() -> None:
    bad = [f"bad {number}" for number in range(MAX_FAILURES_IN_A_ROW)]
    received: dict[str, Completion] = {}
    with serving(_reply(failed(503))) as endpoint, pytest.raises(RunError, match=r"HTTP 503.*Run the same command"):
        _ask(endpoint.url, "a", *bad, "b", received=received)
    assert received == {"a": Completion("good")}


def test_failures_with_answers_between_them_do_not_end_the_engine() -> None:
    texts = [text for number in range(2 * MAX_FAILURES_IN_A_ROW) for text in (f"bad {number}", f"good {number}")]
    with serving(_reply(failed(503))) as endpoint:
        completions = _ask(endpoint.url, *texts)
    assert sum(completion.error is not None for completion in completions.values()) == 2 * MAX_FAILURES_IN_A_ROW
