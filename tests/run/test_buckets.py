"""A run folder in a bucket: the same results as in a folder on the disk, also after the machine is lost."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from etils import epath
from support.faults import Outcome, read_result
from support.quickstart import QUICKSTART, quickstart_arguments, train_quickstart

from thinkpo_jax import evaluate, export, train
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.run.evaluated_models import find_model
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.runtime.bucket_files import bucket_client, list_bucket_files
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.training import checkpoints
from thinkpo_jax.training.checkpoints import CheckpointStore
from thinkpo_jax.training.train_step import TrainState

pytest.importorskip("gcsfs")
from gcsfs.retry import HttpError
from google.auth.exceptions import RefreshError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def disk_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk") / "run"
    assert train_quickstart(folder) == 0
    return folder


def _files(url: str) -> set[str]:
    return set(list_bucket_files(epath.Path(url)))


@pytest.mark.exhaustive
def test_a_run_in_a_bucket_equals_one_on_the_disk(
    disk_run: Path, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_quickstart(bucket_url) == 0
    on_disk = {path.relative_to(disk_run).as_posix() for path in disk_run.rglob("*") if path.is_file()}
    assert {name for name in on_disk if "checkpoints" not in name and name != ".lock"} == {
        name for name in _files(bucket_url) if "checkpoints" not in name
    }
    assert {f"sft/checkpoints/{step}/commit_success.txt" for step in (2, 4, 6)} <= _files(bucket_url)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert read_result(RunFolder.open(bucket_url).path) == read_result(disk_run)
    assert train_quickstart(bucket_url) == 0
    assert "update" not in capsys.readouterr().err  # nothing was trained again
    arguments = ["--model", f"{bucket_url}:thinkpo", "--benchmark", "miniature", "--out", str(tmp_path / "scores")]
    assert run_command(evaluate.main, [*arguments, "--limit", "4", "--max-new-tokens", "4"]) == 0
    assert run_command(evaluate.main, ["--rescore", bucket_url]) == 0
    assert run_command(evaluate.main, ["--pool", bucket_url, f"{bucket_url}2"]) == 2
    assert f"--pool {bucket_url}2/config.yaml: there is no such file" in capsys.readouterr().err


@pytest.mark.faults(Outcome.SAME)
def test_a_run_goes_on_when_its_machine_is_lost(
    disk_run: Path, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "thinkpo_jax.train", *quickstart_arguments(bucket_url)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while "sft/checkpoints/4/commit_success.txt" not in _files(bucket_url):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert train_quickstart(bucket_url) == 0
    assert read_result(RunFolder.open(bucket_url).path) == read_result(disk_run)
    assert [line["step"] for line in read_metrics(RunFolder.open(bucket_url).stage("sft").metrics)] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    bucket_client().get(bucket_url, str(tmp_path / "copy"), recursive=True)  # as people copy a run to a disk
    models = [tmp_path / "from the bucket", tmp_path / "from the copy"]
    for run, out in zip((bucket_url, tmp_path / "copy"), models, strict=True):
        assert run_command(export.main, ["--run", str(run), "--out", str(out), "--stage", "sft"]) == 0
    first, second = ((model / "model.safetensors").read_bytes() for model in models)
    assert first == second
    assert "Evaluation of the float32 model" in (models[0] / "README.md").read_text()
    folder = resolve_model_folder(find_model(f"{bucket_url}:thinkpo")["path"])
    expected = (disk_run / "thinkpo" / "model" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == expected
    assert f"report: {bucket_url}/report.md" in (printed := capsys.readouterr().err)
    assert "buckets/run" not in printed  # the folder of the copy


def _state(value: float) -> TrainState:
    model: Any = {"a": jnp.full((4, 4), value)}
    return TrainState(model, {"moment": jnp.ones(3)}, jnp.int32(value))


@pytest.mark.faults(Outcome.SAME)
def test_a_damaged_checkpoint_in_a_bucket_is_not_used(bucket_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = epath.Path(bucket_url) / "checkpoints"

    with CheckpointStore(folder) as store:
        for step in (1, 2):
            store.save(_state(step), step)
    name = next(name for name in sorted(list_bucket_files(folder)) if name.startswith("2/model/ocdbt.process_0/d/"))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    bucket_client().pipe_file(str(folder / name), bytes(content))

    with CheckpointStore(folder) as store:
        assert store.latest_step() == 1
        assert store.restore(_state(0)).step == 1
    problem = f"{folder}/2: damaged: {name.removeprefix('2/')} has other content."
    assert f"{problem} This checkpoint is not used, and is now called damaged-2." in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["1", "damaged-2"]


def test_a_run_that_was_copied_from_a_disk_is_refused_and_stays(bucket_url: str, tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(_state(1), 1)
    folder = epath.Path(bucket_url) / "checkpoints"
    bucket_client().put(str(tmp_path / "checkpoints"), str(folder), recursive=True)
    before = list_bucket_files(folder)
    with pytest.raises(UserError, match=r"checkpoints/1: was copied from a disk.*Choose another run_dir"):
        CheckpointStore(folder)
    assert list_bucket_files(folder) == before
    assert before


def test_a_folder_without_a_model_is_not_copied(bucket_url: str) -> None:
    bucket_client().pipe_file(f"{bucket_url}/data.jsonl", b"{}")
    with pytest.raises(UserError, match=f"model.path: {bucket_url}: there is no config.json"):
        resolve_model_folder(bucket_url)
    with pytest.raises(UserError, match=f"{bucket_url}: has files, but it is not the folder of a run"):
        RunFolder.open(bucket_url)


@pytest.mark.parametrize("error", [HttpError({"code": 403, "message": "Forbidden"}), RefreshError("Forbidden")])
def test_a_bucket_that_refuses_a_checkpoint_is_an_error(
    error: Exception, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = epath.Path(bucket_url) / "checkpoints"
    with CheckpointStore(folder) as store:
        store.save(_state(1), 1)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bucket_client(), "find", fail)
        with pytest.raises(UserError, match=r"checkpoints: the bucket cannot be reached: .*Forbidden"):
            CheckpointStore(folder)
    with CheckpointStore(folder) as store:
        monkeypatch.setattr(checkpoints, "write_bucket_manifest", fail)
        with pytest.raises(RunError, match=r"checkpoint 2 cannot be written: .*Forbidden"):
            store.save(_state(2), 2, wait=True)


@pytest.mark.parametrize(
    ("run_dir", "message"),
    [
        ("s3://bucket/run", "run_dir: expected gs://BUCKET/FOLDER"),
        ("gs://bucket", "run_dir: expected gs://BUCKET/FOLDER"),
        ("gs://bucket/a[1]", "run_dir: expected gs://BUCKET/FOLDER"),
        ("gs://missing-bucket/run", "gs://missing-bucket/run: the bucket cannot be reached: "),
    ],
)
@pytest.mark.faults(Outcome.REFUSED)
def test_a_bad_url_is_an_error_before_the_devices_are_used(
    run_dir: str, message: str, bucket_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(train.main, ["--config", QUICKSTART, "--set", f"run_dir={run_dir}"]) == 2
    assert message in capsys.readouterr().err
