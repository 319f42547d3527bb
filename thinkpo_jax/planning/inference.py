"""Compiles the decode step of an evaluation for devices that are not attached, and reads its memory and collectives.

The step is that of the inference engine, with weights and a KV cache as large as the engine would make them. This file,
run as a program, compiles it in its own process, as compile.py does for training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.inference_model import (
    abstract_pool,
    accelerator_cache_bytes,
    count_pages,
    inference_mesh,
    make_program_spec,
)
from thinkpo_jax.inference.programs import SLOT_AXES, ProgramSpec, Slots, decode_chunk
from thinkpo_jax.inference.sampling import SamplingFilters, SamplingValues
from thinkpo_jax.inference.token_generation import count_group_slots, table_width
from thinkpo_jax.inference.weights import InferenceWeights, abstract_weights
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.paged import PAGE_SIZE
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import resolve_architecture
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.planning.compile import compile_into, dump_program
from thinkpo_jax.planning.estimates import (
    ACHIEVABLE_BANDWIDTH,
    ACHIEVABLE_NETWORK,
    ACHIEVABLE_PEAK,
    TimeBounds,
    bytes_per_device,
    group_bandwidth,
)
from thinkpo_jax.planning.hlo import Collective, find_loop_collectives
from thinkpo_jax.planning.topology import Topology, parse_topology
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.cli import run_and_exit
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.files import read_json_object
from thinkpo_jax.runtime.integers import ceil_div
from thinkpo_jax.runtime.mesh import num_data_shards
from thinkpo_jax.runtime.sharding import abstract_with_shardings, partition_spec

PROMPT_TOKENS = 256  # that a plan assumes for each prompt
MAX_STOP_TOKENS = 4


@dataclass(frozen=True)
class DecodeShape:
    """The number of slots of a group, of its pages, and of the pages that a slot may hold."""

    slots: int
    pages: int
    table_width: int


@dataclass(frozen=True)
class DecodePlan:
    """The compiled decode step of the engine. Each device group holds all weights, and answers its own requests."""

    kernel: str
    groups: int
    tensor: int  # devices of a group
    slots: int  # of a group
    group_tokens: int  # that the cache of a group holds
    longest: int  # tokens of the longest prompt with its answer
    weight_bytes: int  # of one device, like the two below
    cache_bytes: int
    temporary_bytes: int
    loading_bytes: int  # of one device while the weights are loaded, before there is a cache
    collectives: list[Collective]  # of one step
    bounds: TimeBounds  # of one step. Estimated, not validated on hardware.
    compile_seconds: float

    @property
    def total_bytes(self) -> int:
        """Bytes that the step takes on each device."""
        return self.weight_bytes + self.cache_bytes + self.temporary_bytes

    @property
    def longest_answers(self) -> int:
        """The number of answers of the longest length that the cache of a group holds at once."""
        return self.group_tokens // PAGE_SIZE // ceil_div(self.longest, PAGE_SIZE)

    @property
    def mean_tokens(self) -> int:
        """The mean number of tokens of a prompt with its answer so far, if all answers get as long as they may."""
        return min(self.longest, (PROMPT_TOKENS + self.longest) // 2)

    @property
    def running_answers(self) -> int:
        """The number of answers of mean length that a group generates at once."""
        return min(self.slots, self.group_tokens // self.mean_tokens)


def lower_decode_step(
    weights: InferenceWeights, spec: ProgramSpec, mesh: Mesh, shape: DecodeShape, sampling: SamplingConfig
) -> Any:
    """Lowers `decode_chunk` for abstract weights, and a cache and slots of this shape."""

    def array(shape: tuple[int, ...], axes: tuple[str | None, ...] = (), dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))

    pool = abstract_pool(spec, mesh, shape.pages)
    pools = tuple((pool, pool) for _ in weights.layers)
    num_slots = num_data_shards(mesh) * shape.slots
    columns = {"pages": (shape.table_width,), "keys": (2,)}
    slots = Slots(
        *(
            array((num_slots, *columns.get(name, ())), axes, jnp.uint32 if name == "keys" else jnp.int32)
            for name, axes in zip(Slots._fields, SLOT_AXES, strict=True)
        )
    )
    values = SamplingValues(*(array((), dtype=jnp.float32) for _ in SamplingValues._fields))
    controls = (values, array((MAX_STOP_TOKENS,)), array(()))
    with jax.set_mesh(mesh):
        return decode_chunk.lower(weights, pools, slots, controls, spec=spec, filters=SamplingFilters.of(sampling))


def plan_decode_step(config: RunConfig, topology: Topology) -> DecodePlan:
    """Compiles the decode step of a run's evaluation in its own process.

    Raises `RunError` if weights and cache do not fit, and `UserError` if the step cannot be compiled.
    """
    arch = resolve_architecture(config.model)
    request = {"config": config.model_dump(mode="json")}
    dump = dump_program("thinkpo_jax.planning.inference", request, topology)
    known = dump.known
    collectives = find_loop_collectives(dump.program, topology.size)
    unread_bytes, temporary = known.pop("unread_bytes"), dump.total - known["weight_bytes"] - known["cache_bytes"]
    plan = DecodePlan(
        **known, temporary_bytes=temporary, collectives=collectives, bounds=TimeBounds(0, 0, 0),
        compile_seconds=dump.compile_seconds,
    )  # fmt: skip
    return replace(plan, bounds=_estimate_step(plan, arch, config.compute, topology, plan.weight_bytes - unread_bytes))


def _estimate_step(
    plan: DecodePlan, arch: Architecture, compute: ComputeConfig, topology: Topology, weight_bytes: int
) -> TimeBounds:
    """Estimates the seconds of a decode step by each bound. A device reads `weight_bytes` of its weights."""
    device, answers = topology.device, plan.running_answers
    token_bytes = plan.cache_bytes / (plan.group_tokens + PAGE_SIZE)
    memory_traffic = weight_bytes + answers * plan.mean_tokens * token_bytes
    weights = weight_bytes / jnp.dtype(compute.dtype).itemsize
    scores = 2 * arch.num_layers * arch.num_heads * arch.head_dim * plan.mean_tokens / plan.tensor
    flops = 2 * (plan.slots * weights + answers * scores)
    network = sum(
        each.bytes_received * each.num_executions / group_bandwidth(each.device_group, topology)
        for each in plan.collectives
    )
    return TimeBounds(
        flops / (device.peak * ACHIEVABLE_PEAK),
        memory_traffic / (device.bandwidth * ACHIEVABLE_BANDWIDTH),
        network / ACHIEVABLE_NETWORK,
    )


def _lower_evaluation(config: RunConfig, topology: Topology) -> tuple[Any, dict[str, Any]]:
    """Lowers the decode step of the evaluation. Returns it with what is known before it is compiled.

    Raises `UserError` if the weights or two pages of the cache do not fit.
    """
    assert config.evaluation is not None
    arch, sampling, local = resolve_architecture(config.model), config.evaluation.sampling, config.evaluation.local
    mesh = inference_mesh(arch, config.compute, topology.devices(), topology.memory)
    groups = num_data_shards(mesh)
    spec = make_program_spec(arch, config.compute, mesh, vocab_size=arch.vocab_size)
    weights = abstract_weights(arch, config.compute, mesh)
    weight_bytes = bytes_per_device(weights)
    loaded = abstract_with_shardings(abstract_model(arch, config.compute, config.compute.dtype), mesh)
    default = accelerator_cache_bytes(topology.memory, weight_bytes)
    pages = count_pages(default if local.cache_memory is None else int(local.cache_memory * GIB), spec, mesh)
    group_tokens = (pages - 1) * PAGE_SIZE
    longest = min(PROMPT_TOKENS + sampling.max_new_tokens, arch.max_positions, group_tokens)
    slots = count_group_slots(local.slots, groups)
    shape = DecodeShape(slots, pages, table_width(ceil_div(longest, PAGE_SIZE)))
    known = {
        "kernel": spec.decode_kernel,
        "groups": groups,
        "tensor": mesh.shape["tensor"],
        "slots": slots,
        "group_tokens": group_tokens,
        "longest": longest,
        "weight_bytes": weight_bytes,
        "cache_bytes": 2 * arch.num_layers * bytes_per_device(abstract_pool(spec, mesh, pages)),
        # The engine converts the weights while it holds them in the layout of training.
        "loading_bytes": bytes_per_device(loaded) + weight_bytes,
        # A step reads few rows of an embedding that is not the head too.
        "unread_bytes": 0 if weights.head is None else bytes_per_device(weights.embedding),
    }
    return lower_decode_step(weights, spec, mesh, shape, sampling), known


def main(arguments: Sequence[str]) -> None:
    """Compiles the program of a request in a folder. See `plan_decode_step`."""
    folder = Path(arguments[0])
    request = read_json_object(folder / "request.json")
    config = parse_config(RunConfig, request["config"], source="config")
    try:
        lowered, known = _lower_evaluation(config, parse_topology(request["topology"]))
    except UserError as error:
        (folder / "problem").write_text(str(error), encoding="utf-8")
        return
    compile_into(folder, lowered, known)


if __name__ == "__main__":
    run_and_exit(main)
