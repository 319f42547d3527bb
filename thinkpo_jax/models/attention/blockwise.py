"""Which kernel attends on this device? One signature; plain XLA, whole or block by block, and the kernels of devices.

`splash` is the TPU's (splash.py), `cudnn` that of NVIDIA GPUs from Hopper on (cudnn.py), `blockwise` is for all others,
`reference` computes all scores at once. The blockwise form is for long rows of packed segments: softmax by running
maximum and sum, and a backward pass that computes the scores again (arXiv 2205.14135, 2307.08691). Its memory grows
with the row, not with the row's square, and blocks of keys that no query of a block may see are left out while the
program runs, by the rows' segments.

Where rows are split over devices (the mesh axis `context`), each device gathers all keys and values of its rows; with
few key/value heads they are small beside the queries.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head width, C tokens of a block, X
blocks of queries, Y blocks of keys.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from thinkpo_jax.models.attention.dense import ATTENTION_OUTPUT, TokenPositions
from thinkpo_jax.runtime.context_parallel import all_gather_rows, local_chunk_starts

BLOCK_SIZE = 256  # tokens; rows of up to so many are computed whole

MASKED_SCORE = -1e30  # a score that is none: finite, so that a row of them is no NaN


def blockwise_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BS: jax.Array, positions_BS: jax.Array
) -> jax.Array:
    """What one device computes: all keys of its rows for the queries that it holds."""
    starts = local_chunk_starts(segments_BS.shape[1])
    return _blockwise(
        q_BTNH, all_gather_rows(k_BTKH), all_gather_rows(v_BTKH), TokenPositions(segments_BS, positions_BS), starts
    )


@jax.custom_vjp
def _blockwise(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, keys: TokenPositions, starts: jax.Array
) -> jax.Array:
    """Queries of chunks of equal length, which start at `starts` of rows whose keys are all there."""
    return _forward(q_BTNH, k_BSKH, v_BSKH, keys, starts)[0]


def _forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, keys: TokenPositions, starts: jax.Array
) -> tuple[jax.Array, tuple]:
    found = _forward_rows(q_BTNH, k_BSKH, v_BSKH, keys, starts)
    out_BTNH, lse_BTN = checkpoint_name(found, ATTENTION_OUTPUT)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, keys, starts, out_BTNH, lse_BTN)


def _backward(residuals: tuple, dout_BTNH: jax.Array) -> tuple:
    q_BTNH, k_BSKH, v_BSKH, keys, starts, out_BTNH, lse_BTN = residuals
    weight_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    gradients = _backward_rows(q_BTNH, k_BSKH, v_BSKH, keys, starts, dout_BTNH, lse_BTN, weight_BTN)
    return *gradients, None, None


_blockwise.defvjp(_forward, _backward)


def _forward_rows(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, keys: TokenPositions, starts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Outputs, and the log-sum-exp [B, T, N] of every query's scores. Row by row: each has bounds of its own."""
    K, T = k_BSKH.shape[2], q_BTNH.shape[1]

    def row(arrays: tuple) -> tuple[jax.Array, jax.Array]:
        q, k, v, places = arrays
        starts_X, (lows_X, highs_X) = query_block_starts(starts, T), visible_key_blocks(places, starts, T)
        q, k, v, segments = _queries(q, K, starts), _keys(k), _keys(v), _padded(places.segment_ids)

        def queries(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            def keys(other: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                maximum, total, out = carry
                scores = _scores(q[index], k[other], segments, starts_X[index], other * BLOCK_SIZE)
                new = jnp.maximum(maximum, scores.max(axis=-1))
                weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(maximum - new)
                values = _product("kgct,kth->kgch", weights.astype(v.dtype), v[other])
                return new, total * kept + weights.sum(axis=-1), out * kept[..., None] + values

            empty = jnp.zeros(q.shape[1:-1], jnp.float32)
            start = (empty + MASKED_SCORE, empty, jnp.zeros(q.shape[1:], jnp.float32))
            maximum, total, out = jax.lax.fori_loop(lows_X[index], highs_X[index] + 1, keys, start)
            total = jnp.maximum(total, 1e-30)  # of blocks of padding, which see nothing
            return (out / total[..., None]).astype(q.dtype), maximum + jnp.log(total)

        out, lse = jax.lax.map(queries, jnp.arange(len(q)))
        return _in_rows(out, starts, T), _in_rows(lse, starts, T)

    return jax.lax.map(row, (q_BTNH, k_BSKH, v_BSKH, keys))


def _backward_rows(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    keys: TokenPositions,
    starts: jax.Array,
    dout_BTNH: jax.Array,
    lse_BTN: jax.Array,
    weight_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, for each block of keys over the blocks of queries that see it."""
    (_, S, K, _), T = k_BSKH.shape, q_BTNH.shape[1]
    scale = q_BTNH.shape[-1] ** -0.5

    def row(arrays: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v, places, *others = arrays
        starts_X, (lows_X, highs_X) = query_block_starts(starts, T), visible_key_blocks(places, starts, T)
        q, dout, lse, weight = (_queries(array, K, starts) for array in (q, *others))
        k, v, segments = _keys(k), _keys(v), _padded(places.segment_ids)
        firsts_Y = jnp.searchsorted(highs_X, jnp.arange(len(k)), side="left")
        ends_Y = jnp.searchsorted(lows_X, jnp.arange(len(k)), side="right")

        def keys(dq: jax.Array, other: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            def queries(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                dq, dk, dv = carry
                scores = _scores(q[index], k[other], segments, starts_X[index], other * BLOCK_SIZE)
                p = jnp.exp(scores - lse[index][..., None])
                dv = dv + _product("kgct,kgch->kth", p.astype(dout.dtype), dout[index])
                dp = _product("kgch,kth->kgct", dout[index], v[other])
                ds = (p * (dp - weight[index][..., None]) * scale).astype(q.dtype)
                dk = dk + _product("kgct,kgch->kth", ds, q[index])
                return dq.at[index].add(_product("kgct,kth->kgch", ds, k[other])), dk, dv

            zeros = jnp.zeros(k.shape[1:], jnp.float32)
            dq, dk, dv = jax.lax.fori_loop(firsts_Y[other], ends_Y[other], queries, (dq, zeros, zeros))
            return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

        dq, (dk, dv) = jax.lax.scan(keys, jnp.zeros(q.shape, jnp.float32), jnp.arange(len(k)))
        dk, dv = (jnp.moveaxis(array, 2, 1).reshape(-1, *k_BSKH.shape[2:])[:S] for array in (dk, dv))
        return _in_rows(dq.astype(q.dtype), starts, T), dk, dv

    return jax.lax.map(row, (q_BTNH, k_BSKH, v_BSKH, keys, dout_BTNH, lse_BTN, weight_BTN))


def query_block_starts(starts: jax.Array, length: int) -> jax.Array:
    """The places in the row at which the X blocks of `length` queries begin; each chunk has blocks of its own."""
    blocks = -(-length // len(starts) // BLOCK_SIZE)
    return (starts[:, None] + jnp.arange(blocks) * BLOCK_SIZE).reshape(-1)


def visible_key_blocks(row: TokenPositions, starts: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """For each of X blocks of queries the first and the last block of keys that it sees.

    What a block sees begins where the segment of its first token does, and ends with its last token. A block of padding
    sees none: its first is the one behind its last. Both ascend.
    """
    starts_X, S = query_block_starts(starts, length), row.segment_ids.shape[0]
    highs_X = (jnp.minimum(starts_X + BLOCK_SIZE, S) - 1) // BLOCK_SIZE
    lows_X = (starts_X - row.positions[starts_X]) // BLOCK_SIZE
    return jnp.where(row.segment_ids[starts_X] > 0, lows_X, highs_X + 1), highs_X


def _queries(array: jax.Array, kv_heads: int, starts: jax.Array) -> jax.Array:
    """[T, N, ...] in blocks [X, K, G, C, ...]; the last one of each chunk is padded."""
    chunks = array.reshape(len(starts), -1, *array.shape[1:])
    padding = ((0, 0), (0, -chunks.shape[1] % BLOCK_SIZE), *((0, 0),) * (array.ndim - 1))
    blocks = jnp.pad(chunks, padding).reshape(-1, BLOCK_SIZE, kv_heads, array.shape[1] // kv_heads, *array.shape[2:])
    return jnp.moveaxis(blocks, 1, 3)


def _keys(array: jax.Array) -> jax.Array:
    """[S, K, H] in blocks [Y, K, C, H]; the last one is padded."""
    return jnp.moveaxis(_padded(array).reshape(-1, BLOCK_SIZE, *array.shape[1:]), 1, 2)


def _padded(array: jax.Array) -> jax.Array:
    return jnp.pad(array, ((0, -array.shape[0] % BLOCK_SIZE), *((0, 0),) * (array.ndim - 1)))


def _in_rows(blocks: jax.Array, starts: jax.Array, length: int) -> jax.Array:
    """[X, K, G, C, ...] as [T, N, ...]: the opposite of `_queries`."""
    rows = jnp.moveaxis(blocks, 3, 1)
    rows = rows.reshape(len(starts), -1, rows.shape[2] * rows.shape[3], *rows.shape[4:])
    return rows[:, : length // len(starts)].reshape(length, *rows.shape[2:])


def _scores(
    q_KGCH: jax.Array, k_KCH: jax.Array, segments_S: jax.Array, start: jax.Array, other: jax.Array
) -> jax.Array:
    """Scaled scores of the queries from place `start` for the keys from place `other` on, float32 [K, G, C, C]."""
    order_C = jnp.arange(BLOCK_SIZE)
    causal_CC = (start + order_C)[:, None] >= (other + order_C)[None]
    # A last block of queries that is padded may run over the row's end; its padding is read by nobody.
    queries_C = segments_S[jnp.minimum(start + order_C, len(segments_S) - 1)]
    seen_CC = causal_CC & (queries_C[:, None] == jax.lax.dynamic_slice_in_dim(segments_S, other, BLOCK_SIZE)[None])
    scores = _product("kgch,kth->kgct", q_KGCH, k_KCH) * q_KGCH.shape[-1] ** -0.5
    return jnp.where(seen_CC, scores, MASKED_SCORE)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of operands that keep their dtype, summed in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
