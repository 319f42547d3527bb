"""The two programs of the inference engine: prefill of prompts, and decoding in chunks of several tokens.

Letters: S slots, R prompts, T tokens of a padded prompt, D hidden size, N query heads, K key/value heads, G = N / K,
H head width, V vocabulary, P pages, C tokens of a page, M pages of a slot, I steps of a chunk, E stop tokens.
The programs run under `jax.set_mesh` with the engine's mesh. Slots, prompts and pages are split over its data groups.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from thinkpo_jax.inference.sampling import SamplingFilters, SamplingValues, sample_tokens
from thinkpo_jax.inference.weights import InferenceWeights, LayerWeights
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.attention.dispatch import AttentionKernel, packed_attention
from thinkpo_jax.models.attention.paged import PagedKernel, append_and_attend, write_prompts
from thinkpo_jax.models.rope import apply_rope
from thinkpo_jax.models.transformer import rms_norm
from thinkpo_jax.runtime.sharding import constrain_sharding, num_shards, shard_map_by_axes, split_mesh_axes

CHUNK_STEPS = 16  # tokens that a slot gets before the host looks at the answers
MLP_BLOCK_TOKENS = 512  # of a prompt. Longer prompts have a multiple of it.
Pools = tuple[tuple[Array, Array], ...]  # keys and values of each layer, [K, P, C, H]


@dataclass(frozen=True)
class ProgramSpec:
    """What is compiled into the programs."""

    arch: Architecture
    dtype: str
    vocab_size: int  # larger token ids are never drawn
    prompt_kernel: AttentionKernel
    decode_kernel: PagedKernel


class Slots(NamedTuple):
    """The state of the slots at the start of a chunk. `tokens` are the last tokens, which are not in the cache yet."""

    tokens: Array  # [S]
    positions: Array  # [S] of these tokens
    pages: Array  # [S, M] pages of the slot, 0 where there is none
    keys: Array  # [S, 2] random keys of the answers
    generated: Array  # [S] tokens that the answer has already
    limits: Array  # [S] tokens that it may have. 0: the slot is free


# The logical axes of each array of `Slots`, in order.
SLOT_AXES: tuple[tuple[str | None, ...], ...] = (
    ("batch",), ("batch",), ("batch", None), ("batch", None), ("batch",), ("batch",),
)  # fmt: skip


@partial(jax.jit, static_argnames=("spec", "filters"), donate_argnames="pools")
def decode_chunk(
    weights: InferenceWeights,
    pools: Pools,
    slots: Slots,
    controls: tuple[SamplingValues, Array, Array],
    *,
    spec: ProgramSpec,
    filters: SamplingFilters,
) -> tuple[Array, Pools]:
    """Generates up to I tokens in each slot. Returns them as [S, I], and the pools. -1 is no token.

    `controls` are the sampling values, the stop tokens [E] and a number of slots. The chunk ends early when no more
    slots than this are active. A slot becomes inactive after a stop token and at its limit.
    """
    values, stop_ids_E, min_active = controls
    num_slots = slots.tokens.shape[0]
    keys_S = jax.random.wrap_key_data(slots.keys, impl="threefry2x32")

    def should_continue(state: tuple) -> Array:
        step, _, _, is_active_S, *_ = state
        return (step < CHUNK_STEPS) & ((step == 0) | (is_active_S.sum() > min_active))

    def decode_step(state: tuple) -> tuple:
        step, tokens_S, added_S, is_active_S, output_SI, pools = state
        hidden_SD, pools = _forward_tokens(weights, pools, tokens_S, slots.positions + added_S, slots.pages, spec)
        logits_SV = _logits(weights, hidden_SD, spec.vocab_size)
        indices_S = slots.generated + added_S
        uniform_S = jax.vmap(lambda key, index: jax.random.uniform(jax.random.fold_in(key, index)))(keys_S, indices_S)
        tokens_S = jnp.where(is_active_S, _sample(logits_SV, uniform_S, values, filters), tokens_S)
        output_SI = output_SI.at[:, step].set(jnp.where(is_active_S, tokens_S, -1))
        is_active_S = is_active_S & ~jnp.isin(tokens_S, stop_ids_E) & (indices_S + 1 < slots.limits)
        # An inactive slot keeps writing at its last position, which is not read again.
        return step + 1, tokens_S, added_S + is_active_S, is_active_S, output_SI, pools

    no_tokens = jnp.full((num_slots, CHUNK_STEPS), -1, jnp.int32)
    state = (jnp.int32(0), slots.tokens, jnp.zeros(num_slots, jnp.int32), slots.limits > 0, no_tokens, pools)
    *_, output_SI, pools = jax.lax.while_loop(should_continue, decode_step, state)
    return constrain_sharding(output_SI, (None, None)), pools


def _forward_tokens(
    weights: InferenceWeights, pools: Pools, tokens_S: Array, positions_S: Array, pages_SM: Array, spec: ProgramSpec
) -> tuple[Array, Pools]:
    """Runs one token of each slot through the layers. Returns hidden states [S, D] and the pools with the tokens."""
    arch, new_pools = spec.arch, []
    x_SD = embed_tokens(weights.embedding, tokens_S)
    for layer, (k_KPCH, v_KPCH) in zip(weights.layers, pools, strict=True):
        q_S1KGH, k_S1KH, v_S1KH = _project(layer, x_SD[:, None], positions_S[:, None], arch)
        q_SNH = q_S1KGH.reshape(len(x_SD), -1, arch.head_dim)
        out_SNH, *pool = append_and_attend(
            q_SNH, k_S1KH[:, 0], v_S1KH[:, 0], k_KPCH, v_KPCH, positions_S, pages_SM, spec.decode_kernel
        )
        new_pools.append(tuple(pool))
        x_SD = _finish_layer(layer, x_SD[:, None], out_SNH[:, None], arch)[:, 0]
    return rms_norm(x_SD, weights.final_norm, arch.norm_eps), tuple(new_pools)


def _project(layer: LayerWeights, x_BTD: Array, positions_BT: Array, arch: Architecture) -> tuple[Array, Array, Array]:
    """Returns queries [B, T, K, G, H], keys and values [B, T, K, H] with positions."""
    h_BTD = rms_norm(x_BTD, layer.attention_norm, arch.norm_eps)
    qkv = jnp.einsum("BTD,KJHD->BTKJH", h_BTD, layer.qkv)
    qkv = qkv if layer.qkv_bias is None else qkv + layer.qkv_bias
    qkv = constrain_sharding(qkv, ("batch", None, "kv_heads", None, None))
    q_BTKGH, k_BTKH, v_BTKH = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    q_BTKGH = q_BTKGH if layer.q_norm is None else rms_norm(q_BTKGH, layer.q_norm, arch.norm_eps)
    k_BTKH = k_BTKH if layer.k_norm is None else rms_norm(k_BTKH, layer.k_norm, arch.norm_eps)
    q_BTNH = apply_rope(q_BTKGH.reshape(*x_BTD.shape[:2], -1, arch.head_dim), positions_BT, arch.rope)
    return q_BTNH.reshape(q_BTKGH.shape), apply_rope(k_BTKH, positions_BT, arch.rope), v_BTKH


def _finish_layer(layer: LayerWeights, x_BTD: Array, out_BTNH: Array, arch: Architecture) -> Array:
    """Adds the outputs of attention and of the MLP to the hidden states."""
    axes = ("batch", None, "activation_embed")
    heads = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
    x_BTD = constrain_sharding(x_BTD + jnp.einsum("BTJ,DJ->BTD", heads, layer.o), axes)
    h_BTD = rms_norm(x_BTD, layer.mlp_norm, arch.norm_eps)
    gate_up = constrain_sharding(jnp.einsum("BTD,CFD->BTCF", h_BTD, layer.gate_up), ("batch", None, None, "mlp"))
    activated_BTF = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
    return constrain_sharding(x_BTD + jnp.einsum("BTF,DF->BTD", activated_BTF, layer.down), axes)


@jax.jit
def embed_tokens(table_VD: Array, tokens: Array) -> Array:
    """Returns the rows [..., D] of a table that is split over the vocabulary. Each device looks up its own rows."""
    axes = split_mesh_axes("vocab")

    def look_up(table_VD: Array, tokens: Array) -> Array:
        if not axes:
            return table_VD[tokens]
        local = tokens - jax.lax.axis_index(axes) * len(table_VD)
        is_local = (local >= 0) & (local < len(table_VD))
        rows = jnp.where(is_local[..., None], table_VD[jnp.clip(local, 0, len(table_VD) - 1)], 0)
        return jax.lax.psum(rows, axes)

    token_axes = ("batch", *(None,) * (tokens.ndim - 1))
    return shard_map_by_axes(look_up, (("vocab", None), token_axes), (*token_axes, None))(table_VD, tokens)


def _logits(weights: InferenceWeights, hidden_SD: Array, vocab_size: int) -> Array:
    """Returns logits in float32 [S, V]. They are -inf for rows of the table that belong to no token."""
    head_VD = weights.embedding if weights.head is None else weights.head
    logits_SV = jnp.einsum("SD,VD->SV", hidden_SD, head_VD, preferred_element_type=jnp.float32)
    # Without this constraint, XLA gathers the weights of the head.
    logits_SV = constrain_sharding(logits_SV, ("batch", "vocab"))
    return jnp.where(jnp.arange(len(head_VD)) < vocab_size, logits_SV, -jnp.inf)


def _sample(logits_SV: Array, uniform_S: Array, values: SamplingValues, filters: SamplingFilters) -> Array:
    """Returns a token of each slot [S]. Each device of a group draws those of some slots, if their number allows it."""
    rows = "sampled_slots" if len(logits_SV) % num_shards("sampled_slots") == 0 else "batch"
    sample = shard_map_by_axes(partial(sample_tokens, filters=filters), ((rows, None), (rows,), ()), (rows,))
    return constrain_sharding(sample(logits_SV, uniform_S, values), ("batch",))


@partial(jax.jit, static_argnames=("spec", "is_last"), donate_argnames=("x_RTD", "pool"))
def prefill_layer(
    layer: LayerWeights,
    x_RTD: Array,
    rows: TokenPositions,
    pool: tuple[Array, Array],
    pages_RM: Array,
    *,
    spec: ProgramSpec,
    is_last: bool,
) -> tuple[Array, tuple[Array, Array]]:
    """Runs prompts through one layer, and writes its keys and values into the pages. The last layer has no output.

    One layer is one program, so a new length of prompts compiles quickly.
    """
    q_RTKGH, k_RTKH, v_RTKH = _project(layer, x_RTD, rows.positions, spec.arch)
    k_KPCH, v_KPCH = write_prompts(*pool, k_RTKH, v_RTKH, pages_RM, spec.decode_kernel)
    if not is_last:
        q_RTNH = q_RTKGH.reshape(*x_RTD.shape[:2], -1, spec.arch.head_dim)
        out_RTNH = packed_attention(q_RTNH, k_RTKH, v_RTKH, rows, spec.prompt_kernel)
        x_RTD = _finish_prompts(layer, x_RTD, out_RTNH, spec.arch)
    return x_RTD, (k_KPCH, v_KPCH)


def _finish_prompts(layer: LayerWeights, x_RTD: Array, out_RTNH: Array, arch: Architecture) -> Array:
    """Runs `_finish_layer` on blocks of tokens, so that a long prompt does not need the whole MLP at once."""
    length = x_RTD.shape[1]
    if length <= MLP_BLOCK_TOKENS or length % MLP_BLOCK_TOKENS:
        return _finish_layer(layer, x_RTD, out_RTNH, arch)

    def finish(index: Array) -> Array:
        x_RCD, out_RCNH = (jax.lax.dynamic_slice_in_dim(x, index, MLP_BLOCK_TOKENS, axis=1) for x in (x_RTD, out_RTNH))
        return _finish_layer(layer, x_RCD, out_RCNH, arch)

    blocks_XRTD = jax.lax.map(finish, jnp.arange(0, length, MLP_BLOCK_TOKENS))
    return jnp.moveaxis(blocks_XRTD, 0, 1).reshape(x_RTD.shape)


def prefill(
    weights: InferenceWeights, pools: Pools, tokens_RT: Array, lengths_R: Array, pages_RM: Array, *, spec: ProgramSpec
) -> Pools:
    """Runs prompts through the model and returns the pools with their keys and values. T is a multiple of C."""
    rows = _prompt_rows(lengths_R, tokens_RT)
    x_RTD = embed_tokens(weights.embedding, tokens_RT)
    new_pools = []
    for index, (layer, pool) in enumerate(zip(weights.layers, pools, strict=True)):
        is_last = index == len(pools) - 1
        x_RTD, pool = prefill_layer(layer, x_RTD, rows, pool, pages_RM, spec=spec, is_last=is_last)
        new_pools.append(pool)
    return tuple(new_pools)


@jax.jit
def _prompt_rows(lengths_R: Array, tokens_RT: Array) -> TokenPositions:
    positions_RT = jnp.broadcast_to(jnp.arange(tokens_RT.shape[1]), tokens_RT.shape)
    return TokenPositions((positions_RT < lengths_R[:, None]).astype(jnp.int32), positions_RT, lengths_R[:, None])
