"""Puts batches on the devices one update ahead, so that no update waits for its transfer."""

import time
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import Mesh

from thinkpo_jax.data.batches import DeviceBatch, HostBatch
from thinkpo_jax.runtime.sharding import put_batch


class PlacedBatch(NamedTuple):
    """The batch of one update, on the host and on the mesh."""

    host: HostBatch
    device: DeviceBatch
    data_seconds: float  # how long the loop waited until the batch was built


def place_ahead(batches: Iterator[HostBatch], mesh: Mesh) -> Iterator[PlacedBatch]:
    """Yields each batch after the transfer of the next one has started.

    The transfers run in the background. The caller's thread starts them, so all processes start them in the same order.
    """
    ready: PlacedBatch | None = None
    began = time.monotonic()
    for host in batches:
        data_seconds = time.monotonic() - began
        placed = PlacedBatch(host, put_batch(host, mesh), data_seconds)
        if ready is not None:
            yield ready
        ready, began = placed, time.monotonic()
    if ready is not None:
        yield ready
