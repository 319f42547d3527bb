"""Loading needs little extra memory. A damaged checkpoint is refused, or the model equals its files."""

import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import small
from support.model_folders import save_random_model
from support.selection import exhaustive
from support.weights import random_model

from thinkpo_jax.bench import load as bench
from thinkpo_jax.models.safetensors_files import WEIGHTS_INDEX_FILE
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_mapping import flatten_by_name
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh

MEASURE = """
import json, sys, threading, time
from pathlib import Path
import jax
from thinkpo_jax.bench.load import write_checkpoint
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.safetensors_files import read_tensor_index
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh

def private_bytes():  # without pages of mapped files, which the system may drop at any time
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

peak, loading = 0, True
def watch():
    global peak
    while loading:
        peak = max(peak, private_bytes())
        time.sleep(0.002)

folder = Path(sys.argv[1])
mesh = make_mesh(MeshConfig(fsdp=int(sys.argv[2])), jax.devices()[:int(sys.argv[2])])
jax.jit(lambda: jax.numpy.zeros(8))().block_until_ready()
before = private_bytes()
thread = threading.Thread(target=watch)
thread.start()
model = jax.block_until_ready(load_model(folder, ComputeConfig(), mesh))
loading = False
thread.join()
sizes = [tensor.nbytes for tensor in read_tensor_index(folder).values()]
print(json.dumps({
    "file": sum(sizes), "largest": max(sizes), "over": peak - before - sum(x.nbytes for x in jax.tree.leaves(model))
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("vocabulary", "gib"), [(65_536, 0.5), pytest.param(151_936, 1.05, marks=exhaustive)])
def test_loading_needs_less_memory_than_two_tensors_beside_the_parameters(
    vocabulary: int, gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.SHAPE, "vocab_size", vocabulary)
    bench.write_checkpoint(tmp_path, gib)
    for devices in ("1", "4"):
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), devices], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        num_bytes = json.loads(result.stdout.splitlines()[-1])
        assert num_bytes["file"] >= max((gib - 0.05) * 2**30, 3 * num_bytes["largest"])
        assert num_bytes["over"] < 2 * num_bytes["largest"], num_bytes


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_weights_become_float32_parameters(dtype: type, tmp_path: Path) -> None:
    file = save_random_model(tmp_path) / "model.safetensors"
    save_file({name: array.astype(dtype) for name, array in load_file(file).items()}, file)
    model = load_model(file.parent, small.FLOAT32, small.mesh(fsdp=2, tensor=2))
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), random_model())
    for name, array in flatten_by_name(model).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, flatten_by_name(expected)[name])


def test_weights_are_loaded_in_another_dtype_except_for_norms(tmp_path: Path) -> None:
    folder, mesh = save_random_model(tmp_path), small.mesh(fsdp=2, tensor=2)
    expected = flatten_by_name(load_model(folder, small.FLOAT32, mesh))
    for name, array in flatten_by_name(load_model(folder, small.FLOAT32, mesh, dtype="bfloat16")).items():
        dtype = np.float32 if "norm" in name else ml_dtypes.bfloat16
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, np.asarray(expected[name]).astype(dtype))


def test_a_warning_names_the_tensors_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_random_model(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = np.nan
    tensors["model.layers.1.mlp.up_proj.weight"][2, 5] = -np.inf
    save_file(tensors, file)
    load_model(file.parent, small.FLOAT32, small.mesh())
    names = "model.layers.1.mlp.up_proj.weight, model.norm.weight"
    assert capsys.readouterr().err == f"warning: {file.parent}: NaN or infinite weights in 2 tensor(s): {names}.\n"


# Each mutation damages a checkpoint folder at random.

Mutation = Callable[[Path, np.random.Generator], None]


def _choose_weight_file(folder: Path, rng: np.random.Generator) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    return files[rng.integers(len(files))]


def truncate_file(folder: Path, rng: np.random.Generator) -> None:
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / WEIGHTS_INDEX_FILE]
    file = files[rng.integers(len(files))]
    content = file.read_bytes()
    file.write_bytes(content[: rng.integers(len(content))])


def flip_header_bits(folder: Path, rng: np.random.Generator) -> None:
    file = _choose_weight_file(folder, rng)
    content = bytearray(file.read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(rng.integers(1, 4)):
        content[rng.integers(end)] ^= 1 << rng.integers(8)
    file.write_bytes(content)


def swap_tensors(folder: Path, rng: np.random.Generator) -> None:
    file = _choose_weight_file(folder, rng)
    tensors = load_file(file)
    first, second = rng.choice(sorted(tensors), 2, replace=False)
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, file)


def rename_tensor(folder: Path, rng: np.random.Generator) -> None:
    file = _choose_weight_file(folder, rng)
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensors[name.replace("model", "modle") + "x" * int(rng.integers(2))] = tensors.pop(name)
    save_file(tensors, file)


def reshape_tensor(folder: Path, rng: np.random.Generator) -> None:
    file = _choose_weight_file(folder, rng)
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    array = tensors[name]
    reshaped = [array[None], array.reshape(-1), array[:-1], np.concatenate([array, array]), array.T, np.float32(0)]
    tensors[name] = np.ascontiguousarray(reshaped[rng.integers(len(reshaped))])
    save_file(tensors, file)


def change_dtype(folder: Path, rng: np.random.Generator) -> None:
    file = _choose_weight_file(folder, rng)
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    dtypes = [np.float64, np.int8, np.uint8, np.int32, bool, ml_dtypes.float8_e4m3fn]
    tensors[name] = tensors[name].astype(dtypes[rng.integers(len(dtypes))])
    save_file(tensors, file)


def insert_nonfinite(folder: Path, rng: np.random.Generator) -> None:
    file = _choose_weight_file(folder, rng)
    tensors = load_file(file)
    array = tensors[rng.choice(sorted(tensors))].reshape(-1)
    array[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
    save_file(tensors, file)


def change_index(folder: Path, rng: np.random.Generator) -> None:
    index = json.loads((folder / WEIGHTS_INDEX_FILE).read_text())
    name = rng.choice(sorted(index["weight_map"]))
    values = ["nowhere.safetensors", "../x.safetensors", 3, None, "", "config.json"]
    index["weight_map"][name] = values[rng.integers(len(values))]
    (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps(index))


def change_config(folder: Path, rng: np.random.Generator) -> None:
    raw = json.loads((folder / "config.json").read_text())
    keys = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
    )
    values = [0, -1, 3, 10**30, "8", None, [], 2.5, True]
    raw[rng.choice(keys)] = values[rng.integers(len(values))]
    (folder / "config.json").write_text(json.dumps(raw))


def remove_file(folder: Path, rng: np.random.Generator) -> None:
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    files[rng.integers(len(files))].unlink()


MUTATIONS: tuple[Mutation, ...] = (
    truncate_file, flip_header_bits, swap_tensors, rename_tensor, reshape_tensor, change_dtype, insert_nonfinite,
    change_index, change_config, remove_file,
)  # fmt: skip
NUM_SEEDS = 55


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def _has_parameters(model: Transformer, tensors: dict[str, np.ndarray]) -> bool:
    """Returns whether the parameters equal the tensors of the files. Does not use the code that loads them."""
    expected = {
        "embedding": tensors["model.embed_tokens.weight"],
        "untied_head": tensors["lm_head.weight"].T,
        "final_norm": tensors["model.norm.weight"],
    }
    for path, module in {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
        "up": "mlp.up_proj", "down": "mlp.down_proj",
    }.items():  # fmt: skip
        for ours, theirs in ((f"blocks.{path}", f"{module}.weight"), (f"blocks.{path}_bias", f"{module}.bias")):
            layers = [tensors[name] for i in range(2) if (name := f"model.layers.{i}.{theirs}") in tensors]
            if layers:
                expected[ours] = np.stack([layer.T for layer in layers])
    parameters = flatten_by_name(model)
    assert parameters.keys() == expected.keys()
    return all(
        np.array_equal(parameters[path], array.reshape(parameters[path].shape), equal_nan=True)
        for path, array in expected.items()
    )


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_mutated_checkpoint_is_refused_or_loads_what_its_files_hold(
    mutate: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("thinkpo_jax.models.weight_saving.MAX_SHARD", "40KB")
    intact, mesh = save_random_model(tmp_path), make_mesh(MeshConfig(), jax.devices()[:1])
    assert len(list(intact.glob("*.safetensors"))) > 1
    num_refused, names_folder = 0, True
    for seed in range(NUM_SEEDS):
        rng = np.random.default_rng(seed)
        folder = tmp_path / f"{seed}"
        shutil.copytree(intact, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # change_dtype may cast NaN to integers
            mutate(folder, rng)
        try:
            model = load_model(folder, small.FLOAT32, mesh)
        except UserError as error:
            num_refused += 1
            names_folder &= str(folder) in str(error)
        else:
            tensors = _read_tensors(folder)
            assert _has_parameters(model, tensors), seed
            is_finite = all(np.isfinite(array).all() for array in tensors.values())
            assert ("warning" in capsys.readouterr().err) == (not is_finite)
        shutil.rmtree(folder)
    assert names_folder
    # Two tensors of the same shape can be swapped, and weights that are not finite load with a warning.
    assert num_refused > NUM_SEEDS // 2 or mutate in (swap_tensors, insert_nonfinite)
