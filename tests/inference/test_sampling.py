"""Tokens are drawn from the distribution that the usual definition of temperature, top-k, top-p and min-p gives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from pydantic import ValidationError
from support.selection import combinations

from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.sampling import SamplingFilters, SamplingValues, sample_tokens

DRAWS = 2_000
SMALL, LARGE = 61, 600  # tokens of one block of the cumulative distribution, and of several


def _logits(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(vocab_size).normal(scale=1.5, size=vocab_size).astype(np.float32)


def _expected(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Returns the probabilities: temperature, top-k, top-p over what is left, min-p relative to the maximum."""
    probabilities = scipy.special.softmax(logits.astype(np.float64) / config.temperature)
    order = np.argsort(-probabilities)
    kept = order[: config.top_k]
    shares = probabilities[kept] / probabilities[kept].sum()
    kept = kept[np.cumsum(shares) - shares < config.top_p]
    kept = kept[probabilities[kept] >= config.min_p * probabilities.max()]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


_sample = jax.jit(sample_tokens, static_argnames="filters")


def _draw(logits: np.ndarray, config: SamplingConfig, uniform: np.ndarray) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.array(logits), (len(uniform), logits.shape[-1]))
    filters, values = SamplingFilters.of(config), SamplingValues.of(config)
    return np.asarray(_sample(rows, jnp.array(uniform, jnp.float32), values, filters=filters))


@functools.cache
def _grid() -> np.ndarray:
    """Uniform numbers that are equally spaced, with the smallest and the largest one that can be drawn."""
    return np.append(np.arange(DRAWS, dtype=np.float32) / DRAWS, np.float32(1 - 2**-24))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 0.6},
    {"min_p": 0.02},
    {"top_k": 8, "top_p": 0.7},
    {"top_k": 20, "min_p": 0.03},
    {"top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "temperature": 0.8},
    {"top_k": 5000},  # more than there are tokens
    {"top_p": 0.001},
]


@pytest.mark.parametrize(
    ("vocab_size", "options"),
    combinations((SMALL, LARGE), OPTIONS, short=lambda size, options: size == SMALL or len(options) > 1),
)
def test_draws_follow_the_definition(vocab_size: int, options: dict[str, Any]) -> None:
    config = SamplingConfig.model_validate({"temperature": 1.0} | options)
    logits = _logits(vocab_size)
    expected = _expected(logits, config)
    tokens = _draw(logits, config, _grid())
    assert set(tokens.tolist()) <= set(np.flatnonzero(expected))
    # Each token is the inverse of the cumulative distribution at its uniform number, but for rounding.
    inverse = np.minimum(np.searchsorted(np.cumsum(expected), _grid(), side="right"), np.flatnonzero(expected)[-1])
    assert np.mean(tokens != inverse) < 0.001


def test_the_filters_of_these_tests_leave_out_some_tokens_but_not_all() -> None:
    for vocab_size in (SMALL, LARGE):
        for options in OPTIONS[4:-2]:
            config = SamplingConfig.model_validate({"temperature": 1.0} | options)
            assert 1 < np.count_nonzero(_expected(_logits(vocab_size), config)) < 0.7 * vocab_size


def test_greedy_takes_the_first_of_the_largest_logits() -> None:
    logits = _logits(SMALL)
    logits[[7, 30]] = 9.0
    tokens = _draw(logits, SamplingConfig(temperature=0), _grid()[:4])
    assert tokens.tolist() == [7] * 4
    assert tokens.dtype == np.int32


def test_tokens_with_equal_logits_are_kept_together() -> None:
    logits = np.array([0.0, 1.0, 1.0, -1.0], np.float32)
    shares = np.bincount(_draw(logits, SamplingConfig(temperature=1.0, top_k=1), _grid()), minlength=4) / len(_grid())
    np.testing.assert_allclose(shares, [0, 0.5, 0.5, 0], atol=1e-3)


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.05}])
def test_logits_of_minus_infinity_are_never_drawn(vocab_size: int, options: dict[str, Any]) -> None:
    logits = _logits(vocab_size)
    forbidden = np.r_[0:3, vocab_size - 7 : vocab_size]
    logits[forbidden] = -np.inf
    tokens = _draw(logits, SamplingConfig.model_validate({"temperature": 2.0} | options), _grid())
    assert not set(tokens.tolist()) & set(forbidden.tolist())


@pytest.mark.parametrize("temperature", [0.001, 100.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_logits_and_temperatures_give_real_tokens(temperature: float, scale: float) -> None:
    logits = _logits(LARGE) * np.float32(scale)
    config = SamplingConfig(temperature=temperature, top_p=0.9, top_k=50, min_p=0.01)
    tokens = _draw(logits, config, _grid())
    allowed = np.argsort(-logits)[:50]
    assert set(tokens.tolist()) <= set(allowed.tolist())


def test_a_certain_token_is_always_drawn() -> None:
    logits = np.full(LARGE, -1e4, np.float32)
    logits[500] = 0.0
    for options in ({}, {"top_p": 0.5}, {"top_k": 10}, {"min_p": 0.5}):
        tokens = _draw(logits, SamplingConfig.model_validate({"temperature": 1.0} | options), _grid())
        assert set(tokens.tolist()) == {500}


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2, size=(16, LARGE)).astype(np.float32)
    uniform = rng.random(16, np.float32)
    config = SamplingConfig(temperature=0.9, top_p=0.8, top_k=30, min_p=0.01)
    filters, values = SamplingFilters.of(config), SamplingValues.of(config)
    together = np.asarray(_sample(jnp.array(logits), jnp.array(uniform), values, filters=filters))
    order = rng.permutation(16)
    shuffled = np.asarray(_sample(jnp.array(logits[order]), jnp.array(uniform[order]), values, filters=filters))
    np.testing.assert_array_equal(shuffled, together[order])
    assert len(set(together.tolist())) > 8


@pytest.mark.parametrize("options", [{"samples": 2}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_keys_without_effect_on_greedy_answers_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="temperature 0 is greedy"):
        SamplingConfig.model_validate({"temperature": 0} | options)


def test_an_empty_stop_string_is_rejected() -> None:
    with pytest.raises(ValidationError, match="a stop string is empty"):
        SamplingConfig(stop=("a", ""))
