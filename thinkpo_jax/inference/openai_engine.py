"""Requests completions from a server with OpenAI's chat API, such as vLLM. Many requests run at the same time.

The requests run on an event loop in a separate thread. So this works in a notebook, and Ctrl-C cancels them at once.
The package openai is optional. It is imported only when a server is used.
"""

import asyncio
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pydantic

from thinkpo_jax.data.chat_template import THINKING_FIELDS, TemplateArguments, ThinkingFormat
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig
from thinkpo_jax.runtime.config import ConfigSection, RunError, SecretValueError, UserError

CONNECT_SECONDS = 10.0  # Limits opening a connection. `timeout` limits waiting for an answer.
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 30.0  # after malformed answers. After a failed request, openai waits.
MAX_FAILURES_IN_A_ROW = 3  # requests without a valid answer, before the server counts as out of order
MAX_QUOTED_CHARACTERS, MAX_REASON_CHARACTERS = 80, 200  # Of a malformed answer, and of the reason in an error response.
PER_CONVERSATION_STATUSES = (400, 413, 422)  # They reject one conversation, such as a prompt that is too long.
RETRYABLE_STATUSES = (408, 409, 429)  # openai retries these and 5xx.
MIN_KEY_CHARACTERS = 8  # A shorter key, such as "none", is no secret, and may be a part of any text.
RESUME_HINT = "The answers so far are saved. Run the same command again to resume."


class ServerConfig(ConfigSection):
    """A server and how to use it.

    The server renders prompts with its own chat template. It gets `template_arguments` as `chat_template_kwargs`. The
    environment variable `api_key_variable` holds the key. If it is not set, the key "none" is sent. Up to
    `concurrency` requests run at the same time. Each may take `timeout` seconds, and is retried `retries` times.
    """

    url: str
    model: str = pydantic.Field(min_length=1)
    template_arguments: TemplateArguments = pydantic.Field(default_factory=dict)
    api_key_variable: str = pydantic.Field(default="OPENAI_API_KEY", min_length=1)
    concurrency: int = pydantic.Field(default=32, ge=1, le=1024)
    timeout: float = pydantic.Field(default=600.0, gt=0)
    retries: int = pydantic.Field(default=6, ge=0, le=100)

    @pydantic.field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        with contextlib.suppress(ValueError):  # such as an unclosed bracket, a wrong port or a label that is too long
            parts = urlsplit(url)
            has_host = bool((parts.hostname or "").encode("idna")) and parts.port != 0
            is_plain = url.isprintable() and not set(url) & set(" ?#") and "@" not in parts.netloc
            if has_host and is_plain and parts.scheme in ("http", "https"):
                return url
        expected = "expected a base URL such as http://localhost:8000/v1"
        if set(url) & set("@?#"):  # The url is in the report, so it must not hold a key.
            advice = "Put a key into the environment variable that `api_key_variable` names"
            raise SecretValueError(f"{expected}, without a user name, password or query. {advice}")
        raise ValueError(expected)

    @pydantic.field_validator("api_key_variable")
    @classmethod
    def _check_variable(cls, name: str) -> str:
        if not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
            raise SecretValueError(
                "expected the name of an environment variable in capital letters, such as OPENAI_API_KEY. The key "
                "itself does not belong into a configuration"
            )
        return name


class ServerEngine:
    """Implements `Engine` with a server.

    A thought that the server sends in a field of its own is joined to the answer as `thinking` says. The `tokenizer`
    counts the tokens of an answer. Without it, `num_tokens` is 0.
    """

    def __init__(self, config: ServerConfig, thinking: ThinkingFormat, tokenizer: ChatTokenizer | None = None) -> None:
        self.config, self.thinking, self.tokenizer = config, thinking, tokenizer

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, seed: int
    ) -> Generator[tuple[str, Completion], None, None]:
        """Implements `Engine.generate`. Answers are yielded as they arrive.

        A request without a valid answer in `retries` + 1 tries gives a completion with an error. Raises `RunError` if
        the server cannot be reached, or if that happens to `MAX_FAILURES_IN_A_ROW` requests without an answer between
        them. Raises `UserError` if openai is not installed, or the server does not accept the key or the model.
        """
        try:
            import openai
            from anyio.from_thread import start_blocking_portal  # openai depends on it
        except ImportError:
            raise UserError('A server needs the package openai. Run: pip install "thinkpo_jax[server]"') from None
        config = self.config
        timeout = openai.Timeout(config.timeout, connect=min(config.timeout, CONNECT_SECONDS))
        client = openai.AsyncOpenAI(base_url=config.url, api_key=_read_api_key(config), timeout=timeout)
        pending = iter(requests)
        running: dict[Future[Completion], str] = {}
        failures: list[tuple[str, _NoAnswerError]] = []  # since the last answer
        has_answered = False
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
            try:
                while True:
                    for request in itertools.islice(pending, config.concurrency - len(running)):
                        body = _body(config, request, sampling, seed)
                        future = portal.start_task_soon(_complete, client, config, body, self.thinking)
                        running[future] = request.key
                    if not running:
                        break
                    finished = wait(running, return_when=FIRST_COMPLETED).done
                    # Yield the answers before the first error, so that the caller can save them.
                    for future in sorted(finished, key=lambda future: future.exception() is not None):
                        key = running.pop(future)
                        if isinstance(error := future.exception(), _NoAnswerError):
                            failures.append((key, error))
                            if len(failures) == MAX_FAILURES_IN_A_ROW:
                                raise error
                            continue
                        completion, has_answered = self._count_tokens(future.result()), True
                        yield from _failed(failures)
                        failures.clear()
                        yield key, completion
            finally:
                for future in running:
                    future.cancel()
        if failures and not has_answered:
            raise failures[0][1]
        yield from _failed(failures)

    def _count_tokens(self, completion: Completion) -> Completion:
        if self.tokenizer is None or completion.error is not None:
            return completion
        return replace(completion, num_tokens=self.tokenizer.count_tokens([completion.text])[0])


class _NoAnswerError(RunError):
    """The server gave no valid answer to one request in all its tries."""


def _failed(failures: Sequence[tuple[str, _NoAnswerError]]) -> Iterator[tuple[str, Completion]]:
    return ((key, Completion(error=str(error).removesuffix(f" {RESUME_HINT}"))) for key, error in failures)


def _read_api_key(config: ServerConfig) -> str:
    api_key = os.environ.get(config.api_key_variable, "").strip() or "none"
    if not (api_key.isascii() and api_key.isprintable()):
        raise UserError(f"{config.api_key_variable}: the key has characters that HTTP headers forbid. Set it again.")
    return api_key


def _body(config: ServerConfig, request: Request, sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """Returns the body of a request. Parameters that are not a part of OpenAI's API are sent only if they are set."""
    turns = [(message["role"], message["content"]) for message in request.messages]
    identity = [seed, turns, request.sample] if request.sample else [seed, turns]
    digest = hashlib.sha256(json.dumps(identity).encode()).digest()
    extra_body: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k is not None else {}
    if sampling.min_p > 0:
        extra_body["min_p"] = sampling.min_p
    if config.template_arguments:
        extra_body["chat_template_kwargs"] = config.template_arguments
    limit = sampling.max_new_tokens
    return {
        "extra_body": extra_body,
        "model": config.model,
        "messages": list(request.messages),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": limit if request.max_new_tokens is None else min(limit, request.max_new_tokens),
        "n": 1,
        "seed": int.from_bytes(digest[:4], "big") >> 1,  # 31 bits: some servers read a signed 32-bit number
        **({"stop": list(sampling.stop)} if sampling.stop else {}),
    }


async def _complete(client: Any, config: ServerConfig, body: dict[str, Any], thinking: ThinkingFormat) -> Completion:
    """Sends one request. Failed requests are retried by openai, and malformed answers by the loop here."""
    import openai

    hide_key = functools.partial(_hide_key, config)
    retries_left, pause = config.retries, PAUSE_SECONDS
    while True:
        try:
            completions = client.with_options(max_retries=retries_left).chat.completions
            response = await completions.with_raw_response.create(**body)
        except openai.APIStatusError as error:
            if error.status_code in PER_CONVERSATION_STATUSES:
                return Completion(error=_reason(config, error))
            raise await _status_error(client, config, error) from None
        except UnicodeEncodeError:
            return Completion(error="the conversation cannot be encoded as UTF-8")
        except Exception as error:  # errors of openai, and those of the network that it lets through
            is_timeout = isinstance(error, openai.APITimeoutError)
            if not is_timeout:
                raise RunError(_no_answer(config, hide_key(f"{error} {error.__cause__ or ''}".strip()) + ",")) from None
            slow = f"no answer within {config.timeout:g} s (raise timeout, or lower max_new_tokens or concurrency)"
            raise _NoAnswerError(_no_answer(config, f"{slow},")) from None
        text = response.http_response.text
        if (completion := _parse_completion(text, thinking)) is not None:
            if completion.error is None and hide_key(completion.text) != completion.text:
                return Completion(error="the server wrote the API key into its answer")
            return completion
        retries_left -= response.retries_taken + 1
        if retries_left < 0:
            problem = f"expected a chat completion, found {hide_key(text)[:MAX_QUOTED_CHARACTERS]!r}"
            raise _NoAnswerError(_no_answer(config, problem))
        await asyncio.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)


def _no_answer(config: ServerConfig, problem: str) -> str:
    return f"{config.url}: {problem} in {config.retries + 1} tries. {RESUME_HINT}"


def _parse_completion(text: str, thinking: ThinkingFormat) -> Completion | None:
    """Reads the body of a response. Returns None if it holds no chat completion."""
    try:
        choice = json.loads(text)["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content, thoughts = message.get("content"), [message.get(name) for name in THINKING_FIELDS]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if reason == "content_filter":
        return Completion(error="the server's content filter stopped the answer")
    thought = next((thought for thought in thoughts if isinstance(thought, str) and thought.strip()), "")
    if content is None and (thought or reason == "length"):
        content = ""  # the answer did not begin, and the server may send the thought in another field or not at all
    if not isinstance(content, str) or reason == "abort":  # vLLM aborted the request before the answer was complete
        return None
    if thought and (tag := thinking.find_tag(content, thought)):
        return Completion(error=f"the server sent a thought in a field of its own, and {tag} in the text too")
    if thought and not content.strip() and reason != "length":
        return Completion(error="the server sent a thought without an answer")
    if thought:
        content = thinking.join(thought, content) if content.strip() else thinking.before + thought
    printable = content.encode(errors="replace").decode()  # half of a surrogate pair becomes "?"
    return Completion(text=printable, finish_reason="length" if reason == "length" else "stop")


async def _status_error(client: Any, config: ServerConfig, error: Any) -> UserError | RunError:
    """Returns the error to raise for a status that concerns every conversation."""
    status = error.status_code
    problem = f"{config.url}: HTTP {status} ({_reason(config, error)})"
    if status in RETRYABLE_STATUSES or status >= 500:
        return _NoAnswerError(f"{problem}, in up to {config.retries + 1} tries. {RESUME_HINT}")
    if status in (401, 403):
        state = "is not accepted" if os.environ.get(config.api_key_variable) else "is not set"
        return UserError(f"{problem}: {config.api_key_variable} {state}. Set it to a key for the model {config.model}.")
    if status != 404:
        return UserError(f"{problem}. Check url and model ({config.model}).")
    try:
        page = await client.with_options(max_retries=0, timeout=CONNECT_SECONDS).models.list()
        models = [_hide_key(config, str(model.id)) for model in page.data[:20]]
    except Exception:  # the server has no list of models, or sends something else
        models = []
    hint = f"The server has: {', '.join(models)}." if models else "The url of most servers ends in /v1."
    return UserError(f"{problem}: there is no model {config.model}. {hint} Set url or model.")


def _reason(config: ServerConfig, error: Any) -> str:
    """Returns the reason in an error response, on one line, shortened and without the key."""
    body = error.body
    reason = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    text = _hide_key(config, str(reason or body or "no reason given"))
    return " ".join(text.split())[:MAX_REASON_CHARACTERS]


def _hide_key(config: ServerConfig, text: str) -> str:
    """Returns a text of the server without the key, which the server may repeat."""
    key = _read_api_key(config)
    return text if len(key) < MIN_KEY_CHARACTERS else text.replace(key, "[API key]")
