"""Saves and restores the train state. Only this file imports orbax.

A checkpoint holds two items, `model` and `training` (optimizer state and step). Each is a flat mapping from the path of
a parameter to its array. The step itself is the position in the data, see `BatchPlan`.
"""

import contextlib
import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import absl.logging
import jax
import orbax.checkpoint as ocp
import pydantic

from thinkpo_jax.models.weight_mapping import flatten_by_name
from thinkpo_jax.runtime.config import ConfigSection, RunError, UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.processes import broadcast_from_primary, is_distributed
from thinkpo_jax.training.train_step import TrainState

TreeT = TypeVar("TreeT")
ITEMS = ("model", "training")
ITEM_FILES = ("_METADATA", "manifest.ocdbt")  # without one of them, Orbax cannot read an item
# Orbax and TensorStore read any other path wrongly: as a pattern (`[`), as two folders (`\\`) or as a URL (/gs/).
PLAIN_PATH = re.compile(r"(?!/(gs|s3|az|hf)/)[\w/ .,@+=~%#-]+")


class CheckpointConfig(ConfigSection):
    """Saves every `every` updates and at the end of the stage, and keeps the last `keep` checkpoints."""

    every: int = pydantic.Field(default=100, ge=1)
    keep: int = pydantic.Field(default=1, ge=1)


class CheckpointStore:
    """The checkpoints of one stage in `folder`."""

    def __init__(self, folder: Path, *, keep: int = 1, read_only: bool = False) -> None:
        """With `read_only` it does not touch what a running training writes."""
        self.folder = folder
        self._unchecked_step: int | None = None  # is being written, or was written and not checked yet
        self._cleanup = contextlib.ExitStack()
        self._path = folder.absolute()
        if not PLAIN_PATH.fullmatch(str(self._path)):
            self._path = self._cleanup.enter_context(_plain_link(self._path, make=not read_only))
        _let_one_replica_write()
        if read_only:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None, cleanup_tmp_directories=False, read_only=True, create=False, save_interval_steps=0
            )
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        with _without_warnings() if read_only else contextlib.nullcontext():  # Orbax warns that it only reads
            self._manager = ocp.CheckpointManager(self._path, options=options)

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Waits for a save in the background and checks it. Raises `RunError` if it is not complete."""
        try:
            with self._cleanup, self._naming_unwritten(self._unchecked_step):
                self._manager.close()
                self._check_complete(all_processes=kind is None)
        except RunError as error:
            if kind is None:
                raise
            log_warning(str(error))  # another error is already on its way

    def latest_step(self) -> int | None:
        """Returns the last step that was saved completely, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps that are saved, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, step: int) -> None:
        """Saves the state after `step` updates, unless that step is saved already.

        Returns once the state is copied to the host, and writes the files in the background. It first waits for a save
        that is still being written, and checks that its files are there. Raises `RunError` if a state cannot be saved.
        """
        if step in self._manager.all_steps():
            return
        with self._naming_unwritten(self._unchecked_step):
            self._manager.wait_until_finished()
            self._check_complete(all_processes=True)
        items = dict(zip(ITEMS, (state.model, (state.optimizer, state.step)), strict=True))
        args = {name: ocp.args.StandardSave(flatten_by_name(item, "/")) for name, item in items.items()}
        with self._naming_unwritten(step):
            self._manager.save(step, args=ocp.args.Composite(**args))
            self._unchecked_step = step

    @contextlib.contextmanager
    def _naming_unwritten(self, step: int | None) -> Iterator[None]:
        """Turns an error of Orbax into a `RunError` that names the checkpoint."""
        try:
            yield
        except RunError:
            raise
        except (ValueError, RuntimeError) as error:  # the message of an OSError is clear already
            _raise_if_process_died(error)
            raise RunError(f"{self.folder}: checkpoint {step} cannot be written: {self._reason(error)}") from None

    def _check_complete(self, *, all_processes: bool) -> None:
        """Raises `RunError` if a file of the last save is missing. Process 0 looks, and may decide for all."""
        step, self._unchecked_step = self._unchecked_step, None
        if step is None:
            return
        paths = [Path(str(step), item, name) for item in ITEMS for name in ITEM_FILES]
        missing = [str(path) for path in paths if not (self.folder / path).is_file()]
        is_complete = broadcast_from_primary(not missing) if all_processes else not missing
        if not is_complete:
            raise RunError(
                f"{self.folder}: the checkpoint of update {step} is not complete: {', '.join(missing) or 'files'} "
                f"missing. Check the disk, and remove {self.folder / str(step)}. Then rerun the same command. Training "
                "resumes from an earlier checkpoint or from the start."
            )

    def restore(self, like: TrainState) -> TrainState:
        """Returns the latest state, sharded like `like`. Raises `UserError` if there is none, or it cannot be read."""
        model = self.restore_model(like.model)
        return TrainState(model, *self._restore("training", (like.optimizer, like.step)))

    def restore_model(self, like: TreeT, step: int | None = None) -> TreeT:
        """Returns only the model of `step` (default: the latest). `like` may be abstract. Raises like `restore`."""
        return self._restore("model", like, step)

    def _restore(self, item: str, like: TreeT, step: int | None = None) -> TreeT:
        steps = sorted(self._manager.all_steps())
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" {step}"
            raise UserError(f"{self.folder}: there is no checkpoint{wanted}. There are: {steps}.")
        step = steps[-1] if step is None else step
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, flatten_by_name(like, "/"))
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(targets)}))
        except Exception as error:  # for damaged files Orbax and TensorStore raise errors of many types
            _raise_if_process_died(error)
            raise UserError(
                f"{self.folder / str(step)}: the checkpoint cannot be read: {self._reason(error)} If its files are "
                "damaged, move that folder away. Training then resumes from an earlier checkpoint or from the start."
            ) from None
        return jax.tree.unflatten(jax.tree.structure(like), list(restored[item].values()))

    def _reason(self, error: Exception) -> str:
        """Returns the first line of an error, with the name of the folder as the user knows it."""
        line = (str(error).splitlines() or [type(error).__name__])[0]
        return line.replace(str(self._path), str(self.folder))


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
def _let_one_replica_write() -> None:
    """Lets one replica write an array, in this whole process. Otherwise the first save compiles slices of arrays."""
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    with _without_warnings():  # about the override
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def _raise_if_process_died(error: Exception) -> None:
    if is_distributed() and isinstance(error, jax.errors.JaxRuntimeError):
        raise error
