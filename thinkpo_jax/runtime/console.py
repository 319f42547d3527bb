"""Prints messages and progress, and writes metrics to a file. Only the primary process does either."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from thinkpo_jax.runtime.manifest import sync_to_disk
from thinkpo_jax.runtime.paths import to_display
from thinkpo_jax.runtime.processes import broadcast_from_primary, is_primary_process, note_progress

PROGRESS_LINE_INTERVAL_SECONDS = 10.0


class MetricsFile:
    """A JSONL file with one object per update. Opening it removes what an earlier attempt wrote after update `step`."""

    def __init__(self, path: Path, *, step: int) -> None:
        if is_primary_process():
            lines = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(lines), encoding="utf-8")
            sync_to_disk(partial)
            partial.replace(path)  # a crash leaves the old file or the new one, never a part of it
        self._file = (path if is_primary_process() else Path(os.devnull)).open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, float]) -> None:
        """Appends one line and flushes it."""
        self._file.write(json.dumps(dict(metrics)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the lines of a metrics file, without a last line that a crash cut short. A missing file has no lines.

    Logs a warning if there are damaged lines, and leaves them out.
    """
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line]
    metrics: list[dict[str, float]] = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
            values = json.loads(line)
            if all(isinstance(values[name], int | float) for name in ("step", *values)):
                metrics.append(values)
    if len(metrics) < len(lines):
        log_warning(f"{path}: {len(lines) - len(metrics)} of {len(lines)} lines are damaged. They are left out.")
    return metrics


def read_shared_metrics(path: Path, names: Sequence[str], *, last: int) -> list[dict[str, float]]:
    """Returns the named metrics of a file up to update `last`, in all processes what process 0 reads."""
    lines = [{name: line[name] for name in ("step", *names) if name in line} for line in read_metrics(path)]
    return json.loads(broadcast_from_primary(json.dumps([line for line in lines if line["step"] <= last]).encode()))


class ProgressReporter:
    """Shows a progress bar on a terminal. In a pipe or a file, prints a line every few seconds and at the end.

    `total` is None if it is not known. Then there is no last line.
    """

    def __init__(self, title: str, total: int | None, *, done: int = 0, unit: str = "step") -> None:
        self._title, self._total, self._unit = title, total, unit
        self._initial, self._start, self._last_line = done, time.monotonic(), time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and is_primary_process():
            self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True, file=sys.stderr)

    def update(self, done: int, values: Mapping[str, str] | None = None) -> None:
        """Shows that `done` of the total are finished, with values such as the loss beside it."""
        note_progress()
        if self._bar is not None:
            self._bar.set_postfix(values or {}, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        is_due = now - self._last_line >= PROGRESS_LINE_INTERVAL_SECONDS or done == self._total
        if not is_due or not is_primary_process():
            return
        self._last_line = now
        line = f"{self._title}: {self._unit} {done}"
        if self._total is not None:
            rate = (done - self._initial) / max(now - self._start, 1e-9)
            seconds = (self._total - done) / rate if rate > 0 else float("inf")
            line += f"/{self._total}, {seconds:.0f} s left"
        line += "".join(f", {name} {value}" for name, value in (values or {}).items())
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar on the terminal as it is."""
        if self._bar is not None:
            self._bar.close()


def log_info(text: str) -> None:
    """Prints a line to stderr, above a progress bar if there is one."""
    note_progress()
    if is_primary_process():
        with tqdm.external_write_mode(file=sys.stderr):
            print(to_display(text), file=sys.stderr, flush=True)


def log_warning(text: str) -> None:
    """Prints a line that starts with `warning:` to stderr."""
    log_info(f"warning: {text}")
