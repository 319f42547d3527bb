"""What does a stage ask of each device, by arithmetic alone? Memory, operations, exchanges, and from them a time.

Nothing is compiled here. Sizes of parameters, moments and batches are exact; the rest is an estimate, good enough to
leave out what cannot fit and to choose what is worth compiling.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from thinkpo_jax.architecture import Architecture
from thinkpo_jax.convert import abstract_model
from thinkpo_jax.devices import PER_HOST, Topology
from thinkpo_jax.flops import Operations, Work, update_operations
from thinkpo_jax.hlo import Exchange
from thinkpo_jax.logprobs import LOGITS
from thinkpo_jax.model import ComputeConfig, Transformer
from thinkpo_jax.optimizer import make_optimizer
from thinkpo_jax.packing import BatchConfig
from thinkpo_jax.run import Stage
from thinkpo_jax.sharding import MESH_AXES, MeshConfig, data_shards, shardings, spec
from thinkpo_jax.step import TrainState

# What of the published rates a program is taken to reach.
OF_PEAK, OF_BANDWIDTH, OF_NETWORK = 0.6, 0.8, 0.7
UPDATES = 1000  # of a stage whose length depends on data; it changes no shape


class Shape(NamedTuple):
    """Of a batch: micro-batches of rows, and the tokens of a row."""

    micro_batches: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Places for tokens in an update."""
        return math.prod(self)


def asked_rows(batch: BatchConfig) -> int:
    """The most rows that an update can have: `rows`, or one for each of `size` examples."""
    found = batch.rows or batch.size
    assert found is not None
    return found


def batch_shape(batch: BatchConfig, shards: int) -> Shape:
    """The shape of a stage's batches where every example fills a row of its own: no data needs more."""
    rows = asked_rows(batch)
    at_once = math.ceil(min(rows, (batch.rows_per_device or rows) * shards) / shards) * shards
    return Shape(math.ceil(rows / at_once), at_once, batch.row_length)


def abstract_mesh(sizes: MeshConfig) -> Any:
    """A mesh of these sizes, none of them -1, without devices."""
    return AbstractMesh(tuple(sizes.model_dump()[axis] for axis in MESH_AXES), MESH_AXES)


def abstract_state(arch: Architecture, compute: ComputeConfig, stage: Stage, mesh: Any) -> TrainState:
    """The state of a stage with shapes and layouts in place of arrays. Raises `UserError` where the mesh does not fit.

    With a mesh of devices it is what `step.make_step` is lowered with.
    """
    optimizer = make_optimizer(stage.optimizer, stage.steps or UPDATES)

    def start(model: Transformer) -> TrainState:
        return TrainState(model, optimizer.init(model), jnp.zeros((), jnp.int32))  # pyright: ignore[reportArgumentType] -- a Module is a pytree

    state = jax.eval_shape(start, abstract_model(arch, compute))
    return jax.tree.map(laid_out, state, shardings(state, mesh))


def laid_out(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array with its layout."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def bytes_per_device(tree: Any) -> int:
    """What the arrays of an abstract tree take of each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


class Memory(NamedTuple):
    """Bytes of one device."""

    parameters: int
    optimizer: int
    temporary: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def tokens_per_device(shape: Shape, mesh: Mesh | AbstractMesh) -> int:
    """Tokens of a micro-batch that one device holds."""
    layout = NamedSharding(mesh, spec(("batch", "length")))
    return math.prod(layout.shard_shape((shape.rows, shape.length)))


def estimated_memory(arch: Architecture, compute: ComputeConfig, stage: Stage, mesh: Mesh | AbstractMesh) -> Memory:
    """About what an update takes of each device. Raises `UserError` where the mesh does not fit the model."""
    state = abstract_state(arch, compute, stage, mesh)
    parameters = bytes_per_device(state.model)
    tokens = tokens_per_device(batch_shape(stage.batch, data_shards(mesh)), mesh)  # pyright: ignore[reportArgumentType] -- only sizes are read
    parts = _parts(mesh)
    width, D, F, V = jnp.dtype(compute.dtype).itemsize, arch.embed, arch.mlp // parts, arch.vocab_size
    heads, pairs = arch.heads * arch.head_dim // parts, (arch.heads + 2 * arch.kv_heads) * arch.head_dim // parts
    kept = {"full": D, "attention": D + heads, "projections": 2 * D + heads + pairs + 2 * F}
    kept["none"] = kept["projections"] + 4 * D + heads + pairs + 3 * F
    layers = arch.layers * tokens * width * kept[compute.remat]
    # One layer in the backward pass: its weights and their gradients, and what it computes.
    weights = 2 * D * arch.heads * arch.head_dim + 2 * D * arch.kv_heads * arch.head_dim + 3 * D * arch.mlp
    layer = 3 * width * weights // parts + tokens * width * (kept["none"] + F + 2 * heads)
    ends = width * V * D * (2 + 2 / parts) + 3 * 4 * LOGITS // 2  # the table and the head, gathered, with gradients
    return Memory(parameters, bytes_per_device(state) - parameters, int(parameters + layers + max(layer, 0) + ends))


def _parts(mesh: Mesh | AbstractMesh) -> int:
    """In how many parts the products of a layer are split."""
    return mesh.shape["tensor"]


def operations(arch: Architecture, compute: ComputeConfig, shape: Shape) -> Operations:
    """Of an update whose rows are full, each of one segment, all of it trained: the most that data can ask for."""
    rows, length = shape.micro_batches * shape.rows, shape.length
    work = Work(tokens=rows * length, attended=rows * length * (length + 1) // 2, trained=rows * length)
    return update_operations(arch, compute, work)


def estimated_exchanges(arch: Architecture, shape: Shape, mesh: Mesh | AbstractMesh, width: int) -> list[Exchange]:
    """About what devices exchange in an update, as `hlo.exchanges` tells it of a compiled program."""
    weights = abstract_model(arch, ComputeConfig())
    bytes_gathered = sum(leaf.size for leaf in jax.tree.leaves(weights)) * width / _parts(mesh)
    activations = tokens_per_device(shape, mesh) * arch.embed * width
    found: list[Exchange] = []

    def add(kind: str, received: float, times: int, members: int) -> None:
        if members > 1:
            found.append(Exchange(kind, received * (members - 1) / members, times, tuple(range(members))))

    add("all-gather", bytes_gathered, 2 * shape.micro_batches, mesh.shape["fsdp"])
    add("reduce-scatter", bytes_gathered, shape.micro_batches, mesh.shape["fsdp"])
    add("all-reduce", 2 * bytes_gathered / mesh.shape["fsdp"], shape.micro_batches, mesh.shape["data"])
    add("all-reduce", 2 * activations, 4 * arch.layers * shape.micro_batches, mesh.shape["tensor"])
    return found


class Seconds(NamedTuple):
    """How long an update takes if one thing alone bounds it."""

    compute: float
    memory: float
    network: float


def estimated_seconds(
    arch: Architecture,
    compute: ComputeConfig,
    shape: Shape,
    *,
    parameters: int,
    split: int,
    exchanges: Iterable[Exchange],
    topology: Topology,
) -> Seconds:
    """An estimate of an update's time; `parameters`: bytes per device, `split`: parts of a layer's products."""
    device, width = topology.device, jnp.dtype(compute.dtype).itemsize
    needed = operations(arch, compute, shape).hardware / topology.size
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract_model(arch, compute)))
    # Every micro-batch reads the weights three times (forward, and for both gradients), once more where the layers are
    # computed again, and adds to float32 gradients; the update reads and writes weights, gradients and moments.
    again = 4 if compute.remat in ("attention", "full") else 3
    each = again * width * weights / split + 2 * parameters
    tokens = shape.tokens / topology.size
    inner = 2 * arch.embed + 3 * arch.mlp + 2 * (arch.heads + arch.kv_heads) * arch.head_dim
    moved = shape.micro_batches * each + 7 * parameters + again * 2 * width * arch.layers * tokens * inner
    network = sum(found.received * found.times / bandwidth(found.group, topology) for found in exchanges)
    return Seconds(
        needed / (device.peak * OF_PEAK), moved / (device.bandwidth * OF_BANDWIDTH), network / OF_NETWORK
    )


def bandwidth(group: tuple[int, ...], topology: Topology) -> float:
    """Bytes per second that each device of a group receives; between hosts GPUs share what those of a host have."""
    device = topology.device
    hosts = {member // PER_HOST for member in group}
    if device.gpu is None or len(hosts) < 2:
        return device.network
    return min(device.network, device.gpu.network * len(group) / len(hosts))
