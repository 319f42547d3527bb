"""How fast is it, and against what? Each benchmark times two things side by side and prints their ratio.

Examples: python -m thinkpo_jax.bench load --gib 1
          python -m thinkpo_jax.bench step --against trl
          python -m thinkpo_jax.bench growth --config FILE --kind v6e --out growth.png
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.safetensors_files import WEIGHTS_FILE
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_mapping import expected_tensor_shapes
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh

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
            reading = seconds(lambda: read_through(folder / WEIGHTS_FILE), folder)
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
    shapes = expected_tensor_shapes(read_architecture(folder))
    tensors = {name: rng.random(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / WEIGHTS_FILE)
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
        with (folder / WEIGHTS_FILE).open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began
