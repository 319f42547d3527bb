"""Exports a checkpoint of a run as a Hugging Face folder.

Example: python -m thinkpo_jax.export --run runs/quickstart --stage thinkpo --out thinkpo-model
"""

import argparse
from collections.abc import Sequence

from thinkpo_jax.run.resolve import resolve_run
from thinkpo_jax.run.run_config import load_run_config
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.run.stage_output import export_checkpoint
from thinkpo_jax.runtime.cli import run_and_exit
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.mesh import MeshConfig
from thinkpo_jax.runtime.paths import describe_missing, name_argument, path_argument


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and exports."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.export",
        description="Write a checkpoint of a run as a Hugging Face folder (config, tokenizer, safetensors).",
        epilog="example: python -m thinkpo_jax.export --run runs/quickstart --stage thinkpo --out thinkpo-model",
    )
    parser.add_argument("--run", type=name_argument, required=True, metavar="RUN_DIR", help="the folder of a run")
    parser.add_argument("--stage", metavar="NAME", help="the stage (default: the last one with a checkpoint)")
    parser.add_argument("--step", type=int, metavar="N", help="the update of the checkpoint (default: the latest)")
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="the new folder, must not exist yet"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parsed = parser.parse_args(arguments)
    folder = RunFolder.open(parsed.run, with_models=False)
    if not folder.config.is_file():
        raise UserError(f"--run {folder.config}: {describe_missing(folder.config)}. Give the folder of a run.")
    config = load_run_config(folder.config)
    # This machine may have other devices than the training, and the run folder may have been moved.
    compute = config.compute.model_copy(update={"attention": "blockwise"})
    config = config.model_copy(update={"mesh": MeshConfig(), "compute": compute, "run_dir": parsed.run})
    run = resolve_run(config, with_models=False)
    export_checkpoint(run, parsed.stage, step=parsed.step, out=parsed.out, dtype=parsed.dtype)


if __name__ == "__main__":
    run_and_exit(main)
