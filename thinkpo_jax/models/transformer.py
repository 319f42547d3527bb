"""The decoder of Qwen2, Qwen2.5, Qwen3 and Llama. The families differ only in their `Architecture`.

Letters: B batch, T tokens, D hidden size, N query heads, K key/value heads, H head width. F is the MLP size, V the
vocabulary size, and L the number of layers.
Parameters are float32. They are cast to the compute dtype where they are used. A scan runs over the layers, which are
stacked along a leading axis L.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import checkpoint_policies as policies
from jax.ad_checkpoint import checkpoint_name

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.blockwise import ATTENTION_OUTPUT, TokenPositions
from thinkpo_jax.models.attention.dispatch import AttentionKernel, packed_attention
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.rope import apply_rope
from thinkpo_jax.runtime.context_parallel import to_zigzag_order
from thinkpo_jax.runtime.sharding import constrain_sharding

# Names in remat policies: the input of a layer, the outputs of q, k, v and o, and those of gate and up.
LAYER_INPUT, PROJECTION_OUTPUT, MLP_PROJECTION_OUTPUT = "input", "projected", "gated"
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "projections": policies.save_only_these_names(PROJECTION_OUTPUT, MLP_PROJECTION_OUTPUT, ATTENTION_OUTPUT),
    "attention": policies.save_only_these_names(ATTENTION_OUTPUT),
    "full": policies.save_only_these_names(),
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT, PROJECTION_OUTPUT, ATTENTION_OUTPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@jax.custom_vjp
def linear(x_BTI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """Returns x @ weight, [B, T, O]. The gradient of the weight transposes the narrower of its two factors.

    Autodiff always transposes the gradient of the output. XLA on CPU does that inside the loop of the product. For the
    wide activations of the MLP the transpose then takes longer than the product.
    """
    return x_BTI @ weight_IO


def _linear_backward(residuals: tuple[jax.Array, jax.Array], dout_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTI, weight_IO = residuals
    if weight_IO.shape[0] <= weight_IO.shape[1]:
        dweight_IO = jnp.einsum("BTI,BTO->IO", x_BTI, dout_BTO)
    else:
        dweight_IO = jnp.einsum("BTO,BTI->OI", dout_BTO, x_BTI).T
    return jnp.einsum("BTO,IO->BTI", dout_BTO, weight_IO), dweight_IO


linear.defvjp(lambda x_BTI, weight_IO: (x_BTI @ weight_IO, (x_BTI, weight_IO)), _linear_backward)


def rms_norm(x: jax.Array, weight: nnx.Param | jax.Array, eps: float) -> jax.Array:
    """Returns x / rms(x) * weight over the last axis, computed in float32, in the dtype of x.

    The forward pass saves x and one number per vector. Autodiff would save every intermediate product.
    """
    return _rms_norm(x, weight[...], eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return _rms_norm_forward(x, weight, eps)[0]


def _rms_norm_forward(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * jnp.expand_dims(weight, tuple(range(x.ndim - 1)))).astype(x.dtype), (x, scale, weight)


def _rms_norm_backward(_eps: float, residuals: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, weight = residuals
    leading_axes = tuple(range(x.ndim - 1))
    normed, dout = x.astype(jnp.float32) * scale, dout.astype(jnp.float32)
    product = dout * normed
    weight = jnp.expand_dims(weight, leading_axes)
    dx = scale * (dout * weight - normed * jnp.mean(product * weight, axis=-1, keepdims=True))
    return dx.astype(x.dtype), product.sum(axis=leading_axes)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class DecoderLayers(nnx.Module):
    """All L layers. Each parameter has a leading axis L. A scan calls the slice of one layer."""

    def __init__(self, arch: Architecture, attention: AttentionKernel, key: jax.Array) -> None:
        sizes = {"heads": arch.num_heads, "kv_heads": arch.num_kv_heads, "head_dim": arch.head_dim}
        sizes |= {"layers": arch.num_layers, "embed": arch.hidden_size, "norm": arch.hidden_size, "mlp": arch.mlp_size}
        keys = iter(jax.random.split(key, 7))

        def param(init: Callable[[tuple[int, ...]], jax.Array], *axes: str) -> nnx.Param:
            axes = ("layers", *axes)
            return nnx.Param(init(tuple(sizes[axis] for axis in axes)), axes=axes)

        def normal(shape: tuple[int, ...]) -> jax.Array:
            return jax.random.normal(next(keys), shape) * arch.init_std

        self.arch = arch
        self.attention: AttentionKernel = attention
        self.attention_norm = param(jnp.ones, "norm")
        self.q = param(normal, "embed", "heads", "head_dim")
        self.k = param(normal, "embed", "kv_heads", "head_dim")
        self.v = param(normal, "embed", "kv_heads", "head_dim")
        self.q_bias = nnx.data(param(jnp.zeros, "heads", "head_dim") if arch.qkv_bias else None)
        self.k_bias = nnx.data(param(jnp.zeros, "kv_heads", "head_dim") if arch.qkv_bias else None)
        self.v_bias = nnx.data(param(jnp.zeros, "kv_heads", "head_dim") if arch.qkv_bias else None)
        self.q_norm = nnx.data(param(jnp.ones, "head_dim") if arch.qk_norm else None)
        self.k_norm = nnx.data(param(jnp.ones, "head_dim") if arch.qk_norm else None)
        self.o = param(normal, "heads", "head_dim", "embed")
        self.mlp_norm = param(jnp.ones, "norm")
        self.gate = param(normal, "embed", "mlp")
        self.up = param(normal, "embed", "mlp")
        self.down = param(normal, "mlp", "embed")

    def __call__(  # noqa: D102 -- the class says it
        self, x_BTD: jax.Array, queries: TokenPositions, keys: TokenPositions
    ) -> jax.Array:
        axes, dtype, eps = ("batch", "length", "activation_embed"), x_BTD.dtype, self.arch.norm_eps
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        with jax.named_scope("projections"):
            h_BTD = rms_norm(x_BTD, self.attention_norm, eps)
            x_BTD = constrain_sharding(x_BTD + self._attention(h_BTD, queries, keys), axes)
        with jax.named_scope("feed_forward"):
            h_BTD = rms_norm(x_BTD, self.mlp_norm, eps)
            projected = [linear(h_BTD, weight[...].astype(dtype)) for weight in (self.gate, self.up)]
            gate_BTF, up_BTF = checkpoint_name(projected, MLP_PROJECTION_OUTPUT)
            x_BTD = x_BTD + linear(jax.nn.silu(gate_BTF) * up_BTF, self.down[...].astype(dtype))
        return constrain_sharding(x_BTD, axes)

    def _attention(self, x_BTD: jax.Array, queries: TokenPositions, keys: TokenPositions) -> jax.Array:
        dtype, arch = x_BTD.dtype, self.arch

        def project(weight: nnx.Param, bias: nnx.Param | None) -> jax.Array:
            out = checkpoint_name(jnp.einsum("BTD,DNH->BTNH", x_BTD, weight[...].astype(dtype)), PROJECTION_OUTPUT)
            out = out if bias is None else out + bias[...].astype(dtype)[None, None]
            return constrain_sharding(out, ("batch", "length", "activation_heads", "head_dim"))

        def norm_and_rotate(x_BTNH: jax.Array, norm: nnx.Param | None) -> jax.Array:
            x_BTNH = x_BTNH if norm is None else rms_norm(x_BTNH, norm, arch.norm_eps)
            return apply_rope(x_BTNH, queries.positions, arch.rope)

        q_BTNH = norm_and_rotate(project(self.q, self.q_bias), self.q_norm)
        k_BTKH = norm_and_rotate(project(self.k, self.k_bias), self.k_norm)
        v_BTKH = project(self.v, self.v_bias)
        with jax.named_scope("attention"):
            out_BTNH = packed_attention(q_BTNH, k_BTKH, v_BTKH, keys, self.attention)
        out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, self.o[...].astype(dtype))
        return checkpoint_name(out_BTD, PROJECTION_OUTPUT)


class Transformer(nnx.Module):
    """A decoder up to its final norm. `lm_head()` returns the matrix that turns hidden states into logits."""

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

    def __call__(self, token_ids_BT: jax.Array, token_positions: TokenPositions) -> jax.Array:
        """Returns hidden states [B, T, D] of packed rows in the compute dtype, in the order of `to_zigzag_order`."""
        dtype, keys = jnp.dtype(self.compute.dtype), token_positions
        queries = token_positions._replace(segment_lengths=None)
        token_ids_BT, queries = jax.tree.map(to_zigzag_order, (token_ids_BT, queries))
        with jax.named_scope("embedding"):
            # Gathered before the look-up: XLA would otherwise rematerialise the whole table for each use.
            table_VD = constrain_sharding(self.embedding[...].astype(dtype), (None, None))
            x_BTD = constrain_sharding(table_VD[token_ids_BT], ("batch", "length", "activation_embed"))

        def layer(x_BTD: jax.Array, block: DecoderLayers) -> tuple[jax.Array, None]:
            return block(x_BTD, queries, keys), None

        if self.compute.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.compute.remat])
        x_BTD, _ = jax.lax.scan(layer, x_BTD, self.blocks)
        return rms_norm(x_BTD, self.final_norm, self.arch.norm_eps)

    def lm_head(self) -> jax.Array:
        """Returns [D, V] in the compute dtype: logits = hidden @ head. A tied head is the transposed embedding."""
        head_DV = self.embedding[...].T if self.untied_head is None else self.untied_head[...]
        return head_DV.astype(self.compute.dtype)
