"""Searches for the fastest layout of a stage on a slice, and for the smallest slice on which it fits.

A layout is a mesh, a remat policy, rows per device and a row length. Arithmetic orders all layouts. Only the most
promising ones are compiled, and only their update, because the reference pass takes less memory.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from thinkpo_jax.data.batches import micro_batch_shape
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.dispatch import splash_multiple
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import resolve_architecture
from thinkpo_jax.planning import estimates
from thinkpo_jax.planning.compile import UPDATE, compile_stage_program
from thinkpo_jax.planning.estimates import BatchShape, DeviceMemory, TimeBounds
from thinkpo_jax.planning.topology import Topology
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.context_parallel import check_row_divides_context
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.mesh import MESH_AXES, MeshConfig, num_data_shards
from thinkpo_jax.training.stage_config import StageConfig

REMAT_POLICIES: tuple[Any, ...] = get_args(ComputeConfig.model_fields["remat"].annotation)
ROW_LENGTH_FACTORS = (1, 2, 4)  # The search tries these multiples of the configured row length.
MAX_COMPILES, NUM_RESULTS = 4, 2  # The search compiles and reports at most so many layouts of each row length.
# A layout is not compiled if its estimate exceeds this fraction of the device memory. Estimates were 0.68 to 1.16 times
# the compiled memory for 39 random layouts of 1.5B, 7B and 14B models on v5e, v6e, v5p and H100 (2026-11-28).
MAX_ESTIMATED_FRACTION = 1.25
TIME_NOTE = "(times are estimates for full rows, not validated on hardware)"


@dataclass(frozen=True)
class LayoutCandidate:
    """A layout of a stage, with its memory and time."""

    mesh: MeshConfig
    remat: str
    rows: int  # per update
    row_length: int
    rows_per_device: int
    memory: DeviceMemory
    bounds: TimeBounds

    @property
    def tokens_per_second(self) -> float:
        """The estimated speed of all devices together."""
        return self.rows * self.row_length / max(self.bounds)

    def config(self, config: RunConfig, stage: StageConfig) -> tuple[RunConfig, StageConfig]:
        """Returns the configuration and the stage with this layout. An update keeps its number of tokens."""
        stage = stage.model_copy(update={"batch": stage.batch.model_copy(update={"size": None, **self._batch})})
        compute = config.compute.model_copy(update={"remat": self.remat})
        return config.model_copy(update={"mesh": self.mesh, "compute": compute}), stage

    def settings(self, stage: StageConfig) -> str:
        """Returns the `--set` argument that selects this layout."""
        values = {f"mesh.{axis}": size for axis, size in self.mesh.model_dump().items()} | {"compute.remat": self.remat}
        values |= {f"stages.{stage.name}.batch.{key}": value for key, value in self._batch.items()}
        if stage.batch.rows is None:
            del values[f"stages.{stage.name}.batch.rows"]
        return "--set " + " ".join(f"{key}={value}" for key, value in values.items())

    @property
    def _batch(self) -> dict[str, int]:
        return {"row_length": self.row_length, "rows_per_device": self.rows_per_device, "rows": self.rows}

    def describe(self, topology: Topology) -> str:
        """Returns one line of the table."""
        mesh = ", ".join(f"{axis}: {size}" for axis, size in self.mesh.model_dump().items() if size > 1)
        return (
            f"{self.tokens_per_second / topology.size:>8.0f} tokens/s per device  {self.memory.total / GIB:>7.2f} GiB "
            f"({self.memory.total / topology.memory:>4.0%})  remat {self.remat:<11}  rows of {self.row_length}, "
            f"{self.rows_per_device} at a time  mesh {{{mesh}}}"
        )


def search_layouts(config: RunConfig, stages: Sequence[StageConfig], topology: Topology) -> None:
    """Prints the fastest layouts that fit and the settings to use. Raises `RunError` if a stage has none."""
    arch = resolve_architecture(config.model)
    problems: list[str] = []
    for stage in stages:
        lengths = [factor * stage.batch.row_length for factor in ROW_LENGTH_FACTORS]
        layouts = {length: enumerate_layouts(config, stage, arch, topology, length=length) for length in lengths}
        if not any(layouts.values()):
            rows = estimates.max_rows_per_update(stage.batch)
            problems.append(
                f"stage {stage.name}: no mesh of {topology.size} devices can train {rows} row(s) of {lengths[0]} "
                "tokens. data x fsdp must not exceed the number of rows. tensor must divide the model's heads. "
                "row_length must be a multiple of 2 x context, and for splash attention of 128 or 256 x context. cudnn "
                f"attention needs context 1. Set a larger batch or another row_length in stages.{stage.name}.batch, or "
                "choose a smaller slice."
            )
            continue
        fitting = {
            length: [*itertools.islice(_compile_fitting(config, stage, topology, layouts[length]), NUM_RESULTS)]
            for length in lengths
        }
        if not any(fitting.values()):
            problems.append(f"stage {stage.name}: no layout that was tried fits {topology.name}. Take a larger slice.")
            continue
        print(f"stage {stage.name} on {topology.name}: compiled layouts that fit, the fastest first {TIME_NOTE}")
        for layout in sorted(itertools.chain(*fitting.values()), key=lambda layout: -layout.tokens_per_second):
            print(f"  {layout.describe(topology)}")
        for length in filter(fitting.get, lengths):
            fastest = max(fitting[length], key=lambda layout: layout.tokens_per_second)
            print(f"rows of {length} tokens:\n  {fastest.settings(stage)}")
        print(flush=True)
    if problems:
        raise RunError("\n".join(problems))


def find_smallest_slice(config: RunConfig, stages: Sequence[StageConfig], slices: Sequence[Topology]) -> None:
    """Prints the smallest slice on which every stage fits with the configured row length and remat policy.

    Prints one layout per stage. `search_layouts` may find a faster one there. Raises `RunError` if no slice fits.
    """
    arch = resolve_architecture(config.model)
    for topology in slices:
        lines: list[str] = []
        for stage in stages:
            layouts = enumerate_layouts(config, stage, arch, topology, length=stage.batch.row_length)
            layouts = [each for each in layouts if each.remat == config.compute.remat and each.rows_per_device == 1]
            layout = next(_compile_fitting(config, stage, topology, layouts), None)
            if layout is None:
                break
            lines.append(f"  {stage.name}: {layout.describe(topology)}\n    {layout.settings(stage)}")
        else:
            print(f"the smallest slice is {topology.name}: {topology.size} device(s) {TIME_NOTE}", *lines, sep="\n")
            return
    raise RunError(f"no layout that was tried fits, up to {slices[-1].name}. Shorter rows take less memory.")


def _compile_fitting(
    config: RunConfig, stage: StageConfig, topology: Topology, layouts: Sequence[LayoutCandidate]
) -> Iterator[LayoutCandidate]:
    """Compiles layouts in the order of a list, those that should fit first, and yields those that do.

    If none should fit, the one with the lowest estimate comes next. Each compiled program corrects the other estimates.
    """
    remaining = [layout for layout in layouts if layout.memory.total < topology.memory * MAX_ESTIMATED_FRACTION]
    has_result, correction = False, 1.0
    for _ in range(min(MAX_COMPILES, len(remaining))):
        expected = [layout.memory.total + (correction - 1) * layout.memory.temporary for layout in remaining]
        if has_result and min(expected) > topology.memory:
            return
        fits = [total <= topology.memory for total in expected]
        layout = remaining.pop(fits.index(True) if any(fits) else expected.index(min(expected)))
        log_info(f"{topology.name}: compiling {layout.describe(topology)} (estimates, not validated on hardware)")
        program = compile_stage_program(*layout.config(config, stage), UPDATE, topology)
        correction = program.memory.temporary / layout.memory.temporary
        if program.memory.total <= topology.memory:
            has_result = True
            yield replace(layout, memory=program.memory, bounds=program.bounds)


def enumerate_layouts(
    config: RunConfig, stage: StageConfig, arch: Architecture, topology: Topology, *, length: int
) -> list[LayoutCandidate]:
    """Returns the possible layouts with rows of `length` tokens, the fastest first. All figures are estimates."""
    layouts: list[LayoutCandidate] = []
    rows = math.ceil(estimates.max_rows_per_update(stage.batch) * stage.batch.row_length / length)
    for sizes in _enumerate_meshes(topology):
        mesh = estimates.abstract_mesh(sizes)
        num_shards = num_data_shards(mesh)
        needs_whole_rows = config.compute.attention == "cudnn" and sizes.context > 1
        needs_blocks = config.compute.attention == "splash" and length % splash_multiple(sizes.context)
        if num_shards > rows or needs_whole_rows or needs_blocks:
            continue
        try:
            check_row_divides_context(mesh, length, "row_length")
            state = estimates.state_memory(estimates.abstract_state(arch, config.compute, stage, mesh))
        except UserError:
            continue  # A mesh size does not divide the row or a parameter.
        shard_rows = math.ceil(rows / num_shards)
        micro_batch_rows = sorted({shard_rows, *(2**power for power in range(shard_rows.bit_length()))})
        for remat, rows_per_device in itertools.product(REMAT_POLICIES, micro_batch_rows):
            compute = config.compute.model_copy(update={"remat": remat})
            batch = stage.batch.model_copy(update={"rows_per_device": rows_per_device})
            shape = BatchShape(*micro_batch_shape(rows, batch, num_shards), length)
            memory = estimates.estimated_memory(arch, compute, shape, mesh, state)
            collectives = estimates.estimated_collectives(arch, compute, shape, mesh)
            options = {"mesh": mesh.shape, "collectives": collectives, "topology": topology}
            bounds = estimates.estimated_seconds(arch, compute, shape, **options)
            layouts.append(LayoutCandidate(sizes, remat, rows, length, rows_per_device, memory, bounds))
    # Among equally fast layouts, the one with more slack in the other bounds comes first.
    return sorted(layouts, key=lambda layout: (max(layout.bounds), sum(layout.bounds)))


def _enumerate_meshes(topology: Topology) -> list[MeshConfig]:
    """Returns all meshes over the devices. On TPUs, each mesh axis takes whole axes of the torus."""
    if topology.device.gpu is None:
        factors = [*topology.shape, topology.size // math.prod(topology.shape)]  # A TPU7x chip is two devices.
    else:
        factors, rest = [], topology.size
        while rest > 1:
            factors.append(next(size for size in range(2, rest + 1) if rest % size == 0))
            rest //= factors[-1]
    meshes = {(1,) * len(MESH_AXES)}
    for factor in factors:
        meshes = {
            (*sizes[:axis], sizes[axis] * factor, *sizes[axis + 1 :])
            for sizes in meshes
            for axis in range(len(MESH_AXES))
        }
    return [MeshConfig.model_validate(dict(zip(MESH_AXES, sizes, strict=True))) for sizes in sorted(meshes)]
