"""Saves and restores the train state. Only this file imports orbax.

A checkpoint holds two items, `model` and `training` (optimizer state and step). Each is a flat mapping from the path of
a parameter to its array. The step itself is the position in the data, see `BatchPlan`.

Each item has a manifest with the digests of its files. Orbax does not notice a changed byte in its files. A checkpoint
without its manifests, or with other files, is damaged and never restored.
"""

import contextlib
import errno
import functools
import logging
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import absl.logging
import jax
import orbax.checkpoint as ocp
import pydantic
from etils import epath

from thinkpo_jax.models.weight_mapping import flatten_by_name
from thinkpo_jax.runtime.bucket_files import bucket_client, is_in_bucket, reaching_bucket
from thinkpo_jax.runtime.config import ConfigSection, RunError, UserError, first_line
from thinkpo_jax.runtime.console import log_warning, read_shared_metrics
from thinkpo_jax.runtime.manifest import write_bucket_manifest, write_manifest
from thinkpo_jax.runtime.paths import AnyPath
from thinkpo_jax.runtime.processes import barrier, broadcast_from_primary, is_distributed, is_primary_process
from thinkpo_jax.training.damaged_checkpoints import ITEMS, find_checkpoint_damage, set_damaged_aside
from thinkpo_jax.training.train_step import TrainState

TreeT = TypeVar("TreeT")
LOWER_IS_BETTER = ("loss", "nll/chosen")  # metrics of the validation. Of others, the highest value is the best.
ITEM_FILES = ("_METADATA", "manifest.ocdbt")  # without one of them, Orbax cannot read an item
# Orbax and TensorStore read any other path wrongly: as a pattern (`[`), as two folders (`\\`) or as a URL (/gs/).
PLAIN_PATH = re.compile(r"(?!/(gs|s3|az|hf)/)[\w/ .,@+=~%#-]+")


class CheckpointConfig(ConfigSection):
    """Saves every `every` updates, every `every_minutes`, before each validation and probe, and at the end.

    The newest `keep` checkpoints stay. `keep_best` names a metric of the validation. The checkpoint with its best value
    stays too: with the lowest value of `loss` or `nll/chosen`, or the highest of any other metric.
    """

    every: int = pydantic.Field(default=100, ge=1)
    every_minutes: float | None = pydantic.Field(default=None, gt=0)
    keep: int = pydantic.Field(default=2, ge=1)
    keep_best: str | None = None


class DiskFullError(RunError):
    """A checkpoint does not fit on the disk."""


class CheckpointStore:
    """The checkpoints of one stage in `folder`."""

    def __init__(
        self,
        folder: AnyPath,
        *,
        keep: int = 2,
        keep_best: str | None = None,
        every_minutes: float | None = None,
        read_only: bool = False,
    ) -> None:
        """Renames damaged checkpoints that are newer than the newest good one, with a warning.

        With `read_only` it does not touch what a running training writes.
        """
        self.folder = folder
        self._unsettled_step: int | None = None  # is being written, or was written and may have failed
        self._failure: DiskFullError | None = None
        self._best_metric, self._validations = keep_best, dict[int, float]()  # values of this metric by step
        self._interval_seconds = math.inf if every_minutes is None else 60 * every_minutes
        self._deadline = time.monotonic() + self._interval_seconds
        self._cleanup = contextlib.ExitStack()
        if is_in_bucket(folder):
            with reaching_bucket(folder):
                bucket_client()  # sets what the client of Orbax must not do
        self._path = folder if is_in_bucket(folder) else Path(folder).absolute()
        if isinstance(self._path, Path) and not PLAIN_PATH.fullmatch(str(self._path)):
            self._path = self._cleanup.enter_context(_plain_link(self._path, make=not read_only))
        _configure_orbax()
        if read_only:
            self._options = ocp.CheckpointManagerOptions(
                max_to_keep=None, cleanup_tmp_directories=False, read_only=True, create=False, save_interval_steps=0
            )
        else:
            if is_primary_process():
                with reaching_bucket(folder):
                    set_damaged_aside(folder)
            barrier("damaged checkpoints have other names")
            policies = [ocp.checkpoint_managers.LatestN(keep), _KeepStep(self.best_step)]
            self._options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            )
        self._manager = self._open_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ITEMS:
            handler = _ItemHandler()
            handlers.add(item, ocp.args.StandardSave, handler)
            handlers.add(item, ocp.args.StandardRestore, handler)
        quiet = _without_warnings() if self._options.read_only else contextlib.nullcontext()  # that it only reads
        with reaching_bucket(self.folder), quiet:
            return ocp.CheckpointManager(self._path, handler_registry=handlers, options=self._options)

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: object, raised: object, _: object) -> None:
        """Waits for a save in the background. Raises `RunError` if it failed."""
        if isinstance(raised, RunError) and self._manager.is_saving_in_progress():  # for long without a network
            log_warning(f"{raised} Waiting for checkpoint {self._unsettled_step}, which is being written.")
        try:
            with self._cleanup, self._naming_unwritten(self._unsettled_step):
                self._manager.close()
        except RunError as error:
            if kind is None:
                raise
            log_warning(str(error))  # another error is already on its way

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in ascending order. They may be damaged."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the last step with a good checkpoint, or None. Logs a warning for each newer one that is damaged."""
        latest = None
        for step in reversed(self.steps() if is_primary_process() else []):
            with reaching_bucket(self.folder):
                damage = find_checkpoint_damage(self.folder / str(step))
            if not damage:
                latest = step
                break
            log_warning(f"{self.folder / str(step)}: {damage}. This checkpoint is not used.")
        latest = broadcast_from_primary(-1 if latest is None else latest)
        return None if latest < 0 else latest

    def add_validation(self, line: Mapping[str, float]) -> None:
        """Takes the metrics of the validation after update `step`, from which the best checkpoint follows.

        Raises `UserError` if the metric of `keep_best` is not among them.
        """
        if self._best_metric is None:
            return
        if self._best_metric not in line:
            names = ", ".join(sorted(line.keys() - {"step"}))
            raise UserError(f"checkpoint.keep_best: the validation has no {self._best_metric!r}. It has: {names}.")
        if math.isfinite(value := line[self._best_metric]):
            self._validations[int(line["step"])] = value

    def read_validations(self, path: Path, *, last: int) -> None:
        """Takes the metrics up to update `last` from the validation's file. Process 0 reads for all."""
        names = [self._best_metric] if self._best_metric is not None else []
        for line in read_shared_metrics(path, names, last=last):
            if line.keys() >= set(names):
                self.add_validation(line)

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint with the best validation, or None if there is no such checkpoint."""
        choose = min if self._best_metric in LOWER_IS_BETTER else max
        steps = [step for step in self.steps() if step in self._validations]
        return choose(steps, key=self._validations.__getitem__, default=None)

    def notes(self) -> tuple[str, ...]:
        """Returns a note of the best checkpoint, if one is kept."""
        if (step := self.best_step()) is None:
            return ()
        value = f"{self._validations[step]:.4g}"
        return (f"best {self._best_metric} of the validation: {value} after update {step}, whose checkpoint is kept",)

    def save(self, state: TrainState, step: int, *, wait: bool = False) -> None:
        """Saves the state after `step` updates, unless that step is saved already.

        Returns once the state is copied to the host, and writes the files in the background, unless it shall `wait`. It
        first waits for a save that is still being written. If the disk is full, it removes the partial checkpoint and
        all but the newest checkpoint, and tries once more. Raises `RunError` if a state cannot be saved.
        """
        self._deadline = time.monotonic() + self._interval_seconds
        try:
            self._settle()
            self._begin_save(state, step)
            if wait:
                self._settle()
        except DiskFullError:
            if is_distributed():
                raise
            self._make_room()
            self._begin_save(state, step)
            self._settle()

    def is_time(self) -> bool:
        """Returns true once when `every_minutes` have passed since the last save, by the clock of process 0."""
        is_time = is_primary_process() and time.monotonic() > self._deadline
        if is_time:
            self._deadline = math.inf
        return is_time

    def must_retry(self) -> bool:
        """Returns whether a save in the background failed because the disk is full. `save` then makes room.

        Raises `RunError` if it failed for another reason, or if there are several processes.
        """
        if self._unsettled_step is None or self._manager.is_saving_in_progress():
            return False
        try:
            self._settle()
        except DiskFullError as error:
            if is_distributed():
                raise
            self._failure = error
        return self._failure is not None

    def _begin_save(self, state: TrainState, step: int) -> None:
        if step in self.steps():
            return
        items = dict(zip(ITEMS, (state.model, (state.optimizer, state.step)), strict=True))
        args = {name: ocp.args.StandardSave(flatten_by_name(item, "/")) for name, item in items.items()}
        with self._naming_unwritten(step):
            self._manager.save(step, args=ocp.args.Composite(**args))
        self._unsettled_step = step

    def _settle(self) -> None:
        """Waits for the save in the background. Raises `RunError` if it failed."""
        step, self._unsettled_step = self._unsettled_step, None
        with self._naming_unwritten(step):
            self._manager.wait_until_finished()
        if self._failure is not None:
            raise self._failure

    def _make_room(self) -> None:
        """Removes what a failed save left, and all checkpoints but the newest."""
        log_warning(
            f"{self.folder}: the disk is full. All checkpoints but the newest are removed, and the state is saved once "
            "more."
        )
        self._failure = None
        with contextlib.suppress(Exception):  # the error that is known already
            self._manager.close()
        self._manager = self._open_manager()  # reads the folder again, and removes partial checkpoints
        newest = self.latest_step()
        for step in self.steps():
            if step != newest:
                self._manager.delete(step)

    @contextlib.contextmanager
    def _naming_unwritten(self, step: int | None) -> Iterator[None]:
        """Turns an error of Orbax into a `RunError` that names the checkpoint."""
        try:
            yield
        except RunError:
            raise
        except Exception as error:
            if not is_in_bucket(self._path) and not isinstance(error, OSError | ValueError | RuntimeError):
                raise
            _raise_if_process_died(error)
            if is_in_bucket(self._path) or not _is_disk_full(error):
                raise RunError(f"{self.folder}: checkpoint {step} cannot be written: {self._reason(error)}") from None
            free = shutil.disk_usage(self._path).free / 1e9
            raise DiskFullError(
                f"{self.folder}: checkpoint {step} cannot be written: the disk is full ({free:.2f} GB are free). Free "
                "some space and rerun the same command. Training resumes from the newest checkpoint."
            ) from None

    def restore(self, like: TrainState) -> TrainState:
        """Returns the latest good state, sharded like `like`.

        Raises `UserError` if there is none, or it cannot be read.
        """
        step = self.latest_step()
        model = self._restore("model", like.model, step)
        return TrainState(model, *self._restore("training", (like.optimizer, like.step), step))

    def restore_model(self, like: TreeT, step: int | None = None) -> TreeT:
        """Returns only the model of `step` (default: the latest good one). `like` may be abstract.

        Raises `UserError` if there is no such checkpoint, it is damaged, or it cannot be read.
        """
        if step is None:
            step = self.latest_step()
        elif step in self.steps() and (damage := find_checkpoint_damage(self.folder / str(step))):
            raise UserError(f"{self.folder / str(step)}: {damage}. Choose another one. There are: {self.steps()}.")
        return self._restore("model", like, step)

    def _restore(self, item: str, like: TreeT, step: int | None) -> TreeT:
        steps = self.steps()
        if step is None or step not in steps:
            wanted = " that can be used" if step is None else f" {step}"
            raise UserError(f"{self.folder}: there is no checkpoint{wanted}. There are: {steps}.")
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, flatten_by_name(like, "/"))
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(targets)}))
        except Exception as error:  # Orbax and TensorStore raise errors of many types
            _raise_if_process_died(error)
            problem = f"{self.folder / str(step)}: the checkpoint cannot be read: {self._reason(error)}"
            if is_in_bucket(self._path):  # its manifest says that it is good
                raise UserError(f"{problem} Check the network and rerun the same command.") from None
            advice = "Training then resumes from an earlier checkpoint or from the start."
            raise UserError(f"{problem} Move that folder away. {advice}") from None
        return jax.tree.unflatten(jax.tree.structure(like), list(restored[item].values()))

    def _reason(self, error: Exception) -> str:
        """Returns the first line of an error, with the name of the folder as the user knows it."""
        return first_line(error).replace(str(self._path), str(self.folder))


class _KeepStep(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps one checkpoint, whose step a function returns."""

    def __init__(self, step: Callable[[], int | None]) -> None:
        self._step = step

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,  # noqa: ARG002 -- Orbax passes it
    ) -> Sequence[bool]:
        step = self._step()
        return [checkpoint.step == step for checkpoint in checkpoints]


class _ItemHandler(ocp.StandardCheckpointHandler):
    """Writes the manifest of an item once its files are complete, before the checkpoint gets its final name."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        if missing := [name for name in ITEM_FILES if not (directory / name).is_file()]:
            raise ValueError(f"{', '.join(missing)} of {directory.name.split('.')[0]} missing. Check the disk.")
        if is_in_bucket(directory):
            write_bucket_manifest(directory)
        else:
            write_manifest(folder := Path(directory), [path for path in folder.rglob("*") if path.is_file()])


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # TensorStore writes the error of the system into its own message. JAX has errors for devices without memory.
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    return not is_of_jax and any(text in str(error) for text in ("No space left", "quota exceeded"))


@contextlib.contextmanager
def _plain_link(folder: Path, *, make: bool) -> Iterator[Path]:
    """Yields a temporary link to a folder, whose own path has only characters that Orbax reads as they are."""
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="thinkpo_jax-") as parent:
        link = Path(parent) / "checkpoints"
        if not PLAIN_PATH.fullmatch(str(link)):
            problem = f"TMPDIR: the temporary folder {parent} and {folder} both have special characters"
            raise UserError(f"{problem}. Set TMPDIR to a folder with letters, digits, `-` and `_` only.")
        link.symlink_to(folder, target_is_directory=True)
        yield link


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides warnings of Orbax about what this file asks it to do. Other warnings may mean a loss of data."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)


@functools.cache
def _configure_orbax() -> None:
    """Configures Orbax for this whole process.

    One replica writes an array. Otherwise the first save compiles slices of arrays. Orbax logs the traceback of each
    error that it raises. They are left out, because `CheckpointStore` reports the errors.
    """
    absl.logging.get_absl_logger().addFilter(_has_no_traceback_of_orbax)
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    with _without_warnings():  # about the override
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def _has_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


def _raise_if_process_died(error: Exception) -> None:
    if is_distributed() and isinstance(error, jax.errors.JaxRuntimeError):
        raise error
