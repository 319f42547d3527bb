"""Log-probs without logits are those of a float64 softmax, whatever the vocabulary and its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinkpo_jax import logprobs
from thinkpo_jax.logprobs import token_logprobs


def _float64(x: np.ndarray, head: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Values, and the gradients of their weighted sum, computed in float64."""
    x, head = x.astype(np.float64), head.astype(np.float64)
    logits = x @ head
    logits -= logits.max(axis=-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    rows = np.arange(len(targets))
    gradient = -probabilities * weights[:, None]
    gradient[rows, targets] += weights
    return np.log(probabilities[rows, targets]), gradient @ head.T, x.T @ gradient


@pytest.mark.parametrize(("vocabulary", "block"), [(4224, 2048), (4224, 4224), (4225, 2048), (100, 8192), (257, 256)])
def test_values_and_gradients_equal_float64(vocabulary: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "VOCAB_BLOCK", block)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 16)).astype(np.float32)
    head = rng.normal(size=(16, vocabulary)).astype(np.float32)
    # The borders of blocks, where a tail is easily counted twice or not at all.
    borders = [0, vocabulary - 1, min(block, vocabulary - 1), vocabulary // 2]
    targets = np.concatenate([rng.integers(0, vocabulary, 20), borders])
    weights = rng.normal(size=24).astype(np.float32)

    def total(x: jax.Array, head: jax.Array) -> jax.Array:
        return (token_logprobs(x, head, jnp.array(targets)) * weights).sum()

    values, x_gradient, head_gradient = _float64(x, head, targets, weights)
    np.testing.assert_allclose(token_logprobs(jnp.array(x), jnp.array(head), jnp.array(targets)), values, atol=2e-5)
    found = jax.grad(total, argnums=(0, 1))(jnp.array(x), jnp.array(head))
    np.testing.assert_allclose(found[0], x_gradient, atol=5e-5)
    np.testing.assert_allclose(found[1], head_gradient, atol=5e-5)


@pytest.mark.parametrize("vocabulary", [4224, 5000])
def test_zero_hidden_states_give_minus_ln_of_the_vocabulary(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "VOCAB_BLOCK", 2048)
    found = token_logprobs(jnp.zeros((3, 8)), jnp.ones((8, vocabulary)), jnp.array([0, 5, vocabulary - 1]))
    np.testing.assert_allclose(found, -np.log(vocabulary), rtol=1e-6)


def test_bfloat16_operands_give_float32_logprobs() -> None:
    rng = np.random.default_rng(0)
    x, head = (jnp.array(rng.normal(size=shape), jnp.bfloat16) for shape in ((6, 16), (16, 300)))
    targets = rng.integers(0, 300, 6)
    found = token_logprobs(x, head, jnp.array(targets))
    assert found.dtype == jnp.float32
    exact = _float64(np.asarray(x, np.float32), np.asarray(head, np.float32), targets, np.ones(6))[0]
    np.testing.assert_allclose(found, exact, atol=1e-4)  # the products of bfloat16 operands are exact in float32
