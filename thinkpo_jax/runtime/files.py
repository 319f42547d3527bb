"""Names the files of a stage, writes files atomically, reads JSON, locks folders and reports software versions."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax

from thinkpo_jax import __version__
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.runtime.limited_files import check_file, read_text
from thinkpo_jax.runtime.manifest import digest_text, sync_to_disk
from thinkpo_jax.runtime.paths import AnyPath, describe_missing, expand_path
from thinkpo_jax.runtime.processes import is_primary_process, note_progress

LOCK_SECONDS = 10.0  # between two signs of life while this process waits for a lock

MAX_RECORD_BYTES = 2**32  # of a file that we wrote
MAX_JSON_BYTES = 2**24  # The largest index of safetensors known to us has 9 MB.


class FolderInUseError(UserError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def lock_folder(folder: Path, key: str, *, wait_message: str = "") -> Iterator[None]:
    """Makes a folder, which the configuration names under `key`, and locks it inside the `with` block.

    With a `wait_message`, logs it and waits until the folder is free. The primary process locks for all processes.
    Raises `UserError` if the folder cannot be made, and `FolderInUseError` if another process holds the lock and there
    is no message.
    """
    if not is_primary_process():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be made: {error}. Set {key} to a folder that can be made.") from None
    lock = filelock.FileLock(folder / ".lock")
    with contextlib.ExitStack() as stack:
        try:
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except filelock.Timeout:
                if not wait_message:
                    message = f"{key}: another process writes to {folder}. Wait until it ends, or choose another {key}."
                    raise FolderInUseError(message) from None
                log_info(wait_message)
                while not lock.is_locked:
                    with contextlib.suppress(filelock.Timeout):
                        stack.enter_context(lock.acquire(timeout=LOCK_SECONDS))
                    note_progress()  # the other process may need hours
        except (OSError, NotImplementedError) as error:
            log_warning(f"{folder} cannot be locked ({error}). Make sure that no other process writes there.")
        yield


def read_json_object(path: Path, *, missing_hint: str = "", max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises `UserError` for anything else, with advice if there is no file."""
    try:
        check_file(path, max_bytes=max_bytes)
        loaded = json.loads(read_text(path, max_bytes=max_bytes))
    except FileNotFoundError:
        raise UserError(f"{path}: {describe_missing(path)}. {missing_hint}".rstrip()) from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of many digits
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(loaded).__name__}.")
    return loaded


def cache_folder(name: str) -> Path:
    """Returns one of our folders below XDG_CACHE_HOME (default: ~/.cache). `UserError`: that is no path."""
    try:
        return Path(expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "thinkpo_jax" / name
    except ValueError as error:
        raise UserError(f"XDG_CACHE_HOME: {error}. Set XDG_CACHE_HOME to a folder that can be written.") from None


def check_writable(path: Path, option: str) -> None:
    """Raises `UserError`, which names the option, if a file cannot be written. Makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error}. Give the path of a file.") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file and makes its folder. A crash leaves the old file or the new one, never a part of it.

    The same holds for a power failure.

    Only the primary process writes.
    """
    if not is_primary_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        sync_to_disk(partial)
        partial.replace(path)
        sync_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def software_versions() -> dict[str, str]:
    """Returns the versions of this package and its commit, of Python and of the libraries, and the devices."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return package_versions() | {"devices": f"{len(jax.devices())} x {', '.join(kinds)}"}


def package_versions() -> dict[str, str]:
    """Returns the versions of this package and its commit, of Python and of the libraries. Touches no device."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {
        "thinkpo_jax": f"{__version__}, commit {_commit()}",
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in names},
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return "unknown"


class StageFolder:
    """The files of one stage of a run. `path` can be any folder.

    If the run is in a bucket, `path` is in its copy, and `checkpoints` is in the bucket. `upload` copies what was
    written to the bucket.
    """

    def __init__(
        self, path: Path, *, checkpoints: AnyPath | None = None, upload: Callable[[], None] = lambda: None
    ) -> None:
        self.path = path
        self.upload = upload
        self.record = path / "stage.json"  # what the stage was begun with and, once it is finished, its summary
        self.checkpoints: AnyPath = path / "checkpoints" if checkpoints is None else checkpoints
        self.metrics = path / "metrics.jsonl"
        self.validation = path / "validation.jsonl"
        self.probe = path / "probe.jsonl"
        self.reference = path / "reference.npz"  # the reference log-probs that the stage was begun with
        self.model = path / "model"  # a Hugging Face folder, once the stage is finished


def free_name(path: AnyPath) -> AnyPath:
    """Returns the path, with a number after it if there is such a file already."""
    names = (path.with_name(f"{path.name}.{number}" if number else path.name) for number in itertools.count())
    return next(name for name in names if not name.exists())


def write_json_record(path: Path, record: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Writes a JSON object for `read_json_record`, with a digest of its values."""
    digest = digest_text(json.dumps(record))
    write_atomically(path, (json.dumps({**record, "digest": digest}, indent=indent) + "\n").encode())


def read_json_record(
    path: Path, *keys: str, record_format: int | None = None, remedy: str = "Remove the file."
) -> dict[str, Any] | None:
    """Returns a JSON object that `write_json_record` wrote, or None if there is none yet.

    Raises `UserError` if the file is damaged, lacks one of `keys`, or has another `format` than `record_format`. The
    message ends with `remedy`.
    """
    if not path.exists():
        return None
    try:
        record = read_json_object(path, max_bytes=MAX_RECORD_BYTES)
    except UserError as error:
        raise UserError(f"{error} {remedy}") from None
    if record_format is not None and (number := record.get("format")) != record_format:
        written = "no format number" if number is None else f"format {number}"
        raise UserError(f"{path} has {written}, but this version of thinkpo_jax reads format {record_format}. {remedy}")
    digest = record.pop("digest", None)
    if missing := [key for key in keys if key not in record]:
        raise UserError(f"{path} is damaged: {', '.join(missing)} is missing. {remedy}")
    if digest != digest_text(json.dumps(record)):
        raise UserError(f"{path} is damaged: its values are not those that were written. {remedy}")
    return record
