"""Dtype, remat policy and attention kernel of a run."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.dense import ATTENTION_OUTPUT
from thinkpo_jax.models.attention.dispatch import AttentionKernel, select_kernel
from thinkpo_jax.runtime.config import ConfigSection

# By which remat policies name a layer's input, and what weights give: those of attention, gate and up.
LAYER_INPUT, PROJECTION_OUTPUT, MLP_PROJECTION_OUTPUT = "input", "projected", "gated"
# What each policy keeps of a layer for the backward pass, beside the layer's input; the rest is computed again.
SAVED_NAMES_BY_REMAT_POLICY: dict[str, tuple[str, ...]] = {
    "projections": (PROJECTION_OUTPUT, MLP_PROJECTION_OUTPUT, ATTENTION_OUTPUT),
    "attention": (ATTENTION_OUTPUT,),
    "full": (),
}
OFFLOADED_NAMES = (
    LAYER_INPUT,
    PROJECTION_OUTPUT,
    ATTENTION_OUTPUT,
)  # by the policy `offload`, to the memory of the host


class ComputeConfig(ConfigSection):
    """How the network is computed; none of it changes what the network is.

    `remat` trades memory for operations: `none` keeps every intermediate of the layers, `projections` what weights and
    attention give (no product with a weight is computed twice), `attention` its output alone, `full` nothing.
    `offload` keeps in the memory of the host what `projections` keeps, gate and up left out, and the layer's input.

    `attention` says which kernel attends (attention.py), by default the one that is made for the devices.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "projections", "attention", "full", "offload"] = "none"
    attention: AttentionKernel = "auto"


def resolve_attention_kernel(
    compute: ComputeConfig, arch: Architecture, mesh: Mesh, lengths: Sequence[int]
) -> ComputeConfig:
    """The same with the form of attention that the devices of the mesh take for rows of these lengths."""
    options = {"dtype": compute.dtype, "head_dim": arch.head_dim, "context": mesh.shape["context"], "lengths": lengths}
    return compute.model_copy(update={"attention": select_kernel(compute.attention, mesh.devices.flat[0], **options)})


def describe_compute(compute: ComputeConfig, mesh: Mesh) -> str:
    """Which form of attention computes on what, for the log."""
    kind = mesh.devices.flat[0].device_kind
    return f"attention: {compute.attention}; {mesh.size} x {kind}, mesh {dict(mesh.shape)}"


def remat_policy(remat: str) -> Callable[..., Any]:
    """What the backward pass keeps of a layer."""
    policies = jax.checkpoint_policies
    if remat != "offload":
        return policies.save_only_these_names(*SAVED_NAMES_BY_REMAT_POLICY[remat])
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(OFFLOADED_NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    )
