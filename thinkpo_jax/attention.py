"""Which kernel attends on this device? One signature; today one implementation, XLA's.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head width.
"""

from typing import NamedTuple

import jax


class Places(NamedTuple):
    """Where tokens stand: the segment (0 = padding) that each belongs to and its position within the segment."""

    segments: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries: Places, keys: Places) -> jax.Array:
    """Causal attention within segments, scaled by H**-0.5; returns [B, T, N, H] in the dtype of the queries.

    A query sees the keys of its own segment at positions up to its own. Because positions are counted within the
    segment, the same rule serves packed rows and a key/value cache. Memory grows with T x S.
    """
    same_segment = queries.segments[:, :, None] == keys.segments[:, None, :]
    not_later = keys.positions[:, None, :] <= queries.positions[:, :, None]
    mask_B1TS = (same_segment & not_later)[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, implementation="xla")
