"""How do others load what we trained? A checkpoint of a run as a Hugging Face folder.

Example: python -m thinkpo_jax.export --run runs/quickstart --stage thinkpo --out thinkpo-model
"""

from pathlib import Path
from typing import Literal

from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.models.weight_saving import partial_folder, save_model
from thinkpo_jax.run.run_folder import Run, read_record
from thinkpo_jax.run.stage_output import model_card
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import say
from thinkpo_jax.runtime.sharding import laid_out
from thinkpo_jax.training.checkpoints import Checkpoints


def export(run: Run, stage: str, *, step: int | None, out: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """Writes the checkpoint `step` (default: the latest) of a stage to `out`. Raises `UserError`."""
    if out.exists():
        raise UserError(f"{out} exists already. Choose another folder with --out.")
    if partial_folder(out).exists():
        raise UserError(
            f"{partial_folder(out)}: left by an export that was stopped. Remove it, or choose another --out."
        )
    if stage not in run.models()[1:]:
        raise UserError(f"{run.folder}: there is no stage {stage!r}; stages of the run: {run.models()[1:]}.")
    folder = run.folder / stage / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run.folder}: stage {stage!r} has no checkpoints; stages of the run: {run.models()[1:]}.")
    abstract = abstract_model(read_architecture(run.start_folder), run.config.compute)
    with Checkpoints(folder, read_only=True) as checkpoints:
        chosen = (checkpoints.latest() or 0) if step is None else step
        model = checkpoints.restore_model(laid_out(abstract, run.mesh), chosen)
    record = read_record(run.folder / stage / "stage.json", "summary")
    notes = record["summary"]["notes"] if record and record["summary"] else ["the stage is not finished"]
    card = model_card(run, stage, step=chosen, notes=notes)
    try:
        save_model(model, out, like=run.start_folder, dtype=dtype, stops=run.chat.stop_ids, card=card)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error}.") from None
    say(f"{out}: stage {stage}, update {chosen}, {dtype}")


def _has_checkpoint(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.latest() is not None
