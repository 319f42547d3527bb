"""Checkpoints on disk: folders of every name, damaged files, full disks, and warnings of Orbax."""

import errno
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.disks import on_small_disk
from support.faults import Outcome
from support.selection import cases

from thinkpo_jax.runtime import manifest
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.training import checkpoints
from thinkpo_jax.training.checkpoints import PLAIN_PATH, CheckpointStore
from thinkpo_jax.training.train_step import TrainState

# One for each problem: patterns of file names, two folders for TensorStore, a URL, and bytes that are not UTF-8.
HARD_NAMES = ("exp[1]", "**", "back\\slash", "gs:", b"\xff".decode("utf8", "surrogateescape"))
OTHER_NAMES = (
    "a*b", "a?b", "[!a]", "[", "]", "sp ace", "ha#sh", "per%20cent", "ünï", "日本", "a:b", "a::b", "q'uote", 'dq"x',
    "a$b", "new\nline", "\u2028x", "{a}", "a,b", "a;b", "a|b", "a&b", "a=b", "a@b", "<x>", "~x", "-dash", "!x", "^a",
    "a`b", "trail.", "trail ", "..x", "s3:", "x.orbax-checkpoint-tmp-1", "0", "1", "\x01ctl", "tab\tx",
)  # fmt: skip


def state(value: float) -> TrainState:
    model: Any = {"a": jnp.full((4, 4), value), "b": {"c": jnp.arange(8.0)}}
    return TrainState(model, {"moment": jnp.ones(3)}, jnp.int32(value))


@pytest.mark.parametrize("name", cases(HARD_NAMES + OTHER_NAMES, short=lambda name: name in HARD_NAMES))
def test_a_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "sft" / "checkpoints"
    with CheckpointStore(folder, keep=1) as store:
        for step in (1, 2):
            store.save(state(step), step)
    with CheckpointStore(folder, read_only=True) as store:
        assert store.latest_step() == 2
        np.testing.assert_array_equal(jax.tree.leaves(store.restore(state(0)).model)[0], np.full((4, 4), 2.0))
    assert [path.name for path in folder.iterdir()] == ["2"]  # the older one was removed
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_pattern_in_the_name_does_not_touch_the_folders_that_match_it(tmp_path: Path) -> None:
    for name, value in (("axb", 1), ("a*b", 2)):
        with CheckpointStore(tmp_path / name) as store:
            store.save(state(value), 1)
    for name, value in (("axb", 1), ("a*b", 2)):
        with CheckpointStore(tmp_path / name, read_only=True) as store:
            assert store.restore(state(0)).step == value


def test_only_names_that_orbax_reads_as_they_are_count_as_plain() -> None:
    assert PLAIN_PATH.fullmatch("/home/me/runs/exp 1_ü-b.2")
    assert not any(PLAIN_PATH.fullmatch(path) for path in ("/gs/run", "/s3/run", "/hf/run", "/x/a[1]/run", "/x/a\nb"))
    assert PLAIN_PATH.fullmatch("/data/gs/run")


def test_a_save_that_orbax_leaves_incomplete_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoints, "PLAIN_PATH", re.compile(".*"))  # so Orbax gets a name that it reads as a pattern
    folder = tmp_path / "exp[1]"
    message = r"exp\[1\]: checkpoint 1 cannot be written: manifest.ocdbt of model missing. Check the disk."
    with pytest.raises(RunError, match=message), CheckpointStore(folder) as store:
        store.save(state(1), 1)
    assert "Skipping merge of OCDBT checkpoints" in caplog.text
    with CheckpointStore(tmp_path / "again" / "exp[1]") as store:
        store.save(state(1), 1)
        with pytest.raises(RunError, match=message):
            store.save(state(2), 2)


def test_an_error_that_is_on_its_way_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "ITEM_FILES", ("missing-file",))

    def interrupted_training() -> None:
        with CheckpointStore(tmp_path) as store:
            store.save(state(1), 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_training()
    assert f"warning: {tmp_path}: checkpoint 1 cannot be written: missing-file of model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    with CheckpointStore(folder, keep=3) as store:
        for step in (1, 2, 3):
            store.save(state(step), step)
    return folder


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def decides_the_state(path: Path) -> bool:
    return path.name not in ("commit_success.txt", "_CHECKPOINT_METADATA")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
@pytest.mark.faults(Outcome.REFUSED)
def test_a_damaged_checkpoint_is_never_restored(damage: str, three_checkpoints: Path, tmp_path: Path) -> None:
    damages: dict[str, Callable[[Path], object]] = {
        "flip": lambda path: flip_bit(path, random.Random(0).randrange(2**20)),
        "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
        "empty": lambda path: path.write_bytes(b""),
        "remove": Path.unlink,
    }
    files = [path for path in sorted((three_checkpoints / "3").rglob("*")) if path.is_file()]
    assert sum(map(decides_the_state, files)) >= 12
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(three_checkpoints, folder)
        damages[damage](folder / file.relative_to(three_checkpoints))
        expected = 2 if decides_the_state(file) else 3
        with CheckpointStore(folder) as store:
            assert store.latest_step() == expected, file
            restored = store.restore(state(0))
        assert all(map(np.array_equal, jax.tree.leaves(restored), jax.tree.leaves(state(expected)))), file
        assert (folder / "damaged-3").is_dir() == decides_the_state(file)


def test_a_damaged_checkpoint_is_reported_and_its_step_is_saved_again(
    three_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_checkpoints, folder)
    for step in (3, 2):
        file = next(path for path in (folder / str(step) / "model" / "d").iterdir())
        flip_bit(file, 0)
    (folder / "7").mkdir()
    with CheckpointStore(folder, read_only=True) as store:
        assert store.latest_step() == 1
        with pytest.raises(
            UserError, match=r"checkpoints/3: damaged: model/d/.* has other content. Choose another one"
        ):
            store.restore_model(state(0).model, 3)
    assert (folder / "3").is_dir()  # a reader changes nothing
    capsys.readouterr()
    with CheckpointStore(folder, keep=3) as store:
        store.save(state(3), 3)
    lines = capsys.readouterr().err.splitlines()
    assert [re.split("/|:", line.split("checkpoints/")[1])[0] for line in lines] == ["7", "3", "2"]
    assert "is now called damaged-2. Training resumes from an earlier checkpoint" in lines[-1]
    with CheckpointStore(folder) as store:
        assert store.latest_step() == 3
        assert store.restore(state(0)).step == 3


def test_an_unreadable_checkpoint_is_not_renamed(
    three_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that fails for a moment must not make training start again."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_checkpoints, folder)

    def fail(_: object) -> str:
        raise OSError(errno.EIO, "Input/output error", "model/d/0")

    monkeypatch.setattr(manifest, "_digest_file", fail)
    with pytest.raises(OSError, match="model/d/0"):
        CheckpointStore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_memory_that_is_exhausted_is_no_full_disk() -> None:
    assert checkpoints._is_disk_full(ValueError("RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]"))
    assert checkpoints._is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert not checkpoints._is_disk_full(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not checkpoints._is_disk_full(ValueError("RESOURCE_EXHAUSTED: Out of memory"))


def test_a_validation_without_a_figure_is_not_the_best(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "a", keep_best="loss") as store:
        for step, loss in enumerate((math.nan, 2.0, 3.0), 1):
            store.save(state(step), step)
            store.add_validation({"step": step, "loss": loss})
        assert store.best_step() == 2


@pytest.mark.parametrize(("metric", "best", "value"), [("loss", 2, "-3"), ("rewards/margins", 3, "1")])
def test_the_checkpoint_with_the_best_validation_is_kept(metric: str, best: int, value: str, tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    folder, losses = tmp_path / "checkpoints", [-0.5, -3.0, -1.0, -2.0, -2.5, -0.1]
    with CheckpointStore(folder, keep=1, keep_best=metric) as store, path.open("w") as file:
        for step, loss in enumerate(losses[:5], 1):
            store.save(state(step), step)
            line = {"step": step, "loss": loss, "rewards/margins": 1 - abs(step - 3.0)}
            store.add_validation(line)
            file.write(json.dumps(line) + "\n")
        (note,) = store.notes()
        assert note == f"best {metric} of the validation: {value} after update {best}, whose checkpoint is kept"
        with pytest.raises(UserError, match=r"the validation has no .*It has: accuracy"):
            store.add_validation({"step": 5, "accuracy": 1.0})
    with CheckpointStore(folder, keep=1, keep_best=metric) as store:
        store.read_validations(path, last=5)
        store.save(state(6), 6)
    assert sorted(step.name for step in folder.iterdir()) == [str(best), "6"]


def test_it_is_time_for_a_checkpoint_once_after_the_minutes(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "a") as never, CheckpointStore(tmp_path / "b", every_minutes=60) as later:
        assert [never.is_time(), later.is_time()] == [False, False]
    with CheckpointStore(tmp_path / "c", every_minutes=1e-9) as now:
        assert [now.is_time(), now.is_time()] == [True, False]
        now.save(state(1), 1)
        assert now.is_time()


@pytest.mark.faults(Outcome.REPORTED)
def test_a_full_disk_keeps_the_newest_checkpoint_and_is_tried_once_more() -> None:
    """A script saves on a file system of 30 MB. Its states have 9 MB, and one has 40 MB."""
    script = Path(__file__).parents[1] / "support" / "full_disk.py"
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    process = [*on_small_disk("30m"), sys.executable, str(script), "/mnt/checkpoints"]
    done = subprocess.run(process, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["kept [1, 2]", "too large: [2]", "again [2, 5]", "newest 5", "names ['2', '5']"]
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: /mnt/checkpoints: the disk is full. All checkpoints but the newest are removed")
    assert error.startswith("error: /mnt/checkpoints: checkpoint 3 cannot be written: the disk is full (0.0")


def test_complete_checkpoints_are_saved_and_read_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints._configure_orbax.cache_clear()
    with CheckpointStore(tmp_path) as store:
        store.save(state(1), 1)
    with CheckpointStore(tmp_path, read_only=True) as store:
        store.restore_model(state(0).model)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
