"""Starts and ends commands: shared arguments, exit statuses and Ctrl-C."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from thinkpo_jax.runtime.config import RunError, UserError, first_line
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.paths import expand_path, path_argument
from thinkpo_jax.runtime.processes import (
    is_communication_error,
    is_distributed,
    leave_together,
    report_failure,
    shutdown_distributed,
)

EXIT_STATUS_INTERRUPTED = 130  # after Ctrl-C, SIGTERM or SIGHUP
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --config and --set to a command."""
    parser.add_argument(
        "--config", type=path_argument, required=required, metavar="FILE", help="the YAML file of the run"
    )
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", dest="assignments",
        help="override keys of the file, for example --set seed=1 stages.sft.steps=20 mesh.fsdp=8",
    )  # fmt: skip


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 success, 1 a failed run, 2 a user error, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a character
    status = 1
    try:
        with handling(signal.default_int_handler, *STOP_SIGNALS):
            _set_cache_folder_without_home()
            main(sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()
        return 0
    except (UserError, RunError) as error:
        message, status = str(error), 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # stdout may have no file descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        report_failure(1, "the program that read its output has ended.", shown="")
        return 1
    except OSError as error:
        remedy = "Fix the problem (disk space, permissions, an existing file) and rerun the same command to resume."
        message = f"{error}. {remedy}"
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not is_communication_error(error):
            raise
        message = (
            "a computation with the other processes failed: one of them has probably ended. Read its last lines, then "
            f"start all processes again to resume. ({first_line(error)})"
        )
    except KeyboardInterrupt as interrupt:
        # A command that does not resume says so itself.
        message = str(interrupt) or "Stopped. Rerun the same command to resume: it goes on from what is saved."
        report_failure(EXIT_STATUS_INTERRUPTED, message, shown=f"\n{message}\n")
        return EXIT_STATUS_INTERRUPTED
    report_failure(status, message)
    return status


def _set_cache_folder_without_home() -> None:
    """Puts caches among the temporary files if this user has no home folder, as in some containers."""
    if os.environ.get("XDG_CACHE_HOME"):
        return
    try:
        expand_path("~")
    except ValueError:
        folder = Path(tempfile.gettempdir()) / f"cache-of-user-{os.getuid()}"
        os.environ["XDG_CACHE_HOME"] = str(folder)  # `datasets` reads it too, and would make a folder called `~`
        log_warning(f"this user has no home folder. Caches are in {folder}. Set HOME to keep them elsewhere.")


def printed_errors(output: str) -> str:
    """Returns what `run_command` printed as errors, without their prefix. Empty if there are none."""
    return "\n".join(re.findall(r"(?m)^error: (.*)$", output))


def describe_exit_status(status: int) -> str:
    """Returns how a process ended, from its return code in Python."""
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def last_error(output: str) -> str:
    """Returns the last exception in the output of a process, or its end. At most 2,000 characters."""
    *before, last = re.split(r"(?m)^(?=[\w.]+(?:Error|Exception)\b)", output)
    return last.strip()[:2000] if before else output[-2000:].strip()


def run_and_exit(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command, then ends this Python process with the command's exit status."""

    def run(arguments: Sequence[str]) -> None:
        main(arguments)
        shutdown_distributed()

    try:
        status = run_command(run)
    except BaseException as error:
        if not is_distributed():
            raise
        status = 1
        message = "".join(traceback.format_exception_only(error)).strip()
        report_failure(status, message, shown=traceback.format_exc())
    # Exit without cleanup. After Ctrl-C, a running computation would crash in an interpreter that shuts down. A failed
    # process would wait in its cleanup for the other processes, which wait for it.
    if status == EXIT_STATUS_INTERRUPTED or (status and jax.distributed.is_initialized()):
        sys.stdout.flush()
        sys.stderr.flush()
        leave_together()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], Any], *signals: signal.Signals) -> Iterator[None]:
    """Handles signals with `handler` inside the `with` block. Has no effect outside the main thread.

    A signal that this process ignores stays ignored, such as SIGHUP after nohup.
    """
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (each for each in signals if signal.getsignal(each) != signal.SIG_IGN):
                stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


class DeferredInterrupts:
    """Ctrl-C, SIGTERM and SIGHUP inside a block of `defer_interrupts`."""

    def __init__(self) -> None:
        self.requested = False  # whether a signal came
        self._are_deferred = True

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Lets a signal raise `KeyboardInterrupt` at once, also one that came before.

        Has no effect in a run of several processes, because the others would wait for this one.
        """
        if is_distributed():
            yield
            return
        self._are_deferred = False
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._are_deferred = True

    def handle(self, *_: object) -> None:
        """Handles a signal."""
        if self.requested or not self._are_deferred:
            raise KeyboardInterrupt
        self.requested = True
        message = "\nStopping after the updates that are launched. Press Ctrl-C again to stop at once."
        with contextlib.suppress(RuntimeError):  # the signal came inside another write to stderr
            print(message, file=sys.stderr)


@contextlib.contextmanager
def defer_interrupts() -> Iterator[DeferredInterrupts]:
    """Delays Ctrl-C, SIGTERM and SIGHUP, so that an update is never cut in two. The yielded object knows if one came.

    If one has, the end of the `with` block raises `KeyboardInterrupt`. A second signal raises it at once.
    """
    interrupts = DeferredInterrupts()
    with handling(interrupts.handle, *STOP_SIGNALS):
        yield interrupts
    if interrupts.requested:
        raise KeyboardInterrupt
