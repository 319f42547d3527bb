"""How do others load what we trained? A checkpoint of a run as a Hugging Face folder.

Example: python -m thinkpo_jax.export --run runs/quickstart --stage thinkpo --out thinkpo-model
"""

from pathlib import Path
from typing import Literal

from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.models.weight_saving import save_model, temporary_folder
from thinkpo_jax.run.run_folder import Run, read_json_record
from thinkpo_jax.run.stage_output import model_card
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.sharding import abstract_with_shardings
from thinkpo_jax.training.checkpoints import CheckpointStore


def export(run: Run, stage: str, *, step: int | None, out: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """Writes the checkpoint `step` (default: the latest) of a stage to `out`. Raises `UserError`."""
    if out.exists():
        raise UserError(f"{out} exists already. Choose another folder with --out.")
    if temporary_folder(out).exists():
        raise UserError(
            f"{temporary_folder(out)}: left by an export that was stopped. Remove it, or choose another --out."
        )
    if stage not in run.model_names()[1:]:
        raise UserError(f"{run.folder}: there is no stage {stage!r}; stages of the run: {run.model_names()[1:]}.")
    folder = run.folder / stage / "checkpoints"
    if not folder.is_dir():
        raise UserError(
            f"{run.folder}: stage {stage!r} has no checkpoints; stages of the run: {run.model_names()[1:]}."
        )
    abstract = abstract_model(read_architecture(run.start_folder), run.config.compute)
    with CheckpointStore(folder, read_only=True) as checkpoints:
        chosen = (checkpoints.latest_step() or 0) if step is None else step
        model = checkpoints.restore_model(abstract_with_shardings(abstract, run.mesh), chosen)
    record = read_json_record(run.folder / stage / "stage.json", "summary")
    notes = record["summary"]["notes"] if record and record["summary"] else ["the stage is not finished"]
    card = model_card(run, stage, step=chosen, notes=notes)
    try:
        save_model(
            model,
            out,
            template_folder=run.start_folder,
            dtype=dtype,
            stop_token_ids=run.chat.stop_token_ids,
            model_card=card,
        )
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error}.") from None
    log_info(f"{out}: stage {stage}, update {chosen}, {dtype}")


def has_checkpoint(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with CheckpointStore(folder, read_only=True) as checkpoints:
        return checkpoints.latest_step() is not None
