"""Builds the device mesh and says which shards this process holds."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from thinkpo_jax.runtime.config import ConfigSection, UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")  # the last one lies on neighbours: it talks most


class MeshConfig(ConfigSection):
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


def num_data_shards(mesh: Mesh) -> int:
    """In how many parts the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_data_shards(mesh: Mesh) -> list[int]:
    """Which parts of the batch axis the devices of this process hold."""
    local = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
    by_shard = local.reshape(num_data_shards(mesh), -1)  # data and fsdp are the first axes
    return np.flatnonzero(by_shard.any(axis=1)).tolist()
