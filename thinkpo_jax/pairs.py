"""The command `python -m thinkpo_jax.pairs`: builds preference pairs as a YAML file says."""

import argparse
from collections.abc import Sequence

from thinkpo_jax.pair_building.build_pairs import PairsConfig, build_pairs
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.config import parse_config
from thinkpo_jax.runtime.config_file import read_config
from thinkpo_jax.runtime.yaml_text import apply_overrides


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and builds the pairs."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.pairs",
        description="Build preference pairs. Short answers that are saved already are not generated again.",
        epilog="example: python -m thinkpo_jax.pairs --config configs/pairs_miniature.yaml --set select.gap=short",
    )
    add_config_arguments(parser)
    parsed = parser.parse_args(arguments)
    values, source = read_config(parsed.config)
    raw = apply_overrides(values, parsed.assignments)
    build_pairs(parse_config(PairsConfig, raw, source=source, assignments=parsed.assignments))


if __name__ == "__main__":
    run_and_exit(main)
