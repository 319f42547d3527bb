"""Digests of files, and manifests that tell whether a folder still has the files that were written to it.

A manifest is a JSON file in the folder itself. It has the size and the digest of each file, and a digest of its own.
Digests are XXH3 with 128 bits, which is as fast as the memory. They find damage, but no forgery. In a bucket they are
the MD5 digests that the store has computed, so nothing is read. Such a digest begins with `md5:`.
"""

import contextlib
import errno
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import xxhash
from etils import epath

from thinkpo_jax.runtime.bucket_files import bucket_file_md5, is_in_bucket, list_bucket_files, md5_of
from thinkpo_jax.runtime.limited_files import read_text
from thinkpo_jax.runtime.paths import AnyPath

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
MANIFEST_FILE = "thinkpo_jax_manifest.json"  # other programs have a manifest.json
_MANIFEST_FORMAT, _MAX_MANIFEST_BYTES = 1, 2**24
_ENTRY_KEYS = {"bytes", "digest"}
_MD5 = "md5:"
_CHUNK_BYTES = 2**20
_MAX_THREADS = 16  # more do not read faster


def digest_text(text: str) -> str:
    """Returns the digest of a text, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def digest_files(paths: Sequence[Path]) -> list[str]:
    """Returns the digest of every byte of each file. Several threads read.

    A file that did not change since the last call in this process is not read again.
    """
    return _map_in_threads(_digest_file, paths)


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
    (folder / MANIFEST_FILE).write_text(_to_text(entries), encoding="utf-8")
    folders = {parent for path in paths for parent in path.relative_to(folder).parents}
    for path in (*paths, folder / MANIFEST_FILE, *(folder / name for name in folders), folder):
        sync_to_disk(path)


def write_bucket_manifest(folder: epath.Path) -> None:
    """Writes the manifest of all files below a folder in a bucket, from what the store knows of them."""
    entries = {
        name: {"bytes": info["size"], "digest": _MD5 + bucket_file_md5(folder / name, info)}
        for name, info in sorted(list_bucket_files(folder).items())
        if name != MANIFEST_FILE
    }
    (folder / MANIFEST_FILE).write_text(_to_text(entries))


def _to_text(entries: Mapping[str, Any]) -> str:
    manifest = {"format": _MANIFEST_FORMAT, "files": entries, "digest": digest_text(json.dumps(entries))}
    return json.dumps(manifest, indent=1) + "\n"


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


def read_manifest(folder: AnyPath) -> dict[str, Any] | None:
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


def is_of_disk(folder: AnyPath) -> bool:
    """Returns whether a folder has a manifest that was written on a disk, and not in a bucket."""
    entries = read_manifest(folder) or {}
    return any(not entry["digest"].startswith(_MD5) for entry in entries.values())


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def find_file_damage(folder: AnyPath) -> list[str]:
    """Returns how the files of a folder differ from its manifest, one text for each file. Empty if none differs.

    A missing or damaged manifest counts as a difference. Files that the manifest does not name are not looked at.
    Raises `OSError` if a file is there and cannot be read.
    """
    if (entries := read_manifest(folder)) is None:
        state = "is damaged" if (folder / MANIFEST_FILE).is_file() else "is missing"
        return [f"{MANIFEST_FILE} {state}"]
    return list(_find_differences(folder, entries))


def _find_differences(folder: AnyPath, entries: Mapping[str, Any]) -> Iterator[str]:
    info_by_name = list_bucket_files(folder) if is_in_bucket(folder) else None
    sizes = _sizes(Path(folder), entries) if info_by_name is None else {n: i["size"] for n, i in info_by_name.items()}
    complete: list[str] = []
    for name, entry in entries.items():
        if name not in sizes:
            yield f"{name} is missing"
        elif sizes[name] == entry["bytes"]:
            complete.append(name)
        else:
            yield f"{name} has {sizes[name]} bytes instead of {entry['bytes']}"

    def has_other_content(name: str) -> bool:
        digest = entries[name]["digest"]
        if info_by_name is not None:
            return _MD5 + bucket_file_md5(folder / name, info_by_name[name]) != digest
        path = Path(folder / name)
        if digest.startswith(_MD5):  # the folder was copied from a bucket
            return _MD5 + md5_of(path) != digest
        return _digest_file(path) != digest

    for name, is_other in zip(complete, _map_in_threads(has_other_content, complete), strict=True):
        if is_other:
            yield f"{name} has other content"


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def _map_in_threads(function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
    with ThreadPoolExecutor(min(_MAX_THREADS, max(1, len(items)))) as pool:
        return list(pool.map(function, items))
