"""Manifests find every difference, and a hostile manifest reads nothing outside of its folder."""

import errno
import json
import os
from pathlib import Path

import pytest

from thinkpo_jax.runtime.manifest import (
    MANIFEST_FILE,
    digest_files,
    digest_text,
    find_file_damage,
    sync_to_disk,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"a": b"1234", "b/c": bytes(3 * 2**20), "empty": b""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, [path for path in tmp_path.rglob("*") if path.is_file()])
    return tmp_path


def test_a_folder_as_written_has_no_damage(folder: Path) -> None:
    (folder / "more").write_text("not in the manifest")
    assert find_file_damage(folder) == []


def test_each_difference_is_named(folder: Path) -> None:
    (folder / "a").write_bytes(b"1235")
    (folder / "b" / "c").unlink()
    (folder / "empty").write_bytes(b"x")
    assert sorted(find_file_damage(folder)) == [
        "a has other content", "b/c is missing", "empty has 1 bytes instead of 0",
    ]  # fmt: skip


def test_a_file_with_its_old_size_and_time_is_read_again(folder: Path) -> None:
    path = folder / "a"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    (before,) = digest_files([path])
    path.write_bytes(b"4321")
    os.utime(path, ns=times)
    assert digest_files([path]) != [before]


@pytest.mark.parametrize(
    "files",
    [[], {"a": 1}, {"a": {}}, {"/dev/zero": {"bytes": 0, "digest": ""}}, {"../x": {"bytes": 0, "digest": ""}}, 7, None],
    ids=str,
)
def test_a_hostile_manifest_counts_as_damaged(files: object, folder: Path) -> None:
    manifest = {"format": 1, "files": files, "digest": digest_text(json.dumps(files))}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert find_file_damage(folder) == [f"{MANIFEST_FILE} is damaged"]


def test_a_pipe_in_place_of_a_file_is_not_read(folder: Path) -> None:
    (folder / "a").unlink()
    os.mkfifo(folder / "a")
    assert find_file_damage(folder) == ["a is missing"]


def test_a_disk_that_fails_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EINVAL))
    sync_to_disk(folder / "a")  # such a file system cannot do it
    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device: .*/a"):
        sync_to_disk(folder / "a")
