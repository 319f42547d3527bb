"""Selects the attention kernel and calls it."""

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from thinkpo_jax.models.attention import blockwise
from thinkpo_jax.models.attention.blockwise import blockwise_attention
from thinkpo_jax.models.attention.cudnn import cudnn_attention, unsupported_jax, unsupported_reason
from thinkpo_jax.models.attention.dense import ATTENTION_OUTPUT, TokenPositions, dense_attention
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.runtime.context_parallel import all_gather_rows, local_chunk_starts, to_zigzag_order
from thinkpo_jax.runtime.sharding import shard_map_by_axes

SPLASH_MULTIPLE = 128  # of tokens: what its blocks divide
MIN_CUDNN_COMPUTE_CAPABILITY = 9.0  # the compute capability that cuDNN's packed rows need

ROW_AXES = ("batch", None)
KEY_VALUE_AXES = ("batch", None, "activation_heads", None)
QUERY_AXES = ("batch", "length", "activation_heads", None)


AttentionKernel = Literal["auto", "reference", "blockwise", "splash", "cudnn"]


def select_kernel(
    requested: AttentionKernel, device: Any, *, dtype: str, head_dim: int, context: int, lengths: Sequence[int]
) -> AttentionKernel:
    """The form for a device, for heads of this width and rows of these lengths; `auto` takes the device's own kernel.

    Raises `UserError` where the one that is asked for cannot be had.
    """
    kernels: dict[str, AttentionKernel] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
    wanted: AttentionKernel = kernels.get(device.platform, "blockwise") if requested == "auto" else requested
    refused = None
    if wanted == "splash":
        refused = splash_unsupported_reason(device, context, lengths)
    elif wanted == "cudnn":
        refused = cudnn_unsupported_reason(device, dtype, head_dim, context)
    if refused is None:
        return wanted
    if requested == "auto":
        tell = log_warning if refused == unsupported_jax() else log_info  # the user can change jax, but not the GPU
        tell(f"compute.attention: `auto` uses `blockwise` instead of `{wanted}`: {refused}")
        return "blockwise"
    raise UserError(f"compute.attention: {requested}: {refused} `auto` takes what there is.")


def splash_multiple(context: int) -> int:
    """Returns the number that must divide row lengths for splash attention. A device has two chunks of a split row."""
    return SPLASH_MULTIPLE * (2 * context if context > 1 else 1)


def splash_unsupported_reason(device: Any, context: int, lengths: Sequence[int]) -> str | None:
    if device.platform != "tpu":
        return f"it runs on TPUs, and this is {device.device_kind}."
    whole = splash_multiple(context)
    wrong = [length for length in lengths if length % whole]
    return f"it needs a row_length that {whole} divides, not {wrong[0]}." if wrong else None


def cudnn_unsupported_reason(device: Any, dtype: str, head_dim: int, context: int) -> str | None:
    if device.platform not in ("gpu", "cuda"):
        return f"it runs on NVIDIA GPUs, and this is {device.device_kind}."
    capability = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < MIN_CUDNN_COMPUTE_CAPABILITY:
        return f"it needs a GPU of compute capability {MIN_CUDNN_COMPUTE_CAPABILITY} (Hopper) or more, and this is {device.device_kind}."
    if context > 1:
        return f"it takes whole rows, and mesh.context is {context}."
    return unsupported_reason(jnp.dtype(dtype), head_dim)


def packed_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rows: TokenPositions, form: AttentionKernel = "auto"
) -> jax.Array:
    """Causal attention within the segments of packed rows, scaled by H**-0.5; [B, T, N, H] in the dtype of the queries.

    A query sees the keys of its own segment at positions up to its own. Segments must be contiguous, padding behind
    them; what padding attends to is not defined, but finite. `rows` are in their order, queries, keys and values in
    that of `sharding.balanced`, which differs where a mesh splits rows. The form is one that `choose` gives; `auto` is
    blockwise, and so is that in plain XLA for rows of up to `BLOCK` tokens at once.
    """
    if form == "cudnn":
        assert rows.segment_lengths is not None
        part = shard_map_by_axes(
            functools.partial(cudnn_attention, name=ATTENTION_OUTPUT),
            (QUERY_AXES, QUERY_AXES, QUERY_AXES, ROW_AXES),
            QUERY_AXES,
        )
        return part(q_BTNH, k_BTKH, v_BTKH, rows.segment_lengths)
    if form == "reference" or (form != "splash" and rows.segment_ids.shape[1] <= blockwise.BLOCK_SIZE):
        gather = shard_map_by_axes(all_gather_rows, (QUERY_AXES,), KEY_VALUE_AXES)
        queries = TokenPositions(to_zigzag_order(rows.segment_ids), to_zigzag_order(rows.positions))
        return dense_attention(q_BTNH, gather(k_BTKH), gather(v_BTKH), queries, rows)
    part = shard_map_by_axes(
        _splash_attention_shard if form == "splash" else blockwise_attention,
        (QUERY_AXES, QUERY_AXES, QUERY_AXES, ROW_AXES, ROW_AXES),
        QUERY_AXES,
    )
    return part(q_BTNH, k_BTKH, v_BTKH, rows.segment_ids, rows.positions)


def _splash_attention_shard(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BS: jax.Array, _positions_BS: jax.Array
) -> jax.Array:
    """What one TPU computes: all keys of its rows for the queries that it holds."""
    from thinkpo_jax.models.attention.splash import splash_attention

    T, starts = q_BTNH.shape[1], local_chunk_starts(segments_BS.shape[1])
    order_T = (starts[:, None] + jnp.arange(T // len(starts))).reshape(-1)
    segments_BT = segments_BS[:, order_T]
    return splash_attention(
        q_BTNH,
        all_gather_rows(k_BTKH),
        all_gather_rows(v_BTKH),
        segments_BT,
        segments_BS,
        order_T,
        name=ATTENTION_OUTPUT,
    )
