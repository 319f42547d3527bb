"""Saves and restores the train state. Only this file imports orbax.

A checkpoint holds two items, `model` and `training` (optimizer state and step). Each is a flat mapping from the path of
a parameter to its array. The step itself is the position in the data, see `BatchPlan`.
"""

import functools
from pathlib import Path
from typing import TypeVar

import absl.logging
import jax
import orbax.checkpoint as ocp
import pydantic

from thinkpo_jax.models.weight_mapping import flatten_by_name
from thinkpo_jax.runtime.config import ConfigSection, RunError, UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.processes import is_distributed
from thinkpo_jax.training.train_step import TrainState

TreeT = TypeVar("TreeT")


class CheckpointConfig(ConfigSection):
    """Saves every `every` updates and at the end of the stage, and keeps the last `keep` checkpoints."""

    every: int = pydantic.Field(default=100, ge=1)
    keep: int = pydantic.Field(default=1, ge=1)


class CheckpointStore:
    """The checkpoints of one stage in `folder`."""

    def __init__(self, folder: Path, *, keep: int = 1, read_only: bool = False) -> None:
        """With `read_only` it does not touch what a running training writes."""
        absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns about options that it sets itself for readers
        _let_one_replica_write()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, cleanup_tmp_directories=not read_only, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self.folder = folder

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._manager.close()  # waits for a save in the background
        except (ValueError, RuntimeError) as error:
            problem = f"{self.folder}: the last checkpoint cannot be written: {_first_line(error)}"
            if kind is None:
                raise RunError(problem) from None
            log_warning(problem)  # another error is already on its way

    def latest_step(self) -> int | None:
        """Returns the last step that was saved completely, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        """Saves the state after `step` updates, unless that step is saved already.

        Returns once the state is copied to the host, and writes the files in the background. It first waits for a save
        that is still being written. Raises `RunError` if the state cannot be saved.
        """
        if step not in self._manager.all_steps():
            items = {"model": state.model, "training": (state.optimizer, state.step)}
            args = {name: ocp.args.StandardSave(flatten_by_name(item, "/")) for name, item in items.items()}
            try:
                self._manager.save(step, args=ocp.args.Composite(**args))
            except (ValueError, RuntimeError) as error:  # the message of an OSError is clear already
                _raise_if_process_died(error)
                raise RunError(f"{self.folder}: checkpoint {step} cannot be written: {_first_line(error)}") from None

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
                f"{self.folder / str(step)}: the checkpoint cannot be read: {_first_line(error)} If its files are "
                "damaged, move that folder away. Training then resumes from an earlier checkpoint or from the start."
            ) from None
        return jax.tree.unflatten(jax.tree.structure(like), list(restored[item].values()))


@functools.cache
def _let_one_replica_write() -> None:
    """Lets one replica write an array, in this whole process. Otherwise the first save compiles slices of arrays."""
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def _raise_if_process_died(error: Exception) -> None:
    if is_distributed() and isinstance(error, jax.errors.JaxRuntimeError):
        raise error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
