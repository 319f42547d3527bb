"""How do others load what we trained? A checkpoint of a run as a Hugging Face folder.

Example: python -m thinkpo_jax.export --run runs/quickstart --stage thinkpo --out thinkpo-model
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from thinkpo_jax.architecture import read_architecture
from thinkpo_jax.checkpoint import Checkpoints
from thinkpo_jax.commands import program
from thinkpo_jax.config import UserError
from thinkpo_jax.convert import abstract_model, partial_folder, save_model
from thinkpo_jax.log import say
from thinkpo_jax.run import Run, load_config, model_card, open_run, read_record
from thinkpo_jax.sharding import MeshConfig, laid_out


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


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and exports."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.export",
        description="Write a checkpoint of a run as a Hugging Face folder (config, tokenizer, safetensors).",
        epilog="example: python -m thinkpo_jax.export --run runs/quickstart --stage thinkpo --out thinkpo-model",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN_DIR", help="the folder of a run")
    parser.add_argument("--stage", metavar="NAME", help="which stage (default: the last one with a checkpoint)")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the latest)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the model goes; must not exist yet"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parsed = parser.parse_args(arguments)
    if not (parsed.run / "config.yaml").is_file():
        raise UserError(f"--run {parsed.run}: no config.yaml there. Give the folder of a run.")
    config = load_config(parsed.run / "config.yaml")
    # The training's mesh need not be one of this machine, its kernel is not used, and the folder may have been moved.
    compute = config.compute.model_copy(update={"attention": "blockwise"})
    run = open_run(config.model_copy(update={"mesh": MeshConfig(), "compute": compute, "run_dir": str(parsed.run)}))
    stages = [name for name in run.models()[1:] if _has_checkpoint(run.folder / name / "checkpoints")]
    if not stages:
        raise UserError(f"{parsed.run}: no stage has a checkpoint yet.")
    export(run, parsed.stage or stages[-1], step=parsed.step, out=parsed.out, dtype=parsed.dtype)


if __name__ == "__main__":
    program(main)
