"""Ends all processes of a run if one of them fails, or if none makes progress for a long time.

The processes tell each other about failures and signs of life through the key-value store that JAX starts with them.
It works while the devices are busy or blocked.
"""

import contextlib
import faulthandler
import json
import os
import re
import sys
import threading
import time
from typing import Any

import jax

HANG_TIMEOUT_MINUTES = 30.0  # Compilation, loading a model and saving a checkpoint give no sign of life.
POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # After a failure of another process. Most processes then fail by themselves.
MEETING_SECONDS = 15.0  # Processes that end wait so long for the others.
BACKSTOP_SECONDS = 30.0  # If Python itself is blocked, the process ends so much later.

_STDERR = 2  # The stream of a notebook is no file.
_FOLDER = "thinkpo_jax/watchdog/"
_FAILURE, _SIGN_OF_LIFE, _MEETING = (_FOLDER + name for name in ("failure", "sign of life", "meeting"))


class Watchdog:
    """A thread that watches all processes of a run from one of them.

    `client` is JAX's client of the key-value store, and `process_id` is the number of this process there.
    """

    def __init__(self, client: Any, process_id: int, *, hang_timeout_minutes: float) -> None:
        """Starts to watch. The time without a sign of life starts now."""
        self._client, self._process_id, self._minutes = client, process_id, hang_timeout_minutes
        self._num_signs = 0
        self._is_ending, self._is_stopped = threading.Event(), threading.Event()
        self._right_to_end = threading.RLock()  # never given back
        faulthandler.enable(_STDERR)  # JAX aborts a process if another one dies. Then its stacks are printed too.
        self._expect_sign_of_life()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def note_progress(self) -> None:
        """Notes a sign of life of this process. It counts for all processes, because they may wait for this one."""
        self._num_signs += 1

    def begin_end(self) -> None:
        """Keeps the watchdog from ending this process, which ends itself.

        Does not return if the watchdog is ending it already. What fails then is only a consequence.
        """
        self._right_to_end.acquire()
        self._is_ending.set()

    def report_failure(self, status: int, message: str) -> None:
        """Tells the other processes that this one ends with an exit status. They end with the same status."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first, or process 0 is gone
            self._client.key_value_set(_FAILURE, json.dumps([self._process_id, status, message]))

    def meet_others(self) -> None:
        """Waits until all processes end. If process 0 left earlier, JAX would abort the others."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # one of them is dead or hangs
            self._client.wait_at_barrier(_MEETING, round(1000 * MEETING_SECONDS))
        if self._process_id == 0:
            time.sleep(0.5)

    def stop(self) -> None:
        """Ends the watch, at the end of a run."""
        self._is_stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        num_sent, last_seen = 0, ""
        while not self._is_stopped.wait(POLL_SECONDS):
            num_signs = self._num_signs
            entries = self._exchange(num_signs if num_signs > num_sent else None)
            seen = entries.get(_SIGN_OF_LIFE, last_seen)
            if num_signs > num_sent or seen != last_seen:
                self._expect_sign_of_life()
            num_sent, last_seen = num_signs, seen
            if _FAILURE in entries and not self._is_ending.wait(GRACE_SECONDS):
                self._end_after_failure(*json.loads(entries[_FAILURE]))
            if time.monotonic() > self._deadline and not self._is_ending.is_set():
                self._end_hanging_run()

    def _expect_sign_of_life(self) -> None:
        seconds = 60 * self._minutes
        self._deadline = time.monotonic() + seconds
        faulthandler.dump_traceback_later(seconds + BACKSTOP_SECONDS, exit=True, file=_STDERR)

    def _exchange(self, num_signs: int | None) -> dict[str, str]:
        """Sends a new sign of life, and returns what the processes have sent. Empty if process 0 does not answer."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if num_signs is not None:
                self._client.key_value_set(_SIGN_OF_LIFE, f"{self._process_id}: {num_signs}", allow_overwrite=True)
            return dict(self._client.key_value_dir_get(_FOLDER))
        return {}

    def _end_after_failure(self, process_id: int, status: int, message: str) -> None:
        self._end(status, f"process {process_id} has ended, so this process ends too. Its message:\n{message}")

    def _end_hanging_run(self) -> None:
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        self._end(
            1,
            f"no process made progress for {self._minutes:g} minutes, so one of them hangs, and all of them end. The "
            "stacks above show what this process was doing. Start all processes again to resume. If the work is only "
            "slow, give all of them a larger --hang-timeout.",
        )

    def _end(self, status: int, message: str) -> None:
        if not self._right_to_end.acquire(blocking=False):
            return
        print(format_error(message, self._process_id), file=sys.stderr, flush=True)
        self.meet_others()
        os._exit(status)  # the main thread may be blocked


def format_error(message: str, process_id: int | None) -> str:
    """Returns the lines that show an error, with the number of the process if there are several."""
    return re.sub(r"(?m)^", "error: " if process_id is None else f"process {process_id}: error: ", message)
