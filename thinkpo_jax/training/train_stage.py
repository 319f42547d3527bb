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

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.data.examples import TokenizedDataset
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.run.run_folder import Run
from thinkpo_jax.run.stage_data import held_out_indices
from thinkpo_jax.run.stage_output import save_stage_output, write_stage_record
from thinkpo_jax.runtime.cli import defer_interrupts
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.console import METRICS, MetricsFile, ProgressReporter, log_info, log_warning, read_metrics
from thinkpo_jax.runtime.mesh import local_data_shards, num_data_shards
from thinkpo_jax.runtime.processes import any_process, broadcast_from_primary
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.checkpoints import CheckpointStore
from thinkpo_jax.training.objectives import Objective, make_preference_loss, make_thinkpo_objective, sft_objective
from thinkpo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from thinkpo_jax.training.preference_metrics import finalize_metrics, headline_metrics
from thinkpo_jax.training.reference_cache import load_stage_reference, save_stage_reference
from thinkpo_jax.training.reference_log_probs import check_initial_loss, load_or_compute_reference
from thinkpo_jax.training.stage_config import SftStage, StageConfig, ThinkpoStage
from thinkpo_jax.training.throughput import throughput_metrics
from thinkpo_jax.training.train_step import init_train_state, make_train_step
from thinkpo_jax.training.validation import PeriodicEvaluation


def train_stage(run: Run, stage: StageConfig, examples: TokenizedDataset) -> None:
    """Trains one stage from its last checkpoint, or from its start model, and exports its end."""
    folder, start = run.folder / stage.name, run.initial_model_of(stage)
    batches = BatchPlan(
        examples,
        stage.batch,
        seed=run.config.seed,
        num_shards=num_data_shards(run.mesh),
        local_shards=local_data_shards(run.mesh),
        num_updates=stage.steps,
        epochs=stage.epochs or 1.0,
        held_out=held_out_indices(run.config, stage, examples),
    )
    log_info(f"{stage.name}: {batches.describe()}, from {start}")
    write_stage_record(run, stage, examples, None)
    model = run.load(start)
    objective = sft_objective if isinstance(stage, SftStage) else against_reference(run, stage, batches, model)
    optimizer = make_optimizer(stage.optimizer, len(batches))
    state = init_train_state(model, optimizer, run.mesh)
    del model  # it is part of the state now
    with ExitStack() as stack:
        checkpoints = stack.enter_context(CheckpointStore(folder / "checkpoints", keep=stage.checkpoint.keep))
        stopping = stack.enter_context(defer_interrupts())
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
            log_info(f"{stage.name}: going on from update {int(state.step)}")
        step = make_train_step(objective, optimizer, run.mesh, state)
        metrics_file = stack.enter_context(closing(MetricsFile(folder / METRICS, step=int(state.step))))
        validate = stack.enter_context(PeriodicEvaluation(run, stage, batches, objective, step=int(state.step)))
        progress = stack.enter_context(
            closing(ProgressReporter(stage.name, len(batches), done=int(state.step), unit="update"))
        )
        rate = learning_rate_schedule(stage.optimizer, len(batches))
        skipped = int(
            broadcast_from_primary(np.array(sum("skipped" in line for line in read_metrics(folder / METRICS))))
        )
        validate(state)
        began = time.monotonic()
        for index, batch in enumerate(batches.prefetch_from(int(state.step)), int(state.step)):
            # What is skipped moves no counter of the optimizer, so its schedule stays behind.
            line = {"learning_rate": np.asarray(rate(index - skipped)).item()}
            state, metrics = step(state, put_batch(batch, run.mesh))
            line = metrics_line(jax.device_get(metrics), index, batches) | line
            seconds = time.monotonic() - began  # the wait for data and saving included, looking at held-out ones not
            line |= throughput_metrics(
                batches.count_work(batch), batches.tokens_per_update(), state.model.arch, state.model.compute, seconds
            )
            if not line.pop("finite"):
                skipped += 1
                handle_nonfinite_update(
                    stage, line, skipped, examples.describe_examples(batch.example_ids[batch.example_ids >= 0].tolist())
                )
                line = {name: value for name, value in line.items() if math.isfinite(value)} | {"skipped": 1}
            metrics_file.write(line)
            progress.update(index + 1, progress_values(line))
            stop = any_process(stopping())
            began = time.monotonic() + validate(state)
            if (index + 1) % stage.checkpoint.every == 0 or index + 1 == len(batches) or stop:
                checkpoints.save(state)
            if stop:  # asked of this process, or of another one
                raise KeyboardInterrupt
    save_stage_output(run, stage, state, batches, examples)


def against_reference(run: Run, stage: ThinkpoStage, batches: BatchPlan, model: Transformer) -> Objective:
    """ThinkPO against the start model: puts its log-probs into the batches, and sees that the first loss is right."""
    # A stage keeps the values that it was begun with: others, of other rows, may differ in their last bits.
    path = run.folder / stage.name / "reference.npz"
    begun = load_stage_reference(path, like=batches.reference_log_probs)
    if begun is None:
        begun = looked_up(run, stage, batches, model)
        save_stage_reference(path, begun)
    batches.reference_log_probs = begun
    tags = {"end_of_turn_id": run.chat.end_of_turn_id, "thought_end_token_ids": run.chat.thought_end_token_ids()}
    loss = check_initial_loss(stage, make_preference_loss(stage, **tags), model, batches[0], run.mesh)
    log_info(f"{stage.name}: before the first update the loss is {loss:.6f}")
    return make_thinkpo_objective(stage, **tags)


def looked_up(run: Run, stage: ThinkpoStage, batches: BatchPlan, model: Transformer) -> np.ndarray:
    """The start model's log-probs, as they are kept for all runs, or computed."""
    device = jax.devices()[0]
    identity = {
        "weights": run.weights_digest(run.initial_model_of(stage)),
        "dtype": run.config.compute.dtype,
        "attention": run.compute.attention,
        "device": f"{device.platform} {device.device_kind}",
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    progress: ProgressReporter | None = None

    def watch(done: int, total: int) -> None:
        nonlocal progress
        progress = progress or ProgressReporter(f"{stage.name} reference", total, unit="batch")
        progress.update(done)

    found = load_or_compute_reference(model, batches, run.mesh, identity=identity, on_progress=watch)
    if progress is not None:
        progress.close()
    return found


def handle_nonfinite_update(stage: StageConfig, line: dict[str, float], skipped: int, names: str) -> None:
    """Says which update was not applied. Raises `RunError` where the stage stops at it, or has skipped too many."""
    problem = (
        f"stage {stage.name}, update {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}; the "
        f"update was not applied. Its examples, counted among the rows kept of {names}."
    )
    if stage.on_nonfinite == "stop":
        raise RunError(f"{problem} A lower learning rate may help; `on_nonfinite: skip` leaves such updates out.")
    if skipped > stage.max_skipped:
        raise RunError(f"{problem} These are more than `max_skipped: {stage.max_skipped}`.")
    log_warning(f"{problem} {skipped} of at most {stage.max_skipped} are skipped.")


def metrics_line(metrics: dict[str, Any], index: int, batches: BatchPlan) -> dict[str, float]:
    """The metrics of update `index` (from 0) as plain numbers."""
    line = finalize_metrics({name: float(value) for name, value in metrics.items()})
    return {"step": index + 1, "epoch": (index + 1) / batches.updates_per_epoch, **line}


def progress_values(line: dict[str, float]) -> dict[str, str]:
    """What the progress bar shows of an update."""
    return headline_metrics(line) | {"tok/s": f"{line['tokens_per_second']:,.0f}"}
