"""What both engines take and give: requests with sampling parameters, and completions."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import pydantic

from thinkpo_jax.data.chat_template import Message
from thinkpo_jax.runtime.config import ConfigSection

MIN_TEMPERATURE = 1e-3  # Divided by less, logits could overflow.


class SamplingConfig(ConfigSection):
    """How tokens are drawn. Temperature 0 is greedy. `samples` is per question.

    `top_k`, `top_p` (arXiv 1904.09751) and `min_p` (arXiv 2407.01082) leave out improbable tokens, in this order. An
    answer ends at a stop token of the model or before one of the texts in `stop`. `max_new_tokens` counts the stop
    token too.
    """

    temperature: float = pydantic.Field(default=0.7, ge=0, le=100, allow_inf_nan=False)
    top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
    top_k: int | None = pydantic.Field(default=None, ge=1)
    min_p: float = pydantic.Field(default=0.0, ge=0, lt=1)
    max_new_tokens: int = pydantic.Field(default=1024, ge=1)
    samples: int = pydantic.Field(default=1, ge=1)
    stop: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _reject_keys_without_effect(self) -> "SamplingConfig":
        if self.temperature == 0 and (self.samples > 1 or self.top_p < 1 or self.top_k is not None or self.min_p > 0):
            raise ValueError(
                "temperature 0 is greedy: `samples`, `top_p`, `top_k` and `min_p` have no effect. Remove them"
            )
        return self

    @pydantic.field_validator("temperature")
    @classmethod
    def _check_temperature(cls, temperature: float) -> float:
        if 0 < temperature < MIN_TEMPERATURE:
            raise ValueError(f"expected 0 (greedy) or at least {MIN_TEMPERATURE}")
        return temperature

    @pydantic.field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("a stop string is empty, and every text holds it. Remove it")
        return stop


@dataclass(frozen=True)
class Request:
    """A conversation to answer. `key` names its completion. Several samples of a conversation differ in `sample`.

    `max_new_tokens`, at least 1, may lower the limit of the sampling parameters.
    """

    key: str
    messages: Sequence[Message]
    sample: int = 0
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Completion:
    """A model's answer to one request. The text ends before the stop token or the stop string.

    `num_tokens` counts the tokens without the stop token. The local engine also gives them as `token_ids`, which may
    hold a stop string. The `finish_reason` is "length" if a limit
    cut the answer. With an `error` there is no answer, and the other fields mean nothing.
    """

    text: str = ""
    num_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "stop"
    error: str | None = None
    token_ids: Sequence[int] = ()


class Engine(Protocol):
    """Generates completions. With several processes, all of them call it with the same requests."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, seed: int
    ) -> Generator[tuple[str, Completion], None, None]:
        """Yields the key and the completion of each request as they finish. Each key occurs once.

        A completion depends only on the seed, the conversation and the sample number. Closing the generator stops the
        other requests.
        """
        ...
