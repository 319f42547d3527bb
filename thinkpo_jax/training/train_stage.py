"""What is a run? Read `run_all` and `train_stage` top to bottom.

Example: python -m thinkpo_jax.train --config configs/quickstart.yaml --set seed=1
"""

import importlib.metadata
import math
import time
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np

from thinkpo_jax.data.batches import Batches
from thinkpo_jax.data.examples import Examples
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.run.run_folder import Run
from thinkpo_jax.run.stage_data import not_trained
from thinkpo_jax.run.stage_output import finish_stage, write_record
from thinkpo_jax.runtime.cli import stop_requests
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.console import METRICS, MetricsFile, Progress, read_metrics, say, warn
from thinkpo_jax.runtime.mesh import data_shards, own_shards
from thinkpo_jax.runtime.processes import from_the_first, in_any
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.checkpoints import Checkpoints
from thinkpo_jax.training.objectives import Objective, comparison, sft, thinkpo
from thinkpo_jax.training.optimizer import learning_rate, make_optimizer
from thinkpo_jax.training.preference_metrics import readable, told
from thinkpo_jax.training.reference_cache import read_logprobs, write_logprobs
from thinkpo_jax.training.reference_log_probs import check_start, stored_logprobs
from thinkpo_jax.training.stage_config import SftStage, Stage, ThinkpoStage
from thinkpo_jax.training.throughput import throughput
from thinkpo_jax.training.train_step import initial_state, make_step
from thinkpo_jax.training.validation import Validation


def train_stage(run: Run, stage: Stage, examples: Examples) -> None:
    """Trains one stage from its last checkpoint, or from its start model, and exports its end."""
    folder, start = run.folder / stage.name, run.start_of(stage)
    batches = Batches(
        examples,
        stage.batch,
        seed=run.config.seed,
        shards=data_shards(run.mesh),
        own=own_shards(run.mesh),
        steps=stage.steps,
        epochs=stage.epochs or 1.0,
        held_out=not_trained(run.config, stage, examples),
    )
    say(f"{stage.name}: {batches.describe()}, from {start}")
    write_record(run, stage, examples, None)
    model = run.load(start)
    objective = sft if isinstance(stage, SftStage) else against_reference(run, stage, batches, model)
    optimizer = make_optimizer(stage.optimizer, len(batches))
    state = initial_state(model, optimizer, run.mesh)
    del model  # it is part of the state now
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep=stage.checkpoint.keep))
        stopping = stack.enter_context(stop_requests())
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
            say(f"{stage.name}: going on from update {int(state.step)}")
        step = make_step(objective, optimizer, run.mesh, state)
        metrics_file = stack.enter_context(closing(MetricsFile(folder / METRICS, step=int(state.step))))
        validate = stack.enter_context(Validation(run, stage, batches, objective, step=int(state.step)))
        progress = stack.enter_context(closing(Progress(stage.name, len(batches), done=int(state.step), unit="update")))
        rate = learning_rate(stage.optimizer, len(batches))
        skipped = int(from_the_first(np.array(sum("skipped" in line for line in read_metrics(folder / METRICS)))))
        validate(state)
        began = time.monotonic()
        for index, batch in enumerate(batches.stream(int(state.step)), int(state.step)):
            # What is skipped moves no counter of the optimizer, so its schedule stays behind.
            line = {"learning_rate": np.asarray(rate(index - skipped)).item()}
            state, metrics = step(state, put_batch(batch, run.mesh))
            line = metrics_line(jax.device_get(metrics), index, batches) | line
            seconds = time.monotonic() - began  # the wait for data and saving included, looking at held-out ones not
            line |= throughput(batches.work(batch), batches.slots(), state.model.arch, state.model.compute, seconds)
            if not line.pop("finite"):
                skipped += 1
                not_finite(stage, line, skipped, examples.names(batch.examples[batch.examples >= 0].tolist()))
                line = {name: value for name, value in line.items() if math.isfinite(value)} | {"skipped": 1}
            metrics_file.write(line)
            progress.update(index + 1, shown(line))
            stop = in_any(stopping())
            began = time.monotonic() + validate(state)
            if (index + 1) % stage.checkpoint.every == 0 or index + 1 == len(batches) or stop:
                checkpoints.save(state)
            if stop:  # asked of this process, or of another one
                raise KeyboardInterrupt
    finish_stage(run, stage, state, batches, examples)


def against_reference(run: Run, stage: ThinkpoStage, batches: Batches, model: Transformer) -> Objective:
    """ThinkPO against the start model: puts its log-probs into the batches, and sees that the first loss is right."""
    # A stage keeps the values that it was begun with: others, of other rows, may differ in their last bits.
    path = run.folder / stage.name / "reference.npz"
    begun = read_logprobs(path, like=batches.reference)
    if begun is None:
        begun = looked_up(run, stage, batches, model)
        write_logprobs(path, begun)
    batches.reference = begun
    tags = {"end_id": run.chat.end_id, "thought_ends": run.chat.thought_ends()}
    loss = check_start(stage, comparison(stage, **tags), model, batches[0], run.mesh)
    say(f"{stage.name}: before the first update the loss is {loss:.6f}")
    return thinkpo(stage, **tags)


def looked_up(run: Run, stage: ThinkpoStage, batches: Batches, model: Transformer) -> np.ndarray:
    """The start model's log-probs, as they are kept for all runs, or computed."""
    device = jax.devices()[0]
    identity = {
        "weights": run.weights(run.start_of(stage)),
        "dtype": run.config.compute.dtype,
        "attention": run.compute.attention,
        "device": f"{device.platform} {device.device_kind}",
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    progress: Progress | None = None

    def watch(done: int, total: int) -> None:
        nonlocal progress
        progress = progress or Progress(f"{stage.name} reference", total, unit="batch")
        progress.update(done)

    found = stored_logprobs(model, batches, run.mesh, identity=identity, watch=watch)
    if progress is not None:
        progress.close()
    return found


def not_finite(stage: Stage, line: dict[str, float], skipped: int, names: str) -> None:
    """Says which update was not applied. Raises `RunError` where the stage stops at it, or has skipped too many."""
    problem = (
        f"stage {stage.name}, update {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}; the "
        f"update was not applied. Its examples, counted among the rows kept of {names}."
    )
    if stage.on_nonfinite == "stop":
        raise RunError(f"{problem} A lower learning rate may help; `on_nonfinite: skip` leaves such updates out.")
    if skipped > stage.max_skipped:
        raise RunError(f"{problem} These are more than `max_skipped: {stage.max_skipped}`.")
    warn(f"{problem} {skipped} of at most {stage.max_skipped} are skipped.")


def metrics_line(metrics: dict[str, Any], index: int, batches: Batches) -> dict[str, float]:
    """The metrics of update `index` (from 0) as plain numbers."""
    line = readable({name: float(value) for name, value in metrics.items()})
    return {"step": index + 1, "epoch": (index + 1) / batches.steps_per_epoch, **line}


def shown(line: dict[str, float]) -> dict[str, str]:
    """What the progress bar shows of an update."""
    return told(line) | {"tok/s": f"{line['tokens_per_second']:,.0f}"}
