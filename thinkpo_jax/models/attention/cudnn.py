"""cuDNN flash attention for packed rows on NVIDIA GPUs (Hopper and newer).

`jax.nn.dot_product_attention` does not support packed rows. So this file binds the private primitives below it.
No jax version names the residuals of the backward pass for remat, and this file does. It also computes the offsets of
keys with the number of key heads. Before jax 0.11.1, the wrapper in jax multiplies them by the number of query heads.
Then it reads the keys of other tokens.

Letters: B batch, T tokens, N query heads, K key/value heads, H head width. M is the maximum number of segments per row.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
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
    # `variadic_args`: no bias, no gradient of a bias. The seed is of dropout, which is off.
    SETTINGS: dict[str, Any] = {"seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False)}
    SETTINGS |= {"mask_type": fused.MaskType.PADDING_CAUSAL, "layout": fused.AttentionLayout.BTNH.value}
    SETTINGS |= {"sliding_window_length": None}
    if "score_mod_name" in inspect.signature(LOWERINGS[0]).parameters:  # since jax 0.12
        SETTINGS |= {"score_mod_name": None, "score_mod_jaxpr": None}  # no function changes the scores
except (ImportError, AttributeError, TypeError, ValueError):
    FORWARD = BACKWARD = None
    LOWERINGS, SETTINGS = [], {}


def cudnn_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, lengths_BM: Array, *, name: str | None = None
) -> Array:
    """Computes causal attention within segments, scaled by H**-0.5. Called on each device's part of the arrays.

    The arrays are bfloat16 or float16. Outputs of padding are 0. Outputs and residuals carry `name` for remat policies.
    Segment m of a row has `lengths_BM[:, m]` tokens (0: there is no such segment) and starts where the previous one
    ends. The rest of the row is padding. Raises `UserError` if cuDNN attention does not support these arrays or the
    installed jax.
    """
    B, T, N, H = q_BTNH.shape
    if reason := unsupported_reason(q_BTNH.dtype, H):
        raise UserError(reason)
    if B * T * N * H > 2**31 - 1:
        raise UserError(
            f"cuDNN attention counts offsets in 32 bits, and {B} rows x {T} tokens x {N} heads x {H} on a device are "
            "more than 2**31 - 1 numbers. Put fewer rows on a device."
        )
    if lengths_BM.shape[1] == 1:  # jax does not take rows with room for only one segment as packed
        lengths_BM = jnp.pad(lengths_BM, ((0, 0), (0, 1)))
    return _attend(name, q_BTNH, k_BTKH, v_BTKH, lengths_BM)


def unsupported_reason(dtype: Any, head_dim: int) -> str | None:
    """Returns why cuDNN attention does not support this dtype or head width, or None if it does."""
    if reason := unsupported_jax():
        return reason
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention needs bfloat16 or float16 (found {dtype}). Set compute.dtype to bfloat16."
    if head_dim % 8 or head_dim > 256:
        return f"cuDNN attention needs a head width that is a multiple of 8 and at most 256 (found {head_dim})."
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
        f"cuDNN attention uses internals of jax {', '.join(KNOWN_JAX)}, and those of the installed jax "
        f"{jax.__version__} differ or are unknown. Install one of these versions."
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(name: str | None, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, lengths_BM: Array) -> Array:
    return _forward(name, q_BTNH, k_BTKH, v_BTKH, lengths_BM)[0]


def _forward(
    name: str | None, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, lengths_BM: Array
) -> tuple[Array, tuple[Array, ...]]:
    arrays = (q_BTNH, k_BTKH, v_BTKH, *_segment_arguments(q_BTNH, k_BTKH, lengths_BM))
    out_BTNH, stats = FORWARD.bind(*arrays, scale=q_BTNH.shape[-1] ** -0.5, is_training=True, **SETTINGS)
    out_BTNH = _zero_padding(out_BTNH, lengths_BM)
    if name is not None:
        out_BTNH, stats = checkpoint_name((out_BTNH, stats), name)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, lengths_BM, out_BTNH, stats)


def _backward(_name: str | None, residuals: tuple[Array, ...], dout_BTNH: Array) -> tuple:
    q_BTNH, k_BTKH, v_BTKH, lengths_BM, out_BTNH, stats = residuals
    arrays = (q_BTNH, k_BTKH, v_BTKH, *_segment_arguments(q_BTNH, k_BTKH, lengths_BM), stats, out_BTNH, dout_BTNH)
    gradients = BACKWARD.bind(*arrays, scale=q_BTNH.shape[-1] ** -0.5, **SETTINGS)
    return *(_zero_padding(gradient, lengths_BM) for gradient in gradients), None


_attend.defvjp(_forward, _backward)


def _zero_padding(x_BTNH: Array, lengths_BM: Array) -> Array:
    """Sets padding to 0. cuDNN leaves there what was in memory before."""
    real_BT = jnp.arange(x_BTNH.shape[1])[None] < lengths_BM.sum(axis=1)[:, None]
    return jnp.where(real_BT[..., None, None], x_BTNH, 0)


def _segment_arguments(q_BTNH: Array, k_BTKH: Array, lengths_BM: Array) -> tuple[Array, ...]:
    """Returns the arrays of `ARRAYS` after the values. They locate the segments. Bias and page tables are empty."""
    (_, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    lengths, starts = segment_starts(lengths_BM, T)
    empty = jnp.zeros(0, q_BTNH.dtype)
    return empty, lengths, lengths, starts * (N * H), starts * (K * H), empty, empty


def segment_starts(lengths_BM: Array, length: int) -> tuple[Array, Array]:
    """Returns lengths [B, M] and first tokens [B, M + 1] of all segments in the layout of cuDNN.

    Both arrays are filled in row-major order with the segments of all rows (each of `length` tokens), without gaps. The
    rest of them is length 0 and the end of the last row. First tokens count through all rows.
    """
    B, M = lengths_BM.shape
    starts_BM = jnp.cumsum(lengths_BM, axis=1) - lengths_BM + jnp.arange(B)[:, None] * length
    order = jnp.argsort(lengths_BM.reshape(-1) == 0, stable=True)
    lengths = lengths_BM.reshape(-1)[order]
    starts = jnp.where(lengths > 0, starts_BM.reshape(-1)[order], B * length)
    starts = jnp.pad(starts, (0, B), constant_values=B * length)
    return lengths.reshape(B, M).astype(jnp.int32), starts.reshape(B, M + 1).astype(jnp.int32)
