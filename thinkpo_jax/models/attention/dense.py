"""Attention with the full score matrix, and the type `TokenPositions`."""

from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION_OUTPUT = "attended"  # the name of attention outputs in remat policies


class TokenPositions(NamedTuple):
    """The segment of each token (0 is padding) and its position in that segment.

    `segment_lengths` counts the tokens of segments 1 to M (0: no such segment). Only the `cudnn` kernel needs it.
    """

    segment_ids: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32
    segment_lengths: jax.Array | None = None  # [B, M] int32


def dense_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries: TokenPositions, keys: TokenPositions
) -> jax.Array:
    """Computes causal attention within segments for queries and keys in any order. Memory grows with T x S.

    Positions count from the start of a segment, so the same mask works for packed rows and for a KV cache.
    """
    same_segment = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    not_later = keys.positions[:, None, :] <= queries.positions[:, :, None]
    mask_B1TS = (same_segment & not_later)[:, None]
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, implementation="xla")
    return checkpoint_name(out_BTNH, ATTENTION_OUTPUT)
