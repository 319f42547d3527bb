"""Keeps a folder in a Google Cloud Storage bucket: a copy on this machine, and the uploads of what changes there.

Orbax writes checkpoints straight into the bucket, from all processes. Everything else is small or rare. Programs read
and write it in the copy. Process 0 uploads what changed.
"""

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from etils import epath

from thinkpo_jax.runtime.bucket_files import SCHEME, bucket_client, list_bucket_files
from thinkpo_jax.runtime.config import RunError, UserError, first_line
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.runtime.files import FolderInUseError, cache_folder, lock_folder
from thinkpo_jax.runtime.processes import barrier, is_distributed, is_primary_process, note_progress

URL = re.compile(r"gs://[a-z0-9][a-z0-9._-]+(/[\w.@+=~%-]+)+/?")
CHECKPOINTS = "checkpoints"  # a folder with this name is not copied
STATE_FILE = ".bucket.json"  # what was the same on both sides
UPLOAD_SECONDS = 30.0  # between two looks at the copy
_THREADS = 8


class BucketFolder:
    """A folder in a bucket and its copy `local` on this machine. Each process has a copy of its own."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` if the URL is none of a folder in a bucket."""
        if not URL.fullmatch(url):
            problem = (
                f"{url}: expected gs://BUCKET/FOLDER, with letters, digits and any of . _ @ + = ~ % - in each name"
            )
            raise UserError(f"{problem}. Other stores must be mounted as a folder.")
        self.url = url.rstrip("/")
        process = "" if is_primary_process() else f"process-{jax.process_index()}"
        self.local = cache_folder("buckets") / process / self.url.removeprefix(SCHEME)
        self._lock, self._stop = threading.Lock(), threading.Event()

    def checkpoints(self, stage: str) -> epath.Path:
        """Returns the folder of the checkpoints of a stage, in the bucket."""
        return epath.Path(f"{self.url}/{stage}/{CHECKPOINTS}")

    def open(self) -> None:
        """Gives all processes the same copy of what is in the bucket. Raises `UserError` if it cannot be read."""
        self.download()
        if is_distributed():  # process 0 may have files that a killed run had not uploaded yet
            self.share()

    def download(self) -> None:
        """Makes the copy like the folder in the bucket. Files that only changed on this machine stay.

        If a run on this machine is writing to the copy, the copy is the newer one. Then this does nothing. Raises
        `UserError` if the bucket cannot be read.
        """
        with contextlib.suppress(FolderInUseError), lock_folder(self.local, "run_dir"), _reaching(self.url):
            state, remote = self._read_state(), self._list()
            for name in state.keys() - remote.keys():  # removed in the bucket
                del state[name]
                (self.local / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # other files are there
                    (self.local / name).parent.rmdir()
            changed = [
                name for name, version in remote.items()
                if name not in state or state[name][0] != version or not (self.local / name).is_file()
            ]  # fmt: skip
            with ThreadPoolExecutor(_THREADS) as pool:
                versions = dict(zip(changed, pool.map(self._download_file, changed), strict=True))
            self._write_state(state | {name: [remote[name], version] for name, version in versions.items()})
            if changed:
                log_info(f"{self.url}: {len(changed)} files were copied to {self.local}")

    def upload(self) -> None:
        """Makes the folder in the bucket like the copy. Only process 0 does. Raises `RunError` if that fails."""
        if not is_primary_process():
            return
        with self._lock, _reaching(self.url, RunError):
            state, local = self._read_state(), dict(_local_versions(self.local))
            changed = [name for name, version in local.items() if name not in state or state[name][1] != version]
            removed = [name for name in state if name not in local]
            if not changed and not removed:
                return
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(self._upload_file, changed))
            for name in removed:
                with contextlib.suppress(FileNotFoundError):
                    bucket_client().rm_file(f"{self.url}/{name}")
            remote = self._list()
            same = {name: state[name] for name in state if name in local and name not in changed}
            uploaded = {name: [remote[name], local[name]] for name in changed if name in remote}
            self._write_state(same | uploaded)

    def share(self) -> None:
        """Uploads what process 0 has written, and downloads it in all other processes."""
        self.upload()
        barrier("the files are in the bucket")
        if not is_primary_process():
            self.download()
        barrier("all processes have the files of the bucket")

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """Uploads what changes every 30 seconds, and the rest at the end of the `with` block."""
        self._stop.clear()
        thread = threading.Thread(target=self._upload_repeatedly, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            try:
                self.upload()
            except RunError as error:
                log_warning(str(error))  # another error is on its way
            raise
        else:
            self.upload()
        finally:
            self._stop.set()
            thread.join()

    def _upload_repeatedly(self) -> None:
        while not self._stop.wait(UPLOAD_SECONDS):
            try:
                self.upload()
            except RunError as error:
                log_warning(f"{error} Trying again in {UPLOAD_SECONDS:.0f} seconds.")

    def _download_file(self, name: str) -> list[int]:
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        bucket_client().get_file(f"{self.url}/{name}", str(partial))
        partial.replace(path)
        note_progress()
        return _version(path)

    def _upload_file(self, name: str) -> None:
        note_progress()
        path = self.local / name
        with contextlib.suppress(FileNotFoundError):  # removed in the meantime
            if path.suffix != ".jsonl":
                bucket_client().put_file(str(path), f"{self.url}/{name}")
                return
            snapshot = path.with_name(f".{path.name}.partial")  # lines are being added to the file
            shutil.copyfile(path, snapshot)
            bucket_client().put_file(str(snapshot), f"{self.url}/{name}")
            snapshot.unlink()

    def _list(self) -> dict[str, str]:
        """Returns a text for each file in the bucket that changes when the file does, without checkpoints."""
        files = list_bucket_files(epath.Path(self.url))
        return {name: str(info.get("generation")) for name, info in files.items() if is_copied(name)}

    def _read_state(self) -> dict[str, list[Any]]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.local / STATE_FILE).read_text(encoding="utf-8"))
        return {}

    def _write_state(self, state: Mapping[str, list[Any]]) -> None:
        self.local.mkdir(parents=True, exist_ok=True)
        (self.local / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")


def is_copied(name: str) -> bool:
    """Returns whether a file is copied. Names such as `../a` and `/a` may lie in a bucket, but not below the copy."""
    *folders, last = name.split("/")
    return CHECKPOINTS not in folders and all(part and not part.startswith(".") for part in (*folders, last))


def _version(path: Path) -> list[int]:
    """Returns numbers that change when a file of the copy does."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _local_versions(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        with contextlib.suppress(FileNotFoundError):  # removed in the meantime
            if is_copied(name) and path.is_file():
                yield name, _version(path)


@contextlib.contextmanager
def _reaching(url: str, kind: type[UserError | RunError] = UserError) -> Iterator[None]:
    """Turns the errors of the client, which have many types, into one of ours that names the URL."""
    try:
        yield
    except (UserError, RunError):
        raise
    except ImportError:
        raise UserError(f"{url}: needs the package gcsfs. Run: pip install 'thinkpo_jax[gcs]'") from None
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        advice = "Check the name of the bucket, the rights of this account and the network, and rerun the same command."
        raise kind(f"{url}: the bucket cannot be reached: {reason} {advice}") from None
