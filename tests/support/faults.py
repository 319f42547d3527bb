"""Damages files of a run, and judges what a command makes of it."""

import contextlib
import enum
import hashlib
import io
import json
import os
import random
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.console import read_metrics


class Outcome(enum.Enum):
    """What became of a damage. The last two must never occur."""

    SAME = "same result"
    REPORTED = "other result, reported"
    REFUSED = "clear refusal"
    SILENT = "silent use"
    TRACEBACK = "traceback"


def _flip_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


# Each gets a file and a source of random numbers.
DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "flip": _flip_bit,
    "cut": lambda path, chance: os.truncate(path, chance.randrange(path.stat().st_size)),
    "zeros": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "remove": lambda path, _: path.unlink(),
}


def read_result(run: Path) -> dict[str, Any]:
    """Returns what a run is for: the weights of its models, and the figures of its report."""
    weights = {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("*/model/*.safetensors"))
    }
    report = run / "report.json"
    figures = json.loads(report.read_text()) if report.exists() else {}
    return {"weights": weights, **{key: figures.get(key) for key in ("models", "measures", "groups", "comparisons")}}


def judge(
    command: Callable[[Sequence[str]], None],
    arguments: Sequence[str],
    *,
    damaged: Path,
    result: Callable[[], Any],
    expected: Any,
) -> tuple[Outcome, str]:
    """Runs a command after a file was damaged. Returns the outcome, and what the command printed.

    `result` reads the result of the command, which should be `expected`. A report names the damaged file.
    """
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = run_command(command, arguments)
        except Exception:
            return Outcome.TRACEBACK, traceback.format_exc()
    text = printed.getvalue()
    if "Traceback (most recent call last)" in text:
        return Outcome.TRACEBACK, text
    if status != 0:
        is_clear = status in (1, 2) and any(line.startswith("error: ") for line in text.splitlines())
        return (Outcome.REFUSED if is_clear else Outcome.TRACEBACK), text
    if result() == expected:
        return Outcome.SAME, text
    lines = [line for line in text.splitlines() if "warning: " in line and damaged.name in line]
    return (Outcome.REPORTED if lines else Outcome.SILENT), text


def last_step(run: Path, stage: str) -> int:
    """Returns the last update in the metrics of a stage."""
    return int(read_metrics(run / stage / "metrics.jsonl")[-1]["step"])
