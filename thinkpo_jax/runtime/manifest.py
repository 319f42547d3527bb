"""Digests of files, and manifests that tell whether a folder still has the files that were written to it.

A manifest is a JSON file in the folder itself. It has the size and the digest of each file, and a digest of its own.
Digests are XXH3 with 128 bits, which is as fast as the memory. They find damage, but no forgery.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

MANIFEST_FILE = "manifest.json"
_MANIFEST_FORMAT = 1
_CHUNK_BYTES = 2**20
_MAX_THREADS = 16  # more do not read faster


def digest_text(text: str) -> str:
    """Returns the digest of a text, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def digest_files(paths: Sequence[Path]) -> list[str]:
    """Returns the digest of every byte of each file. Several threads read.

    A file that did not change since the last call in this process is not read again.
    """
    with ThreadPoolExecutor(min(_MAX_THREADS, max(1, len(paths)))) as pool:
        return list(pool.map(_digest_file, paths))


def _digest_file(path: Path) -> str:
    stat = path.stat()  # ctime also tells when something wrote a file and set its old time again
    return _digest_content(path.resolve(), (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@functools.lru_cache(maxsize=2**14)
def _digest_content(path: Path, _: tuple[int, ...]) -> str:
    digest, chunk = xxhash.xxh3_128(), bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(memoryview(chunk)[:size])
    return digest.hexdigest()


def write_manifest(folder: Path, paths: Iterable[Path]) -> None:
    """Writes the manifest of files below a folder. Then flushes the files and the folder to the disk.

    Call it before the folder gets its final name. Then a folder with that name is complete, also after a power failure.
    """
    paths = sorted(paths)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "digest": digest}
        for path, digest in zip(paths, digest_files(paths), strict=True)
    }
    manifest = {"format": _MANIFEST_FORMAT, "files": entries, "digest": digest_text(json.dumps(entries))}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    folders = {parent for path in paths for parent in path.relative_to(folder).parents}
    for path in (*paths, folder / MANIFEST_FILE, *(folder / name for name in folders), folder):
        sync_to_disk(path)


def sync_to_disk(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk. Has no effect where the file system cannot do it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the size and the digest of each file by its name, or None if the manifest is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["digest"] == digest_text(json.dumps(manifest["files"])):
            return manifest["files"]
    return None


def find_damage(folder: Path) -> list[str]:
    """Returns how the files of a folder differ from its manifest, one text for each file. Empty if none differs.

    A missing or damaged manifest counts as a difference. Files that the manifest does not name are not looked at.
    """
    if (entries := read_manifest(folder)) is None:
        state = "is damaged" if (folder / MANIFEST_FILE).is_file() else "is missing"
        return [f"{MANIFEST_FILE} {state}"]
    return list(_find_differences(folder, entries))


def _find_differences(folder: Path, entries: dict[str, Any]) -> Iterator[str]:
    complete: list[str] = []
    for name, entry in entries.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            yield f"{name} is missing"
        else:
            if size == entry["bytes"]:
                complete.append(name)
            else:
                yield f"{name} has {size} bytes instead of {entry['bytes']}"
    try:
        digests = digest_files([folder / name for name in complete])
    except OSError as error:
        yield f"a file cannot be read: {error}"
        return
    for name, digest in zip(complete, digests, strict=True):
        if digest != entries[name]["digest"]:
            yield f"{name} has other content"
