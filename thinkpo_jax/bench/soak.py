"""Trains for a long time, and measures whether memory and the number of files stay bounded."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thinkpo_jax.bench.machine import read_process_memory
from thinkpo_jax.run.run_config import load_run_config
from thinkpo_jax.runtime.bucket_files import is_in_bucket
from thinkpo_jax.runtime.cli import EXIT_STATUS_INTERRUPTED, describe_exit_status, handling, last_error, printed_errors
from thinkpo_jax.runtime.config import RunError, UserError

SAMPLE_SECONDS = 1.0
NUM_PARTS = 12  # of the time. The first two are the warm-up.
NUM_WARM_UP = 2


class Sample(NamedTuple):
    """One look at the training."""

    seconds: float  # since its start
    resident: int  # bytes of memory of its process
    files: int  # in the run folder, and folders too
    checkpoint: int  # the newest one, 0 if there is none yet


def bench_soak(config: Path, assignments: Sequence[str], minutes: float) -> dict[str, Any]:
    """Trains a run with `python -m thinkpo_jax.train` for some minutes, then stops it with SIGTERM.

    Prints a table by parts of the time and returns its figures. Raises `UserError` if the run has begun already.
    Raises `RunError` if the training ends before the time is over, or fails.
    """
    name = load_run_config(config, assignments).run_dir
    if is_in_bucket(name):
        raise UserError(f"run_dir {name}: expected a folder on a disk, where files can be counted. Choose one.")
    run_dir = Path(name)
    log = run_dir.with_name(f"{run_dir.name}.log")
    if run_dir.exists():
        raise UserError(f"run_dir {run_dir}: exists. Measure a new run: remove the folder or choose another one.")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "thinkpo_jax.train", "--config", str(config)]
    command += ["--set", *assignments] if assignments else []
    with log.open("wb") as output, handling(signal.default_int_handler, signal.SIGTERM):
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            samples = _watch(process, run_dir, 60 * minutes)
            has_ended = process.poll() is not None
        finally:  # also after Ctrl-C
            process.terminate()
            status = process.wait()
    if has_ended or status != EXIT_STATUS_INTERRUPTED:
        text = log.read_text(encoding="utf-8", errors="replace")
        reason = printed_errors(text) or last_error(text)
        raise RunError(f"{log}: the training ended with {describe_exit_status(status)}: {reason}")
    result = summarize(samples, 60 * minutes)
    print(_table(result))
    return result


def _watch(process: subprocess.Popen[bytes], run_dir: Path, seconds: float) -> list[Sample]:
    start, samples = time.monotonic(), list[Sample]()
    while (passed := time.monotonic() - start) < seconds and process.poll() is None:
        resident = read_process_memory(process.pid, "VmRSS")
        files = sum(len(names) + len(folders) for _, folders, names in os.walk(run_dir))
        steps = [int(path.name) for path in run_dir.glob("*/checkpoints/*") if path.name.isdigit()]
        samples += [Sample(passed, resident, files, max(steps, default=0))]
        time.sleep(SAMPLE_SECONDS)
    return samples


def summarize(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Returns the figures of each part of the time, and how far the memory moved after the warm-up."""
    parts = [[each for each in samples if int(NUM_PARTS * each.seconds / seconds) == part] for part in range(NUM_PARTS)]
    rows = [
        {
            "minutes": seconds / 60 * (number + 1) / NUM_PARTS,
            "resident": statistics.median(each.resident for each in part),
            "most_resident": max(each.resident for each in part),
            "most_files": max(each.files for each in part),
            "update": part[-1].checkpoint,
        }
        for number, part in enumerate(parts)
        if part
    ]
    warm = [row["resident"] for row in rows[NUM_WARM_UP:]]
    num_saves = len({each.checkpoint for each in samples} - {0})
    return {"rows": rows, "growth": warm[-1] / warm[0] - 1, "range": max(warm) / min(warm) - 1, "saves": num_saves}


def _table(result: dict[str, Any]) -> str:
    lines = ["| until minute | memory, MB (median) | memory, MB (most) | files (most) | last checkpoint |"]
    lines += ["|--:|--:|--:|--:|--:|"]
    for row in result["rows"]:
        memory = f"{row['resident'] / 1e6:,.1f} | {row['most_resident'] / 1e6:,.1f}"
        lines.append(f"| {row['minutes']:.1f} | {memory} | {row['most_files']} | {row['update']:,} |")
    lines.append(
        f"\n{result['saves']} saves. After the warm-up, the median memory grew by {100 * result['growth']:+.2f} % and "
        f"moved within {100 * result['range']:.2f} %."
    )
    return "\n".join(lines)
