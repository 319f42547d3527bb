"""Which logical axis lies on which mesh axis? The only file that knows.

Parameters carry the names of their axes as metadata (`nnx.Param(value, axes=("embed", "mlp"))`); the table below maps
them, and with them both Adam moments (which keep the metadata), the activations and the batches.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from thinkpo_jax.config import Section, UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")  # the last one lies on neighbours: it talks most

RULES: dict[str, str | tuple[str, ...] | None] = {
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

# Rows have a multiple of so many slots for trained tokens, which are split like the rows; TPUs compute as many at once.
LARGEST_CONTEXT = 128

BATCH = ("micro_batch", "batch")  # the leading axes of what a batch holds; the others are not split


class MeshConfig(Section):
    """Sizes of the mesh axes; one of them may be -1: what the others leave of the devices.

    `data` splits rows, `fsdp` rows and parameters, `tensor` heads, feed-forward and vocabulary, `context` the tokens of
    a row (and parameters, like fsdp).
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the devices (default: all). Raises `UserError` where the sizes do not fit the device count."""
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:
        raise UserError(f"{error} Install jax for this machine's devices (README), or unset JAX_PLATFORMS.") from None
    sizes = [config.model_dump()[axis] for axis in MESH_AXES]
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
    # An axis may take a part of an axis of a TPU slice's torus.
    laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(laid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


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


def laid_out(tree: Any, mesh: Mesh) -> Any:
    """A tree like `tree` with the shape, dtype and sharding of each array in its place; raises like `shardings`."""

    def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree, shardings(tree, mesh))


def _check_divides(name: str, axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> None:
    for axis, size in zip(axes, shape, strict=True):
        rule = _parts(RULES[axis])
        parts = math.prod(mesh.shape[part] for part in rule)
        if size % parts:
            sizes = " x ".join(f"{part} {mesh.shape[part]}" for part in rule)
            raise UserError(
                f"mesh: parameter {name} has {size} along its axis '{axis}', which the mesh ({sizes}) does not divide. "
                f"Choose a size of {' times '.join(rule)} that divides {size}."
            )


def _parts(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else rule or ()


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`x` laid out by the table, inside a jitted function under `jax.set_mesh`; `x` itself where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def per_device(
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
    out_specs = tuple(map(spec, out_axes)) if isinstance(out_axes[0], tuple) else spec(out_axes)
    return jax.shard_map(function, in_specs=tuple(map(spec, in_axes)), out_specs=out_specs, check_vma=False)


def mesh_axes(*axes: str | None) -> tuple[str, ...]:
    """The mesh axes that logical axes are split over, for collectives; none where there is no mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    found = [part for axis in axes if axis is not None for part in _parts(RULES[axis])]
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


# A row that is split over devices is cut into two chunks for each, and a device has one from each end: under a causal
# mask all of them then attend to about as much.


def check_row_length(mesh: Mesh, length: int, key: str) -> None:
    """Raises `UserError` where the context axis does not divide rows of so many tokens; `key` is what set them."""
    parts = mesh.shape["context"]
    if LARGEST_CONTEXT % parts:
        raise UserError(f"mesh: context is {parts}; it must be a power of two, at most {LARGEST_CONTEXT}.")
    if parts > 1 and length % (2 * parts):
        better = -(-length // (2 * parts)) * 2 * parts
        raise UserError(
            f"{key} is {length}, which context: {parts} does not divide into two chunks for each device. Set {key} to "
            f"a multiple of {2 * parts}, for example {better}, or mesh.context to 1."
        )


def balanced(x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] of rows in their order: as devices along the context axis hold them, one after the other."""
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in mesh_axes("length"))
    if parts == 1:
        return x_BT
    chunks = x_BT.reshape(len(x_BT), 2 * parts, -1, *x_BT.shape[2:])
    both = jnp.stack([chunks[:, :parts], chunks[:, : parts - 1 : -1]], axis=2)
    return constrain(both.reshape(x_BT.shape), ("batch", "length") + (None,) * (x_BT.ndim - 2))


def whole_rows(x_BT: jax.Array) -> jax.Array:
    """Inside `per_device`: rows [B, T, ...] in their order, gathered from the chunks that each device holds."""
    axes = mesh_axes("length")
    if not axes:
        return x_BT
    x = jax.lax.all_gather(x_BT, axes, axis=1)
    x = x.reshape(*x.shape[:2], 2, -1, *x.shape[3:])
    ordered = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
    return ordered.reshape(len(x), -1, *x.shape[4:])


def chunk_starts(length: int) -> jax.Array:
    """Inside `per_device`: where the chunks start that this device holds of rows of `length` tokens; ascending."""
    axes = mesh_axes("length")
    if not axes:
        return jnp.zeros(1, jnp.int32)
    chunks, index = 2 * jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    return jnp.array([index, chunks - 1 - index]) * (length // chunks)


def data_shards(mesh: Mesh) -> int:
    """In how many parts the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def own_shards(mesh: Mesh) -> list[int]:
    """Which parts of the batch axis the devices of this process hold."""
    local = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
    by_shard = local.reshape(data_shards(mesh), -1)  # data and fsdp are the first axes
    return np.flatnonzero(by_shard.any(axis=1)).tolist()


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays [micro_batch, batch, ...] as device arrays, rows split over the data axes."""
    return jax.tree.map(lambda array: put(array, BATCH, mesh), batch)


def put(array: np.ndarray, axes: tuple[str | None, ...], mesh: Mesh) -> jax.Array:
    """A host array on the mesh. Each process reads those parts of its own array that its devices hold."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec(axes)), array.__getitem__)
