"""The kernels of TPU and GPU attend as plain XLA does, skip what segments allow, and compile for devices not there.

The TPU's runs here step by step (interpreted). cuDNN's cannot: what it is given is tested. Each compilation is a
process of its own: this file, run as a program.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from support.plugins import CUDA, LIBTPU_LIBRARY, needs_cuda, needs_libtpu
from support.selection import cases, combinations, exhaustive

from thinkpo_jax.models.attention import cudnn as cudnn_module
from thinkpo_jax.models.attention import splash as splash_module
from thinkpo_jax.models.attention.cudnn import cudnn_attention, segment_starts
from thinkpo_jax.models.attention.dense import ATTENTION_OUTPUT, TokenPositions, dense_attention
from thinkpo_jax.models.attention.dispatch import AttentionKernel, select_kernel
from thinkpo_jax.models.attention.splash import (
    PADDING_SEGMENT_ID,
    _by_keys,
    _by_queries,
    block_sizes,
    splash_attention,
    visible_blocks,
)
from thinkpo_jax.planning.compile import ENVIRONMENT
from thinkpo_jax.planning.topology import list_slices, parse_topology
from thinkpo_jax.runtime.config import UserError

S, H = 512, 8
ROWS = [  # tokens of the segments of each row
    [500],
    [60, 100, 3, 30, 1, 200, 50],
    [128, 256, 128],
    [300, 90],
    [1],
    [],
]
# Where a device's queries stand: the whole row, or one of two shares of its four stretches.
ORDERS = {"whole": np.arange(S), "outer": np.r_[0:128, 384:512], "inner": np.r_[128:384]}

FUSED_CALLS = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
CHIPS = [("v5e", 28, 4, 128), ("v5e", 14, 2, 64), ("v5p", 28, 4, 128), ("v6e", 28, 4, 128)]
SHORT_CHIPS = [("v5e", 14, 2, 64), ("v6e", 28, 4, 128)]

Inputs = tuple[jax.Array, jax.Array, jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash_module, "BLOCK_SIZES", (256, 128))
    monkeypatch.setattr(splash_module, "MAX_COMPUTE_BLOCK", 128)


def _places(lengths: list[list[int]]) -> TokenPositions:
    segments, positions = np.zeros((2, len(lengths), S), np.int32)
    for row, of_row in enumerate(lengths):
        segments[row, : sum(of_row)] = np.repeat(np.arange(1, len(of_row) + 1), of_row)
        positions[row, : sum(of_row)] = np.concatenate([np.arange(0), *map(np.arange, of_row)])
    return TokenPositions(jnp.array(segments), jnp.array(positions))


def _inputs(rows: int, queries: int, heads: int = 4, kv_heads: int = 2) -> Inputs:
    rng = np.random.default_rng(0)
    shapes = ((rows, queries, heads, H), (rows, S, kv_heads, H), (rows, S, kv_heads, H))
    q, k, v = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return q, k, v


def _values_and_gradients(attend: Attend, inputs: Inputs, segments: tuple[jax.Array, jax.Array]) -> list[np.ndarray]:
    """Outputs and gradients of their weighted sum, of what is no padding; that of padding is finite."""
    weights = jnp.array(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v)
        return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    queries, keys = (ids[..., None, None] > 0 for ids in segments)
    found: list[np.ndarray] = []
    for array, real in zip((out, *gradients), (queries, queries, keys, keys), strict=True):
        assert np.isfinite(array).all()
        found.append(np.asarray(jnp.where(real, array, 0.0)))
    return found


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
def test_splash_is_the_whole_form(
    order: str, heads: tuple[int, int], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splash_module, "MAX_FUSED_BACKWARD_BLOCKS", 4 if fused else 0)
    places = jnp.asarray(ORDERS[order], jnp.int32)
    assert block_sizes(len(places), S).use_fused_bwd_kernel == fused
    keys = _places(ROWS)
    queries = TokenPositions(keys.segment_ids[:, places], keys.positions[:, places])
    inputs, segments = _inputs(len(ROWS), len(places), *heads), (queries.segment_ids, keys.segment_ids)
    expected = _values_and_gradients(lambda q, k, v: dense_attention(q, k, v, queries, keys), inputs, segments)
    found = _values_and_gradients(
        lambda q, k, v: splash_attention(q, k, v, *segments, places, interpret=True), inputs, segments
    )
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("small_blocks")
def test_splash_on_two_devices_that_share_rows() -> None:
    """The first has the outer stretches, the second the inner ones; which it has it finds while the program runs."""
    keys = _places(ROWS[1:3])
    order = np.r_[ORDERS["outer"], ORDERS["inner"]]
    queries = TokenPositions(keys.segment_ids[:, order], keys.positions[:, order])
    inputs, segments = _inputs(2, S), (queries.segment_ids, keys.segment_ids)
    mesh = Mesh(np.array(jax.devices()[:2]), ("context",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec(None, "context"), PartitionSpec()

    def part(q: jax.Array, k: jax.Array, v: jax.Array, query_segments: jax.Array) -> jax.Array:
        device = jax.lax.axis_index("context")
        stretches = jnp.stack([device, 3 - device])[:, None] * 128 + jnp.arange(128)[None]
        return splash_attention(q, k, v, query_segments, keys.segment_ids, stretches.reshape(-1), interpret=True)

    shared = jax.shard_map(part, mesh=mesh, in_specs=(split, whole, whole, split), out_specs=split, check_vma=False)
    expected = _values_and_gradients(lambda q, k, v: dense_attention(q, k, v, queries, keys), inputs, segments)
    found = _values_and_gradients(lambda q, k, v: shared(q, k, v, queries.segment_ids), inputs, segments)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("blocks", [(128, 128), (128, 256), (64, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_are_computed_where_segments_need_them(order: str, blocks: tuple[int, int]) -> None:
    places = ORDERS[order]
    for segments in np.asarray(_places(ROWS).segment_ids):
        seen = (segments[places][:, None] == segments[None]) & (places[:, None] >= np.arange(S)[None])
        seen &= segments[None] > 0
        seen |= places[:, None] == np.arange(S)[None]  # padding sees itself
        needed = seen.reshape(len(places) // blocks[0], blocks[0], S // blocks[1], blocks[1]).any(axis=(1, 3))
        ids = jnp.where(jnp.asarray(segments) > 0, jnp.asarray(segments), PADDING_SEGMENT_ID)
        found = visible_blocks(ids[places], ids, jnp.asarray(places), blocks)
        for info in (_by_queries(found, jnp.asarray(places)), _by_keys(found, jnp.asarray(places))):
            assert info.block_mask is not None
            np.testing.assert_array_equal(np.asarray(info.block_mask[0]), needed)


def test_blocks_that_are_skipped_are_not_loaded() -> None:
    """Of every pass through the grid, no more blocks are asked for than are computed."""
    for segments in np.asarray(_places(ROWS).segment_ids):
        ids = jnp.where(jnp.asarray(segments) > 0, jnp.asarray(segments), PADDING_SEGMENT_ID)
        order = jnp.arange(S)
        seen = visible_blocks(ids, ids, order, (64, 64))
        by_queries, by_keys = _by_queries(seen, order), _by_keys(seen, order)
        for info, passes in ((by_queries, lambda x: x[0].reshape(1, -1)), (by_keys, lambda x: x[0].T)):
            for asked, computed in zip(
                passes(np.asarray(info.data_next)), passes(np.asarray(info.block_mask)), strict=True
            ):
                own = np.tile(np.arange(8), len(asked) // 8)
                np.testing.assert_array_equal(asked[computed > 0], own[computed > 0])
                assert 1 + np.count_nonzero(np.diff(asked)) <= computed.sum()


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_other_segments_are_never_read() -> None:
    """NaN in them would reach what reads them, also where a mask takes the score away."""
    places, order = _places([[256, 200]]), jnp.arange(S)
    inputs = jax.tree.map(lambda array: array.at[:, :256].set(jnp.nan), _inputs(1, S))

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = splash_attention(q, k, v, places.segment_ids, places.segment_ids, order, interpret=True)
        return out[:, 256:].sum(), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    for array in (out, *gradients):
        assert np.isnan(array[:, :256]).any()
        assert np.isfinite(array[:, 256:]).all()


@pytest.mark.parametrize(
    ("queries", "keys", "blocks"),
    [(8192, 8192, (1024, 1024)), (9472, 9472, (256, 256)), (4096, 8192, (1024, 1024)), (2304, 9216, (128, 1024))],
)
def test_blocks_are_the_widest_that_divide(queries: int, keys: int, blocks: tuple[int, int]) -> None:
    found = block_sizes(queries, keys)
    assert (found.block_q, found.block_kv) == (found.block_q_dkv, found.block_kv_dkv) == blocks
    assert found.use_fused_bwd_kernel == (keys // blocks[1] <= 8)


@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (128, 256), (257, 1024)])
def test_rows_that_no_block_divides_are_refused(queries: int, keys: int) -> None:
    with pytest.raises(UserError, match=rf"Rows of {keys} tokens.* a row length that 128 divides"):
        block_sizes(queries, keys)


def _primitives(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)
            elif hasattr(inner, "jaxpr"):
                yield from _primitives(inner.jaxpr)


def _kernels(attend: Attend, inputs: Any, names: tuple[str, ...]) -> list[str]:
    """The kernels that both passes call where remat keeps the values of such names."""

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sin(attend(jnp.tanh(q), k, v).astype(jnp.float32)).sum()

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    program = jax.make_jaxpr(jax.grad(jax.checkpoint(total, policy=policy), argnums=(0, 1, 2)))(*inputs)
    names_of = [str(equation.params.get("name", equation.primitive)) for equation in _primitives(program.jaxpr)]
    return [name for name in names_of if name.startswith(("splash_mha", "dot_product_attention"))]


def test_remat_keeps_what_attention_gave() -> None:
    inputs = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    segments, lengths = jnp.ones((2, 256), jnp.int32), jnp.array([[256, 0], [100, 20]])

    def on_tpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return splash_attention(q, k, v, segments, segments, jnp.arange(256), name=ATTENTION_OUTPUT)

    def on_gpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return cudnn_attention(q, k, v, lengths, name=ATTENTION_OUTPUT)

    for attend, forward in ((on_tpu, "_fwd"), (on_gpu, "_fwd")):
        for names, calls in (((ATTENTION_OUTPUT,), 1), ((), 2)):
            found = _kernels(attend, inputs, names)
            assert sum(forward in name for name in found) == calls
            assert len(found) == calls + 1


def test_cudnn_finds_the_segments() -> None:
    lengths, starts = segment_starts(jnp.array([[3, 2, 0], [0, 0, 0], [4, 1, 3]]), 10)
    assert (lengths.dtype, starts.dtype) == (jnp.int32, jnp.int32)
    assert lengths.tolist() == [[3, 2, 4], [1, 3, 0], [0, 0, 0]]
    assert starts.reshape(-1).tolist() == [0, 3, 20, 24, 25, 30, 30, 30, 30, 30, 30, 30]


def test_rows_of_one_segment_are_packed_rows_to_cudnn() -> None:
    """With room for one segment only, jax would compile attention over whole rows, which takes no offsets."""
    x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
    program = jax.make_jaxpr(cudnn_attention)(x, x, x, jax.ShapeDtypeStruct((2, 1), jnp.int32))
    (kernel,) = (one for one in _primitives(program.jaxpr) if str(one.primitive) == "dot_product_attention_fwd")
    assert [array.aval.shape for array in kernel.invars[4:8]] == [(2, 2), (2, 2), (2, 3), (2, 3)]


class _Packed:
    """Attention that reads its operands as cuDNN does: a flat memory, in which offsets say where segments begin."""

    def bind(self, q: Any, k: Any, v: Any, _bias: Any, *places: Any, scale: float, **settings: Any) -> Any:
        q, k, v = map(np.asarray, (q, k, v))
        (_, _, N, width), K = q.shape, k.shape[2]
        lengths, key_lengths, starts, key_starts = (np.asarray(array).reshape(-1) for array in places[:4])
        out = np.full(q.size, np.nan, np.float32)
        for number in np.flatnonzero(lengths):
            count, start, key_start = lengths[number], starts[number], key_starts[number]
            assert count == key_lengths[number]
            queries = q.reshape(-1)[start : start + count * N * width].reshape(count, N, width)
            keys, values = (x.reshape(-1)[key_start:][: count * K * width].reshape(count, K, width) for x in (k, v))
            scores = np.einsum("tkgh,skh->kgts", queries.reshape(count, K, -1, width), keys) * scale
            weights = np.where(np.tri(count, dtype=bool), np.exp(scores), 0.0)
            found = np.einsum("kgts,skh->tkgh", weights / weights.sum(axis=-1, keepdims=True), values)
            out[start : start + count * N * width] = found.reshape(-1)
        assert settings["mask_type"].name == "PADDING_CAUSAL"
        return jnp.asarray(out.reshape(q.shape)), jnp.zeros(0)


class _Nothing:
    """A backward pass that leaves all memory as it was."""

    def bind(self, *arrays: jax.Array, **_settings: Any) -> list[jax.Array]:
        assert len(arrays) == 13
        assert arrays[-3].shape == (0,)  # softmax statistics
        assert arrays[-2].shape == arrays[-1].shape == arrays[0].shape
        return [jnp.full(array.shape, jnp.nan) for array in arrays[:3]]


def test_what_cudnn_is_given_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_module, "FORWARD", _Packed())
    monkeypatch.setattr(cudnn_module, "BACKWARD", _Nothing())
    places, inputs = _places(ROWS), _inputs(len(ROWS), S)
    lengths = jnp.array([row + [0] * (8 - len(row)) for row in ROWS])
    real = np.asarray(places.segment_ids > 0)[..., None, None]
    out, residuals = cudnn_module._forward(None, *inputs, lengths)
    expected = dense_attention(*inputs, places, places)
    np.testing.assert_allclose(out, np.where(real, expected, 0), atol=2e-5)
    for gradient in cudnn_module._backward(None, residuals, jnp.ones_like(out))[:3]:
        np.testing.assert_array_equal(np.isnan(gradient), np.broadcast_to(real, gradient.shape))
        assert (np.asarray(gradient)[~np.broadcast_to(real, gradient.shape)] == 0).all()


def test_cudnn_says_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(dtype: str, width: int = 64, tokens: int = 128) -> None:
        x = jax.ShapeDtypeStruct((2, tokens, 2, width), dtype)
        jax.eval_shape(cudnn_attention, x, x, x, jax.ShapeDtypeStruct((2, 1), jnp.int32))

    attend("bfloat16")
    with pytest.raises(UserError, match="bfloat16 or float16, not in float32"):
        attend("float32")
    with pytest.raises(UserError, match="not of 60"):
        attend("bfloat16", 60)
    with pytest.raises(UserError, match="fewer rows"):
        attend("bfloat16", tokens=2**23)
    monkeypatch.setattr(jax, "__version__", "0.13.0")
    with pytest.raises(UserError, match=r"installed jax 0\.13\.0 differs or is unknown\. Install one"):
        attend("bfloat16", tokens=136)


def _missing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cudnn_module, "FORWARD", None)


def _newer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jax, "__version__", "0.13.0")


def _other_setting(patch: pytest.MonkeyPatch) -> None:
    def lowering(*arrays: Any, another_setting: Any, **settings: Any) -> None: ...

    patch.setattr(cudnn_module, "LOWERINGS", [lowering, cudnn_module.LOWERINGS[1]])


def _other_backward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cudnn_module, "LOWERINGS", [cudnn_module.LOWERINGS[0]] * 2)


def _choose(asked: AttentionKernel, capability: str = "9.0", context: int = 1) -> AttentionKernel:
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA GPU", compute_capability=capability)
    return select_kernel(asked, gpu, dtype="bfloat16", head_dim=128, context=context, lengths=[4096])


@pytest.mark.parametrize("change", [_missing, _newer, _other_setting, _other_backward])
def test_an_unknown_jax_attends_blockwise_with_a_warning(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _choose("auto") == _choose("cudnn") == "cudnn"
    change(monkeypatch)
    reason = f"the cuDNN attention of jax 0.10, 0.11, 0.12, and that of the installed jax {jax.__version__} differs"
    assert capsys.readouterr().err == ""
    assert _choose("auto") == "blockwise"
    warning = capsys.readouterr().err
    assert warning.startswith("warning: compute.attention: `auto` uses `blockwise` instead of `cudnn`")
    assert reason in warning
    assert "Install one of these versions" in warning
    with pytest.raises(UserError, match=reason):
        _choose("cudnn")


@pytest.mark.parametrize("limit", [{"capability": "8.0"}, {"context": 2}], ids=str)
def test_an_old_gpu_gets_a_note_and_no_warning(limit: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert _choose("auto", **limit) == "blockwise"
    assert capsys.readouterr().err.startswith("compute.attention: `auto` uses `blockwise` instead of `cudnn`")


def test_cudnn_lowers_for_a_gpu() -> None:
    """Lowering needs no plugin. So a call that the installed jax does not take fails here, on every machine."""
    arrays = [jax.ShapeDtypeStruct((2, 128, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]

    def total(*inputs: jax.Array) -> jax.Array:
        return cudnn_attention(*inputs).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*arrays, jax.ShapeDtypeStruct((2, 3), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r'@(__cudnn\S+)\((.*?)\).* backend_config = "(.*?)"', text)
    assert [name for name, _, _ in calls] == FUSED_CALLS
    # Queries, keys, values, two arrays of lengths, two of offsets. Backward also: statistics, gradient, output.
    assert [len(operands.split(", ")) for _, operands, _ in calls] == [7, 10]
    for _, _, text in calls:
        settings = json.loads(text.replace(r"\22", '"'))["cudnn_fmha_backend_config"]
        assert settings["mask_type"] == "PADDING_CAUSAL"
        assert (settings["max_seg_per_batch"], settings["fmha_scale"]) == (3, 64**-0.5)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "chip", cases(CHIPS, short=SHORT_CHIPS.__contains__), ids=lambda chip: "-".join(map(str, chip))
)
def test_splash_compiles_and_its_memory_is_linear(chip: tuple[str, int, int, int]) -> None:
    short, long = _compiled(["tpu", *map(str, chip)], {"TPU_LIBRARY_PATH": str(LIBTPU_LIBRARY)})
    queries = 8192 * chip[1] * 128 * 2  # bytes, in bfloat16; narrower heads take as much, memory is laid out so
    assert short["temporary"] < 12 * queries
    assert long["temporary"] < 4 * short["temporary"]


@pytest.mark.slow
@needs_cuda
def test_cudnn_compiles_for_a_gpu() -> None:
    paths = os.pathsep.join(filter(None, [str(CUDA), os.environ.get("PYTHONPATH")]))
    for found in _compiled(["gpu"], {"PYTHONPATH": paths}):
        assert sorted(found["calls"]) == FUSED_CALLS
        assert found["temporary"] < 0.6 * 2**30


def _compiled(arguments: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    environment = os.environ | ENVIRONMENT | environment
    command = [sys.executable, __file__, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def _program(device: Any, attend: Callable[..., jax.Array], arrays: dict[str, tuple[tuple[int, ...], Any]]) -> Any:
    """Both passes of attention, compiled; the first three arrays are queries, keys and values."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arrays.values()]

    def total(weights: jax.Array, *inputs: jax.Array) -> jax.Array:
        return (attend(*inputs) * weights).astype(jnp.float32).sum()

    return jax.jit(jax.grad(total, argnums=(1, 2, 3))).lower(shapes[0], *shapes).compile()


def _compile_splash(chip: str, heads: int, kv_heads: int, width: int) -> None:
    device = list_slices(chip)[0].devices()[0]
    for length in (8192, 32_768):
        arrays = {
            "q": ((1, length, heads, width), jnp.bfloat16),
            "k": ((1, length, kv_heads, width), jnp.bfloat16),
            "v": ((1, length, kv_heads, width), jnp.bfloat16),
            "query_segments": ((1, length), jnp.int32),
            "key_segments": ((1, length), jnp.int32),
            "order": ((length,), jnp.int32),
        }
        memory = _program(device, splash_attention, arrays).memory_analysis()
        print(json.dumps({"length": length, "temporary": memory.temp_size_in_bytes}), flush=True)


def _compile_cudnn() -> None:
    device = parse_topology("h100:1").devices()[0]
    for heads, kv_heads, width in ((28, 4, 128), (14, 2, 64)):
        arrays = {
            "q": ((1, 32_768, heads, width), jnp.bfloat16),
            "k": ((1, 32_768, kv_heads, width), jnp.bfloat16),
            "v": ((1, 32_768, kv_heads, width), jnp.bfloat16),
            "lengths": ((1, 16), jnp.int32),
        }
        program = _program(device, cudnn_attention, arrays)
        calls = [
            line.split('custom_call_target="')[1].split('"')[0]
            for line in program.as_text().splitlines()
            if 'custom_call_target="__cudnn' in line
        ]
        temporary = program.memory_analysis().temp_size_in_bytes
        print(json.dumps({"heads": heads, "temporary": temporary, "calls": calls}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "tpu":
        _compile_splash(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        _compile_cudnn()
