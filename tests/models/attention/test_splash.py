"""Splash attention equals dense attention, skips blocks of other segments, and compiles for TPUs.

The kernel runs here in interpret mode. A compilation for TPUs needs its own process, which runs this file as a program.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from support.attention import (
    Attend,
    Inputs,
    attention_kernel_calls,
    compile_attention,
    compile_in_child,
    packed_positions,
    random_inputs,
)
from support.plugins import LIBTPU_LIBRARY, needs_libtpu
from support.selection import cases, combinations, exhaustive

from thinkpo_jax.models.attention import splash
from thinkpo_jax.models.attention.blockwise import ATTENTION_OUTPUT, TokenPositions, dense_attention
from thinkpo_jax.models.attention.dispatch import select_kernel
from thinkpo_jax.models.attention.splash import (
    PADDING_SEGMENT_ID,
    block_sizes,
    mask_infos,
    splash_attention,
    visible_blocks,
)
from thinkpo_jax.planning.topology import list_slices
from thinkpo_jax.runtime.config import UserError

S = 512
ROWS = [[500], [60, 100, 3, 30, 1, 200, 50], [128, 256, 128], [300, 90], [1], []]  # segment lengths
# Indices of a device's queries in the row: all of them, or two of the row's four chunks.
ORDERS = {"whole": np.arange(S), "outer": np.r_[0:128, 384:512], "inner": np.r_[128:384]}
CHIPS = [("v5e", 28, 4, 128), ("v5e", 14, 2, 64), ("v5p", 28, 4, 128), ("v6e", 28, 4, 128)]
SHORT_CHIPS = [("v6e", 28, 4, 128)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash, "BLOCK_SIZES", (256, 128))
    monkeypatch.setattr(splash, "MAX_COMPUTE_BLOCK", 128)


def _segment_ids() -> list[jax.Array]:
    """Returns the segment ids of each row as the kernel sees them."""
    return [jnp.where(ids > 0, ids, PADDING_SEGMENT_ID) for ids in packed_positions(ROWS, S).segment_ids]


def _outputs_and_gradients(attend: Attend, inputs: Inputs, segments: tuple[jax.Array, jax.Array]) -> list[np.ndarray]:
    """Returns outputs and gradients of their weighted sum, with 0 for padding. Checks that padding is finite."""
    weights = jnp.array(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v)
        return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    queries, keys = (ids[..., None, None] > 0 for ids in segments)
    arrays: list[np.ndarray] = []
    for array, real in zip((out, *gradients), (queries, queries, keys, keys), strict=True):
        assert np.isfinite(array).all()
        arrays.append(np.asarray(jnp.where(real, array, 0.0)))
    return arrays


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("order", "heads", "fused"),
    [
        *combinations(ORDERS, [(4, 2)], (True, False), short=lambda order, _, fused: fused == (order == "outer")),
        ("whole", (2, 2), True),
        pytest.param("whole", (3, 1), False, marks=exhaustive),
    ],
    ids=str,
)
def test_outputs_and_gradients_equal_dense_attention(
    order: str, heads: tuple[int, int], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splash, "MAX_FUSED_BACKWARD_BLOCKS", 4 if fused else 0)
    order_T = jnp.asarray(ORDERS[order], jnp.int32)
    assert block_sizes(len(order_T), S).use_fused_bwd_kernel == fused
    keys = packed_positions(ROWS, S)
    queries = TokenPositions(keys.segment_ids[:, order_T], keys.positions[:, order_T])
    inputs = random_inputs(len(ROWS), len(order_T), S, heads=heads[0], kv_heads=heads[1])
    segments = (queries.segment_ids, keys.segment_ids)
    expected = _outputs_and_gradients(lambda q, k, v: dense_attention(q, k, v, queries, keys), inputs, segments)
    actual = _outputs_and_gradients(
        lambda q, k, v: splash_attention(q, k, v, keys.segment_ids, order_T, interpret=True), inputs, segments
    )
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("small_blocks")
def test_two_devices_that_split_rows_equal_dense_attention() -> None:
    """The first device has the outer chunks and the second the inner chunks. Each computes its order at run time."""
    keys = packed_positions(ROWS[1:3], S)
    order = np.r_[ORDERS["outer"], ORDERS["inner"]]
    queries = TokenPositions(keys.segment_ids[:, order], keys.positions[:, order])
    inputs, segments = random_inputs(2, S, S), (queries.segment_ids, keys.segment_ids)
    mesh = Mesh(np.array(jax.devices()[:2]), ("context",), axis_types=(AxisType.Auto,))
    split, replicated = PartitionSpec(None, "context"), PartitionSpec()

    def shard(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        device = jax.lax.axis_index("context")
        order_T = (jnp.stack([device, 3 - device])[:, None] * 128 + jnp.arange(128)[None]).reshape(-1)
        return splash_attention(q, k, v, keys.segment_ids, order_T, interpret=True)

    in_specs = (split, replicated, replicated)
    split_attention = jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)
    expected = _outputs_and_gradients(lambda q, k, v: dense_attention(q, k, v, queries, keys), inputs, segments)
    for a, b in zip(expected, _outputs_and_gradients(split_attention, inputs, segments), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("blocks", [(128, 128), (128, 256), (64, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_exactly_the_blocks_with_visible_keys_are_computed(order: str, blocks: tuple[int, int]) -> None:
    order_T = ORDERS[order]
    for segments, ids in zip(np.asarray(packed_positions(ROWS, S).segment_ids), _segment_ids(), strict=True):
        visible = (segments[order_T][:, None] == segments[None]) & (order_T[:, None] >= np.arange(S)[None])
        visible &= segments[None] > 0
        visible |= order_T[:, None] == np.arange(S)[None]  # padding sees itself
        expected = visible.reshape(len(order_T) // blocks[0], blocks[0], S // blocks[1], blocks[1]).any(axis=(1, 3))
        visible_XY = visible_blocks(ids[order_T], ids, jnp.asarray(order_T), blocks)
        for info in mask_infos(visible_XY, jnp.asarray(order_T)):
            assert info.block_mask is not None
            np.testing.assert_array_equal(np.asarray(info.block_mask[0]), expected)


def test_blocks_that_are_skipped_are_not_loaded() -> None:
    """Each pass through the grid loads at most as many blocks as it computes."""
    for ids in _segment_ids():
        order = jnp.arange(S)
        by_queries, by_keys = mask_infos(visible_blocks(ids, ids, order, (64, 64)), order)
        for info, passes in ((by_queries, lambda x: x[0].reshape(1, -1)), (by_keys, lambda x: x[0].T)):
            for loaded, computed in zip(
                passes(np.asarray(info.data_next)), passes(np.asarray(info.block_mask)), strict=True
            ):
                index = np.tile(np.arange(8), len(loaded) // 8)
                np.testing.assert_array_equal(loaded[computed > 0], index[computed > 0])
                assert 1 + np.count_nonzero(np.diff(loaded)) <= computed.sum()


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_other_segments_are_never_read() -> None:
    """NaN in these blocks would reach the results if they were read, even behind a mask."""
    segments, order = packed_positions([[256, 200]], S).segment_ids, jnp.arange(S)
    inputs = jax.tree.map(lambda array: array.at[:, :256].set(jnp.nan), random_inputs(1, S, S))

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = splash_attention(q, k, v, segments, order, interpret=True)
        return out[:, 256:].sum(), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    for array in (out, *gradients):
        assert np.isnan(array[:, :256]).any()
        assert np.isfinite(array[:, 256:]).all()


@pytest.mark.parametrize(
    ("queries", "keys", "blocks"),
    [(8192, 8192, (1024, 1024)), (9472, 9472, (256, 256)), (4096, 8192, (1024, 1024)), (2304, 9216, (128, 1024))],
)
def test_blocks_are_the_largest_that_divide_the_rows(queries: int, keys: int, blocks: tuple[int, int]) -> None:
    sizes = block_sizes(queries, keys)
    assert (sizes.block_q, sizes.block_kv) == (sizes.block_q_dkv, sizes.block_kv_dkv) == blocks
    assert sizes.use_fused_bwd_kernel == (keys // blocks[1] <= 8)


@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (128, 256), (257, 1024)])
def test_rows_that_no_block_divides_are_rejected(queries: int, keys: int) -> None:
    with pytest.raises(UserError, match=rf"Rows of {keys} tokens.* a row length that 128 divides"):
        block_sizes(queries, keys)


def test_splash_is_rejected_for_other_devices_and_row_lengths() -> None:
    def select(platform: str, length: int, context: int = 1) -> str:
        device = SimpleNamespace(platform=platform, device_kind="a device")
        return select_kernel("splash", device, dtype="bfloat16", head_dim=128, context=context, lengths=[1024, length])

    assert select("tpu", 640) == "splash"
    with pytest.raises(UserError, match=r"`splash`, but splash attention needs a TPU \(found a device\)"):
        select("cpu", 640)
    with pytest.raises(UserError, match=r"a multiple of 512 on this mesh \(found 640\). Set row_length to 1024"):
        select("tpu", 640, context=2)


def test_remat_recomputes_attention_only_if_its_output_is_not_saved() -> None:
    segments = jnp.ones((2, 256), jnp.int32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return splash_attention(q, k, v, segments, jnp.arange(256), name=ATTENTION_OUTPUT)

    for saved_names, forward_calls in (((ATTENTION_OUTPUT,), 1), ((), 2)):
        calls = attention_kernel_calls(attend, saved_names)
        assert sum("_fwd" in name for name in calls) == forward_calls
        assert len(calls) == forward_calls + 1


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "chip", cases(CHIPS, short=SHORT_CHIPS.__contains__), ids=lambda chip: "-".join(map(str, chip))
)
def test_splash_compiles_and_its_memory_is_linear(chip: tuple[str, int, int, int]) -> None:
    short, long = compile_in_child(__file__, [*map(str, chip)], {"TPU_LIBRARY_PATH": str(LIBTPU_LIBRARY)})
    query_bytes = 8192 * chip[1] * 128 * 2  # in bfloat16. The memory layout pads narrower heads to 128.
    assert short["temporary"] < 12 * query_bytes
    assert long["temporary"] < 4 * short["temporary"]


def _compile(chip: str, heads: int, kv_heads: int, head_dim: int) -> None:
    device = list_slices(chip)[0].devices()[0]
    for length in (8192, 32_768):
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            "q": ((1, length, heads, head_dim), jnp.bfloat16),
            "k": ((1, length, kv_heads, head_dim), jnp.bfloat16),
            "v": ((1, length, kv_heads, head_dim), jnp.bfloat16),
            "segments": ((1, length), jnp.int32),
            "order": ((length,), jnp.int32),
        }
        memory = compile_attention(device, splash_attention, arrays).memory_analysis()
        print(json.dumps({"length": length, "temporary": memory.temp_size_in_bytes}), flush=True)


if __name__ == "__main__":
    _compile(sys.argv[1], *map(int, sys.argv[2:]))
