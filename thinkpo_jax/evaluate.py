"""Evaluates models on benchmarks, with or without a configuration, and compares them.

Example: python -m thinkpo_jax.evaluate --model runs/mine:thinkpo --against runs/mine:sft --benchmark gsm8k
"""

import argparse
from collections.abc import Sequence
from typing import Any

from thinkpo_jax.models.compute_config import describe_compute
from thinkpo_jax.run.evaluate_run import evaluate_run, load_all_questions, pool_runs, rescore_run
from thinkpo_jax.run.evaluated_models import MODEL_HELP, config_of_models
from thinkpo_jax.run.resolve import finished_stages, resolve_run
from thinkpo_jax.run.run_config import parse_run_config
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.config_file import read_config
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.paths import name_argument
from thinkpo_jax.runtime.processes import add_distributed_arguments, initialize_distributed
from thinkpo_jax.runtime.yaml_text import apply_overrides

EXAMPLES = """examples:
  python -m thinkpo_jax.evaluate --model runs/mine:thinkpo --against runs/mine:sft --benchmark gsm8k --limit 200
  python -m thinkpo_jax.evaluate --config FILE
  python -m thinkpo_jax.evaluate --pool runs/seed0 runs/seed1 runs/seed2"""
MODEL_OPTIONS = ("against", "benchmark", "limit", "protocol", "out")
SAMPLING_OPTIONS = {"samples": int, "max_new_tokens": int, "temperature": float}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.evaluate",
        description="Evaluate models on benchmarks and compare them, or evaluate the finished models of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, required=False)
    models = parser.add_argument_group("models without a run")
    models.add_argument("--model", type=name_argument, metavar="MODEL", help=f"evaluate it: {MODEL_HELP}")
    models.add_argument("--against", nargs="+", default=[], type=name_argument, metavar="MODEL", help="and these")
    benchmark_help = "benchmarks: gsm8k, math500, ... or NAME=FILE with the columns question and answer"
    models.add_argument("--benchmark", nargs="+", default=[], metavar="NAME", help=benchmark_help)
    models.add_argument("--limit", type=int, metavar="N", help="use only the first N questions of each benchmark")
    for name, kind in SAMPLING_OPTIONS.items():
        option = f"--{name.replace('_', '-')}"
        models.add_argument(option, type=kind, metavar="N", help=f"see evaluation.sampling.{name}")
    models.add_argument("--protocol", choices=("modern", "paper"), help="sampling parameters and system prompt")
    models.add_argument("--out", type=name_argument, metavar="DIR", help="the folder for answers and report")
    saved = parser.add_argument_group("saved answers")
    saved.add_argument("--pool", nargs="+", type=name_argument, metavar="RUN", help="pool runs of several seeds")
    saved.add_argument("--rescore", type=name_argument, metavar="DIR", help="grade again, without a model")
    add_distributed_arguments(parser)
    return parser


def _raw_config(parsed: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Returns the values of the configuration of --config or of the other options, and its name in messages."""
    raw, source = read_config(parsed.config) if parsed.config else ({}, "the options")
    raw = apply_overrides(raw, parsed.assignments)
    if parsed.model is None:
        return raw, source
    sampling = {name: vars(parsed)[name] for name in SAMPLING_OPTIONS}
    options = {"limit": parsed.limit, "protocol": parsed.protocol, "out": parsed.out, "sampling": sampling}
    return config_of_models(raw, [parsed.model, *parsed.against], parsed.benchmark, **options), source


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and evaluates."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    options = {name for name, value in vars(parsed).items() if value not in (None, [], parser.get_default(name))}
    if options & {"pool", "rescore"} and len(options) > 1:
        parser.error("--pool and --rescore read saved answers and cannot be combined with other options")
    if parsed.pool:
        print(pool_runs(parsed.pool))
        return
    if parsed.rescore:
        rescore_run(parsed.rescore)
        return
    if parsed.config is None and parsed.model is None:
        parser.error("give --model MODEL, --config FILE, --pool RUN RUN ... or --rescore DIR")
    if parsed.model is None and (extra := options & {*MODEL_OPTIONS, *SAMPLING_OPTIONS}):
        parser.error(f"--{min(extra).replace('_', '-')} needs --model. With --config alone, use --set")
    initialize_distributed(parsed)
    raw, source = _raw_config(parsed)
    config = parse_run_config(raw, parsed.assignments, source=source)
    if config.evaluation is None:
        raise UserError(f"{source}: the section `evaluation` is missing. Add one that names the benchmarks.")
    run = resolve_run(config)
    log_info(describe_compute(run.compute, run.mesh))
    questions = load_all_questions(config, run.tokenizers)
    finished_stages(run)  # raises if the folder holds a stage with other settings, or a damaged model
    with run.folder.locked(config, models=run.identities()):
        evaluate_run(run, questions)


if __name__ == "__main__":
    run_and_exit(main)
