"""Weights in the layout of the engine give the answers of the training model, on any mesh the engine chooses."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import small
from support.generation import MODEL, forward_logits, generate, random_prompts

from thinkpo_jax.inference import inference_model
from thinkpo_jax.inference.inference_model import InferenceModel, inference_mesh, prepare_inference_model, weight_bytes
from thinkpo_jax.inference.weights import convert_weights
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.runtime.sharding import tree_shardings

PROMPTS = random_prompts([3, 20, 1, 64, 7, 20, 12, 5], seed=8)
BFLOAT16 = ComputeConfig(dtype="bfloat16")
ARCHITECTURES: dict[str, Architecture] = {
    "qwen2": replace(small.ARCH, tied_head=False),
    "qwen2-tied": replace(small.ARCH, tied_head=True),
    "qwen3": replace(small.ARCH, qkv_bias=False, qk_norm=True),
    "llama-tied": replace(small.ARCH, qkv_bias=False, tied_head=True),
    "many-heads-each": replace(small.ARCH, num_heads=6),  # wider than the hidden state
    "own-heads": replace(small.ARCH, num_kv_heads=4),
    "one-head": replace(small.ARCH, num_kv_heads=1),
    "61-rows": replace(small.ARCH, vocab_size=61),
    "61-rows-tied": replace(small.ARCH, vocab_size=61, tied_head=True),
}


def _prepare(arch: Architecture, *, data: int = 1, tensor: int = 1) -> InferenceModel:
    """Prepares the small model, which has a copy on each device of the mesh."""
    mesh = make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), jax.devices()[: data * tensor])
    with jax.set_mesh(mesh):
        model = jax.device_put(MODEL(arch), NamedSharding(mesh, PartitionSpec()))
        return prepare_inference_model(model, mesh, vocab_size=61)


def _expected_logits_are_largest(arch: Architecture, answers: list[list[int]]) -> None:
    for prompt, ids in zip(PROMPTS, answers, strict=True):
        logits = forward_logits([*prompt, *ids], arch)[len(prompt) - 1 : -1]
        assert ids == logits.argmax(axis=-1).tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_answers_equal_a_forward_pass(name: str) -> None:
    arch = ARCHITECTURES[name]
    _expected_logits_are_largest(arch, [answer.ids for answer in generate(PROMPTS, limits=8, model=_prepare(arch))])


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "qwen3", "own-heads"])
def test_greedy_answers_on_a_mesh_equal_a_forward_pass(name: str) -> None:
    arch = ARCHITECTURES[name]
    tensor = 4 if name == "own-heads" else 2
    model = _prepare(arch, data=2, tensor=tensor)
    answers = generate(PROMPTS, limits=8, model=model)
    _expected_logits_are_largest(arch, [answer.ids for answer in answers])


def test_matrices_have_the_compute_dtype_and_norms_stay_in_float32() -> None:
    model, mesh = small.model(BFLOAT16, arch=ARCHITECTURES["qwen3"]), small.mesh()
    with jax.set_mesh(mesh):
        weights = convert_weights(model, mesh)
    assert weights.embedding.dtype == jnp.bfloat16
    for layer in weights.layers:
        for name, array in layer._asdict().items():
            if array is not None:
                assert array.dtype == (jnp.float32 if name.endswith("norm") else jnp.bfloat16), name
    assert weights.final_norm.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model)), "the model keeps its own weights"


def test_answers_in_bfloat16_are_probable_in_float32() -> None:
    arch, mesh = ARCHITECTURES["qwen2"], small.mesh()
    with jax.set_mesh(mesh):
        model = prepare_inference_model(small.model(BFLOAT16, arch=arch), mesh, vocab_size=61)
    for prompt, answer in zip(PROMPTS, generate(PROMPTS, limits=8, model=model), strict=True):
        logits = forward_logits([*prompt, *answer.ids], arch)[len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(answer.ids)[:, None], axis=-1)[:, 0]
        assert (logits.max(axis=-1) - chosen).max() < 0.05 * logits.std()


def test_a_model_on_another_mesh_of_the_same_devices_is_converted() -> None:
    arch = ARCHITECTURES["qwen3"]
    training = small.mesh(data=1, fsdp=4, tensor=2)
    model: Transformer = jax.device_put(MODEL(arch), tree_shardings(MODEL(arch), training))
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    with jax.set_mesh(mesh):
        prepared = prepare_inference_model(model, mesh, vocab_size=61)
    for found, expected in zip(jax.tree.leaves(prepared.weights), jax.tree.leaves(_prepare(arch).weights), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(prepared.weights)} == {8}
    largest = max(jax.tree.leaves(prepared.weights), key=lambda leaf: leaf.size)
    assert largest.addressable_shards[0].data.size == largest.size // 2, "tensor splits it, and data does not"


def _limit_memory(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    monkeypatch.setattr(inference_model, "device_memory_limit", lambda device: limit)


FOUR_HEADS = replace(small.ARCH, num_heads=8, num_kv_heads=4)
SIZE = weight_bytes(FOUR_HEADS, small.FLOAT32)


@pytest.mark.parametrize(
    ("memory", "tensor"),
    [(math.inf, 1), (SIZE / 0.49, 1), (SIZE / 0.51, 2), (SIZE / 2 / 0.49, 2), (SIZE / 1.1, 4), (SIZE / 1.9, 4)],
)
def test_the_smallest_group_of_devices_that_holds_the_model_is_chosen(
    monkeypatch: pytest.MonkeyPatch, memory: float, tensor: int
) -> None:
    _limit_memory(monkeypatch, memory)
    mesh = inference_mesh(FOUR_HEADS, small.FLOAT32, jax.devices())
    assert dict(mesh.shape) == {"data": 8 // tensor, "fsdp": 1, "context": 1, "tensor": tensor}


def test_groups_have_only_sizes_that_divide_devices_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    six_heads = replace(small.ARCH, num_heads=6, num_kv_heads=6, vocab_size=96)
    _limit_memory(monkeypatch, 1.05 * weight_bytes(six_heads, small.FLOAT32))  # so groups have at least two devices

    def tensor_size(arch: Architecture, devices: int) -> int:
        return inference_mesh(arch, small.FLOAT32, jax.devices()[:devices]).shape["tensor"]

    assert tensor_size(six_heads, 8) == 2  # not 4
    assert tensor_size(six_heads, 6) == 2
    assert tensor_size(six_heads, 3) == 3
    assert tensor_size(replace(six_heads, mlp_size=45), 6) == 3
    assert tensor_size(replace(six_heads, vocab_size=93), 6) == 3


def test_the_weights_of_the_compute_dtype_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weight_bytes(FOUR_HEADS, BFLOAT16) == SIZE / 2
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(MODEL(FOUR_HEADS)))
    assert 4 * num_parameters == SIZE
    _limit_memory(monkeypatch, SIZE)
    assert inference_mesh(FOUR_HEADS, small.FLOAT32, jax.devices()).shape["tensor"] == 2
    assert inference_mesh(FOUR_HEADS, BFLOAT16, jax.devices()).shape["tensor"] == 1


@pytest.mark.parametrize(("devices", "split"), [(8, "4"), (1, "1")])
def test_a_model_that_fits_nowhere_is_an_error(monkeypatch: pytest.MonkeyPatch, devices: int, split: str) -> None:
    big: Any = replace(FOUR_HEADS, vocab_size=2**22)  # 1 GiB of embedding and head
    _limit_memory(monkeypatch, 0.2 * GIB)
    message = rf"the weights take 1\.0 GiB, .* Split over {split} of {devices} device.*4 key/value heads"
    with pytest.raises(UserError, match=message):
        inference_mesh(big, small.FLOAT32, jax.devices()[:devices])


class _Device(SimpleNamespace):
    """An accelerator of a process. Only its own process may ask for its memory."""

    def memory_stats(self) -> dict[str, int]:
        assert self.process_index == 0
        return {} if self.limit is None else {"bytes_limit": self.limit, "bytes_in_use": self.limit // 4}


def _devices(limit: int | None, *, kind: str = "unknown") -> list[_Device]:
    return [_Device(process_index=i, platform="gpu", device_kind=kind, limit=limit) for i in (1, 0)]


def test_a_process_asks_only_its_own_device_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = replace(FOUR_HEADS, vocab_size=64)
    made: list[int] = []
    monkeypatch.setattr(inference_model, "make_mesh", lambda config, devices: made.append(config.tensor))
    inference_mesh(arch, small.FLOAT32, _devices(3 * SIZE))
    inference_mesh(arch, small.FLOAT32, _devices(int(1.5 * SIZE)))
    assert made == [1, 2]


def test_the_cache_takes_its_share_of_free_memory() -> None:
    mesh = SimpleNamespace(local_devices=_devices(1000)[1:])
    assert inference_model._cache_bytes(mesh) == 600  # type: ignore[arg-type]
    unknown = SimpleNamespace(local_devices=_devices(None)[1:])
    with pytest.raises(UserError, match=r"the memory of unknown is not known\. Set cache_memory"):
        inference_model._cache_bytes(unknown)  # type: ignore[arg-type]


def test_the_memory_of_a_container_limits_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit, mesh = tmp_path / "memory.max", small.mesh()
    monkeypatch.setattr(inference_model, "CGROUP_MEMORY_LIMIT", limit)
    unlimited = inference_model._cache_bytes(mesh)
    limit.write_text("max\n")
    assert inference_model._cache_bytes(mesh) == unlimited
    limit.write_text("800000\n")
    assert inference_model._cache_bytes(mesh) == 200_000 // len(mesh.local_devices)
