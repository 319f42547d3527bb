"""Argument parsing and one call."""

import argparse
from collections.abc import Sequence

import jax

from thinkpo_jax.models.compute_config import describe_compute
from thinkpo_jax.run.data_preview import preview_run_data
from thinkpo_jax.run.evaluate_run import evaluate_run, load_all_questions
from thinkpo_jax.run.resolve import resolve_run
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.run.run_folder import Run
from thinkpo_jax.run.stage_data import check_data_unchanged, read_examples
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.processes import add_distributed_arguments, initialize_distributed
from thinkpo_jax.training.train_stage import train_stage


def train_run(config: RunConfig) -> Run:
    """Trains the stages that are not finished, in order, then evaluates every model and writes the report."""
    run = resolve_run(config)
    log_info(describe_compute(run.compute, run.mesh))
    stages = [stage for stage in config.stages if not run.finished(stage.name)]
    # All that is read, before anything is written: what is wrong with the last stage shows before the first one trains.
    examples = {stage.name: read_examples(run, stage) for stage in stages}
    asked = load_all_questions(config, run.chat)
    with run.writing(), jax.set_mesh(run.mesh):
        for stage in stages:
            if not run.finished(stage.name):  # asked again: another process may have written before this one could
                check_data_unchanged(run, stage, examples[stage.name])
                train_stage(run, stage, examples.pop(stage.name))
        evaluate_run(run, asked)
    return run


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.train",
        description="Train and evaluate the stages of a run. What is finished is not run again.",
        epilog="example: python -m thinkpo_jax.train --config configs/quickstart.yaml --set seed=1 run_dir=runs/seed1",
    )
    add_config_arguments(parser)
    add_distributed_arguments(parser)
    parser.add_argument("--check", action="store_true", help="only read, count and show the data; touches no device")
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
