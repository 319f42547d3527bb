"""`plan` prints what the compiled programs of a stage take, and its exit status says whether they fit."""

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
import pytest
from support.planning import QWEN2_7B, TINY, write_run_config
from support.plugins import needs_cuda, needs_libtpu
from support.selection import exhaustive

from thinkpo_jax.plan import main
from thinkpo_jax.planning import compile as compiled
from thinkpo_jax.planning import plan_stage
from thinkpo_jax.planning.compile import CompiledProgram, compile_stage_program
from thinkpo_jax.planning.estimates import BatchShape, DeviceMemory, TimeBounds
from thinkpo_jax.planning.hlo import Collective
from thinkpo_jax.planning.topology import Topology, parse_topology
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.throughput import FlopCount


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install --no-deps --target {tmp_path}/libtpu 'libtpu==[0-9.*]+'"):
        compiled._compiler_environment(parse_topology("v5e:4x4"))
    with pytest.raises(UserError, match=rf"pip install .* jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=="):
        compiled._compiler_environment(parse_topology("h100:8"))
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "gone.so"))
    with pytest.raises(UserError, match=r"gone\.so"):
        compiled._compiler_environment(parse_topology("v5e:4x4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:1"], "no device 'v9'"),
        (["--topology", "v9"], "--topology v9: there is no device 'v9'"),
        (["--topology", "v9", "--smallest"], "--topology v9: there is no device 'v9'"),
        (["--topology", "v6e:2x2", "--smallest"], "name the device only: --topology v6e --smallest"),
        (["--topology", "v6e", "--smallest", "--search"], "--smallest and --search exclude each other"),
        (["--topology", "v6e", "--search"], "--search needs a slice, for example v6e:16x16"),
        (["--topology", "v5e:4x4", "--stage", "thrid"], "--stage thrid: there is no such stage (did you mean third?)"),
        (["--topology", "v5e:4x4", "--set", "stages=[]"], "no stages"),
        (["--topology", "v5e:4x4", "--set", "model.path=./gone"], "there is no such folder"),
    ],
)
def test_errors_of_users_have_exit_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run_config(tmp_path, TINY)
    path.write_text(path.read_text().replace('"second"', '"third"'))
    assert run_command(main, ["--config", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_failed_compiler_has_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/bin/ls")
    arguments = ["--config", str(write_run_config(tmp_path, TINY)), "--topology", "v5e:1x1", "--stage", "first"]
    assert run_command(main, arguments) == 2
    printed = capsys.readouterr().err
    assert "compiling for v5e:1x1 failed" in printed
    assert "Failed to open /bin/ls" in printed.splitlines()[-2]
    log = Path(printed.rstrip("\n").rpartition(" ")[2])
    assert "Traceback" in log.read_text()
    log.unlink()


@needs_libtpu
def test_sigterm_leaves_no_compiler_behind(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    arguments = ["--config", str(write_run_config(tmp_path, TINY)), "--topology", "v5e:4x4"]
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


def test_a_changed_stage_that_starts_from_another_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration stays valid, because it keeps the other stages."""
    requests: list[dict[str, Any]] = []

    class Stopped:
        returncode = 1

        def __init__(self, command: list[str], *, stdout: Any, **_: Any) -> None:
            requests.append(json.loads((Path(command[-1]) / "request.json").read_text(encoding="utf-8")))
            stdout.write(b"error: stopped\n")

        def poll(self) -> int:
            return self.returncode

        def kill(self) -> None: ...

        def wait(self) -> None: ...

    monkeypatch.setattr(compiled.subprocess, "Popen", Stopped)
    monkeypatch.setattr(compiled, "_compiler_environment", lambda topology: {})
    config = load_run_config(write_run_config(tmp_path, TINY), ["stages.second.start=first"])
    batch = config.stages[1].batch.model_copy(update={"row_length": 1024})
    stage = config.stages[1].model_copy(update={"batch": batch})
    with pytest.raises(UserError, match=r"^stopped$"):
        compile_stage_program(config, stage, "update", parse_topology("v5e:2x2"))
    (request,) = requests
    assert request["stage"] == "second"
    assert parse_config(RunConfig, request["config"], source="test").stages == (config.stages[0], stage)


def test_a_plan_prints_memory_collectives_flops_and_labeled_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_program(config: RunConfig, stage: StageConfig, name: str, topology: Topology) -> CompiledProgram:
        gib = 2**30
        return CompiledProgram(
            name, {"data": 1, "fsdp": 4}, "splash", BatchShape(2, 4, 512), DeviceMemory(gib, 2 * gib, 3 * gib),
            [Collective("all-gather", 1e9, 5, (0, 1, 2, 3))], FlopCount(2e12, 3e12), TimeBounds(0.25, 0.5, 0.125), 7.0,
        )  # fmt: skip

    monkeypatch.setattr(plan_stage, "compile_stage_program", compile_program)
    arguments = ["--config", str(write_run_config(tmp_path, TINY)), "--topology", "v5e:2x2", "--stage", "second"]
    assert run_command(main, arguments) == 0
    printed = capsys.readouterr().out
    rows = {line[:32].strip(): line[32:].split() for line in printed.splitlines()}
    assert rows["parameters"] == ["1.00", "GiB", "1.00", "GiB"]
    assert rows["total per device"] == ["6.00", "GiB", "6.00", "GiB"]
    assert rows["of 15.75 GiB"] == ["38%", "38%"]
    assert rows["all-gather, received"] == ["5", "GB", "5", "GB"]
    assert "all-reduce, received" not in rows
    assert rows["model FLOPs"] == ["2", "T", "2", "T"]
    assert rows["computed FLOPs"] == ["3", "T", "3", "T"]
    assert rows["time"] == ["0.5", "s", "0.5", "s"]  # the slowest of the three
    assert rows["tokens/s per device"] == ["2048", "2048"]  # 8 rows of 512 tokens, 4 devices
    assert "stage second fits: 6.00 GiB of the 15.75 GiB of each v5e (38%)" in printed
    lines = printed.splitlines()
    heading = next(index for index, line in enumerate(lines) if "not validated on hardware" in line)
    assert "compute time" in lines[heading + 1]


def _plan(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thinkpo_jax.plan", "--config", str(path), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("v6e:1x1", marks=needs_libtpu),
        pytest.param("v5p:2x2x1", marks=[needs_libtpu, exhaustive]),
        pytest.param("v5e:2x2", marks=[needs_libtpu, exhaustive]),
        pytest.param("h100:8", marks=[needs_cuda, exhaustive]),
    ],
)
def test_a_small_model_fits(name: str, tmp_path: Path) -> None:
    process = _plan(write_run_config(tmp_path, TINY, row_length=512), "--topology", name, "--stage", "first")
    assert process.returncode == 0, process.stderr
    size = parse_topology(name).size
    assert "stage first fits" in process.stdout
    assert f"{size} devices, mesh {{data: 1, fsdp: {size}, context: 1, tensor: 1" in process.stdout
    assert ("all-gather, received" in process.stdout) == (size > 1)
    assert "Traceback" not in process.stderr


@pytest.mark.slow
@needs_libtpu
def test_a_model_that_does_not_fit_has_exit_status_1(tmp_path: Path) -> None:
    path = write_run_config(tmp_path, QWEN2_7B, row_length=1024)
    process = _plan(path, "--topology", "v5e:2x2", "--stage", "second")
    assert process.returncode == 1, process.stderr
    assert "stage second: the update does not fit" in process.stderr
    assert "15.75 GiB of each v5e" in process.stderr
    assert "reference pass" in process.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fsdp", "attention"),
    [
        pytest.param("v5e:4x4", 4, "splash", marks=[needs_libtpu, exhaustive]),
        pytest.param("h100:8", 8, "cudnn", marks=[needs_cuda, exhaustive]),
        pytest.param("v6e:4x4", 4, "splash", marks=[needs_libtpu, exhaustive]),
        pytest.param("h100:8", 2, "blockwise", marks=[needs_cuda, exhaustive]),
    ],
)
def test_rows_of_32768_tokens_train_a_7b_model(name: str, fsdp: int, attention: str, tmp_path: Path) -> None:
    """The reference pass and the update fit at full shape with all parameters. Context parallelism splits the rows."""
    settings = [f"mesh.fsdp={fsdp}", f"mesh.context={parse_topology(name).size // fsdp}", "compute.remat=full"]
    path = write_run_config(tmp_path, QWEN2_7B, row_length=32_768)
    process = _plan(path, "--topology", name, "--stage", "second", "--set", *settings)
    assert process.returncode == 0, process.stderr
    assert "stage second fits" in process.stdout
    assert f"attention {attention}, remat full" in process.stdout
