"""Two real processes of four devices make the run that one process of eight makes; one that dies ends the other."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from support import small
from support.selection import exhaustive

from thinkpo_jax import train
from thinkpo_jax.data.batches import Batch
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.runtime.processes import detect_cluster

DEVICES, STEPS = 8, 5
STEP = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_NODES": "2"}
OPTIMIZER = {"learning_rate": 3e-3, "warmup_ratio": 0.0, "schedule": "constant"}
SUMS = [(a, b) for a in range(10) for b in range(6)]


def _config(folder: Path, run: str, *, evaluated: bool = True, **stage: Any) -> str:
    """The path of a configuration: SFT with held-out examples, then ThinkPO, two micro-batches, then an evaluation."""
    rows = [
        {"question": f"{a}+{b}?", "long": f"{a}+{b}={a + b};#{a + b}", "short": f"#{a + b}"[: 1 + a % 2]}
        for a, b in SUMS
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "batch": {"rows": 16, "row_length": 64, "rows_per_device": 2},
        "optimizer": OPTIMIZER,
        "checkpoint": {"every": 2},
        "steps": STEPS,
    } | stage
    sft = {"prompt": "question", "response": "long", "path": str(path)}
    pairs = {"prompt": "question", "chosen": "long", "rejected": "short", "path": str(path)}
    config = {
        "run_dir": str(folder / run),
        "model": {"path": "builtin:miniature"},
        "compute": {"dtype": "float32"},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "stages": [
            {"name": "sft", "objective": "sft", "data": sft, "validation": {"share": 0.2, "every": 3}, **common},
            {"name": "thinkpo", "objective": "thinkpo", "data": pairs, "beta": 0.1, **common},
        ],
    }
    if evaluated:
        config["evaluation"] = {
            "benchmarks": [{"name": "miniature", "questions": 12}],
            "sampling": {"temperature": 0.7, "max_new_tokens": 24, "batch_size": 12},
        }
    written = folder / f"{run}.yaml"
    written.write_text(yaml.safe_dump(config))
    return str(written)


TRAIN = """
import sys
from thinkpo_jax.runtime import processes as hosts
from thinkpo_jax import train
from thinkpo_jax.runtime.cli import program

hosts.MISSED_SECONDS = int(sys.argv.pop(1))
program(train.main)
"""


@contextlib.contextmanager
def _processes(*configs: str, missed_seconds: int | None = None) -> Iterator[list[subprocess.Popen[str]]]:
    """A run in as many processes as there are configurations. They share the devices.

    A dead process is missed after `missed_seconds`. None leaves the time that users have.
    """
    train_command = ["-m", "thinkpo_jax.train"] if missed_seconds is None else ["-c", TRAIN, str(missed_seconds)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // len(configs)}"
    environment = os.environ | {"XLA_FLAGS": flags}
    together = ["--coordinator", address, "--processes", str(len(configs)), "--process"]
    started = [
        subprocess.Popen(
            [sys.executable, *train_command, "--config", config, *together, str(index)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index, config in enumerate(configs)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _wait_for(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    while not path.exists():
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)


def _weights(run: Path, stage: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(run / stage / "model" / "model.safetensors")


def _same(one: Path, other: Path) -> None:
    for stage in ("sft", "thinkpo"):
        for name in ("metrics.jsonl", "validation.jsonl"):
            expected, found = (read_metrics(run / stage / name) for run in (one, other))
            assert [line["step"] for line in found] == [line["step"] for line in expected]
            for before, after in zip(expected, found, strict=True):
                assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
                assert after.keys() == before.keys()
                assert after.get("tokens") == before.get("tokens")
        expected, found = _weights(one, stage), _weights(other, stage)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    assert run_command(train.main, ["--config", _config(folder, "alone")]) == 0
    return folder / "alone"


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(alone: Path, tmp_path: Path) -> None:
    with _processes(*[_config(tmp_path, "two")] * 2) as processes:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    run = tmp_path / "two"
    _same(alone, run)
    # One speaks, and one writes: a log, a checkpoint of the last update, a report.
    for index, output in enumerate(outputs):
        assert f"process {index} of 2 (counted from 0) waits for the others" in output
    assert "the loss before the first update is 0.693" in outputs[0]
    assert not [line for line in outputs[1].splitlines() if "update" in line or "report" in line]
    assert [path.name for path in (run / "sft" / "checkpoints").iterdir()] == [str(STEPS)]
    expected, found = (json.loads((folder / "report.json").read_text())["models"] for folder in (alone, run))
    assert found == expected
    answers = [folder / "evaluation" / "thinkpo" / "miniature.json" for folder in (alone, run)]
    assert len({json.dumps(json.loads(path.read_text())["items"]) for path in answers}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("missed_seconds", [20, pytest.param(None, marks=exhaustive)])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_and_one_process_goes_on(
    alone: Path, tmp_path: Path, victim: int, missed_seconds: int | None
) -> None:
    config = _config(tmp_path, "broken", evaluated=missed_seconds is None)
    run = tmp_path / "broken"
    with _processes(config, config, missed_seconds=missed_seconds) as processes:
        _wait_for(run / "sft" / "checkpoints" / "2", processes)
        processes[victim].kill()
        output = processes[1 - victim].communicate(timeout=400)[0]
    assert processes[1 - victim].returncode not in (0, None)
    assert "one of them has probably ended" in output or "another task died" in output, output
    assert run_command(train.main, ["--config", config]) == 0  # eight devices of one process
    _same(alone, run)


@pytest.mark.slow
def test_a_stop_of_one_process_stops_all(tmp_path: Path) -> None:
    config = _config(tmp_path, "stopped", steps=200)
    run = tmp_path / "stopped"
    with _processes(config, config) as processes:
        _wait_for(run / "sft" / "checkpoints" / "2", processes)
        processes[1].terminate()
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [130, 130], outputs
    assert not (run / "sft" / "model").exists()
    saved = [int(path.name) for path in (run / "sft" / "checkpoints").iterdir()]
    assert saved == [len(read_metrics(run / "sft" / "metrics.jsonl"))]  # nothing that was done is lost


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "settings"])
def test_processes_that_do_not_run_the_same_are_told_so(tmp_path: Path, what: str) -> None:
    configs = [_config(tmp_path, "one"), _config(tmp_path, "other")]
    text = Path(configs[0]).read_text()
    if what == "data":
        rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "fewer.jsonl").write_text("".join(rows[:-1]))
        text, told = (
            text.replace("rows.jsonl", "fewer.jsonl"),
            "stage sft: this process reads other data than the first",
        )
    else:
        text, told = text.replace("beta: 0.1", "beta: 0.2"), "this process has another configuration"
    Path(configs[1]).write_text(text)
    with _processes(*configs) as started:
        output = started[1].communicate(timeout=400)[0]
        assert started[1].returncode == 2
        assert f"process 1: error: {told}" in output
        started[0].communicate(timeout=400)  # misses the other
        assert started[0].returncode != 0
    assert not (tmp_path / "one" / "sft" / "metrics.jsonl").exists()


def test_each_process_reads_the_rows_of_its_own_devices() -> None:
    """What two processes fill are the two halves of every micro-batch; what they know of the whole is the same."""
    options: dict[str, Any] = {"shards": 4, "steps": 2, "size": None, "rows": 16, "rows_per_device": 2}

    class Watched(list):
        read: set[int]

        def __getitem__(self, index: Any) -> Any:
            self.read.add(index)
            return super().__getitem__(index)

    def batches(own: list[int] | None) -> Any:
        examples = Watched(small.pairs(100))
        examples.read = set()
        found = small.batches(examples, own=own, **options)
        examples.read.clear()
        return found

    whole, *parts = (batches(own) for own in (None, [0, 1], [2, 3]))
    for index in range(2):
        (expected, *halves) = (each[index] for each in (whole, *parts))
        assert (
            len({each.count_work(half) for each, half in zip((whole, *parts), (expected, *halves), strict=True)}) == 1
        )
        for field in Batch._fields:
            arrays = [getattr(half, field) for half in halves]
            middle = arrays[0].shape[1] // 2
            if field in ("examples", "reference"):
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
        # A process for each GPU: JAX gives each its own.
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "3", **STEP, "SLURM_GPUS_ON_NODE": "8"}, {}),
        # A process for each node has all GPUs of it.
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", **STEP, "SLURM_GPUS_ON_NODE": "8"},
            {"local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7]},
        ),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "JAX_PLATFORMS": "cuda"}, None),  # a script of sbatch, no srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3", "JAX_PLATFORMS": "tpu,cpu"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_a_cluster_is_recognised(environment: dict[str, str], expected: dict[str, Any] | None) -> None:
    assert detect_cluster(environment) == expected


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_SIZE"])
def test_a_bad_process_count_names_its_variable(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=many"):
        detect_cluster({name: "many"})


def test_a_port_that_is_taken_is_told_before_jax_crashes_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        arguments = ["--coordinator", address, "--processes", "2", "--process", "0"]
        assert run_command(train.main, ["--config", _config(tmp_path, "never"), *arguments]) == 2
    assert f"--coordinator {address}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator", "10.0.0.2:8476"], "go together"),
        (["--process", "0"], "go together"),
        (["--coordinator", "10.0.0.2:8476", "--processes", "2", "--process", "2"], "one of 0 to 1"),
        (["--coordinator", "10.0.0.2:8476", "--processes", "0", "--process", "0"], "--processes 0: expected"),
        (["--coordinator", "10.0.0.2", "--processes", "2", "--process", "0"], "expected HOST:PORT"),
        (["--coordinator", "localhost:0", "--processes", "2", "--process", "0"], "expected HOST:PORT"),
        (["--coordinator", "no such host:8476", "--processes", "2", "--process", "1"], "no such host:8476: "),
        (["--coordinator", "10.0.0.2:84760", "--processes", "2", "--process", "0"], "expected HOST:PORT"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(train.main, ["--config", _config(tmp_path, "never"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
