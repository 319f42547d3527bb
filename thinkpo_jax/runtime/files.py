"""Writes files atomically, reads JSON records, locks folders, digests content."""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax

from thinkpo_jax import __version__
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.runtime.processes import is_primary_process


@contextlib.contextmanager
def lock_folder(folder: Path, key: str, *, wait_message: str = "") -> Iterator[None]:
    """Makes a folder, which the configuration names under `key`; within it no other process does the same.

    Raises `UserError` where it cannot be made, or another process holds it; with `waiting`, which is then said, that
    process is waited for. Of the processes of one run the first one does so for all of them.
    """
    if not is_primary_process():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be made: {error}. Set {key} to a folder.") from None
    with contextlib.ExitStack() as stack:
        try:
            lock = filelock.FileLock(folder / ".lock")
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except filelock.Timeout:
                if not wait_message:
                    raise
                log_info(wait_message)
                stack.enter_context(lock.acquire())
        except filelock.Timeout:
            raise UserError(
                f"{key}: another process writes to {folder}. Wait for it, or choose another {key}."
            ) from None
        except (OSError, NotImplementedError) as error:
            log_warning(f"{folder} cannot be locked ({error}): see to it that no other process writes there.")
        yield


def read_json_object(path: Path, *, missing_hint: str = "") -> dict[str, Any]:
    """The object that a JSON file holds. Raises `UserError` for anything else; `absent`: advice where there is none."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file. {missing_hint}".rstrip()) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of many digits
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(loaded).__name__}.")
    return loaded


def token_cache_folder() -> Path:
    """Where prepared tokens are kept: below XDG_CACHE_HOME, which is ~/.cache where it is not set."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "thinkpo_jax" / "tokens"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is whole or not there at all; an older one stays until then. Makes its folder.

    Of several processes the first one alone writes.
    """
    if not is_primary_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def software_versions() -> dict[str, str]:
    """The versions of what computed a run: this package and its commit, Python, jax and its companions, the devices."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    kinds = sorted({device.device_kind for device in jax.devices()})
    devices = f"{len(jax.devices())} x {', '.join(kinds)}"
    return {
        "thinkpo_jax": f"{__version__}, commit {_commit()}",
        "python": sys.version.split()[0],
        **found,
        "devices": devices,
    }


def _commit() -> str:
    here = Path(__file__).parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return told.stdout.strip() if told.returncode == 0 else "unknown"


class StageFolder:
    """The files of one stage of a run. `path` can be any folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "stage.json"  # what the stage was begun with and, once it is finished, its summary
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.validation = path / "validation.jsonl"
        self.reference = path / "reference.npz"  # the reference log-probs that the stage was begun with
        self.model = path / "model"  # a Hugging Face folder, once the stage is finished


def read_json_record(path: Path, *keys: str, remedy: str = "Remove the file.") -> dict[str, Any] | None:
    """Returns a JSON object that a command wrote, or None if there is none yet.

    Raises `UserError` if the file is damaged, or lacks one of `keys`. The message ends with `remedy`.
    """
    if not path.exists():
        return None
    try:
        record = read_json_object(path)
    except UserError as error:
        raise UserError(f"{error} {remedy}") from None
    if missing := [key for key in keys if key not in record]:
        raise UserError(f"{path} is damaged: {', '.join(missing)} is missing. {remedy}")
    return record
