"""What is the log-prob of each token? Hidden states in, no [tokens, vocabulary] array kept.

The head is read in blocks of the vocabulary: the forward pass keeps a running log-sum-exp, the backward pass computes
each block of logits again. Log-sum-exp, log-probs and gradients of the hidden states are float32; the operands of the
matrix products keep their dtype.

Letters: N tokens, D embed, V vocabulary, W width of a vocabulary block.
"""

import functools

import jax
import jax.numpy as jnp

VOCAB_BLOCK = 8192


def token_logprobs(x_ND: jax.Array, head_DV: jax.Array, targets_N: jax.Array) -> jax.Array:
    """log softmax(x @ head)[target] for each token, float32 [N]; differentiable in x and head."""
    return _logprobs(x_ND, head_DV, targets_N, min(VOCAB_BLOCK, head_DV.shape[1]))


def _blocks(vocabulary: int, width: int) -> jax.Array:
    """First columns of blocks that cover the vocabulary; the last one is moved back so that it ends with it."""
    return jnp.minimum(jnp.arange(0, vocabulary, width), vocabulary - width)


def _block(x_ND: jax.Array, head_DV: jax.Array, index: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """Block `index` of the head, its float32 logits, and its columns; columns of an earlier block are -inf."""
    start = _blocks(head_DV.shape[1], width)[index]
    head_DW = jax.lax.dynamic_slice_in_dim(head_DV, start, width, axis=1)
    columns_W = start + jnp.arange(width)
    logits_NW = jnp.dot(x_ND, head_DW, preferred_element_type=jnp.float32)
    return head_DW, jnp.where((columns_W >= index * width)[None], logits_NW, -jnp.inf), columns_W


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(x_ND: jax.Array, head_DV: jax.Array, targets_N: jax.Array, width: int) -> jax.Array:
    return _forward(x_ND, head_DV, targets_N, width)[0]


def _forward(x_ND: jax.Array, head_DV: jax.Array, targets_N: jax.Array, width: int) -> tuple[jax.Array, tuple]:
    def body(carry: tuple[jax.Array, jax.Array, jax.Array], index: jax.Array) -> tuple:
        maximum, total, target_logit = carry
        _, logits_NW, columns_W = _block(x_ND, head_DV, index, width)
        new_maximum = jnp.maximum(maximum, logits_NW.max(axis=-1))
        exponentials = jnp.exp(logits_NW - new_maximum[:, None])
        total = total * jnp.exp(maximum - new_maximum) + exponentials.sum(axis=-1)
        hit = (columns_W[None] == targets_N[:, None]) & (logits_NW > -jnp.inf)
        return (new_maximum, total, target_logit + jnp.where(hit, logits_NW, 0.0).sum(axis=-1)), None

    zeros = jnp.zeros(x_ND.shape[0], jnp.float32)
    count = len(range(0, head_DV.shape[1], width))
    (maximum, total, target_logit), _ = jax.lax.scan(body, (zeros - jnp.inf, zeros, zeros), jnp.arange(count))
    log_normaliser = maximum + jnp.log(total)
    return target_logit - log_normaliser, (x_ND, head_DV, targets_N, log_normaliser)


def _backward(width: int, residuals: tuple, cotangent_N: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_ND, head_DV, targets_N, log_normaliser = residuals

    def body(x_gradient: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        head_DW, logits_NW, columns_W = _block(x_ND, head_DV, index, width)
        fresh = logits_NW > -jnp.inf
        hit = (columns_W[None] == targets_N[:, None]) & fresh
        logit_gradient = ((hit - jnp.exp(logits_NW - log_normaliser[:, None])) * cotangent_N[:, None]).astype(
            x_ND.dtype
        )
        x_gradient = x_gradient + jnp.dot(logit_gradient, head_DW.T, preferred_element_type=jnp.float32)
        return x_gradient, jnp.dot(x_ND.T, logit_gradient, preferred_element_type=jnp.float32).astype(head_DV.dtype)

    vocabulary = head_DV.shape[1]
    count = len(range(0, vocabulary, width))
    x_gradient, stacked = jax.lax.scan(body, jnp.zeros(x_ND.shape, jnp.float32), jnp.arange(count))
    whole = jnp.moveaxis(stacked[:-1], 0, 1).reshape(head_DV.shape[0], (count - 1) * width)
    last = stacked[-1][:, count * width - vocabulary :]
    return x_gradient.astype(x_ND.dtype), jnp.concatenate([whole, last], axis=1), None


_logprobs.defvjp(_forward, _backward)
