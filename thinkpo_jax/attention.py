"""Which kernel attends on this device? One signature, two forms in plain XLA: whole, and block by block.

The blockwise form is for long rows of packed segments: softmax by running maximum and sum, and a backward pass that
computes the scores again (arXiv 2205.14135, 2307.08691). Its memory grows with the row, not with the row's square, and
blocks of keys that no query of a block may see are left out while the program runs, by the rows' segments.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head width, C tokens of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from thinkpo_jax.sharding import per_device

BLOCK = 256  # tokens; rows of up to so many are computed whole
ATTENDED = "attended"  # by which remat policies name what attention gives
LOWEST = -1e30  # a score that is none: finite, so that a row of them is no NaN

ROWS = ("batch", None)
STATS = ("batch", None, "activation_heads")
HEADS = (*STATS, None)


class Places(NamedTuple):
    """Where tokens stand: the segment (0 = padding) that each belongs to and its position within the segment."""

    segments: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries: Places, keys: Places) -> jax.Array:
    """Causal attention within segments, scaled by H**-0.5; returns [B, T, N, H] in the dtype of the queries.

    A query sees the keys of its own segment at positions up to its own. Because positions are counted within the
    segment, the same rule serves packed rows and a key/value cache.

    Rows of more than `BLOCK` tokens whose keys are their own (`keys is queries`: no cache) are computed block by block.
    Their segments must be contiguous, padding behind them; what padding attends to is not defined, but finite.
    """
    if keys is queries and queries.segments.shape[1] > BLOCK:
        return _blockwise(q_BTNH, k_BSKH, v_BSKH, queries)
    return _whole(q_BTNH, k_BSKH, v_BSKH, queries, keys)


def _whole(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries: Places, keys: Places) -> jax.Array:
    """All scores at once: memory grows with T x S."""
    same_segment = queries.segments[:, :, None] == keys.segments[:, None, :]
    not_later = keys.positions[:, None, :] <= queries.positions[:, :, None]
    mask_B1TS = (same_segment & not_later)[:, None]
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, implementation="xla")
    return checkpoint_name(out_BTNH, ATTENDED)


@jax.custom_vjp
def _blockwise(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, places: Places) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, places)[0]


def _forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, places: Places) -> tuple[jax.Array, tuple]:
    part = per_device(_forward_rows, (HEADS, HEADS, HEADS, ROWS, ROWS), (HEADS, STATS))
    out_BTNH, lse_BTN = checkpoint_name(part(q_BTNH, k_BTKH, v_BTKH, *places), ATTENDED)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, places, out_BTNH, lse_BTN)


def _backward(residuals: tuple, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BTKH, v_BTKH, places, out_BTNH, lse_BTN = residuals
    weight_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    part = per_device(_backward_rows, (HEADS, HEADS, HEADS, ROWS, ROWS, HEADS, STATS, STATS), (HEADS, HEADS, HEADS))
    return *part(q_BTNH, k_BTKH, v_BTKH, *places, dout_BTNH, lse_BTN, weight_BTN), None


_blockwise.defvjp(_forward, _backward)


def _forward_rows(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Outputs, and the log-sum-exp [B, T, N] of every query's scores. Row by row: each has bounds of its own."""
    K, T = k_BTKH.shape[2], q_BTNH.shape[1]

    def row(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, segments_XC, positions_XC = _in_blocks(K, *arrays)
        lows_X, _ = block_bounds(segments_XC, positions_XC)

        def queries(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            def keys(other: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                maximum, total, out = carry
                scores = _scores(q[index], k[other], segments_XC, index, other)
                new = jnp.maximum(maximum, scores.max(axis=-1))
                weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(maximum - new)
                values = _product("kgct,kth->kgch", weights.astype(v.dtype), v[other])
                return new, total * kept + weights.sum(axis=-1), out * kept[..., None] + values

            empty = jnp.zeros(q.shape[1:-1], jnp.float32)
            start = (empty + LOWEST, empty, jnp.zeros(q.shape[1:], jnp.float32))
            maximum, total, out = jax.lax.fori_loop(lows_X[index], index + 1, keys, start)
            total = jnp.maximum(total, 1e-30)  # of blocks of padding, which see nothing
            return (out / total[..., None]).astype(q.dtype), maximum + jnp.log(total)

        out, lse = jax.lax.map(queries, jnp.arange(len(q)))
        return _in_rows(out, T), _in_rows(lse, T)

    return jax.lax.map(row, (q_BTNH, k_BTKH, v_BTKH, segments_BT, positions_BT))


def _backward_rows(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    dout_BTNH: jax.Array,
    lse_BTN: jax.Array,
    weight_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, for each block of keys over the blocks of queries that see it."""
    K, T = k_BTKH.shape[2], q_BTNH.shape[1]
    scale = q_BTNH.shape[-1] ** -0.5

    def row(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v, segments_XC, positions_XC, dout, lse, weight = _in_blocks(K, *arrays)
        _, highs_X = block_bounds(segments_XC, positions_XC)

        def keys(dq: jax.Array, other: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            def queries(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                dq, dk, dv = carry
                scores = _scores(q[index], k[other], segments_XC, index, other)
                p = jnp.exp(scores - lse[index][..., None])
                dv = dv + _product("kgct,kgch->kth", p.astype(dout.dtype), dout[index])
                dp = _product("kgch,kth->kgct", dout[index], v[other])
                ds = (p * (dp - weight[index][..., None]) * scale).astype(q.dtype)
                dk = dk + _product("kgct,kgch->kth", ds, q[index])
                return dq.at[index].add(_product("kgct,kth->kgch", ds, k[other])), dk, dv

            zeros = jnp.zeros(k.shape[1:], jnp.float32)
            dq, dk, dv = jax.lax.fori_loop(other, highs_X[other] + 1, queries, (dq, zeros, zeros))
            return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

        dq, (dk, dv) = jax.lax.scan(keys, jnp.zeros(q.shape, jnp.float32), jnp.arange(len(k)))
        return _in_rows(dq.astype(q.dtype), T), _in_rows(dk[:, :, None], T), _in_rows(dv[:, :, None], T)

    arrays = (q_BTNH, k_BTKH, v_BTKH, segments_BT, positions_BT, dout_BTNH, lse_BTN, weight_BTN)
    return jax.lax.map(row, arrays)


def block_bounds(segments_XC: jax.Array, positions_XC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each of X blocks the first block of keys that its queries see, and the last block of queries that sees it.

    What a block sees begins where the segment of its first token does, and ends with the block itself. A block of
    padding sees none: its first is the one behind it.
    """
    blocks, width = segments_XC.shape
    order_X = jnp.arange(blocks)
    lows_X = (order_X * width - positions_XC[:, 0]) // width
    lows_X = jnp.where(segments_XC[:, 0] > 0, lows_X, order_X + 1)
    return lows_X, jnp.searchsorted(lows_X, order_X, side="right") - 1


def _in_blocks(kv_heads: int, *arrays: jax.Array) -> list[jax.Array]:
    """[T, heads, ...] as blocks [X, K, G, C, ...] (keys and values without G), [T] as [X, C]; the last one padded."""
    found: list[jax.Array] = []
    for number, array in enumerate(arrays):
        array = jnp.pad(array, ((0, -array.shape[0] % BLOCK), *((0, 0),) * (array.ndim - 1)))
        array = array.reshape(-1, BLOCK, *array.shape[1:])
        if array.ndim > 2:
            array = array.reshape(*array.shape[:2], kv_heads, -1, *array.shape[3:])
            array = jnp.moveaxis(array, 1, 3)
        found.append(array[:, :, 0] if number in (1, 2) else array)
    return found


def _in_rows(blocks: jax.Array, length: int) -> jax.Array:
    """[X, K, G, C, ...] as [T, heads, ...]."""
    rows = jnp.moveaxis(blocks, 3, 1)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1, *rows.shape[4:])[:length]


def _scores(
    q_KGCH: jax.Array, k_KCH: jax.Array, segments_XC: jax.Array, index: jax.Array, other: jax.Array
) -> jax.Array:
    """Scaled scores of block `index` of queries for block `other` of keys, float32 [K, G, C, C]."""
    order_C = jnp.arange(BLOCK)
    causal_CC = (index * BLOCK + order_C)[:, None] >= (other * BLOCK + order_C)[None]
    seen_CC = causal_CC & (segments_XC[index][:, None] == segments_XC[other][None])
    scores = _product("kgch,kth->kgct", q_KGCH, k_KCH) * q_KGCH.shape[-1] ** -0.5
    return jnp.where(seen_CC, scores, LOWEST)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of operands that keep their dtype, summed in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
