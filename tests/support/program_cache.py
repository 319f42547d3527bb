"""Shares compiled programs among tests: programs for one device on disk, programs for several devices in memory.

XLA on CPU must run the collectives of a program in the same order on every device. A program that it loads from disk
can lose that order. Then the devices wait for each other forever, as several hanging test runs showed.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import compilation_cache, compiler

MAX_DISK_BYTES = 2 * 2**30
MAX_PROGRAMS_IN_MEMORY = 100


def share_programs() -> None:
    """Makes JAX compile each program once for the tests of this process. Programs for one device stay on disk."""
    jax.config.update("jax_compilation_cache_dir", str(_program_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    programs: dict[Any, Any] = {}
    compile_or_read = compiler.compile_or_get_cached

    def compile_once(
        backend: Any, computation: Any, devices: np.ndarray, options: Any, callbacks: Any, on: Any, *rest: Any
    ) -> Any:
        if devices.size == 1 or callbacks:
            return compile_or_read(backend, computation, devices, options, callbacks, on, *rest)
        ids = tuple(device.id for device in devices.flat)
        key = ids, compilation_cache.get_cache_key(computation, devices, options, backend)
        if key not in programs:
            if len(programs) == MAX_PROGRAMS_IN_MEMORY:
                del programs[next(iter(programs))]
            programs[key] = compiler.backend_compile_and_load(backend, computation, on, options, callbacks)
        return programs[key]

    compiler.compile_or_get_cached = compile_once


def _program_folder() -> Path:
    """Returns the folder of compiled programs in the user's cache, or a temporary folder if that is not writable."""
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
    """Removes the oldest programs beyond `MAX_DISK_BYTES`. Another test run may use the folder meanwhile."""
    entries = sorted(((item.stat(), Path(item)) for item in os.scandir(folder)), key=lambda entry: -entry[0].st_mtime)
    total = 0
    for status, path in entries:
        total += status.st_size
        if total > MAX_DISK_BYTES:
            path.unlink(missing_ok=True)
