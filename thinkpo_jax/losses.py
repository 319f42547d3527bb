"""The mathematics of preferences: arrays in, arrays out."""

import jax


def sigmoid_loss(margins: jax.Array) -> jax.Array:
    """The DPO loss -log sigmoid(margin) of each pair (arXiv 2305.18290, equation 7); ln 2 at margin 0.

    `margins` are differences of rewards, beta * (log-ratio of chosen - log-ratio of rejected), float32.
    """
    return -jax.nn.log_sigmoid(margins)
