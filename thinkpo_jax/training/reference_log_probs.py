"""What did the frozen model say? Log-probs of every answer, computed once before training and kept by content.

Below `store_folder()` every identity (weights, compute dtype, kernel of attention, device, jaxlib, this file's format)
has a folder with two files: `identity.json`, and `logprobs`, records of one example each (its digest, its log-probs, a
checksum) in the order in which they were computed. A record is looked up by the digest of its token ids, which stand
for the row, the tokenizer, the template and the length policy alike; so another share of the same data finds what is
there, and adds the rest.
"""

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
from thinkpo_jax.training.token_log_probs import answer_region_log_probs, answer_token_log_probs, sum_by_region

# How far a live log-prob of n tokens may be from the cached one: SUMS of 1 + its size, and NOISE nats times sqrt(n). In
# bfloat16 an answer that stands elsewhere in a row is rounded otherwise, by 0.034 nats per token (rms; SmolLM2-135M on
# real pairs in rows of 1,600 and 3,072), 0.1 sqrt(n) at most for an answer; in float32 by 2e-5 sqrt(n).
RELATIVE_TOLERANCE, NOISE_NATS_PER_SQRT_TOKEN = 1e-5, {"float32": 0.0, "bfloat16": 0.3}

ProgressCallback = Callable[[int, int], object]  # is told how many batches are done, of how many


def load_or_compute_reference(
    model: Transformer,
    batches: BatchPlan,
    mesh: Mesh,
    *,
    identity: Mapping[str, str],
    on_progress: ProgressCallback | None = None,
) -> np.ndarray:
    """What `reference_logprobs` gives, for all examples; only those are computed that are not kept on disk.

    What is computed is kept batch by batch: a pass that was stopped goes on where it was. With several processes the
    first one reads and writes, and the others get what it found.
    """
    store = ReferenceCache(identity, answers=batches.answers_per_example)
    digests = [example_digest(example) for example in batches.examples]
    with store.writing():
        logprobs = np.full(batches.reference_log_probs.shape, np.nan, np.float32)
        if is_primary_process():
            kept = store.read()
            for index, digest in enumerate(digests):
                if digest in kept:
                    logprobs[index] = kept[digest]
        logprobs = broadcast_from_primary(logprobs)
        missing = {digests[i]: i for i in np.flatnonzero(np.isnan(logprobs).any(axis=(1, 2))).tolist()}
        log_info(_tell(store, len(digests), len({*digests} - missing.keys()), len(missing)))
        for indices, found in _passes(model, batches, [*missing.values()], mesh, on_progress):
            logprobs[indices] = found
            if is_primary_process():
                store.add([digests[index] for index in indices], found)
    place = {digest: index for index, digest in reversed([*enumerate(digests)])} | missing
    return logprobs[[place[digest] for digest in digests]]


def _tell(store: ReferenceCache, examples: int, kept: int, missing: int) -> str:
    """What is computed of the reference, and why."""
    if not missing:
        return f"reference: the log-probs of all {examples} examples are kept in {store.folder}"
    if kept:
        why = f"{kept} others are kept"
    elif different := store.differing_identity_keys():
        why = f"what is kept differs in: {', '.join(different)}"
    else:
        why = "nothing is kept yet"
    return f"reference: computing the log-probs of {missing} examples ({why})"


def compute_reference(model: Transformer, batches: BatchPlan, mesh: Mesh) -> np.ndarray:
    """The model's log-prob of each region of each answer of each example: float32 [examples, answers, 3].

    Uses rows of the shape that training uses, and the function that the objective uses. Raises `RunError` where one is
    not finite.
    """
    logprobs = np.zeros(batches.reference_log_probs.shape, np.float32)
    for indices, found in _passes(model, batches, range(len(batches.examples)), mesh, None):
        logprobs[indices] = found
    return logprobs


def make_reference_step(mesh: Mesh) -> Callable[[Transformer, DeviceBatch], jax.Array]:
    """The log-probs [M, R, P, S, 3] of a batch, of the shape that the updates have: the program of a reference pass."""
    return _compiled(lambda model, batch: jax.lax.map(lambda rows: answer_region_log_probs(model, rows), batch), mesh)


def _compiled(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Jitted for the devices of the mesh; what it gives is whole on every one."""
    layout = NamedSharding(mesh, PartitionSpec())
    return jax.jit(function, out_shardings=layout, compiler_options=compiler_options(mesh))


def _passes(
    model: Transformer, batches: BatchPlan, indices: Sequence[int], mesh: Mesh, watch: ProgressCallback | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batch by batch, which examples it holds and their log-probs."""
    score = make_reference_step(mesh)
    planned = batches.batches_of(indices)
    for number, batch in enumerate(planned, 1):
        real = batch.example_ids >= 0
        found = np.asarray(score(model, put_batch(batch, mesh)))[real]
        if not np.isfinite(found).all():
            place = int(np.flatnonzero(~np.isfinite(found).all(axis=(1, 2)))[0])
            raise RunError(
                f"the start model's log-probs of example {batch.example_ids[real][place]} are "
                f"{found[place].sum(axis=-1).tolist()}: its weights are broken, or too large for the compute dtype."
            )
        yield batch.example_ids[real], found
        if watch is not None:
            watch(number, len(planned))


def check_initial_loss(
    config: PreferenceConfig, compare: PreferenceLossFn, model: Transformer, batch: HostBatch, mesh: Mesh
) -> float:
    """The loss on the rows of a batch before any update; policy and reference are one model, so for DPO it is ln 2.

    Raises `RunError`, saying what differs and by how much, where the log-prob of an answer is not the cached one, or
    where against its own log-probs the model's margins are not 0 or its loss is not that of `start_loss`.
    """

    def rows(model: Transformer, rows: DeviceBatch) -> tuple[LossSums, LossSums, jax.Array, jax.Array]:
        logprobs_RA = answer_token_log_probs(model, rows)
        live = sum_by_region(logprobs_RA, rows)
        lengths = sum_by_region((rows.target_regions > 0).astype(np.float32), rows)
        return compare(logprobs_RA, rows), compare(logprobs_RA, rows._replace(reference_log_probs=live)), live, lengths

    def batched(model: Transformer, batch: DeviceBatch) -> tuple[LossSums, LossSums, jax.Array, jax.Array]:
        return jax.lax.map(lambda given: rows(model, given), batch)

    program = _compiled(batched, mesh)
    found, itself, live, lengths = jax.device_get(program(model, put_batch(batch, mesh)))
    loss, own = (float(sums.loss.sum() / sums.weight.sum()) for sums in (found, itself))
    nll, margins = (
        float(itself.metrics[name].sum() / itself.weight.sum()) for name in ("nll/chosen", "rewards/margins")
    )
    right = expected_initial_loss(config, nll)
    real = batch.example_ids >= 0
    cached = batch.reference_log_probs.sum(axis=-1)[real]
    apart = np.abs(live.sum(axis=-1)[real] - cached)
    allowed = RELATIVE_TOLERANCE * (1 + np.abs(cached)) + NOISE_NATS_PER_SQRT_TOKEN[model.compute.dtype] * np.sqrt(
        lengths.sum(axis=-1)[real]
    )
    if not (apart <= allowed).all():
        example, side = np.unravel_index((apart / allowed).argmax(), apart.shape)
        raise RunError(
            f"before the first update the model's log-probs differ from the cached reference by "
            f"{apart[example, side]:.3g} nats where rounding explains {allowed[example, side]:.3g} (example "
            f"{batch.example_ids[real][example]}); the loss is {loss:.6f}, not {right:.6f}. The cached reference is not "
            f"that of the model that starts: remove {reference_cache_folder()} and run again."
        )
    if not (abs(margins) <= 1e-5 and abs(own - right) <= 1e-5 * (1 + abs(right))):
        raise RunError(
            f"before the first update, against its own log-probs, the model's margins are {margins:.6g}, not 0, and "
            f"the loss is {own:.6f}, not {right:.6f}. Rows and answers are mixed up: a fault of thinkpo_jax; please "
            "report it with the configuration."
        )
    return loss
