"""Which logical axis lies on which mesh axis? The only file that knows.

Parameters carry the names of their axes as metadata (`nnx.Param(value, axes=("embed", "mlp"))`); the table below maps
them, and with them both Adam moments (which keep the metadata), the activations and the batches.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from thinkpo_jax.config import Section, UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,  # vectors of one width: a few kilobytes, kept whole on every device
    # batches and activations
    "micro_batch": None,
    "batch": ("data", "fsdp"),
    "length": None,
    "activation_embed": None,
    "activation_heads": "tensor",
    "pair": None,
}


class MeshConfig(Section):
    """Sizes of the mesh axes; one of them may be -1: what the others leave of the devices."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the devices (default: all). Raises `UserError` where the sizes do not fit the device count."""
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:
        raise UserError(f"{error} Install jax for this machine's devices (README), or unset JAX_PLATFORMS.") from None
    sizes = [config.data, config.fsdp, config.tensor]
    shown = ", ".join(f"{axis}: {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh: {{{shown}}}: sizes must be positive, and at most one of them -1.")
    rest = math.prod(size for size in sizes if size != -1)
    if len(devices) % rest or (-1 not in sizes and rest != len(devices)):
        raise UserError(
            f"mesh: {{{shown}}} does not fit {len(devices)} {devices[0].platform} device(s): the product of the sizes "
            f"must be {len(devices)}. Set one size to -1 to let it take what the others leave."
        )
    sizes = [len(devices) // rest if size == -1 else size for size in sizes]
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose logical axes are `axes` (None: not split)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree like `tree` with the sharding of each array.

    `nnx.Param`s, wherever they stand (a model, Adam's moments), follow their axes; other arrays (counters) are whole
    on every device. Raises `UserError` with the parameter's name where a size does not divide.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata()["axes"]
        _check_divides(jax.tree_util.keystr(path, simple=True, separator="."), axes, leaf.get_value().shape, mesh)
        return jax.tree.map(lambda _: NamedSharding(mesh, spec(axes)), leaf)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _check_divides(name: str, axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> None:
    for axis, size in zip(axes, shape, strict=True):
        rule = RULES[axis]
        parts = math.prod(mesh.shape[part] for part in ((rule,) if isinstance(rule, str) else rule or ()))
        if size % parts:
            raise UserError(
                f"mesh: parameter {name} has {size} along its axis '{axis}', which the mesh axis {rule!r} of size "
                f"{parts} does not divide. Choose a size of {rule!r} that divides {size}."
            )


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`x` laid out by the table, inside a jitted function under `jax.set_mesh`; `x` itself where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def per_device(
    function: Callable[..., Any],
    in_axes: tuple[tuple[str | None, ...], ...],
    out_axes: tuple[tuple[str | None, ...], ...],
) -> Callable[..., Any]:
    """`function` on each device's parts of its arguments, split by the table; `function` itself where there is no mesh.

    An axis that is None is whole on every device. Inside, devices exchange what they must along `mesh_axes`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    in_specs, out_specs = tuple(map(spec, in_axes)), tuple(map(spec, out_axes))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mesh_axes(*axes: str | None) -> tuple[str, ...]:
    """The mesh axes that logical axes are split over, for collectives; none where there is no mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    rules = [None if axis is None else RULES[axis] for axis in axes]
    found = [part for rule in rules for part in ((rule,) if isinstance(rule, str) else rule or ())]
    return tuple(part for part in found if sizes.get(part, 1) > 1)


def summed_parts(x: jax.Array, over: tuple[str | None, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """Inside `per_device`: the sum of all devices' `x` along the logical axes `over`.

    Where an axis of `x`, named by `axes`, lies on the same mesh axis, each device gets its part of the sum.
    """
    left = mesh_axes(*over)
    if not left:
        return x
    for dimension, axis in enumerate(axes):
        for part in mesh_axes(axis):
            if part in left:
                x = jax.lax.psum_scatter(x, part, scatter_dimension=dimension, tiled=True)
                left = tuple(other for other in left if other != part)
    # Without the barrier XLA adds up whole gradients over micro-batches, in float32, before it sums over devices.
    return jax.lax.optimization_barrier(jax.lax.psum(x, left))


def data_shards(mesh: Mesh) -> int:
    """In how many parts the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays [micro_batch, batch, ...] as device arrays, rows split over the data axes."""

    def put(array: np.ndarray) -> jax.Array:
        axes = ("micro_batch", "batch") + (None,) * (array.ndim - 2)
        return jax.device_put(array, NamedSharding(mesh, spec(axes)))

    return jax.tree.map(put, batch)
