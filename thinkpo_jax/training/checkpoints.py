"""What is saved, and how does it come back? The only file that imports orbax.

A checkpoint holds two items, `model` and `training` (optimizer state and step), each a flat mapping from the path of a
parameter to its array. The position in the data is the step itself (`packing.Batches`).
"""

from pathlib import Path
from typing import Any, TypeVar

import absl.logging
import jax
import orbax.checkpoint as ocp
import pydantic

from thinkpo_jax.runtime.config import ConfigSection, RunError, UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.processes import is_distributed
from thinkpo_jax.training.train_step import TrainState

TreeT = TypeVar("TreeT")


class CheckpointConfig(ConfigSection):
    """How often a stage is saved (in updates; always at its end) and how many checkpoints are kept."""

    every: int = pydantic.Field(default=100, ge=1)
    keep: int = pydantic.Field(default=1, ge=1)


class CheckpointStore:
    """The checkpoints of one stage, in `folder`."""

    def __init__(self, folder: Path, *, keep: int = 1, read_only: bool = False) -> None:
        """`read_only` leaves alone what a training beside it is writing."""
        absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns a reader of the options that readers have
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, cleanup_tmp_directories=not read_only, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self.folder = folder

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._manager.close()  # waits for the checkpoint that is being written
        except (ValueError, RuntimeError) as error:
            problem = f"{self.folder}: the last checkpoint cannot be written: {_first_line(error)}"
            if kind is None:
                raise RunError(problem) from None
            log_warning(problem)  # beside the error that is on its way

    def latest_step(self) -> int | None:
        """The last step that was saved whole; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, in the background; a step that is already saved is left alone."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            training = (state.optimizer, state.step)
            items = {
                "model": ocp.args.StandardSave(_flat(state.model)),
                "training": ocp.args.StandardSave(_flat(training)),
            }
            try:
                self._manager.save(step, args=ocp.args.Composite(**items))
            except (ValueError, RuntimeError) as error:  # OSError speaks for itself
                if is_distributed() and isinstance(error, jax.errors.JaxRuntimeError):
                    raise  # another process has gone
                raise RunError(f"{self.folder}: checkpoint {step} cannot be written: {_first_line(error)}") from None

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state of `step` (default: the latest), laid out like `like`."""
        model = self._restore("model", like.model, step)
        optimizer, count = self._restore("training", (like.optimizer, like.step), step)
        return TrainState(model, optimizer, count)

    def restore_model(self, like: TreeT, step: int | None = None) -> TreeT:
        """The parameters of `step` alone, laid out like `like`, which may be abstract (shapes with shardings)."""
        return self._restore("model", like, step)

    def _restore(self, item: str, like: TreeT, step: int | None) -> TreeT:
        steps = sorted(self._manager.all_steps())
        chosen = self.latest_step() if step is None else step
        if chosen not in steps:
            raise UserError(
                f"{self.folder}: there is no checkpoint {chosen if step is not None else ''}; there are: {steps}."
            )
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(like))
        try:
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(targets)})
            restored = self._manager.restore(chosen, args=args)
        except Exception as error:  # Orbax and TensorStore raise of many kinds over damaged files
            if is_distributed() and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process has gone
            raise UserError(
                f"{self.folder / str(chosen)}: the checkpoint cannot be read: {_first_line(error)} If its files are "
                "damaged, move that folder away to go on from an earlier checkpoint, or from the start of the stage."
            ) from None
        return jax.tree.unflatten(jax.tree.structure(like), list(restored[item].values()))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _flat(tree: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in paths}
