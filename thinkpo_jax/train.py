"""Trains and evaluates a run.

Example: python -m thinkpo_jax.train --config configs/quickstart.yaml --set seed=1
"""

import argparse
from collections.abc import Sequence

from thinkpo_jax.models.compute_config import describe_compute
from thinkpo_jax.run.data_preview import preview_run_data
from thinkpo_jax.run.evaluate_run import evaluate_run, load_all_questions
from thinkpo_jax.run.resolve import has_changed_files, is_stage_finished, resolve_run
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.run.stage_data import load_stage_inputs
from thinkpo_jax.run.stage_output import begin_stage, save_stage_output
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.processes import add_distributed_arguments, initialize_distributed
from thinkpo_jax.training.train_stage import train_stage


def train_run(config: RunConfig) -> RunFolder:
    """Trains each unfinished stage in order, evaluates every model, and writes the report."""
    run = resolve_run(config)
    log_info(describe_compute(run.compute, run.mesh))
    pending = [stage for stage in config.stages if not is_stage_finished(run, stage) or has_changed_files(run, stage)]
    # All data and questions are read before anything is written. So an error in the last stage shows at once.
    questions = load_all_questions(config, run.tokenizers)
    loaded = [load_stage_inputs(run, stage, questions) for stage in pending]
    with run.folder.locked(config, models=run.identities()):
        while loaded:
            inputs = loaded.pop(0)
            # Of a finished stage, only changed files were checked. Another process may have finished one by now.
            if not is_stage_finished(run, inputs.config):
                begin_stage(run, inputs)
                save_stage_output(run, inputs, train_stage(inputs))
            del inputs  # frees the data of the stage
        evaluate_run(run, questions)
    return run.folder


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.train",
        description="Train and evaluate the stages of a run. Finished stages are not trained again.",
        epilog="example: python -m thinkpo_jax.train --config configs/quickstart.yaml --set seed=1 run_dir=runs/seed1",
    )
    add_config_arguments(parser)
    add_distributed_arguments(parser)
    parser.add_argument("--check", action="store_true", help="only read, count and show the data (uses no device)")
    parsed = parser.parse_args(arguments)
    if not parsed.check:
        initialize_distributed(parsed)
    config = load_run_config(parsed.config, parsed.assignments)
    if parsed.check:
        preview_run_data(config)
    else:
        train_run(config)


if __name__ == "__main__":
    run_and_exit(main)
