"""Measures how fast a checkpoint is loaded onto the devices, compared with reading its file."""

import functools
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.safetensors_files import WEIGHTS_FILE
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_mapping import expected_tensor_shapes
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh

SHAPE = {"model_type": "llama", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 4096}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}
SHAPE |= {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
LAYER_BYTES = 31_461_376  # of this model, in bfloat16


def bench_load(gib: float, repeats: int) -> dict[str, Any]:
    """Times loading a bfloat16 checkpoint onto the devices as float32, against reading its file from end to end.

    Prints the speeds in GiB/s and returns them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name), Path(name) / WEIGHTS_FILE
        size = write_checkpoint(folder, gib) / GIB
        load = functools.partial(load_model, folder, ComputeConfig(), make_mesh(MeshConfig()))
        cache = "emptied before each" if hasattr(os, "posix_fadvise") else "cannot be emptied on this system"
        print(f"checkpoint: {size:.2f} GiB; the first load compiles and is not counted; page cache {cache}")
        _seconds(load, weights)
        rounds: list[dict[str, float]] = []
        for _ in range(repeats):
            reading, loading = _seconds(functools.partial(_read_file, weights), weights), _seconds(load, weights)
            rounds.append({"read": size / reading, "load": size / loading, "ratio": reading / loading})
            print("read {read:.2f} GiB/s, load {load:.2f} GiB/s, load / read {ratio:.2f}".format(**rounds[-1]))
    ratio = float(np.median([each["ratio"] for each in rounds]))
    print(f"median load / read: {ratio:.2f}")
    return {"gib": size, "rounds": rounds, "ratio": ratio}


def write_checkpoint(folder: Path, gib: float) -> int:
    """Writes a random bfloat16 model of about `gib` GiB. Returns the bytes of its weights."""
    head = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2 * 2
    layers = max(1, round((gib * GIB - head) / LAYER_BYTES))
    return write_random_model(folder, SHAPE | {"num_hidden_layers": layers}, ml_dtypes.bfloat16)


def write_random_model(folder: Path, config: Mapping[str, Any], dtype: Any) -> int:
    """Writes config.json and random weights, with norms of one. Returns the bytes of the weights."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rng = np.random.default_rng(0)
    tensors = {
        name: (0.07 * rng.random(shape, np.float32) - 0.035 if len(shape) > 1 else np.ones(shape)).astype(dtype)
        for name, shape in expected_tensor_shapes(read_architecture(folder)).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _read_file(path: Path) -> None:
    buffer = bytearray(2**24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _seconds(function: Callable[[], object], weights: Path) -> float:
    """Returns how long a call takes, its arrays included. Drops the weights from the page cache first."""
    gc.collect()
    if hasattr(os, "posix_fadvise"):
        with weights.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
