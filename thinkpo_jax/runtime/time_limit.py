"""Stops Python code that others wrote, such as a chat template, when it runs for too long.

A thread watches the calls of all other threads. It raises an exception inside a call that is over its limit. This works
in every thread, and a signal would only work in the main thread. One long operation of the interpreter itself, such as
a power with millions of digits, cannot be stopped.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

TICK_SECONDS = 0.1

ResultT = TypeVar("ResultT")

# The ticks that are left to the call of each thread. Ticks stand still while the whole process stands still.
_ticks_left: dict[int, int] = {}
_lock = threading.Lock()
_watcher: threading.Thread | None = None


class TimeLimitError(Exception):
    """A call took longer than its limit."""


def call_with_time_limit(function: Callable[[], ResultT], seconds: float) -> ResultT:
    """Returns what the function returns. Raises `TimeLimitError` after about so many seconds.

    A function must not call this again.
    """
    _start_watching()
    thread_id = threading.get_ident()
    try:
        _ticks_left[thread_id] = max(1, round(seconds / TICK_SECONDS))
        return function()
    finally:
        with _lock:  # After this, no more exception is raised in this thread.
            is_over = _ticks_left.pop(thread_id, 1) <= 0
        if is_over:
            _raise_in_thread(thread_id, None)
            raise TimeLimitError


def _start_watching() -> None:
    global _watcher
    with _lock:
        if _watcher is None or not _watcher.is_alive():  # A forked process has no copy of the thread.
            _watcher = threading.Thread(target=_watch, name="time limits", daemon=True)
            _watcher.start()


def _watch() -> None:
    while True:
        time.sleep(TICK_SECONDS)
        with _lock:
            for thread_id in list(_ticks_left):
                _ticks_left[thread_id] -= 1
                if _ticks_left[thread_id] <= 0:  # again, because the function may have caught the first one
                    _raise_in_thread(thread_id, TimeLimitError)


def _raise_in_thread(thread_id: int, error: type[Exception] | None) -> None:
    """Raises an error in a thread when it next runs Python code. None takes back an error that has not arrived yet."""
    pointer = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), pointer)
