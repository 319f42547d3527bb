"""Sampling parameters and nucleus filtering."""

import jax
import jax.numpy as jnp
import pydantic

from thinkpo_jax.runtime.config import ConfigSection


class SamplingConfig(ConfigSection):
    """How tokens are sampled. Temperature 0 is greedy decoding.

    `samples` completions are generated for each question. `batch_size` prompts run at once in the local model.
    """

    temperature: float = pydantic.Field(default=0.7, ge=0)
    top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = pydantic.Field(default=1024, ge=1)
    samples: int = pydantic.Field(default=1, ge=1)
    batch_size: int = pydantic.Field(default=64, ge=1)

    @pydantic.model_validator(mode="after")
    def _reject_keys_without_effect(self) -> "SamplingConfig":
        if self.temperature == 0 and (self.samples > 1 or self.top_p < 1):
            raise ValueError("temperature 0 is greedy: `samples` above 1 and `top_p` below 1 have no effect")
        return self


def filter_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Sets logits to -inf, except for the most probable tokens that together reach `top_p` (arXiv 1904.09751)."""
    if top_p == 1.0:
        return logits_BV
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
    threshold_B1 = jnp.where(before_BV < top_p, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
