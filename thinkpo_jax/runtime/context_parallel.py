"""Splits a row over devices in zigzag order and gathers it again."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.sharding import constrain_sharding, split_mesh_axes

# Rows have a multiple of so many slots for trained tokens, which are split like the rows; TPUs compute as many at once.
MAX_CONTEXT_PARALLELISM = 128


def check_row_divides_context(mesh: Mesh, length: int, key: str) -> None:
    """Raises `UserError` where the context axis does not divide rows of so many tokens; `key` is what set them."""
    parts = mesh.shape["context"]
    if MAX_CONTEXT_PARALLELISM % parts:
        raise UserError(f"mesh: context is {parts}; it must be a power of two, at most {MAX_CONTEXT_PARALLELISM}.")
    if parts > 1 and length % (2 * parts):
        better = -(-length // (2 * parts)) * 2 * parts
        raise UserError(
            f"{key} is {length}, which context: {parts} does not divide into two chunks for each device. Set {key} to "
            f"a multiple of {2 * parts}, for example {better}, or mesh.context to 1."
        )


def to_zigzag_order(x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] of rows in their order: as devices along the context axis hold them, one after the other."""
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in split_mesh_axes("length"))
    if parts == 1:
        return x_BT
    chunks = x_BT.reshape(len(x_BT), 2 * parts, -1, *x_BT.shape[2:])
    both = jnp.stack([chunks[:, :parts], chunks[:, : parts - 1 : -1]], axis=2)
    return constrain_sharding(both.reshape(x_BT.shape), ("batch", "length") + (None,) * (x_BT.ndim - 2))


def all_gather_rows(x_BT: jax.Array) -> jax.Array:
    """Inside `per_device`: rows [B, T, ...] in their order, gathered from the chunks that each device holds."""
    axes = split_mesh_axes("length")
    if not axes:
        return x_BT
    x = jax.lax.all_gather(x_BT, axes, axis=1)
    x = x.reshape(*x.shape[:2], 2, -1, *x.shape[3:])
    ordered = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
    return ordered.reshape(len(x), -1, *x.shape[4:])


def local_chunk_starts(length: int) -> jax.Array:
    """Inside `per_device`: where the chunks start that this device holds of rows of `length` tokens; ascending."""
    axes = split_mesh_axes("length")
    if not axes:
        return jnp.zeros(1, jnp.int32)
    chunks, index = 2 * jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    return jnp.array([index, chunks - 1 - index]) * (length // chunks)
