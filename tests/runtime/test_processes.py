"""Two real processes with four devices each make the same run as one process with eight. If one dies, both end."""

import argparse
import json
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from support import small
from support.faults import Outcome
from support.processes import STEPS, running, started, wait_for, write_config
from support.selection import exhaustive

from thinkpo_jax import train
from thinkpo_jax.data.batches import Batch
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.runtime.processes import (
    DelayedVote,
    add_distributed_arguments,
    broadcast_from_primary,
    detect_cluster,
)

STEP = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_NODES": "2"}


def _weights(run: Path, stage: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(run / stage / "model" / "model.safetensors")


def _assert_same_run(run: Path, other: Path) -> None:
    for stage in ("sft", "thinkpo"):
        for name in ("metrics.jsonl", "validation.jsonl"):
            lines, other_lines = (read_metrics(folder / stage / name) for folder in (run, other))
            assert [line["step"] for line in other_lines] == [line["step"] for line in lines]
            for line, other_line in zip(lines, other_lines, strict=True):
                assert other_line["loss"] == pytest.approx(line["loss"], abs=1e-5)
                assert other_line.keys() == line.keys()
                assert other_line.get("tokens") == line.get("tokens")
        weights, other_weights = _weights(run, stage), _weights(other, stage)
        assert weights.keys() == other_weights.keys()
        for name, value in weights.items():
            np.testing.assert_allclose(other_weights[name], value, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def single_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    assert run_command(train.main, ["--config", write_config(folder, "single")]) == 0
    return folder / "single"


@pytest.mark.slow
def test_two_processes_make_the_same_run_as_one(single_run: Path, tmp_path: Path) -> None:
    with running(*[write_config(tmp_path, "two[1]")] * 2) as processes:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    run = tmp_path / "two[1]"
    _assert_same_run(single_run, run)
    # Only process 0 prints messages and writes metrics, checkpoints and the report.
    for index, output in enumerate(outputs):
        assert f"Process {index} of 2 (0-based) is waiting for the other processes" in output
    assert "the loss before the first update is 0.693" in outputs[0]
    assert not [line for line in outputs[1].splitlines() if "update" in line or "report" in line]
    assert max(int(path.name) for path in (run / "sft" / "checkpoints").iterdir()) == STEPS
    expected, models = (json.loads((folder / "report.json").read_text())["models"] for folder in (single_run, run))
    assert models == expected
    probes = [read_metrics(folder / "sft" / "probe.jsonl") for folder in (single_run, run)]
    assert probes[1] == probes[0] != []
    answers = [folder / "evaluation" / "thinkpo" / "miniature.json" for folder in (single_run, run)]
    assert len({json.dumps(json.loads(path.read_text())["items"]) for path in answers}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("evaluated", [False, pytest.param(True, marks=exhaustive)])
def test_two_processes_make_the_same_run_in_a_bucket(
    evaluated: bool, single_run: Path, tmp_path: Path, bucket_url: str
) -> None:
    config = Path(write_config(tmp_path, "two", evaluated=evaluated))
    config.write_text(config.read_text().replace(f"run_dir: {tmp_path}/two", f"run_dir: {bucket_url}"))
    with running(str(config), str(config)) as processes:  # each has a copy of its own
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    _assert_same_run(single_run, RunFolder.open(bucket_url).path)


@pytest.mark.slow
@pytest.mark.parametrize("heartbeat_timeout", [20, pytest.param(None, marks=exhaustive)])
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=exhaustive)])
@pytest.mark.faults(Outcome.SAME)
def test_a_dead_process_ends_the_other_and_a_single_process_resumes(
    single_run: Path, tmp_path: Path, victim: int, heartbeat_timeout: int | None
) -> None:
    config = write_config(tmp_path, "broken", evaluated=heartbeat_timeout is None)
    run = tmp_path / "broken"
    with running(config, config, heartbeat_timeout=heartbeat_timeout) as processes:
        wait_for(run / "sft" / "checkpoints" / "2", processes)
        processes[victim].kill()
        output = processes[1 - victim].communicate(timeout=400)[0]
    assert processes[1 - victim].returncode not in (0, None)
    assert "one of them has probably ended" in output or "another task died" in output, output
    assert run_command(train.main, ["--config", config]) == 0  # one process with eight devices
    _assert_same_run(single_run, run)


@pytest.mark.slow
@pytest.mark.faults(Outcome.SAME)
def test_interrupting_one_process_stops_all(tmp_path: Path) -> None:
    config = write_config(tmp_path, "stopped", steps=200)
    run = tmp_path / "stopped"
    with running(config, config) as processes:
        wait_for(run / "sft" / "checkpoints" / "2", processes)
        processes[1].terminate()
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [130, 130], outputs
    assert not (run / "sft" / "model").exists()
    saved = [int(path.name) for path in (run / "sft" / "checkpoints").iterdir()]
    assert max(saved) == len(read_metrics(run / "sft" / "metrics.jsonl"))  # no finished update is lost


BROADCAST = """
import argparse

import jax
import numpy as np

from thinkpo_jax.runtime import processes

parser = argparse.ArgumentParser()
processes.add_distributed_arguments(parser)
processes.initialize_distributed(parser.parse_args())
index = jax.process_index()
values = [index == 0, index == 1, 2**40 + index, -1 - index, [b"", b"xyz"][index], [b"ab", b""][index]]
print("scalars", [processes.broadcast_from_primary(value) for value in values])
print("array", processes.broadcast_from_primary(np.arange(3, dtype=np.int32) + index).tolist())
print("any", processes.any_process(index == 1), processes.any_process(False))
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
vote = processes.DelayedVote(mesh, num_flags=2)
print("vote", [vote(flag, number == 2) for number, flag in enumerate((False, index == 1, False, False))])
processes.barrier("end")
processes.shutdown_distributed()
"""


@pytest.mark.slow
def test_all_processes_receive_the_value_of_the_primary_process() -> None:
    with started([["-c", BROADCAST]] * 2) as processes:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for output in outputs:
        assert f"scalars [True, False, {2**40}, -1, b'', b'ab']" in output
        assert "array [0, 1, 2]" in output
        assert "any True False" in output
        assert "vote [(False, False), (False, False), (True, False), (False, True)]" in output


def test_a_vote_of_one_process_is_not_delayed() -> None:
    vote = DelayedVote(small.mesh(), num_flags=2)
    assert [vote(flag, not flag) for flag in (True, False)] == [(True, False), (False, True)]


@pytest.mark.parametrize("value", [True, False, 0, 7, -3, 2**40, b"", b"\x00\xff"])
def test_a_broadcast_value_keeps_its_type(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert broadcast_from_primary(value) is value
    monkeypatch.setattr("thinkpo_jax.runtime.processes.is_distributed", lambda: True)  # of one process
    received = broadcast_from_primary(value)
    assert (received, type(received)) == (value, type(value))
    np.testing.assert_array_equal(broadcast_from_primary(np.arange(3)), np.arange(3))


def test_each_process_reads_only_the_rows_of_its_devices() -> None:
    """Two processes fill the two halves of every micro-batch. What they know of the whole batch is the same."""
    options: dict[str, Any] = {"shards": 4, "steps": 2, "size": None, "rows": 16, "rows_per_device": 2}

    class RecordingList(list):
        read: set[int]

        def __getitem__(self, index: Any) -> Any:
            self.read.add(index)
            return super().__getitem__(index)

    def batches(local_shards: list[int] | None) -> Any:
        examples = RecordingList(small.pairs(100))
        examples.read = set()
        plan = small.batches(examples, own=local_shards, **options)
        examples.read.clear()
        return plan

    whole, *parts = (batches(local_shards) for local_shards in (None, [0, 1], [2, 3]))
    for index in range(2):
        expected, *halves = (plan[index] for plan in (whole, *parts))
        work = {plan.count_work(batch) for plan, batch in zip((whole, *parts), (expected, *halves), strict=True)}
        assert len(work) == 1
        for field in Batch._fields:
            arrays = [getattr(half, field) for half in halves]
            middle = arrays[0].shape[1] // 2
            if field in ("example_ids", "reference_log_probs"):
                for array in arrays:
                    np.testing.assert_array_equal(array, getattr(expected, field))
            else:
                joined = np.concatenate([arrays[0][:, :middle], arrays[1][:, middle:]], axis=1)
                np.testing.assert_array_equal(joined, getattr(expected, field))
    assert not parts[0].examples.read & parts[1].examples.read
    assert parts[0].examples.read | parts[1].examples.read == whole.examples.read != set()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"JAX_PLATFORMS": "cpu"}, None),
        ({"JAX_PLATFORMS": "cuda", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # With one process per GPU, JAX gives each process its own GPU.
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "3", **STEP, "SLURM_GPUS_ON_NODE": "8"}, {}),
        # With one process per node, each process has all GPUs of its node.
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", **STEP, "SLURM_GPUS_ON_NODE": "8"},
            {"local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7]},
        ),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "JAX_PLATFORMS": "cuda"}, None),  # an sbatch script without srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3", "JAX_PLATFORMS": "tpu,cpu"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_a_cluster_is_detected(environment: dict[str, str], expected: dict[str, Any] | None) -> None:
    assert detect_cluster(environment) == expected


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_SIZE"])
def test_a_bad_process_count_names_its_variable(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=many"):
        detect_cluster({name: "many"})


@pytest.mark.faults(Outcome.REFUSED)
def test_a_port_in_use_is_an_error_before_jax_crashes_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        arguments = ["--coordinator-address", address, "--num-processes", "2", "--process-id", "0"]
        assert run_command(train.main, ["--config", write_config(tmp_path, "never"), *arguments]) == 2
    assert f"--coordinator-address {address}: " in capsys.readouterr().err


def test_a_port_in_use_on_a_cluster_is_an_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = STEP | {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("thinkpo_jax.runtime.processes._is_connecting", threading.Event())
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("JAX_COORDINATOR_PORT", port)
        assert run_command(train.main, ["--config", write_config(tmp_path, "never")]) == 2
    error = capsys.readouterr().err
    assert f"error: node1:{port}: " in error
    assert "set JAX_COORDINATOR_PORT to another port" in error


ADDRESS, COUNT, INDEX = "--coordinator-address", "--num-processes", "--process-id"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([ADDRESS, "10.0.0.2:8476"], "go together"),
        ([INDEX, "0"], "go together"),
        ([ADDRESS, "10.0.0.2:8476", COUNT, "2", INDEX, "2"], "with --num-processes 2 it must be one of 0 to 1"),
        ([ADDRESS, "10.0.0.2:8476", COUNT, "0", INDEX, "0"], "--num-processes 0: expected"),
        ([ADDRESS, "10.0.0.2", COUNT, "2", INDEX, "0"], "expected HOST:PORT"),
        ([ADDRESS, "localhost:0", COUNT, "2", INDEX, "0"], "expected HOST:PORT"),
        ([ADDRESS, "no such host:8476", COUNT, "2", INDEX, "1"], "no such host:8476: "),
        ([ADDRESS, "10.0.0.2:84760", COUNT, "2", INDEX, "0"], "expected HOST:PORT"),
    ],
)
def test_invalid_flags_are_an_error(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(train.main, ["--config", write_config(tmp_path, "never"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [ADDRESS, "h:1", COUNT, "2", INDEX, "0"],
        ["--coordinator", "h:1", "--processes", "2", "--process", "0"],
        ["--coordinator=h:1", "--processes=2", "--process=0"],
        ["--process", "0", "--processes", "2", "--coordinator", "h:1"],
    ],
)
def test_flags_have_new_and_old_names(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_distributed_arguments(parser)
    expected = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0, "hang_timeout": 30.0}
    assert vars(parser.parse_args(arguments)) == expected


@pytest.mark.parametrize("minutes", ["0", "-1", "inf", "nan", "soon"])
def test_a_bad_hang_timeout_is_an_error(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_distributed_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--hang-timeout", minutes])
    assert f"--hang-timeout: {minutes} is not a positive number of minutes" in capsys.readouterr().err


def test_the_help_shows_the_new_names_first() -> None:
    parser = argparse.ArgumentParser()
    add_distributed_arguments(parser)
    text = parser.format_help()
    for new, old in ((ADDRESS, "--coordinator HOST"), (COUNT, "--processes N"), (INDEX, "--process I")):
        assert text.index(new) < text.index(old)
