"""Where do metrics go? One JSON object per update into a file, and a progress bar for a person."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.processes import is_primary_process

PROGRESS_LINE_INTERVAL_SECONDS = 10.0


class MetricsFile:
    """A JSONL file of one object per update. Opened at update `step`, later lines of an earlier try are cut off.

    Of several processes the first one alone writes.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self._file = None
        if not is_primary_process():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)  # a crash here leaves the old file or the new one, never half of it
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, float]) -> None:
        """Appends one line; it is in the file when this returns."""
        if self._file is not None:
            self._file.write(json.dumps(dict(metrics)) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; none where there is no file. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1] if line]
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}. Remove the stage's folder to train it again.") from None


class ProgressReporter:
    """A bar on a terminal; in a pipe or a file a plain line every few seconds, and at the end.

    `total` is None where it is not known, and so is the end.
    """

    def __init__(self, title: str, total: int | None, *, done: int = 0, unit: str = "step") -> None:
        self._bar = None
        self._title, self._total, self._unit = title, total, unit
        self._first, self._start, self._said = done, time.monotonic(), time.monotonic()
        if sys.stderr.isatty() and is_primary_process():
            self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True, file=sys.stderr)

    def update(self, done: int, values: Mapping[str, str] | None = None) -> None:
        """`done` of the total are finished; `shown` are the values beside them."""
        if self._bar is not None:
            self._bar.set_postfix(values or {}, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if not is_primary_process():
            return
        if now - self._said >= PROGRESS_LINE_INTERVAL_SECONDS or done == self._total:
            self._said = now
            rate = (done - self._first) / max(now - self._start, 1e-9)
            shown = "".join(f", {name} {value}" for name, value in (values or {}).items())
            line = f"{self._title}: {self._unit} {done}"
            if self._total is not None:
                left = (self._total - done) / rate if rate > 0 else float("inf")
                line += f"/{self._total}, {left:.0f} s left"
            print(line + shown, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def log_info(text: str) -> None:
    """A line for the person who watches, beside a bar if there is one. Of several processes the first one speaks."""
    if not is_primary_process():
        return
    with tqdm.external_write_mode(file=sys.stderr):
        print(text, file=sys.stderr, flush=True)


def log_warning(text: str) -> None:
    """A line that starts with `warning:`."""
    log_info(f"warning: {text}")


METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"  # of a stage, one line for each (validated) update
