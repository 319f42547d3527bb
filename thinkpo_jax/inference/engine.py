"""Generates completions with the local model: batches of prompts, a KV cache and one jitted decoding loop.

Shape letters: B batch, T prompt length, D hidden size, V vocabulary, G generated tokens, W words of a random key.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import Mesh

from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import ConfigSection
from thinkpo_jax.runtime.integers import round_up
from thinkpo_jax.runtime.mesh import num_data_shards
from thinkpo_jax.runtime.sharding import constrain_sharding, put_on_mesh


class SamplingConfig(ConfigSection):
    """Temperature 0 is greedy. `samples` is per question. The local model runs `batch_size` prompts at once."""

    temperature: float = pydantic.Field(default=0.7, ge=0)
    top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = pydantic.Field(default=1024, ge=1)
    samples: int = pydantic.Field(default=1, ge=1)
    batch_size: int = pydantic.Field(default=64, ge=1)

    @pydantic.model_validator(mode="after")
    def _reject_keys_without_effect(self) -> "SamplingConfig":
        if self.temperature == 0 and (self.samples > 1 or self.top_p < 1):
            raise ValueError("temperature 0 is greedy: `samples` above 1 and `top_p` below 1 have no effect")
        return self


@dataclass(frozen=True)
class Completion:
    """A model's answer to one prompt.

    The local model gives `token_ids` without the stop token. Whoever has the tokenizer decodes them to `text`. A server
    gives only `text`. The `finish_reason` is "length" if the token limit cut the answer. With an `error` there is no
    answer, and the other fields mean nothing.
    """

    token_ids: Sequence[int] = ()
    text: str = ""
    finish_reason: Literal["stop", "length"] = "stop"
    error: str | None = None


PROMPT_MULTIPLE = 64  # prompts are padded to a multiple of this, so that few shapes are compiled
_Options = tuple[SamplingConfig, int, tuple[int, ...]]  # configuration, vocab_size, stop_token_ids


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    stop_token_ids: Sequence[int],
    vocab_size: int,
    seed: int,
    mesh: Mesh,
    on_progress: Callable[[int], object] | None = None,
) -> list[Completion]:
    """Returns the completion of each prompt, in the order of the prompts. Their `text` is empty.

    The random numbers of a prompt depend only on the seed and on its index, not on its batch. Padding rows of the
    embedding (index >= `vocab_size`) are never sampled. After each batch, `on_progress` gets the number of finished
    prompts.
    """
    options, num_shards = (config, vocab_size, tuple(stop_token_ids)), num_data_shards(mesh)
    batch_size = round_up(config.batch_size, num_shards)
    completions: dict[int, Completion] = {}
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(len(prompts)))
    keys = np.asarray(jax.random.key_data(keys))
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), batch_size):
        indices = by_length[start : start + batch_size]
        padded = indices + indices[:1] * (batch_size - len(indices))
        lengths_B = np.array([len(prompts[i]) for i in padded], np.int32)
        padded_length = round_up(int(lengths_B.max()), PROMPT_MULTIPLE)
        tokens_BT = np.zeros((batch_size, padded_length), np.int32)
        for row, i in zip(tokens_BT, padded, strict=True):
            row[row.size - len(prompts[i]) :] = prompts[i]
        arrays = [put_on_mesh(array, ("batch",), mesh) for array in (tokens_BT, lengths_B, keys[padded])]
        ids_BG, counts_B, is_stopped_B = jax.device_get(_generate_batch(model, *arrays, options))
        for i, ids, count, is_stopped in zip(indices, ids_BG, counts_B, is_stopped_B, strict=False):
            completions[i] = Completion(ids[:count].tolist(), finish_reason="stop" if is_stopped else "length")
        if on_progress is not None:
            on_progress(len(completions))
    return [completions[i] for i in range(len(prompts))]


@functools.partial(jax.jit, static_argnames="options")
def _generate_batch(
    model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, keys_BW: jax.Array, options: _Options
) -> tuple[jax.Array, ...]:
    """Returns ids [B, G], how many of them belong to the answer [B] and whether a stop token ended it [B].

    The prompts are padded on the left. The results are replicated on every device.
    """
    config, vocab_size, stop_token_ids = options
    limit = config.max_new_tokens
    batch, length = tokens_BT.shape
    positions_BT = jnp.arange(length)[None] - (length - lengths_B)[:, None]
    prompt_positions = TokenPositions((positions_BT >= 0).astype(jnp.int32), jnp.maximum(positions_BT, 0))
    is_stop_token = functools.partial(jnp.isin, test_elements=jnp.array(stop_token_ids, jnp.int32))
    head_DV, keys_B = model.lm_head()[:, :vocab_size], jax.random.wrap_key_data(keys_BW)

    def sample_token(hidden_BD: jax.Array, step: jax.Array) -> jax.Array:
        logits_BV = jnp.dot(hidden_BD, head_DV, preferred_element_type=jnp.float32)
        if config.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1)
        logits_BV = _filter_top_p(logits_BV / config.temperature, config.top_p)
        step_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
        return jax.vmap(jax.random.categorical)(step_keys_B, logits_BV)

    def should_continue(state: tuple) -> jax.Array:
        step, _, is_stopped_B, *_ = state
        return (step < limit) & ~is_stopped_B.all()

    def decode_step(state: tuple) -> tuple:
        step, ids_B, is_stopped_B, counts_B, output_BG, cache = state
        output_BG = jax.lax.dynamic_update_slice(output_BG, ids_B[:, None].astype(jnp.int32), (0, step))
        counts_B = counts_B + jnp.where(is_stopped_B, 0, 1)
        positions = TokenPositions(jnp.ones((batch, 1), jnp.int32), (lengths_B + step)[:, None])
        hidden_BTD, cache = model(ids_B[:, None], positions, cache)
        ids_B = sample_token(hidden_BTD[:, -1], step + 1)
        # The limit counts the stop token too, as in Hugging Face and in the servers.
        is_stopped_B = is_stopped_B | (is_stop_token(ids_B) & (step + 1 < limit))
        return step + 1, ids_B, is_stopped_B, counts_B, output_BG, cache

    hidden_BTD, cache = model(tokens_BT, prompt_positions, model.init_cache(batch, length + limit))
    first_step = jnp.zeros((), jnp.int32)
    ids_B = sample_token(hidden_BTD[:, -1], first_step)
    state = (first_step, ids_B, is_stop_token(ids_B), jnp.zeros(batch, jnp.int32), jnp.zeros((batch, limit), jnp.int32))
    _, _, is_stopped_B, counts_B, output_BG, _ = jax.lax.while_loop(should_continue, decode_step, (*state, cache))
    return tuple(constrain_sharding(array, (None,) * array.ndim) for array in (output_BG, counts_B, is_stopped_B))


def _filter_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Sets logits to -inf, except for the most probable tokens that together reach `top_p` (arXiv 1904.09751)."""
    if top_p == 1.0:
        return logits_BV
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
    threshold_B1 = jnp.where(before_BV < top_p, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
