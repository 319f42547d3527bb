"""How does what an update costs grow, with the number of devices and with the length of rows? Compiled, not run.

Each point is the update of a stage compiled for a slice (compiled.py): fully sharded, one row a device.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from thinkpo_jax.planning.compile import UPDATE, CompiledProgram, compile_stage_program
from thinkpo_jax.planning.topology import Topology, list_slices
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.figures import figure_to_png
from thinkpo_jax.runtime.files import write_atomically
from thinkpo_jax.runtime.mesh import MeshConfig
from thinkpo_jax.training.stage_config import StageConfig

DEVICES_FOR_ROW_LENGTHS = 16  # devices, at most, on which row lengths are compared
LENGTHS = tuple(1024 * 2**power for power in range(1, 7))  # 2k to 64k


class GrowthPoint(NamedTuple):
    """One compiled update."""

    devices: int
    length: int
    program: CompiledProgram

    @property
    def bytes_received(self) -> float:
        """Bytes that a device receives in an update."""
        return sum(each.bytes_received * each.num_executions for each in self.program.exchanges)

    @property
    def num_collectives(self) -> int:
        """How often devices exchange something in an update."""
        return sum(each.num_executions for each in self.program.exchanges)


def bench_growth(config: RunConfig, kind: str, *, most: int, out: Path) -> None:
    """Compiles, prints two tables and draws the plot. Checks `most` and `out` first. Raises `UserError`."""
    if out.is_dir():
        raise UserError(f"--out {out}: it is a folder. Give the path of a file.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error}. Give the path of a file.") from None
    stage, sizes = config.stages[0], [one for one in list_slices(kind) if one.size.bit_length() % 2]  # 1, 4, 16, ...
    found = [one for one in sizes if one.size <= most]
    if not found:
        raise UserError(f"--most {most}: too few devices for {kind}. Set --most to {sizes[0].size} or more.")
    by_devices = [_point(config, stage, one, stage.batch.row_length) for one in found]
    at = [one for one in found if one.size <= DEVICES_FOR_ROW_LENGTHS][-1]
    by_length = [_point(config, stage, at, length) for length in LENGTHS]
    print(f"\n{kind}, rows of {stage.batch.row_length} tokens, one on each device\n{_table(by_devices)}")
    print(f"\n{at.name}, one row on each device\n{_table(by_length)}")
    write_atomically(out, figure_to_png(_figure(by_devices, by_length)))
    log_info(f"plot: {out}")


def _point(config: RunConfig, stage: StageConfig, devices: Topology, length: int) -> GrowthPoint:
    log_info(f"compiling: {devices.name}, rows of {length} tokens")
    batch = stage.batch.model_copy(
        update={"size": None, "rows": devices.size, "row_length": length, "rows_per_device": 1}
    )
    laid = stage.model_copy(update={"batch": batch})
    config = config.model_copy(update={"mesh": MeshConfig(), "stages": (laid,)})
    return GrowthPoint(devices.size, length, compile_stage_program(config, laid, UPDATE, devices))


def _table(points: Sequence[GrowthPoint]) -> str:
    lines = ["| devices | row length | parameters, GiB | moments, GiB | temporary, GiB | received, GB | exchanges |"]
    lines.append("|--:|--:|--:|--:|--:|--:|--:|")
    for point in points:
        sizes = [f"{value / GIB:.2f}" for value in point.program.memory]
        cells = [
            str(point.devices),
            f"{point.length:,}",
            *sizes,
            f"{point.bytes_received / 1e9:.2f}",
            str(point.num_collectives),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(by_devices: Sequence[GrowthPoint], by_length: Sequence[GrowthPoint]) -> Figure:
    """Memory above, exchanged bytes below; on the left by devices, on the right by row length."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    columns = (
        (by_devices, "devices", [point.devices for point in by_devices]),
        (by_length, "row length (tokens)", [point.length for point in by_length]),
    )
    for column, (points, label, places) in enumerate(columns):
        for name in points[0].program.memory._fields:
            values = [getattr(point.program.memory, name) / GIB for point in points]
            axes[0, column].plot(places, values, marker="o", label=name)
        axes[1, column].plot(places, [point.bytes_received / 1e9 for point in points], marker="o", color="black")
        axes[0, column].set_yscale("log", base=2)
        for ax in axes[:, column]:
            ax.set_xscale("log", base=2)
            ax.grid(alpha=0.3)
        axes[1, column].set_xlabel(label)
        axes[1, column].set_xticks(places, [f"{place:,}" if place < 1024 else f"{place // 1024}k" for place in places])
    axes[0, 0].set_ylabel("memory of a device (GiB)")
    axes[1, 0].set_ylabel("received by a device in an update (GB)")
    axes[0, 0].legend()
    return figure
