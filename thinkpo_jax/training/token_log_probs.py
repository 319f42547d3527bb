"""What is the log-prob of each token? Hidden states in, no [tokens, vocabulary] array kept.

The head is read in blocks of the vocabulary: the forward pass keeps a running log-sum-exp, the backward pass computes
each block of logits again. Log-sum-exp, log-probs and sums of the gradient of hidden states are float32; the operands
of the matrix products keep their dtype.

On a mesh each device reads its own columns of the head for its own rows. Three float32 numbers per token cross the
vocabulary axis in the forward pass (maximum, total, logit of the target), the gradient of hidden states in the backward
pass. Both passes gather the head's embed axis once, before the first block.

Letters: R rows, A tokens per row, D embed, V vocabulary; of one device: N tokens, W width of a vocabulary block.
"""

import math

import jax
import jax.numpy as jnp

from thinkpo_jax.data.batches import NUM_REGIONS, DeviceBatch
from thinkpo_jax.models.attention.dense import TokenPositions
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.context_parallel import all_gather_rows
from thinkpo_jax.runtime.sharding import constrain_sharding, psum_or_reduce_scatter, shard_map_by_axes, split_mesh_axes

MAX_BLOCK_LOGITS = 2**26  # of one block: 256 MiB in float32
BLOCK_WIDTH_RANGE = (2048, 8192)  # the narrowest and the widest block
TPU_LANES = 128  # what a TPU computes at once

TOKEN_AXES = ("batch", "length")
HIDDEN_AXES = (*TOKEN_AXES, None)
LM_HEAD_AXES = (None, "vocab")


def vocab_block_width(tokens: int, vocabulary: int) -> int:
    """Columns of a block: about `LOGITS` logits at most, and blocks of a device about equally wide."""
    widest = min(max(MAX_BLOCK_LOGITS // tokens, BLOCK_WIDTH_RANGE[0]), BLOCK_WIDTH_RANGE[1])
    count = -(-vocabulary // widest)
    return min(-(-vocabulary // (count * TPU_LANES)) * TPU_LANES, vocabulary)


@jax.custom_vjp
def token_log_probs(x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array) -> jax.Array:
    """log softmax(x @ head)[target] for each token, float32 [R, A]; differentiable in x and head.

    Under `jax.set_mesh` rows are split over the data axes, the vocabulary and the head's gradient like the head.
    """
    return _forward(x_RAD, head_DV, targets_RA)[0]


def _forward(x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    part = shard_map_by_axes(_forward_part, (HIDDEN_AXES, LM_HEAD_AXES, TOKEN_AXES), (TOKEN_AXES, TOKEN_AXES))
    logprobs_RA, normalisers_RA = part(x_RAD, head_DV, targets_RA)
    return logprobs_RA, (x_RAD, head_DV, targets_RA, normalisers_RA)


def _backward(residuals: tuple[jax.Array, ...], cotangents_RA: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    part = shard_map_by_axes(
        _backward_part,
        (HIDDEN_AXES, LM_HEAD_AXES, TOKEN_AXES, TOKEN_AXES, TOKEN_AXES),
        (HIDDEN_AXES, ("embed", "vocab")),
    )
    return *part(*residuals, cotangents_RA), None


def _starts(vocabulary: int, width: int) -> jax.Array:
    """First columns of blocks that cover the vocabulary; the last one is moved back so that it ends with it."""
    return jnp.minimum(jnp.arange(0, vocabulary, width), vocabulary - width)


def _block(
    x_ND: jax.Array, head_DV: jax.Array, targets_N: jax.Array, index: jax.Array, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block `index` of the head, its float32 logits, and which of them are targets.

    Columns of the block before, which a last block that was moved back has too, are -inf and no targets.
    """
    start = _starts(head_DV.shape[1], width)[index]
    head_DW = jax.lax.dynamic_slice_in_dim(head_DV, start, width, axis=1)
    columns_W = start + jnp.arange(width)
    fresh_W = columns_W >= index * width
    logits_NW = jnp.where(fresh_W[None], jnp.dot(x_ND, head_DW, preferred_element_type=jnp.float32), -jnp.inf)
    return head_DW, logits_NW, (columns_W[None] == targets_N[:, None]) & fresh_W[None]


def _flat(x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """x [N, D], targets [N] counted from this device's first column, and the width of its blocks."""
    x_ND, vocabulary = x_RAD.reshape(-1, x_RAD.shape[-1]), head_DV.shape[1]
    first = jax.lax.axis_index(split_mesh_axes("vocab")) * vocabulary
    return x_ND, targets_RA.reshape(-1) - first, vocab_block_width(len(x_ND), vocabulary)


def _forward_part(x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probs and log-sum-exp [R, A] of this device's rows, from its columns and the other devices' sums."""
    x_ND, targets_N, width = _flat(x_RAD, head_DV, targets_RA)

    def body(carry: tuple[jax.Array, jax.Array, jax.Array], index: jax.Array) -> tuple:
        maximum_N, total_N, target_N = carry
        _, logits_NW, hit_NW = _block(x_ND, head_DV, targets_N, index, width)
        new_N = jnp.maximum(maximum_N, logits_NW.max(axis=-1))
        total_N = total_N * jnp.exp(maximum_N - new_N) + jnp.exp(logits_NW - new_N[:, None]).sum(axis=-1)
        return (new_N, total_N, target_N + jnp.where(hit_NW, logits_NW, 0.0).sum(axis=-1)), None

    zeros_N = jnp.zeros(len(x_ND), jnp.float32)
    blocks = jnp.arange(len(_starts(head_DV.shape[1], width)))
    (own_N, total_N, target_N), _ = jax.lax.scan(body, (zeros_N - jnp.inf, zeros_N, zeros_N), blocks)
    maximum_N = jax.lax.pmax(own_N, split_mesh_axes("vocab"))
    total_N, target_N = jax.lax.psum((total_N * jnp.exp(own_N - maximum_N), target_N), split_mesh_axes("vocab"))
    normalisers_N = maximum_N + jnp.log(total_N)
    return (target_N - normalisers_N).reshape(targets_RA.shape), normalisers_N.reshape(targets_RA.shape)


def _backward_part(
    x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array, normalisers_RA: jax.Array, cotangents_RA: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of this device's rows of x and, summed over all rows, of its part of the head."""
    x_ND, targets_N, width = _flat(x_RAD, head_DV, targets_RA)
    normalisers_N, cotangents_N = normalisers_RA.reshape(-1), cotangents_RA.reshape(-1)
    starts = _starts(head_DV.shape[1], width)

    def body(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple:
        dx_ND, dhead_DV = carry
        head_DW, logits_NW, hit_NW = _block(x_ND, head_DV, targets_N, index, width)
        dlogits_NW = (hit_NW - jnp.exp(logits_NW - normalisers_N[:, None])) * cotangents_N[:, None]
        dlogits_NW = dlogits_NW.astype(x_ND.dtype)  # a float32 operand would make both products float32
        dx_ND = dx_ND + jnp.dot(dlogits_NW, head_DW.T, preferred_element_type=jnp.float32)
        dhead_DW = jnp.dot(x_ND.T, dlogits_NW, preferred_element_type=jnp.float32).astype(head_DV.dtype)
        return (dx_ND, jax.lax.dynamic_update_slice_in_dim(dhead_DV, dhead_DW, starts[index], axis=1)), None

    # From the last block to the first: what a block that was moved back writes before its own columns is overwritten.
    zeros = (jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros_like(head_DV))
    (dx_ND, dhead_DV), _ = jax.lax.scan(body, zeros, jnp.arange(len(starts)), reverse=True)
    dx_ND = jax.lax.psum(dx_ND, split_mesh_axes("vocab")).astype(x_ND.dtype)
    return dx_ND.reshape(x_RAD.shape), psum_or_reduce_scatter(dhead_DV, over=TOKEN_AXES, axes=("embed", "vocab"))


token_log_probs.defvjp(_forward, _backward)


def answer_token_log_probs(model: Transformer, batch: DeviceBatch) -> jax.Array:
    """Log-prob of each trained token, 0 in unused slots; float32 [R, A]. No other token reaches the head."""
    numbers_M = 1 + jnp.arange(math.prod(batch.reference_log_probs.shape[-3:-1]))  # of the segments that a row may have
    lengths_RM = (batch.segment_ids[:, None, :] == numbers_M[None, :, None]).sum(axis=-1)
    hidden_RTD, _ = model(batch.token_ids, TokenPositions(batch.segment_ids, batch.positions, lengths_RM))
    gather = _at
    if split_mesh_axes(
        "length"
    ):  # of a row that is split each device gathers all hidden states, for its share of the slots
        gather = shard_map_by_axes(
            lambda hidden, places: _at(all_gather_rows(hidden), places), (HIDDEN_AXES, TOKEN_AXES), HIDDEN_AXES
        )
    logprobs_RA = token_log_probs(gather(hidden_RTD, batch.loss_positions), model.lm_head(), batch.target_ids)
    return jnp.where(batch.target_regions > 0, constrain_sharding(logprobs_RA, ("batch", None)), 0.0)


def _at(values_RT: jax.Array, places_RA: jax.Array) -> jax.Array:
    """[R, T, ...] at places, 0 at those beyond the row; [R, A, ...]."""

    def of_row(values: jax.Array, places: jax.Array) -> jax.Array:
        found = values.at[places]
        return found.get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)

    return jax.vmap(of_row)(values_RT, places_RA)


def sum_by_region(values_RA: jax.Array, batch: DeviceBatch) -> jax.Array:
    """Values of trained tokens summed over the regions of every answer; [R, P, S, 3]."""
    examples, answers = batch.reference_log_probs.shape[-3:-1]
    # Segments 1, 2, ... are the answers of the row, in order; what belongs to none goes to place 0.
    answers_RA = _at(batch.segment_ids, batch.loss_positions) - 1
    places_RA = jnp.where(batch.target_regions > 0, answers_RA * NUM_REGIONS + batch.target_regions, 0)
    sums = jax.vmap(lambda values, places: jax.ops.segment_sum(values, places, examples * answers * NUM_REGIONS + 1))
    return sums(values_RA, places_RA)[:, 1:].reshape(-1, examples, answers, NUM_REGIONS)


def answer_region_log_probs(model: Transformer, batch: DeviceBatch) -> jax.Array:
    """Log-prob of each region of each answer, summed over its tokens in float32; [R, P, S, 3]."""
    return sum_by_region(answer_token_log_probs(model, batch), batch)
