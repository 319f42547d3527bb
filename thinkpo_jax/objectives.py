"""What is minimised? Each objective maps a model and rows to sums, so that any split of the rows gives the same result.

Letters: R rows, T row length, P examples per row, S answers per example (2 for a pair: chosen, rejected).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinkpo_jax.attention import Places
from thinkpo_jax.logprobs import token_logprobs
from thinkpo_jax.losses import sigmoid_loss
from thinkpo_jax.model import Transformer
from thinkpo_jax.packing import DeviceBatch


class Sums(NamedTuple):
    """What an objective returns. Divided by `weight`, `loss` and `metrics` are means."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


Objective = Callable[[Transformer, DeviceBatch], Sums]


def answer_logprobs(model: Transformer, batch: DeviceBatch) -> jax.Array:
    """Log-prob of each target token that belongs to an answer, 0 elsewhere; float32 [R, T]."""
    hidden_RTD, _ = model(batch.tokens, Places(batch.segments, batch.positions))
    logprobs = token_logprobs(hidden_RTD.reshape(-1, hidden_RTD.shape[-1]), model.head(), batch.targets.reshape(-1))
    return jnp.where(batch.answer_mask > 0, logprobs.reshape(batch.targets.shape), 0.0)


def sequence_logprobs(model: Transformer, batch: DeviceBatch) -> jax.Array:
    """Log-prob of each answer, summed over its tokens in float32; [R, P, S]."""
    examples, answers = batch.reference.shape[-2:]
    logprobs_RT = answer_logprobs(model, batch)
    # Segment 0 is padding and holds no answer; segments 1, 2, ... are the answers of the row, in order.
    sums = jax.vmap(lambda values, ids: jax.ops.segment_sum(values, ids, examples * answers + 1))
    return sums(logprobs_RT, batch.segments)[:, 1:].reshape(-1, examples, answers)


def sft(model: Transformer, batch: DeviceBatch) -> Sums:
    """Cross-entropy of the answer tokens; the weight is their number."""
    loss = -answer_logprobs(model, batch).sum()
    return Sums(loss, batch.answer_mask.sum(), {})


def thinkpo(beta: float) -> Objective:
    """DPO on (long, short) pairs: arXiv 2502.13173, section 2.2, with the loss of arXiv 2305.18290, equation 7.

    Log-probs are summed over the answer, not averaged. The weight is the number of pairs. Metrics carry TRL's names.
    """

    def objective(model: Transformer, batch: DeviceBatch) -> Sums:
        logps_RPS = sequence_logprobs(model, batch)
        real_RP = batch.examples >= 0
        rewards_RPS = beta * (logps_RPS - batch.reference)
        margins_RP = rewards_RPS[..., 0] - rewards_RPS[..., 1]

        def total(values_RP: jax.Array) -> jax.Array:
            return jnp.where(real_RP, values_RP, 0.0).sum()

        metrics = {
            "rewards/chosen": total(rewards_RPS[..., 0]),
            "rewards/rejected": total(rewards_RPS[..., 1]),
            "rewards/margins": total(margins_RP),
            "rewards/accuracies": total((margins_RP > 0).astype(jnp.float32)),
            "logps/chosen": total(logps_RPS[..., 0]),
            "logps/rejected": total(logps_RPS[..., 1]),
        }
        return Sums(total(sigmoid_loss(margins_RP)), real_RP.sum().astype(jnp.float32), metrics)

    return objective
