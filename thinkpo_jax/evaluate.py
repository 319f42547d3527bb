"""Evaluates the models of a run, or any other model on the benchmarks of a configuration.

Example: python -m thinkpo_jax.evaluate --config configs/quickstart.yaml
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from thinkpo_jax.models.compute_config import describe_compute
from thinkpo_jax.run.evaluate_run import evaluate_run, load_all_questions, pool_runs
from thinkpo_jax.run.resolve import is_stage_finished, resolve_run
from thinkpo_jax.run.run_config import load_run_config
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.paths import name_argument, path_argument
from thinkpo_jax.runtime.processes import add_distributed_arguments, initialize_distributed


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and evaluates."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.evaluate",
        description="Evaluate the finished models of a run, or any other model on the benchmarks of a configuration.",
        epilog="examples: python -m thinkpo_jax.evaluate --config FILE --model DIR --out runs/other; "
        "python -m thinkpo_jax.evaluate --pool runs/seed0 runs/seed1 runs/seed2",
    )
    add_config_arguments(parser, required=False)
    add_distributed_arguments(parser)
    pool_help = "pool the questions of finished runs that differ in the seed"
    parser.add_argument("--pool", nargs="+", type=path_argument, metavar="RUN", help=pool_help)
    model_help = "evaluate this Hugging Face folder or Hub id instead of the run"
    parser.add_argument("--model", type=name_argument, metavar="FOLDER", help=model_help)
    parser.add_argument("--out", type=name_argument, metavar="DIR", help="the folder for the report of --model")
    parsed = parser.parse_args(arguments)
    if parsed.pool is not None:
        if parsed.config or parsed.assignments or parsed.model or parsed.out:
            parser.error("--pool reads finished runs and cannot be combined with other options")
        print(pool_runs(parsed.pool))
        return
    initialize_distributed(parsed)
    if parsed.config is None:
        parser.error("give --config FILE, or --pool RUN RUN ...")
    config = load_run_config(parsed.config, parsed.assignments)
    if config.evaluation is None:
        raise UserError(f"{parsed.config}: the section `evaluation` is missing. Add one that names the benchmarks.")
    if (parsed.model is None) != (parsed.out is None):
        raise UserError("--model and --out go together. Give the model to evaluate and the folder for its report.")
    if parsed.model is not None:
        old_config = RunFolder(Path(parsed.out)).config
        if old_config.exists() and load_run_config(old_config).stages:
            raise UserError(f"--out {parsed.out} is the folder of a run with stages. Choose another folder.")
        # The template arguments and the other keys of the section hold for every model that is compared.
        model = config.model.model_copy(update={"path": parsed.model, "weights": "pretrained"})
        changes = {"model": model, "stages": (), "run_dir": parsed.out}
        changes["evaluation"] = config.evaluation.model_copy(update={"compare": ()})
        config = config.model_copy(update=changes)
    run = resolve_run(config)
    log_info(describe_compute(run.compute, run.mesh))
    questions = load_all_questions(config.evaluation, run.model_source.tokenizer, seed=config.seed)
    for stage in config.stages:
        is_stage_finished(run, stage)  # raises if the folder holds a stage with other settings
    with run.folder.locked(config, model=run.model_source.quick_fingerprint()):
        evaluate_run(run, questions)


if __name__ == "__main__":
    run_and_exit(main)
