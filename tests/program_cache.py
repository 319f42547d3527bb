"""The compiled programs that test runs keep on disk: where they are, and how large they may become."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

MAX_BYTES = 2 * 2**30
# For processes that a test kills: a program that is half written would stay half written.
READ_ONLY = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def program_folder() -> Path:
    """Returns the folder of compiled programs: the user's, or a temporary one if that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinkpo_jax" / "test-programs"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            _remove_oldest(folder)
            return folder
    except (OSError, RuntimeError):  # no home folder, or a file in its place
        pass
    temporary = tempfile.mkdtemp(prefix="thinkpo_jax-test-programs-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def _remove_oldest(folder: Path) -> None:
    """Removes the oldest programs until the folder has at most `MAX_BYTES`. Another test run may use it meanwhile."""
    entries = sorted(((entry.stat(), Path(entry)) for entry in os.scandir(folder)), key=lambda each: -each[0].st_mtime)
    total = 0
    for status, path in entries:
        total += status.st_size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)
