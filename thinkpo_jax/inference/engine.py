"""How are answers generated? Batches of prompts through a key/value cache, in one jitted loop.

Letters: B batch, T prompt length, V vocabulary, G generated tokens.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from thinkpo_jax.inference.sampling import SamplingConfig, filter_top_p
from thinkpo_jax.models.attention.dense import TokenPositions
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.mesh import num_data_shards
from thinkpo_jax.runtime.sharding import constrain_sharding, put_on_mesh

PROMPT_MULTIPLE = 64  # prompts are padded to a multiple of this, so that few shapes are compiled


@dataclass(frozen=True)
class Completion:
    """Generated ids without the one that ended them; `finished` is False where the length limit cut them."""

    ids: list[int]
    finished: bool


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
    """One generation for each prompt, in their order.

    The random numbers of a prompt depend on the seed and its index alone, not on the batch it falls into. Ids from
    `vocabulary` on (rows of the embedding that no token of the tokenizer has) are never drawn.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows = -(-config.batch_size // num_data_shards(mesh)) * num_data_shards(mesh)
    results: list[Completion] = [Completion([], False)] * len(prompts)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(len(prompts)))
    keys = np.asarray(jax.random.key_data(keys))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        filled = chosen + chosen[:1] * (rows - len(chosen))
        length = -(-max(len(prompts[i]) for i in chosen) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        tokens_BT = np.zeros((rows, length), np.int32)
        for row, i in enumerate(filled):
            tokens_BT[row, length - len(prompts[i]) :] = prompts[i]
        lengths_B = np.array([len(prompts[i]) for i in filled], np.int32)
        settings = (config.max_new_tokens, config.temperature, config.top_p, vocab_size, tuple(stop_token_ids))
        ids_BG, counts_B, done_B = jax.device_get(
            _generate(
                model,
                *(put_on_mesh(array, ("batch",), mesh) for array in (tokens_BT, lengths_B, keys[filled])),
                settings,
            )
        )
        for row, i in enumerate(chosen):
            results[i] = Completion(ids_BG[row, : counts_B[row]].tolist(), bool(done_B[row]))
        if on_progress is not None:
            on_progress(min(start + rows, len(order)))
    return results


@functools.partial(jax.jit, static_argnums=4)
def _generate(
    model: Transformer,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    keys_BW: jax.Array,
    settings: tuple[int, float, float, int, tuple[int, ...]],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids [B, G], how many of them count [B], and whether a stop id ended them [B], whole on every device."""
    limit, temperature, top_p, vocabulary, stop_ids = settings
    batch, length = tokens_BT.shape
    positions_BT = jnp.arange(length)[None] - (length - lengths_B)[:, None]
    places = TokenPositions((positions_BT >= 0).astype(jnp.int32), jnp.maximum(positions_BT, 0))
    head_DV, keys_B = model.lm_head()[:, :vocabulary], jax.random.wrap_key_data(keys_BW)

    def draw(hidden_BD: jax.Array, count: jax.Array) -> jax.Array:
        logits_BV = jnp.dot(hidden_BD, head_DV, preferred_element_type=jnp.float32)
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1)
        logits_BV = filter_top_p(logits_BV / temperature, top_p)
        step_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, count))(keys_B)
        return jax.vmap(jax.random.categorical)(step_keys_B, logits_BV)

    def stops(ids_B: jax.Array) -> jax.Array:
        return (ids_B[:, None] == jnp.array(stop_ids, jnp.int32)[None]).any(axis=-1)

    def body(carry: tuple) -> tuple:
        count, ids_B, done_B, counts_B, out_BG, cache = carry
        out_BG = jax.lax.dynamic_update_slice(out_BG, ids_B[:, None].astype(jnp.int32), (0, count))
        counts_B = counts_B + jnp.where(done_B, 0, 1)
        here = TokenPositions(jnp.ones((batch, 1), jnp.int32), (lengths_B + count)[:, None])
        hidden_BTD, cache = model(ids_B[:, None], here, cache)
        ids_B = draw(hidden_BTD[:, -1], count + 1)
        # The limit counts the stop id too, as Hugging Face and the servers do.
        done_B = done_B | (stops(ids_B) & (count + 1 < limit))
        return count + 1, ids_B, done_B, counts_B, out_BG, cache

    def going_on(carry: tuple) -> jax.Array:
        return (carry[0] < limit) & ~carry[2].all()

    hidden_BTD, cache = model(tokens_BT, places, model.init_cache(batch, length + limit))
    ids_B = draw(hidden_BTD[:, -1], jnp.zeros((), jnp.int32))
    start = (jnp.zeros((), jnp.int32), ids_B, stops(ids_B), jnp.zeros(batch, jnp.int32))
    _, _, done_B, counts_B, out_BG, _ = jax.lax.while_loop(
        going_on, body, (*start, jnp.zeros((batch, limit), jnp.int32), cache)
    )
    return (
        constrain_sharding(out_BG, (None, None)),
        constrain_sharding(counts_B, (None,)),
        constrain_sharding(done_B, (None,)),
    )
