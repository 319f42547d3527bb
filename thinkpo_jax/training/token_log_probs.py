"""Log-probs of target tokens from hidden states, without a [tokens, vocabulary] array.

The LM head is read in blocks of the vocabulary. The forward pass keeps a running log-sum-exp. The backward pass
recomputes each block of logits. Log-sum-exp, log-probs and the accumulated gradient of hidden states are float32. The
operands of matrix products keep their dtype.

On a mesh each device reads its own columns of the head for its own rows. The forward pass reduces three float32 numbers
per token over the vocabulary axis: maximum, sum and target logit. The backward pass reduces the gradient of the hidden
states. Both passes all-gather the embed axis of the head once, before the first block.

Letters: R rows, A tokens per row, D hidden size, V vocabulary. On one device: N tokens, W width of a vocabulary block.
"""

import math

import jax
import jax.numpy as jnp

from thinkpo_jax.data.batches import NUM_REGIONS, DeviceBatch
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.context_parallel import all_gather_rows
from thinkpo_jax.runtime.integers import ceil_div
from thinkpo_jax.runtime.sharding import constrain_sharding, psum_or_reduce_scatter, shard_map_by_axes, split_mesh_axes

MAX_BLOCK_LOGITS = 2**26  # 256 MiB in float32
BLOCK_WIDTH_RANGE = (2048, 8192)
TPU_LANES = 128  # a TPU computes so many columns at once

TOKEN_AXES = ("batch", "length")
HIDDEN_AXES = (*TOKEN_AXES, None)
LM_HEAD_AXES = (None, "vocab")


def vocab_block_width(num_tokens: int, vocab_size: int) -> int:
    """Returns the columns of a block: at most about `MAX_BLOCK_LOGITS` logits, and blocks of about equal width."""
    widest = min(max(MAX_BLOCK_LOGITS // num_tokens, BLOCK_WIDTH_RANGE[0]), BLOCK_WIDTH_RANGE[1])
    num_blocks = ceil_div(vocab_size, widest)
    return min(ceil_div(vocab_size, num_blocks * TPU_LANES) * TPU_LANES, vocab_size)


@jax.custom_vjp
def token_log_probs(x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array) -> jax.Array:
    """Returns log softmax(x @ head)[target] for each token, float32 [R, A]. Differentiable in x and head.

    Under `jax.set_mesh` rows are sharded over the data axes. The gradient of the head is sharded like the head.
    """
    return _forward(x_RAD, head_DV, targets_RA)[0]


def _forward(x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    part = shard_map_by_axes(_forward_part, (HIDDEN_AXES, LM_HEAD_AXES, TOKEN_AXES), (TOKEN_AXES, TOKEN_AXES))
    log_probs_RA, log_normalizers_RA = part(x_RAD, head_DV, targets_RA)
    return log_probs_RA, (x_RAD, head_DV, targets_RA, log_normalizers_RA)


def _backward(residuals: tuple[jax.Array, ...], cotangents_RA: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    in_axes = (HIDDEN_AXES, LM_HEAD_AXES, TOKEN_AXES, TOKEN_AXES, TOKEN_AXES)
    part = shard_map_by_axes(_backward_part, in_axes, (HIDDEN_AXES, ("embed", "vocab")))
    return *part(*residuals, cotangents_RA), None


def _starts(vocab_size: int, width: int) -> jax.Array:
    """Returns the first columns of the blocks. The last block is moved back so that it ends with the vocabulary."""
    return jnp.minimum(jnp.arange(0, vocab_size, width), vocab_size - width)


def _block(
    x_ND: jax.Array, head_DV: jax.Array, targets_N: jax.Array, index: jax.Array, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns block `index` of the head, its float32 logits, and which of them are targets.

    A last block that was moved back overlaps the block before it. Its overlapping columns are -inf and no targets.
    """
    start = _starts(head_DV.shape[1], width)[index]
    head_DW = jax.lax.dynamic_slice_in_dim(head_DV, start, width, axis=1)
    columns_W = start + jnp.arange(width)
    is_new_W = columns_W >= index * width
    logits_NW = jnp.where(is_new_W[None], jnp.dot(x_ND, head_DW, preferred_element_type=jnp.float32), -jnp.inf)
    return head_DW, logits_NW, (columns_W[None] == targets_N[:, None]) & is_new_W[None]


def _flat(x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """Returns x [N, D], targets [N] relative to this device's first column, and the width of its blocks."""
    x_ND, vocab_size = x_RAD.reshape(-1, x_RAD.shape[-1]), head_DV.shape[1]
    first_column = jax.lax.axis_index(split_mesh_axes("vocab")) * vocab_size
    return x_ND, targets_RA.reshape(-1) - first_column, vocab_block_width(len(x_ND), vocab_size)


def _forward_part(x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns log-probs and log-sum-exp [R, A] of this device's rows, from its columns and the other devices' sums."""
    x_ND, targets_N, width = _flat(x_RAD, head_DV, targets_RA)

    def body(carry: tuple[jax.Array, jax.Array, jax.Array], index: jax.Array) -> tuple:
        maximum_N, total_N, target_N = carry
        _, logits_NW, is_target_NW = _block(x_ND, head_DV, targets_N, index, width)
        new_N = jnp.maximum(maximum_N, logits_NW.max(axis=-1))
        total_N = total_N * jnp.exp(maximum_N - new_N) + jnp.exp(logits_NW - new_N[:, None]).sum(axis=-1)
        return (new_N, total_N, target_N + jnp.where(is_target_NW, logits_NW, 0.0).sum(axis=-1)), None

    zeros_N = jnp.zeros(len(x_ND), jnp.float32)
    blocks = jnp.arange(len(_starts(head_DV.shape[1], width)))
    (local_maximum_N, total_N, target_N), _ = jax.lax.scan(body, (zeros_N - jnp.inf, zeros_N, zeros_N), blocks)
    maximum_N = jax.lax.pmax(local_maximum_N, split_mesh_axes("vocab"))
    total_N = total_N * jnp.exp(local_maximum_N - maximum_N)
    total_N, target_N = jax.lax.psum((total_N, target_N), split_mesh_axes("vocab"))
    log_normalizers_N = maximum_N + jnp.log(total_N)
    return (target_N - log_normalizers_N).reshape(targets_RA.shape), log_normalizers_N.reshape(targets_RA.shape)


def _backward_part(
    x_RAD: jax.Array, head_DV: jax.Array, targets_RA: jax.Array, log_normalizers_RA: jax.Array, cotangents_RA: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradient of this device's rows of x, and that of its part of the head, summed over all rows."""
    x_ND, targets_N, width = _flat(x_RAD, head_DV, targets_RA)
    log_normalizers_N, cotangents_N = log_normalizers_RA.reshape(-1), cotangents_RA.reshape(-1)
    starts = _starts(head_DV.shape[1], width)

    def body(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple:
        dx_ND, dhead_DV = carry
        head_DW, logits_NW, is_target_NW = _block(x_ND, head_DV, targets_N, index, width)
        dlogits_NW = (is_target_NW - jnp.exp(logits_NW - log_normalizers_N[:, None])) * cotangents_N[:, None]
        dlogits_NW = dlogits_NW.astype(x_ND.dtype)  # a float32 operand would make both products float32
        dx_ND = dx_ND + jnp.dot(dlogits_NW, head_DW.T, preferred_element_type=jnp.float32)
        dhead_DW = jnp.dot(x_ND.T, dlogits_NW, preferred_element_type=jnp.float32).astype(head_DV.dtype)
        return (dx_ND, jax.lax.dynamic_update_slice_in_dim(dhead_DV, dhead_DW, starts[index], axis=1)), None

    # From the last block to the first. So the block before overwrites the columns that a moved last block shares.
    zeros = (jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros_like(head_DV))
    (dx_ND, dhead_DV), _ = jax.lax.scan(body, zeros, jnp.arange(len(starts)), reverse=True)
    dx_ND = jax.lax.psum(dx_ND, split_mesh_axes("vocab")).astype(x_ND.dtype)
    return dx_ND.reshape(x_RAD.shape), psum_or_reduce_scatter(dhead_DV, over=TOKEN_AXES, axes=("embed", "vocab"))


token_log_probs.defvjp(_forward, _backward)


def answer_token_log_probs(model: Transformer, batch: DeviceBatch) -> jax.Array:
    """Returns log-probs of trained tokens, float32 [R, A], 0 in unused slots. Only they reach the LM head."""
    max_segments = math.prod(batch.reference_log_probs.shape[-3:-1])
    numbers_M = 1 + jnp.arange(max_segments)
    lengths_RM = (batch.segment_ids[:, None, :] == numbers_M[None, :, None]).sum(axis=-1)
    hidden_RTD = model(batch.token_ids, TokenPositions(batch.segment_ids, batch.positions, lengths_RM))
    gather = _gather
    if split_mesh_axes("length"):  # each device gathers the hidden states of whole rows, for its share of the slots
        gather = shard_map_by_axes(
            lambda hidden, indices: _gather(all_gather_rows(hidden), indices), (HIDDEN_AXES, TOKEN_AXES), HIDDEN_AXES
        )
    with jax.named_scope("head"):
        log_probs_RA = token_log_probs(gather(hidden_RTD, batch.loss_positions), model.lm_head(), batch.target_ids)
    return jnp.where(batch.target_regions > 0, constrain_sharding(log_probs_RA, ("batch", None)), 0.0)


def _gather(values_RT: jax.Array, indices_RA: jax.Array) -> jax.Array:
    """Returns [R, A, ...]: values [R, T, ...] at ascending indices of their row, and 0 at indices beyond the row."""

    def gather_row(values: jax.Array, indices: jax.Array) -> jax.Array:
        return values.at[indices].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)

    return jax.vmap(gather_row)(values_RT, indices_RA)


def sum_by_region(values_RA: jax.Array, batch: DeviceBatch) -> jax.Array:
    """Sums values of trained tokens over the regions of each answer; [R, P, S, 3]."""
    num_examples, num_answers = batch.reference_log_probs.shape[-3:-1]
    # Segments 1, 2, ... are the answers of the row in order. Unused slots go to bin 0.
    answers_RA = _gather(batch.segment_ids, batch.loss_positions) - 1
    bins_RA = jnp.where(batch.target_regions > 0, answers_RA * NUM_REGIONS + batch.target_regions, 0)
    num_bins = num_examples * num_answers * NUM_REGIONS + 1
    sums = jax.vmap(lambda values, bins: jax.ops.segment_sum(values, bins, num_bins))
    return sums(values_RA, bins_RA)[:, 1:].reshape(-1, num_examples, num_answers, NUM_REGIONS)
