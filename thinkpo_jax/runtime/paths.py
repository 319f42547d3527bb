"""Expands `~` and environment variables in paths, and says where a missing path was looked for."""

import argparse
import os
import re
from pathlib import Path

from etils import epath

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^{}]*)\})")  # another `$` is a character like any other
AnyPath = Path | epath.Path  # The second kind can also lie in a bucket.
MAX_NAME_BYTES = 255  # of a file or folder


def expand_path(text: str) -> str:
    """Returns a path, Hub id or `builtin:NAME` with `~`, `$NAME` and `${NAME}` replaced. Expanding it again is safe.

    Raises `ValueError` if a variable is not set, the home folder is unknown, or the text cannot be a path.
    """
    if not text.strip():
        raise ValueError("expected a path or a name, found an empty text")
    expanded = _VARIABLE.sub(_value_of, text)
    if match := _VARIABLE.search(expanded):
        raise ValueError(f"cannot be a path: it still holds {match[0]} after the variables in it are replaced")
    if expanded.startswith("~"):
        expanded = os.path.expanduser(expanded)  # noqa: PTH111 -- `Path` would change the rest of the text
        if expanded.startswith("~"):
            name = expanded.split("/")[0]
            raise ValueError(f"cannot be a path: the home folder {name} is unknown. Set HOME, or write the path out")
    try:
        too_long = any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(expanded).parts)
    except UnicodeEncodeError as error:
        raise ValueError(f"cannot be a path: {error}") from None
    if too_long or "\0" in expanded:
        raise ValueError(
            f"cannot be a path: a name in it is longer than {MAX_NAME_BYTES} bytes, or has a null character"
        )
    return expanded


def _value_of(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if not os.environ.get(name):
        state = "is empty" if name in os.environ else "is not set"
        raise ValueError(f"the environment variable {name} {state}. Set it, or write the path out")
    return os.environ[name]


_display_names: dict[str, str] = {}


def display_as(path: Path, name: str) -> None:
    """Makes messages show a name instead of a path, for example the URL of a bucket instead of its copy here."""
    _display_names[str(path)] = name


def to_display(text: str) -> str:
    """Returns a message with the names that users know."""
    for path, name in _display_names.items():
        text = text.replace(path, name)
    return text


def name_argument(text: str) -> str:
    """Returns an argument of a command, a path or a Hub id, expanded by `expand_path`. Use as a `type` of argparse."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}.") from None


def path_argument(text: str) -> Path:
    """Returns an argument of a command as a path, expanded by `expand_path`. Use as a `type` of argparse."""
    return Path(name_argument(text))


def describe_missing(path: Path | str, kind: str = "file") -> str:
    """Returns "there is no such file". For a relative path, it adds the folder that was searched."""
    searched = "" if Path(path).is_absolute() else f" (searched from the working directory {Path.cwd()})"
    return f"there is no such {kind}{searched}"
