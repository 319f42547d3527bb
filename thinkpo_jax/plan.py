"""Argument parsing and one call."""

import argparse
from collections.abc import Sequence

from thinkpo_jax.planning.plan_stage import plan_stages
from thinkpo_jax.planning.search import find_smallest_slice, search_layouts
from thinkpo_jax.planning.topology import list_slices, parse_topology
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.config import UserError, did_you_mean
from thinkpo_jax.training.stage_config import StageConfig


def select_stages(config: RunConfig, name: str | None) -> Sequence[StageConfig]:
    """The stages to plan. Raises `UserError` where there is none."""
    names = [stage.name for stage in config.stages]
    if not names:
        raise UserError("the configuration has no stages: there is nothing to plan. Add one (README).")
    if name is not None and name not in names:
        raise UserError(
            f"--stage {name}: there is no such stage{did_you_mean(name, names)}; there are: {', '.join(names)}."
        )
    return [stage for stage in config.stages if name in (None, stage.name)]


def main(arguments: Sequence[str]) -> None:
    """What the stages of a run take of each device of a slice, whether they fit, and about how fast they are."""
    parser = argparse.ArgumentParser(prog="python -m thinkpo_jax.plan", description=main.__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME",
        help="v5e:4x4, v5p:2x2x2, h100:8, ...; v5e or h100 alone: the smallest slice that is enough",
    )  # fmt: skip
    parser.add_argument("--stage", metavar="NAME", help="plan this stage only")
    parser.add_argument(
        "--search", action="store_true",
        help="look for the fastest mesh, remat policy and micro-batch that fit, and for longer rows",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    kind_alone = ":" not in given.topology
    devices = list_slices(given.topology.lower()) if kind_alone else [parse_topology(given.topology)]
    config = load_run_config(given.config, given.assignments)
    stages = select_stages(config, given.stage)
    if kind_alone:
        if given.search:
            raise UserError(f"--topology {given.topology} --search: name a slice, such as {devices[-1].name}.")
        find_smallest_slice(config, stages, devices)
    elif given.search:
        search_layouts(config, stages, devices[0])
    else:
        plan_stages(config, stages, devices[0])


if __name__ == "__main__":
    run_and_exit(main)
