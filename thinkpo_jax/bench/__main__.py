"""The command line of the benchmarks."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from thinkpo_jax.bench.growth import bench_growth
from thinkpo_jax.bench.load import bench_load
from thinkpo_jax.bench.step import SHAPE, bench_step
from thinkpo_jax.run.run_config import load_run_config
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.devices import DEVICE_SPECS
from thinkpo_jax.runtime.files import software_versions


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.bench",
        description="Time two things side by side on one machine. Only their ratio is worth comparing.",
        epilog="examples: python -m thinkpo_jax.bench load --gib 1; python -m thinkpo_jax.bench step --against trl; "
        "python -m thinkpo_jax.bench growth --config FILE --kind v6e --out growth.png",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    load = commands.add_parser("load", help="load a checkpoint onto the devices, compared with reading its file")
    load.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint in GiB (default: 1)")
    load.add_argument("--repeats", type=int, default=5, help="how often each side is timed (default: 5)")
    step = commands.add_parser("step", help="a ThinkPO update on the CPU, compared with that of another trainer")
    step.add_argument("--against", choices=("trl",), default="trl", help="the other trainer (default: trl)")
    step.add_argument("--pairs", type=int, default=16, help="pairs per epoch, an even number (default: 16)")
    step.add_argument("--max-length", type=int, default=2048, help="maximum tokens of prompt + answer (default: 2048)")
    step.add_argument("--row-length", type=int, help="tokens of our packed rows (default: 2.125 times --max-length)")
    step.add_argument("--repeats", type=int, default=3, help="rounds in which the sides take turns (default: 3)")
    growth = commands.add_parser("growth", help="memory and traffic of an update by devices and row length, compiled")
    add_config_arguments(growth)
    growth.add_argument("--kind", choices=[spec.name for spec in DEVICE_SPECS], default="v6e", help="(default: v6e)")
    growth.add_argument("--most", type=int, default=256, help="maximum number of devices (default: 256)")
    growth.add_argument("--out", type=Path, required=True, metavar="FILE", help="file for the plot")
    options = parser.parse_args(arguments)
    if options.command == "growth":
        config = load_run_config(options.config, options.assignments)
        if not config.stages:
            parser.error("--config needs a stage")
        bench_growth(config, options.kind, max_devices=options.most, out=options.out)
        return
    if options.repeats < 1 or (options.command == "load" and not 0 < options.gib < 1000):
        parser.error("--repeats must be at least 1, and --gib a positive number below 1000")
    print("; ".join(f"{name} {version}" for name, version in software_versions().items()))
    if options.command == "load":
        bench_load(options.gib, options.repeats)
        return
    # By default a row holds slightly more than two pairs of the maximum length: such rows fill better.
    row_length = options.row_length or 17 * options.max_length // 8
    if options.pairs < 2 or options.pairs % 2 or not 16 <= 2 * options.max_length <= row_length:
        parser.error("--pairs must be even, --max-length at least 8, --row-length at least twice --max-length")
    bench_step(SHAPE, options.pairs, options.max_length, row_length=row_length, repeats=options.repeats)


if __name__ == "__main__":
    run_and_exit(main)
