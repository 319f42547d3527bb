"""A folder in a bucket and its copy on this machine."""

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from etils import epath

from thinkpo_jax.runtime import bucket
from thinkpo_jax.runtime.bucket import BucketFolder, is_copied
from thinkpo_jax.runtime.bucket_files import bucket_client, list_bucket_files
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.files import FolderInUseError


def write(url: str, name: str, text: str) -> None:
    bucket_client().pipe_file(f"{url}/{name}", text.encode())


def read(url: str) -> dict[str, str]:
    return {name: epath.Path(f"{url}/{name}").read_text() for name in list_bucket_files(epath.Path(url))}


def copied(folder: BucketFolder) -> dict[str, str]:
    paths = [path for path in folder.local.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder.local).as_posix(): path.read_text() for path in paths}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "a//b", ".lock", "sft/model.damaged.1/x"])
def test_a_name_outside_of_the_copy_or_a_damaged_model_is_not_copied(name: str) -> None:
    assert not is_copied(name)


@pytest.mark.parametrize(
    "url", ["gs://bucket", "gs://bucket/../../x", "gs://bucket/./x", "gs://b/x", "s3://bucket/run"]
)
def test_a_url_that_names_no_folder_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="expected gs://BUCKET/FOLDER"):
        BucketFolder(url)


@pytest.mark.slow
def test_files_of_the_bucket_are_copied_without_checkpoints(bucket_url: str) -> None:
    for name in ("config.yaml", "sft/stage.json", "sft/checkpoints/2/model/d", "sft/.hidden", "sft/model/config.json"):
        write(bucket_url, name, name)
    folder = BucketFolder(bucket_url)
    folder.download(lambda name: "model" not in name.split("/"))
    assert copied(folder) == {"config.yaml": "config.yaml", "sft/stage.json": "sft/stage.json"}
    folder.download()
    assert copied(folder).keys() == {"config.yaml", "sft/stage.json", "sft/model/config.json"}


@pytest.mark.slow
def test_the_bucket_wins_and_files_that_only_changed_here_stay(bucket_url: str) -> None:
    for name in ("both", "here", "there", "removed", "a/b/removed"):
        write(bucket_url, name, "old")
    folder = BucketFolder(bucket_url)
    folder.download()
    for name in ("both", "here", "new"):
        (folder.local / name).write_text("from here")
    for name in ("both", "there"):
        write(bucket_url, name, "from the bucket")
    for name in ("removed", "a/b/removed"):
        bucket_client().rm_file(f"{bucket_url}/{name}")

    folder.download()
    assert copied(folder) == {
        "both": "from the bucket", "here": "from here", "there": "from the bucket", "new": "from here"
    }  # fmt: skip
    assert not (folder.local / "a").exists()
    folder.upload()
    assert read(bucket_url) == copied(folder)


@pytest.mark.slow
def test_in_other_processes_only_what_is_in_the_bucket_counts(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bucket_url, "name", "old")
    BucketFolder(bucket_url).download()
    monkeypatch.setattr(bucket, "is_primary_process", lambda: False)
    folder = BucketFolder(bucket_url)
    (folder.local / "name").write_text("damaged")
    (folder.local / "sft").mkdir()
    (folder.local / "sft" / "new").write_text("")
    folder.download()
    assert copied(folder) == {"name": "old"}


@pytest.mark.slow
def test_only_what_changed_is_uploaded_and_nothing_is_removed(bucket_url: str) -> None:
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
    assert read(bucket_url) == {"sft/stage.json": "old", "sft/metrics.jsonl": "old, and a line", "report.md": "old"}
    assert after["sft/stage.json"]["generation"] == before["sft/stage.json"]["generation"]


@pytest.mark.slow
def test_a_folder_that_has_another_name_is_removed(bucket_url: str) -> None:
    for name in ("sft/model/config.json", "sft/model/added.json", "sft/model2/config.json"):
        write(bucket_url, name, name)
    folder = BucketFolder(bucket_url)
    folder.download()
    (folder.local / "sft" / "model").rename(folder.local / "sft" / "model.damaged")
    folder.remove(folder.local / "sft" / "model")
    folder.upload()
    folder.download()
    assert read(bucket_url).keys() == {"sft/model2/config.json"}
    assert copied(folder).keys() == {
        "sft/model.damaged/config.json", "sft/model.damaged/added.json", "sft/model2/config.json"
    }  # fmt: skip


@pytest.mark.slow
def test_a_full_disk_is_no_problem_of_the_bucket(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bucket_url, "name", "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bucket_client(), "get_file", fail)
    with pytest.raises(OSError, match=f"No space left on device, while files of {bucket_url} were copied"):
        BucketFolder(bucket_url).download()


@pytest.mark.slow
def test_a_file_that_the_store_did_not_take_is_uploaded_again(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = BucketFolder(bucket_url)
    folder.local.mkdir(parents=True)
    (folder.local / "name").write_text("old")
    folder.upload()
    (folder.local / "name").write_text("the new text")
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise FileNotFoundError("the upload session")

        patch.setattr(bucket_client(), "put_file", fail)
        with pytest.raises(RunError, match="the upload session"):
            folder.upload()
    folder.upload()
    assert read(bucket_url) == {"name": "the new text"}


@pytest.mark.slow
def test_an_upload_after_which_the_program_was_killed_is_no_change_in_the_bucket(bucket_url: str) -> None:
    folder = BucketFolder(bucket_url)
    folder.local.mkdir(parents=True)
    (folder.local / "name").write_text("new")
    write(bucket_url, "name", "new")  # uploaded, but not in the state
    before = (folder.local / "name").stat().st_ino
    folder.download()
    assert (folder.local / "name").stat().st_ino == before, "it was copied again"


@pytest.mark.slow
def test_a_copy_that_a_run_writes_to_is_not_changed(bucket_url: str) -> None:
    folder = BucketFolder(bucket_url)
    with folder.writing("run_dir"):
        write(bucket_url, "name", "old")
        BucketFolder(bucket_url).download()
        assert copied(folder) == {}
        with pytest.raises(FolderInUseError), BucketFolder(bucket_url).writing("run_dir"):
            pass
    folder.download()
    assert copied(folder) == {"name": "old"}


@pytest.mark.slow
def test_a_run_waits_for_a_command_that_copies_files(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bucket_url, "config.yaml", "old")
    copies, may_go_on = threading.Event(), threading.Event()
    get_file = bucket_client().get_file

    def get_slowly(*arguments: Any) -> None:
        copies.set()
        assert may_go_on.wait(120)
        get_file(*arguments)

    monkeypatch.setattr(bucket_client(), "get_file", get_slowly)
    reader = threading.Thread(target=BucketFolder(bucket_url).download)
    reader.start()
    assert copies.wait(120)
    timer = threading.Timer(0.3, may_go_on.set)
    timer.start()
    folder = BucketFolder(bucket_url)
    with folder.writing("run_dir"):
        assert copied(folder) == {"config.yaml": "old"}
    reader.join()


@pytest.mark.slow
def test_files_are_uploaded_in_the_background(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "UPLOAD_SECONDS", 0.01)
    folder = BucketFolder(bucket_url)
    with folder.writing("run_dir"):
        (folder.local / "first").write_text("1")
        wait_until(lambda: "first" in read(bucket_url))


@pytest.mark.slow
def test_files_are_uploaded_at_the_end_also_of_a_failed_run(bucket_url: str) -> None:
    folder = BucketFolder(bucket_url)

    def write_and_fail() -> None:
        with folder.writing("run_dir"):
            (folder.local / "first").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert read(bucket_url) == {"first": "1"}
    with folder.writing("run_dir"):
        (folder.local / "last").write_text("2")
    assert read(bucket_url) == {"first": "1", "last": "2"}


@pytest.mark.slow
def test_an_upload_that_fails_is_tried_again(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bucket, "UPLOAD_SECONDS", 0.01)
    folder, num_failures = BucketFolder(bucket_url), 0
    put_file = bucket_client().put_file

    def fail_twice(*arguments: Any) -> None:
        nonlocal num_failures
        num_failures += 1
        if num_failures <= 2:
            raise ConnectionError("no network")
        put_file(*arguments)

    monkeypatch.setattr(bucket_client(), "put_file", fail_twice)
    with folder.writing("run_dir"):
        (folder.local / "name").write_text("1")
        wait_until(lambda: "name" in read(bucket_url))
    assert capsys.readouterr().err.count("the bucket cannot be reached: no network") == 1


@pytest.mark.slow
def test_a_run_whose_last_upload_fails_has_failed(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(bucket_client(), "put_file", fail)
    folder = BucketFolder(bucket_url)
    folder.local.mkdir(parents=True)
    (folder.local / "name").write_text("1")
    with pytest.raises(RunError, match="cannot be reached: no network"), folder.writing("run_dir"):
        pass
    with pytest.raises(ZeroDivisionError), folder.writing("run_dir"):  # the first error is the one to see
        _ = 1 / 0
    assert "no network" in capsys.readouterr().err
