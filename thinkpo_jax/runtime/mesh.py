"""Builds the device mesh, and says which parts of a batch this process holds."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from thinkpo_jax.runtime.config import ConfigSection, UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")  # `tensor` communicates most, so its devices are neighbors


class MeshConfig(ConfigSection):
    """Sizes of the mesh axes. One of them may be -1: all devices that the others leave.

    `data` splits rows. `fsdp` splits rows and parameters. `tensor` splits attention heads, MLP and vocabulary.
    `context` splits the tokens of a packed row. It also splits parameters and Adam moments, as `fsdp` does.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh over devices (default: all). Raises `UserError` if the sizes do not fit the device count."""
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:
        raise UserError(f"{error} Install jax for this machine's devices (README), or unset JAX_PLATFORMS.") from None
    sizes = [config.model_dump()[axis] for axis in MESH_AXES]
    described = ", ".join(f"{axis}: {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh: {{{described}}}: sizes must be positive, and at most one of them -1.")
    product = math.prod(size for size in sizes if size != -1)
    if len(devices) % product or (-1 not in sizes and product != len(devices)):
        raise UserError(
            f"mesh: {{{described}}} does not fit {len(devices)} {devices[0].platform} device(s): the product of the "
            f"sizes must be {len(devices)}. Set one size to -1 to use all devices that the others leave."
        )
    sizes = [len(devices) // product if size == -1 else size for size in sizes]
    # A mesh axis may take a part of one axis of a TPU slice's torus.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def num_data_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_data_shards(mesh: Mesh) -> list[int]:
    """Returns the indices of the parts of the batch axis that the devices of this process hold."""
    is_local = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
    is_local = is_local.reshape(num_data_shards(mesh), -1)  # data and fsdp are the first axes
    return np.flatnonzero(is_local.any(axis=1)).tolist()
