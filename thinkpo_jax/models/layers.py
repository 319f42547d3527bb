"""RMS norm and linear projection, with hand-written gradients."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


@jax.custom_vjp
def linear(x_BTI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """Returns x @ weight, [B, T, O]. The gradient of the weight transposes the narrower of its two factors.

    Autodiff always transposes the gradient of the output. XLA on CPU does that inside the loop of the product. For the
    wide activations of the MLP the transpose then takes longer than the product.
    """
    return x_BTI @ weight_IO


def _linear_backward(residuals: tuple[jax.Array, jax.Array], dout_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTI, weight_IO = residuals
    if weight_IO.shape[0] <= weight_IO.shape[1]:
        dweight_IO = jnp.einsum("BTI,BTO->IO", x_BTI, dout_BTO)
    else:
        dweight_IO = jnp.einsum("BTO,BTI->OI", dout_BTO, x_BTI).T
    return jnp.einsum("BTO,IO->BTI", dout_BTO, weight_IO), dweight_IO


linear.defvjp(lambda x_BTI, weight_IO: (x_BTI @ weight_IO, (x_BTI, weight_IO)), _linear_backward)


def rms_norm(x: jax.Array, weight: nnx.Param, eps: float) -> jax.Array:
    """Returns x / rms(x) * weight over the last axis, computed in float32, in the dtype of x.

    The forward pass saves x and one number per vector. Autodiff would save every intermediate product.
    """
    return _rms_norm(x, weight[...], eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return _rms_norm_forward(x, weight, eps)[0]


def _rms_norm_forward(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * jnp.expand_dims(weight, tuple(range(x.ndim - 1)))).astype(x.dtype), (x, scale, weight)


def _rms_norm_backward(_eps: float, residuals: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, weight = residuals
    leading_axes = tuple(range(x.ndim - 1))
    normed, dout = x.astype(jnp.float32) * scale, dout.astype(jnp.float32)
    product = dout * normed
    weight = jnp.expand_dims(weight, leading_axes)
    dx = scale * (dout * weight - normed * jnp.mean(product * weight, axis=-1, keepdims=True))
    return dx.astype(x.dtype), product.sum(axis=leading_axes)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
