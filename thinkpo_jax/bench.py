"""How fast is it, and against what? Each benchmark times two things side by side and prints their ratio.

Examples: python -m thinkpo_jax.bench load --gib 1
          python -m thinkpo_jax.bench step --against trl
          python -m thinkpo_jax.bench growth --config FILE --kind v6e --out growth.png
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from thinkpo_jax.architecture import read_architecture
from thinkpo_jax.bench_growth import bench_growth
from thinkpo_jax.bench_pairs import SHAPE as LLAMA
from thinkpo_jax.bench_step import bench_step
from thinkpo_jax.commands import config_arguments, program
from thinkpo_jax.convert import expected_shapes, load_model
from thinkpo_jax.devices import DEVICES
from thinkpo_jax.folder import WEIGHTS
from thinkpo_jax.model import ComputeConfig
from thinkpo_jax.run import load_config, versions
from thinkpo_jax.sharding import MeshConfig, make_mesh

LAYER_BYTES = 31_461_376  # of the model below, in bfloat16
SHAPE = {
    "model_type": "llama",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
}


def bench_load(gib: float, repeats: int) -> None:
    """Loading a bfloat16 checkpoint onto the devices as float32, against reading its file from end to end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_checkpoint(folder, gib)
        mesh = make_mesh(MeshConfig())
        cache = "emptied before each" if hasattr(os, "posix_fadvise") else "cannot be emptied on this system"
        print(f"checkpoint: {size / 2**30:.2f} GiB; the first load compiles and is not counted; page cache {cache}")
        seconds(lambda: load_model(folder, ComputeConfig(), mesh), folder)
        ratios: list[float] = []
        for _ in range(repeats):
            reading = seconds(lambda: read_through(folder / WEIGHTS), folder)
            loading = seconds(lambda: load_model(folder, ComputeConfig(), mesh), folder)
            ratios.append(reading / loading)
            rates = f"read {size / reading / 2**30:.2f} GiB/s, load {size / loading / 2**30:.2f} GiB/s"
            print(f"{rates}, load / read {ratios[-1]:.2f}")
        print(f"median load / read: {statistics.median(ratios):.2f}")


def write_checkpoint(folder: Path, gib: float) -> int:
    """Writes a random model with as many layers as make `gib` GiB; gives the size of its weights in bytes."""
    head = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2 * 2
    layers = max(1, round((gib * 2**30 - head) / LAYER_BYTES))
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}), encoding="utf-8")
    rng = np.random.default_rng(0)
    shapes = expected_shapes(read_architecture(folder))
    tensors = {name: rng.random(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / WEIGHTS)
    return sum(tensor.nbytes for tensor in tensors.values())


def read_through(file: Path) -> None:
    """Reads a file from end to end into one small buffer."""
    buffer = bytearray(2**24)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def seconds(function: Callable[[], object], folder: Path) -> float:
    """How long a call takes, its arrays included, after the weights in the folder are put out of the page cache."""
    gc.collect()
    if hasattr(os, "posix_fadvise"):
        with (folder / WEIGHTS).open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


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
    config_arguments(growth)
    growth.add_argument("--kind", default="v6e", help="of device, as in plan's --topology (default: v6e)")
    growth.add_argument("--most", type=int, default=256, help="devices, at most (default: 256)")
    growth.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the plot goes")
    parsed = parser.parse_args(arguments)
    if parsed.what == "growth":
        config = load_config(parsed.config, parsed.assignments)
        if parsed.kind not in (kinds := [device.name for device in DEVICES]):
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
    print("; ".join(f"{name} {version}" for name, version in versions().items()))
    if parsed.what == "load":
        bench_load(parsed.gib, parsed.repeats)
    else:
        sizes = {"pairs": parsed.pairs, "max_length": parsed.max_length, "row_length": parsed.row_length}
        bench_step(LLAMA, **sizes, repeats=parsed.repeats)


if __name__ == "__main__":
    program(main)
