"""Which logical axis lies on which mesh axis? The only file that knows.

Parameters carry the names of their axes as metadata (`nnx.Param(value, axes=("embed", "mlp"))`); the table below maps
them, and with them both Adam moments (which keep the metadata), the activations and the batches.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from thinkpo_jax.runtime.config import UserError

LOGICAL_AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,  # vectors of one width: a few kilobytes, kept whole on every device
    # batches and activations
    "micro_batch": None,
    "batch": ("data", "fsdp"),
    "length": "context",
    "activation_embed": None,
    "activation_heads": "tensor",
    "pair": None,
}


BATCH_AXES = ("micro_batch", "batch")  # the leading axes of what a batch holds; the others are not split


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose logical axes are `axes` (None: not split)."""
    return PartitionSpec(*(None if axis is None else LOGICAL_AXIS_RULES[axis] for axis in axes))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree like `tree` with the sharding of each array.

    `nnx.Param`s, wherever they stand (a model, Adam's moments), follow their axes; other arrays (counters) are whole
    on every device. Raises `UserError` with the parameter's name where a size does not divide.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata()["axes"]
        _check_divides(jax.tree_util.keystr(path, simple=True, separator="."), axes, leaf.get_value().shape, mesh)
        return jax.tree.map(lambda _: NamedSharding(mesh, partition_spec(axes)), leaf)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def abstract_with_shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree like `tree` with the shape, dtype and sharding of each array in its place; raises like `shardings`."""

    def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree, tree_shardings(tree, mesh))


def _check_divides(name: str, axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> None:
    for axis, size in zip(axes, shape, strict=True):
        rule = _parts(LOGICAL_AXIS_RULES[axis])
        parts = math.prod(mesh.shape[part] for part in rule)
        if size % parts:
            sizes = " x ".join(f"{part} {mesh.shape[part]}" for part in rule)
            raise UserError(
                f"mesh: parameter {name} has {size} along its axis '{axis}', which the mesh ({sizes}) does not divide. "
                f"Choose a size of {' times '.join(rule)} that divides {size}."
            )


def _parts(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else rule or ()


def constrain_sharding(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`x` laid out by the table, inside a jitted function under `jax.set_mesh`; `x` itself where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def shard_map_by_axes(
    function: Callable[..., Any],
    in_axes: tuple[tuple[str | None, ...], ...],
    out_axes: Any,
) -> Callable[..., Any]:
    """`function` on each device's parts of its arguments, split by the table; `function` itself where there is no mesh.

    `out_axes` are the axes of its array, or of each where it gives several; an axis that is None is whole on every
    device. Inside, devices exchange what they must along `mesh_axes`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    out_specs = tuple(map(partition_spec, out_axes)) if isinstance(out_axes[0], tuple) else partition_spec(out_axes)
    return jax.shard_map(function, in_specs=tuple(map(partition_spec, in_axes)), out_specs=out_specs, check_vma=False)


def split_mesh_axes(*axes: str | None) -> tuple[str, ...]:
    """The mesh axes that logical axes are split over, for collectives; none where there is no mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    found = [part for axis in axes if axis is not None for part in _parts(LOGICAL_AXIS_RULES[axis])]
    return tuple(part for part in found if sizes.get(part, 1) > 1)


def psum_or_reduce_scatter(x: jax.Array, over: tuple[str | None, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """Inside `per_device`: the sum of all devices' `x` along the logical axes `over`.

    Where an axis of `x`, named by `axes`, lies on the same mesh axis, each device gets its part of the sum.
    """
    left = split_mesh_axes(*over)
    if not left:
        return x
    for dimension, axis in enumerate(axes):
        for part in split_mesh_axes(axis):
            if part in left:
                x = jax.lax.psum_scatter(x, part, scatter_dimension=dimension, tiled=True)
                left = tuple(other for other in left if other != part)
    # Without the barrier XLA adds up whole gradients over micro-batches, in float32, before it sums over devices.
    return jax.lax.optimization_barrier(jax.lax.psum(x, left))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays [micro_batch, batch, ...] as device arrays, rows split over the data axes."""
    return jax.tree.map(lambda array: put_on_mesh(array, BATCH_AXES, mesh), batch)


def put_on_mesh(array: np.ndarray, axes: tuple[str | None, ...], mesh: Mesh) -> jax.Array:
    """A host array on the mesh. Each process reads those parts of its own array that its devices hold."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, partition_spec(axes)), array.__getitem__)
