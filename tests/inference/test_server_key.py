"""The API key goes to the server in a header, and appears in no message and in no answer."""

import json
from typing import Any

import pytest
from support.server import Endpoint, Reply, failed, said, serving

from thinkpo_jax.data.chat_template import ThinkingFormat
from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig
from thinkpo_jax.inference.openai_engine import ServerConfig, ServerEngine
from thinkpo_jax.runtime.config import RunError, UserError

pytestmark = pytest.mark.usefixtures("fast_retries", "_key")
KEY = "sk-planted-0123456789"


@pytest.fixture
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def _ask(endpoint: Endpoint) -> Completion:
    config = ServerConfig(url=endpoint.url, model="tiny", retries=0)
    requests = [Request("a", [{"role": "user", "content": "a"}])]
    ((_, completion),) = ServerEngine(config, ThinkingFormat()).generate(requests, SamplingConfig(), seed=0)
    return completion


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (failed(401, f"Incorrect key: {KEY}"), "HTTP 401 (Incorrect key: [API key])"),
        (failed(403, "x" * 190 + KEY), "HTTP 403 (xxx"),  # the shortened reason would end in a part of the key
        (failed(500, f"{KEY} is out of order"), "HTTP 500 ([API key] is out"),
        (failed(418, KEY), "HTTP 418 ([API key])"),
        (Reply(json.dumps({"detail": KEY}), 401), "HTTP 401 ([API key])"),
        (Reply(f"no JSON {KEY}"), "found 'no JSON [API key]'"),
        (Reply("z" * 70 + KEY), "found 'zzz"),
    ],
)
def test_an_error_of_the_server_is_shown_without_the_key(reply: Reply, expected: str) -> None:
    with serving(reply) as endpoint, pytest.raises((UserError, RunError)) as caught:
        _ask(endpoint)
    assert endpoint.keys[0] == f"Bearer {KEY}"
    assert expected in str(caught.value)
    assert KEY[:9] not in str(caught.value)


def test_a_list_of_models_is_shown_without_the_key() -> None:
    with serving(failed(404)) as endpoint:
        endpoint.models = Reply(json.dumps({"object": "list", "data": [{"id": KEY}]}))
        with pytest.raises(UserError, match=r"The server has: \[API key\]\. Set url or model"):
            _ask(endpoint)


def test_an_error_of_one_conversation_is_saved_without_the_key() -> None:
    with serving(failed(400, f"bad {KEY}")) as endpoint:
        assert _ask(endpoint) == Completion(error="bad [API key]")


@pytest.mark.parametrize("fields", [{"content": f"The key is {KEY}."}, {"content": "4", "reasoning_content": KEY}])
def test_an_answer_with_the_key_is_an_error(fields: dict[str, Any]) -> None:
    with serving(said(**fields)) as endpoint:
        assert _ask(endpoint) == Completion(error="the server wrote the API key into its answer")


def test_a_short_key_may_be_a_word_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serving(said("There is none.")) as endpoint:
        assert _ask(endpoint).text == "There is none."


def test_a_redirect_to_another_server_does_not_get_the_key() -> None:
    with serving(said("from elsewhere")) as other:
        with serving(Reply("", 307, {"Location": f"{other.url}/chat/completions"})) as endpoint:
            assert _ask(endpoint).text == "from elsewhere"
        assert (endpoint.keys, other.keys) == ([f"Bearer {KEY}"], [None])


def test_a_redirect_that_fails_is_shown_without_the_key() -> None:
    with (
        serving(Reply("", 307, {"Location": f"http://127.0.0.1:1/{KEY}"})) as endpoint,
        pytest.raises(RunError) as caught,
    ):
        _ask(endpoint)
    assert KEY not in str(caught.value)
