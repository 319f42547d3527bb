"""How do positions enter? Rotary position embedding (arXiv 2104.09864) and its stretched forms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class RopeTable:
    """Radians per token for each pair of head dimensions, and the factor on cosine and sine."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


def build_rope(parameters: Mapping[str, Any], head_dim: int) -> RopeTable:
    """The rotation that `rope_parameters` of a config.json asks for. Raises `ValueError` for what is not built here.

    Every form is the plain frequency times `keep + (1 - keep) / factor`; they differ in what they keep:
    all (default), nothing (linear), short waves (llama3, arXiv 2407.21783; yarn, arXiv 2309.00071, equations 17 to 19).
    """
    kind = parameters.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _KEEP:
        raise ValueError(f"RoPE of type {kind!r} is not supported; supported: {', '.join(_KEEP)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1, and rotating a part of a head is not supported")
    optional = ("rope_type", "type", "truncate", *_YARN_OPTIONAL)
    for name, value in {"rope_theta": None, **parameters}.items():
        if name in optional and (value is None or name not in _YARN_OPTIONAL):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"RoPE: {name} is {value!r}, expected a positive number")
    if parameters["rope_theta"] <= 1:
        raise ValueError(f"RoPE: rope_theta is {parameters['rope_theta']!r}, expected a number above 1")
    if head_dim % 2:
        raise ValueError(f"the width of a head is {head_dim}, and RoPE needs an even one")
    theta, factor = float(parameters["rope_theta"]), float(parameters.get("factor", 1.0))
    plain = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
    keep = _KEEP[kind](plain, parameters)
    scaled = plain * (keep + (1 - keep) / factor)
    return RopeTable(tuple(scaled.tolist()), _yarn_scale(parameters, factor) if kind == "yarn" else 1.0)


def _llama3_keep(plain: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    turns = parameters["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the original context
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if low >= high:
        raise ValueError(f"RoPE: low_freq_factor {low} must be below high_freq_factor {high}")
    return np.clip((turns - low) / (high - low), 0, 1)


def _yarn_keep(plain: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    head_dim, theta = 2 * len(plain), parameters["rope_theta"]

    def dimension(turns: float) -> float:
        """The (fractional) pair of dimensions that turns so often within the original context."""
        waves = parameters["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return 1 - np.clip((np.arange(len(plain)) - low) / (high - low or 0.001), 0, 1)


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    def stretch(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    top, bottom = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return stretch(top) / stretch(bottom) if top and bottom else stretch(1.0)


_YARN_OPTIONAL = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
_KEEP = {
    "default": lambda plain, _: np.ones_like(plain),
    "linear": lambda plain, _: np.zeros_like(plain),
    "llama3": _llama3_keep,
    "yarn": _yarn_keep,
}


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, rope: RopeTable) -> jax.Array:
    """Turns the two halves of each head of `x` by its position, as Hugging Face lays them out; in float32 inside."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * jnp.reshape(frequencies, (1, 1, 1, -1))
    cos, sin = jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
