"""Digests of files, and manifests that tell whether a folder still has the files that were written to it.

A manifest is a JSON file in the folder itself. It has the size and the digest of each file, and a digest of its own.
Digests are XXH3 with 128 bits, which is as fast as the memory. They find damage, but no forgery.
"""

import contextlib
import errno
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from thinkpo_jax.runtime.limited_files import read_text

MANIFEST_FILE = "thinkpo_jax_manifest.json"  # other programs have a manifest.json
_MANIFEST_FORMAT, _MAX_MANIFEST_BYTES = 1, 2**24
_ENTRY_KEYS = {"bytes", "digest"}
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
        try:
            while size := file.readinto(chunk):
                digest.update(memoryview(chunk)[:size])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # with the name of the file
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
    """Flushes a file, or the names in a folder, to the disk. Has no effect where the file system cannot do it.

    Raises `OSError` if the disk is full or fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EISDIR):
            raise OSError(error.errno, error.strerror, str(path)) from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the size and the digest of each file by its name, or None if the manifest is missing or damaged.

    A manifest may come from anywhere. One that names files outside of its folder counts as damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    # Any JSON may be there. A file that is too large is a `UserError`, which is a ValueError.
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
        manifest = json.loads(read_text(path, max_bytes=_MAX_MANIFEST_BYTES))
        files = manifest["files"]
        is_ours = manifest["format"] == _MANIFEST_FORMAT and manifest["digest"] == digest_text(json.dumps(files))
        if is_ours and all(map(_is_inside, files)) and all(entry.keys() >= _ENTRY_KEYS for entry in files.values()):
            return files
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def find_file_damage(folder: Path) -> list[str]:
    """Returns how the files of a folder differ from its manifest, one text for each file. Empty if none differs.

    A missing or damaged manifest counts as a difference. Files that the manifest does not name are not looked at.
    Raises `OSError` if a file is there and cannot be read.
    """
    if (entries := read_manifest(folder)) is None:
        state = "is damaged" if (folder / MANIFEST_FILE).is_file() else "is missing"
        return [f"{MANIFEST_FILE} {state}"]
    return list(_find_differences(folder, entries))


def _find_differences(folder: Path, entries: dict[str, Any]) -> Iterator[str]:
    complete: list[str] = []
    for name, entry in entries.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif (size := (folder / name).stat().st_size) == entry["bytes"]:
            complete.append(name)
        else:
            yield f"{name} has {size} bytes instead of {entry['bytes']}"
    digests = digest_files([folder / name for name in complete])
    for name, digest in zip(complete, digests, strict=True):
        if digest != entries[name]["digest"]:
            yield f"{name} has other content"
