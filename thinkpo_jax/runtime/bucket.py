"""Keeps a folder in a Google Cloud Storage bucket: a copy on this machine, and the uploads of what changes there.

Orbax writes checkpoints straight into the bucket, from all processes. Everything else is small or rare. Programs read
and write it in the copy. Process 0 uploads what changed. No upload removes a file.
"""

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import jax
from etils import epath

from thinkpo_jax.runtime.bucket_files import (
    bucket_client,
    bucket_file_md5,
    list_bucket_files,
    md5_of,
    reaching_bucket,
)
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.runtime.files import FolderInUseError, cache_folder, lock_folder
from thinkpo_jax.runtime.manifest import digest_text, sync_to_disk
from thinkpo_jax.runtime.paths import display_as
from thinkpo_jax.runtime.processes import barrier, is_primary_process, note_progress

URL = re.compile(r"gs://[a-z0-9][a-z0-9._-]+(/(?!\.)[\w.@+=~%-]+)+/?")
CHECKPOINTS = "checkpoints"  # a folder with this name is not copied
MODEL = "model"
DAMAGED_MODEL = "model.damaged"  # nor is one whose name begins like this
STATE_FILE = ".bucket.json"  # generation and local version of each file after its last transfer
TRANSFER_LOCK = ".transfer.lock"
UPLOAD_SECONDS = 30.0  # between two looks at the copy
WAIT_SECONDS = 10.0  # for another transfer, until a message says so
_THREADS = 8


def check_bucket_url(url: str) -> str:
    """Returns the URL. Raises `ValueError` if it is none of a folder in a bucket."""
    if not URL.fullmatch(url):
        expected = "gs://BUCKET/FOLDER, with letters, digits and any of . _ @ + = ~ % - in each name"
        raise ValueError(f"expected {expected}. Mount other stores as a folder")
    return url


class BucketFolder:
    """A folder in a bucket and its copy `local` on this machine. Each process has a copy of its own."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` if the URL is none of a folder in a bucket."""
        try:
            self.url = check_bucket_url(url).rstrip("/")
        except ValueError as error:
            raise UserError(f"{url}: {error}.") from None
        process = 0 if is_primary_process() else jax.process_index()
        name = f"{self.url.rsplit('/')[-1]}-{digest_text(self.url)[:12]}"
        self.local = cache_folder("buckets") / name / f"process-{process}"
        display_as(self.local, self.url)
        self._is_needed: Callable[[str], bool] = lambda _: True  # of names of files

    def checkpoints(self, stage: str) -> epath.Path:
        """Returns the folder of the checkpoints of a stage, in the bucket."""
        return epath.Path(f"{self.url}/{stage}/{CHECKPOINTS}")

    def names(self) -> list[str]:
        """Returns the names of the files in the bucket, without checkpoints."""
        with reaching_bucket(self.url):
            return list(self._list())

    def download(self, is_needed: Callable[[str], bool] = lambda _: True) -> None:
        """Makes the copy like the folder in the bucket. `is_needed` may leave files out by their names.

        In process 0, files that only changed on this machine stay. If a run on this machine is writing to the copy, the
        copy is the newer one. Then this does nothing. Raises `UserError` if the bucket cannot be read.
        """
        self._is_needed = is_needed
        with self._transferring():
            try:
                with lock_folder(self.local, "XDG_CACHE_HOME"):
                    pass
            except FolderInUseError:
                return
            self._download()

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[None]:
        """Locks the copy for a run, see `lock_folder`, and uploads what changes there.

        Uploads run every 30 seconds in the background, and at the end of the `with` block. Raises `RunError` if the one
        at the end fails.
        """
        with lock_folder(self.local, key):
            with self._transferring():  # something may have changed since the first download
                self._download()
            stop = threading.Event()
            thread = threading.Thread(target=self._upload_repeatedly, args=(stop,), daemon=True)
            thread.start()
            try:
                yield
            except BaseException:
                try:
                    self.upload()
                except (RunError, UserError, OSError) as error:
                    log_warning(str(error))  # another error is on its way
                raise
            else:
                self.upload()
            finally:
                stop.set()
                thread.join()

    def upload(self) -> None:
        """Copies what changed to the bucket. Only process 0 does. Raises `RunError` if that fails."""
        if not is_primary_process():
            return
        with self._transferring(), reaching_bucket(self.url, RunError):
            state = self._read_state()
            versions = _local_versions(self.local)
            changed = [name for name, version in versions.items() if name not in state or state[name][1] != version]
            self._transfer(changed, state, lambda name: self._upload_file(name, versions[name]))

    def remove(self, folder: Path) -> None:
        """Removes what the bucket has of a folder of the copy, which has another name now. Only process 0 calls it."""
        prefix = f"{folder.relative_to(self.local).as_posix()}/"
        with self._transferring(), reaching_bucket(self.url, RunError):
            state, names = self._read_state(), [name for name in self._list() if name.startswith(prefix)]
            for name in names:
                bucket_client().rm_file(f"{self.url}/{name}")
                state.pop(name, None)
            self._write_state(state)

    def share(self) -> None:
        """Uploads what process 0 has written, and downloads it in all other processes. All must call it."""
        self.upload()
        barrier("the files are in the bucket")
        if not is_primary_process():
            with self._transferring():
                self._download()
        barrier("all processes have the files of the bucket")

    def _download(self) -> None:
        keeps_changes = is_primary_process()
        with reaching_bucket(self.url):
            state, remote = self._read_state(), self._list()
            local = _local_versions(self.local)
            for name in local.keys() - remote.keys():
                if name in state or not keeps_changes:  # removed in the bucket
                    self._remove(name)
            state = {name: state[name] for name in state.keys() & remote.keys()}
            changed = [
                name for name, info in remote.items()
                if self._is_needed(name)
                and (name not in local or name not in state or state[name][0] != info["generation"]
                     or (state[name][1] != local[name] and not keeps_changes))
            ]  # fmt: skip
            self._write_state(state)  # without what was removed
            self._transfer(changed, state, lambda name: self._download_file(name, remote[name]))
        if changed:
            log_info(f"{self.url}: {len(changed)} files were copied to this machine")

    def _transfer(
        self, names: Sequence[str], state: dict[str, list[Any]], transfer: Callable[[str], list[Any] | None]
    ) -> None:
        """Transfers files in several threads. After each of them, the state is on the disk."""
        lock = threading.Lock()

        def transfer_and_note(name: str) -> None:
            entry = transfer(name)
            note_progress()
            with lock:
                if entry is not None:
                    state[name] = entry
                    self._write_state(state)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(transfer_and_note, names))

    def _download_file(self, name: str, info: Mapping[str, Any]) -> list[Any]:
        """Copies a file from the bucket, unless the same is there. Returns its entry in the state."""
        path, url = self.local / name, f"{self.url}/{name}"
        if not (path.is_file() and path.stat().st_size == info["size"] and md5_of(path) == bucket_file_md5(url, info)):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            bucket_client().get_file(url, str(partial))
            sync_to_disk(partial)
            partial.replace(path)
        return [info["generation"], _version(path)]

    def _upload_file(self, name: str, version: list[int]) -> list[Any] | None:
        """Copies a file to the bucket. Returns its entry in the state, or None if it was removed in the meantime."""
        path, url = self.local / name, f"{self.url}/{name}"
        snapshot = path.with_name(f".{path.name}.upload")
        try:
            # Lines are being added to a log, so a copy of it is uploaded.
            source = shutil.copyfile(path, snapshot) if path.suffix == ".jsonl" else path
            bucket_client().put_file(str(source), url)
            return [bucket_client().info(url)["generation"], version]
        except FileNotFoundError:
            if path.exists():  # the store answered that something is missing
                raise
            return None
        finally:
            snapshot.unlink(missing_ok=True)

    def _upload_repeatedly(self, stop: threading.Event) -> None:
        has_failed = False
        while not stop.wait(UPLOAD_SECONDS):
            try:
                self.upload()
                has_failed = False
            except Exception as error:
                if not has_failed:  # a message counts as progress of the run, which may hang
                    log_warning(f"{error} It is tried again every {UPLOAD_SECONDS:.0f} seconds.")
                has_failed = True

    def _remove(self, name: str) -> None:
        """Removes a file of the copy, and the folders that are empty then."""
        path = self.local / name
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a folder that is not empty
            for folder in list(path.parents)[: len(path.relative_to(self.local).parents) - 1]:
                folder.rmdir()

    @contextlib.contextmanager
    def _transferring(self) -> Iterator[None]:
        """Waits until no other command and no other thread transfers files of this copy."""
        self.local.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.local / TRANSFER_LOCK, thread_local=False)
        try:
            lock.acquire(timeout=WAIT_SECONDS)
        except filelock.Timeout:
            log_info(f"{self.url}: another command copies files. Waiting for it.")
            lock.acquire()
        except NotImplementedError:
            problem = f"XDG_CACHE_HOME: {cache_folder('buckets')} cannot be locked"
            raise UserError(f"{problem}. Set XDG_CACHE_HOME to another folder.") from None
        try:
            yield
        finally:
            lock.release()

    def _list(self) -> dict[str, dict[str, Any]]:
        files = list_bucket_files(epath.Path(self.url))
        return {name: info for name, info in files.items() if is_copied(name)}

    def _read_state(self) -> dict[str, list[Any]]:
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self.local / STATE_FILE).read_text(encoding="utf-8"))
            if isinstance(state, dict):
                return state
        return {}

    def _write_state(self, state: Mapping[str, list[Any]]) -> None:
        partial = self.local / f"{STATE_FILE}.partial"
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(self.local / STATE_FILE)


def is_copied(name: str) -> bool:
    """Returns whether a file is copied. Names such as `../a` and `/a` may lie in a bucket, but not below the copy."""
    *folders, last = name.split("/")
    if any(folder.startswith(DAMAGED_MODEL) for folder in folders):
        return False
    return CHECKPOINTS not in folders and all(part and not part.startswith(".") for part in (*folders, last))


def _version(path: Path) -> list[int]:
    """Returns numbers that change when a file of the copy does."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _local_versions(folder: Path) -> dict[str, list[int]]:
    versions: dict[str, list[int]] = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent) / name for name in names):
            name = path.relative_to(folder).as_posix()
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                if is_copied(name) and path.is_file():
                    versions[name] = _version(path)
    return versions
