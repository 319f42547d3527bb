"""The folder of a run: its lock, its resolved configuration and the records of its stages."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinkpo_jax.run.agreement import is_same_on_all_processes
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.bucket import MODEL, BucketFolder
from thinkpo_jax.runtime.bucket_files import is_in_bucket
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.files import (
    StageFolder,
    lock_folder,
    read_json_record,
    software_versions,
    write_atomically,
    write_json_record,
)
from thinkpo_jax.runtime.processes import any_process, barrier
from thinkpo_jax.runtime.yaml_text import dump_yaml

VERSIONS_HEADER = "# thinkpo_jax: "  # how each config.yaml of a run begins
STAGE_FORMAT = 3  # raised when older stage records or checkpoints cannot be resumed. 1 had no number.


@dataclass(frozen=True)
class StageRecord:
    """What a stage was begun with. `summary` is None until the stage is finished."""

    settings: Mapping[str, Any]  # everything but the data that determines the weights
    data_digest: str
    summary: Mapping[str, Any] | None = None


class RunFolder:
    """Paths and records of a run folder."""

    def __init__(self, path: Path, bucket: BucketFolder | None = None) -> None:
        self.path = path
        self.bucket = bucket  # of which `path` is the copy
        self.config = path / "config.yaml"  # the resolved configuration
        self.report = path / "report.json"

    @classmethod
    def open(cls, path: str, *, with_models: bool = True) -> "RunFolder":
        """Returns the folder of a run. If it is in a bucket, its files are copied here, see `BucketFolder.download`.

        Raises `UserError` if the bucket cannot be read, or the folder there is not that of a run.
        """
        if not is_in_bucket(path):
            return cls(Path(path))
        bucket = BucketFolder(path)
        names = bucket.names()
        if names and not any(name == "config.yaml" or name.endswith("/stage.json") for name in names):
            raise UserError(f"{path}: has files, but it is not the folder of a run. Choose another one.")
        bucket.download(lambda name: with_models or MODEL not in name.split("/"))
        return cls(bucket.local, bucket)

    def stage(self, name: str) -> StageFolder:
        """Returns the folder of a stage."""
        if self.bucket is None:
            return StageFolder(self.path / name)
        return StageFolder(self.path / name, checkpoints=self.bucket.checkpoints(name), upload=self.bucket.upload)

    def share(self) -> None:
        """Gives all processes the files that process 0 has written. All must call it. A folder on a disk is shared."""
        if self.bucket is not None:
            self.bucket.share()

    def answers(self, model: str) -> Path:
        """Returns the folder of a model's answers, one JSON file for each benchmark."""
        return self.path / "evaluation" / model

    def check_owned(self, names: Iterable[str]) -> None:
        """Raises `UserError` if the folder has one of the files or folders that a run writes, and no run wrote it.

        `names` are those of the files. A run writes config.yaml first. If that was removed, stage.json shows the run.
        """
        try:
            is_run = self.config.read_text(encoding="utf-8").startswith(VERSIONS_HEADER)
        except FileNotFoundError:
            is_run = any(self.path.glob("*/stage.json"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"run_dir: {self.config} cannot be read: {error}. Choose another run_dir.") from None
        if not is_run and (taken := sorted(name for name in names if (self.path / name).exists())):
            raise UserError(
                f"run_dir: {self.path} has {', '.join(taken)}, which a run would overwrite and no run has written. "
                "Choose another run_dir, such as a new folder."
            )

    def read_stage_record(self, name: str) -> StageRecord | None:
        """Returns the record of a stage, or None if the stage was never begun.

        Raises `UserError` if the record is damaged, or another version of thinkpo_jax wrote it.
        """
        path = self.stage(name).record
        remedy = f"Choose another run_dir, or remove {path.parent} to train the stage again."
        keys = ("settings", "data_digest", "summary")
        record = read_json_record(path, *keys, record_format=STAGE_FORMAT, remedy=remedy)
        if record is None:
            return None
        return StageRecord(record["settings"], record["data_digest"], record["summary"])

    def write_stage_record(self, name: str, record: StageRecord) -> None:
        """Writes the record of a stage."""
        write_json_record(self.stage(name).record, {"format": STAGE_FORMAT, **asdict(record)})

    def has_model(self, name: str) -> bool:
        """Returns whether a stage has exported its model. Of a run in a bucket, it may not be copied here."""
        if self.bucket is None:
            return self.stage(name).model.is_dir()
        record = self.read_stage_record(name)
        return record is not None and record.summary is not None

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[None]:
        """Locks the folder, see `lock_folder`. What is written to the copy of a bucket is uploaded."""
        with lock_folder(self.path, key) if self.bucket is None else self.bucket.writing(key):
            yield

    @contextlib.contextmanager
    def locked(self, config: RunConfig, *, models: Sequence[str | None]) -> Iterator[None]:
        """Locks the folder for this run, checks that all processes have the same models, and writes config.yaml.

        Paths of models may differ among hosts. `models` are the identities of all models that are loaded. No process
        writes before all processes have read what is there. Raises `UserError` if another run holds the lock, a process
        has other models, or it does not see the folder of process 0.
        """
        with self.writing("run_dir"):
            is_same = is_same_on_all_processes(json.dumps(models))
            if any_process(not is_same):  # all processes stop before one of them writes
                which = "another process" if is_same else "this process"
                raise UserError(f"{which} reads other models than process 0. Give all processes the same files.")
            versions = "".join(f"# {name}: {version}\n" for name, version in software_versions().items())
            assert versions.startswith(VERSIONS_HEADER)
            write_atomically(self.config, (versions + dump_yaml(config.model_dump(mode="json"))).encode())
            barrier("the configuration is written")
            self.share()
            if not self.config.exists():
                raise UserError(
                    f"run_dir: {self.path} is not the folder of process 0. Name a folder that all hosts share."
                )
            yield
