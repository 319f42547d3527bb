"""What did the frozen model say? Log-probs of every answer, computed once before training."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from thinkpo_jax.config import RunError
from thinkpo_jax.model import Transformer
from thinkpo_jax.objectives import Objective, sequence_logprobs
from thinkpo_jax.packing import Batches, DeviceBatch, HostBatch
from thinkpo_jax.sharding import put_batch

# How far the first loss may be from ln 2: the reference and the loss are two compiled programs, and bfloat16 rounds
# differently in each.
START_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def reference_logprobs(
    model: Transformer, batches: Batches, mesh: Mesh, *, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """The model's log-prob of each answer of each example: float32 [examples, answers].

    Uses the rows that the first epoch of training uses, and the function that the objective uses.
    """
    score = jax.jit(lambda model, batch: jax.lax.map(lambda rows: sequence_logprobs(model, rows), batch))
    logprobs = np.full((len(batches.examples), batches.answers), np.nan, np.float32)
    epoch = batches.first_epoch()
    for index in range(len(epoch)):
        batch = epoch[index]
        real = batch.examples >= 0
        logprobs[batch.examples[real]] = np.asarray(score(model, put_batch(batch, mesh)))[real]
        if progress is not None:
            progress(index + 1)
    assert np.isfinite(logprobs).all(), "an example without reference log-probs"
    return logprobs


def check_start(objective: Objective, model: Transformer, batch: HostBatch, mesh: Mesh) -> float:
    """The loss on the first batch before any update; it must be ln 2, because policy and reference are one model.

    Raises `RunError` otherwise.
    """

    def sums(model: Transformer, batch: DeviceBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        per_micro_batch = jax.lax.map(lambda rows: objective(model, rows), batch)
        weight = per_micro_batch.weight.sum()
        return (
            per_micro_batch.loss.sum() / weight,
            jnp.abs(per_micro_batch.metrics["rewards/margins"]).sum() / weight,
            weight,
        )

    loss, margin, weight = (float(value) for value in jax.jit(sums)(model, put_batch(batch, mesh)))
    if not abs(loss - math.log(2)) <= START_TOLERANCE[model.compute.dtype]:
        raise RunError(
            f"before the first update the loss over {weight:.0f} pairs is {loss:.6f}, not ln 2 = {math.log(2):.6f} "
            f"(mean reward margin {margin:.3g}): the cached reference log-probs are not those of the model that starts."
        )
    return loss
