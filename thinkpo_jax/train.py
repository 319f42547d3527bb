"""Argument parsing and one call."""

import argparse
from collections.abc import Sequence

import jax

from thinkpo_jax.models.compute_config import placement
from thinkpo_jax.run.data_preview import check_run
from thinkpo_jax.run.evaluate_run import evaluate_run, read_questions
from thinkpo_jax.run.resolve import open_run
from thinkpo_jax.run.run_config import RunConfig, load_config
from thinkpo_jax.run.run_folder import Run
from thinkpo_jax.run.stage_data import check_data, read_examples
from thinkpo_jax.runtime.cli import config_arguments, program
from thinkpo_jax.runtime.console import say
from thinkpo_jax.runtime.processes import host_arguments, join
from thinkpo_jax.training.train_stage import train_stage


def run_all(config: RunConfig) -> Run:
    """Trains the stages that are not finished, in order, then evaluates every model and writes the report."""
    run = open_run(config)
    say(placement(run.compute, run.mesh))
    stages = [stage for stage in config.stages if not run.finished(stage.name)]
    # All that is read, before anything is written: what is wrong with the last stage shows before the first one trains.
    examples = {stage.name: read_examples(run, stage) for stage in stages}
    asked = read_questions(config, run.chat)
    with run.writing(), jax.set_mesh(run.mesh):
        for stage in stages:
            if not run.finished(stage.name):  # asked again: another process may have written before this one could
                check_data(run, stage, examples[stage.name])
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
    config_arguments(parser)
    host_arguments(parser)
    parser.add_argument("--check", action="store_true", help="only read, count and show the data; touches no device")
    parsed = parser.parse_args(arguments)
    if not parsed.check:
        join(parsed)
    config = load_config(parsed.config, parsed.assignments)
    if parsed.check:
        check_run(config)
    else:
        run_all(config)


if __name__ == "__main__":
    program(main)
