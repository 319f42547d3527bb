"""What did the frozen model say? Log-probs of every answer, computed once before training."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from thinkpo_jax.config import RunError
from thinkpo_jax.model import Transformer
from thinkpo_jax.objectives import Objective, Sums, region_logprobs
from thinkpo_jax.packing import Batches, DeviceBatch, HostBatch
from thinkpo_jax.sharding import put_batch

# How far a live log-prob may be from the cached one, relative to 1 + its size: the two come from two compiled programs,
# and bfloat16 rounds differently in each.
START_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}


def reference_logprobs(
    model: Transformer, batches: Batches, mesh: Mesh, *, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """The model's log-prob of each region of each answer of each example: float32 [examples, answers, 3].

    Uses the rows that the first epoch of training uses, and the function that the objective uses.
    """
    score = jax.jit(lambda model, batch: jax.lax.map(lambda rows: region_logprobs(model, rows), batch))
    logprobs = np.full(batches.reference.shape, np.nan, np.float32)
    epoch = batches.first_epoch()
    for index in range(len(epoch)):
        batch = epoch[index]
        real = batch.examples >= 0
        logprobs[batch.examples[real]] = np.asarray(score(model, put_batch(batch, mesh)))[real]
        if progress is not None:
            progress(index + 1)
    if not np.isfinite(logprobs).all():
        example = int(np.flatnonzero(~np.isfinite(logprobs).all(axis=(1, 2)))[0])
        raise RunError(
            f"the start model's log-probs of example {example} are {logprobs[example].sum(axis=-1).tolist()}: its "
            "weights are broken, or too large for the compute dtype."
        )
    return logprobs


def check_start(objective: Objective, model: Transformer, batch: HostBatch, mesh: Mesh) -> float:
    """The loss on the first batch before any update; policy and reference are one model, so it is ln 2.

    Raises `RunError` where the log-prob of any answer differs from its cached one, saying by how much.
    """

    def rows(model: Transformer, rows: DeviceBatch) -> tuple[Sums, jax.Array]:
        return objective(model, rows), region_logprobs(model, rows)

    sums, live = jax.jit(lambda model, batch: jax.lax.map(functools.partial(rows, model), batch))(
        model, put_batch(batch, mesh)
    )
    loss = float(sums.loss.sum() / sums.weight.sum())
    real = batch.examples >= 0
    cached = batch.reference.sum(axis=-1)[real]
    apart = np.abs(np.asarray(live).sum(axis=-1)[real] - cached) / (1 + np.abs(cached))
    if not apart.max() <= START_TOLERANCE[model.compute.dtype]:
        example = int(batch.examples[real][apart.max(axis=-1).argmax()])
        raise RunError(
            f"before the first update the model's log-probs differ from the cached reference by {apart.max():.2g} "
            f"of their size (example {example}); the loss is {loss:.6f}, not ln 2 = {math.log(2):.6f}. The cached "
            "reference is not that of the model that starts: remove the stage's folder and run again."
        )
    return loss
