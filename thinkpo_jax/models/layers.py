"""RMS norm and linear projection."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


@jax.custom_vjp
def linear(x_BTI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """x @ weight, [B, T, O]. Of the two factors of the weight's gradient the narrower one is transposed.

    Autodiff transposes the gradient of the output. XLA on CPU does so inside the loop that computes it, which for the
    wide activations of the feed-forward takes longer than the product.
    """
    return x_BTI @ weight_IO


def _project_forward(x_BTI: jax.Array, weight_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x_BTI @ weight_IO, (x_BTI, weight_IO)


def _project_backward(residuals: tuple[jax.Array, jax.Array], dout_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTI, weight_IO = residuals
    if weight_IO.shape[0] <= weight_IO.shape[1]:
        dweight_IO = jnp.einsum("BTI,BTO->IO", x_BTI, dout_BTO)
    else:
        dweight_IO = jnp.einsum("BTO,BTI->OI", dout_BTO, x_BTI).T
    return jnp.einsum("BTO,IO->BTI", dout_BTO, weight_IO), dweight_IO


linear.defvjp(_project_forward, _project_backward)


def rms_norm(x: jax.Array, weight: nnx.Param, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis, computed in float32, returned in the dtype of x."""
    return _rms_norm(x, weight[...], eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return _rms_norm_forward(x, weight, eps)[0]


def _rms_norm_forward(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Keeps x and one number a vector for the backward pass; autodiff would keep each product on the way."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return _times(x32 * scale, weight).astype(x.dtype), (x, scale, weight)


def _rms_norm_backward(_eps: float, residuals: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, weight = residuals
    normed, dout = x.astype(jnp.float32) * scale, dout.astype(jnp.float32)
    along = dout * normed
    dx = scale * (_times(dout, weight) - normed * jnp.mean(_times(along, weight), axis=-1, keepdims=True))
    return dx.astype(x.dtype), along.sum(axis=tuple(range(x.ndim - 1)))


def _times(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jnp.expand_dims(weight, tuple(range(x.ndim - 1)))


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
