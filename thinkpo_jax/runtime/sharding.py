"""Maps logical axes to mesh axes. Only `mesh.py` repeats a part of it: the mesh axes that split the batch.

A parameter carries the names of its axes as metadata: `nnx.Param(value, axes=("embed", "mlp"))`. Adam's moments keep
that metadata, so the table below covers parameters, optimizer state, activations and batches.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.processes import note_progress

LOGICAL_AXIS_RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),  # a vector has a few kilobytes and is replicated
    # batches and activations
    "micro_batch": (),
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "activation_embed": (),
    "activation_heads": ("tensor",),
    "sampled_slots": ("data", "fsdp", "tensor"),  # of inference, while tokens are drawn
}
BATCH_AXES = ("micro_batch", "batch")  # the leading axes of the arrays of a batch; other axes are not split


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Returns the mesh axes of an array with the logical axes `axes` (None: not split)."""
    return PartitionSpec(*map(_mesh_axes, axes))


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    return () if axis is None else LOGICAL_AXIS_RULES[axis]


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each array of a tree, as a tree of the same structure.

    An `nnx.Param` in a model or in Adam's moments follows its axes. Other arrays, such as counters, are replicated.
    Raises `UserError` with the parameter's name if the mesh does not divide one of its axes.
    """

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata()["axes"]
        _check_divides(jax.tree_util.keystr(path, simple=True, separator="."), axes, leaf.get_value().shape, mesh)
        return jax.tree.map(lambda _: NamedSharding(mesh, partition_spec(axes)), leaf)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def abstract_with_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree with the shape, dtype and sharding of each array. Raises like `tree_shardings`."""

    def abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, tree, tree_shardings(tree, mesh))


def _check_divides(name: str, axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> None:
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = LOGICAL_AXIS_RULES[axis]
        if size % math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes):
            sizes = " x ".join(f"{mesh_axis} {mesh.shape[mesh_axis]}" for mesh_axis in mesh_axes)
            raise UserError(
                f"mesh: parameter {name} has {size} along its axis '{axis}', which the mesh ({sizes}) does not divide. "
                f"Choose a size of {' times '.join(mesh_axes)} that divides {size}."
            )


def constrain_sharding(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Constrains the sharding of `x` in a jitted function under `jax.set_mesh`. Returns `x` if there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def shard_map_by_axes(
    function: Callable[..., Any], in_axes: tuple[tuple[str | None, ...], ...], out_axes: Any
) -> Callable[..., Any]:
    """Returns `function` mapped over the devices' shards of its arguments, or `function` itself if there is no mesh.

    `out_axes` are the axes of the result, or a tuple of axes for each result. An axis of None is replicated.
    `function` communicates over the axes that `split_mesh_axes` returns.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    out_specs = tuple(map(partition_spec, out_axes)) if isinstance(out_axes[0], tuple) else partition_spec(out_axes)
    return jax.shard_map(function, in_specs=tuple(map(partition_spec, in_axes)), out_specs=out_specs, check_vma=False)


def split_mesh_axes(*axes: str | None) -> tuple[str, ...]:
    """Returns the mesh axes over which logical axes are split, for collectives. Empty if there is no mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(mesh_axis for axis in axes for mesh_axis in _mesh_axes(axis) if sizes.get(mesh_axis, 1) > 1)


def num_shards(axis: str) -> int:
    """Returns the number of parts into which the current mesh splits a logical axis. 1 if there is no mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[mesh_axis] for mesh_axis in split_mesh_axes(axis))


def psum_or_reduce_scatter(x: jax.Array, over: tuple[str | None, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """Inside `shard_map_by_axes`: sums `x` over the devices along the logical axes `over`.

    If an axis of `x` (named in `axes`) is split over one of the same mesh axes, each device gets its part of the sum.
    """
    remaining = split_mesh_axes(*over)
    if not remaining:
        return x
    for dimension, axis in enumerate(axes):
        for mesh_axis in split_mesh_axes(axis):
            if mesh_axis in remaining:
                x = jax.lax.psum_scatter(x, mesh_axis, scatter_dimension=dimension, tiled=True)
                remaining = tuple(other for other in remaining if other != mesh_axis)
    # Without the barrier, XLA accumulates full float32 gradients over micro-batches before it sums over devices.
    return jax.lax.optimization_barrier(jax.lax.psum(x, remaining))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts host arrays [micro_batch, batch, ...] on the mesh, with rows split over the data axes."""
    return jax.tree.map(lambda array: put_on_mesh(array, BATCH_AXES, mesh), batch)


def put_on_mesh(array: np.ndarray, axes: tuple[str | None, ...], mesh: Mesh) -> jax.Array:
    """Puts a host array on the mesh. Each process reads only the parts of its array that its devices hold."""
    note_progress()  # Batches of every kind pass here, also in a long validation or probe.
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, partition_spec(axes)), array.__getitem__)
