"""How does a TPU attend? jax's splash kernel, which leaves out blocks of keys by what the rows hold.

The kernel goes through a grid of blocks of queries and blocks of keys, and skips those that its masks say are not seen.
They are usually computed once, from the shape of a causal mask. Here each row's are computed while the program runs,
from its segments and from where its queries stand, so that other segments are neither computed nor loaded.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head width, X blocks of queries, Y of keys.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from thinkpo_jax.runtime.config import UserError

BLOCK_SIZES = (1024, 512, 256, 128)  # tokens, the widest that divides is taken
MAX_COMPUTE_BLOCK = 512  # keys of a block that are computed at once, at most
MAX_FUSED_BACKWARD_BLOCKS = (
    8  # blocks of keys; the fused backward pass keeps a gradient of all queries for each of them
)
PADDING_SEGMENT_ID = 2**30  # padding's segment, behind all others


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    order_T: jax.Array,
    *,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments, scaled by H**-0.5; [B, T, N, H] in the dtype of the queries.

    Called on each device's part. Keys are whole rows in their order, whose segments 1, 2, ... ascend, padding (0)
    behind them; what padding attends to is not defined, but finite. Queries are all of them, or two stretches of equal
    length; `order_T` says where in the row each one stands. Outputs and what the backward pass needs of the forward
    pass carry `name` for remat policies. `interpret` runs the kernel without a TPU. Raises `UserError` where no block
    divides the rows.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    blocks = block_sizes(T, S)
    query_ids_BT, key_ids_BS = (
        jnp.where(ids > 0, ids, PADDING_SEGMENT_ID) for ids in (query_segments_BT, key_segments_BS)
    )
    # In float32, or the scale itself would be rounded to bfloat16.
    q_BTNH = (q_BTNH.astype(jnp.float32) * q_BTNH.shape[-1] ** -0.5).astype(q_BTNH.dtype)

    def row(arrays: tuple[jax.Array, ...]) -> jax.Array:
        q_NTH, k_KSH, v_KSH, ids_T, ids_S = arrays
        seen_XY = visible_blocks(ids_T, ids_S, order_T, (blocks.block_q, blocks.block_kv))
        by_queries, by_keys = _by_queries(seen_XY, order_T), _by_keys(seen_XY, order_T)
        attend = kernel.SplashAttentionKernel(
            by_queries,
            None if blocks.use_fused_bwd_kernel else by_queries,
            by_keys,
            is_mqa=False,  # which is the kernel of grouped heads, too
            block_sizes=blocks,
            save_residuals=False,
            mask_value=kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=name,
            mask_function=_not_later,
            interpret=interpret,
        )
        out = attend(q_NTH, k_KSH, v_KSH, kernel.SegmentIds(ids_T, ids_S))
        assert isinstance(out, jax.Array)
        return out

    heads_first = [array.swapaxes(1, 2) for array in (q_BTNH, k_BSKH, v_BSKH)]
    # Row by row: each has blocks of its own to skip.
    return jax.lax.map(row, (*heads_first, query_ids_BT, key_ids_BS)).swapaxes(1, 2)


def block_sizes(queries: int, keys: int) -> kernel.BlockSizes:
    """The blocks for rows of `keys` tokens: the widest that divide them, and each contiguous stretch of the queries."""
    stretch = queries if queries == keys else queries // 2
    found = [next((block for block in BLOCK_SIZES if tokens % block == 0), None) for tokens in (stretch, keys)]
    if None in found or (queries != keys and queries % 2):
        part = "" if queries == keys else f", of which a device attends from two stretches of {queries / 2:g}"
        raise UserError(
            f"Rows of {keys} tokens{part}, do not fit attention on TPU, which goes in blocks of {BLOCK_SIZES[-1]} tokens or "
            f"a multiple. Choose a row length that {BLOCK_SIZES[-1]} divides, with context parallelism over C devices one "
            f"that 2 x C x {BLOCK_SIZES[-1]} divides; best are multiples of {BLOCK_SIZES[0]}."
        )
    block_q, block_kv = (block or 0 for block in found)
    fused = keys // block_kv <= MAX_FUSED_BACKWARD_BLOCKS
    return kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=min(block_kv, MAX_COMPUTE_BLOCK),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=min(block_kv, MAX_COMPUTE_BLOCK),
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )


def visible_blocks(ids_T: jax.Array, ids_S: jax.Array, order_T: jax.Array, blocks: tuple[int, int]) -> jax.Array:
    """Which blocks of keys a query of each block of queries sees, [X, Y].

    Ids ascend along the row. A block of queries sees the blocks that it overlaps itself, and those before it that reach
    into the segment of its first token. A block of padding sees no more than the ones that it overlaps: without any,
    its outputs would be no numbers.
    """
    block_q, block_kv = blocks
    first_X1, last_X1 = order_T[::block_q, None], order_T[block_q - 1 :: block_q, None]
    lowest_X1, highest_1Y = ids_T[::block_q, None], ids_S[None, block_kv - 1 :: block_kv]
    start_1Y = jnp.arange(0, ids_S.shape[0], block_kv)[None]
    overlaps_XY = (start_1Y <= last_X1) & (start_1Y + block_kv > first_X1)
    before_XY = (start_1Y <= last_X1) & (highest_1Y >= lowest_X1) & (lowest_X1 < PADDING_SEGMENT_ID)
    return overlaps_XY | before_XY


def _by_queries(seen_XY: jax.Array, order_T: jax.Array) -> MaskInfo:
    """For kernels that go through the blocks of keys for each block of queries."""
    upcoming_XY = _next_visible_block(seen_XY.reshape(-1)).reshape(seen_XY.shape) % seen_XY.shape[1]
    return _mask_info(seen_XY, upcoming_XY, order_T)


def _by_keys(seen_XY: jax.Array, order_T: jax.Array) -> MaskInfo:
    """For kernels that go through the blocks of queries, of all heads, for each block of keys."""
    return _mask_info(seen_XY, _next_visible_block(seen_XY.T).T, order_T)


def _mask_info(seen_XY: jax.Array, upcoming_XY: jax.Array, order_T: jax.Array) -> MaskInfo:
    return MaskInfo(
        data_next=upcoming_XY[None].astype(jnp.int16),  # scalar memory is small
        mask_next=None,
        block_mask=seen_XY[None].astype(jnp.int8),
        partial_mask_blocks=None,
        q_sequence=order_T,  # pyright: ignore[reportArgumentType] -- the kernel takes arrays of jax, too
    )


def _next_visible_block(seen: jax.Array) -> jax.Array:
    """The number of each block along the last axis, or, where it is skipped, of the one to be loaded next.

    Behind the last one stands the last one again: what is loaded already is not loaded anew.
    """
    count = seen.shape[-1]
    order = jax.lax.broadcasted_iota(jnp.int32, seen.shape, seen.ndim - 1)
    following = jax.lax.cummin(jnp.where(seen, order, count), axis=seen.ndim - 1, reverse=True)
    return jnp.minimum(following, jnp.where(seen, order, 0).max(axis=-1, keepdims=True))


def _not_later(query_order: jax.Array, key_order: jax.Array) -> jax.Array:
    """The kernel's own mask, within a block; segments are compared beside it."""
    return query_order >= key_order
