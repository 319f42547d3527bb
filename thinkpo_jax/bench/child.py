"""Runs a measurement in its own process, so that its peak memory is its own and a crash ends nothing else.

This file, run as a program, is that process. It imports a function, calls it and writes what it returns.
"""

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkpo_jax.runtime.cli import handling, run_and_exit
from thinkpo_jax.runtime.config import RunError, UserError

OUTPUT_TAIL = 2000  # characters of a failed process that its error repeats


def run_in_child(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Returns what a public function of a module returns in a process of its own. Arguments and result are JSON.

    `folder` gets the request, the result and the log `NAME.log`. Raises `UserError` if the function does, and
    `RunError` if it fails in another way or takes longer than `seconds`. The processes that it started end with it.
    """
    name = function.__name__
    request, result, log = (folder / f"{name}.{suffix}" for suffix in ("request.json", "result.json", "log"))
    folder.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    request.write_text(json.dumps(dict(arguments)), encoding="utf-8")
    command = [sys.executable, "-m", "thinkpo_jax.bench.child", function.__module__, name, str(folder)]
    variables = os.environ | (environment or {})
    with handling(signal.default_int_handler, signal.SIGTERM), log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RunError(f"stopped after {seconds:.0f} s, the time that was left") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == 0:
        return json.loads(result.read_text(encoding="utf-8"))
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = "\n".join(re.findall(r"(?m)^error: (.*)$", text))
    if status == 2 and errors:
        raise UserError(errors)
    raise RunError(errors or f"ended with {_ending(status)}: {_last_error(text)}")


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _last_error(text: str) -> str:
    """Returns the last exception of a log, or its end."""
    *before, last = re.split(r"(?m)^(?=[\w.]+(?:Error|Exception)\b)", text)
    return last.strip()[:OUTPUT_TAIL] if before else text[-OUTPUT_TAIL:].strip()


def main(arguments: Sequence[str]) -> None:
    """Calls a function by module and name, with the arguments of its request, and writes its result."""
    module, name, folder_name = arguments
    folder = Path(folder_name)
    request = json.loads((folder / f"{name}.request.json").read_text(encoding="utf-8"))
    result = getattr(importlib.import_module(module), name)(**request)
    (folder / f"{name}.result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    run_and_exit(main)
