"""Measures how memory and traffic of an update grow with the number of devices and with the row length.

Each point is the update of a stage compiled for a slice, fully sharded, with one row per device. Nothing runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from thinkpo_jax.planning.compile import UPDATE, CompiledProgram, compile_stage_program
from thinkpo_jax.planning.topology import Topology, list_slices
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.figures import figure_to_png, label_axes
from thinkpo_jax.runtime.files import check_writable, write_atomically
from thinkpo_jax.runtime.mesh import MeshConfig

DEVICES_FOR_ROW_LENGTHS = 16  # Row lengths are compared on at most this many devices.
ROW_LENGTHS = tuple(1024 * 2**power for power in range(1, 7))  # 2k to 64k tokens


def bench_growth(config: RunConfig, kind: str, *, max_devices: int, out: Path) -> dict[str, Any]:
    """Compiles updates of the first stage, prints two tables, writes a plot and returns the figures.

    Raises `UserError` before compiling if `out` cannot be written or no slice is small enough.
    """
    check_writable(out, "--out")
    slices = [each for each in list_slices(kind) if each.size.bit_length() % 2 and each.size <= max_devices]
    if not slices:
        raise UserError(f"--most {max_devices}: {kind} has no slice of so few devices. Set --most to 16 or more.")
    length = config.stages[0].batch.row_length
    by_devices = [_compile_update(config, topology, length) for topology in slices]  # 1, 4, 16, ... devices
    topology = [each for each in slices if each.size <= DEVICES_FOR_ROW_LENGTHS][-1]
    by_length = [_compile_update(config, topology, length) for length in ROW_LENGTHS]
    print(f"\n{kind}, rows of {length} tokens, one on each device\n{_table(by_devices)}")
    print(f"\n{topology.name}, one row on each device\n{_table(by_length)}")
    write_atomically(out, figure_to_png(_figure(by_devices, by_length)))
    log_info(f"plot: {out}")
    return {"kind": kind, "by_devices": _figures(by_devices), "by_row_length": _figures(by_length)}


def _figures(programs: Sequence[CompiledProgram]) -> list[dict[str, Any]]:
    return [
        {"devices": each.shape.rows, "row_length": each.shape.length, **each.memory._asdict(),
         "bytes_received": _bytes_received(each)}
        for each in programs
    ]  # fmt: skip


def _compile_update(config: RunConfig, topology: Topology, row_length: int) -> CompiledProgram:
    log_info(f"compiling: {topology.name}, rows of {row_length} tokens")
    batch = {"size": None, "rows": topology.size, "row_length": row_length, "rows_per_device": 1}
    stage = config.stages[0].model_copy(update={"batch": config.stages[0].batch.model_copy(update=batch)})
    return compile_stage_program(config.model_copy(update={"mesh": MeshConfig()}), stage, UPDATE, topology)


def _bytes_received(program: CompiledProgram) -> float:
    """Returns the bytes that a device receives in an update."""
    return sum(each.bytes_received * each.num_executions for each in program.collectives)


def _table(programs: Sequence[CompiledProgram]) -> str:
    header = "| devices | row length | parameters, GiB | moments, GiB | temporary, GiB | received, GB | collectives |"
    lines = [header, "|--:|--:|--:|--:|--:|--:|--:|"]
    for program in programs:
        memory = " | ".join(f"{size / GIB:.2f}" for size in program.memory)
        num_collectives = sum(each.num_executions for each in program.collectives)
        traffic = f"{_bytes_received(program) / 1e9:.2f} | {num_collectives}"
        lines.append(f"| {program.shape.rows} | {program.shape.length:,} | {memory} | {traffic} |")
    return "\n".join(lines)


def _figure(by_devices: Sequence[CompiledProgram], by_length: Sequence[CompiledProgram]) -> Figure:
    """Draws memory above and received bytes below, by devices on the left and by row length on the right."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    columns = ((by_devices, "devices", "rows"), (by_length, "row length (tokens)", "length"))
    for (programs, label, field), memory_ax, traffic_ax in zip(columns, *axes, strict=True):
        sizes = [getattr(program.shape, field) for program in programs]  # One row per device.
        for part in programs[0].memory._fields:
            memory_ax.plot(sizes, [getattr(each.memory, part) / GIB for each in programs], marker="o", label=part)
        traffic_ax.plot(sizes, [_bytes_received(program) / 1e9 for program in programs], marker="o", color="black")
        memory_ax.set_yscale("log", base=2)
        label_axes(memory_ax, "", "", "memory of a device (GiB)")
        label_axes(traffic_ax, "", label, "received by a device in an update (GB)")
        traffic_ax.set_xscale("log", base=2)
        traffic_ax.set_xticks(sizes, [f"{size:,}" if size < 1024 else f"{size // 1024}k" for size in sizes])
    axes[0, 0].legend()
    return figure
