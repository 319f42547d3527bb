"""Generates completions with a model on the devices of this run."""

import functools
import hashlib
import json
from collections.abc import Generator, Sequence
from typing import Any

import jax
import pydantic

from thinkpo_jax.data.chat_template import Message
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig
from thinkpo_jax.inference.inference_model import InferenceModel, load_inference_model
from thinkpo_jax.inference.scheduler import Answer
from thinkpo_jax.inference.token_generation import StopConditions, generate_tokens
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.runtime.config import ConfigSection, UserError
from thinkpo_jax.runtime.console import log_warning


class LocalEngineConfig(ConfigSection):
    """`slots` answers are generated at the same time, at least 8 in each group of devices.

    Their KV cache takes at most `cache_memory` GiB of each device. By default it takes most of what the weights leave
    of an accelerator, or a quarter of the memory of a CPU machine.
    """

    slots: int = pydantic.Field(default=64, ge=1, le=1024)
    cache_memory: float | None = pydantic.Field(default=None, gt=0, le=10_000)


class LocalEngine:
    """Implements `Engine`. Answers with `model`, or else loads the model when the first answer is needed."""

    def __init__(
        self,
        source: ModelSource,
        compute: ComputeConfig,
        config: LocalEngineConfig,
        devices: Sequence[Any] | None = None,
        model: InferenceModel | None = None,
    ) -> None:
        self._source, self._compute, self._config, self._devices = source, compute, config, devices
        self._model = model
        self._last_prompt: tuple[Sequence[Message], list[int]] | None = None

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, seed: int
    ) -> Generator[tuple[str, Completion], None, None]:
        """Implements `Engine.generate`.

        These give a completion with an error: a prompt that cannot be encoded or leaves no room for an answer, and an
        answer that fills the whole cache. An answer that reaches the context of the model is cut, and counted in a
        warning.
        """
        prompts: dict[str, list[int]] = {}
        context = self._source.architecture.max_positions
        for request in requests:
            try:
                prompt = self._encode(request.messages)
            except UserError as error:
                yield request.key, Completion(error=str(error))
                continue
            if len(prompt) < context:
                prompts[request.key] = prompt
            else:
                yield request.key, Completion(error=_too_long_prompt(len(prompt), _context_limit(context)))
        if not prompts:
            return
        model, tokenizer = self._load(), self._source.tokenizer
        answers: list[Answer] = []
        shortened_keys: set[str] = set()  # of answers that may not reach their own limit
        for request in requests:
            if (prompt := prompts.get(request.key)) is None:
                continue
            limit = min(sampling.max_new_tokens, request.max_new_tokens or sampling.max_new_tokens)
            room = model.max_context - len(prompt)
            if room < 1:
                yield request.key, Completion(error=_too_long_prompt(len(prompt), _cache_limit(model)))
                continue
            if room < limit:
                shortened_keys.add(request.key)
            key = random_key(prompt, request.sample, seed)
            answers.append(Answer(request.key, prompt, key, min(limit, room)))
        find_stop = functools.partial(find_stop_string, tokenizer, sampling.stop) if sampling.stop else None
        stop = StopConditions(tokenizer.stop_token_ids, find_stop)
        num_cut = 0
        for answer, reason in generate_tokens(model, answers, sampling, num_slots=self._config.slots, stop=stop):
            is_cut = reason == "length" and answer.key in shortened_keys
            if is_cut and model.max_context < context:
                yield answer.key, Completion(error=f"the answer was cut: {_cache_limit(model)}")
                continue
            num_cut += is_cut
            text, num_tokens = tokenizer.decode(answer.generated), len(answer.generated)
            text = text[: _first_stop(text, sampling.stop)]
            yield answer.key, Completion(text, num_tokens, reason, token_ids=answer.generated)
        if num_cut:
            log_warning(f"{num_cut} answer(s) were cut before max_new_tokens: {_context_limit(context)}")

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a prompt. The samples of a question share its messages, which are encoded once."""
        if self._last_prompt is None or self._last_prompt[0] is not messages:
            self._last_prompt = messages, self._source.tokenizer.encode_prompt(messages).ids
        return self._last_prompt[1]

    def _load(self) -> InferenceModel:
        if self._model is None:
            devices = default_devices() if self._devices is None else self._devices
            self._model = load_inference_model(
                self._source, self._compute, devices=devices, cache_memory=self._config.cache_memory
            )
        return self._model


def default_devices() -> list[Any]:
    """Returns all devices, but only one CPU device of each process, because those share memory and cores."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return devices
    return list({device.process_index: device for device in reversed(devices)}.values())[::-1]


def random_key(prompt: Sequence[int], sample: int, seed: int) -> tuple[int, int]:
    """Returns the random key of an answer: two numbers of 32 bits. It depends on nothing else."""
    digest = hashlib.sha256(json.dumps([seed, list(prompt), sample]).encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def find_stop_string(tokenizer: ChatTokenizer, stop: Sequence[str], ids: Sequence[int], num_new: int) -> int | None:
    """Returns how many of the tokens `ids` it takes to produce a stop string, or None. The last `num_new` are new.

    A character has at most four tokens. So the text of the last tokens shows whether there is a new stop string.
    """
    window = num_new + 4 * max(map(len, stop)) + 4
    if _first_stop(tokenizer.decode(ids[-window:]), stop) is None:
        return None
    first = max(1, len(ids) - num_new)
    return next(
        (end for end in range(first, len(ids) + 1) if _first_stop(tokenizer.decode(ids[:end]), stop) is not None), None
    )


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Returns where the first stop string begins, or None."""
    return min((at for string in stop if (at := text.find(string)) >= 0), default=None)


def _too_long_prompt(length: int, reason: str) -> str:
    return f"the prompt has {length} tokens and leaves no room for an answer: {reason}"


def _context_limit(context: int) -> str:
    return f"the context of the model has {context} tokens (max_position_embeddings)."


def _cache_limit(model: InferenceModel) -> str:
    return f"the KV cache holds {model.max_context} tokens of prompt and answer. Increase local.cache_memory."
