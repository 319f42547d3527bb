"""The section of the engine rejects keys without effect, and the section of a server rejects what it cannot use."""

from typing import Any

import openai
import pytest

from thinkpo_jax.evaluation.evaluate_model import EvaluationConfig
from thinkpo_jax.inference.engine_config import EngineConfig
from thinkpo_jax.inference.openai_engine import ServerConfig
from thinkpo_jax.runtime.config import UserError, parse_config

SERVER = {"url": "http://localhost:8000/v1", "model": "tiny"}


def test_the_local_engine_is_the_default() -> None:
    config = parse_config(EngineConfig, {}, source="x")
    assert (config.engine, config.local.slots, config.server) == ("local", 64, None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"engine": "server"}, "`engine: server` needs the section `server` with `url` and `model`. Add it"),
        ({"server": SERVER}, "`server` has no effect with `engine: local`. Add `engine: server`"),
        ({"engine": "server", "server": SERVER, "local": {"slots": 8}}, "`local` has no effect with `engine: server`"),
        ({"engine": "vllm"}, "engine: Input should be 'local' or 'server'"),
        ({"local": {"slots": 0}}, "local.slots: "),
        ({"engine": "server", "server": {"url": "http://a/v1"}}, "server.model is required"),
    ],
)
def test_an_engine_with_a_key_that_is_missing_or_has_no_effect_is_rejected(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(EngineConfig, keys, source="run.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("keys", [{}, {"engine": "server", "server": SERVER}], ids=["local", "server"])
def test_a_resolved_configuration_can_be_read_again(keys: dict[str, Any]) -> None:
    config = parse_config(EngineConfig, keys, source="x")
    assert parse_config(EngineConfig, config.model_dump(mode="json"), source="x") == config


def test_an_evaluation_takes_template_arguments_from_the_model() -> None:
    server = SERVER | {"template_arguments": {"enable_thinking": False}}
    raw = {"benchmarks": [{"name": "miniature"}], "engine": "server", "server": server}
    with pytest.raises(UserError, match=r"server.template_arguments: an evaluation sends `model.template_arguments`"):
        parse_config(EvaluationConfig, raw, source="x")


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000/v1", "ftp://a/v1", "http://", "http:///v1", "http://a:b/v1", "http://[::1/v1", "http://a b/v1",
     "http://a:99999", "http://a:0", "http://.x/v1", f"http://{'a' * 70}.com", "http://a\x00/v1", "http://a\n"],
)  # fmt: skip
def test_an_invalid_url_is_rejected(url: str) -> None:
    with pytest.raises(UserError, match="url: expected a base URL"):
        parse_config(ServerConfig, {"url": url, "model": "m"}, source="run.yaml")


@pytest.mark.parametrize(
    "url", ["http://localhost:8000/v1", "https://api.openai.com/v1/", "http://[::1]:80", "http://a_b"]
)
def test_a_valid_url_is_accepted(url: str) -> None:
    assert parse_config(ServerConfig, {"url": url, "model": "m"}, source="x").url == url
    openai.AsyncOpenAI(base_url=url, api_key="none")


@pytest.mark.parametrize(
    "wrong", [{"concurrency": 0}, {"concurrency": 1025}, {"timeout": 0.0}, {"retries": -1}, {"retries": 101}, {"n": 1}]
)
def test_invalid_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        parse_config(ServerConfig, {"url": "http://a", "model": "m", **wrong}, source="run.yaml")


@pytest.mark.parametrize(
    "url",
    ["http://user:hunter2@host/v1", "http://hunter2@host/v1", "http://u:hun/ter2hunter2@host", "user:hunter2@host/v1",
     "http://host/v1?api_key=hunter2", "http://host/v1#hunter2", "http://u:hunter2@[::1/v1"],
)  # fmt: skip
def test_a_url_with_a_password_is_refused_without_repeating_it(url: str) -> None:
    raw = {"url": url, "model": "m"}
    with pytest.raises(UserError) as caught:
        parse_config(ServerConfig, raw, source="run.yaml", assignments=[f"url={url}"])
    assert str(caught.value) == (
        "run.yaml with --set url: url: expected a base URL such as http://localhost:8000/v1, without a user name, "
        "password or query. Put a key into the environment variable that `api_key_variable` names."
    )


@pytest.mark.parametrize("name", ["sk-hunter2", "hf_hunter2", ""])
def test_a_key_in_place_of_its_variable_is_refused_without_repeating_it(name: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(ServerConfig, {**SERVER, "api_key_variable": name}, source="run.yaml")
    assert "api_key_variable: expected the name of an environment variable" in str(caught.value) or not name
    assert "hunter2" not in str(caught.value)
