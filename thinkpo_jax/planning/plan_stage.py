"""Compiles the programs of each stage and prints their memory, collectives, FLOPs and estimated time."""

from collections.abc import Sequence

from thinkpo_jax.models.model_folder import resolve_architecture
from thinkpo_jax.planning import estimates
from thinkpo_jax.planning.compile import CompiledProgram, compile_stage_program, program_names
from thinkpo_jax.planning.hlo import COLLECTIVE_KINDS
from thinkpo_jax.planning.topology import Topology
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.training.stage_config import StageConfig


def plan_stages(config: RunConfig, stages: Sequence[StageConfig], topology: Topology) -> None:
    """Compiles the stages and prints what each device needs. Raises `RunError` if a stage does not fit."""
    arch = resolve_architecture(config.model)
    problems: list[str] = []
    for stage in stages:
        programs = [compile_stage_program(config, stage, name, topology) for name in program_names(stage)]
        shape, mesh = programs[-1].shape, ", ".join(f"{axis}: {size}" for axis, size in programs[-1].mesh.items())
        parameters = f"{estimates.parameter_count(arch) / 1e9:.3g} billion parameters"
        print(
            f"stage {stage.name} ({stage.objective}) of {config.model.path}, {parameters}, on {topology.name}: "
            f"{topology.size} devices, mesh {{{mesh}}}\n"
            f"an update: {shape.num_micro_batches} micro-batch(es) of {shape.rows} rows x {shape.length} tokens; "
            f"compute: {config.compute.dtype}, attention {programs[-1].attention}, remat {config.compute.remat}"
        )
        tokens = estimates.max_rows_per_update(stage.batch) * shape.length  # Other slots pad the last micro-batch.
        columns = [_column(program, tokens, topology) for program in programs]
        for label in columns[-1]:
            cells = [column[label] for column in columns]
            if set(cells) != {"0 GB"}:
                print((f"{label:<32}" + "".join(f"{cell:>18}" for cell in cells)).rstrip())
        print(f"compiled in {sum(program.compile_seconds for program in programs):.0f} s", flush=True)
        too_large = [program for program in programs if program.memory.total > topology.memory]
        problems += [
            f"stage {stage.name}: the {program.name} does not fit: "
            f"{topology.describe_share(program.memory.total)}. "
            "Take a larger slice, set `compute.remat: full`, lower rows_per_device or raise mesh.fsdp. "
            "--search finds what fits."
            for program in too_large
        ]
        if not too_large:
            largest = max(programs, key=lambda program: program.memory.total)
            print(f"stage {stage.name} fits: {topology.describe_share(largest.memory.total)}\n", flush=True)
    print(_assumptions(topology))
    if problems:
        raise RunError("\n".join(problems))


def _column(program: CompiledProgram, tokens: int, topology: Topology) -> dict[str, str]:
    """Returns the cells of a program by the label of their row. `tokens` is the number of real tokens of an update."""
    memory, flops = program.memory, program.flops
    cells = {"": program.name}
    cells |= {part: f"{size / GIB:.2f} GiB" if size else "-" for part, size in memory._asdict().items()}
    cells["total per device"] = f"{memory.total / GIB:.2f} GiB"
    cells[f"of {topology.memory / GIB:.2f} GiB"] = f"{memory.total / topology.memory:.0%}"
    for kind in COLLECTIVE_KINDS:
        received = sum(each.bytes_received * each.num_executions for each in program.collectives if each.kind == kind)
        cells[f"{kind}, received"] = f"{received / 1e9:.3g} GB"
    cells["model FLOPs per token"] = f"{flops.model / program.shape.tokens / 1e9:.3g} G"
    cells["model FLOPs"] = f"{flops.model / 1e12:.4g} T"
    cells["computed FLOPs"] = f"{flops.hardware / 1e12:.4g} T"
    cells["estimates, not validated on hardware:"] = ""
    cells |= {f"  {bound} time": f"{seconds:.3g} s" for bound, seconds in program.bounds._asdict().items()}
    cells["  time"] = f"{max(program.bounds):.3g} s"
    speed = tokens / max(program.bounds) / topology.size
    cells["  tokens/s per device"] = f"{speed:.4g}"
    cells["  MFU"] = f"{flops.model / program.shape.tokens * speed / topology.device.peak:.0%}"
    return cells


def _assumptions(topology: Topology) -> str:
    device = topology.device
    lines = [
        "Every row is full and holds one example, all of its tokens are trained, and an update has as many rows as "
        "examples. Packed rows of several examples need less time and no more memory.",
        "Memory and collectives are those of the optimized program. FLOPs and times are computed by formula.",
        f"Times assume {estimates.ACHIEVABLE_PEAK:.0%} of {device.peak / 1e12:.4g} TFLOP/s, "
        f"{estimates.ACHIEVABLE_BANDWIDTH:.0%} of {device.bandwidth / 1e12:.3g} TB/s of memory and "
        f"{estimates.ACHIEVABLE_NETWORK:.0%} of {device.interconnect_bandwidth / 1e9:.4g} GB/s between devices. The "
        "slowest of the three hides the others. Memory traffic is a lower bound.",
    ]
    if device.gpu is not None:
        network = f"Between hosts each GPU has {device.gpu.network / 1e9:.3g} GB/s."
        lines.append(f"{topology.describe_memory_fraction()} {network}")
    return "Assumptions:\n" + "\n".join(f"- {line}" for line in lines)
