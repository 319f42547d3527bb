"""Paged attention equals dense attention, keeps its bits, writes in place, and compiles for TPUs and GPUs.

The kernels for TPUs and GPUs run here in interpret mode. A compilation for them needs its own process, which runs this
file as a program.
"""

import functools
import json
import os
import re
import sys
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from support import small
from support.attention import compile_in_child
from support.plugins import CUDA, LIBTPU_LIBRARY, needs_cuda, needs_libtpu
from support.selection import exhaustive

from thinkpo_jax.models.attention import paged
from thinkpo_jax.models.attention.paged import (
    KEY_VALUE_AXES,
    PAGE_SIZE,
    PROMPT_AXES,
    QUERY_AXES,
    TABLE_AXES,
    PagedKernel,
    append_and_attend,
    paged_attention,
    pool_axes,
    pool_dtype,
    pool_heads,
    select_paged_kernel,
    write_prompts,
)
from thinkpo_jax.planning.topology import parse_topology
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.runtime.sharding import partition_spec

C = 16
LENGTHS = [1, 15, 16, 17, 40, 64, 65, 80]
HEADS = [(9, 3, 64), (4, 2, 8), (8, 8, 16)]
POOL_TOKENS = 64 * 1024  # of each data shard, in compiled programs
COLLECTIVE = re.compile(r"\b(?:all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)[\w-]*\(")
GARBAGE = 1e4  # in all entries of the pools that attention must not use


class Requests(NamedTuple):
    """One query per slot, and the keys and values of the slot's tokens without gaps."""

    q_SNH: np.ndarray
    k_STKH: np.ndarray
    v_STKH: np.ndarray
    lengths: np.ndarray


class Cache(NamedTuple):
    k_KPCH: jax.Array
    v_KPCH: jax.Array
    pages_SM: jax.Array


def _random_requests(lengths: list[int], heads: tuple[int, int, int], *, dtype: str = "float32") -> Requests:
    (N, K, H), S, T = heads, len(lengths), max(lengths)
    rng = np.random.default_rng(0)
    shapes = ((S, N, H), (S, T, K, H), (S, T, K, H))
    q_SNH, k_STKH, v_STKH = (np.array(jnp.array(rng.normal(size=shape), dtype)) for shape in shapes)
    return Requests(q_SNH, k_STKH, v_STKH, np.array(lengths))


def _paginate(requests: Requests, *, max_pages: int = 5, seed: int = 0, head_dim: int | None = None) -> Cache:
    """Puts the tokens of requests on random pages. Every other entry of the pools is garbage."""
    S, _, K, H = requests.k_STKH.shape
    order = np.random.default_rng(seed).permutation(S * max_pages) + 1
    pages_SM = np.zeros((S, max_pages), np.int32)
    pools = np.full((2, K, len(order) + 1, C, head_dim or H), GARBAGE, np.float32)
    pools[..., H:] = 0
    for s, length in enumerate(requests.lengths):
        held = -(-length // C)
        pages_SM[s, :held] = order[s * max_pages :][:held]
        for t in range(length):
            for pool, tokens in zip(pools, (requests.k_STKH, requests.v_STKH), strict=True):
                pool[:, pages_SM[s, t // C], t % C, :H] = tokens[s, t]
    return Cache(jnp.array(pools[0]), jnp.array(pools[1]), jnp.array(pages_SM))


def _for_kernel(pool_KPCH: jax.Array, kernel: PagedKernel) -> jax.Array:
    """Joins the heads of a pool if the kernel wants that."""
    K, P, _, H = pool_KPCH.shape
    heads, width = pool_heads(kernel, K, H)
    return pool_KPCH if heads == K else jnp.moveaxis(pool_KPCH, 0, 2).reshape(heads, P, C, width)


def _dense(requests: Requests) -> np.ndarray:
    q, k, v = (jnp.asarray(array, jnp.float32) for array in requests[:3])
    out = jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=jnp.array(requests.lengths))
    return np.asarray(out[:, 0])


def _attend(requests: Requests, kernel: PagedKernel, **layout: Any) -> np.ndarray:
    cache, lengths = _paginate(requests, **layout), jnp.array(requests.lengths, jnp.int32)
    dtype = pool_dtype(kernel, requests.q_SNH.dtype)
    k_KPCH, v_KPCH = (_for_kernel(pool, kernel).astype(dtype) for pool in (cache.k_KPCH, cache.v_KPCH))
    attend = jax.jit(paged_attention, static_argnames="kernel")
    out = attend(jnp.array(requests.q_SNH), k_KPCH, v_KPCH, lengths, cache.pages_SM, kernel=kernel)
    assert out.dtype == requests.q_SNH.dtype
    return np.asarray(out, np.float32)


@pytest.mark.parametrize(
    ("kernel", "heads", "dtype"),
    [(k, h, d) for k in ("loop", "batched") for h in HEADS for d in ("float32", "bfloat16")],
)
def test_plain_xla_equals_dense_attention(kernel: PagedKernel, heads: tuple[int, int, int], dtype: str) -> None:
    requests = _random_requests(LENGTHS, heads, dtype=dtype)
    tolerance = 2e-6 if dtype == "float32" else 0.02
    np.testing.assert_allclose(_attend(requests, kernel), _dense(requests), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("heads", [(9, 3, 64), (8, 1, 128)], ids=str)
def test_the_tpu_kernel_equals_dense_attention(heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second heads fill a tile of 8 query heads, for which the kernel has another path."""
    monkeypatch.setattr(paged, "TPU_BLOCK_TOKENS", 2 * C)
    requests = _random_requests([1, 17, 80], heads, dtype="bfloat16")
    with pltpu.force_tpu_interpret_mode():
        out = _attend(requests, "pallas_tpu", head_dim=pool_heads("pallas_tpu", *heads[1:])[1])
    np.testing.assert_allclose(out, _dense(requests), atol=0.01, rtol=0.01)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 0.02)])
def test_the_gpu_kernel_equals_dense_attention(dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since jax 0.11
        gpu_kernels = pytest.importorskip(paged.GPU_KERNEL_MODULE)
    interpreted = functools.partial(gpu_kernels.paged_attention, interpret=True)
    monkeypatch.setattr(gpu_kernels, "paged_attention", interpreted)
    monkeypatch.setattr(paged, "GPU_BLOCK_TOKENS", 2 * C)
    requests = _random_requests([1, 17, 80], (3, 1, 16), dtype=dtype)
    np.testing.assert_allclose(_attend(requests, "pallas_gpu"), _dense(requests), atol=tolerance, rtol=tolerance)


def test_the_bits_of_a_slot_do_not_depend_on_the_rest() -> None:
    requests = _random_requests(LENGTHS, (9, 3, 64))
    expected = _attend(requests, "loop")
    for S, max_pages in ((8, 7), (12, 5), (16, 9), (64, 6)):
        rows = np.random.default_rng(S).integers(0, len(LENGTHS), S)
        placed = Requests(*(array[rows] for array in requests))
        np.testing.assert_array_equal(_attend(placed, "loop", max_pages=max_pages, seed=S), expected[rows])


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head_dim", "kernel"),
    [
        ("cpu", None, "bfloat16", 64, "loop"),
        ("tpu", None, "bfloat16", 64, "pallas_tpu"),
        ("tpu", None, "float32", 128, "pallas_tpu"),
        ("gpu", "9.0", "bfloat16", 64, "pallas_gpu"),
        ("cuda", "8.0", "bfloat16", 128, "pallas_gpu"),
        ("gpu", "7.5", "bfloat16", 64, "batched"),
        ("gpu", "gfx942", "bfloat16", 64, "batched"),
        ("gpu", "9.0", "float16", 64, "batched"),
        ("gpu", "9.0", "float32", 64, "batched"),
        ("gpu", "9.0", "bfloat16", 80, "batched"),
        ("METAL", None, "float32", 64, "batched"),
    ],
)
def test_each_device_gets_its_kernel(
    platform: str, capability: str | None, dtype: str, head_dim: int, kernel: PagedKernel
) -> None:
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert select_paged_kernel(device, head_dim=head_dim, dtype=dtype) == kernel


def test_pools_fit_the_kernel() -> None:
    kernels: tuple[PagedKernel, ...] = ("loop", "batched", "pallas_tpu", "pallas_gpu")
    assert [pool_heads(kernel, 3, 64) for kernel in kernels] == [(1, 192), (1, 192), (3, 128), (3, 64)]
    assert [pool_heads("pallas_tpu", 2, head_dim)[1] for head_dim in (8, 64, 128, 160)] == [128, 128, 128, 256]
    assert [pool_dtype(kernel, "bfloat16") for kernel in kernels] == ["float32", "bfloat16", "bfloat16", "bfloat16"]


def test_a_single_head_per_device_is_padded_for_tpus() -> None:
    zeros = jnp.zeros((1, 3, C, 128))
    ones = jnp.ones((1, C, 1, 64))
    written, _ = write_prompts(zeros, zeros, ones, ones, jnp.array([[1]]), "pallas_tpu")
    np.testing.assert_array_equal(written[0, 1].sum(axis=-1), np.full(C, 64))


def _decode(
    q_XSNH: jax.Array, k_XSKH: jax.Array, v_XSKH: jax.Array, cache: Cache, positions: jax.Array, kernel: PagedKernel
) -> tuple[jax.Array, Cache]:
    """Decodes X tokens per slot in a loop. A slot at a negative position is idle: it stays at position 0."""
    is_idle = positions < 0

    def step(x: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        out_XSNH, (k_KPCH, v_KPCH, pages_SM) = carry
        tokens = (q_XSNH[x], k_XSKH[x], v_XSKH[x])
        position = jnp.where(is_idle, 0, positions + x)
        out, k_KPCH, v_KPCH = append_and_attend(*tokens, k_KPCH, v_KPCH, position, pages_SM, kernel)
        return out_XSNH.at[x].set(out), Cache(k_KPCH, v_KPCH, pages_SM)

    return jax.lax.fori_loop(0, len(q_XSNH), step, (jnp.zeros_like(q_XSNH), cache))


def _decode_inputs(prompts: list[int], steps: int, heads: tuple[int, int, int]) -> tuple[Requests, list[jax.Array]]:
    """Returns requests with prompts of these lengths (-1: idle), and the inputs of their next steps."""
    requests = _random_requests([max(prompt, 0) + steps for prompt in prompts], heads)
    q_XSNH = np.random.default_rng(1).normal(size=(steps, *requests.q_SNH.shape))
    slots, positions = np.arange(len(prompts)), np.maximum(prompts, 0) + np.arange(steps)[:, None]
    inputs = (q_XSNH, requests.k_STKH[slots, positions], requests.v_STKH[slots, positions])
    return requests, [jnp.array(array, jnp.float32) for array in inputs]


def _write(requests: Requests, cache: Cache, prompts: list[int], kernel: PagedKernel = "loop") -> Cache:
    """Writes the prompts to pools of zeros. Padding of the prompts goes to page 0."""
    T = -(-max(prompts) // C) * C
    k_RTKH, v_RTKH = (jnp.array(x[:, :T], jnp.float32) for x in (requests.k_STKH, requests.v_STKH))
    held_RM = np.arange(T // C) * C < np.array(prompts)[:, None]
    pages_RM = jnp.where(held_RM, cache.pages_SM[:, : T // C], 0)
    zeros = jnp.zeros_like(_for_kernel(cache.k_KPCH, kernel))
    write = jax.jit(write_prompts, static_argnames="kernel", donate_argnums=(0, 1))
    k_KPCH, v_KPCH = write(zeros, zeros.copy(), k_RTKH, v_RTKH, pages_RM, kernel=kernel)
    return Cache(k_KPCH, v_KPCH, cache.pages_SM)


def _check_decode(out_XSNH: jax.Array, q_XSNH: jax.Array, requests: Requests, prompts: list[int]) -> None:
    is_active = np.array(prompts) >= 0
    for x in range(len(out_XSNH)):
        lengths = np.maximum(prompts, 0) + x + 1
        expected = _dense(requests._replace(q_SNH=np.asarray(q_XSNH[x]), lengths=lengths))
        np.testing.assert_allclose(out_XSNH[x][is_active], expected[is_active], atol=2e-6, rtol=2e-6)
    assert np.isfinite(out_XSNH).all()


@pytest.mark.parametrize("kernel", ["loop", "batched"])
def test_decoding_in_place_equals_dense_attention(kernel: PagedKernel) -> None:
    """Slots start at different positions, cross page boundaries, and two of them are idle."""
    prompts = [3, 30, -1, 16, 47, 1, 15, -1]
    requests, inputs = _decode_inputs(prompts, 20, (4, 2, 8))
    cache = _paginate(requests)
    cache = cache._replace(pages_SM=jnp.where(jnp.array(prompts)[:, None] < 0, 0, cache.pages_SM))
    cache = _write(requests, cache, prompts, kernel)
    decode = jax.jit(_decode, static_argnames="kernel", donate_argnames="cache")
    arguments = (*inputs, cache, jnp.array(prompts))
    memory: Any = decode.lower(*arguments, kernel=kernel).compile().memory_analysis()
    _check_decode(decode(*arguments, kernel=kernel)[0], inputs[0], requests, prompts)
    if kernel == "loop":
        assert memory.temp_size_in_bytes < cache.k_KPCH.nbytes


def test_prompts_are_written_as_whole_pages() -> None:
    prompts = [5, 16, 33, 48]
    requests = _random_requests(prompts, (4, 2, 8))
    expected = _paginate(requests)
    cache = _write(requests, expected, prompts)
    for pool, expected_pool in zip(cache[:2], expected[:2], strict=True):
        expected_array = np.asarray(_for_kernel(expected_pool, "loop"))
        is_held = expected_array != GARBAGE
        np.testing.assert_array_equal(np.asarray(pool)[is_held], expected_array[is_held])
        unused = np.setdiff1d(np.arange(pool.shape[1]), np.append(cache.pages_SM, 0))
        assert not np.asarray(pool)[:, unused].any()
    part = jnp.zeros((4, 20, 2, 8))
    with pytest.raises(AssertionError, match="20 tokens do not fill whole pages of 16"):
        write_prompts(cache.k_KPCH, cache.v_KPCH, part, part, cache.pages_SM, "loop")


def test_devices_decode_their_own_slots_and_heads() -> None:
    """Each of four data shards has its own pages. Its page table counts from the first of them."""
    prompts = [3, 30, 16, 47, 1, 15, 7, 20]
    requests, inputs = _decode_inputs(prompts, 4, (4, 2, 8))
    parts = [Requests(*(array[s : s + 2] for array in requests)) for s in range(0, 8, 2)]
    caches = [_paginate(part, seed=seed) for seed, part in enumerate(parts)]
    k_KPCH, v_KPCH = (jnp.concatenate([cache[index] for cache in caches], axis=1) for index in (0, 1))
    cache = Cache(k_KPCH, v_KPCH, jnp.concatenate([cache.pages_SM for cache in caches]))
    with jax.set_mesh(small.mesh(data=2, fsdp=2, tensor=2)):
        cache = _write(requests, cache, prompts)
        arguments = (*inputs, cache, jnp.array(prompts))
        program: Any = jax.jit(_decode, static_argnames="kernel").lower(*arguments, kernel="loop").compile()
        out_XSNH, cache = program(*arguments)
    assert cache.k_KPCH.sharding.shard_shape(cache.k_KPCH.shape) == (1, k_KPCH.shape[1] // 4, C, 8)
    assert COLLECTIVE.findall(program.as_text()) == []
    _check_decode(out_XSNH, inputs[0], requests, prompts)


MODELS = [(28, 4, 128), (12, 2, 128), (14, 2, 64), (9, 3, 64)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    [
        pytest.param("v5e:2x2", marks=needs_libtpu),
        pytest.param("v6e:2x2", marks=[needs_libtpu, exhaustive]),
        pytest.param("h100:4", marks=[needs_cuda, exhaustive]),
    ],
)
def test_kernels_compile_in_place(topology: str) -> None:
    """A program that copied a pool would need the memory of one pool, which is at least 8 MiB."""
    paths = os.pathsep.join(filter(None, [str(CUDA), os.environ.get("PYTHONPATH")]))
    programs = compile_in_child(__file__, [topology], {"PYTHONPATH": paths, "TPU_LIBRARY_PATH": str(LIBTPU_LIBRARY)})
    assert len(programs) == 2 * len(MODELS)
    for program in programs:
        assert program["kernel"] == ("pallas_gpu" if topology == "h100:4" else "pallas_tpu")
        assert program["collectives"] == []
        assert program["temporary"] < program["pool"] / 2, program
        assert program["aliased"] >= 2 * program["pool"], program


def _compile(topology: str) -> None:
    devices = parse_topology(topology).devices()
    for N, K, H in MODELS:
        tensor = 2 - K % 2
        mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=tensor), devices[: 2 * tensor])
        kernel = select_paged_kernel(devices[0], head_dim=H, dtype="bfloat16")
        with jax.set_mesh(mesh):
            for name, program in _compile_programs(kernel, mesh, (N, K, H)).items():
                memory: Any = program.memory_analysis()
                report = {"program": name, "heads": (N, K, H), "kernel": kernel}
                report |= {"temporary": memory.temp_size_in_bytes, "aliased": memory.alias_size_in_bytes}
                report["pool"] = K // tensor * POOL_TOKENS * pool_heads(kernel, K, H)[1] * 2
                print(json.dumps(report | {"collectives": COLLECTIVE.findall(program.as_text())}), flush=True)


def _compile_programs(kernel: PagedKernel, mesh: Mesh, heads: tuple[int, int, int]) -> dict[str, Any]:
    """Compiles the decode loop and the write of prompts for slots of up to 4096 tokens."""
    (N, K, H), page = heads, PAGE_SIZE
    pool_K, pool_H = pool_heads(kernel, K, H)

    def abstract(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))

    pool = abstract((pool_K, 2 * POOL_TOKENS // page, page, pool_H), pool_axes(kernel))
    tables, positions = abstract((64, 4096 // page), TABLE_AXES, jnp.int32), abstract((64,), ("batch",), jnp.int32)
    q, k = abstract((8, 64, N, H), (None, *QUERY_AXES)), abstract((8, 64, K, H), (None, *KEY_VALUE_AXES))
    decode = jax.jit(_decode, static_argnames="kernel", donate_argnames="cache")
    write = jax.jit(write_prompts, static_argnames="kernel", donate_argnums=(0, 1))
    prompts, rows = abstract((8, 512, K, H), PROMPT_AXES), abstract((8, 512 // page), TABLE_AXES, jnp.int32)
    return {
        "decode": decode.lower(q, k, k, Cache(pool, pool, tables), positions, kernel=kernel).compile(),
        "write": write.lower(pool, pool, prompts, prompts, rows, kernel=kernel).compile(),
    }


if __name__ == "__main__":
    _compile(sys.argv[1])
