"""Argument parsing and one call."""

import argparse
from collections.abc import Sequence

from thinkpo_jax.planning.plan_stage import plan
from thinkpo_jax.planning.search import search, smallest
from thinkpo_jax.planning.topology import slices, topology
from thinkpo_jax.run.run_config import RunConfig, load_config
from thinkpo_jax.runtime.cli import config_arguments, program
from thinkpo_jax.runtime.config import UserError, nearest
from thinkpo_jax.training.stage_config import Stage


def chosen(config: RunConfig, name: str | None) -> Sequence[Stage]:
    """The stages to plan. Raises `UserError` where there is none."""
    names = [stage.name for stage in config.stages]
    if not names:
        raise UserError("the configuration has no stages: there is nothing to plan. Add one (README).")
    if name is not None and name not in names:
        raise UserError(f"--stage {name}: there is no such stage{nearest(name, names)}; there are: {', '.join(names)}.")
    return [stage for stage in config.stages if name in (None, stage.name)]


def main(arguments: Sequence[str]) -> None:
    """What the stages of a run take of each device of a slice, whether they fit, and about how fast they are."""
    parser = argparse.ArgumentParser(prog="python -m thinkpo_jax.plan", description=main.__doc__)
    config_arguments(parser)
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
    devices = slices(given.topology.lower()) if kind_alone else [topology(given.topology)]
    config = load_config(given.config, given.assignments)
    stages = chosen(config, given.stage)
    if kind_alone:
        if given.search:
            raise UserError(f"--topology {given.topology} --search: name a slice, such as {devices[-1].name}.")
        smallest(config, stages, devices)
    elif given.search:
        search(config, stages, devices[0])
    else:
        plan(config, stages, devices[0])


if __name__ == "__main__":
    program(main)
