"""A folder in a bucket and its copy on this machine."""

import threading

import pytest
from etils import epath

from thinkpo_jax.runtime import bucket
from thinkpo_jax.runtime.bucket import BucketFolder, is_copied
from thinkpo_jax.runtime.bucket_files import bucket_client, list_bucket_files
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.files import lock_folder

pytestmark = pytest.mark.slow


def write(url: str, name: str, text: str) -> None:
    bucket_client().pipe_file(f"{url}/{name}", text.encode())


def read(url: str) -> dict[str, str]:
    return {name: epath.Path(f"{url}/{name}").read_text() for name in list_bucket_files(epath.Path(url))}


def copied(folder: BucketFolder) -> dict[str, str]:
    paths = [path for path in folder.local.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder.local).as_posix(): path.read_text() for path in paths}


def test_files_of_the_bucket_are_copied_without_checkpoints(bucket_url: str) -> None:
    for name in ("config.yaml", "sft/stage.json", "sft/checkpoints/2/model/d", "sft/.hidden"):
        write(bucket_url, name, name)
    folder = BucketFolder(bucket_url)
    folder.download()
    assert copied(folder) == {"config.yaml": "config.yaml", "sft/stage.json": "sft/stage.json"}


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "a//b", ".lock"])
def test_a_name_that_lies_outside_of_the_copy_is_not_copied(name: str) -> None:
    assert not is_copied(name)


def test_the_bucket_wins_and_files_that_only_changed_here_stay(bucket_url: str) -> None:
    for name in ("both", "here", "there", "removed", "same/removed"):
        write(bucket_url, name, "old")
    folder = BucketFolder(bucket_url)
    folder.download()
    for name in ("both", "here", "new"):
        (folder.local / name).write_text("from here")
    for name in ("both", "there"):
        write(bucket_url, name, "from the bucket")
    for name in ("removed", "same/removed"):
        bucket_client().rm_file(f"{bucket_url}/{name}")

    folder.download()
    assert copied(folder) == {
        "both": "from the bucket", "here": "from here", "there": "from the bucket", "new": "from here"
    }  # fmt: skip
    assert not (folder.local / "same").exists()
    folder.upload()
    assert read(bucket_url) == copied(folder)


def test_only_what_changed_is_uploaded_and_removed(bucket_url: str) -> None:
    folder = BucketFolder(bucket_url)
    (folder.local / "sft").mkdir(parents=True)
    for name in ("sft/stage.json", "sft/metrics.jsonl", ".lock", "sft/.stage.json.1.tmp", "report.md"):
        (folder.local / name).write_text("old")
    folder.upload()
    assert read(bucket_url).keys() == {"sft/stage.json", "sft/metrics.jsonl", "report.md"}
    before = list_bucket_files(epath.Path(bucket_url))
    (folder.local / "sft" / "metrics.jsonl").write_text("old, and a line")
    (folder.local / "report.md").unlink()
    folder.upload()
    after = list_bucket_files(epath.Path(bucket_url))
    assert read(bucket_url) == {"sft/stage.json": "old", "sft/metrics.jsonl": "old, and a line"}
    assert after["sft/stage.json"]["generation"] == before["sft/stage.json"]["generation"]


def test_a_copy_that_a_run_writes_to_is_not_changed(bucket_url: str) -> None:
    write(bucket_url, "name", "old")
    folder = BucketFolder(bucket_url)
    with lock_folder(folder.local, "run_dir"):
        thread = threading.Thread(target=BucketFolder(bucket_url).download)
        thread.start()
        thread.join()
    assert copied(folder) == {}
    folder.download()
    assert copied(folder) == {"name": "old"}


def test_files_are_uploaded_in_the_background_and_at_the_end(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "UPLOAD_SECONDS", 0.01)
    folder = BucketFolder(bucket_url)
    folder.local.mkdir(parents=True)
    with folder.uploading():
        (folder.local / "first").write_text("1")
        while "first" not in read(bucket_url):
            pass
        monkeypatch.setattr(bucket, "UPLOAD_SECONDS", 1000)
        (folder.local / "last").write_text("2")
    assert read(bucket_url) == {"first": "1", "last": "2"}


def test_an_upload_that_fails_is_tried_again_and_fails_the_run_at_the_end(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bucket, "UPLOAD_SECONDS", 0.01)
    folder, tried = BucketFolder(bucket_url), threading.Event()
    folder.local.mkdir(parents=True)

    def fail(*_: object) -> None:
        tried.set()
        raise OSError("no network")

    monkeypatch.setattr(bucket_client(), "put_file", fail)
    (folder.local / "name").write_text("1")
    with pytest.raises(RunError, match="cannot be reached: no network"), folder.uploading():
        tried.wait(60)
    assert "no network" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), folder.uploading():  # the first error is the one to see
        _ = 1 / 0
