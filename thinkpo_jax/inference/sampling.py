"""Draws tokens from logits without sorting the vocabulary.

A token is drawn with one uniform number by inverting the cumulative distribution. The limits of top-k and top-p are
found by bisection, with sums over the vocabulary. A sort of the vocabulary takes longer than the rest of a step.
Letters: S slots, V vocabulary, B blocks of the vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from thinkpo_jax.inference.engine import SamplingConfig

BLOCK_SIZE = 256  # tokens of a block of the cumulative distribution
BISECTION_STEPS = 30  # halve the range of logits to the precision of float32
LOGIT_RANGE = 80.0  # below the largest logit. exp(-80) is nearly the smallest float32.


@dataclass(frozen=True)
class SamplingFilters:
    """Which parts of sampling are compiled. Their values are arguments of the program."""

    is_greedy: bool
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool

    @classmethod
    def of(cls, config: SamplingConfig) -> "SamplingFilters":
        """Returns the filters that have an effect."""
        return cls(config.temperature == 0, config.top_k is not None, config.top_p < 1, config.min_p > 0)


class SamplingValues(NamedTuple):
    """The values of the sampling parameters, as arrays without axes."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array

    @classmethod
    def of(cls, config: SamplingConfig) -> "SamplingValues":
        """Returns the values of a configuration."""
        values = (config.temperature, config.top_k or 0, config.top_p, config.min_p)
        return cls(*(jnp.float32(value) for value in values))


def sample_tokens(logits_SV: Array, uniform_S: Array, values: SamplingValues, filters: SamplingFilters) -> Array:
    """Returns a token of each slot [S]. The uniform numbers lie in [0, 1). Logits of -inf are never drawn.

    Each result depends only on its own row. Tokens whose logits are equal in float32 are kept or left out together.
    """
    if filters.is_greedy:
        return jnp.argmax(logits_SV, axis=-1).astype(jnp.int32)
    scaled_SV = logits_SV / values.temperature
    relative_SV = scaled_SV - scaled_SV.max(axis=-1, keepdims=True)
    weights_SV = jnp.exp(relative_SV)
    threshold_S1 = jnp.full((len(logits_SV), 1), -jnp.inf)
    if filters.has_top_k:
        threshold_S1 = _find_threshold(relative_SV, jnp.ones_like(weights_SV), values.top_k)
    if filters.has_top_p:
        total_S1 = jnp.where(relative_SV >= threshold_S1, weights_SV, 0).sum(axis=-1, keepdims=True)
        nucleus_S1 = _find_threshold(relative_SV, weights_SV, values.top_p * total_S1)
        threshold_S1 = jnp.maximum(threshold_S1, nucleus_S1)
    if filters.has_min_p:
        threshold_S1 = jnp.maximum(threshold_S1, jnp.log(values.min_p))
    return _invert_distribution(jnp.where(relative_SV >= threshold_S1, weights_SV, 0), uniform_S)


def _find_threshold(relative_SV: Array, amounts_SV: Array, required: Array) -> Array:
    """Returns [S, 1]: about the largest logit at which the tokens that reach it have the required amount together."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_S1, high_S1 = bounds
        middle_S1 = (low_S1 + high_S1) / 2
        reached_S1 = jnp.where(relative_SV >= middle_S1, amounts_SV, 0).sum(axis=-1, keepdims=True)
        is_enough_S1 = reached_S1 >= required
        return jnp.where(is_enough_S1, middle_S1, low_S1), jnp.where(is_enough_S1, high_S1, middle_S1)

    # The largest logit is 0. Tokens below the range are always left out. Each has less than 1e-34 of the probability.
    bounds = (jnp.full((len(relative_SV), 1), -LOGIT_RANGE), jnp.zeros((len(relative_SV), 1)))
    return jax.lax.fori_loop(0, BISECTION_STEPS, halve, bounds)[0]


def _invert_distribution(weights_SV: Array, uniform_S: Array) -> Array:
    """Returns for each row the first token at which the cumulative weight exceeds its uniform share of the total."""
    padded_SV = jnp.pad(weights_SV, ((0, 0), (0, -weights_SV.shape[1] % BLOCK_SIZE)))
    blocks_SBC = padded_SV.reshape(len(weights_SV), -1, BLOCK_SIZE)
    cumulative_SB = jnp.cumsum(blocks_SBC.sum(axis=-1), axis=-1)
    target_S1 = uniform_S[:, None] * cumulative_SB[:, -1:]
    block_S = _first_beyond(cumulative_SB, target_S1, blocks_SBC.max(axis=-1))
    rows_S = jnp.arange(len(weights_SV))
    before_S = jnp.where(block_S > 0, cumulative_SB[rows_S, block_S - 1], 0)
    weights_SC = blocks_SBC[rows_S, block_S]
    offset_S = _first_beyond(before_S[:, None] + jnp.cumsum(weights_SC, axis=-1), target_S1, weights_SC)
    return (block_S * BLOCK_SIZE + offset_S).astype(jnp.int32)


def _first_beyond(cumulative: Array, target_S1: Array, weights: Array) -> Array:
    """Returns the first index [S] with a weight whose cumulative weight exceeds the target.

    Rounding may leave none. Then it is the last index with a weight.
    """
    is_beyond = (cumulative > target_S1) & (weights > 0)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.where(is_beyond.any(axis=-1), jnp.argmax(is_beyond, axis=-1), last)
