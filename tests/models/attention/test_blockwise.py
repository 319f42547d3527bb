"""The blockwise form is the whole one, on packed rows of any shape and on meshes; its memory is linear."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support import small
from support.selection import combinations, exhaustive

from thinkpo_jax.models.attention import blockwise as attention
from thinkpo_jax.models.attention.blockwise import visible_key_blocks
from thinkpo_jax.models.attention.dense import TokenPositions, dense_attention
from thinkpo_jax.models.attention.dispatch import KEY_VALUE_AXES, QUERY_AXES, packed_attention
from thinkpo_jax.runtime.context_parallel import all_gather_rows, to_zigzag_order
from thinkpo_jax.runtime.sharding import shard_map_by_axes

BLOCK = 16
H = 8
ROWS = {
    "one long segment": [[100]],
    "many short ones": [[3, 5, 1, 7, 2, 9, 4, 6, 8, 3, 1, 1, 2, 20]],
    "long and short": [[50, 7, 30, 9]],
    "borders on blocks": [[16, 32, 16, 16]],
    "padding behind": [[20, 11]],
    "rows of their own": [[90, 6], [10, 20, 30], [1], [33, 33]],
    "a row of padding": [[40, 20], []],
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_SIZE", BLOCK)


def _places(lengths: list[list[int]], length: int) -> TokenPositions:
    segments, positions = np.zeros((2, len(lengths), length), np.int32)
    for row, of_row in enumerate(lengths):
        start = 0
        for number, count in enumerate(of_row, 1):
            segments[row, start : start + count] = number
            positions[row, start : start + count] = np.arange(count)
            start += count
    return TokenPositions(jnp.array(segments), jnp.array(positions))


Inputs = tuple[jax.Array, jax.Array, jax.Array]


def _inputs(places: TokenPositions, heads: int, kv_heads: int, dtype: str = "float32") -> Inputs:
    rng = np.random.default_rng(0)
    shape = places.segment_ids.shape
    q, k, v = (jnp.array(rng.normal(size=(*shape, count, H)), dtype) for count in (heads, kv_heads, kv_heads))
    return q, k, v


def _values_and_gradients(places: TokenPositions, inputs: Inputs, *, blocks: bool) -> list[np.ndarray]:
    """Outputs of what is no padding, and the gradients of their weighted sum."""
    real = places.segment_ids[..., None, None] > 0
    weights = jnp.array(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        if blocks:  # what comes out is balanced, too
            out = shard_map_by_axes(all_gather_rows, (QUERY_AXES,), KEY_VALUE_AXES)(
                packed_attention(to_zigzag_order(q), to_zigzag_order(k), to_zigzag_order(v), places)
            )
        else:
            out = dense_attention(q, k, v, places, places)
        out = jnp.where(real, out.astype(jnp.float32), 0.0)
        return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [np.asarray(array, np.float32) for array in (out, *gradients)]


def _is_short(name: str, length: int, heads: tuple[int, int]) -> bool:
    """Every kind of row, and every length and number of heads with one of them."""
    return name == "rows of their own" or (length == 101 and heads == (4, 2))


@pytest.mark.parametrize(
    ("name", "length", "heads"), combinations(ROWS, (96, 101), ((4, 4), (4, 2), (4, 1)), short=_is_short), ids=str
)
def test_it_is_the_whole_form(name: str, length: int, heads: tuple[int, int]) -> None:
    places = _places([[min(count, length) for count in row] for row in ROWS[name]], length)
    inputs = _inputs(places, *heads)
    expected = _values_and_gradients(places, inputs, blocks=False)
    found = _values_and_gradients(places, inputs, blocks=True)
    for a, b in zip(expected, found, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)


def test_bfloat16_operands_are_summed_in_float32() -> None:
    places = _places(ROWS["long and short"], 96)
    inputs = _inputs(places, 4, 2, "bfloat16")
    exact = _values_and_gradients(places, jax.tree.map(lambda array: array.astype(jnp.float32), inputs), blocks=False)
    for a, b in zip(exact, _values_and_gradients(places, inputs, blocks=True), strict=True):
        np.testing.assert_allclose(b, a, atol=0.03 * float(np.abs(a).max()))


MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4},
    {"tensor": 2},
    {"context": 2},
    {"context": 4, "tensor": 2},
    {"fsdp": 2, "context": 2},
]


# Chunks of whole blocks, and of parts of blocks.
@pytest.mark.parametrize(
    ("sizes", "length"),
    combinations(MESHES, (96, 208), short=lambda sizes, length: length == 208 or sizes == {"context": 2}),
    ids=str,
)
def test_a_mesh_changes_nothing(sizes: dict[str, int], length: int) -> None:
    places = _places([*ROWS["rows of their own"][:3], [33, length - 40]], length)
    inputs = _inputs(places, 4, 2)
    expected = _values_and_gradients(places, inputs, blocks=True)
    mesh: Mesh = small.mesh(**sizes)
    with jax.set_mesh(mesh):
        found = _values_and_gradients(places, inputs, blocks=True)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "block"), [(4096, 64), pytest.param(32_768, 256, marks=exhaustive)])
def test_long_rows_over_eight_devices(length: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_SIZE", block)
    places = _places([[length * share // 1000 for share in (610, 275, 21, 91)]], length)
    inputs = _inputs(places, 2, 1)
    expected = _values_and_gradients(places, inputs, blocks=True)
    with jax.set_mesh(small.mesh(context=8)):
        found = _values_and_gradients(places, inputs, blocks=True)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * max(1.0, float(np.abs(a).max())))


def test_rows_that_are_split_are_short_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_SIZE", 96)
    test_a_mesh_changes_nothing({"context": 4, "tensor": 2}, 96)


def test_bounds_are_those_of_the_mask() -> None:
    for rows in ROWS.values():
        places = _places([[min(count, 96) for count in row] for row in rows], 96)
        for segments, positions in zip(np.asarray(places.segment_ids), np.asarray(places.positions), strict=True):
            seen = (segments[:, None] == segments[None]) & (np.arange(96)[:, None] >= np.arange(96))
            seen &= segments[:, None] > 0
            row = TokenPositions(jnp.array(segments), jnp.array(positions))
            for starts in ([0], [0, 80], [16, 64]):  # a whole row, and what devices hold of one that is split
                length = 96 if len(starts) == 1 else 2 * BLOCK
                found = map(np.asarray, visible_key_blocks(row, jnp.array(starts), length))
                firsts = np.concatenate([np.arange(start, start + length // len(starts), BLOCK) for start in starts])
                for first, low, high in zip(firsts, *found, strict=True):
                    blocks = seen[first : first + BLOCK].reshape(BLOCK, 6, BLOCK).any(axis=(0, 2))
                    assert high == first // BLOCK
                    assert low == (blocks.argmax() if blocks.any() else high + 1)
                    assert not blocks.any() or high == np.flatnonzero(blocks).max()


def test_blocks_of_other_segments_are_never_read() -> None:
    """NaN in them would reach what reads them, also where a mask takes the score away."""
    places = _places([[32, 40, 24]], 96)
    inputs = _inputs(places, 4, 2)
    clean = _values_and_gradients(places, inputs, blocks=True)[0]
    broken = jax.tree.map(lambda array: array.at[:, :32].set(jnp.nan), inputs)
    found = _values_and_gradients(places, broken, blocks=True)[0]
    assert np.isnan(found[0, :32]).all()
    np.testing.assert_array_equal(found[0, 32:], clean[0, 32:])


def test_memory_grows_with_the_row_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_SIZE", 64)

    def temporary(length: int, *, blocks: bool) -> int:
        places = _places([[length // 2, length // 3]], length)

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return (packed_attention(q, k, v, places) if blocks else dense_attention(q, k, v, places, places)).sum()

        program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*_inputs(places, 4, 2)).compile()
        memory: Any = program.memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary(8192, blocks=True) < 5 * temporary(2048, blocks=True)
    assert temporary(2048, blocks=True) < temporary(2048, blocks=False) / 10


def test_short_rows_are_computed_whole_and_a_cache_may_have_any_order() -> None:
    places = _places([[10, 6]], BLOCK)
    inputs = _inputs(places, 4, 2)
    longer = _places(ROWS["long and short"], 96)
    np.testing.assert_array_equal(dense_attention(*inputs, places, places), packed_attention(*inputs, places))
    cached = jax.tree.map(lambda array: array[:, ::-1], longer)  # whatever the order in which keys are kept
    q, k, v = _inputs(longer, 4, 2)
    expected, found = packed_attention(q, k, v, longer), dense_attention(q, k[:, ::-1], v[:, ::-1], longer, cached)
    np.testing.assert_allclose(found, expected, atol=2e-6)
