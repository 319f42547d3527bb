"""Attention over packed rows in plain XLA, for all devices: with the full score matrix, or block by block.

The blockwise softmax uses a running maximum and sum. Its backward pass recomputes the scores (arXiv 2205.14135,
2307.08691). Memory grows linearly with the row length. Each block of queries skips the blocks of keys that it may not
see. The segments of the row decide this at run time.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head width.
C is the number of tokens in a block. X counts blocks of queries, and Y counts blocks of keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from thinkpo_jax.runtime.integers import ceil_div

ATTENTION_OUTPUT = "attended"  # the name of attention outputs in remat policies
BLOCK_SIZE = 256  # tokens. `packed_attention` computes rows of up to this length with `dense_attention`.
MASKED_SCORE = -1e30  # finite, because a row of -inf would become NaN


class TokenPositions(NamedTuple):
    """The segment of each token (0 is padding) and its position in that segment.

    `segment_lengths` counts the tokens of segments 1 to M (0: no such segment). Only the `cudnn` kernel needs it.
    """

    segment_ids: Array  # [B, T] int32
    positions: Array  # [B, T] int32
    segment_lengths: Array | None = None  # [B, M] int32


def dense_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, queries: TokenPositions, keys: TokenPositions
) -> Array:
    """Computes causal attention within segments for queries and keys in any order. Memory grows with T x S.

    Positions count from the start of a segment.
    """
    same_segment = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    not_later = keys.positions[:, None, :] <= queries.positions[:, :, None]
    mask_B1TS = (same_segment & not_later)[:, None]
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, implementation="xla")
    return checkpoint_name(out_BTNH, ATTENTION_OUTPUT)


@jax.custom_vjp
def blockwise_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, keys: TokenPositions, starts: Array) -> Array:
    """Computes causal attention within segments, scaled by H**-0.5. Called on each device's part of the queries.

    Keys are whole rows in their original order. Queries are chunks of equal length. `starts` holds the index in the row
    of each chunk's first token.
    """
    return _forward(q_BTNH, k_BSKH, v_BSKH, keys, starts)[0]


def _forward(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, keys: TokenPositions, starts: Array) -> tuple[Array, tuple]:
    """Returns outputs and residuals. The latter include the log-sum-exp [B, T, N] of the scores of each query."""
    K, T = k_BSKH.shape[2], q_BTNH.shape[1]

    def attend_row(arrays: tuple) -> tuple[Array, Array]:
        q, k, v, positions = arrays
        starts_X, (first_X, last_X) = query_block_starts(starts, T), visible_key_blocks(positions, starts, T)
        q, k, v = _split_queries(q, K, starts), _split_keys(k), _split_keys(v)
        segments = _pad_to_blocks(positions.segment_ids)

        def attend_queries(x: Array) -> tuple[Array, Array]:
            def add_keys(y: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                maximum, total, out = carry
                scores = _scores(q[x], k[y], segments, starts_X[x], y * BLOCK_SIZE)
                new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
                weights, rescale = jnp.exp(scores - new_maximum[..., None]), jnp.exp(maximum - new_maximum)
                values = _einsum("kgct,kth->kgch", weights.astype(v.dtype), v[y])
                return new_maximum, total * rescale + weights.sum(axis=-1), out * rescale[..., None] + values

            zeros = jnp.zeros(q.shape[1:-1], jnp.float32)
            init = (zeros + MASKED_SCORE, zeros, jnp.zeros(q.shape[1:], jnp.float32))
            maximum, total, out = jax.lax.fori_loop(first_X[x], last_X[x] + 1, add_keys, init)
            total = jnp.maximum(total, 1e-30)  # a block of padding sees no keys
            return (out / total[..., None]).astype(q.dtype), maximum + jnp.log(total)

        out, lse = jax.lax.map(attend_queries, jnp.arange(len(q)))
        return _merge_queries(out, starts, T), _merge_queries(lse, starts, T)

    # Row by row, because the visible blocks differ between rows.
    outputs = jax.lax.map(attend_row, (q_BTNH, k_BSKH, v_BSKH, keys))
    out_BTNH, lse_BTN = checkpoint_name(outputs, ATTENTION_OUTPUT)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, keys, starts, out_BTNH, lse_BTN)


def _backward(residuals: tuple, dout_BTNH: Array) -> tuple:
    """Returns gradients of q, k and v. Each block of keys loops over the blocks of queries that see it."""
    q_BTNH, k_BSKH, v_BSKH, keys, starts, out_BTNH, lse_BTN = residuals
    (_, S, K, _), (T, scale) = k_BSKH.shape, (q_BTNH.shape[1], q_BTNH.shape[-1] ** -0.5)
    # XLA on CPU takes forty times as long for a product that is summed.
    products = {"precision": "highest", "preferred_element_type": jnp.float32}
    delta_BTN = jnp.einsum("BTNH,BTNH->BTN", dout_BTNH, out_BTNH, **products)

    def differentiate_row(arrays: tuple) -> tuple[Array, Array, Array]:
        q, k, v, positions, *query_arrays = arrays
        starts_X, (first_X, last_X) = query_block_starts(starts, T), visible_key_blocks(positions, starts, T)
        q, dout, lse, delta = (_split_queries(array, K, starts) for array in (q, *query_arrays))
        k, v, segments = _split_keys(k), _split_keys(v), _pad_to_blocks(positions.segment_ids)
        first_Y = jnp.searchsorted(last_X, jnp.arange(len(k)), side="left")
        end_Y = jnp.searchsorted(first_X, jnp.arange(len(k)), side="right")

        def differentiate_keys(dq: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
            # The sums for dk and dv are transposed. So XLA transposes queries, which are narrower than scores.
            def add_queries(x: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                dq, dk_KHC, dv_KHC = carry
                scores = _scores(q[x], k[y], segments, starts_X[x], y * BLOCK_SIZE)
                p = jnp.exp(scores - lse[x][..., None])
                dv_KHC = dv_KHC + _einsum("ksh,kst->kht", _fold(dout[x]), _fold(p.astype(dout.dtype)))
                dp = _einsum("kgch,kth->kgct", dout[x], v[y])
                ds = (p * (dp - delta[x][..., None]) * scale).astype(q.dtype)
                dk_KHC = dk_KHC + _einsum("ksh,kst->kht", _fold(q[x]), _fold(ds))
                return dq.at[x].add(_einsum("kgct,kth->kgch", ds, k[y])), dk_KHC, dv_KHC

            zeros_KHC = jnp.zeros((K, k_BSKH.shape[-1], BLOCK_SIZE), jnp.float32)
            init = (dq, zeros_KHC, zeros_KHC)
            dq, dk_KHC, dv_KHC = jax.lax.fori_loop(first_Y[y], end_Y[y], add_queries, init)
            return dq, (dk_KHC.swapaxes(1, 2).astype(k.dtype), dv_KHC.swapaxes(1, 2).astype(v.dtype))

        dq, (dk, dv) = jax.lax.scan(differentiate_keys, jnp.zeros(q.shape, jnp.float32), jnp.arange(len(k)))
        dk, dv = (jnp.moveaxis(array, 2, 1).reshape(-1, *k_BSKH.shape[2:])[:S] for array in (dk, dv))
        return _merge_queries(dq.astype(q.dtype), starts, T), dk, dv

    gradients = jax.lax.map(differentiate_row, (q_BTNH, k_BSKH, v_BSKH, keys, dout_BTNH, lse_BTN, delta_BTN))
    return *gradients, None, None


blockwise_attention.defvjp(_forward, _backward)


def query_block_starts(starts: Array, length: int) -> Array:
    """Returns the first token in the row of each of the X blocks of `length` queries. A block lies within one chunk."""
    blocks_per_chunk = ceil_div(length, len(starts) * BLOCK_SIZE)
    return (starts[:, None] + jnp.arange(blocks_per_chunk) * BLOCK_SIZE).reshape(-1)


def visible_key_blocks(row: TokenPositions, starts: Array, length: int) -> tuple[Array, Array]:
    """Returns the first and the last block of keys that each of the X blocks of queries sees. Both are ascending.

    The visible keys start with the segment of the block's first token and end with the block's last token. A block of
    padding sees none, and its first block is the one after its last.
    """
    starts_X, S = query_block_starts(starts, length), row.segment_ids.shape[0]
    last_X = (jnp.minimum(starts_X + BLOCK_SIZE, S) - 1) // BLOCK_SIZE
    first_X = (starts_X - row.positions[starts_X]) // BLOCK_SIZE
    return jnp.where(row.segment_ids[starts_X] > 0, first_X, last_X + 1), last_X


def _split_queries(array: Array, kv_heads: int, starts: Array) -> Array:
    """Splits [T, N, ...] into blocks [X, K, G, C, ...] and pads the last block of each chunk."""
    chunks = array.reshape(len(starts), -1, *array.shape[1:])
    padding = ((0, 0), (0, -chunks.shape[1] % BLOCK_SIZE), *((0, 0),) * (array.ndim - 1))
    blocks = jnp.pad(chunks, padding).reshape(-1, BLOCK_SIZE, kv_heads, array.shape[1] // kv_heads, *array.shape[2:])
    return jnp.moveaxis(blocks, 1, 3)


def _merge_queries(blocks: Array, starts: Array, length: int) -> Array:
    """Inverts `_split_queries`: merges blocks [X, K, G, C, ...] into [T, N, ...]."""
    rows = jnp.moveaxis(blocks, 3, 1)
    rows = rows.reshape(len(starts), -1, rows.shape[2] * rows.shape[3], *rows.shape[4:])
    return rows[:, : length // len(starts)].reshape(length, *rows.shape[2:])


def _split_keys(array: Array) -> Array:
    """Splits [S, K, H] into blocks [Y, K, C, H] and pads the last block."""
    return jnp.moveaxis(_pad_to_blocks(array).reshape(-1, BLOCK_SIZE, *array.shape[1:]), 1, 2)


def _pad_to_blocks(array: Array) -> Array:
    return jnp.pad(array, ((0, -array.shape[0] % BLOCK_SIZE), *((0, 0),) * (array.ndim - 1)))


def _scores(q_KGCH: Array, k_KCH: Array, segments_S: Array, query_start: Array, key_start: Array) -> Array:
    """Returns masked and scaled scores in float32 [K, G, C, C]. The starts are the first tokens of the two blocks."""
    order_C = jnp.arange(BLOCK_SIZE)
    causal_CC = (query_start + order_C)[:, None] >= (key_start + order_C)[None]
    # The padding of the last query block may lie beyond the end of the row. Its scores are never used.
    queries_C = segments_S[jnp.minimum(query_start + order_C, len(segments_S) - 1)]
    keys_C = jax.lax.dynamic_slice_in_dim(segments_S, key_start, BLOCK_SIZE)
    visible_CC = causal_CC & (queries_C[:, None] == keys_C[None])
    scores = _einsum("kgch,kth->kgct", q_KGCH, k_KCH) * q_KGCH.shape[-1] ** -0.5
    return jnp.where(visible_CC, scores, MASKED_SCORE)


def _fold(array_KGCH: Array) -> Array:
    """Merges the queries of a group and of a block: [K, G * C, H]."""
    return array_KGCH.reshape(array_KGCH.shape[0], -1, array_KGCH.shape[-1])


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    """Multiplies operands in their own dtype and accumulates in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
