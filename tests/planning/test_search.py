"""The search enumerates only layouts that can run, and compiles only those that are promising."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import small
from support.planning import TINY, sft_stage, write_run_config

from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.plan import main
from thinkpo_jax.planning import search
from thinkpo_jax.planning.compile import CompiledProgram
from thinkpo_jax.planning.estimates import BatchShape, DeviceMemory, TimeBounds, abstract_mesh, batch_shape
from thinkpo_jax.planning.search import LayoutCandidate, enumerate_layouts, find_smallest_slice, search_layouts
from thinkpo_jax.planning.topology import Topology, list_slices, parse_topology
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import RunError, parse_config
from thinkpo_jax.runtime.mesh import MeshConfig, num_data_shards
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.throughput import FlopCount

Compiled = list[tuple[Topology, RunConfig, StageConfig]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compiled]:
    """Replaces the compiler by a function from the topology and the layout to bytes. Returns what gets compiled."""

    def install(memory: Callable[[Topology, StageConfig], int]) -> Compiled:
        calls: Compiled = []

        def compile_program(config: RunConfig, stage: StageConfig, name: str, topology: Topology) -> CompiledProgram:
            calls.append((topology, config, stage))
            shape = BatchShape(1, topology.size, stage.batch.row_length)
            sizes, bounds = DeviceMemory(1, 2, memory(topology, stage) - 3), TimeBounds(0.25, 0.5, 0.125)
            return CompiledProgram(name, {}, "splash", shape, sizes, [], FlopCount(1, 1), bounds, 0.0)

        monkeypatch.setattr(search, "compile_stage_program", compile_program)
        return calls

    return install


def layout(gib: float, *, seconds: float = 1.0) -> LayoutCandidate:
    """Returns a layout with this estimate. All of its memory is temporary."""
    memory = DeviceMemory(0, 0, int(gib * 2**30))
    return LayoutCandidate(MeshConfig(fsdp=4), "full", 8, 512, 1, memory, TimeBounds(seconds, 0, 0))


def test_candidates_fit_the_devices_and_keep_the_work_of_an_update() -> None:
    stage = sft_stage(rows=16, row_length=128)
    config = parse_config(RunConfig, {"run_dir": "x", "model": {"path": "x"}}, source="test")
    layouts = enumerate_layouts(config, stage, small.ARCH, parse_topology("v5e:2x4"), length=256)
    assert {each.remat for each in layouts} == {"none", "projections", "attention", "full", "offload"}
    assert all(math.prod(each.mesh.model_dump().values()) == 8 for each in layouts)
    assert all(each.mesh.tensor in (1, 2) for each in layouts)  # each device needs one of the two key/value heads
    assert all(each.rows * each.row_length == 16 * 128 for each in layouts)
    # An axis of a mesh of TPUs takes whole axes of their torus.
    square = enumerate_layouts(config, stage, small.ARCH, parse_topology("v5e:4x4"), length=128)
    assert {each.mesh.fsdp for each in square} | {each.mesh.data for each in square} == {1, 4, 16}
    speeds = [each.tokens_per_second for each in layouts]
    assert speeds == sorted(speeds, reverse=True)
    # A remat policy that saves less takes less memory.
    alike = {each.remat: each for each in layouts if each.mesh == layouts[0].mesh and each.rows_per_device == 1}
    sizes = [alike[name].memory.temporary for name in ("full", "attention", "projections", "none")]
    assert sizes == sorted(sizes)
    layout_config, layout_stage = layouts[0].config(config, stage)
    shape = batch_shape(layout_stage.batch, num_data_shards(abstract_mesh(layout_config.mesh)))
    assert shape.tokens == 16 * 128
    assert "mesh.fsdp=" in layouts[0].settings(stage)
    assert f"stages.s.batch.rows={layout_stage.batch.rows}" in layouts[0].settings(stage)


@pytest.mark.parametrize(("name", "count"), [("h100:8", 20), ("h100:1", 1), ("v5e:2x4", 16), ("tpu7x:2x2x1", 20)])
def test_every_mesh_of_the_devices_is_enumerated_once(name: str, count: int) -> None:
    """GPUs: 8 = 2 * 2 * 2 falls on 4 axes in 20 ways. A TPU slice of 2 x 4 chips keeps its 4 together: 16 ways."""
    meshes = search._enumerate_meshes(parse_topology(name))
    sizes = [tuple(mesh.model_dump().values()) for mesh in meshes]
    assert len(set(sizes)) == len(sizes) == count
    assert all(math.prod(each) == parse_topology(name).size for each in sizes)


def test_settings_of_a_stage_without_rows_leave_its_size_alone() -> None:
    stage = sft_stage(rows=None, size=16, row_length=128)
    assert "batch.rows=" not in layout(1).settings(stage)
    assert (
        layout(1)
        .config(parse_config(RunConfig, {"run_dir": "x", "model": {"path": "x"}}, source="test"), stage)[1]
        .batch.size
        is None
    )


def test_a_search_without_a_mesh_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Odd rows cannot be split, and one row is too few for sixteen devices of a data axis."""
    path = write_run_config(tmp_path, TINY, rows=1, row_length=127)
    assert run_command(main, ["--config", str(path), "--topology", "v5e:4x4", "--stage", "first", "--search"]) == 1
    assert "no mesh of 16 devices" in capsys.readouterr().err


def test_a_search_for_splash_tries_only_meshes_that_splash_supports(tmp_path: Path) -> None:
    config = load_run_config(write_run_config(tmp_path, TINY, row_length=384), ["compute.attention=splash"])
    arch = read_architecture(tmp_path)
    layouts = enumerate_layouts(config, config.stages[0], arch, parse_topology("v5e:2x2"), length=384)
    assert layouts
    assert {each.mesh.context for each in layouts} == {1}


def test_a_search_compiles_the_fastest_layouts_of_each_row_length(
    tmp_path: Path, compiled: Callable[..., Compiled], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_run_config(write_run_config(tmp_path, TINY))
    calls = compiled(lambda topology, stage: 1000)
    search_layouts(config, config.stages[:1], parse_topology("v5e:2x2"))
    assert [stage.batch.row_length for _, _, stage in calls] == [512, 512, 1024, 1024, 2048, 2048]
    printed = capsys.readouterr().out
    assert "not validated on hardware" in printed
    assert printed.count("tokens/s per device") == 6
    assert printed.count("--set mesh.data=") == 3
    calls = compiled(lambda topology, stage: 2**40)
    with pytest.raises(RunError, match=r"no layout that was tried fits v5e:2x2"):
        search_layouts(config, config.stages[:1], parse_topology("v5e:2x2"))
    assert len(calls) <= 3 * search.MAX_COMPILES


def compile_fitting(layouts: list[LayoutCandidate], topology: Topology) -> list[LayoutCandidate]:
    config: Any = parse_config(RunConfig, {"run_dir": "x", "model": {"path": "x"}}, source="test")
    return [*search._compile_fitting(config, sft_stage(), topology, layouts)]


def test_a_compiled_program_corrects_the_estimates_of_the_others(compiled: Callable[..., Compiled]) -> None:
    """The first program takes 2 times its estimate, so the second (12 GiB of 15.75) is passed over for the third."""
    calls = compiled(lambda topology, stage: 20 * 2**30 if len(calls) == 1 else 14 * 2**30)
    fitting = compile_fitting([layout(10), layout(12), layout(7, seconds=2)], parse_topology("v5e:1x1"))
    assert len(calls) == 2
    assert [each.memory.total for each in fitting] == [14 * 2**30]
    assert fitting[0].bounds == TimeBounds(0.25, 0.5, 0.125)  # of the compiled program


def test_the_leanest_layout_is_compiled_if_no_estimate_fits(compiled: Callable[..., Compiled]) -> None:
    """Estimates may be too large by a quarter. Larger ones are not compiled at all."""
    calls = compiled(lambda topology, stage: 15 * 2**30)
    fitting = compile_fitting([layout(18), layout(16, seconds=2), layout(25)], parse_topology("v5e:1x1"))
    assert [(each.memory.total, each.remat) for each in fitting] == [(15 * 2**30, "full")]
    assert len(calls) == 1  # The program took 15 of 16 GiB, so 18 GiB become 16.9 of 15.75.
    calls = compiled(lambda topology, stage: 15 * 2**30)
    assert len(compile_fitting([layout(16.5), layout(16, seconds=2)], parse_topology("v5e:1x1"))) == 2
    calls = compiled(lambda topology, stage: 15 * 2**30)
    assert compile_fitting([layout(25)], parse_topology("v5e:1x1")) == []
    assert calls == []


def test_the_smallest_slice_holds_every_stage(
    tmp_path: Path, compiled: Callable[..., Compiled], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_run_config(write_run_config(tmp_path, TINY))
    calls = compiled(lambda topology, stage: (100 if stage.name == "first" else 200) * 2**30 // topology.size)
    find_smallest_slice(config, config.stages, list_slices("v6e"))
    printed = capsys.readouterr().out
    assert "the smallest slice is v6e:2x4: 8 device(s)" in printed  # 25 of 31 GiB
    assert "not validated on hardware" in printed
    assert {stage.batch.rows_per_device for _, _, stage in calls} == {1}
    assert {config.compute.remat for _, config, _ in calls} == {"none"}
    compiled(lambda topology, stage: 2**40)
    with pytest.raises(RunError, match="up to v6e:16x16"):
        find_smallest_slice(config, config.stages, list_slices("v6e"))


def test_a_kind_of_device_alone_means_smallest(
    tmp_path: Path, compiled: Callable[..., Compiled], capsys: pytest.CaptureFixture[str]
) -> None:
    compiled(lambda topology, stage: 2**30)
    arguments = ["--config", str(write_run_config(tmp_path, TINY)), "--topology", "V6e"]
    assert run_command(main, [*arguments, "--smallest"]) == 0
    printed = capsys.readouterr().out
    assert "the smallest slice is v6e:1x1" in printed
    assert run_command(main, arguments) == 0
    assert capsys.readouterr().out == printed
