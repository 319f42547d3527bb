"""Argument parsing and one call."""

import argparse
from collections.abc import Sequence

from thinkpo_jax.pair_building.build_pairs import build_pairs
from thinkpo_jax.pair_building.pairs_config import PairsConfig
from thinkpo_jax.runtime.cli import config_arguments, program
from thinkpo_jax.runtime.config import override, parse, read_yaml


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and builds the pairs."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.pairs",
        description="Build preference pairs. Answers that were generated before are not generated again.",
        epilog="example: python -m thinkpo_jax.pairs --config configs/pairs_miniature.yaml --set select.gap=short",
    )
    config_arguments(parser)
    parsed = parser.parse_args(arguments)
    raw = override(read_yaml(parsed.config), parsed.assignments)
    build_pairs(parse(PairsConfig, raw, source=str(parsed.config)))


if __name__ == "__main__":
    program(main)
