"""Checkpoints on disk: folders of every name, saves that are not complete, and warnings of Orbax."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.selection import cases

from thinkpo_jax.runtime.config import RunError
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
    with CheckpointStore(folder) as store:
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
    message = (
        r"exp\[1\]: the checkpoint of update 1 is not complete: 1/model/manifest.ocdbt, 1/training/manifest.ocdbt "
    )
    with pytest.raises(RunError, match=message), CheckpointStore(folder) as store:
        store.save(state(1), 1)
    assert "Skipping merge of OCDBT checkpoints" in caplog.text
    shutil.rmtree(folder)
    with CheckpointStore(folder) as store:
        store.save(state(1), 1)
        with pytest.raises(RunError, match=message):
            store.save(state(2), 2)


def test_an_error_that_is_on_its_way_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted_training() -> None:
        with CheckpointStore(tmp_path) as store:
            store.save(state(1), 1)
            store._manager.wait_until_finished()
            (tmp_path / "1" / "training" / "_METADATA").unlink()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_training()
    expected = f"warning: {tmp_path}: the checkpoint of update 1 is not complete: 1/training/_METADATA missing."
    assert expected in capsys.readouterr().err


def test_complete_checkpoints_are_saved_and_read_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints._let_one_replica_write.cache_clear()
    with CheckpointStore(tmp_path) as store:
        store.save(state(1), 1)
    with CheckpointStore(tmp_path, read_only=True) as store:
        store.restore_model(state(0).model)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
