"""Splits a row over devices in zigzag order and gathers it again."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.integers import round_up
from thinkpo_jax.runtime.sharding import constrain_sharding, split_mesh_axes

# The `context` axis also splits the slots for loss tokens. A row has a multiple of 128 slots, so every power of two up
# to 128 divides them. TPUs also compute 128 slots at once.
MAX_CONTEXT_PARALLELISM = 128


def check_row_divides_context(mesh: Mesh, length: int, key: str) -> None:
    """Raises `UserError` if the context axis does not divide rows of `length` tokens, which `key` configures."""
    parts = mesh.shape["context"]
    if MAX_CONTEXT_PARALLELISM % parts:
        raise UserError(f"mesh: context is {parts}; it must be a power of two, at most {MAX_CONTEXT_PARALLELISM}.")
    if parts > 1 and length % (2 * parts):
        raise UserError(
            f"{key} is {length}, which context: {parts} does not divide into two chunks per device. Set {key} to a "
            f"multiple of {2 * parts}, for example {round_up(length, 2 * parts)}, or mesh.context to 1."
        )


def to_zigzag_order(x_BT: jax.Array) -> jax.Array:
    """Reorders rows [B, T, ...] to the order in which the devices of the context axis hold their chunks."""
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in split_mesh_axes("length"))
    if parts == 1:
        return x_BT
    chunks = x_BT.reshape(len(x_BT), 2 * parts, -1, *x_BT.shape[2:])
    pairs = jnp.stack([chunks[:, :parts], chunks[:, : parts - 1 : -1]], axis=2)
    return constrain_sharding(pairs.reshape(x_BT.shape), ("batch", "length") + (None,) * (x_BT.ndim - 2))


def all_gather_rows(x_BT: jax.Array) -> jax.Array:
    """Inside `shard_map_by_axes`: gathers rows [B, T, ...] in their original order from the chunks of all devices."""
    axes = split_mesh_axes("length")
    if not axes:
        return x_BT
    x = jax.lax.all_gather(x_BT, axes, axis=1)
    x = x.reshape(*x.shape[:2], 2, -1, *x.shape[3:])
    ordered = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
    return ordered.reshape(len(x), -1, *x.shape[4:])


def local_chunk_starts(length: int) -> jax.Array:
    """Inside `shard_map_by_axes`: returns where this device's chunks start in rows of `length` tokens, ascending."""
    axes = split_mesh_axes("length")
    if not axes:
        return jnp.zeros(1, jnp.int32)
    chunks, index = 2 * jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    return jnp.array([index, chunks - 1 - index]) * (length // chunks)
