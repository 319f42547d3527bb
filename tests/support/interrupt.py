"""Runs a command in another process, which gets a signal after some answers of the local engine."""

import signal
import subprocess
import sys

from support.paths import ROOT

_PROGRAM = """
import importlib, os, sys
from thinkpo_jax.inference.local_engine import LocalEngine
from thinkpo_jax.runtime.cli import run_and_exit

module, number, count = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
generate = LocalEngine.generate

def interrupted(self, *args, **options):
    for index, answer in enumerate(generate(self, *args, **options)):
        if index == count:
            os.kill(os.getpid(), number)
        yield answer

LocalEngine.generate = interrupted
run_and_exit(importlib.import_module(module).main)
"""


def run_interrupted(module: str, arguments: list[str], sent: signal.Signals, *, after: int) -> str:
    """Runs a command that gets a signal after so many answers of one call of the engine. Returns its stderr."""
    command = [sys.executable, "-c", _PROGRAM, module, str(sent.value), str(after), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == (-9 if sent == signal.SIGKILL else 130), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr
