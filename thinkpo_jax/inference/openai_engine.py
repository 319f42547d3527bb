"""Requests completions from a server with OpenAI's chat API, such as vLLM. Many requests run at the same time.

The requests run on an event loop in a separate thread. So this works in a notebook, and Ctrl-C cancels them at once.
The package openai is optional. It is imported only when a server is used.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pydantic

from thinkpo_jax.data.chat_template import THINKING_FIELDS, Message, TemplateArguments, ThinkingFormat
from thinkpo_jax.inference.engine import Completion, SamplingConfig
from thinkpo_jax.runtime.config import ConfigSection, RunError, UserError

CONNECT_SECONDS = 10.0  # Limits opening a connection. `timeout` limits waiting for an answer.
PAUSE_SECONDS = 1.0  # The wait after a malformed answer. After a failed request, openai waits.
MAX_QUOTED_CHARACTERS, MAX_REASON_CHARACTERS = 80, 200  # Of a malformed answer, and of the reason in an error response.
PER_CONVERSATION_STATUSES = (400, 413, 422)  # They reject one conversation, such as a prompt that is too long.
RETRYABLE_STATUSES = (408, 409, 429)  # openai retries these and 5xx.
RESUME_HINT = "The answers so far are saved. Run the same command again to resume."
KeyT = TypeVar("KeyT")


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
            if has_host and parts.scheme in ("http", "https") and url.isprintable() and " " not in url:
                return url
        raise ValueError("expected a base URL such as http://localhost:8000/v1")


def request_completions(
    config: ServerConfig,
    conversations: Mapping[KeyT, Sequence[Message]],
    sampling: SamplingConfig,
    *,
    seed: int,
    thinking: ThinkingFormat,
) -> Generator[tuple[KeyT, Completion], None, None]:
    """Yields the key and the completion of each conversation as the answers arrive.

    A thought that the server sends in a field of its own is joined to the answer as `thinking` says.
    The seed of a request depends only on `seed` and the conversation, so a subset gets the same seeds. Closing the
    generator cancels the running requests. Raises `UserError` if openai is not installed, or the server does not accept
    the key or the model. Raises `RunError` if the server cannot be reached, or gives no valid answer in `retries` + 1
    tries.
    """
    try:
        import openai
        from anyio.from_thread import start_blocking_portal  # openai depends on it
    except ImportError:
        raise UserError('A server needs the package openai. Run: pip install "thinkpo_jax[server]"') from None
    timeout = openai.Timeout(config.timeout, connect=min(config.timeout, CONNECT_SECONDS))
    api_key = os.environ.get(config.api_key_variable, "").strip() or "none"
    if not (api_key.isascii() and api_key.isprintable()):
        raise UserError(f"{config.api_key_variable}: the key has characters that HTTP headers forbid. Set it again.")
    client = openai.AsyncOpenAI(base_url=config.url, api_key=api_key, timeout=timeout)
    pending = iter(conversations.items())
    running: dict[Future[Completion], KeyT] = {}
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
        try:
            while True:
                for key, messages in itertools.islice(pending, config.concurrency - len(running)):
                    body = _body(config, messages, sampling, seed)
                    running[portal.start_task_soon(_complete, client, config, body, thinking)] = key
                if not running:
                    return
                finished = wait(running, return_when=FIRST_COMPLETED).done
                # Yield the answers before the first error, so that the caller can save them.
                for future in sorted(finished, key=lambda future: future.exception() is not None):
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()


def _body(config: ServerConfig, messages: Sequence[Message], sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    turns = [(message["role"], message["content"]) for message in messages]
    digest = hashlib.sha256(json.dumps([seed, turns]).encode()).digest()
    extra_body = {"chat_template_kwargs": config.template_arguments} if config.template_arguments else {}
    return {
        "extra_body": extra_body,  # not a part of OpenAI's API
        "model": config.model,
        "messages": list(messages),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "n": 1,
        "seed": int.from_bytes(digest[:4], "big") >> 1,  # 31 bits: some servers read a signed 32-bit number
    }


async def _complete(client: Any, config: ServerConfig, body: dict[str, Any], thinking: ThinkingFormat) -> Completion:
    """Sends one request. Failed requests are retried by openai, and malformed answers by the loop here."""
    import openai

    retries_left = config.retries
    while True:
        try:
            completions = client.with_options(max_retries=retries_left).chat.completions
            response = await completions.with_raw_response.create(**body)
        except openai.APIStatusError as error:
            if error.status_code in PER_CONVERSATION_STATUSES:
                return Completion(error=_reason(error))
            raise await _status_error(client, config, error) from None
        except UnicodeEncodeError:
            return Completion(error="the conversation cannot be encoded as UTF-8")
        except Exception as error:  # errors of openai, and those of the network that it lets through
            is_timeout = isinstance(error, openai.APITimeoutError)
            problem = f"no answer within {config.timeout:g} s" if is_timeout else f"{error} {error.__cause__ or ''}"
            raise _no_answer(config, f"{problem.strip()},") from None
        text = response.http_response.text
        if (completion := _parse_completion(text, thinking)) is not None:
            return completion
        retries_left -= response.retries_taken + 1
        if retries_left < 0:
            raise _no_answer(config, f"expected a chat completion, found {text[:MAX_QUOTED_CHARACTERS]!r}")
        await asyncio.sleep(PAUSE_SECONDS)


def _no_answer(config: ServerConfig, problem: str) -> RunError:
    return RunError(f"{config.url}: {problem} in {config.retries + 1} tries. {RESUME_HINT}")


def _parse_completion(text: str, thinking: ThinkingFormat) -> Completion | None:
    """Reads the body of a response. Returns None if it holds no chat completion."""
    try:
        choice = json.loads(text)["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content, thoughts = message.get("content"), [message.get(name) for name in THINKING_FIELDS]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if reason == "content_filter":
        return Completion(error="the server's content filter")
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
    problem = f"{config.url}: HTTP {status} ({_reason(error)})"
    if status in RETRYABLE_STATUSES or status >= 500:
        return RunError(f"{problem}, in up to {config.retries + 1} tries. {RESUME_HINT}")
    if status in (401, 403):
        state = "is not accepted" if os.environ.get(config.api_key_variable) else "is not set"
        return UserError(f"{problem}: {config.api_key_variable} {state}. Set it to a key for the model {config.model}.")
    if status != 404:
        return UserError(f"{problem}. Check url and model ({config.model}).")
    try:
        page = await client.with_options(max_retries=0, timeout=CONNECT_SECONDS).models.list()
        models = [str(model.id) for model in page.data[:20]]
    except Exception:  # the server has no list of models, or sends something else
        models = []
    hint = f"The server has: {', '.join(models)}." if models else "The url of most servers ends in /v1."
    return UserError(f"{problem}: there is no model {config.model}. {hint} Set url or model.")


def _reason(error: Any) -> str:
    """Returns the reason in an error response, on one line and shortened."""
    body = error.body
    reason = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    return " ".join(str(reason or body or "no reason given").split())[:MAX_REASON_CHARACTERS]
