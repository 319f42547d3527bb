"""Estimates memory, FLOPs, collectives and time of a training step by arithmetic, without a compiler.

Sizes of parameters, optimizer state and batches are exact. The rest is estimated: it rules out layouts that cannot fit
and picks those that are worth compiling. No time was validated on hardware.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from thinkpo_jax.data.batches import BatchConfig, BatchWork, micro_batch_shape
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.planning.hlo import Collective
from thinkpo_jax.planning.topology import GPUS_PER_HOST, Topology
from thinkpo_jax.runtime.mesh import MESH_AXES, MeshConfig
from thinkpo_jax.runtime.sharding import partition_spec
from thinkpo_jax.training.optimizer import make_optimizer
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.throughput import FlopCount, count_update_flops
from thinkpo_jax.training.token_log_probs import MAX_BLOCK_LOGITS
from thinkpo_jax.training.train_step import TrainState, abstract_train_state

# The fractions of the published rates that a program is assumed to reach. None is measured.
ACHIEVABLE_PEAK, ACHIEVABLE_BANDWIDTH, ACHIEVABLE_NETWORK = 0.6, 0.8, 0.7
ASSUMED_UPDATES = 1000  # of a stage whose length depends on data. It changes no shape.


class BatchShape(NamedTuple):
    """The shape of a batch: micro-batches, rows per micro-batch, tokens per row."""

    num_micro_batches: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Token slots of an update, padding included."""
        return math.prod(self)


def max_rows_per_update(batch: BatchConfig) -> int:
    """Returns the most rows that an update can have: `rows`, or one for each of `size` examples."""
    return batch.rows or batch.size or 0  # One of the two is set.


def batch_shape(batch: BatchConfig, num_shards: int) -> BatchShape:
    """Returns the largest shape that a stage's batches can have: every example fills a row."""
    return BatchShape(*micro_batch_shape(max_rows_per_update(batch), batch, num_shards), batch.row_length)


def abstract_mesh(sizes: MeshConfig) -> Any:
    """Returns a mesh of these sizes without devices. No size may be -1."""
    return AbstractMesh(tuple(sizes.model_dump()[axis] for axis in MESH_AXES), MESH_AXES)


def abstract_state(arch: Architecture, compute: ComputeConfig, stage: StageConfig, mesh: Any) -> TrainState:
    """Returns the train state of a stage with shapes and shardings in place of arrays.

    On a mesh of devices, `make_train_step` can be lowered with it. Raises `UserError` if the mesh does not fit.
    """
    optimizer = make_optimizer(stage.optimizer, stage.steps or ASSUMED_UPDATES)
    return abstract_train_state(abstract_model(arch, compute), optimizer, mesh)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that the arrays of an abstract tree take on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


class DeviceMemory(NamedTuple):
    """Bytes on one device."""

    parameters: int
    optimizer: int
    temporary: int

    @property
    def total(self) -> int:
        """The sum of all three."""
        return sum(self)


def tokens_per_device(shape: BatchShape, mesh: Mesh | AbstractMesh) -> int:
    """Returns the tokens of a micro-batch that one device holds."""
    sharding = NamedSharding(mesh, partition_spec(("batch", "length")))
    return math.prod(sharding.shard_shape((shape.rows, shape.length)))


def state_memory(state: TrainState) -> DeviceMemory:
    """Returns the exact memory of an abstract train state, with no temporary memory."""
    parameters = bytes_per_device(state.model)
    return DeviceMemory(parameters, bytes_per_device(state) - parameters, 0)


def estimated_memory(
    arch: Architecture, compute: ComputeConfig, shape: BatchShape, mesh: Mesh | AbstractMesh, state: DeviceMemory
) -> DeviceMemory:
    """Adds the estimated temporary memory of an update to its `state_memory`.

    It sums the float32 gradients, the activations that the remat policy saves, and the buffers of one layer, of the
    embedding table and of the head.
    """
    tokens, num_shards = tokens_per_device(shape, mesh), mesh.shape["tensor"]
    width, D, F = jnp.dtype(compute.dtype).itemsize, arch.hidden_size, arch.mlp_size // num_shards
    queries = arch.num_heads * arch.head_dim // num_shards
    qkv = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim // num_shards
    # Numbers that each layer saves per token.
    saved = {"full": D, "offload": 0, "attention": D + queries, "projections": 2 * D + queries + qkv + 2 * F}
    saved["none"] = saved["projections"] + 4 * D + queries + qkv + 3 * F
    activations = arch.num_layers * tokens * width * saved[compute.remat]
    weights = (2 * D * (arch.num_heads + arch.num_kv_heads) * arch.head_dim + 3 * D * arch.mlp_size) // num_shards
    layer = 4 * width * weights + tokens * width * (saved["none"] + 2 * F + 4 * queries)
    table = width * arch.vocab_size * D
    ends = 2 * table + 3 * table // num_shards + tokens * D * 8 + 6 * MAX_BLOCK_LOGITS
    return state._replace(temporary=state.parameters + activations + layer + ends)


def max_update_flops(arch: Architecture, compute: ComputeConfig, shape: BatchShape) -> FlopCount:
    """Returns the FLOPs of the most expensive update: each row is one segment, and all of its tokens are trained."""
    tokens, length = shape.tokens, shape.length
    return count_update_flops(arch, compute, BatchWork(tokens, tokens * (length + 1) // 2, loss_tokens=tokens))


def estimated_collectives(
    arch: Architecture, compute: ComputeConfig, shape: BatchShape, mesh: Mesh | AbstractMesh
) -> list[Collective]:
    """Estimates the collectives of an update, in the form in which `find_collectives` reads them from a program."""
    width, num_micro_batches = jnp.dtype(compute.dtype).itemsize, shape.num_micro_batches
    weights = width * parameter_count(arch) / mesh.shape["tensor"]
    tokens, num_shards = tokens_per_device(shape, mesh), mesh.shape["fsdp"] * mesh.shape["context"]
    keys = 2 * width * tokens * mesh.shape["context"] * arch.num_kv_heads * arch.head_dim / mesh.shape["tensor"]
    activations, num_layers = 2 * width * tokens * arch.hidden_size, arch.num_layers * num_micro_batches
    collectives = (  # kind, bytes of the whole array, executions, devices
        ("all-gather", weights, 2 * num_micro_batches, num_shards),
        ("reduce-scatter", weights, num_micro_batches, num_shards),
        ("all-reduce", 2 * weights / num_shards, num_micro_batches, mesh.shape["data"]),
        ("all-reduce", activations, 4 * num_layers, mesh.shape["tensor"]),
        ("all-gather", keys, 2 * num_layers, mesh.shape["context"]),
        ("reduce-scatter", keys, num_layers, mesh.shape["context"]),
    )
    return [
        Collective(kind, size * (num_devices - 1) / num_devices, num_executions, tuple(range(num_devices)))
        for kind, size, num_executions, num_devices in collectives
        if num_devices > 1
    ]


class TimeBounds(NamedTuple):
    """Seconds that an update would take if only this limited it."""

    compute: float
    memory: float
    network: float


@functools.cache
def parameter_count(arch: Architecture) -> int:
    """Returns the number of parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(arch, ComputeConfig())))


def estimated_seconds(
    arch: Architecture,
    compute: ComputeConfig,
    shape: BatchShape,
    *,
    mesh: Mapping[str, int],
    collectives: Iterable[Collective],
    topology: Topology,
    forward_only: bool = False,
) -> TimeBounds:
    """Estimates the time of an update, or of a forward pass over its batch, by each of the three bounds."""
    device, width, weights = topology.device, jnp.dtype(compute.dtype).itemsize, parameter_count(arch)
    flops = max_update_flops(arch, compute, shape)
    flops_per_device = (flops.model / 3 if forward_only else flops.hardware) / topology.size
    # A micro-batch reads the weights in the forward pass, for both gradients, and again to recompute layers.
    reads = 1 if forward_only else 4 if compute.remat in ("attention", "full") else 3
    layer_width = 2 * arch.hidden_size + 3 * arch.mlp_size + 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim
    activations = reads * 2 * width * arch.num_layers * layer_width * shape.tokens / topology.size
    memory_traffic = activations + shape.num_micro_batches * reads * width * weights / mesh["tensor"]
    if not forward_only:
        # Each micro-batch adds to float32 gradients. The optimizer reads and writes weights, gradients and moments.
        state_shard = 4 * weights / (mesh["fsdp"] * mesh["context"] * mesh["tensor"])
        memory_traffic += (2 * shape.num_micro_batches + 7) * state_shard
    network_seconds = sum(
        collective.bytes_received * collective.num_executions / group_bandwidth(collective.device_group, topology)
        for collective in collectives
    )
    return TimeBounds(
        flops_per_device / (device.peak * ACHIEVABLE_PEAK),
        memory_traffic / (device.bandwidth * ACHIEVABLE_BANDWIDTH),
        network_seconds / ACHIEVABLE_NETWORK,
    )


def group_bandwidth(group: tuple[int, ...], topology: Topology) -> float:
    """Returns bytes per second that each device of a group receives. GPUs of a host share its links to other hosts."""
    device = topology.device
    hosts = {member // GPUS_PER_HOST for member in group}
    if device.gpu is None or len(hosts) < 2:
        return device.interconnect_bandwidth
    return min(device.interconnect_bandwidth, device.gpu.network * len(group) / len(hosts))
