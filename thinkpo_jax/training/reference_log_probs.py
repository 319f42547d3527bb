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

from thinkpo_jax.data.batches import Batches, DeviceBatch, HostBatch
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.console import say
from thinkpo_jax.runtime.devices import compiler_options
from thinkpo_jax.runtime.processes import first, from_the_first
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import Comparison, PreferenceConfig, Sums, start_loss
from thinkpo_jax.training.reference_cache import Store, example_digest, store_folder
from thinkpo_jax.training.token_log_probs import answer_logprobs, region_logprobs, region_sums

# How far a live log-prob of n tokens may be from the cached one: SUMS of 1 + its size, and NOISE nats times sqrt(n). In
# bfloat16 an answer that stands elsewhere in a row is rounded otherwise, by 0.034 nats per token (rms; SmolLM2-135M on
# real pairs in rows of 1,600 and 3,072), 0.1 sqrt(n) at most for an answer; in float32 by 2e-5 sqrt(n).
SUMS, NOISE = 1e-5, {"float32": 0.0, "bfloat16": 0.3}

Watch = Callable[[int, int], object]  # is told how many batches are done, of how many


def stored_logprobs(
    model: Transformer, batches: Batches, mesh: Mesh, *, identity: Mapping[str, str], watch: Watch | None = None
) -> np.ndarray:
    """What `reference_logprobs` gives, for all examples; only those are computed that are not kept on disk.

    What is computed is kept batch by batch: a pass that was stopped goes on where it was. With several processes the
    first one reads and writes, and the others get what it found.
    """
    store = Store(identity, answers=batches.answers)
    digests = [example_digest(example) for example in batches.examples]
    with store.writing():
        logprobs = np.full(batches.reference.shape, np.nan, np.float32)
        if first():
            kept = store.read()
            for index, digest in enumerate(digests):
                if digest in kept:
                    logprobs[index] = kept[digest]
        logprobs = from_the_first(logprobs)
        missing = {digests[i]: i for i in np.flatnonzero(np.isnan(logprobs).any(axis=(1, 2))).tolist()}
        say(_tell(store, len(digests), len({*digests} - missing.keys()), len(missing)))
        for indices, found in _passes(model, batches, [*missing.values()], mesh, watch):
            logprobs[indices] = found
            if first():
                store.add([digests[index] for index in indices], found)
    place = {digest: index for index, digest in reversed([*enumerate(digests)])} | missing
    return logprobs[[place[digest] for digest in digests]]


def _tell(store: Store, examples: int, kept: int, missing: int) -> str:
    """What is computed of the reference, and why."""
    if not missing:
        return f"reference: the log-probs of all {examples} examples are kept in {store.folder}"
    if kept:
        why = f"{kept} others are kept"
    elif different := store.differences():
        why = f"what is kept differs in: {', '.join(different)}"
    else:
        why = "nothing is kept yet"
    return f"reference: computing the log-probs of {missing} examples ({why})"


def reference_logprobs(model: Transformer, batches: Batches, mesh: Mesh) -> np.ndarray:
    """The model's log-prob of each region of each answer of each example: float32 [examples, answers, 3].

    Uses rows of the shape that training uses, and the function that the objective uses. Raises `RunError` where one is
    not finite.
    """
    logprobs = np.zeros(batches.reference.shape, np.float32)
    for indices, found in _passes(model, batches, range(len(batches.examples)), mesh, None):
        logprobs[indices] = found
    return logprobs


def make_scoring(mesh: Mesh) -> Callable[[Transformer, DeviceBatch], jax.Array]:
    """The log-probs [M, R, P, S, 3] of a batch, of the shape that the updates have: the program of a reference pass."""
    return _compiled(lambda model, batch: jax.lax.map(lambda rows: region_logprobs(model, rows), batch), mesh)


def _compiled(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Jitted for the devices of the mesh; what it gives is whole on every one."""
    layout = NamedSharding(mesh, PartitionSpec())
    return jax.jit(function, out_shardings=layout, compiler_options=compiler_options(mesh))


def _passes(
    model: Transformer, batches: Batches, indices: Sequence[int], mesh: Mesh, watch: Watch | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batch by batch, which examples it holds and their log-probs."""
    score = make_scoring(mesh)
    planned = batches.over(indices)
    for number, batch in enumerate(planned, 1):
        real = batch.examples >= 0
        found = np.asarray(score(model, put_batch(batch, mesh)))[real]
        if not np.isfinite(found).all():
            place = int(np.flatnonzero(~np.isfinite(found).all(axis=(1, 2)))[0])
            raise RunError(
                f"the start model's log-probs of example {batch.examples[real][place]} are "
                f"{found[place].sum(axis=-1).tolist()}: its weights are broken, or too large for the compute dtype."
            )
        yield batch.examples[real], found
        if watch is not None:
            watch(number, len(planned))


def check_start(
    config: PreferenceConfig, compare: Comparison, model: Transformer, batch: HostBatch, mesh: Mesh
) -> float:
    """The loss on the rows of a batch before any update; policy and reference are one model, so for DPO it is ln 2.

    Raises `RunError`, saying what differs and by how much, where the log-prob of an answer is not the cached one, or
    where against its own log-probs the model's margins are not 0 or its loss is not that of `start_loss`.
    """

    def rows(model: Transformer, rows: DeviceBatch) -> tuple[Sums, Sums, jax.Array, jax.Array]:
        logprobs_RA = answer_logprobs(model, rows)
        live = region_sums(logprobs_RA, rows)
        lengths = region_sums((rows.regions > 0).astype(np.float32), rows)
        return compare(logprobs_RA, rows), compare(logprobs_RA, rows._replace(reference=live)), live, lengths

    def batched(model: Transformer, batch: DeviceBatch) -> tuple[Sums, Sums, jax.Array, jax.Array]:
        return jax.lax.map(lambda given: rows(model, given), batch)

    program = _compiled(batched, mesh)
    found, itself, live, lengths = jax.device_get(program(model, put_batch(batch, mesh)))
    loss, own = (float(sums.loss.sum() / sums.weight.sum()) for sums in (found, itself))
    nll, margins = (
        float(itself.metrics[name].sum() / itself.weight.sum()) for name in ("nll/chosen", "rewards/margins")
    )
    right = start_loss(config, nll)
    real = batch.examples >= 0
    cached = batch.reference.sum(axis=-1)[real]
    apart = np.abs(live.sum(axis=-1)[real] - cached)
    allowed = SUMS * (1 + np.abs(cached)) + NOISE[model.compute.dtype] * np.sqrt(lengths.sum(axis=-1)[real])
    if not (apart <= allowed).all():
        example, side = np.unravel_index((apart / allowed).argmax(), apart.shape)
        raise RunError(
            f"before the first update the model's log-probs differ from the cached reference by "
            f"{apart[example, side]:.3g} nats where rounding explains {allowed[example, side]:.3g} (example "
            f"{batch.examples[real][example]}); the loss is {loss:.6f}, not {right:.6f}. The cached reference is not "
            f"that of the model that starts: remove {store_folder()} and run again."
        )
    if not (abs(margins) <= 1e-5 and abs(own - right) <= 1e-5 * (1 + abs(right))):
        raise RunError(
            f"before the first update, against its own log-probs, the model's margins are {margins:.6g}, not 0, and "
            f"the loss is {own:.6f}, not {right:.6f}. Rows and answers are mixed up: a fault of thinkpo_jax; please "
            "report it with the configuration."
        )
    return loss
