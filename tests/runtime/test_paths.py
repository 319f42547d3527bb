"""Paths with `~` and environment variables, and messages about missing paths."""

import argparse
from pathlib import Path

import pydantic
import pytest

from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, UserError
from thinkpo_jax.runtime.files import cache_folder
from thinkpo_jax.runtime.paths import describe_missing, expand_path, path_argument


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/me", "SCRATCH": "/scratch/me", "NESTED": "/x/$SCRATCH", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


EXPANDED = {
    "$SCRATCH/run": "/scratch/me/run",
    "${SCRATCH}/run": "/scratch/me/run",
    "a/${SCRATCH}b$SCRATCH": "a//scratch/meb/scratch/me",
    "~/run": "/home/me/run",
    "~": "/home/me",
}
UNCHANGED = ("runs/a", "./~x", "a~", "a$", "$5", "a$ b", "100%", "owner/name", "builtin:miniature", "exp[1]", "a//b/.")


@pytest.mark.parametrize(("text", "expected"), [*EXPANDED.items(), *((text, text) for text in UNCHANGED)])
def test_a_path_is_expanded_once(text: str, expected: str) -> None:
    assert expand_path(text) == expected
    assert expand_path(expected) == expected
    assert path_argument(text) == Path(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$UNSET/run", "the environment variable UNSET is not set. Set it, or write the path out"),
        ("${UNSET}/run", "the environment variable UNSET is not set"),
        ("$EMPTY/run", "the environment variable EMPTY is empty"),
        ("$NESTED/run", "it still holds $SCRATCH after the variables in it are replaced"),
        ("~no-such-user/run", "the home folder ~no-such-user is unknown"),
        ("  ", "found an empty text"),
        ("x" * 256, "longer than 255 bytes"),
        ("a\0b", "a null character"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        expand_path(text)
    assert message in str(error.value)
    with pytest.raises(argparse.ArgumentTypeError):
        path_argument(text)


def test_a_section_holds_the_expanded_path() -> None:
    class Section(ConfigSection):
        path: ConfigPath

    assert Section(path="$SCRATCH/x").path == "/scratch/me/x"
    with pytest.raises(pydantic.ValidationError, match="variable UNSET is not set"):
        Section(path="$UNSET/x")


def test_a_missing_relative_path_says_which_folder_was_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe_missing("a/b.yaml") == f"there is no such file (searched from the working directory {tmp_path})"
    assert describe_missing(Path("/a/b"), "folder") == "there is no such folder"


def test_the_cache_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "$SCRATCH/c[1]")
    assert cache_folder("tokens") == Path("/scratch/me/c[1]/thinkpo_jax/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", "$UNSET/c")
    with pytest.raises(UserError, match="XDG_CACHE_HOME: the environment variable UNSET is not set"):
        cache_folder("tokens")


def test_a_user_without_a_home_folder_gets_a_cache_and_is_told_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id without an entry in /etc/passwd
    folders: list[Path] = []
    assert run_command(lambda _: folders.append(cache_folder("tokens")), []) == 0
    assert folders[0].is_absolute()
    assert f"no home folder. Caches are in {folders[0].parents[1]}." in capsys.readouterr().err
