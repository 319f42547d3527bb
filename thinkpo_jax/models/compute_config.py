"""Dtype, remat policy and attention kernel of a run."""

from collections.abc import Sequence
from typing import Literal

from jax.sharding import Mesh

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.dispatch import AttentionKernel, select_kernel
from thinkpo_jax.runtime.config import ConfigSection


class ComputeConfig(ConfigSection):
    """How the network is computed. Nothing here changes what the network is.

    `attention` selects the attention kernel (attention/dispatch.py). `auto` takes the kernel made for the devices.
    `remat` trades FLOPs for memory. The backward pass recomputes what a layer does not save beside its input:

    | `remat`       | saved per layer                                                                          |
    |---------------|------------------------------------------------------------------------------------------|
    | `none`        | all intermediates                                                                        |
    | `projections` | outputs of projections and attention, so no product with a weight matrix is recomputed   |
    | `attention`   | the output of attention                                                                  |
    | `full`        | nothing                                                                                  |
    | `offload`     | in host memory: the input and the outputs of the q, k, v, o projections and of attention  |
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "projections", "attention", "full", "offload"] = "none"
    attention: AttentionKernel = "auto"


def resolve_attention_kernel(
    compute: ComputeConfig, arch: Architecture, mesh: Mesh, lengths: Sequence[int]
) -> ComputeConfig:
    """Returns `compute` with the attention kernel that runs on this mesh for rows of these lengths (in tokens)."""
    options = {"dtype": compute.dtype, "head_dim": arch.head_dim, "context": mesh.shape["context"], "lengths": lengths}
    return compute.model_copy(update={"attention": select_kernel(compute.attention, mesh.devices.flat[0], **options)})


def describe_compute(compute: ComputeConfig, mesh: Mesh) -> str:
    """Returns a line for the log with the attention kernel, the devices and the mesh."""
    device_kind = mesh.devices.flat[0].device_kind
    return f"attention: {compute.attention}, devices: {mesh.size} x {device_kind}, mesh: {dict(mesh.shape)}"
