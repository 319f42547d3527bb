"""Keeps tokenized sources on disk, so that the same records are tokenized only once."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from thinkpo_jax.data.examples import SourceReport, TokenizedSource
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.files import token_cache_folder

TOKENS_FILE, SEGMENTS_FILE, REPORT_FILE = "tokens.int32", "segments.npy", "report.json"


def load_or_build(key: str, build: Callable[[BinaryIO], tuple[np.ndarray, SourceReport]]) -> TokenizedSource:
    """Loads the tokenized source that is cached under `key`. Builds and saves it if it is missing or damaged.

    `build` writes the token ids as int32 to the file, and returns `segments` and `report` of the `TokenizedSource`.
    Raises `UserError` if the cache cannot be read or written.
    """
    entry = token_cache_folder() / key
    try:
        if (cached := _load(entry)) is not None:
            return cached
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{key}.") as folder:
            new_entry = Path(folder) / "entry"
            new_entry.mkdir()
            with (new_entry / TOKENS_FILE).open("wb") as file:
                segments, report = build(file)
            np.save(new_entry / SEGMENTS_FILE, segments)
            source = TokenizedSource(_map_tokens(new_entry), segments, report)
            record = {"digest": source.digest, "report": asdict(report)}
            (new_entry / REPORT_FILE).write_text(json.dumps(record), encoding="utf-8")
            with contextlib.suppress(OSError):  # another process has saved an equal entry in the meantime
                new_entry.rename(entry)
            return source
    except OSError as error:
        problem = f"cannot save tokenized data there: {error}"
        raise UserError(
            f"{entry.parent}: {problem}. Set XDG_CACHE_HOME to a writable folder with free space."
        ) from None


def _load(entry: Path) -> TokenizedSource | None:
    """Returns the source of a cache entry. Returns None if there is no entry, or after removing a damaged one."""
    if not entry.exists():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError):
        record = json.loads((entry / REPORT_FILE).read_text(encoding="utf-8"))
        segments = np.load(entry / SEGMENTS_FILE, allow_pickle=False)
        source = TokenizedSource(_map_tokens(entry), segments, SourceReport(**record["report"]))
        if source.digest == record["digest"]:
            return source
    log_warning(f"{entry}: the cached tokens are damaged. They are built again.")
    shutil.rmtree(entry)
    return None


def _map_tokens(entry: Path) -> np.ndarray:
    path = entry / TOKENS_FILE
    return np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)
