"""cuDNN attention gets the right arguments, falls back with a message, and compiles for GPUs.

The kernel itself cannot run here. A compilation for GPUs needs its own process, which runs this file as a program.
"""

import json
import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import (
    attention_kernel_calls,
    compile_attention,
    compile_in_child,
    iterate_equations,
    packed_positions,
    random_inputs,
)
from support.plugins import CUDA, needs_cuda

from thinkpo_jax.models.attention import cudnn
from thinkpo_jax.models.attention.blockwise import ATTENTION_OUTPUT, dense_attention
from thinkpo_jax.models.attention.cudnn import cudnn_attention, segment_starts
from thinkpo_jax.models.attention.dispatch import AttentionKernel, select_kernel
from thinkpo_jax.planning.topology import parse_topology
from thinkpo_jax.runtime.config import UserError

S = 512
ROWS = [[500], [60, 100, 3, 30, 1, 200, 50], [128, 256, 128], [300, 90], [1], []]  # segment lengths
FUSED_CALLS = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


def test_segments_are_listed_without_gaps() -> None:
    lengths, starts = segment_starts(jnp.array([[3, 2, 0], [0, 0, 0], [4, 1, 3]]), 10)
    assert (lengths.dtype, starts.dtype) == (jnp.int32, jnp.int32)
    assert lengths.tolist() == [[3, 2, 4], [1, 3, 0], [0, 0, 0]]
    assert starts.reshape(-1).tolist() == [0, 3, 20, 24, 25, 30, 30, 30, 30, 30, 30, 30]


def test_rows_with_room_for_one_segment_are_passed_as_packed_rows() -> None:
    """With room for only one segment, jax would compile attention over whole rows, which takes no offsets."""
    x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
    program = jax.make_jaxpr(cudnn_attention)(x, x, x, jax.ShapeDtypeStruct((2, 1), jnp.int32))
    equations = iterate_equations(program.jaxpr)
    (kernel,) = (equation for equation in equations if str(equation.primitive) == "dot_product_attention_fwd")
    assert [array.aval.shape for array in kernel.invars[4:8]] == [(2, 2), (2, 2), (2, 3), (2, 3)]


class _PackedForward:
    """A forward pass that reads its operands as cuDNN does: from flat memory, in which offsets locate the segments."""

    def bind(self, q: Any, k: Any, v: Any, _bias: Any, *segments: Any, scale: float, **settings: Any) -> Any:
        q, k, v = map(np.asarray, (q, k, v))
        (_, _, N, H), K = q.shape, k.shape[2]
        lengths, key_lengths, starts, key_starts = (np.asarray(array).reshape(-1) for array in segments[:4])
        out = np.full(q.size, np.nan, np.float32)
        for index in np.flatnonzero(lengths):
            length, start, key_start = lengths[index], starts[index], key_starts[index]
            assert length == key_lengths[index]
            queries = q.reshape(-1)[start : start + length * N * H].reshape(length, N, H)
            keys, values = (x.reshape(-1)[key_start:][: length * K * H].reshape(length, K, H) for x in (k, v))
            scores = np.einsum("tkgh,skh->kgts", queries.reshape(length, K, -1, H), keys) * scale
            weights = np.where(np.tri(length, dtype=bool), np.exp(scores), 0.0)
            outputs = np.einsum("kgts,skh->tkgh", weights / weights.sum(axis=-1, keepdims=True), values)
            out[start : start + length * N * H] = outputs.reshape(-1)
        assert settings["mask_type"].name == "PADDING_CAUSAL"
        return jnp.asarray(out.reshape(q.shape)), jnp.zeros(0)


class _EmptyBackward:
    """A backward pass that does not write its results."""

    def bind(self, *arrays: jax.Array, **_settings: Any) -> list[jax.Array]:
        assert len(arrays) == 13
        assert arrays[-3].shape == (0,)  # softmax statistics
        assert arrays[-2].shape == arrays[-1].shape == arrays[0].shape
        return [jnp.full(array.shape, jnp.nan) for array in arrays[:3]]


def test_the_arguments_describe_the_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "FORWARD", _PackedForward())
    monkeypatch.setattr(cudnn, "BACKWARD", _EmptyBackward())
    positions, inputs = packed_positions(ROWS, S), random_inputs(len(ROWS), S, S)
    lengths = jnp.array([row + [0] * (8 - len(row)) for row in ROWS])
    real = np.asarray(positions.segment_ids > 0)[..., None, None]
    out, residuals = cudnn._forward(None, *inputs, lengths)
    expected = dense_attention(*inputs, positions, positions)
    np.testing.assert_allclose(out, np.where(real, expected, 0), atol=2e-5)
    for gradient in cudnn._backward(None, residuals, jnp.ones_like(out))[:3]:
        np.testing.assert_array_equal(np.isnan(gradient), np.broadcast_to(real, gradient.shape))
        assert (np.asarray(gradient)[~np.broadcast_to(real, gradient.shape)] == 0).all()


def test_remat_recomputes_attention_only_if_its_output_is_not_saved() -> None:
    lengths = jnp.array([[256, 0], [100, 20]])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return cudnn_attention(q, k, v, lengths, name=ATTENTION_OUTPUT)

    for saved_names, forward_calls in (((ATTENTION_OUTPUT,), 1), ((), 2)):
        calls = attention_kernel_calls(attend, saved_names)
        assert sum("_fwd" in name for name in calls) == forward_calls
        assert len(calls) == forward_calls + 1


def test_unsupported_arguments_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(dtype: str, head_dim: int = 64, tokens: int = 128) -> None:
        x = jax.ShapeDtypeStruct((2, tokens, 2, head_dim), dtype)
        jax.eval_shape(cudnn_attention, x, x, x, jax.ShapeDtypeStruct((2, 1), jnp.int32))

    attend("bfloat16")
    with pytest.raises(UserError, match=r"needs bfloat16 or float16 \(found float32\)"):
        attend("float32")
    with pytest.raises(UserError, match=r"a multiple of 8 and at most 256 \(found 60\)"):
        attend("bfloat16", 60)
    with pytest.raises(UserError, match="fewer rows"):
        attend("bfloat16", tokens=2**23)
    monkeypatch.setattr(jax, "__version__", "0.13.0")
    with pytest.raises(UserError, match=r"installed jax 0\.13\.0 differ or are unknown\. Install one"):
        attend("bfloat16", tokens=136)


def _without_primitives(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cudnn, "FORWARD", None)


def _with_newer_jax(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jax, "__version__", "0.13.0")


def _with_another_setting(patch: pytest.MonkeyPatch) -> None:
    def lowering(*arrays: Any, another_setting: Any, **settings: Any) -> None: ...

    patch.setattr(cudnn, "LOWERINGS", [lowering, cudnn.LOWERINGS[1]])


def _with_another_backward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cudnn, "LOWERINGS", [cudnn.LOWERINGS[0]] * 2)


def _select(requested: AttentionKernel, capability: str = "9.0", context: int = 1) -> AttentionKernel:
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA GPU", compute_capability=capability)
    return select_kernel(requested, gpu, dtype="bfloat16", head_dim=128, context=context, lengths=[4096])


@pytest.mark.parametrize(
    "change", [_without_primitives, _with_newer_jax, _with_another_setting, _with_another_backward]
)
def test_auto_uses_blockwise_with_a_warning_for_an_unknown_jax(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _select("auto") == _select("cudnn") == "cudnn"
    change(monkeypatch)
    reason = f"internals of jax 0.10, 0.11, 0.12, and those of the installed jax {jax.__version__} differ"
    assert capsys.readouterr().err == ""
    assert _select("auto") == "blockwise"
    warning = capsys.readouterr().err
    assert warning.startswith("warning: compute.attention: `auto` uses `blockwise` instead of `cudnn`")
    assert reason in warning
    assert "Install one of these versions" in warning
    with pytest.raises(UserError, match=reason):
        _select("cudnn")


@pytest.mark.parametrize("limit", [{"capability": "8.0"}, {"context": 2}], ids=str)
def test_auto_uses_blockwise_without_a_warning_where_cudnn_is_not_supported(
    limit: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _select("auto", **limit) == "blockwise"
    assert capsys.readouterr().err.startswith("compute.attention: `auto` uses `blockwise` instead of `cudnn`")


def test_cudnn_lowers_for_a_gpu() -> None:
    """Lowering needs no plugin, so a call that the installed jax does not accept fails here on every machine."""
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
@needs_cuda
def test_cudnn_compiles_for_a_gpu() -> None:
    paths = os.pathsep.join(filter(None, [str(CUDA), os.environ.get("PYTHONPATH")]))
    for compiled in compile_in_child(__file__, [], {"PYTHONPATH": paths}):
        assert sorted(compiled["calls"]) == FUSED_CALLS
        assert compiled["temporary"] < 0.6 * 2**30


def _compile() -> None:
    device = parse_topology("h100:1").devices()[0]
    for heads, kv_heads, head_dim in ((28, 4, 128), (14, 2, 64)):
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            "q": ((1, 32_768, heads, head_dim), jnp.bfloat16),
            "k": ((1, 32_768, kv_heads, head_dim), jnp.bfloat16),
            "v": ((1, 32_768, kv_heads, head_dim), jnp.bfloat16),
            "lengths": ((1, 16), jnp.int32),
        }
        program = compile_attention(device, cudnn_attention, arrays)
        calls = [
            line.split('custom_call_target="')[1].split('"')[0]
            for line in program.as_text().splitlines()
            if 'custom_call_target="__cudnn' in line
        ]
        temporary = program.memory_analysis().temp_size_in_bytes
        print(json.dumps({"heads": heads, "temporary": temporary, "calls": calls}), flush=True)


if __name__ == "__main__":
    _compile()
