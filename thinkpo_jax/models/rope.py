"""Rotary position embeddings (RoPE, arXiv 2104.09864) and their scaled variants for long contexts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class RopeTable:
    """The rotation of each pair of head dimensions in radians per token, and a factor on cosine and sine."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


def build_rope(parameters: Mapping[str, Any], head_dim: int) -> RopeTable:
    """Builds the rotation that `rope_parameters` of a config.json describes.

    Every type computes `frequency * (unscaled + (1 - unscaled) / factor)`, with its own fractions `unscaled`. They are
    1 for `default` and 0 for `linear`. For `llama3` (arXiv 2407.21783) and `yarn` (arXiv 2309.00071, equations 17 to
    19) they are 1 for short waves and fall to 0 for long waves. Raises `ValueError` if a setting is wrong or not
    supported.
    """
    rope_type = parameters.get("rope_type", "default")
    if not isinstance(rope_type, str) or rope_type not in _UNSCALED_FRACTIONS:
        raise ValueError(f"RoPE of type {rope_type!r} is not supported; supported: {', '.join(_UNSCALED_FRACTIONS)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1, and rotating only a part of a head is not supported")
    for name, value in {"rope_theta": None, **parameters}.items():
        if name in ("rope_type", "type", "truncate") or (name in _YARN_OPTIONAL and value is None):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"RoPE: {name} is {value!r}, expected a positive number")
    theta, factor = float(parameters["rope_theta"]), float(parameters.get("factor", 1.0))
    if theta <= 1:
        raise ValueError(f"RoPE: rope_theta is {parameters['rope_theta']!r}, expected a number above 1")
    if head_dim % 2:
        raise ValueError(f"RoPE: the width of a head is {head_dim}, expected an even number")
    frequencies = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
    unscaled = _UNSCALED_FRACTIONS[rope_type](frequencies, parameters)
    scaled = frequencies * (unscaled + (1 - unscaled) / factor)
    return RopeTable(tuple(scaled.tolist()), _yarn_scale(parameters, factor) if rope_type == "yarn" else 1.0)


def _llama3_unscaled(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    turns_in_original_context = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if low >= high:
        raise ValueError(f"RoPE: low_freq_factor {low} must be below high_freq_factor {high}")
    return np.clip((turns_in_original_context - low) / (high - low), 0, 1)


def _yarn_unscaled(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    head_dim, theta = 2 * len(frequencies), parameters["rope_theta"]
    original_context = parameters["original_max_position_embeddings"]
    # The (fractional) pairs of dimensions that make `beta_fast` and `beta_slow` turns in the original context.
    low, high = (
        head_dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1)
    )
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return 1 - np.clip((np.arange(len(frequencies)) - low) / (high - low or 0.001), 0, 1)


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    weights = (mscale, mscale_all_dim) if mscale and mscale_all_dim else (1.0, 0.0)
    numerator, denominator = (0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0 for weight in weights)
    return numerator / denominator


_YARN_OPTIONAL = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
_UNSCALED_FRACTIONS = {
    "default": lambda frequencies, _: np.ones_like(frequencies),
    "linear": lambda frequencies, _: np.zeros_like(frequencies),
    "llama3": _llama3_unscaled,
    "yarn": _yarn_unscaled,
}


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, rope: RopeTable) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of each head by the token's position, as Hugging Face does, in float32."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * jnp.reshape(frequencies, (1, 1, 1, -1))
    cos, sin = jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
