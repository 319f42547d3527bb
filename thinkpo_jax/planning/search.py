"""Which mesh, remat policy and micro-batch are the fastest that fit, and may rows be longer?

Arithmetic orders all candidates and leaves out those that are far too large; the first ones of each row length are
compiled, until two of them fit. Only updates are: what else a stage computes takes less memory.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from thinkpo_jax.models.architecture import Architecture, read_architecture
from thinkpo_jax.models.attention.dispatch import splash_multiple
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.planning.compile import UPDATE, compile_stage_program
from thinkpo_jax.planning.estimates import (
    DeviceMemory,
    TimeBounds,
    abstract_mesh,
    abstract_state,
    batch_shape,
    estimated_exchanges,
    estimated_memory,
    estimated_seconds,
    max_rows_per_update,
    state_memory,
)
from thinkpo_jax.planning.topology import Topology
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.context_parallel import check_row_divides_context
from thinkpo_jax.runtime.mesh import MESH_AXES, MeshConfig, num_data_shards
from thinkpo_jax.training.stage_config import StageConfig

LONGER = (1, 2, 4)  # rows that are tried, in row lengths of the configuration
MAX_ESTIMATED_FRACTION = 1.1  # an estimate above so much of a device's memory is not compiled
MAX_ESTIMATED_FRACTION_SMALLEST = 1.25  # the same, where the smallest slice is looked for
MAX_COMPILES, NUM_RESULTS = 4, 2  # of each row length: programs that are compiled at most, and that fit
UNOVERLAPPED_FRACTION = 0.1  # the share of the faster bounds that adds to the slowest, so that less of them is better


@dataclass(frozen=True)
class LayoutCandidate:
    """A way to lay out a stage, and what it comes to."""

    mesh: MeshConfig
    remat: str
    rows_per_device: int
    row_length: int
    memory: DeviceMemory
    tokens: int  # of an update
    seconds: TimeBounds

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, by estimate."""
        slowest = max(self.seconds)
        return self.tokens / (slowest + UNOVERLAPPED_FRACTION * (sum(self.seconds) - slowest))

    def config(self, config: RunConfig, stage: StageConfig) -> tuple[RunConfig, StageConfig]:
        """The configuration with this layout, and the stage in it; its updates have as many tokens as before."""
        batch = {"row_length": self.row_length, "rows_per_device": self.rows_per_device}
        batch |= {"rows": _rows(stage, self.row_length), "size": None}
        laid = stage.model_copy(update={"batch": stage.batch.model_copy(update=batch)})
        compute = config.compute.model_copy(update={"remat": self.remat})
        return config.model_copy(update={"mesh": self.mesh, "compute": compute, "stages": (laid,)}), laid

    def settings(self, stage: StageConfig) -> str:
        """What --set takes to use it."""
        batch = f"stages.{stage.name}.batch"
        mesh = [f"mesh.{axis}={size}" for axis, size in self.mesh.model_dump().items()]
        rows = [f"{batch}.rows={_rows(stage, self.row_length)}"] if stage.batch.rows is not None else []
        length = [f"{batch}.row_length={self.row_length}", f"{batch}.rows_per_device={self.rows_per_device}"]
        return " ".join([*mesh, f"compute.remat={self.remat}", *length, *rows])

    def describe(self, devices: Topology) -> str:
        """One line of the table."""
        mesh = ", ".join(f"{axis}: {size}" for axis, size in self.mesh.model_dump().items() if size > 1)
        return (
            f"{self.tokens_per_second / devices.size:>8.0f} tokens/s and device  {self.memory.total / 2**30:>7.2f} GiB "
            f"({self.memory.total / devices.memory:>4.0%})  remat {self.remat:<11}  rows of {self.row_length}, "
            f"{self.rows_per_device} at once  mesh {{{mesh}}}"
        )


def search_layouts(config: RunConfig, stages: Sequence[StageConfig], devices: Topology) -> None:
    """Prints what fits, the fastest first, with the settings to use. Raises `RunError` where nothing does."""
    arch = read_architecture(resolve_model_folder(config.model.path, weights=False))
    problems: list[str] = []
    for stage in stages:
        lengths = [factor * stage.batch.row_length for factor in LONGER]
        ways = [enumerate_layouts(config, stage, arch, devices, length=length) for length in lengths]
        if not any(ways):
            problems.append(
                f"stage {stage.name}: no mesh of {devices.size} devices can train {max_rows_per_update(stage.batch)} row(s) "
                f"of {lengths[0]} tokens. data x fsdp is at most the number of rows. tensor divides the model's heads. "
                "row_length is a multiple of 2 x context, for splash of 128 or 256 x context. cudnn needs context 1. "
                f"Set a larger batch or another row_length in stages.{stage.name}.batch, or choose a smaller slice."
            )
            continue
        found = [one for each in ways for one in _fitting(config, stage, arch, devices, each)]
        if not found:
            problems.append(f"stage {stage.name}: nothing that was tried fits {devices.name}. Take a larger slice.")
            continue
        found.sort(key=lambda one: -one.tokens_per_second)
        print(f"stage {stage.name} on {devices.name}: what fits, compiled, by the estimated speed of full rows")
        for one in found:
            print(f"  {one.describe(devices)}")
        for length in sorted({one.row_length for one in found}):
            best = next(one for one in found if one.row_length == length)
            print(f"rows of {length} tokens:\n  --set {best.settings(stage)}")
        print(flush=True)
    if problems:
        raise RunError("\n".join(problems))


def find_smallest_slice(config: RunConfig, stages: Sequence[StageConfig], slices: Sequence[Topology]) -> None:
    """Prints the smallest slice on which every stage fits with rows and remat as configured, and on which mesh.

    Raises `RunError` where there is none. On it `search` may find a faster layout.
    """
    arch = read_architecture(resolve_model_folder(config.model.path, weights=False))
    for devices in slices:
        found = [(stage, _lean(config, stage, arch, devices)) for stage in stages]
        if all(one is not None for _, one in found):
            print(f"the smallest slice is {devices.name}: {devices.size} device(s)")
            for stage, one in found:
                assert one is not None
                print(f"  {stage.name}: {one.describe(devices)}\n    --set {one.settings(stage)}")
            return
    raise RunError(f"nothing that was tried fits up to {slices[-1].name}: shorter rows take less.")


def _lean(config: RunConfig, stage: StageConfig, arch: Architecture, devices: Topology) -> LayoutCandidate | None:
    """A layout that fits: the fastest that should, or one of those that take least."""
    ways = [
        one
        for one in enumerate_layouts(config, stage, arch, devices, length=stage.batch.row_length)
        if one.remat == config.compute.remat and one.rows_per_device == 1
        and one.memory.total < devices.memory * MAX_ESTIMATED_FRACTION_SMALLEST
    ]  # fmt: skip
    hopeful = [one for one in ways if one.memory.total < devices.memory]
    least = sorted(ways, key=lambda one: one.memory.total)[:2]
    for one in dict.fromkeys(hopeful[:1] + least):
        log_info(f"{devices.name}: compiling: {one.describe(devices)} (estimates)")
        laid_config, laid = one.config(config, stage)
        program = compile_stage_program(laid_config, laid, UPDATE, devices)
        if program.memory.total <= devices.memory:
            return replace(one, memory=program.memory)
    return None


def _fitting(
    config: RunConfig, stage: StageConfig, arch: Architecture, devices: Topology, ways: Sequence[LayoutCandidate]
) -> Iterator[LayoutCandidate]:
    """Of the candidates of one row length, the most promising that fit once they are compiled."""
    tries, fitted, factor = 0, 0, 1.0  # by how much temporary memory was more than its estimate
    for one in ways:
        estimate = one.memory.total + (factor - 1) * one.memory.temporary
        if estimate > devices.memory * (MAX_ESTIMATED_FRACTION if tries == 0 else 1):
            continue
        if tries == MAX_COMPILES or fitted == NUM_RESULTS:
            return
        log_info(f"compiling: {one.describe(devices)} (estimates)")
        laid_config, laid = one.config(config, stage)
        program, tries = compile_stage_program(laid_config, laid, UPDATE, devices), tries + 1
        options = {"mesh": program.mesh, "exchanges": program.exchanges, "topology": devices}
        seconds = estimated_seconds(arch, laid_config.compute, program.shape, **options)
        factor = max(factor, program.memory.temporary / one.memory.temporary)
        if program.memory.total <= devices.memory:
            fitted += 1
            yield replace(one, memory=program.memory, seconds=seconds)


def enumerate_layouts(
    config: RunConfig, stage: StageConfig, arch: Architecture, devices: Topology, *, length: int
) -> list[LayoutCandidate]:
    """The ways to lay out a stage with rows of so many tokens, the fastest first, by arithmetic alone."""
    found: list[LayoutCandidate] = []
    for sizes in _meshes(devices):
        mesh = abstract_mesh(sizes)
        shards, rows = num_data_shards(mesh), _rows(stage, length)
        if shards > rows:
            continue  # devices without a row of their own
        try:
            check_row_divides_context(mesh, length, "row_length")
            state = state_memory(abstract_state(arch, config.compute, stage, mesh))
        except UserError:
            continue  # a size that does not divide
        if config.compute.attention == "cudnn" and sizes.context > 1:
            continue  # it takes whole rows
        if config.compute.attention == "splash" and length % splash_multiple(sizes.context):
            continue
        for remat, at_once in itertools.product(REMAT, _powers(math.ceil(rows / shards))):
            one = LayoutCandidate(sizes, remat, at_once, length, state, rows * length, TimeBounds(0, 0, 0))
            laid_config, laid = one.config(config, stage)
            compute, shape = laid_config.compute, batch_shape(laid.batch, shards)
            memory = estimated_memory(arch, compute, shape, mesh, state)
            options = {"mesh": mesh.shape, "exchanges": estimated_exchanges(arch, compute, shape, mesh)}
            seconds = estimated_seconds(arch, compute, shape, **options, topology=devices)
            found.append(replace(one, memory=memory, seconds=seconds))
    # Of equals those first that neither go to the host nor give up the kernel of GPUs.
    return sorted(found, key=lambda one: (-one.tokens_per_second, one.remat == "offload", one.mesh.context))


REMAT: tuple[Any, ...] = get_args(ComputeConfig.model_fields["remat"].annotation)


def _rows(stage: StageConfig, row_length: int) -> int:
    """Rows of so many tokens that hold what an update of the configuration holds."""
    return math.ceil(max_rows_per_update(stage.batch) * stage.batch.row_length / row_length)


def _meshes(devices: Topology) -> Iterator[MeshConfig]:
    """All meshes of the devices; each axis of a mesh of TPUs takes whole axes of their torus."""
    sizes = [size for size in range(1, devices.size + 1) if devices.size % size == 0]
    torus = devices.shape if devices.size == math.prod(devices.shape) else (*devices.shape, 2)
    for chosen in itertools.product(sizes, repeat=len(MESH_AXES)):
        if math.prod(chosen) == devices.size and (devices.device.gpu is not None or _laid(chosen, torus)):
            yield MeshConfig.model_validate(dict(zip(MESH_AXES, chosen, strict=True)))


def _laid(mesh: Sequence[int], torus: Sequence[int]) -> bool:
    """Whether the axes of a torus can be dealt out to those of a mesh so that the sizes come out."""
    for owners in itertools.product(range(len(mesh)), repeat=len(torus)):
        products = [math.prod(size for size, owner in zip(torus, owners, strict=True) if owner == axis)
                    for axis in range(len(mesh))]  # fmt: skip
        if products == [*mesh]:
            return True
    return False


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})
