"""Runs a measurement in its own process, so that its peak memory is its own and a crash ends nothing else.

This file, run as a program, is that process. It imports a function, calls it and writes what it returns. A function
that yields has its result written again after each step, so a crash costs only what came after the last one.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkpo_jax.runtime.cli import describe_exit_status, handling, last_error, printed_errors, run_and_exit
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.files import write_atomically

INTERRUPTED = "interrupted"  # the key of a result that is not complete
END_SECONDS = 30  # until a killed process must be gone


class Child:
    """A public function of a module that runs in a process of its own. Arguments and result are JSON objects."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        folder: Path,
        environment: Mapping[str, str],
        niceness: int = 0,
    ) -> None:
        """Starts the process. `folder` gets the request, the result and the log."""
        name = function.__name__
        self._result, self.log = folder / f"{name}.result.json", folder / f"{name}.log"
        folder.mkdir(parents=True, exist_ok=True)
        self._result.unlink(missing_ok=True)
        (folder / f"{name}.request.json").write_text(json.dumps(dict(arguments)), encoding="utf-8")
        command = [sys.executable, "-m", "thinkpo_jax.bench.child", function.__module__, name]
        command += [str(folder), str(niceness)]
        variables = os.environ | environment
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=variables, start_new_session=True
            )

    def result(self) -> dict[str, Any] | None:
        """Returns what was written so far, or None."""
        return json.loads(self._result.read_text(encoding="utf-8")) if self._result.exists() else None

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process can be stuck in a driver
            self._process.wait(END_SECONDS)

    def wait(self, seconds: float | None = None) -> dict[str, Any]:
        """Waits until the process ends, kills it after `seconds`, and returns its result.

        An incomplete result has the reason under `INTERRUPTED`. Without any result, raises `UserError` if the function
        did, and `RunError` if it failed in another way or took too long.
        """
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(seconds)
        finally:  # also after Ctrl-C
            self.kill()
        result = self.result()
        if status == 0 and result is not None:
            return result
        text = self.log.read_text(encoding="utf-8", errors="replace")
        errors = printed_errors(text)
        if status is None:
            reason = f"stopped after {seconds:.0f} s, the time that it had"
        else:
            reason = errors or f"ended with {describe_exit_status(status)}: {last_error(text)}"
        if result is not None:
            return result | {INTERRUPTED: reason}
        raise (UserError if status == 2 and errors else RunError)(reason)


def run_in_child(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Runs a function in a process of its own, for at most `seconds`. Returns and raises as `Child.wait` does."""
    with handling(signal.default_int_handler, signal.SIGTERM):
        return Child(function, arguments, folder=folder, environment=environment or {}).wait(seconds)


def main(arguments: Sequence[str]) -> None:
    """Calls a function by module and name, with the arguments of its request, and writes its result."""
    module, name, folder_name, niceness = arguments
    folder = Path(folder_name)
    os.nice(int(niceness))
    request = json.loads((folder / f"{name}.request.json").read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    result = getattr(importlib.import_module(module), name)(**request)
    for step in result if isinstance(result, Iterator) else (result,):
        write_atomically(folder / f"{name}.result.json", json.dumps(step).encode())


def _end_with(parent: int) -> None:
    """Ends this process and all that it started when its parent is gone, for example after `kill -9`."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    run_and_exit(main)
