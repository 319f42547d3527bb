"""Reads files that others wrote, such as those of a downloaded model. Limits their kind and size."""

import stat
from pathlib import Path

from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.paths import AnyPath


def check_file(path: Path, *, max_bytes: int | None = None) -> None:
    """Checks that a path, or what it links to, is a regular file. Opening a pipe or a device may wait forever.

    Raises `UserError` for anything else and for a larger file, and `OSError` if there is no such file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise UserError(f"{path}: expected a regular file, found {kind}. Put the right file there.")
    if max_bytes is not None and status.st_size > max_bytes:
        raise _too_large(path, status.st_size, max_bytes)


def read_text(path: AnyPath, *, max_bytes: int) -> str:
    """Returns the text of a file in UTF-8. Reads no more than the limit.

    Raises `UserError` for a larger file, and `OSError` or `UnicodeDecodeError` if it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            size = path.stat().st_size if isinstance(path, Path) else 0  # a bucket may know no size
            raise _too_large(path, max(size, len(content)), max_bytes)
    return content.decode()


def _too_large(path: AnyPath, size: int, max_bytes: int) -> UserError:
    return UserError(f"{path}: expected at most {max_bytes:,} bytes, found {size:,}. Put the right file there.")
