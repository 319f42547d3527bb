"""Selects the attention kernel for a device and calls it."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from thinkpo_jax.models.attention import blockwise
from thinkpo_jax.models.attention.blockwise import ATTENTION_OUTPUT, TokenPositions, dense_attention
from thinkpo_jax.models.attention.cudnn import cudnn_attention, unsupported_jax, unsupported_reason
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.runtime.context_parallel import all_gather_rows, local_chunk_starts, to_zigzag_order
from thinkpo_jax.runtime.integers import round_up
from thinkpo_jax.runtime.sharding import shard_map_by_axes

SPLASH_MULTIPLE = 128  # tokens. The smallest block size of the kernel, which must divide row lengths.
MIN_CUDNN_COMPUTE_CAPABILITY = 9.0  # for packed rows

KEY_VALUE_AXES = ("batch", None, "activation_heads", None)
QUERY_AXES = ("batch", "length", "activation_heads", None)

AttentionKernel = Literal["auto", "reference", "blockwise", "splash", "cudnn"]


def select_kernel(
    requested: AttentionKernel, device: Any, *, dtype: str, head_dim: int, context: int, lengths: Sequence[int]
) -> AttentionKernel:
    """Returns the kernel for a device, heads of this width and rows of these lengths.

    `auto` becomes the kernel made for the device, or `blockwise` if that kernel does not support the arguments. Raises
    `UserError` if the requested kernel does not support the device or the arguments.
    """
    kernel_by_platform: dict[str, AttentionKernel] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
    kernel = kernel_by_platform.get(device.platform, "blockwise") if requested == "auto" else requested
    reason = None
    if kernel == "splash":
        reason = splash_unsupported_reason(device, context, lengths)
    elif kernel == "cudnn":
        reason = cudnn_unsupported_reason(device, dtype, head_dim, context)
    if reason is None:
        return kernel
    if requested != "auto":
        raise UserError(f"compute.attention is `{requested}`, but {reason} `auto` selects a kernel that is supported.")
    log = log_warning if reason == unsupported_jax() else log_info  # the user can change jax, but not the GPU
    log(f"compute.attention: `auto` uses `blockwise` instead of `{kernel}`: {reason}")
    return "blockwise"


def splash_multiple(context: int) -> int:
    """Returns the number that must divide row lengths for splash attention. A device has two chunks of a split row."""
    return SPLASH_MULTIPLE * (2 * context if context > 1 else 1)


def splash_unsupported_reason(device: Any, context: int, lengths: Sequence[int]) -> str | None:
    """Returns why splash attention does not support the device or a row length, or None if it does."""
    if device.platform != "tpu":
        return f"splash attention needs a TPU (found {device.device_kind})."
    multiple = splash_multiple(context)
    if length := next((length for length in lengths if length % multiple), None):
        return (
            f"splash attention needs row_length to be a multiple of {multiple} on this mesh (found {length}). "
            f"Set row_length to {round_up(length, multiple)}."
        )
    return None


def cudnn_unsupported_reason(device: Any, dtype: str, head_dim: int, context: int) -> str | None:
    """Returns why cuDNN attention does not support the device or an argument, or None if it does."""
    capability = str(getattr(device, "compute_capability", "")) if device.platform in ("gpu", "cuda") else ""
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < MIN_CUDNN_COMPUTE_CAPABILITY:
        return (
            f"cuDNN attention needs an NVIDIA GPU of compute capability {MIN_CUDNN_COMPUTE_CAPABILITY} (Hopper) or "
            f"higher (found {device.device_kind})."
        )
    if context > 1:
        return f"cuDNN attention needs rows that are not split over devices (found mesh.context {context})."
    return unsupported_reason(jnp.dtype(dtype), head_dim)


def packed_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rows: TokenPositions, kernel: AttentionKernel = "auto"
) -> jax.Array:
    """Computes causal attention within the segments of packed rows, scaled by H**-0.5, in the dtype of the queries.

    A query sees the keys of its own segment up to its own position. Segments must be contiguous, with padding at the
    end of the row. Outputs of padding are finite, but otherwise undefined. `rows` are in their original order. Queries,
    keys and values are in the order of `to_zigzag_order`. The two orders differ if the mesh splits rows.
    `kernel` comes from `select_kernel`. Here `auto` means `blockwise`. This kernel leaves rows of up to `BLOCK_SIZE`
    tokens to `dense_attention`.
    """
    rows = rows if kernel == "cudnn" else rows._replace(segment_lengths=None)
    if kernel == "reference" or (kernel in ("auto", "blockwise") and rows.segment_ids.shape[1] <= blockwise.BLOCK_SIZE):
        gather = shard_map_by_axes(all_gather_rows, (QUERY_AXES,), KEY_VALUE_AXES)
        return dense_attention(q_BTNH, gather(k_BTKH), gather(v_BTKH), jax.tree.map(to_zigzag_order, rows), rows)

    def attend_on_device(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rows: TokenPositions) -> jax.Array:
        if kernel == "cudnn":
            assert rows.segment_lengths is not None
            return cudnn_attention(q_BTNH, k_BTKH, v_BTKH, rows.segment_lengths, name=ATTENTION_OUTPUT)
        # With few key/value heads, all keys and values of the rows are small compared to the queries.
        keys, values = all_gather_rows(k_BTKH), all_gather_rows(v_BTKH)
        starts = local_chunk_starts(rows.segment_ids.shape[1])
        if kernel != "splash":
            return blockwise.blockwise_attention(q_BTNH, keys, values, rows, starts)
        from thinkpo_jax.models.attention.splash import splash_attention

        order_T = (starts[:, None] + jnp.arange(q_BTNH.shape[1] // len(starts))).reshape(-1)
        return splash_attention(q_BTNH, keys, values, rows.segment_ids, order_T, name=ATTENTION_OUTPUT)

    attend = shard_map_by_axes(attend_on_device, (QUERY_AXES,) * 3 + (("batch", None),), QUERY_AXES)
    return attend(q_BTNH, k_BTKH, v_BTKH, rows)
