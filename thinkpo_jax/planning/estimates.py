"""What does a stage ask of each device, by arithmetic alone? Memory, operations, exchanges, and from them a time.

Nothing is compiled here. Sizes of parameters, moments and batches are exact; the rest is an estimate, good enough to
leave out what cannot fit and to choose what is worth compiling.
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
from thinkpo_jax.training import train_step as step
from thinkpo_jax.training.optimizer import make_optimizer
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.throughput import FlopCount, count_update_flops
from thinkpo_jax.training.token_log_probs import MAX_BLOCK_LOGITS
from thinkpo_jax.training.train_step import TrainState

# What of the published rates a program is taken to reach.
ACHIEVABLE_PEAK, ACHIEVABLE_BANDWIDTH, ACHIEVABLE_NETWORK = 0.6, 0.8, 0.7
ASSUMED_UPDATES = 1000  # of a stage whose length depends on data; it changes no shape


class BatchShape(NamedTuple):
    """Of a batch: micro-batches of rows, and the tokens of a row."""

    num_micro_batches: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Places for tokens in an update."""
        return math.prod(self)


def max_rows_per_update(batch: BatchConfig) -> int:
    """The most rows that an update can have: `rows`, or one for each of `size` examples."""
    found = batch.rows or batch.size
    assert found is not None
    return found


def batch_shape(batch: BatchConfig, shards: int) -> BatchShape:
    """The shape of a stage's batches where every example fills a row of its own: no data needs more."""
    return BatchShape(*micro_batch_shape(max_rows_per_update(batch), batch, shards), batch.row_length)


def abstract_mesh(sizes: MeshConfig) -> Any:
    """A mesh of these sizes, none of them -1, without devices."""
    return AbstractMesh(tuple(sizes.model_dump()[axis] for axis in MESH_AXES), MESH_AXES)


def abstract_state(arch: Architecture, compute: ComputeConfig, stage: StageConfig, mesh: Any) -> TrainState:
    """The state of a stage with shapes and layouts in place of arrays. Raises `UserError` where the mesh does not fit.

    With a mesh of devices it is what `step.make_step` is lowered with.
    """
    optimizer = make_optimizer(stage.optimizer, stage.steps or ASSUMED_UPDATES)
    return step.abstract_train_state(abstract_model(arch, compute), optimizer, mesh)


def bytes_per_device(tree: Any) -> int:
    """What the arrays of an abstract tree take of each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


class DeviceMemory(NamedTuple):
    """Bytes of one device."""

    parameters: int
    optimizer: int
    temporary: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def tokens_per_device(shape: BatchShape, mesh: Mesh | AbstractMesh) -> int:
    """Tokens of a micro-batch that one device holds."""
    layout = NamedSharding(mesh, partition_spec(("batch", "length")))
    return math.prod(layout.shard_shape((shape.rows, shape.length)))


def state_memory(state: TrainState) -> DeviceMemory:
    """What an abstract state takes, exactly, and nothing temporary yet."""
    parameters = bytes_per_device(state.model)
    return DeviceMemory(parameters, bytes_per_device(state) - parameters, 0)


def estimated_memory(
    arch: Architecture, compute: ComputeConfig, shape: BatchShape, mesh: Mesh | AbstractMesh, state: DeviceMemory
) -> DeviceMemory:
    """About what an update takes of each device, beside its `state_memory`.

    That is float32 gradients, what the backward pass needs of every layer, and the greater of one layer's work and that
    of both ends of the model (the table of embeddings and the head).
    """
    tokens, parts = tokens_per_device(shape, mesh), mesh.shape["tensor"]
    width, D, F = jnp.dtype(compute.dtype).itemsize, arch.hidden_size, arch.mlp_size // parts
    heads, projected = (
        count * arch.head_dim // parts for count in (arch.num_heads, arch.num_heads + 2 * arch.num_kv_heads)
    )
    kept = {"full": D, "offload": 0, "attention": D + heads, "projections": 2 * D + heads + projected + 2 * F}
    kept["none"] = kept["projections"] + 4 * D + heads + projected + 3 * F
    layers = arch.num_layers * tokens * width * kept[compute.remat]
    weights = (2 * D * (arch.num_heads + arch.num_kv_heads) * arch.head_dim + 3 * D * arch.mlp_size) // parts
    layer = 4 * width * weights + tokens * width * (kept["none"] + 2 * F + 4 * heads)
    table = width * arch.vocab_size * D
    ends = 2 * table + 3 * table // parts + tokens * D * 8 + 6 * MAX_BLOCK_LOGITS
    return state._replace(temporary=state.parameters + layers + max(layer, 0) + ends)


def max_update_flops(arch: Architecture, compute: ComputeConfig, shape: BatchShape) -> FlopCount:
    """Of an update whose rows are full, each of one segment, all of it trained: the most that data can ask for."""
    rows, length = shape.num_micro_batches * shape.rows, shape.length
    work = BatchWork(tokens=rows * length, attention_pairs=rows * length * (length + 1) // 2, loss_tokens=rows * length)
    return count_update_flops(arch, compute, work)


def estimated_exchanges(
    arch: Architecture, compute: ComputeConfig, shape: BatchShape, mesh: Mesh | AbstractMesh
) -> list[Collective]:
    """About what devices exchange in an update, as `hlo.exchanges` tells it of a compiled program."""
    width, micro_batches = jnp.dtype(compute.dtype).itemsize, shape.num_micro_batches
    weights = width * parameter_count(arch) / mesh.shape["tensor"]
    tokens, shared = tokens_per_device(shape, mesh), mesh.shape["fsdp"] * mesh.shape["context"]
    keys = 2 * width * tokens * mesh.shape["context"] * arch.num_kv_heads * arch.head_dim / mesh.shape["tensor"]
    found: list[Collective] = []

    def add(kind: str, received: float, times: int, members: int) -> None:
        if members > 1:
            found.append(Collective(kind, received * (members - 1) / members, times, tuple(range(members))))

    add("all-gather", weights, 2 * micro_batches, shared)
    add("reduce-scatter", weights, micro_batches, shared)
    add("all-reduce", 2 * weights / shared, micro_batches, mesh.shape["data"])
    add("all-reduce", 2 * width * tokens * arch.hidden_size, 4 * arch.num_layers * micro_batches, mesh.shape["tensor"])
    add("all-gather", keys, 2 * arch.num_layers * micro_batches, mesh.shape["context"])
    add("reduce-scatter", keys, arch.num_layers * micro_batches, mesh.shape["context"])
    return found


class TimeBounds(NamedTuple):
    """How long an update takes if one thing alone bounds it."""

    compute: float
    memory: float
    network: float


@functools.cache
def parameter_count(arch: Architecture) -> int:
    """How many parameters a model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(arch, ComputeConfig())))


def estimated_seconds(
    arch: Architecture,
    compute: ComputeConfig,
    shape: BatchShape,
    *,
    mesh: Mapping[str, int],
    exchanges: Iterable[Collective],
    topology: Topology,
    forward_only: bool = False,
) -> TimeBounds:
    """An estimate of the time of an update, or of a pass over its batch, by what bounds it."""
    device, width, weights = topology.device, jnp.dtype(compute.dtype).itemsize, parameter_count(arch)
    work = max_update_flops(arch, compute, shape)
    needed = (work.model / 3 if forward_only else work.hardware) / topology.size
    # A micro-batch reads the weights: forward, for both gradients, and again where layers are computed again.
    reads = 1 if forward_only else 4 if compute.remat in ("attention", "full") else 3
    inner = 2 * arch.hidden_size + 3 * arch.mlp_size + 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim
    activations = reads * 2 * width * arch.num_layers * inner * shape.tokens / topology.size
    moved = activations + shape.num_micro_batches * reads * width * weights / mesh["tensor"]
    if not forward_only:
        # It adds to float32 gradients; the update reads and writes weights, gradients and both moments.
        own = 4 * weights / (mesh["fsdp"] * mesh["context"] * mesh["tensor"])
        moved += (2 * shape.num_micro_batches + 7) * own
    network = sum(
        found.bytes_received * found.num_executions / group_bandwidth(found.device_group, topology)
        for found in exchanges
    )
    return TimeBounds(
        needed / (device.peak * ACHIEVABLE_PEAK),
        moved / (device.bandwidth * ACHIEVABLE_BANDWIDTH),
        network / ACHIEVABLE_NETWORK,
    )


def group_bandwidth(group: tuple[int, ...], topology: Topology) -> float:
    """Bytes per second that each device of a group receives; between hosts GPUs share what those of a host have."""
    device = topology.device
    hosts = {member // GPUS_PER_HOST for member in group}
    if device.gpu is None or len(hosts) < 2:
        return device.interconnect_bandwidth
    return min(device.interconnect_bandwidth, device.gpu.network * len(group) / len(hosts))
