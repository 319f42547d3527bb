"""How does an NVIDIA GPU attend? cuDNN's flash attention over packed rows, on Hopper and newer.

`jax.nn.dot_product_attention` does not support packed rows. So this file binds the private primitives below it.
No jax version names the residuals of the backward pass for remat, and this file does. It also computes the offsets of
keys with the number of key heads. The wrapper in jax multiplies them by the number of query heads before jax 0.11.1,
and then reads the keys of other tokens.

Letters: B batch, T tokens, N query heads, K key/value heads, H head width, M segments of a row at most.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from thinkpo_jax.runtime.config import UserError

KNOWN_JAX = ("0.10", "0.11", "0.12")  # minor versions whose primitives this file was compared with
ARRAYS = ["query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"]
ARRAYS += ["page_table_k", "page_table_v"]

try:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    FORWARD: Any = fused._dot_product_attention_fwd_p
    BACKWARD: Any = fused._dot_product_attention_bwd_p
    LOWERINGS = [fused._dot_product_attention_fwd_cuda_lowering, fused._dot_product_attention_bwd_cuda_lowering]
    SETTINGS: dict[str, Any] = {
        "seed": 42,  # of dropout, of which there is none
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": fused.MaskType.PADDING_CAUSAL,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    if "score_mod_name" in inspect.signature(LOWERINGS[0]).parameters:  # since jax 0.12
        SETTINGS |= {"score_mod_name": None, "score_mod_jaxpr": None}  # no function changes the scores
except (ImportError, AttributeError, TypeError, ValueError):
    FORWARD = BACKWARD = None
    LOWERINGS, SETTINGS = [], {}


def cudnn_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_BM: jax.Array, *, name: str | None = None
) -> jax.Array:
    """Causal attention within segments, scaled by H**-0.5; [B, T, N, H] in the dtype of the queries, 0 for padding.

    Called on each device's part, in bfloat16 or float16. Segment m of a row has `lengths_BM[:, m]` tokens (0: there is
    none) and begins where the one before it ends; the rest of the row is padding. Outputs and what the backward pass
    needs of the forward pass carry `name` for remat policies. Raises `UserError` where cuDNN cannot be had.
    """
    _check(q_BTNH)
    if lengths_BM.shape[1] == 1:  # a single one is not taken for a packed row
        lengths_BM = jnp.pad(lengths_BM, ((0, 0), (0, 1)))
    return _attend(name, q_BTNH, k_BTKH, v_BTKH, lengths_BM)


def unsupported_reason(dtype: Any, head_dim: int) -> str | None:
    """Why cuDNN cannot attend in this dtype with heads of this width; None where it can."""
    if problem := unsupported_jax():
        return problem
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attends in bfloat16 or float16, not in {dtype}. Set the dtype to bfloat16."
    if head_dim % 8 or head_dim > 256:
        return f"cuDNN attends with heads of up to 256 in steps of 8, not of {head_dim}. Choose another kernel."
    return None


def unsupported_jax() -> str | None:
    """Returns why the installed jax cannot run cuDNN attention, or None if it can.

    The names of all parameters are compared, because unexpected ones raise a `TypeError` in the middle of lowering.
    """
    names = [name for lowering in LOWERINGS for name in inspect.signature(lowering).parameters]
    forward = ["ctx", *ARRAYS, "scale", *SETTINGS, "is_training"]
    backward = ["ctx", *ARRAYS, "activation", "fwd_output", "grad_output", "scale", *SETTINGS]
    is_same = [name for name in names if name != "score_mod_args"] == forward + backward  # no arrays for score_mod
    if FORWARD is not None and is_same and ".".join(jax.__version__.split(".")[:2]) in KNOWN_JAX:
        return None
    return (
        f"thinkpo_jax knows the cuDNN attention of jax {', '.join(KNOWN_JAX)}, and that of the installed jax "
        f"{jax.__version__} differs or is unknown. Install one of these versions."
    )


def _check(q_BTNH: jax.Array) -> None:
    B, T, N, H = q_BTNH.shape
    if problem := unsupported_reason(q_BTNH.dtype, H):
        raise UserError(problem)
    if B * T * N * H > 2**31 - 1:
        raise UserError(
            f"{B} rows of {T} tokens x {N} heads x {H} on a device are more than cuDNN's offsets count (2**31). "
            "Put fewer rows on a device."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    name: str | None, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_BM: jax.Array
) -> jax.Array:
    return _forward(name, q_BTNH, k_BTKH, v_BTKH, lengths_BM)[0]


def _forward(
    name: str | None, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_BM: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    places = _segment_arguments(q_BTNH, k_BTKH, lengths_BM)
    scale = q_BTNH.shape[-1] ** -0.5
    out_BTNH, stats = FORWARD.bind(q_BTNH, k_BTKH, v_BTKH, *places, scale=scale, is_training=True, **SETTINGS)
    out_BTNH = _zero_padding(out_BTNH, lengths_BM)
    if name is not None:
        out_BTNH, stats = checkpoint_name((out_BTNH, stats), name)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, lengths_BM, out_BTNH, stats)


def _backward(
    _name: str | None, residuals: tuple[jax.Array, ...], dout_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BTKH, v_BTKH, lengths_BM, out_BTNH, stats = residuals
    places = _segment_arguments(q_BTNH, k_BTKH, lengths_BM)
    scale = q_BTNH.shape[-1] ** -0.5
    arrays = (q_BTNH, k_BTKH, v_BTKH, *places, stats, out_BTNH, dout_BTNH)
    gradients = BACKWARD.bind(*arrays, scale=scale, **SETTINGS)
    dq_BTNH, dk_BTKH, dv_BTKH = (_zero_padding(gradient, lengths_BM) for gradient in gradients)
    return dq_BTNH, dk_BTKH, dv_BTKH, None


_attend.defvjp(_forward, _backward)


def _zero_padding(x_BTNH: jax.Array, lengths_BM: jax.Array) -> jax.Array:
    """0 for padding, where cuDNN writes nothing: there is what was in memory before."""
    real_BT = jnp.arange(x_BTNH.shape[1])[None] < lengths_BM.sum(axis=1)[:, None]
    return jnp.where(real_BT[..., None, None], x_BTNH, 0)


def _segment_arguments(q_BTNH: jax.Array, k_BTKH: jax.Array, lengths_BM: jax.Array) -> tuple[jax.Array, ...]:
    """The arguments between the values and the residuals: where cuDNN finds the segments (bias and pages: none)."""
    (_, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    lengths, starts = segment_starts(lengths_BM, T)
    none = jnp.zeros(0, q_BTNH.dtype)
    return none, lengths, lengths, starts * (N * H), starts * (K * H), none, none


def segment_starts(lengths_BM: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Lengths [B, M] and first tokens [B, M + 1] of all segments of all rows of `length` tokens, as cuDNN reads them.

    Row-major, the segments that there are stand one after the other, whatever their row; behind them are lengths of 0
    and the end of the last row. First tokens are counted through all rows.
    """
    B, M = lengths_BM.shape
    starts_BM = jnp.cumsum(lengths_BM, axis=1) - lengths_BM + jnp.arange(B)[:, None] * length
    order = jnp.argsort(lengths_BM.reshape(-1) == 0, stable=True)
    lengths = lengths_BM.reshape(-1)[order]
    starts = jnp.where(lengths > 0, starts_BM.reshape(-1)[order], B * length)
    starts = jnp.pad(starts, (0, B), constant_values=B * length)
    return lengths.reshape(B, M).astype(jnp.int32), starts.reshape(B, M + 1).astype(jnp.int32)
