"""The growth benchmark compiles one update for each point of its two plots."""

from pathlib import Path

import pytest
from support.planning import TINY, write_run_config

from thinkpo_jax.bench import growth as bench_growth
from thinkpo_jax.planning.compile import CompiledProgram
from thinkpo_jax.planning.estimates import BatchShape, DeviceMemory, TimeBounds
from thinkpo_jax.planning.topology import Topology
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.throughput import FlopCount


@pytest.mark.parametrize(("max_devices", "sizes"), [(3, [1]), (8, [1, 4]), (20, [1, 4, 16])])
def test_growth_accepts_any_number_of_devices(
    max_devices: int, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def compile_program(config: RunConfig, stage: StageConfig, name: str, topology: Topology) -> CompiledProgram:
        length = stage.batch.row_length
        calls.append((topology.size, length))
        shape, memory, bounds = BatchShape(1, topology.size, length), DeviceMemory(1, 2, 3), TimeBounds(1, 1, 1)
        return CompiledProgram(name, {}, "splash", shape, memory, [], FlopCount(1, 1), bounds, 0.0)

    monkeypatch.setattr(bench_growth, "compile_stage_program", compile_program)
    config = load_run_config(write_run_config(tmp_path, TINY))
    bench_growth.bench_growth(config, "v6e", max_devices=max_devices, out=tmp_path / "plot.png")
    assert calls == [(size, 512) for size in sizes] + [(sizes[-1], length) for length in bench_growth.ROW_LENGTHS]
    with pytest.raises(UserError, match="--out"):
        bench_growth.bench_growth(config, "v6e", max_devices=max_devices, out=tmp_path)
    assert (tmp_path / "plot.png").exists()


def test_too_few_devices_for_the_smallest_slice_is_an_error(tmp_path: Path) -> None:
    config = load_run_config(write_run_config(tmp_path, TINY))
    with pytest.raises(UserError, match="--most 3: v4 has no slice of so few devices"):
        bench_growth.bench_growth(config, "v4", max_devices=3, out=tmp_path / "plot.png")
