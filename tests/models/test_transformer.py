"""A hidden state depends on the earlier tokens of its segment, on all of them, and on nothing else."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import small
from support.attention import packed_positions

from thinkpo_jax.models.attention.blockwise import BLOCK_SIZE, TokenPositions
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.transformer import Transformer, linear, rms_norm
from thinkpo_jax.models.weight_mapping import flatten_by_name

ROW = np.random.default_rng(0).permutation(small.ARCH.vocab_size)[:20].astype(np.int32)  # distinct tokens
LENGTHS = (7, 9)  # of the segments in the row. The rest is padding.
POSITIONS = packed_positions([LENGTHS], len(ROW))


@functools.cache
def _model(dtype: str = "float32", remat: str = "none") -> Transformer:
    return small.model(ComputeConfig.model_validate({"dtype": dtype, "remat": remat}))


@jax.jit
def _hidden_states(model: Transformer, token_ids_BT: jax.Array, positions: TokenPositions) -> jax.Array:
    return model(token_ids_BT, positions)


@jax.jit
def _loss(model: Transformer) -> jax.Array:
    """Returns a sum in which every logit of the row has its own weight."""
    logits_TV = (model(jnp.array(ROW)[None], POSITIONS)[0] @ model.lm_head()).astype(jnp.float32)
    return jnp.sum(logits_TV * np.random.default_rng(1).normal(size=logits_TV.shape).astype(np.float32))


def test_a_gradient_reaches_exactly_the_earlier_tokens_of_the_segment() -> None:
    def states(model: Transformer) -> jax.Array:
        hidden_TD = model(jnp.array(ROW)[None], POSITIONS)[0]
        return hidden_TD @ jnp.array(np.random.default_rng(1).normal(size=small.ARCH.hidden_size), jnp.float32)

    gradient_TVD = np.asarray(flatten_by_name(jax.jit(jax.jacrev(states))(_model()))["embedding"])
    has_gradient_TS = (gradient_TVD[:, ROW] != 0).any(axis=-1)
    segments, real = np.asarray(POSITIONS.segment_ids[0]), sum(LENGTHS)
    earlier_TS = np.tril(segments[:, None] == segments[None, :])
    np.testing.assert_array_equal(has_gradient_TS[:real], earlier_TS[:real])


def test_a_packed_segment_is_computed_as_if_alone() -> None:
    model = _model()
    packed_TD = _hidden_states(model, jnp.array(ROW)[None], POSITIONS)[0]
    start = 0
    for length in LENGTHS:
        alone = ROW[None, start : start + length]
        alone_TD = _hidden_states(model, jnp.array(alone), packed_positions([[length]], length))[0]
        np.testing.assert_allclose(packed_TD[start : start + length], alone_TD, atol=1e-5)
        start += length


@pytest.mark.parametrize("changed", range(len(LENGTHS) + 1))
def test_tokens_of_another_segment_do_not_change_hidden_states(changed: int) -> None:
    """The last case changes the padding."""
    model = _model()
    is_changed = np.asarray(POSITIONS.segment_ids[0]) == (changed + 1) % (len(LENGTHS) + 1)
    changed_row = np.where(is_changed, (ROW + 1) % small.ARCH.vocab_size, ROW)
    before, after = (
        np.asarray(_hidden_states(model, jnp.array(row)[None], POSITIONS)[0]) for row in (ROW, changed_row)
    )
    np.testing.assert_array_equal(before[~is_changed], after[~is_changed])
    assert (before[is_changed] != after[is_changed]).any(axis=-1).all()


def test_only_distances_between_positions_matter() -> None:
    model, row = _model(), jnp.array(ROW)[None]
    positions = packed_positions([[len(ROW)]], len(ROW))
    expected = _hidden_states(model, row, positions)
    shifted = _hidden_states(model, row, positions._replace(positions=positions.positions + 100))
    stretched = _hidden_states(model, row, positions._replace(positions=positions.positions * 3))
    np.testing.assert_allclose(shifted, expected, atol=1e-4)
    assert np.abs(np.asarray(stretched - expected)).max() > 0.05


@pytest.mark.parametrize("remat", ["projections", "attention", "full", "offload"])
def test_remat_does_not_change_the_loss_or_the_gradients(remat: str) -> None:
    value_and_grad = jax.value_and_grad(_loss)
    models = [_model(remat=policy) for policy in ("none", remat)]
    programs = [str(jax.make_jaxpr(value_and_grad)(model)) for model in models]
    assert ["policy=" in program for program in programs] == [False, True], "only the second model uses remat"
    (value, gradient), (remat_value, remat_gradient) = (jax.jit(value_and_grad)(model) for model in models)
    assert float(remat_value) == pytest.approx(float(value), rel=1e-6)
    for (name, a), b in zip(flatten_by_name(gradient).items(), flatten_by_name(remat_gradient).values(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("length", "scores"), [(64, 1), (2 * BLOCK_SIZE, 0)], ids=["dense", "blockwise"])
def test_each_remat_policy_saves_less_and_recomputes_more(length: int, scores: int) -> None:
    """Memory is that of the compiled program. Products are counted in its text, which contains each layer once.

    Without remat, dense attention saves its scores. With remat it must recompute them.
    """
    products, memory = {}, {}
    for remat in ("none", "projections", "attention", "full", "offload"):
        positions = packed_positions([[length - 5]], length)

        def loss(model: Transformer, positions: TokenPositions = positions) -> jax.Array:
            return model(positions.positions, positions).astype(jnp.float32).sum()

        lowered = jax.jit(jax.grad(loss)).lower(_model(remat=remat))
        products[remat] = len(re.findall(r"stablehlo\.dot_general", lowered.as_text()))
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        memory[remat] = analysis.temp_size_in_bytes
    assert products["projections"] == products["none"] + scores
    assert products["attention"] == products["none"] + scores + 6  # q, k, v, o, gate and up
    assert products["full"] == products["none"] + 8  # these six and the two of attention
    assert products["offload"] == products["none"] + scores + 2  # gate and up
    assert memory["none"] > memory["projections"] > memory["attention"] > memory["full"]


def test_bfloat16_multiplies_in_bfloat16_and_keeps_float32_parameters_and_gradients() -> None:
    model = _model("bfloat16")
    lowered = jax.jit(functools.partial(Transformer.__call__, model)).lower(jnp.array(ROW)[None], POSITIONS)
    operands = re.findall(r"dot_general .*: \((.*)\) ->", lowered.as_text())
    assert len(operands) >= 9
    assert all(len(re.findall("xbf16>", pair)) == 2 for pair in operands), operands
    gradients = flatten_by_name(jax.jit(jax.grad(_loss))(model))
    exact_gradients = flatten_by_name(jax.jit(jax.grad(_loss))(_model()))
    for (name, parameter), gradient, exact in zip(
        flatten_by_name(model).items(), gradients.values(), exact_gradients.values(), strict=True
    ):
        assert parameter.dtype == gradient.dtype == jnp.float32, name
        error = float(jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact))
        assert 0 < error < 0.1, name


@pytest.mark.parametrize(("inner", "outer"), [(5, 7), (7, 5)])
def test_linear_has_the_gradients_of_matmul(inner: int, outer: int) -> None:
    x_BTI, weight_IO, cotangent_BTO = _normal((2, 3, inner), (inner, outer), (2, 3, outer))
    actual, expected = (
        jax.grad(lambda x, w, product=product: jnp.sum(product(x, w) * cotangent_BTO), (0, 1))(x_BTI, weight_IO)
        for product in (linear, jnp.matmul)
    )
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 8)], ids=["states", "heads"])
def test_rms_norm_has_the_gradients_of_its_formula(shape: tuple[int, ...]) -> None:
    eps = 0.1
    x, weight, cotangent = _normal(shape, shape[-1:], shape)

    def formula(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return rms_norm(x, nnx.Param(weight), eps)

    actual, expected = (
        jax.value_and_grad(lambda x, w, f=f: jnp.sum(f(x, w) * cotangent), (0, 1))(x, weight) for f in (norm, formula)
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    bf16_gradients = jax.grad(lambda x, w: jnp.sum(norm(x, w).astype(jnp.float32) * cotangent), (0, 1))(
        x.astype(jnp.bfloat16), weight
    )
    assert [gradient.dtype for gradient in bf16_gradients] == [jnp.bfloat16, jnp.float32]
    for a, b in zip(expected[1], bf16_gradients, strict=True):
        np.testing.assert_allclose(b.astype(jnp.float32), a, atol=0.05)


def _normal(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes]


def test_the_head_is_the_transposed_embedding_only_where_it_is_tied() -> None:
    model = small.model()
    assert model.untied_head is not None
    np.testing.assert_array_equal(model.lm_head(), model.untied_head[...])
    model.untied_head = None
    np.testing.assert_array_equal(model.lm_head(), model.embedding[...].T)
