"""Only regular files up to a size are read. A pipe or a device is refused without opening it."""

import json
import os
from pathlib import Path

import pytest
from support.faults import Outcome

from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.files import read_json_object
from thinkpo_jax.runtime.limited_files import check_file, read_text


@pytest.mark.faults(Outcome.REFUSED)
def test_a_pipe_a_device_and_a_folder_are_no_regular_files(tmp_path: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    kinds = {"zero": "a pipe, a socket or a device", "pipe": "a pipe, a socket or a device", "folder": "a folder"}
    for name, kind in kinds.items():
        for check in (check_file, read_json_object):
            with pytest.raises(UserError) as caught:
                check(tmp_path / name)
            expected = f"expected a regular file, found {kind}. Put the right file there."
            assert str(caught.value) == f"{tmp_path / name}: {expected}"


def test_a_file_may_be_as_large_as_its_limit_and_no_larger(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": "b" * 1000}))
    size = path.stat().st_size
    assert read_json_object(path, max_bytes=size)["a"] == "b" * 1000
    assert read_text(path, max_bytes=size) == path.read_text()
    for read in (read_json_object, read_text, check_file):
        with pytest.raises(UserError, match=rf"a.json: expected at most 1,008 bytes, found {size:,}\. Put the right"):
            read(path, max_bytes=1008)


@pytest.mark.faults(Outcome.REFUSED)
def test_a_device_without_an_end_is_read_up_to_the_limit() -> None:
    with pytest.raises(UserError, match="/dev/zero: expected at most 100 bytes, found 101"):
        read_text(Path("/dev/zero"), max_bytes=100)
