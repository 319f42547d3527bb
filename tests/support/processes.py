"""Starts real processes that form one run, and writes the configuration of a small run."""

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

import yaml

DEVICES, STEPS = 8, 5
OPTIMIZER = {"learning_rate": 3e-3, "warmup_ratio": 0.0, "schedule": "constant"}
SUMS = [(a, b) for a in range(10) for b in range(6)]


def write_config(folder: Path, run: str, *, evaluated: bool = True, **stage: Any) -> str:
    """Writes a configuration: SFT with validation, then ThinkPO with two micro-batches, then an evaluation."""
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
        "probe": {"every": 3, "questions": 6, "max_new_tokens": 12} if evaluated else None,
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
            "sampling": {"temperature": 0.7, "max_new_tokens": 24},
            "local": {"slots": 12},
        }
    written = folder / f"{run}.yaml"
    written.write_text(yaml.safe_dump(config))
    return str(written)


TRAIN = """
import sys
from thinkpo_jax import train
from thinkpo_jax.runtime import processes
from thinkpo_jax.runtime.cli import run_and_exit

processes.HEARTBEAT_TIMEOUT_SECONDS = int(sys.argv.pop(1))
run_and_exit(train.main)
"""


@contextlib.contextmanager
def running(*configs: str, heartbeat_timeout: int | None = None) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts one process per configuration. They share the devices.

    A dead process is noticed after `heartbeat_timeout` seconds. None leaves the timeout that users have.
    """
    train_command = ["-m", "thinkpo_jax.train"] if heartbeat_timeout is None else ["-c", TRAIN, str(heartbeat_timeout)]
    with started([[*train_command, "--config", config] for config in configs]) as processes:
        yield processes


@contextlib.contextmanager
def started(commands: list[list[str]], *, num_missing: int = 0) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts one Python process per command as a run of several processes, and kills those that are left at the end.

    The run has `num_missing` more processes, which never come.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    xla_flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // len(commands)}"
    flags = ["--coordinator-address", address, "--num-processes", str(len(commands) + num_missing), "--process-id"]
    processes = [
        subprocess.Popen(
            [sys.executable, *command, *flags, str(index)],
            env=os.environ | {"XLA_FLAGS": xla_flags}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index, command in enumerate(commands)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Waits until a run has written a file or folder."""
    while not path.exists():
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
