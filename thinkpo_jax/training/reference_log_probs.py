"""Log-probs of all answers under the frozen reference model: computed once before training, then checked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from thinkpo_jax.data.batches import BatchPlan, DeviceBatch, HostBatch
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.devices import compiler_options
from thinkpo_jax.runtime.processes import broadcast_from_primary, is_primary_process
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import LossSums, PreferenceConfig, PreferenceLossFn, expected_initial_loss
from thinkpo_jax.training.reference_cache import ReferenceCache, example_digest, reference_cache_folder
from thinkpo_jax.training.token_log_probs import answer_token_log_probs, sum_by_region

# How far a recomputed log-prob x of n tokens may be from the cached one: RELATIVE_TOLERANCE * (1 + |x|) plus
# NOISE_NATS_PER_SQRT_TOKEN * sqrt(n). In bfloat16 rounding depends on the position of an answer in its row.
# Measured with SmolLM2-135M on real pairs in rows of 1,600 and 3,072 tokens: 0.034 nats per token (rms), at most
# 0.1 sqrt(n) for an answer. In float32 it was 2e-5 sqrt(n).
RELATIVE_TOLERANCE, NOISE_NATS_PER_SQRT_TOKEN = 1e-5, {"float32": 0.0, "bfloat16": 0.3}

ProgressCallback = Callable[[int, int], object]  # called with the number of finished batches and of all batches


def load_or_compute_reference(
    model: Transformer,
    batches: BatchPlan,
    mesh: Mesh,
    *,
    identity: Mapping[str, str],
    on_progress: ProgressCallback | None = None,
) -> np.ndarray:
    """Returns the result of `compute_reference`, and computes only the examples that are not cached.

    Each batch is cached at once, so an interrupted pass resumes. Process 0 reads and writes the cache for all.
    """
    cache = ReferenceCache(identity, answers=batches.answers_per_example)
    digests = [example_digest(example) for example in batches.examples]
    with cache.writing():
        log_probs = np.full(batches.reference_log_probs.shape, np.nan, np.float32)
        if is_primary_process():
            cached = cache.read()
            for index, digest in enumerate(digests):
                if digest in cached:
                    log_probs[index] = cached[digest]
        log_probs = broadcast_from_primary(log_probs)
        missing = {digests[i]: i for i in np.flatnonzero(np.isnan(log_probs).any(axis=(1, 2))).tolist()}
        log_info(_describe_work(cache, len(digests), len({*digests} - missing.keys()), len(missing)))
        for indices, batch_log_probs in _reference_batches(model, batches, [*missing.values()], mesh, on_progress):
            log_probs[indices] = batch_log_probs
            if is_primary_process():
                cache.add([digests[index] for index in indices], batch_log_probs)
    # Examples with equal tokens are computed once.
    index_by_digest = {digest: index for index, digest in reversed([*enumerate(digests)])} | missing
    return log_probs[[index_by_digest[digest] for digest in digests]]


def _describe_work(cache: ReferenceCache, num_examples: int, num_cached: int, num_missing: int) -> str:
    if not num_missing:
        return f"reference: the log-probs of all {num_examples} examples are cached in {cache.folder}"
    if num_cached:
        reason = f"{num_cached} others are cached"
    elif keys := cache.differing_identity_keys():
        reason = f"the cached ones differ in: {', '.join(keys)}"
    else:
        reason = "nothing is cached yet"
    return f"reference: computing the log-probs of {num_missing} examples ({reason})"


def compute_reference(model: Transformer, batches: BatchPlan, mesh: Mesh) -> np.ndarray:
    """Returns the model's log-prob of each region of each answer of each example: float32 [examples, answers, 3].

    The rows have the shape of training rows, and the log-probs come from the function that the objective uses. Raises
    `RunError` if a log-prob is not finite.
    """
    log_probs = np.zeros(batches.reference_log_probs.shape, np.float32)
    for indices, batch_log_probs in _reference_batches(model, batches, range(len(batches.examples)), mesh, None):
        log_probs[indices] = batch_log_probs
    return log_probs


def make_reference_step(mesh: Mesh) -> Callable[[Transformer, DeviceBatch], jax.Array]:
    """Returns the jitted function from a batch, of the shape that updates have, to its log-probs [M, R, P, S, 3]."""
    return _jit_over_micro_batches(lambda model, rows: sum_by_region(answer_token_log_probs(model, rows), rows), mesh)


def _jit_over_micro_batches(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Jits a function of a model and rows over the micro-batches. Every device holds the whole result."""
    return jax.jit(
        lambda model, batch: jax.lax.map(lambda rows: function(model, rows), batch),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=compiler_options(mesh),
    )


def _reference_batches(
    model: Transformer, batches: BatchPlan, indices: Sequence[int], mesh: Mesh, on_progress: ProgressCallback | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the example ids of each batch, and their log-probs."""
    reference_step = make_reference_step(mesh)
    planned = batches.batches_of(indices)
    for number, batch in enumerate(planned, 1):
        is_real = batch.example_ids >= 0
        example_ids = batch.example_ids[is_real]
        log_probs = np.asarray(reference_step(model, put_batch(batch, mesh)))[is_real]
        is_finite = np.isfinite(log_probs).all(axis=(1, 2))
        if not is_finite.all():
            index = int(np.flatnonzero(~is_finite)[0])
            raise RunError(
                f"the start model's log-probs of example {example_ids[index]} are "
                f"{log_probs[index].sum(axis=-1).tolist()}. Its weights are broken, or too large for this dtype. "
                "Try `compute.dtype: float32`."
            )
        yield example_ids, log_probs
        if on_progress is not None:
            on_progress(number, len(planned))


def check_initial_loss(
    config: PreferenceConfig, loss_fn: PreferenceLossFn, model: Transformer, batch: HostBatch, mesh: Mesh
) -> float:
    """Returns the loss on a batch before any update. Policy and reference are the same model, so for DPO it is ln 2.

    Raises `RunError` if a log-prob differs from the cached reference. The model is also compared with its own
    log-probs. Raises `RunError` if its margins are then not 0, or its loss is not `expected_initial_loss`.
    """

    def check_rows(model: Transformer, rows: DeviceBatch) -> tuple[LossSums, LossSums, jax.Array, jax.Array]:
        log_probs_RA = answer_token_log_probs(model, rows)
        live = sum_by_region(log_probs_RA, rows)
        lengths = sum_by_region((rows.target_regions > 0).astype(np.float32), rows)
        itself = loss_fn(log_probs_RA, rows._replace(reference_log_probs=live))
        return loss_fn(log_probs_RA, rows), itself, live, lengths

    program = _jit_over_micro_batches(check_rows, mesh)
    against_cache, itself, live, lengths = jax.device_get(program(model, put_batch(batch, mesh)))
    loss, loss_itself = (float(sums.loss.sum() / sums.weight.sum()) for sums in (against_cache, itself))
    names = ("nll/chosen", "rewards/margins")
    nll, margins = (float(itself.metrics[name].sum() / itself.weight.sum()) for name in names)
    expected = expected_initial_loss(config, nll)
    is_real = batch.example_ids >= 0
    cached = batch.reference_log_probs.sum(axis=-1)[is_real]
    differences = np.abs(live.sum(axis=-1)[is_real] - cached)
    noise = NOISE_NATS_PER_SQRT_TOKEN[model.compute.dtype] * np.sqrt(lengths.sum(axis=-1)[is_real])
    allowed = RELATIVE_TOLERANCE * (1 + np.abs(cached)) + noise
    if not (differences <= allowed).all():
        example, side = np.unravel_index((differences / allowed).argmax(), differences.shape)
        raise RunError(
            f"before the first update, the model's log-probs differ from the cached reference by "
            f"{differences[example, side]:.3g} nats, but rounding explains only {allowed[example, side]:.3g} (example "
            f"{batch.example_ids[is_real][example]}). The loss is {loss:.6f} instead of {expected:.6f}. The cached "
            f"reference belongs to another model. Remove {reference_cache_folder()} and run again."
        )
    if not (abs(margins) <= 1e-5 and abs(loss_itself - expected) <= 1e-5 * (1 + abs(expected))):
        raise RunError(
            f"before the first update, the model's margins against its own log-probs are {margins:.6g} instead of 0, "
            f"and the loss is {loss_itself:.6f} instead of {expected:.6f}. Rows and answers are mixed up. This is a "
            "bug of thinkpo_jax. Please report it with the configuration."
        )
    return loss
