"""A hidden state depends on the earlier tokens of its own segment, on all of them, and on nothing else."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import small

from thinkpo_jax.models.attention.blockwise import BLOCK_SIZE
from thinkpo_jax.models.attention.dense import TokenPositions
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.layers import linear, rms_norm
from thinkpo_jax.models.transformer import KVCache, Transformer
from thinkpo_jax.models.weight_mapping import flatten_by_name

ROW = np.random.default_rng(0).permutation(small.ARCH.vocab_size)[:20].astype(np.int32)  # distinct tokens
LENGTHS = (7, 9)  # of the segments in the row; padding after them


@functools.cache
def _model(dtype: str = "float32", remat: str = "none") -> Transformer:
    return small.model(ComputeConfig.model_validate({"dtype": dtype, "remat": remat}))


def _packed(*lengths: int, total: int) -> TokenPositions:
    """Segments 1, 2, ... of the given lengths in one row, then padding."""
    segments, positions = np.zeros((1, total), np.int32), np.zeros((1, total), np.int32)
    start = 0
    for index, length in enumerate(lengths):
        segments[0, start : start + length] = index + 1
        positions[0, start : start + length] = np.arange(length)
        start += length
    return TokenPositions(jnp.array(segments), jnp.array(positions))


PLACES = _packed(*LENGTHS, total=len(ROW))


@jax.jit
def _hidden(model: Transformer, tokens_BT: jax.Array, places: TokenPositions) -> jax.Array:
    return model(tokens_BT, places)[0]


@jax.jit
def _cached(
    model: Transformer, tokens_BT: jax.Array, places: TokenPositions, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    hidden_BTD, cached = model(tokens_BT, places, cache)
    assert cached is not None
    return hidden_BTD, cached


def _loss(model: Transformer) -> jax.Array:
    """A number in which every logit of the row has its own weight."""
    logits_TV = (model(jnp.array(ROW)[None], PLACES)[0][0] @ model.lm_head()).astype(jnp.float32)
    return jnp.sum(logits_TV * np.random.default_rng(1).normal(size=logits_TV.shape).astype(np.float32))


def test_a_gradient_reaches_exactly_the_earlier_tokens_of_the_segment() -> None:
    def states(model: Transformer) -> jax.Array:
        hidden_TD = model(jnp.array(ROW)[None], PLACES)[0][0]
        return hidden_TD @ jnp.array(np.random.default_rng(1).normal(size=small.ARCH.hidden_size), jnp.float32)

    gradient_TVD = np.asarray(flatten_by_name(jax.jit(jax.jacrev(states))(_model()))["embedding"])
    reaches_TS = (gradient_TVD[:, ROW] != 0).any(axis=-1)
    segments, real = np.asarray(PLACES.segment_ids[0]), sum(LENGTHS)
    earlier_TS = np.tril(segments[:, None] == segments[None, :])
    np.testing.assert_array_equal(reaches_TS[:real], earlier_TS[:real])


def test_a_packed_segment_is_computed_as_if_alone() -> None:
    model = _model()
    packed_TD = _hidden(model, jnp.array(ROW)[None], PLACES)[0]
    start = 0
    for length in LENGTHS:
        alone = ROW[None, start : start + length]
        alone_TD = _hidden(model, jnp.array(alone), _packed(length, total=length))[0]
        np.testing.assert_allclose(packed_TD[start : start + length], alone_TD, atol=1e-5)
        start += length


@pytest.mark.parametrize("changed", range(len(LENGTHS) + 1))
def test_tokens_of_another_segment_change_nothing(changed: int) -> None:
    """The last of the changed segments is the padding."""
    model = _model()
    here = np.asarray(PLACES.segment_ids[0]) == (changed + 1) % (len(LENGTHS) + 1)
    others = np.where(here, (ROW + 1) % small.ARCH.vocab_size, ROW)
    before, after = (np.asarray(_hidden(model, jnp.array(row)[None], PLACES)[0]) for row in (ROW, others))
    np.testing.assert_array_equal(before[~here], after[~here])
    assert (before[here] != after[here]).any(axis=-1).all()


def test_positions_count_by_their_distance() -> None:
    model, row = _model(), jnp.array(ROW)[None]
    straight = _packed(len(ROW), total=len(ROW))
    expected = _hidden(model, row, straight)
    later = _hidden(model, row, straight._replace(positions=straight.positions + 100))
    wider = _hidden(model, row, straight._replace(positions=straight.positions * 3))
    np.testing.assert_allclose(later, expected, atol=1e-4)
    assert np.abs(np.asarray(wider - expected)).max() > 0.05


@pytest.mark.parametrize("prefill", [9, 12])
def test_the_cache_gives_the_states_of_one_pass(prefill: int) -> None:
    """A left-padded batch is read at once, then token by token."""
    model, lengths, steps = _model(), np.array([3, 9]), 4
    rows = [ROW[: lengths[0] + steps], ROW[::-1][: lengths[1] + steps]]
    tokens_BT, positions_BT = np.full((2, prefill), 5, np.int32), np.arange(prefill) - (prefill - lengths)[:, None]
    for row, tokens in enumerate(rows):
        tokens_BT[row, prefill - lengths[row] :] = tokens[: lengths[row]]
    places = TokenPositions(jnp.array(positions_BT >= 0, jnp.int32), jnp.array(np.maximum(positions_BT, 0), jnp.int32))
    hidden_BTD, cache = _cached(model, jnp.array(tokens_BT), places, model.init_cache(2, prefill + steps + 3))
    found = [[hidden_BTD[row, prefill - length :]] for row, length in enumerate(lengths)]
    for step in range(steps):
        tokens_B1 = jnp.array([[tokens[length + step]] for tokens, length in zip(rows, lengths, strict=True)])
        here = TokenPositions(jnp.ones((2, 1), jnp.int32), jnp.array(lengths[:, None] + step, jnp.int32))
        hidden_B1D, cache = _cached(model, tokens_B1, here, cache)
        for row in range(2):
            found[row].append(hidden_B1D[row])
    for states, tokens in zip(found, rows, strict=True):
        expected_TD = _hidden(model, jnp.array(tokens)[None], _packed(len(tokens), total=len(tokens)))[0]
        np.testing.assert_allclose(np.concatenate(states), expected_TD, atol=1e-5)


@pytest.mark.parametrize("remat", ["projections", "attention", "full", "offload"])
def test_remat_changes_when_things_are_computed_and_nothing_else(remat: str) -> None:
    value_and_grad = jax.value_and_grad(_loss)
    kept, again = (_model(remat=policy) for policy in ("none", remat))
    traced = [str(jax.make_jaxpr(value_and_grad)(model)) for model in (kept, again)]
    assert ["policy=" in text for text in traced] == [False, True], "remat is on in one of them"
    (value, gradient), (value_again, gradient_again) = (jax.jit(value_and_grad)(model) for model in (kept, again))
    assert float(value_again) == pytest.approx(float(value), rel=1e-6)
    for (name, a), b in zip(flatten_by_name(gradient).items(), flatten_by_name(gradient_again).values(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("length", "scores"), [(64, 1), (2 * BLOCK_SIZE, 0)], ids=["whole", "blockwise"])
def test_each_remat_policy_keeps_less_and_computes_more_again(length: int, scores: int) -> None:
    """Memory is that of the compiled program, products those of its text (a layer stands there once).

    Attention as a whole keeps its scores where nothing is computed again, and needs them computed again elsewhere.
    """
    products, memory = {}, {}
    for remat in ("none", "projections", "attention", "full", "offload"):
        places = _packed(length - 5, total=length)

        def loss(model: Transformer, places: TokenPositions = places) -> jax.Array:
            return model(places.positions, places)[0].astype(jnp.float32).sum()

        lowered = jax.jit(jax.grad(loss)).lower(_model(remat=remat))
        products[remat] = len(re.findall(r"stablehlo\.dot_general", lowered.as_text()))
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        memory[remat] = analysis.temp_size_in_bytes
    assert products["projections"] == products["none"] + scores
    assert products["attention"] == products["none"] + scores + 6  # q, k, v, o, gate and up
    assert products["full"] == products["none"] + 8  # and attention's two
    assert products["offload"] == products["none"] + scores + 2  # gate and up
    assert memory["none"] > memory["projections"] > memory["attention"] > memory["full"]


def test_bfloat16_multiplies_in_bfloat16_and_keeps_float32_parameters_and_gradients() -> None:
    model = _model("bfloat16")
    lowered = jax.jit(functools.partial(Transformer.__call__, model)).lower(jnp.array(ROW)[None], PLACES)
    operands = re.findall(r"dot_general .*: \((.*)\) ->", lowered.as_text())
    assert len(operands) >= 9
    assert all(len(re.findall("xbf16>", pair)) == 2 for pair in operands), operands
    gradient = jax.jit(jax.grad(_loss))(model)
    exact = jax.jit(jax.grad(_loss))(_model())
    for (name, value), found, expected in zip(
        flatten_by_name(model).items(), flatten_by_name(gradient).values(), flatten_by_name(exact).values(), strict=True
    ):
        assert value.dtype == found.dtype == jnp.float32, name
        error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
        assert 0 < error < 0.1, name


@pytest.mark.parametrize(("inner", "outer"), [(5, 7), (7, 5)])
def test_a_projection_has_the_gradients_of_a_product(inner: int, outer: int) -> None:
    x_BTI, weight_IO, seen_BTO = _normal((2, 3, inner), (inner, outer), (2, 3, outer))
    found, expected = (
        jax.grad(lambda x, w, product=product: jnp.sum(product(x, w) * seen_BTO), (0, 1))(x_BTI, weight_IO)
        for product in (linear, jnp.matmul)
    )
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 8)], ids=["states", "heads"])
def test_the_norm_has_the_gradients_of_its_formula(shape: tuple[int, ...]) -> None:
    eps = 0.1
    x, weight, seen = _normal(shape, shape[-1:], shape)

    def formula(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return rms_norm(x, nnx.Param(weight), eps)

    found, expected = (
        jax.value_and_grad(lambda x, w, f=f: jnp.sum(f(x, w) * seen), (0, 1))(x, weight) for f in (norm, formula)
    )
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    low = jax.grad(lambda x, w: jnp.sum(norm(x, w).astype(jnp.float32) * seen), (0, 1))(x.astype(jnp.bfloat16), weight)
    assert [gradient.dtype for gradient in low] == [jnp.bfloat16, jnp.float32]
    for ours, plain in zip(low, expected[1], strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), plain, atol=0.05)


def _normal(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes]


def test_the_head_is_the_transposed_embedding_only_where_it_is_tied() -> None:
    model = small.model()
    assert model.untied_head is not None
    np.testing.assert_array_equal(model.lm_head(), model.untied_head[...])
    model.untied_head = None
    np.testing.assert_array_equal(model.lm_head(), model.embedding[...].T)
