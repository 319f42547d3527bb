"""Will this run fit on that slice, and how fast might it be, without owning it?

Example: python -m thinkpo_jax.plan --config configs/thinkpo_bespoke_stratos_7b.yaml --topology v5e:4x4

The programs of training (the update; for ThinkPO the reference pass too) are compiled for devices that need not be
there, from the shape of the model alone: no weights, no tokenizer, no data. Exit status: 0 fits, 1 does not, 2 error.
"""

from collections.abc import Iterable, Sequence

from thinkpo_jax.models.architecture import Architecture, read_architecture
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.planning.compile import UPDATE, CompiledProgram, compile_stage_program, program_names
from thinkpo_jax.planning.estimates import (
    ACHIEVABLE_BANDWIDTH,
    ACHIEVABLE_NETWORK,
    ACHIEVABLE_PEAK,
    TimeBounds,
    estimated_seconds,
    max_rows_per_update,
    max_update_flops,
    parameter_count,
)
from thinkpo_jax.planning.hlo import COLLECTIVE_KINDS
from thinkpo_jax.planning.topology import GPU_MEMORY_FRACTION, Topology
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.throughput import FlopCount


def plan_stages(config: RunConfig, stages: Sequence[StageConfig], devices: Topology) -> None:
    """Compiles the stages and prints what they take. Raises `RunError` where one does not fit."""
    arch = read_architecture(resolve_model_folder(config.model.path, weights=False))
    problems: list[str] = []
    for stage in stages:
        found = [compile_stage_program(config, stage, name, devices) for name in program_names(stage)]
        print("\n".join(_lines(config, stage, arch, found, devices)), flush=True)
        problems += [f"stage {stage.name}: {problem}" for problem in _too_large(found, devices)]
        largest = max(found, key=lambda one: one.memory.total).memory.total
        if largest <= devices.memory:
            print(f"stage {stage.name} fits: {_share(largest, devices)}\n", flush=True)
    print(_assumptions(devices))
    if problems:
        raise RunError("\n".join(problems))


def _lines(
    config: RunConfig, stage: StageConfig, arch: Architecture, found: Sequence[CompiledProgram], devices: Topology
) -> Iterable[str]:
    mesh, shape = found[-1].mesh, found[-1].shape
    sizes = ", ".join(f"{axis}: {size}" for axis, size in mesh.items())
    yield (
        f"stage {stage.name} ({stage.objective}) of {config.model.path}, {parameter_count(arch) / 1e9:.3g} billion "
        f"parameters, on {devices.name}: {devices.size} devices, mesh {{{sizes}}}"
    )
    yield (
        f"an update: {shape.num_micro_batches} micro-batch(es) of {shape.rows} rows x {shape.length} tokens; "
        f"compute: {config.compute.dtype}, attention {found[-1].attention}, remat {config.compute.remat}"
    )
    yield f"{'':<26}" + "".join(f"{one.name:>18}" for one in found)
    memory = {
        "parameters": [one.memory.parameters for one in found],
        "optimizer": [one.memory.optimizer for one in found],
        "temporary": [one.memory.temporary for one in found],
        "total per device": [one.memory.total for one in found],
    }
    for name, values in memory.items():
        yield _row(name, [f"{value / GIB:.2f} GiB" if value else "-" for value in values])
    yield _row(f"of {devices.memory / GIB:.2f} GiB", [f"{one.memory.total / devices.memory:.0%}" for one in found])
    for kind in COLLECTIVE_KINDS:
        received = [
            sum(each.bytes_received * each.num_executions for each in one.exchanges if each.kind == kind)
            for one in found
        ]
        if any(received):
            yield _row(f"{kind}, received", [f"{value / 1e9:.3g} GB" for value in received])
    work = [_operations(config, arch, one) for one in found]
    yield _row(
        "model's FLOPs per token",
        [f"{each.model / one.shape.tokens / 1e9:.3g} G" for each, one in zip(work, found, strict=True)],
    )
    yield _row("model's FLOPs", [f"{each.model / 1e12:.4g} T" for each in work])
    yield _row("computed FLOPs", [f"{each.hardware / 1e12:.4g} T" for each in work])
    times = [_seconds(config, arch, one, devices) for one in found]
    for bound in TimeBounds._fields:
        yield _row(f"estimate: {bound}", [f"{each._asdict()[bound]:.3g} s" for each in times])
    yield _row("estimate: time", [f"{max(each):.3g} s" for each in times])
    tokens = max_rows_per_update(stage.batch) * shape.length  # the other places pad the last micro-batch
    speed = tokens / max(times[-1]) / devices.size
    use = work[-1].model / shape.tokens * speed / devices.device.peak
    yield f"estimate: {speed:.4g} tokens per second and device, {use:.0%} of its peak (MFU)"
    yield f"compiled in {sum(one.seconds for one in found):.0f} s"


def _row(name: str, values: Iterable[str]) -> str:
    return f"{name:<26}" + "".join(f"{value:>18}" for value in values)


def _operations(config: RunConfig, arch: Architecture, found: CompiledProgram) -> FlopCount:
    """Of one run of the program; a reference pass is an update without its way back."""
    whole = max_update_flops(arch, config.compute, found.shape)
    return whole if found.name == UPDATE else FlopCount(whole.model / 3, whole.model / 3)


def _seconds(config: RunConfig, arch: Architecture, found: CompiledProgram, devices: Topology) -> TimeBounds:
    return estimated_seconds(
        arch,
        config.compute,
        found.shape,
        mesh=found.mesh,
        exchanges=found.exchanges,
        topology=devices,
        forward_only=found.name != UPDATE,
    )


def _too_large(found: Sequence[CompiledProgram], devices: Topology) -> Iterable[str]:
    for one in found:
        if one.memory.total > devices.memory:
            yield (
                f"the {one.name} does not fit: {_share(one.memory.total, devices)}. A larger slice, `compute.remat: "
                "full`, fewer rows_per_device or a larger mesh.fsdp take less; --search looks for what fits."
            )


def _share(total: int, devices: Topology) -> str:
    return (
        f"{total / GIB:.2f} GiB of the {devices.memory / GIB:.2f} GiB of each {devices.device.name} "
        f"({total / devices.memory:.0%})"
    )


def _assumptions(devices: Topology) -> str:
    """What the figures take for granted."""
    device = devices.device
    lines = [
        "Every row is full, of one example with all of its tokens trained, and an update has as many rows as examples: "
        "the most that any data can ask for. Packed rows of several examples ask for less time and no more memory.",
        "Memory and exchanges are the compiler's, of the optimised program; operations and times are arithmetic.",
        f"Times: {ACHIEVABLE_PEAK:.0%} of {device.peak / 1e12:.4g} TFLOP/s, "
        f"{ACHIEVABLE_BANDWIDTH:.0%} of {device.bandwidth / 1e12:.3g} TB/s of memory, "
        f"{ACHIEVABLE_NETWORK:.0%} of {device.interconnect_bandwidth / 1e9:.4g} GB/s between devices, each hidden behind the slowest; what is "
        "read and written of memory is a lower bound.",
    ]
    if device.gpu is not None:
        lines.append(
            f"Of a GPU's memory programs get {GPU_MEMORY_FRACTION:.0%}: set XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MEMORY_FRACTION}. Between "
            f"hosts each GPU has {device.gpu.network / 1e9:.3g} GB/s."
        )
    return "Assumptions:\n" + "\n".join(f"- {line}" for line in lines)
