"""Attention with the full score matrix, and the token positions type."""

from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION_OUTPUT = "attended"  # by which remat policies name what attention gives


class TokenPositions(NamedTuple):
    """Where tokens stand: the segment (0 = padding) that each belongs to and its position within the segment.

    `lengths`: the tokens of segments 1 to M of each row, where that is known (0: there is none); the form `cudnn` asks.
    """

    segment_ids: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32
    segment_lengths: jax.Array | None = None  # [B, M] int32


def dense_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries: TokenPositions, keys: TokenPositions
) -> jax.Array:
    """The same for any places of queries and keys, a cache's too: all scores at once, memory grows with T x S.

    Because positions are counted within the segment, one rule serves packed rows and a key/value cache.
    """
    same_segment = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    not_later = keys.positions[:, None, :] <= queries.positions[:, :, None]
    mask_B1TS = (same_segment & not_later)[:, None]
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, implementation="xla")
    return checkpoint_name(out_BTNH, ATTENTION_OUTPUT)
