"""Writes a checkpoint of a run as a Hugging Face folder."""

from pathlib import Path
from typing import Literal

from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.models.weight_saving import save_model, temporary_folder
from thinkpo_jax.run.resolve import ResolvedRun
from thinkpo_jax.run.stage_output import model_card
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.sharding import abstract_with_shardings
from thinkpo_jax.training.checkpoints import CheckpointStore


def export_checkpoint(
    run: ResolvedRun, name: str | None, *, step: int | None, out: Path, dtype: Literal["float32", "bfloat16"]
) -> None:
    """Writes a checkpoint of a stage to `out`.

    `name` is the stage, by default the last one with a checkpoint. `step` is the update, by default the latest. Raises
    `UserError` if there is no such checkpoint, or `out` cannot be written.
    """
    names = [stage.name for stage in run.config.stages]
    with_checkpoint = [each for each in names if _has_checkpoint(run.folder.stage(each).checkpoints)]
    if not with_checkpoint:
        raise UserError(f"{run.folder.path}: no stage has a checkpoint yet.")
    if out.exists():
        raise UserError(f"{out} exists already. Choose another folder with --out.")
    if (leftover := temporary_folder(out)).exists():
        raise UserError(f"{leftover} is left from an interrupted export. Remove it, or choose another --out.")
    name = name or with_checkpoint[-1]
    if name not in names:
        raise UserError(f"{run.folder.path}: there is no stage {name!r}. The run has the stages {names}.")
    stage, folder = run.config.stage(name), run.folder.stage(name).checkpoints
    if not folder.is_dir():
        raise UserError(f"{run.folder.path}: stage {name!r} has no checkpoints. These stages have: {with_checkpoint}.")
    abstract = abstract_with_shardings(abstract_model(run.model_source.architecture, run.config.compute), run.mesh)
    with CheckpointStore(folder, read_only=True) as checkpoints:
        step = (checkpoints.latest_step() or 0) if step is None else step
        model = checkpoints.restore_model(abstract, step)
    record = run.folder.read_stage_record(name)
    notes = record.summary["notes"] if record and record.summary else ["the stage is not finished"]
    try:
        save_model(
            model,
            out,
            template_folder=run.model_source.folder,
            dtype=dtype,
            stop_token_ids=run.model_source.tokenizer.stop_token_ids,
            model_card=model_card(run, stage, step=step, notes=notes),
        )
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}. Choose another folder.") from None
    log_info(f"{out}: stage {name}, update {step}, {dtype}")


def _has_checkpoint(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with CheckpointStore(folder, read_only=True) as checkpoints:
        return checkpoints.latest_step() is not None
