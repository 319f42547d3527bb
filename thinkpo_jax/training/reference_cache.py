"""Caches reference log-probs on disk, one record per example.

Log-probs depend on the weights, the compute dtype, the attention kernel, the device and the jaxlib version. These and
the cache format are the identity of a cache. Each identity has its own folder below `reference_cache_folder()`, with:

- `identity.json`
- `logprobs`: one record per example, in the order of computation. It has a digest, the log-probs and a checksum.

The digest is of the example's token ids, so it depends on the row, the tokenizer, the template and the length policy.
Another subset of the same data reuses its records and adds the missing ones.
"""

import contextlib
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from thinkpo_jax.data.batches import FIRST_REGION_TOKENS, NUM_REGIONS
from thinkpo_jax.data.examples import Example
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.files import cache_folder, lock_folder, read_json_object, write_atomically
from thinkpo_jax.runtime.processes import broadcast_from_primary, is_primary_process

CACHE_FORMAT_VERSION = 1  # raised when log-probs of the same weights and tokens change, or the layout of the files
IDENTITY_FILE, RECORDS_FILE = "identity.json", "logprobs"


def reference_cache_folder() -> Path:
    """Returns the folder of all cached log-probs, next to the token cache."""
    return cache_folder("reference")


class ReferenceCache:
    """The cached log-probs of one identity. `identity` names everything that determines them."""

    def __init__(self, identity: Mapping[str, str], *, answers: int) -> None:
        self.identity = {"format": f"{CACHE_FORMAT_VERSION}, first {FIRST_REGION_TOKENS} tokens apart", **identity}
        key = hashlib.sha256(json.dumps([sorted(self.identity.items()), answers]).encode()).hexdigest()[:32]
        self.folder = reference_cache_folder() / key
        digest, values = ("example", np.uint8, 16), ("logprobs", "<f4", (answers, NUM_REGIONS))
        self._record = np.dtype([digest, values, ("checksum", "<u4")])

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Locks the cache. If another process computes the same log-probs, waits for it."""
        wait_message = "another process computes the reference of the same model. Waiting for it."
        with lock_folder(self.folder, "XDG_CACHE_HOME", wait_message=wait_message):
            if not (self.folder / IDENTITY_FILE).exists():
                write_atomically(self.folder / IDENTITY_FILE, json.dumps(self.identity).encode())
            yield

    def read(self) -> dict[bytes, np.ndarray]:
        """Returns log-probs [answers, 3] by the digest of an example. Removes damaged records with a warning."""
        path = self.folder / RECORDS_FILE
        content = path.read_bytes() if path.exists() else b""
        num_records = len(content) // self._record.itemsize
        records = np.frombuffer(content, self._record, count=num_records)
        good = records[self._checksums(records) == records["checksum"]]
        if len(good) < len(records):
            num_damaged = len(records) - len(good)
            log_warning(f"{path}: {num_damaged} of {len(records)} records are damaged. They are computed again.")
        if good.nbytes < len(content):
            write_atomically(path, good.tobytes())
        return dict(zip(map(bytes, good["example"]), good["logprobs"], strict=True))

    def add(self, digests: Sequence[bytes], log_probs: np.ndarray) -> None:
        """Appends the log-probs [n, answers, 3] of examples."""
        records = np.zeros(len(digests), self._record)
        records["example"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
        records["logprobs"] = log_probs
        records["checksum"] = self._checksums(records)
        with (self.folder / RECORDS_FILE).open("ab") as file:
            file.write(records.tobytes())

    def differing_identity_keys(self) -> list[str]:
        """Returns the keys in which this identity differs from the most similar cached one."""
        differences: list[list[str]] = []
        for path in sorted(reference_cache_folder().glob(f"*/{IDENTITY_FILE}")):
            with contextlib.suppress(UserError):
                other = read_json_object(path)
                differences.append([name for name, value in self.identity.items() if other.get(name) != value])
        return min(filter(None, differences), key=len, default=[])

    def _checksums(self, records: np.ndarray) -> np.ndarray:
        covered = self._record.itemsize - 4
        return np.array([zlib.crc32(record.tobytes()[:covered]) for record in records], np.uint32)


def example_digest(example: Example) -> bytes:
    """Returns 16 bytes that stand for the token ids of an example and for where its answers begin."""
    digest = hashlib.sha256()
    for segment in example:
        digest.update(np.array([len(segment.token_ids), segment.answer_start], np.int64).tobytes())
        digest.update(np.asarray(segment.token_ids, np.int32).tobytes())
    return digest.digest()[:16]


def save_stage_reference(path: Path, log_probs: np.ndarray) -> None:
    """Writes the log-probs of a stage to a file with checksums (those of a zip archive)."""
    buffer = io.BytesIO()
    np.savez(buffer, logprobs=log_probs)
    write_atomically(path, buffer.getvalue())


def load_stage_reference(path: Path, *, like: np.ndarray) -> np.ndarray | None:
    """Returns in all processes what process 0 reads, or None if the file is missing or damaged."""
    log_probs = _read_log_probs(path, like) if is_primary_process() else None
    if not broadcast_from_primary(log_probs is not None):
        return None
    return broadcast_from_primary(like if log_probs is None else log_probs)


def _read_log_probs(path: Path, like: np.ndarray) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            log_probs = file["logprobs"]
        if log_probs.shape == like.shape and log_probs.dtype == like.dtype:
            return log_probs
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
        pass
    log_warning(f"{path}: damaged. The reference is read from the cache or computed again.")
    return None
