"""How does a server answer? Any that speaks OpenAI's chat API, such as vLLM; many requests are under way at once.

The requests run on an event loop in a thread of its own, so that a notebook may ask too, and Ctrl-C ends them at once.
The package openai is optional, and is imported only here, when a server is asked.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pydantic

from thinkpo_jax.data.chat_tokenizer import Message
from thinkpo_jax.inference.sampling import SamplingConfig
from thinkpo_jax.runtime.config import ConfigSection, RunError, UserError

CONNECT_SECONDS = 10.0  # to open a connection; an answer may take `timeout`
PAUSE_SECONDS = 1.0  # before asking again for an answer that was none; openai's own back-off sees failures alone
MAX_QUOTED_CHARACTERS, REASON = 80, 200  # characters of what came instead of an answer, of a server's reason
PER_CONVERSATION_STATUSES = (
    400,
    413,
    422,
)  # statuses that concern one conversation, such as a prompt too long for the model
RETRYABLE_STATUSES = (408, 409, 429)  # statuses besides 5xx that openai asks again for
RESUME_HINT = "What was answered is kept; run the same command again."


class ServerConfig(ConfigSection):
    """A server, and how much is asked of it at once. `timeout`: seconds that one request may wait for its answer.

    The key is read from the environment variable `api_key_variable`; where that is unset, "none" is sent.
    """

    url: str
    model: str = pydantic.Field(min_length=1)
    api_key_variable: str = pydantic.Field(default="OPENAI_API_KEY", min_length=1)
    concurrency: int = pydantic.Field(default=32, ge=1, le=1024)
    timeout: float = pydantic.Field(default=600.0, gt=0)
    retries: int = pydantic.Field(default=6, ge=0, le=100)

    @pydantic.field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        good = False
        with contextlib.suppress(ValueError):  # a bracket left open, a port that is no number, a label too long
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.port != 0 and bool((parts.hostname or "").encode("idna"))
        if not good or not url.isprintable() or " " in url:
            raise ValueError("expected a base URL such as http://localhost:8000/v1")
        return url


@dataclass(frozen=True)
class ServerAnswer:
    """What a server wrote; `finished` is False where the length limit cut it.

    `refused`: why the server refused this one conversation; the text is empty then.
    """

    text: str
    finished: bool
    refused: str | None = None


def request_completions(
    config: ServerConfig, conversations: Sequence[Sequence[Message]], sampling: SamplingConfig, *, seed: int
) -> Generator[tuple[int, ServerAnswer], None, None]:
    """One answer for each conversation, with its index, as they arrive; at most `concurrency` are under way.

    The seed that is sent depends on `seed` and the conversation's text alone, so a subset gets the same seeds. Closing
    the generator cancels what is under way. Raises `UserError` for a missing package, a key or a model that the server
    does not accept, and `RunError` where it cannot be reached or gives no answers after `retries` further tries.
    """
    try:
        import openai
        from anyio.from_thread import start_blocking_portal  # openai depends on it
    except ImportError:
        raise UserError('asking a server needs the package openai: pip install "thinkpo_jax[server]"') from None
    client = openai.AsyncOpenAI(
        base_url=config.url,
        api_key=_key(config),
        timeout=openai.Timeout(config.timeout, connect=min(config.timeout, CONNECT_SECONDS)),
    )
    unasked = iter(enumerate(conversations))
    asked: dict[Future[ServerAnswer], int] = {}
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
        try:
            while True:
                for index, messages in itertools.islice(unasked, config.concurrency - len(asked)):
                    request = _request(config, messages, sampling, seed)
                    asked[portal.start_task_soon(_answer, client, config, request)] = index
                if not asked:
                    return
                arrived = wait(asked, return_when=FIRST_COMPLETED).done
                for future in sorted(arrived, key=lambda future: future.exception() is not None):  # answers first
                    yield asked.pop(future), future.result()
        finally:
            for future in asked:
                future.cancel()


def _key(config: ServerConfig) -> str:
    key = os.environ.get(config.api_key_variable, "").strip() or "none"
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{config.api_key_variable}: the key holds characters that no HTTP header can. Set it again.")
    return key


def _request(config: ServerConfig, messages: Sequence[Message], sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """The body of a request. Its seed has 31 bits: some servers read it as a signed number of 32."""
    turns = [(message["role"], message["content"]) for message in messages]
    digest = hashlib.sha256(json.dumps([seed, turns]).encode()).digest()
    return {
        "model": config.model,
        "messages": [{"role": role, "content": content} for role, content in turns],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "n": 1,
        "seed": int.from_bytes(digest[:4], "big") >> 1,
    }


async def _answer(client: Any, config: ServerConfig, request: dict[str, Any]) -> ServerAnswer:
    """The answer to one request, asked again while none comes: by openai after failures, here after nonsense."""
    import openai

    left = config.retries
    while True:
        try:
            completions = client.with_options(max_retries=left).chat.completions
            raw = await completions.with_raw_response.create(**request)
        except openai.APIStatusError as error:
            if error.status_code in PER_CONVERSATION_STATUSES:
                return ServerAnswer("", False, refused=_said(error))
            raise await _failure(client, config, error) from None
        except UnicodeEncodeError:
            return ServerAnswer("", False, refused="the conversation cannot be written as UTF-8")
        except Exception as error:  # whatever a network does: openai's own errors, and some that it lets through
            late = isinstance(error, openai.APITimeoutError)
            what = f"no answer within {config.timeout:g} s" if late else f"{error} {error.__cause__ or ''}".strip()
            raise RunError(f"{config.url}: {what}, in {config.retries + 1} tries. {RESUME_HINT}") from None
        text = raw.http_response.text
        if (answer := _read(text)) is not None:
            return answer
        left -= raw.retries_taken + 1
        if left < 0:
            raise RunError(
                f"{config.url}: no chat completion came, in {config.retries + 1} tries, but {text[:MAX_QUOTED_CHARACTERS]!r}. {RESUME_HINT}"
            )
        await asyncio.sleep(PAUSE_SECONDS)


def _read(text: str) -> ServerAnswer | None:
    """The answer that a response's body holds; None where it holds none."""
    try:
        choice = json.loads(text)["choices"][0]
        content, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if content is None and reason == "length":
        return ServerAnswer("", False)  # the limit cut the thinking, which some servers keep apart
    if reason == "content_filter":
        return ServerAnswer("", False, refused="the server's content filter")
    if not isinstance(content, str) or reason == "abort":  # vLLM: the request was ended, not the answer
        return None
    return ServerAnswer(content.encode(errors="replace").decode(), reason != "length")  # half a surrogate pair: "?"


async def _failure(client: Any, config: ServerConfig, error: Any) -> UserError | RunError:
    """What a status that concerns every conversation means for the user."""
    status, said = error.status_code, _said(error)
    place = f"{config.url}: HTTP {status} ({said})"
    if status in RETRYABLE_STATUSES or status >= 500:
        return RunError(f"{place}, in up to {config.retries + 1} tries. {RESUME_HINT}")
    if status in (401, 403):
        known = "is not accepted for" if os.environ.get(config.api_key_variable) else "is not set, but needed for"
        return UserError(f"{place}: the key in {config.api_key_variable} {known} the model {config.model}. Set it.")
    if status != 404:
        return UserError(f"{place}. Check url and model ({config.model}).")
    try:
        page = await client.with_options(max_retries=0, timeout=CONNECT_SECONDS).models.list()
        models = [str(model.id) for model in page.data[:20]]
    except Exception:  # a server without a list, or whatever it sends instead of one
        models = []
    found = f"The server has: {', '.join(models)}." if models else "The url of most servers ends in /v1."
    return UserError(f"{place}: no model {config.model} there. {found} Set url or model.")


def _said(error: Any) -> str:
    """The reason that a server gives for a status, shortened."""
    body = error.body
    told = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    return " ".join(str(told or body or "no reason given").split())[:REASON]
