"""A plan says what a program takes of devices that are not there: what is read is what was compiled."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import small
from support.plugins import needs_cuda, needs_libtpu
from support.selection import exhaustive

from thinkpo_jax.bench import growth as bench_growth
from thinkpo_jax.data.batches import BatchConfig
from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.plan import main
from thinkpo_jax.planning.compile import CompiledProgram, _compiler_environment
from thinkpo_jax.planning.estimates import (
    BatchShape,
    DeviceMemory,
    abstract_mesh,
    abstract_state,
    batch_shape,
    bytes_per_device,
    group_bandwidth,
    max_update_flops,
    parameter_count,
    state_memory,
)
from thinkpo_jax.planning.hlo import find_collectives, total_memory
from thinkpo_jax.planning.search import enumerate_layouts
from thinkpo_jax.planning.topology import SLICES, Topology, parse_topology
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.runtime.devices import DEVICE_SPECS, compiler_options, find_device_spec
from thinkpo_jax.runtime.mesh import MeshConfig, num_data_shards
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import sft_objective
from thinkpo_jax.training.optimizer import make_optimizer
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.train_step import make_train_step

QWEN2_7B = {"vocab_size": 152_064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN2_7B |= {"num_key_value_heads": 4, "intermediate_size": 18_944}
TINY = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "intermediate_size": 256}


def _config(folder: Path, shape: dict[str, int], **batch: Any) -> Path:
    """A configuration whose model is a folder with a config.json and nothing else."""
    rest = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(shape | rest | {"tie_word_embeddings": False}), encoding="utf-8")
    stage = {"data": {"path": "there/is-none"}, "steps": 10, "optimizer": {"learning_rate": 1e-5}}
    stage |= {"batch": {"rows": 8, "row_length": 512, "rows_per_device": 1} | batch}
    stages = [stage | {"name": "first", "objective": "sft"}, stage | {"name": "second", "objective": "thinkpo"}]
    stages[1]["data"] = stage["data"] | {"chosen": "chosen", "rejected": "rejected"}
    raw = {"run_dir": str(folder / "run"), "model": {"path": str(folder)}, "stages": stages}
    (folder / "run.yaml").write_text(json.dumps(raw), encoding="utf-8")
    return folder / "run.yaml"


def test_names_of_topologies_give_their_devices() -> None:
    sizes = {"v5e:4x4": 16, "V6E:1x1": 1, "v4:2x2x1": 4, "v5p:2x2x2": 8, "tpu7x:2x2x1": 8}
    sizes |= {"a100:1": 1, "h100:8": 8, "h200:16": 16, "b200:6": 6}
    assert {name: parse_topology(name).size for name in sizes} == sizes
    assert parse_topology("h100:16").shape == (2, 8)
    assert parse_topology("h100:8").memory < parse_topology("h100:8").device.memory  # the allocator gets a part
    assert parse_topology("v5e:4x4").memory == parse_topology("v5e:4x4").device.memory


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5x:4x4", ["no device 'v5x' (did you mean v5", "v5e:4x4", "h100:N"]),
        ("v5e:3x3", ["v5e has the slices", "2x4, 4x4"]),
        ("v5e", ["v5e has the slices"]),
        ("v5p:4x4", ["v5p has the slices", "2x2x1"]),
        ("h100:12", ["1 to 8", "multiple of 8"]),
        ("h100:0", ["1 to 8"]),
        ("h100:x", ["1 to 8"]),
        ("", ["no device ''", "v6e:16x16"]),
    ],
)
def test_a_topology_that_there_is_not_names_those_that_there_are(name: str, told: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        parse_topology(name)
    assert [part for part in told if part not in str(raised.value)] == []


def test_every_row_of_the_table_is_found_by_what_its_devices_call_themselves() -> None:
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    kinds |= {row.name: row.gpu.description for row in DEVICE_SPECS if row.gpu is not None}
    assert kinds.keys() == {row.name for row in DEVICE_SPECS}
    found = {name: find_device_spec(kind) for name, kind in kinds.items()}
    assert {name: row and row.name for name, row in found.items()} == {name: name for name in kinds}
    assert SLICES.keys() == {row.name for row in DEVICE_SPECS if row.gpu is None}
    assert find_device_spec("cpu") is None
    assert compiler_options(small.mesh()) is None


def test_a_compiler_that_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install --no-deps --target {tmp_path}/libtpu 'libtpu==[0-9.*]+'"):
        _compiler_environment(parse_topology("v5e:4x4"))
    with pytest.raises(UserError, match=rf"pip install .* jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=="):
        _compiler_environment(parse_topology("h100:8"))
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "gone.so"))
    with pytest.raises(UserError, match=r"gone\.so"):
        _compiler_environment(parse_topology("v5e:4x4"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--topology", "v9:1"], "no device 'v9'"),
        (["--topology", "v9"], "--topology v9: no such device"),
        (["--topology", "v5e:4x4", "--stage", "thrid"], "--stage thrid: there is no such stage (did you mean third?)"),
        (["--topology", "v5e:4x4", "--set", "stages=[]"], "no stages"),
        (["--topology", "v5e:4x4", "--set", "model.path=./gone"], "there is no such folder"),
    ],
)
def test_errors_of_users_have_exit_status_2(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _config(tmp_path, TINY)
    path.write_text(path.read_text().replace('"second"', '"third"'))
    assert run_command(main, ["--config", str(path), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_search_without_a_mesh_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Odd rows cannot be split, and one row is too few for sixteen devices of a data axis."""
    path = _config(tmp_path, TINY, rows=1, row_length=127)
    assert run_command(main, ["--config", str(path), "--topology", "v5e:4x4", "--stage", "first", "--search"]) == 1
    assert "no mesh of 16 devices" in capsys.readouterr().err


def test_a_search_for_splash_tries_no_rows_that_it_does_not_take(tmp_path: Path) -> None:
    config = load_run_config(_config(tmp_path, TINY, row_length=384), ["compute.attention=splash"])
    arch = read_architecture(tmp_path)
    found = enumerate_layouts(config, config.stages[0], arch, parse_topology("v5e:2x2"), length=384)
    assert found
    assert {one.mesh.context for one in found} == {1}


def test_a_failed_compiler_has_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/bin/ls")
    arguments = ["--config", str(_config(tmp_path, TINY)), "--topology", "v5e:1x1", "--stage", "first"]
    assert run_command(main, arguments) == 2
    told = capsys.readouterr().err
    assert "compiling for v5e:1x1 failed" in told
    assert "Failed to open /bin/ls" in told.splitlines()[-2]
    log = Path(told.rstrip("\n").rpartition(" ")[2])
    assert "Traceback" in log.read_text()
    log.unlink()


@needs_libtpu
def test_sigterm_leaves_no_compiler_behind(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    arguments = ["--config", str(_config(tmp_path, TINY)), "--topology", "v5e:4x4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "thinkpo_jax.plan", *arguments],
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")}, start_new_session=True,
    )  # fmt: skip
    while not list((tmp_path / "tmp").glob("*/known.json")):  # the compiler is at work
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=600) == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(("most", "sizes"), [(3, [1]), (8, [1, 4]), (20, [1, 4, 16])])
def test_growth_takes_any_number_of_devices(
    most: int, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def compiled(config: RunConfig, stage: StageConfig, name: str, devices: Topology) -> CompiledProgram:
        seen.append((devices.size, stage.batch.row_length))
        return CompiledProgram(name, {}, "splash", BatchShape(1, devices.size, 512), DeviceMemory(1, 2, 3), [], 0.0)

    monkeypatch.setattr(bench_growth, "compile_stage_program", compiled)
    config = load_run_config(_config(tmp_path, TINY))
    bench_growth.bench_growth(config, "v6e", most=most, out=tmp_path / "plot.png")
    assert seen == [(size, 512) for size in sizes] + [(sizes[-1], length) for length in bench_growth.LENGTHS]
    with pytest.raises(UserError, match="--out"):
        bench_growth.bench_growth(config, "v6e", most=most, out=tmp_path)
    assert (tmp_path / "plot.png").exists()


LOOP = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%once (x: bf16[4,8]) -> bf16[4,8] {
  %done = f32[1024]{0:T(1024)} all-reduce(%x), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
}

%steps (x: bf16[16,8]) -> bf16[64,8] {
  %part.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=5, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}

%steps.2 (x: bf16[16,8]) -> bf16[64,8] {
  %part.2 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=5, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %last = s32[]{:T(128)} constant(28), metadata={op_name="x"}
  ROOT %less = pred[] compare(%i, %last), direction=LT
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = bf16[64,8] fusion(%x), kind=kCustom, calls=%steps
  %b = bf16[64,8] fusion(%x), kind=kCustom, calls=%steps.2
  %inner = (s32[]) while(%state), condition=%free, body=%permutes
}

%free (state: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%permutes (state: (s32[])) -> (s32[]) {
  %moved = (f32[10], f32[10], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}
  %alone = f32[10] all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%add
}

%all-reduce-scatter.3.clone (in: f32[40]) -> f32[10] {
  %sum = f32[40] all-reduce(%in), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %part = f32[10] dynamic-slice(%sum, %start), dynamic_slice_sizes={10}
}

%all-sums (state: (s32[])) -> (s32[]) {
  %fused = f32[10] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3.clone
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %sums = (s32[]) while(%state), condition=%free, body=%all-sums, backend_config={"known_trip_count":{"n":"5"}}
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %told = (s32[]) while(%t), condition=%free, body=%once, backend_config={"known_trip_count":{"n":"3"}}
  %both = ((f32[8], f32[4]), (f32[16], f32[8])) all-gather-start(%p, %q), replica_groups=[2,2]<=[2,2]T(1,0)
  %scattered = f32[25] reduce-scatter(%p), replica_groups=[1,4]<=[4], to_apply=%add
}
"""


def test_exchanges_of_a_program_are_counted_with_its_loops() -> None:
    listed = find_collectives(LOOP, 4)
    found = {(one.kind, one.num_executions): one for one in listed}
    assert len(listed) == len(found)  # two steps of one channel are one exchange
    received = {key: one.bytes_received for key, one in found.items()}
    assert received == {
        ("all-gather", 28): 64 * 8 * 2 * 3 / 4,
        ("collective-permute", 28): 40,  # in a loop of unknown length
        ("all-reduce", 3): 2 * 4096 * 3 / 4,
        ("all-gather", 1): 24 * 4 / 2,
        ("reduce-scatter", 1): 300,
        ("reduce-scatter", 5): 40 * 4 * 3 / 4,  # fused, on the channel of the all-reduce
    }
    assert found[("all-gather", 1)].device_group == (0, 2)
    assert found[("all-gather", 28)].device_group == (0, 1, 2, 3)


def test_groups_of_a_mesh_with_several_axes() -> None:
    line = "  %x = f32[8] all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add"
    (found,) = find_collectives("ENTRY %main (p: f32[8]) -> f32[8] {\n" + line + "\n}\n", 8)
    assert found.device_group == (0, 4)


def test_exchanges_of_a_compiled_program() -> None:
    """Weights split over 8 devices are gathered in each of 5 trips; what they give is summed over devices once."""
    mesh = small.mesh(fsdp=8)
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), (None,)))

    def program(x: jax.Array, weights: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, whole)), None

        x = jax.lax.scan(layer, x, weights)[0]
        return jax.lax.with_sharding_constraint(x.sum(axis=0), whole)

    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=split)
    text = jax.jit(program).lower(x, weights).compile().as_text()
    assert text is not None
    found = {
        one.kind: (one.bytes_received * one.num_executions, one.num_executions, len(one.device_group))
        for one in find_collectives(text, 8)
    }
    assert found["all-gather"] == (5 * 64 * 64 * 4 * 7 / 8, 5, 8)
    assert found["all-reduce"] == (2 * 64 * 4 * 7 / 8, 1, 8)


def test_the_report_on_memory_gives_that_of_the_device() -> None:
    vmem = "Memory Space: vmem (color=1)\nTotal bytes: 7\n"
    report = f"{vmem}Memory Space: default (color=0)\nTotal bytes: 17201250304 (16.02GiB)\n...\n{vmem}"
    assert total_memory(report) == 17_201_250_304
    assert total_memory(vmem) is None
    assert total_memory("Total bytes used: 12") is None  # perhaps not all of its digits


def _stage(**batch: Any) -> Any:
    raw = {"run_dir": "x", "model": {"path": "x"}}
    stage = {"name": "s", "objective": "sft", "steps": 1, "data": {"path": "x"}, "optimizer": {"learning_rate": 1e-5}}
    batch = {"rows": 8, "row_length": 48, "rows_per_device": 1} | batch
    return parse_config(RunConfig, raw | {"stages": [stage | {"batch": batch}]}, source="test").stages[0]


def test_sizes_of_the_state_are_those_of_the_compiled_update() -> None:
    mesh, stage = small.mesh(fsdp=4, tensor=2), _stage()
    abstract = abstract_state(small.ARCH, small.FLOAT32, stage, abstract_mesh(MeshConfig(fsdp=4, tensor=2)))
    memory = state_memory(abstract)
    batches = small.batches(small.singles(12), shards=num_data_shards(mesh), steps=1)
    batch, state = put_batch(batches[0], mesh), abstract_state(small.ARCH, small.FLOAT32, stage, mesh)
    with jax.set_mesh(mesh):
        step: Any = make_train_step(sft_objective, make_optimizer(stage.optimizer, 1), mesh, state)
        taken = step.lower(state, batch).compile().memory_analysis().argument_size_in_bytes
    given = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), batch)
    unused = given.example_ids, given.reference_log_probs  # which SFT does not read
    assert memory.total == taken - bytes_per_device(given) + bytes_per_device(unused)
    assert memory.optimizer - 12 == 2 * memory.parameters  # two moments, and three counters
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(small.model()))
    assert parameter_count(small.ARCH) * 4 == whole
    assert whole / 8 <= memory.parameters <= whole / 8 * 1.2  # norms and biases are less split


def test_shapes_of_batches_are_the_most_that_data_can_ask_for() -> None:
    def shape(shards: int, **batch: Any) -> tuple[int, ...]:
        return tuple(batch_shape(BatchConfig.model_validate({"row_length": 32} | batch), shards))

    assert shape(4, size=48, rows_per_device=1) == (12, 4, 32)
    assert shape(4, size=48) == (1, 48, 32)
    assert shape(16, rows=8) == (1, 16, 32)
    assert shape(3, rows=8, rows_per_device=2) == (2, 6, 32)
    # What packing makes of examples that each fill a row.
    batches = small.batches(small.singles(40), shards=4, steps=4, size=10, pack=False, rows_per_device=1)
    assert shape(4, size=10, rows_per_device=1)[:2] == (batches.num_micro_batches, batches.rows)


def test_links_between_hosts_are_shared_by_the_gpus_of_a_host() -> None:
    two, one = parse_topology("h100:16"), parse_topology("h100:8")
    assert group_bandwidth(tuple(range(8)), one) == one.device.interconnect_bandwidth
    assert group_bandwidth((0, 8), two) == pytest.approx(50e9)
    assert group_bandwidth(tuple(range(16)), two) == pytest.approx(400e9)
    assert group_bandwidth((0, 8), parse_topology("v5e:4x4")) == parse_topology("v5e:4x4").device.interconnect_bandwidth


def test_candidates_fit_the_devices_and_keep_the_work_of_an_update() -> None:
    stage = _stage(rows=16, row_length=128)
    config = parse_config(RunConfig, {"run_dir": "x", "model": {"path": "x"}}, source="test")
    found = enumerate_layouts(config, stage, small.ARCH, parse_topology("v5e:2x4"), length=256)
    assert {one.remat for one in found} == {"none", "projections", "attention", "full", "offload"}
    assert all(np.prod([*one.mesh.model_dump().values()]) == 8 for one in found)
    assert all(one.mesh.tensor in (1, 2) for one in found)  # of two key/value heads each device needs a whole one
    assert all(one.tokens == 16 * 128 for one in found)
    # An axis of a mesh of TPUs takes whole axes of their torus.
    square = enumerate_layouts(config, stage, small.ARCH, parse_topology("v5e:4x4"), length=128)
    assert {one.mesh.fsdp for one in square} | {one.mesh.data for one in square} == {1, 4, 16}
    speeds = [one.tokens_per_second for one in found]
    assert speeds == sorted(speeds, reverse=True)
    # What remat keeps less of takes less memory, and is computed more often.
    like = {one.remat: one for one in found if one.mesh == found[0].mesh and one.rows_per_device == 1}
    sizes = [like[name].memory.temporary for name in ("full", "attention", "projections", "none")]
    assert sizes == sorted(sizes)
    whole, laid = found[0].config(config, stage)
    shape = batch_shape(laid.batch, num_data_shards(abstract_mesh(whole.mesh)))
    assert shape.tokens == 16 * 128
    assert "mesh.fsdp=" in found[0].settings(stage)
    assert f"stages.s.batch.rows={laid.batch.rows}" in found[0].settings(stage)


def test_operations_of_full_rows() -> None:
    shape = batch_shape(_stage(rows=4, row_length=64).batch, 2)
    twice = max_update_flops(
        small.ARCH, ComputeConfig(remat="full"), shape._replace(num_micro_batches=2 * shape.num_micro_batches)
    )
    assert twice.model == 2 * max_update_flops(small.ARCH, ComputeConfig(), shape).model
    assert twice.hardware > twice.model


def _plan(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thinkpo_jax.plan", "--config", str(path), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("v6e:1x1", marks=needs_libtpu),
        pytest.param("v5p:2x2x1", marks=needs_libtpu),
        pytest.param("v5e:2x2", marks=[needs_libtpu, exhaustive]),
        pytest.param("h100:8", marks=[needs_cuda, exhaustive]),
    ],
)
def test_a_small_model_fits(name: str, tmp_path: Path) -> None:
    found = _plan(_config(tmp_path, TINY, row_length=512), "--topology", name, "--stage", "first")
    assert found.returncode == 0, found.stderr
    size = parse_topology(name).size
    assert "stage first fits" in found.stdout
    assert f"{size} devices, mesh {{data: 1, fsdp: {size}, context: 1, tensor: 1" in found.stdout
    assert ("all-gather, received" in found.stdout) == (size > 1)
    assert "Traceback" not in found.stderr


@pytest.mark.slow
@needs_libtpu
def test_a_model_that_does_not_fit_has_exit_status_1(tmp_path: Path) -> None:
    found = _plan(_config(tmp_path, QWEN2_7B, row_length=1024), "--topology", "v5e:2x2", "--stage", "second")
    assert found.returncode == 1, found.stderr
    assert "stage second: the update does not fit" in found.stderr
    assert "15.75 GiB of each v5e" in found.stderr
    assert "reference pass" in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fsdp", "attention"),
    [
        pytest.param("v5e:4x4", 4, "splash", marks=needs_libtpu),
        pytest.param("h100:8", 8, "cudnn", marks=needs_cuda),
        pytest.param("v6e:4x4", 4, "splash", marks=[needs_libtpu, exhaustive]),
        pytest.param("h100:8", 2, "blockwise", marks=[needs_cuda, exhaustive]),
    ],
)
def test_rows_of_32768_tokens_train_a_7b_model(name: str, fsdp: int, attention: str, tmp_path: Path) -> None:
    """The reference pass and the update, at full shape, all parameters; rows are split over what fsdp leaves."""
    settings = [f"mesh.fsdp={fsdp}", f"mesh.context={parse_topology(name).size // fsdp}", "compute.remat=full"]
    path = _config(tmp_path, QWEN2_7B, row_length=32_768)
    found = _plan(path, "--topology", name, "--stage", "second", "--set", *settings)
    assert found.returncode == 0, found.stderr
    assert "stage second fits" in found.stdout
    assert f"attention {attention}, remat full" in found.stdout
