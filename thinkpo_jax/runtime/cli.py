"""How do commands start and end? Their arguments, their exit status, what Ctrl-C means, and who may write."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.processes import is_distributed, shutdown_distributed

EXIT_STATUS_INTERRUPTED = 130  # the exit status after Ctrl-C or SIGTERM


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --config and --set to a command."""
    parser.add_argument("--config", type=Path, required=required, metavar="FILE", help="the YAML file of the run")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", dest="assignments",
        help="override a key of the file: --set seed=1 stages.sft.steps=20 mesh.fsdp=8",
    )  # fmt: skip


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit status: 0 done, 1 a failed run, 2 a user's error, 130 stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character stops nothing
    try:
        main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except (UserError, RunError) as error:
        print(re.sub(r"(?m)^", f"{_who()}error: ", str(error)), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # whoever read the output has left
        with contextlib.suppress(OSError):  # a stream without a descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        remedy = "Mend it (space, permissions, a name that is taken) and run the same command again: it goes on."
        print(f"{_who()}error: {error}. {remedy}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if not is_distributed() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        print(
            f"{_who()}error: a computation with the other processes failed; one of them has probably ended, see what "
            f"it says. Start all of them again: the run goes on from what is saved. ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again: it goes on from what is saved.", file=sys.stderr)
        return EXIT_STATUS_INTERRUPTED
    return 0


def run_and_exit(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command as this process and ends it with the command's exit status."""
    try:
        status = run_command(main)
    except BaseException:
        if not is_distributed():
            raise
        traceback.print_exc()
        status = 1
    if status == 0:
        shutdown_distributed()
    # After Ctrl-C computations may be under way, and would crash in an interpreter that is taken down; one of several
    # processes that failed would wait for the others there, and they for it.
    elif status == EXIT_STATUS_INTERRUPTED or is_distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _who() -> str:
    return f"process {jax.process_index()}: " if is_distributed() else ""


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], Any], *numbers: signal.Signals) -> Iterator[None]:
    """Handles these signals with `handler` inside the `with` block. Python allows it in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def defer_interrupts() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C (or SIGTERM) only asks: the function it gives says whether one came.

    So an update is never cut in two. Leaving it after one came raises `KeyboardInterrupt`; a second one does at once.
    """
    asked: list[int] = []

    def handle(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nStopping after this update; Ctrl-C again stops at once.", file=sys.stderr)

    with handling(handle, signal.SIGINT, signal.SIGTERM):
        yield lambda: bool(asked)
    if asked:
        raise KeyboardInterrupt
