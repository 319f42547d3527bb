"""The benchmarks."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from thinkpo_jax.bench.growth import bench_growth
from thinkpo_jax.bench.load import bench_load
from thinkpo_jax.bench.step import bench_step
from thinkpo_jax.bench.workload import SHAPE as LLAMA
from thinkpo_jax.run.run_config import load_run_config
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.devices import DEVICE_SPECS
from thinkpo_jax.runtime.files import software_versions


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.bench",
        description="Time two things side by side on one machine; only their ratio is worth comparing.",
        epilog="examples: python -m thinkpo_jax.bench load --gib 1; python -m thinkpo_jax.bench step --against trl",
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    load = what.add_parser("load", help="a checkpoint onto the devices, against reading its file")
    load.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint (default: 1)")
    load.add_argument("--repeats", type=int, default=5, help="how often each side is timed (default: 5)")
    step = what.add_parser("step", help="a ThinkPO update on the CPU, against that of another trainer")
    step.add_argument("--against", choices=("trl",), default="trl", help="the other trainer (default: trl)")
    step.add_argument("--pairs", type=int, default=16, help="pairs of an epoch, an even number (default: 16)")
    step.add_argument("--max-length", type=int, default=2048, help="most tokens of prompt and answer (default: 2048)")
    step.add_argument("--row-length", type=int, help="tokens of our packed rows (default: 2.125 times --max-length)")
    step.add_argument("--repeats", type=int, default=3, help="rounds, in which the sides take turns (default: 3)")
    growth = what.add_parser("growth", help="memory and exchanges of an update by devices and row length, compiled")
    add_config_arguments(growth)
    growth.add_argument("--kind", default="v6e", help="of device, as in plan's --topology (default: v6e)")
    growth.add_argument("--most", type=int, default=256, help="devices, at most (default: 256)")
    growth.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the plot goes")
    parsed = parser.parse_args(arguments)
    if parsed.what == "growth":
        config = load_run_config(parsed.config, parsed.assignments)
        if parsed.kind not in (kinds := [device.name for device in DEVICE_SPECS]):
            parser.error(f"--kind is one of {', '.join(kinds)}")
        if not config.stages or parsed.most < 1:
            parser.error("--config has a stage, --most is at least 1")
        bench_growth(config, parsed.kind, most=parsed.most, out=parsed.out)
        return
    if parsed.repeats < 1:
        parser.error("--repeats is at least 1")
    if parsed.what == "load" and not 0 < parsed.gib < 1000:
        parser.error("--gib is a positive number of GiB")
    if parsed.what == "step":
        # Two pairs of the greatest length and a little more: rows fill better than with just two.
        parsed.row_length = parsed.row_length or 17 * parsed.max_length // 8
        if parsed.pairs < 2 or parsed.pairs % 2 or not 16 <= 2 * parsed.max_length <= parsed.row_length:
            parser.error("--pairs is even, --max-length at least 8, --row-length at least twice --max-length")
    print("; ".join(f"{name} {version}" for name, version in software_versions().items()))
    if parsed.what == "load":
        bench_load(parsed.gib, parsed.repeats)
    else:
        sizes = {"pairs": parsed.pairs, "max_length": parsed.max_length, "row_length": parsed.row_length}
        bench_step(LLAMA, **sizes, repeats=parsed.repeats)


if __name__ == "__main__":
    run_and_exit(main)
