"""If a process of a run is missing, fails, hangs or differs, all processes end soon, and each says why."""

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
from support import small
from support.faults import Outcome
from support.processes import started, write_config
from support.selection import exhaustive

from thinkpo_jax.run.agreement import find_differences
from thinkpo_jax.runtime import files
from thinkpo_jax.runtime.console import ProgressReporter, log_info
from thinkpo_jax.runtime.files import lock_folder
from thinkpo_jax.runtime.sharding import put_on_mesh

PROGRAM = """
import argparse, os, signal, sys, time
from thinkpo_jax.runtime import processes
from thinkpo_jax.runtime.cli import run_and_exit
from thinkpo_jax.runtime.config import UserError

case, start_timeout = sys.argv.pop(1), float(sys.argv.pop(1))

def fall_asleep():
    time.sleep(1000)

def main(arguments):
    parser = argparse.ArgumentParser()
    processes.add_distributed_arguments(parser)
    processes.initialize_distributed(parser.parse_args(arguments), start_timeout=start_timeout)
    processes.barrier("start")
    if case == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif case == "sleeps":
        fall_asleep()
    elif case == "works":
        for _ in range(15):
            time.sleep(1)
            processes.note_progress()
    elif case == "fails":
        raise UserError("the first line" + chr(10) + "the second line")
    elif case == "crashes":
        raise ZeroDivisionError("by zero")
    processes.barrier("end")

run_and_exit(main)
"""
HANG_TIMEOUT = ["--hang-timeout", "0.1"]  # minutes


def _program(case: str, *, start_timeout: float = 100) -> list[str]:
    return ["-c", PROGRAM, case, str(start_timeout)]


@pytest.mark.slow
@pytest.mark.faults(Outcome.REFUSED)
def test_waiting_for_a_process_that_never_comes_ends_after_the_limit_or_with_ctrl_c() -> None:
    with started([_program("waits", start_timeout=5)] * 2, num_missing=1) as processes:
        assert processes[1].stdout is not None
        assert "Start all of them within 5 seconds" in processes[1].stdout.readline()
        processes[1].send_signal(signal.SIGINT)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 130], outputs
    assert "error: the processes cannot connect: not all of them came within 5 seconds." in outputs[0]
    assert "Stopped." in outputs[1]
    assert "Traceback" not in "".join(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stops", pytest.param("sleeps", marks=exhaustive)])
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=exhaustive)])
@pytest.mark.faults(Outcome.REFUSED)
def test_a_process_that_hangs_ends_all_with_the_stacks_of_what_they_did(case: str, victim: int) -> None:
    commands = [[*_program(case if index == victim else "waits"), *HANG_TIMEOUT] for index in range(2)]
    with started(commands) as processes:
        other = processes[1 - victim].communicate(timeout=120)[0]
        if case == "stops":
            processes[victim].send_signal(signal.SIGCONT)
        output = processes[victim].communicate(timeout=120)[0]
    assert all(process.returncode for process in processes)
    assert "in barrier" in other, other
    sentence = "no process made progress for 0.1 minutes"
    if case == "sleeps":
        assert "in fall_asleep" in output, output
        assert f"process {victim}: error: {sentence}" in output
    if (case, victim) != ("stops", 0):  # a stopped process 0 answers nobody
        assert f"process {1 - victim}: error: {sentence}" in other


@pytest.mark.slow
@exhaustive
def test_the_progress_of_one_process_counts_for_all() -> None:
    with started([[*_program(case), *HANG_TIMEOUT] for case in ("waits", "works")]) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


@pytest.mark.slow
@exhaustive
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("case", "status", "message"),
    [("fails", 2, ["the first line", "the second line"]), ("crashes", 1, ["ZeroDivisionError: by zero"])],
)
@pytest.mark.faults(Outcome.REFUSED)
def test_a_process_that_fails_ends_all_with_its_message(
    victim: int, case: str, status: int, message: list[str]
) -> None:
    with started([_program(case if index == victim else "waits") for index in range(2)]) as processes:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [status, status], outputs
    expected = [f"process {victim} has ended, so this process ends too. Its message:", *message]
    lines = [line for line in outputs[1 - victim].splitlines() if "error" in line]
    assert lines == [f"process {1 - victim}: error: {line}" for line in expected]


OTHER_VERSIONS = """
from thinkpo_jax import train
from thinkpo_jax.run import agreement
from thinkpo_jax.runtime.cli import run_and_exit

versions = agreement.package_versions() | {"flax": "0.1"}
agreement.package_versions = lambda: versions
run_and_exit(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("data", "stage sft: this process reads other data than process 0"),
        ("settings", "this process differs from process 0: stages.1.beta is 0.2, not 0.1. Start all processes"),
        pytest.param("seed", "this process differs from process 0: seed is 1, not 0. ", marks=exhaustive),
        pytest.param("versions", "this process differs from process 0: flax is '0.1', not '", marks=exhaustive),
        pytest.param("file", "missing.yaml: ", marks=exhaustive),
    ],
)
@pytest.mark.faults(Outcome.REFUSED)
def test_processes_that_differ_end_with_the_name_of_what_differs(tmp_path: Path, difference: str, message: str) -> None:
    config, other = write_config(tmp_path, "one"), str(tmp_path / "other.yaml")
    text = Path(config).read_text()
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(rows[:-1]))
    changes = {"data": ("rows.jsonl", "fewer.jsonl"), "settings": ("beta: 0.1", "beta: 0.2")}
    Path(other).write_text(text.replace(*changes.get(difference, ("", ""))))
    program = ["-c", OTHER_VERSIONS] if difference == "versions" else ["-m", "thinkpo_jax.train"]
    options = ["--config", other] if difference != "file" else ["--config", str(tmp_path / "missing.yaml")]
    options += ["--set", "seed=1"] if difference == "seed" else []
    began = time.monotonic()
    with started([["-m", "thinkpo_jax.train", "--config", config], [*program, *options]]) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert time.monotonic() - began < 120
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert message in outputs[1]
    assert "process 0: error: process 1 has ended, so this process ends too. Its message:" in outputs[0]
    assert f"process 0: error: {outputs[1].split('process 1: error: ')[1].splitlines()[0]}" in outputs[0]
    assert "Traceback" not in "".join(outputs)
    assert not (tmp_path / "one" / "sft" / "metrics.jsonl").exists()


def test_differences_name_the_key_and_both_values() -> None:
    old = {"seed": 0, "stages": [{"beta": 0.1, "data": {"path": "a"}}], "mesh": {"fsdp": 2}}
    new = {"seed": 0, "stages": [{"beta": 0.2, "data": {"path": "b"}}], "mesh": {"fsdp": 2, "data": 2}}
    assert find_differences(old, new) == [("stages.0.beta", 0.1, 0.2), ("mesh.data", None, 2)]
    assert find_differences({"stages": [1]}, {"stages": [1, 2]}) == [("stages", [1], [1, 2])]
    assert find_differences(old, old) == []


def test_long_work_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signs: list[None] = []
    watchdog = SimpleNamespace(note_progress=lambda: signs.append(None))
    monkeypatch.setattr("thinkpo_jax.runtime.processes._watchdog", watchdog)
    log_info("a message")
    assert len(signs) == 1
    ProgressReporter("work", 10).update(1)
    assert len(signs) == 2
    put_on_mesh(np.zeros((8, 2)), ("batch", None), small.mesh())
    assert len(signs) == 3
    # Another run may hold a lock for hours.
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.01)
    lock = filelock.FileLock(tmp_path / ".lock", thread_local=False)
    with lock:
        threading.Timer(0.3, lock.release).start()
        with lock_folder(tmp_path, "folder", wait_message="waiting"):
            assert len(signs) > 5
