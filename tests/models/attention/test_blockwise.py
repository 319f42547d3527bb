"""Blockwise attention equals dense attention on packed rows and on meshes, and its memory is linear."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support import small
from support.attention import Inputs, packed_positions, random_inputs
from support.selection import combinations, exhaustive

from thinkpo_jax.models.attention import blockwise
from thinkpo_jax.models.attention.blockwise import TokenPositions, dense_attention, visible_key_blocks
from thinkpo_jax.models.attention.dispatch import KEY_VALUE_AXES, QUERY_AXES, packed_attention
from thinkpo_jax.runtime.context_parallel import all_gather_rows, to_zigzag_order
from thinkpo_jax.runtime.sharding import shard_map_by_axes

BLOCK = 16
ROWS = {  # segment lengths
    "one long segment": [[100]],
    "many short segments": [[3, 5, 1, 7, 2, 9, 4, 6, 8, 3, 1, 1, 2, 20]],
    "long and short": [[50, 7, 30, 9]],
    "segments that end with blocks": [[16, 32, 16, 16]],
    "padding at the end": [[20, 11]],
    "rows that differ": [[90, 6], [10, 20, 30], [1], [33, 33]],
    "a row of padding": [[40, 20], []],
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK_SIZE", BLOCK)


def _outputs_and_gradients(positions: TokenPositions, inputs: Inputs, *, is_blockwise: bool) -> list[np.ndarray]:
    """Returns outputs without padding, and the gradients of their weighted sum."""
    real = positions.segment_ids[..., None, None] > 0
    weights = jnp.array(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        if is_blockwise:  # its outputs are in zigzag order
            out = shard_map_by_axes(all_gather_rows, (QUERY_AXES,), KEY_VALUE_AXES)(
                packed_attention(to_zigzag_order(q), to_zigzag_order(k), to_zigzag_order(v), positions)
            )
        else:
            out = dense_attention(q, k, v, positions, positions)
        out = jnp.where(real, out.astype(jnp.float32), 0.0)
        return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [np.asarray(array, np.float32) for array in (out, *gradients)]


def _is_short(name: str, length: int, heads: tuple[int, int]) -> bool:
    """Selects all lengths and numbers of heads for one kind of rows, and one combination for each other kind."""
    return name == "rows that differ" or (length == 101 and heads == (4, 2))


@pytest.mark.parametrize(
    ("name", "length", "heads"), combinations(ROWS, (96, 101), ((4, 4), (4, 2), (4, 1)), short=_is_short), ids=str
)
def test_outputs_and_gradients_equal_dense_attention(name: str, length: int, heads: tuple[int, int]) -> None:
    positions = packed_positions([[min(count, length) for count in row] for row in ROWS[name]], length)
    inputs = random_inputs(len(ROWS[name]), length, length, heads=heads[0], kv_heads=heads[1])
    expected = _outputs_and_gradients(positions, inputs, is_blockwise=False)
    actual = _outputs_and_gradients(positions, inputs, is_blockwise=True)
    for a, b in zip(expected, actual, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)


def test_bfloat16_operands_are_summed_in_float32() -> None:
    positions = packed_positions(ROWS["long and short"], 96)
    inputs = random_inputs(1, 96, 96, dtype="bfloat16")
    float32_inputs = jax.tree.map(lambda array: array.astype(jnp.float32), inputs)
    exact = _outputs_and_gradients(positions, float32_inputs, is_blockwise=False)
    for a, b in zip(exact, _outputs_and_gradients(positions, inputs, is_blockwise=True), strict=True):
        np.testing.assert_allclose(b, a, atol=0.03 * float(np.abs(a).max()))


MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4},
    {"tensor": 2},
    {"context": 2},
    {"context": 4, "tensor": 2},
    {"fsdp": 2, "context": 2},
]


# With these lengths, devices hold chunks of whole blocks or of parts of blocks.
@pytest.mark.parametrize(
    ("sizes", "length"),
    combinations(MESHES, (96, 208), short=lambda sizes, length: length == 208 or sizes == {"context": 2}),
    ids=str,
)
def test_a_mesh_does_not_change_results(sizes: dict[str, int], length: int) -> None:
    positions = packed_positions([*ROWS["rows that differ"][:3], [33, length - 40]], length)
    inputs = random_inputs(4, length, length)
    expected = _outputs_and_gradients(positions, inputs, is_blockwise=True)
    mesh: Mesh = small.mesh(**sizes)
    with jax.set_mesh(mesh):
        actual = _outputs_and_gradients(positions, inputs, is_blockwise=True)
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "block"), [(4096, 64), pytest.param(32_768, 256, marks=exhaustive)])
def test_eight_devices_do_not_change_results_of_long_rows(
    length: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "BLOCK_SIZE", block)
    positions = packed_positions([[length * share // 1000 for share in (610, 275, 21, 91)]], length)
    inputs = random_inputs(1, length, length, heads=2, kv_heads=1)
    expected = _outputs_and_gradients(positions, inputs, is_blockwise=True)
    with jax.set_mesh(small.mesh(context=8)):
        actual = _outputs_and_gradients(positions, inputs, is_blockwise=True)
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * max(1.0, float(np.abs(a).max())))


def test_a_mesh_does_not_change_results_of_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK_SIZE", 96)
    test_a_mesh_does_not_change_results({"context": 4, "tensor": 2}, 96)


def test_visible_key_blocks_match_the_mask() -> None:
    for rows in ROWS.values():
        packed = packed_positions([[min(count, 96) for count in row] for row in rows], 96)
        for segments, positions in zip(np.asarray(packed.segment_ids), np.asarray(packed.positions), strict=True):
            visible = (segments[:, None] == segments[None]) & (np.arange(96)[:, None] >= np.arange(96))
            visible &= segments[:, None] > 0
            row = TokenPositions(jnp.array(segments), jnp.array(positions))
            for starts in ([0], [0, 80], [16, 64]):  # a whole row, and the chunks of two devices
                length = 96 if len(starts) == 1 else 2 * BLOCK
                bounds = map(np.asarray, visible_key_blocks(row, jnp.array(starts), length))
                tokens = np.concatenate([np.arange(start, start + length // len(starts), BLOCK) for start in starts])
                for token, first, last in zip(tokens, *bounds, strict=True):
                    blocks = visible[token : token + BLOCK].reshape(BLOCK, 6, BLOCK).any(axis=(0, 2))
                    assert last == token // BLOCK
                    assert first == (blocks.argmax() if blocks.any() else last + 1)
                    assert not blocks.any() or last == np.flatnonzero(blocks).max()


def test_blocks_of_other_segments_are_never_read() -> None:
    """NaN in these blocks would reach the results if they were read, even behind a mask."""
    positions, inputs = packed_positions([[32, 40, 24]], 96), random_inputs(1, 96, 96)
    clean = _outputs_and_gradients(positions, inputs, is_blockwise=True)[0]
    inputs_with_nan = jax.tree.map(lambda array: array.at[:, :32].set(jnp.nan), inputs)
    outputs = _outputs_and_gradients(positions, inputs_with_nan, is_blockwise=True)[0]
    assert np.isnan(outputs[0, :32]).all()
    np.testing.assert_array_equal(outputs[0, 32:], clean[0, 32:])


def test_memory_is_linear_in_the_row_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK_SIZE", 64)

    def temporary_bytes(length: int, *, is_blockwise: bool) -> int:
        positions = packed_positions([[length // 2, length // 3]], length)

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            if is_blockwise:
                return packed_attention(q, k, v, positions).sum()
            return dense_attention(q, k, v, positions, positions).sum()

        program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*random_inputs(1, length, length)).compile()
        memory: Any = program.memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary_bytes(8192, is_blockwise=True) < 5 * temporary_bytes(2048, is_blockwise=True)
    assert temporary_bytes(2048, is_blockwise=True) < temporary_bytes(2048, is_blockwise=False) / 10


def test_short_rows_use_dense_attention() -> None:
    positions, inputs = packed_positions([[10, 6]], BLOCK), random_inputs(1, BLOCK, BLOCK)
    expected = dense_attention(*inputs, positions, positions)
    np.testing.assert_array_equal(expected, packed_attention(*inputs, positions))


def test_dense_attention_accepts_keys_in_any_order() -> None:
    positions = packed_positions(ROWS["long and short"], 96)
    reversed_positions = jax.tree.map(lambda array: array[:, ::-1], positions)
    q, k, v = random_inputs(1, 96, 96)
    outputs = dense_attention(q, k[:, ::-1], v[:, ::-1], positions, reversed_positions)
    np.testing.assert_allclose(outputs, packed_attention(q, k, v, positions), atol=2e-6)
