"""Reads what Google Cloud Storage knows of the files in a bucket."""

import base64
import functools
import hashlib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import fsspec
import fsspec.config

SCHEME = "gs://"
_CHUNK_BYTES = 2**22


def is_in_bucket(path: PurePath) -> bool:
    """Returns whether a path, an `epath.Path`, lies in a bucket."""
    return str(path).startswith(SCHEME)


@functools.cache
def bucket_client() -> fsspec.AbstractFileSystem:
    """Returns the client of the store. Raises `ImportError` if gcsfs is not installed."""
    # Orbax, TensorStore and other processes write too, so a saved listing would be wrong. It holds for Orbax as well.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def list_bucket_files(folder: PurePath) -> dict[str, dict[str, Any]]:
    """Returns what the store knows of each file below a folder in a bucket, by its name in the folder."""
    root = str(folder).removeprefix(SCHEME) + "/"
    found: Any = bucket_client().find(str(folder), detail=True)
    return {path.removeprefix(root): info for path, info in found.items() if info["type"] == "file"}


def bucket_file_digest(path: PurePath, info: Mapping[str, Any]) -> str:
    """Returns the MD5 digest of a file in a bucket, which the store has computed. Reads the file if it has none."""
    if encoded := info.get("md5Hash"):
        return base64.b64decode(encoded).hex()
    digest = hashlib.md5(usedforsecurity=False)
    file: Any = bucket_client().open(str(path), "rb")
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
