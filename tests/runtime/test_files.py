"""Helpers for files, folders and integers that other folders share."""

import json
from pathlib import Path

import pytest

from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.files import StageFolder, lock_folder, read_json_object, software_versions, write_atomically
from thinkpo_jax.runtime.integers import ceil_div, round_up


def test_a_stage_folder_names_its_files() -> None:
    stage = StageFolder(Path("run") / "sft")
    names = {
        name: str(getattr(stage, name).relative_to(stage.path))
        for name in ("record", "checkpoints", "metrics", "validation", "reference", "model")
    }
    assert names == {
        "record": "stage.json",
        "checkpoints": "checkpoints",
        "metrics": "metrics.jsonl",
        "validation": "validation.jsonl",
        "reference": "reference.npz",
        "model": "model",
    }


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.md"
    for content in (b"first", b"second"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.md"
    write_atomically(path, b"first")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file. Train it first."),
        ("[1]", "expected a JSON object, found list."),
        ("{", "cannot be read as JSON: "),
        ("1" * 5000, "cannot be read as JSON: "),
    ],
)
def test_a_file_without_a_json_object_is_an_error_with_its_path(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "stage.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        read_json_object(path, missing_hint="Train it first.")
    assert str(error.value).startswith(f"{path}: {message}")
    path.write_text(json.dumps({"a": 1}))
    assert read_json_object(path) == {"a": 1}


def test_only_one_holder_has_the_lock_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):  # the first block releases it
        with (
            lock_folder(folder, "run_dir"),
            pytest.raises(UserError, match="run_dir: another process writes to"),
            lock_folder(folder, "run_dir"),
        ):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out: .*file cannot be made"), lock_folder(tmp_path / "file", "out"):
        pass


def test_software_versions_name_the_package_and_the_devices() -> None:
    versions = software_versions()
    assert ", commit " in versions["thinkpo_jax"]
    assert versions["devices"] == "8 x cpu"
    assert {"python", "jax", "numpy"} <= versions.keys()


@pytest.mark.parametrize(("a", "b", "ceiling", "rounded"), [(0, 4, 0, 0), (1, 4, 1, 4), (8, 4, 2, 8), (9, 4, 3, 12)])
def test_integers_are_rounded_up(a: int, b: int, ceiling: int, rounded: int) -> None:
    assert ceil_div(a, b) == ceiling
    assert round_up(a, b) == rounded
