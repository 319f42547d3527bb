"""Compiles a run's stages or evaluation for devices that are not attached. Prints whether they fit, with estimates.

Examples:
    python -m thinkpo_jax.plan --config configs/paper/thinkpo_bespoke_stratos_7b.yaml --topology v5e:4x4
    python -m thinkpo_jax.plan --config configs/paper/thinkpo_bespoke_stratos_7b.yaml --topology v6e --smallest
    python -m thinkpo_jax.plan --config configs/paper/thinkpo_r1_distill_qwen_7b.yaml --topology v5e:2x2 --evaluation

Only the model's config.json is read: no weights, no data, and no tokenizer unless it may resize the embedding.
Exit status: 0 fits, 1 does not fit, 2 error.
"""

import argparse
from collections.abc import Sequence

from thinkpo_jax.planning.plan_evaluation import plan_evaluation
from thinkpo_jax.planning.plan_stage import plan_stages
from thinkpo_jax.planning.search import find_smallest_slice, search_layouts
from thinkpo_jax.planning.topology import list_slices, parse_topology
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.config import UserError, did_you_mean
from thinkpo_jax.training.stage_config import StageConfig


def main(arguments: Sequence[str]) -> None:
    """Prints what each stage needs on each device of a slice, whether it fits, and an estimate of its speed."""
    options = parse_arguments(arguments)
    if options.smallest:
        slices = list_slices(options.topology.lower())
        config = load_run_config(options.config, options.assignments)
        find_smallest_slice(config, select_stages(config, options.stage), slices)
        return
    topology = parse_topology(options.topology)
    config = load_run_config(options.config, options.assignments)
    if options.evaluation:
        plan_evaluation(config, topology)
        return
    run = search_layouts if options.search else plan_stages
    run(config, select_stages(config, options.stage), topology)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line. Raises `UserError` for options that contradict each other."""
    parser = argparse.ArgumentParser(prog="python -m thinkpo_jax.plan", description=main.__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME",
        help="a slice (v5e:4x4, v5p:2x2x2) or a number of GPUs (h100:8). With --smallest, the device only (v6e, h100). "
        "A device without --smallest means --smallest, for one more release.",
    )  # fmt: skip
    parser.add_argument("--stage", metavar="NAME", help="plan this stage only")
    parser.add_argument(
        "--smallest", action="store_true", help="find the smallest slice of the device on which all stages fit"
    )
    parser.add_argument(
        "--search", action="store_true",
        help="find the fastest mesh, remat policy and micro-batch that fit, also for longer rows",
    )  # fmt: skip
    parser.add_argument(
        "--evaluation", action="store_true",
        help="plan the evaluation of the start model instead of the stages: how many answers fit and how fast they are",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    device, _, shape = options.topology.partition(":")
    if options.smallest and options.search:
        raise UserError("--smallest and --search exclude each other. Find the smallest slice first, then search on it.")
    if options.smallest and shape:
        raise UserError(
            f"--topology {options.topology} --smallest: --smallest chooses the slice itself, so name the device only: "
            f"--topology {device} --smallest. To plan for {options.topology}, leave out --smallest."
        )
    if options.search and not shape:
        example = list_slices(device.lower())[-1].name
        raise UserError(f"--topology {options.topology} --search: --search needs a slice, for example {example}.")
    if options.evaluation and (options.smallest or options.search or options.stage or not shape):
        raise UserError(
            "--evaluation needs a slice, such as --topology v5e:2x2, and no --smallest, --search or --stage."
        )
    options.smallest = options.smallest or ":" not in options.topology
    return options


def select_stages(config: RunConfig, name: str | None) -> Sequence[StageConfig]:
    """Returns the stages to plan: all of them, or the one with this name. Raises `UserError` if there is none."""
    names = [stage.name for stage in config.stages]
    if not names:
        raise UserError("the configuration has no stages, so there is nothing to plan. Add a stage (see README).")
    if name is not None and name not in names:
        raise UserError(
            f"--stage {name}: there is no such stage{did_you_mean(name, names)}. The stages are: {', '.join(names)}."
        )
    return [stage for stage in config.stages if name in (None, stage.name)]


if __name__ == "__main__":
    run_and_exit(main)
