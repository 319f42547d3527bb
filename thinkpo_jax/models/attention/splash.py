"""The splash attention kernel of jax for TPUs, with masks that follow the segments of each row.

The kernel loops over a grid of blocks of queries and blocks of keys. It skips the blocks that its mask info excludes.
Usually this mask info is computed once, from the shape of a causal mask. This file computes it at run time for each
row, from the segments and the order of the queries. So blocks of other segments are neither loaded nor computed.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head width.
X counts blocks of queries, and Y counts blocks of keys.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from thinkpo_jax.runtime.config import UserError

BLOCK_SIZES = (1024, 512, 256, 128)  # tokens. The largest size that divides the rows is used.
MAX_COMPUTE_BLOCK = 512  # keys of a block that are computed at once
MAX_FUSED_BACKWARD_BLOCKS = 8  # of keys. For each of them the fused backward pass stores a gradient of all queries.
PADDING_SEGMENT_ID = 2**30  # Above all other segment ids, because ids must ascend along a row.


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BS: jax.Array,
    order_T: jax.Array,
    *,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes causal attention within segments, scaled by H**-0.5. Called on each device's part of the queries.

    Keys are whole rows in their original order. Their segments are 1, 2, ... with padding (0) at the end of the row.
    Queries are a whole row, or two chunks of equal length. `order_T` is the index of each query in the row. Outputs of
    padding are undefined but finite. Outputs and residuals carry `name` for remat. `interpret` needs no TPU. Raises
    `UserError` if no block size divides the rows.
    """
    blocks = block_sizes(q_BTNH.shape[1], k_BSKH.shape[1])
    # The order of these two operations matters: XLA for TPUs needs more memory to gather after `where`.
    ids_BT, ids_BS = (jnp.where(ids > 0, ids, PADDING_SEGMENT_ID) for ids in (segments_BS[:, order_T], segments_BS))
    # In float32, because bfloat16 would round the scale.
    q_BTNH = (q_BTNH.astype(jnp.float32) * q_BTNH.shape[-1] ** -0.5).astype(q_BTNH.dtype)

    # The kernel of `is_mqa=False` also handles grouped heads.
    settings = {"is_mqa": False, "save_residuals": False, "attn_logits_soft_cap": None, "block_sizes": blocks}
    settings |= {"mask_value": kernel.DEFAULT_MASK_VALUE, "residual_checkpoint_name": name, "interpret": interpret}

    def attend_row(arrays: tuple[jax.Array, ...]) -> jax.Array:
        q_NTH, k_KSH, v_KSH, ids_T, ids_S = arrays
        visible_XY = visible_blocks(ids_T, ids_S, order_T, (blocks.block_q, blocks.block_kv))
        by_queries, by_keys = mask_infos(visible_XY, order_T)
        masks = (by_queries, None if blocks.use_fused_bwd_kernel else by_queries, by_keys)
        # Within a block, a query sees keys that are not later. The kernel compares segments in addition.
        attend = kernel.SplashAttentionKernel(*masks, mask_function=operator.ge, **settings)
        out = attend(q_NTH, k_KSH, v_KSH, kernel.SegmentIds(ids_T, ids_S))
        assert isinstance(out, jax.Array)
        return out

    heads_first = [array.swapaxes(1, 2) for array in (q_BTNH, k_BSKH, v_BSKH)]
    # Row by row, because the visible blocks differ between rows.
    return jax.lax.map(attend_row, (*heads_first, ids_BT, ids_BS)).swapaxes(1, 2)


def block_sizes(queries: int, keys: int) -> kernel.BlockSizes:
    """Returns the largest blocks that divide rows of `keys` tokens and each contiguous chunk of the queries.

    Raises `UserError` if no block size divides them.
    """
    chunk, smallest = queries if queries == keys else queries // 2, BLOCK_SIZES[-1]
    block_q, block_kv = (next((size for size in BLOCK_SIZES if tokens % size == 0), 0) for tokens in (chunk, keys))
    if not (block_q and block_kv) or (queries != keys and queries % 2):
        split = "" if queries == keys else f", split into chunks of {queries / 2:g} tokens,"
        raise UserError(
            f"Rows of {keys} tokens{split} do not fit splash attention, which needs multiples of {smallest} tokens. "
            f"Choose a row length that {smallest} divides, or 2 x C x {smallest} with context parallelism over C "
            f"devices. Multiples of {BLOCK_SIZES[0]} are best."
        )
    fused = keys // block_kv <= MAX_FUSED_BACKWARD_BLOCKS
    blocks = (block_q, block_kv, min(block_kv, MAX_COMPUTE_BLOCK))  # of queries, of keys, of keys computed at once
    dq_blocks = (None, None) if fused else (block_q, block_kv)
    return kernel.BlockSizes(*blocks, *blocks, *dq_blocks, use_fused_bwd_kernel=fused)  # forward pass, dk and dv, dq


def visible_blocks(ids_T: jax.Array, ids_S: jax.Array, order_T: jax.Array, blocks: tuple[int, int]) -> jax.Array:
    """Returns which blocks of keys each block of queries sees, [X, Y]. Segment ids must ascend along the row.

    A block of queries sees the blocks that it overlaps. It also sees earlier blocks that reach into the segment of its
    first token. A block of padding sees only the blocks that it overlaps. Without any, its outputs would be NaN.
    """
    block_q, block_kv = blocks
    first_X1, last_X1 = order_T[::block_q, None], order_T[block_q - 1 :: block_q, None]
    lowest_X1, highest_1Y = ids_T[::block_q, None], ids_S[None, block_kv - 1 :: block_kv]
    start_1Y = jnp.arange(0, ids_S.shape[0], block_kv)[None]
    overlaps_XY = (start_1Y <= last_X1) & (start_1Y + block_kv > first_X1)
    before_XY = (start_1Y <= last_X1) & (highest_1Y >= lowest_X1) & (lowest_X1 < PADDING_SEGMENT_ID)
    return overlaps_XY | before_XY


def mask_infos(visible_XY: jax.Array, order_T: jax.Array) -> tuple[MaskInfo, ...]:
    """Returns the masks of kernels that loop over keys per block of queries, and over queries per block of keys."""
    next_by_queries_XY = _next_visible_block(visible_XY.reshape(-1)).reshape(visible_XY.shape) % visible_XY.shape[1]
    others: dict[str, Any] = {"mask_next": None, "partial_mask_blocks": None, "q_sequence": order_T}
    return tuple(  # of small integers, because scalar memory is small
        MaskInfo(data_next=next_XY[None].astype(jnp.int16), block_mask=visible_XY[None].astype(jnp.int8), **others)
        for next_XY in (next_by_queries_XY, _next_visible_block(visible_XY.T).T)
    )


def _next_visible_block(visible: jax.Array) -> jax.Array:
    """Returns the index of each block along the last axis. A skipped block gets the index of the next visible block.

    After the last visible block its index repeats, so the kernel does not load another block.
    """
    count = visible.shape[-1]
    order = jax.lax.broadcasted_iota(jnp.int32, visible.shape, visible.ndim - 1)
    following = jax.lax.cummin(jnp.where(visible, order, count), axis=visible.ndim - 1, reverse=True)
    return jnp.minimum(following, jnp.where(visible, order, 0).max(axis=-1, keepdims=True))
