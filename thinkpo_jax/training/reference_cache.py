"""Keeps reference log-probs on disk by example."""

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
from thinkpo_jax.runtime.files import lock_folder, read_json_object, token_cache_folder, write_atomically
from thinkpo_jax.runtime.processes import broadcast_from_primary, is_primary_process

CACHE_FORMAT_VERSION = (
    1  # raised whenever the same weights and tokens give other log-probs, or the files another layout
)
IDENTITY_FILE, RECORDS_FILE = "identity.json", "logprobs"


def reference_cache_folder() -> Path:
    """Where log-probs are kept, beside the prepared tokens."""
    return token_cache_folder().parent / "reference"


class ReferenceCache:
    """The log-probs that one model gave to answers, on disk; `identity` says by its names what determines them."""

    def __init__(self, identity: Mapping[str, str], *, answers: int) -> None:
        self.identity = {"format": f"{CACHE_FORMAT_VERSION}, first {FIRST_REGION_TOKENS} tokens apart", **identity}
        key = hashlib.sha256(json.dumps([sorted(self.identity.items()), answers]).encode()).hexdigest()[:32]
        self.folder = reference_cache_folder() / key
        digest, values = ("example", np.uint8, 16), ("logprobs", "<f4", (answers, NUM_REGIONS))
        self._record = np.dtype([digest, values, ("checksum", "<u4")])

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Within it no other process adds to the store; one that computes the same is waited for."""
        wait_message = "another process computes the reference of the same model: waiting for it"
        with lock_folder(self.folder, "XDG_CACHE_HOME", wait_message=wait_message):
            if not (self.folder / IDENTITY_FILE).exists():
                write_atomically(self.folder / IDENTITY_FILE, json.dumps(self.identity).encode())
            yield

    def read(self) -> dict[bytes, np.ndarray]:
        """Log-probs [answers, 3] by the digest of an example. Damaged records are left out, said and removed."""
        path = self.folder / RECORDS_FILE
        content = path.read_bytes() if path.exists() else b""
        whole = len(content) // self._record.itemsize * self._record.itemsize
        records = np.frombuffer(content[:whole], self._record)
        good = records[self._checksums(records) == records["checksum"]]
        if len(good) < len(records):
            log_warning(
                f"{path}: {len(records) - len(good)} of {len(records)} records are damaged; they are computed again."
            )
        if good.nbytes < len(content):
            write_atomically(path, good.tobytes())
        return dict(zip(map(bytes, good["example"]), good["logprobs"], strict=True))

    def add(self, digests: Sequence[bytes], logprobs: np.ndarray) -> None:
        """Appends the log-probs [n, answers, 3] of examples."""
        records = np.zeros(len(digests), self._record)
        records["example"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
        records["logprobs"] = logprobs
        records["checksum"] = self._checksums(records)
        with (self.folder / RECORDS_FILE).open("ab") as file:
            file.write(records.tobytes())

    def differing_identity_keys(self) -> list[str]:
        """By which names the identity differs from that of the most similar store; none where there is no other."""
        found: list[list[str]] = []
        for path in sorted(reference_cache_folder().glob(f"*/{IDENTITY_FILE}")):
            with contextlib.suppress(UserError):
                other = read_json_object(path)
                found.append([name for name, value in self.identity.items() if other.get(name) != value])
        return min(filter(None, found), key=len, default=[])

    def _checksums(self, records: np.ndarray) -> np.ndarray:
        covered = self._record.itemsize - 4
        return np.array([zlib.crc32(record.tobytes()[:covered]) for record in records], np.uint32)


def example_digest(example: Example) -> bytes:
    """16 bytes that stand for the ids of an example and for where its answers begin."""
    found = hashlib.sha256()
    for segment in example:
        found.update(np.array([len(segment.token_ids), segment.answer_start], np.int64).tobytes())
        found.update(np.asarray(segment.token_ids, np.int32).tobytes())
    return found.digest()[:16]


def save_stage_reference(path: Path, log_probs: np.ndarray) -> None:
    """Keeps the log-probs of a stage as they are, in a file of its own with checksums (those of a zip archive)."""
    buffer = io.BytesIO()
    np.savez(buffer, logprobs=log_probs)
    write_atomically(path, buffer.getvalue())


def load_stage_reference(path: Path, *, like: np.ndarray) -> np.ndarray | None:
    """What `write_logprobs` wrote; None where there is none yet, or where it is damaged, which is said.

    Several processes get what the first one reads.
    """
    found = _read_logprobs(path, like) if is_primary_process() else None
    if not bool(broadcast_from_primary(np.array(found is not None))):
        return None
    return broadcast_from_primary(like if found is None else found)


def _read_logprobs(path: Path, like: np.ndarray) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as found:
            logprobs = found["logprobs"]
        if logprobs.shape == like.shape and logprobs.dtype == like.dtype:
            return logprobs
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
        pass
    log_warning(f"{path}: damaged; the reference is looked up, or computed, again.")
    return None
