"""What is the network? Qwen2 / Qwen2.5, Qwen3 and Llama decoders: one file, the families differ by data.

Letters: B batch, T length, D embed, N query heads, K key/value heads, H head width, F mlp, V vocabulary, L layers,
S slots of a key/value cache. Parameters are kept in float32 and cast to the compute dtype where they are used. The
layers are stacked along a leading axis L and scanned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.dense import TokenPositions, dense_attention
from thinkpo_jax.models.attention.dispatch import AttentionKernel, packed_attention
from thinkpo_jax.models.compute_config import (
    LAYER_INPUT,
    MLP_PROJECTION_OUTPUT,
    PROJECTION_OUTPUT,
    ComputeConfig,
    remat_policy,
)
from thinkpo_jax.models.layers import linear, rms_norm
from thinkpo_jax.models.rope import apply_rope
from thinkpo_jax.runtime.context_parallel import to_zigzag_order
from thinkpo_jax.runtime.sharding import constrain_sharding


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, in S slots, and where they stand. `cursor` is the next free slot."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    positions: TokenPositions
    next_slot: jax.Array


class DecoderLayers(nnx.Module):
    """All L layers, each parameter with a leading axis L. Called on the slice of one layer, inside a scan."""

    def __init__(self, arch: Architecture, attention: AttentionKernel, key: jax.Array) -> None:
        L, D, N, K, H, F = (
            arch.num_layers,
            arch.hidden_size,
            arch.num_heads,
            arch.num_kv_heads,
            arch.head_dim,
            arch.mlp_size,
        )
        keys = iter(jax.random.split(key, 7))

        def weight(*shape_and_axes: tuple[int, str]) -> nnx.Param:
            shape = (L, *(size for size, _ in shape_and_axes))
            value = jax.random.normal(next(keys), shape) * arch.init_std
            return nnx.Param(value, axes=("layers", *(axis for _, axis in shape_and_axes)))

        def bias(heads: int, axis: str) -> nnx.Param | None:
            return nnx.Param(jnp.zeros((L, heads, H)), axes=("layers", axis, "head_dim")) if arch.qkv_bias else None

        def head_norm() -> nnx.Param | None:
            return nnx.Param(jnp.ones((L, H)), axes=("layers", "head_dim")) if arch.qk_norm else None

        self.arch = arch
        self.attention: AttentionKernel = attention
        self.attention_norm = nnx.Param(jnp.ones((L, D)), axes=("layers", "norm"))
        self.q = weight((D, "embed"), (N, "heads"), (H, "head_dim"))
        self.k = weight((D, "embed"), (K, "kv_heads"), (H, "head_dim"))
        self.v = weight((D, "embed"), (K, "kv_heads"), (H, "head_dim"))
        self.q_bias = nnx.data(bias(N, "heads"))
        self.k_bias = nnx.data(bias(K, "kv_heads"))
        self.v_bias = nnx.data(bias(K, "kv_heads"))
        self.q_norm = nnx.data(head_norm())
        self.k_norm = nnx.data(head_norm())
        self.o = weight((N, "heads"), (H, "head_dim"), (D, "embed"))
        self.mlp_norm = nnx.Param(jnp.ones((L, D)), axes=("layers", "norm"))
        self.gate = weight((D, "embed"), (F, "mlp"))
        self.up = weight((D, "embed"), (F, "mlp"))
        self.down = weight((F, "mlp"), (D, "embed"))

    def __call__(  # noqa: D102 -- the class says it
        self, x_BTD: jax.Array, places: TokenPositions, keys: TokenPositions, cached: tuple[jax.Array, ...] | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        h_BTD = rms_norm(x_BTD, self.attention_norm, self.arch.norm_eps)
        attended_BTD, cached = self._attention(h_BTD, places, keys, cached)
        axes = ("batch", _length(cached), "activation_embed")
        x_BTD = constrain_sharding(x_BTD + attended_BTD, axes)
        h_BTD = rms_norm(x_BTD, self.mlp_norm, self.arch.norm_eps)
        dtype = x_BTD.dtype
        gate_BTF, up_BTF = (
            checkpoint_name(linear(h_BTD, weight[...].astype(dtype)), MLP_PROJECTION_OUTPUT)
            for weight in (self.gate, self.up)
        )
        x_BTD = x_BTD + linear(jax.nn.silu(gate_BTF) * up_BTF, self.down[...].astype(dtype))
        return constrain_sharding(x_BTD, axes), cached

    def _attention(
        self, x_BTD: jax.Array, places: TokenPositions, keys: TokenPositions, cached: tuple[jax.Array, ...] | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
        dtype, arch = x_BTD.dtype, self.arch

        def heads_of(weight: nnx.Param, bias: nnx.Param | None) -> jax.Array:
            out = checkpoint_name(jnp.einsum("BTD,DNH->BTNH", x_BTD, weight[...].astype(dtype)), PROJECTION_OUTPUT)
            out = out if bias is None else out + bias[...].astype(dtype)[None, None]
            return constrain_sharding(out, ("batch", _length(cached), "activation_heads", "head_dim"))

        def placed(x_BTNH: jax.Array, norm: nnx.Param | None) -> jax.Array:
            x_BTNH = x_BTNH if norm is None else rms_norm(x_BTNH, norm, arch.norm_eps)
            return apply_rope(x_BTNH, places.positions, arch.rope)

        q_BTNH = placed(heads_of(self.q, self.q_bias), self.q_norm)
        k_BTKH = placed(heads_of(self.k, self.k_bias), self.k_norm)
        v_BTKH = heads_of(self.v, self.v_bias)
        if cached is None:
            out_BTNH = packed_attention(q_BTNH, k_BTKH, v_BTKH, keys, self.attention)
        else:
            k_BSKH, v_BSKH, cursor = cached
            k_BSKH = jax.lax.dynamic_update_slice(k_BSKH, k_BTKH, (0, cursor, 0, 0))
            v_BSKH = jax.lax.dynamic_update_slice(v_BSKH, v_BTKH, (0, cursor, 0, 0))
            out_BTNH = dense_attention(q_BTNH, k_BSKH, v_BSKH, places, keys)
            cached = k_BSKH, v_BSKH
        out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, self.o[...].astype(dtype))
        return checkpoint_name(out_BTD, PROJECTION_OUTPUT), cached


class Transformer(nnx.Module):
    """A decoder up to its last norm; `head()` gives the matrix that turns hidden states into logits."""

    def __init__(self, arch: Architecture, compute: ComputeConfig, key: jax.Array) -> None:
        key_embedding, key_head, key_blocks = jax.random.split(key, 3)
        V, D = arch.vocab_size, arch.hidden_size
        self.arch = arch
        self.compute = compute
        self.embedding = nnx.Param(jax.random.normal(key_embedding, (V, D)) * arch.init_std, axes=("vocab", "embed"))
        self.blocks = DecoderLayers(arch, compute.attention, key_blocks)
        self.final_norm = nnx.Param(jnp.ones((D,)), axes=("norm",))
        head = None if arch.tied_head else jax.random.normal(key_head, (D, V)) * arch.init_std
        self.untied_head = nnx.data(None if head is None else nnx.Param(head, axes=("embed", "vocab")))

    def __call__(
        self, tokens_BT: jax.Array, places: TokenPositions, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states [B, T, D] in the compute dtype, and the cache with these tokens in it (if one was given).

        Without a cache the rows are packed rows, and hidden states come in the order of `sharding.balanced`.
        """
        dtype, keys = jnp.dtype(self.compute.dtype), places
        if cache is None:
            tokens_BT, places = (
                to_zigzag_order(tokens_BT),
                TokenPositions(to_zigzag_order(places.segment_ids), to_zigzag_order(places.positions)),
            )
        else:
            keys = TokenPositions(*(jax.lax.dynamic_update_slice(old, new, (0, cache.next_slot))
                            for old, new in zip(cache.positions[:2], places[:2], strict=True)))  # fmt: skip
            cache = cache._replace(positions=keys)
        # Gathered before the look-up: XLA would otherwise rematerialise the whole table for each use.
        table_VD = constrain_sharding(self.embedding[...].astype(dtype), (None, None))
        x_BTD = constrain_sharding(table_VD[tokens_BT], ("batch", _length(cache), "activation_embed"))

        def layer(x_BTD: jax.Array, xs: tuple) -> tuple:
            block, cached = xs
            return block(x_BTD, places, keys, None if cache is None else (*cached, cache.next_slot))

        if self.compute.remat != "none":
            layer = jax.checkpoint(layer, policy=remat_policy(self.compute.remat))
        x_BTD, cached = jax.lax.scan(layer, x_BTD, (self.blocks, cache and (cache.k_LBSKH, cache.v_LBSKH)))
        if cache is not None:
            cache = cache._replace(k_LBSKH=cached[0], v_LBSKH=cached[1], next_slot=cache.next_slot + tokens_BT.shape[1])
        return rms_norm(x_BTD, self.final_norm, self.arch.norm_eps), cache

    def lm_head(self) -> jax.Array:
        """[D, V] in the compute dtype: logits = hidden @ head. The embedding's transpose where the head is tied."""
        head_DV = self.embedding[...].T if self.untied_head is None else self.untied_head[...]
        return head_DV.astype(self.compute.dtype)

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """A cache of `slots` tokens for each of `batch` rows, nothing in it."""
        shape = (self.arch.num_layers, batch, slots, self.arch.num_kv_heads, self.arch.head_dim)
        zeros = jnp.zeros(shape, self.compute.dtype)
        nowhere = jnp.zeros((batch, slots), jnp.int32)
        return KVCache(zeros, zeros, TokenPositions(nowhere, nowhere), jnp.zeros((), jnp.int32))


def _length(cache: tuple | None) -> str | None:
    """The axis of a row's tokens: what a cache gets is a token at a time, and is not split."""
    return "length" if cache is None else None
