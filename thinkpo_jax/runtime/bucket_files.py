"""Reads what Google Cloud Storage knows of the files in a bucket."""

import base64
import contextlib
import errno
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import fsspec
import fsspec.config

from thinkpo_jax.runtime.config import RunError, UserError, first_line

SCHEME = "gs://"


def is_in_bucket(path: PurePath | str) -> bool:
    """Returns whether a URL or an `epath.Path` lies in a bucket."""
    return str(path).startswith(SCHEME)


@contextlib.contextmanager
def reaching_bucket(path: PurePath | str, kind: type[UserError | RunError] = UserError) -> Iterator[None]:
    """Turns the errors of the store's clients, which have many types, into one of ours. Elsewhere it has no effect."""
    try:
        yield
    except (UserError, RunError, AssertionError, AttributeError, NameError, TypeError):
        raise
    except Exception as error:
        if not is_in_bucket(path) or (isinstance(error, OSError) and error.filename is not None):  # a file on the disk
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"{error.strerror}, while files of {path} were copied") from None
        if isinstance(error, ImportError):
            raise UserError(f"{path}: needs the package gcsfs. Run: pip install 'thinkpo_jax[gcs]'") from None
        reason = first_line(error) or type(error).__name__
        advice = "Check the name of the bucket, the rights of this account and the network, and rerun the same command."
        raise kind(f"{path}: the bucket cannot be reached: {reason} {advice}") from None


@functools.cache
def bucket_client() -> fsspec.AbstractFileSystem:
    """Returns the client of the store. Raises `ImportError` if gcsfs is not installed."""
    # Orbax, TensorStore and other processes write too, so a saved listing would be wrong. The client of Orbax reads the
    # same settings.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of each error that it raises
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def list_bucket_files(folder: PurePath) -> dict[str, dict[str, Any]]:
    """Returns what the store knows of each file below a folder in a bucket, by its name in the folder."""
    root = str(folder).removeprefix(SCHEME) + "/"
    info_by_path: Any = bucket_client().find(str(folder), detail=True)
    return {path.removeprefix(root): info for path, info in info_by_path.items() if info["type"] == "file"}


def bucket_file_md5(path: PurePath | str, info: Mapping[str, Any]) -> str:
    """Returns the MD5 digest of a file in a bucket, which the store has computed. Reads the file if it has none."""
    if encoded := info.get("md5Hash"):
        return base64.b64decode(encoded).hex()
    return _md5(bucket_client().open(str(path), "rb"))


def md5_of(path: Path) -> str:
    """Returns the MD5 digest of a file on the disk."""
    return _md5(path.open("rb"))


def _md5(opened: Any) -> str:
    with opened as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
