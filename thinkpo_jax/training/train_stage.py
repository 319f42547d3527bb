"""Trains one stage, without a YAML file or run folder: the loop, its objective, and what it logs for each update."""

import functools
import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.data.examples import TokenizedDataset
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.cli import defer_interrupts
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.console import MetricsFile, ProgressReporter, log_info, log_warning, read_metrics
from thinkpo_jax.runtime.files import StageFolder
from thinkpo_jax.runtime.mesh import local_data_shards, num_data_shards
from thinkpo_jax.runtime.processes import DelayedVote, any_process, broadcast_from_primary
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.checkpoints import CheckpointStore
from thinkpo_jax.training.divergence import DivergenceGuard
from thinkpo_jax.training.objectives import Objective, make_preference_loss, make_thinkpo_objective, sft_objective
from thinkpo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from thinkpo_jax.training.periodic_evaluation import EvaluateFn, PeriodicEvaluation, make_validation
from thinkpo_jax.training.pipeline import PlacedBatch, place_ahead
from thinkpo_jax.training.preference_metrics import finalize_metrics, headline_metrics
from thinkpo_jax.training.reference_cache import load_stage_reference, save_stage_reference
from thinkpo_jax.training.reference_log_probs import check_initial_loss, load_or_compute_reference
from thinkpo_jax.training.stage_config import StageConfig, ThinkpoStage
from thinkpo_jax.training.throughput import throughput_metrics
from thinkpo_jax.training.train_step import TrainState, TrainStepFn, init_train_state, make_train_step


@dataclass(frozen=True)
class StageInputs:
    """Everything that the training of one stage needs.

    `initial_model` is the model that the stage starts from. For ThinkPO it is the reference model too.
    `compute` names the attention kernel, see `resolve_attention_kernel`. `held_out` are the sorted indices of the
    validation examples, see `split_held_out`. `folder` can be any folder. Training resumes from its checkpoints.
    `probe` asks the questions of `config.probe` and returns figures of the answers. Without it nothing is asked.
    """

    config: StageConfig
    initial_model: ModelSource
    compute: ComputeConfig
    mesh: Mesh
    dataset: TokenizedDataset
    held_out: np.ndarray
    folder: StageFolder
    seed: int
    probe: EvaluateFn | None = None


@dataclass(frozen=True)
class StageResult:
    """The end of a stage: its last state, and what the record of the stage says of it."""

    state: TrainState
    num_updates: int
    seconds: float  # of training, over all resumed parts, without compilation, validation and probes
    notes: tuple[str, ...]
    divergences: tuple[str, ...] = ()  # the notes that say that training diverged and went on


def train_stage(inputs: StageInputs) -> StageResult:
    """Trains one stage from its latest checkpoint, or else from its initial model.

    Raises `UserError` if an example does not fit into a row. Raises `RunError` if the reference, the first loss, an
    update or a checkpoint is wrong, or training diverges. Raises `KeyboardInterrupt` if a stop was requested. The same
    call resumes.
    """
    config, mesh = inputs.config, inputs.mesh
    batches = _plan_batches(inputs)
    log_info(f"{config.name}: {batches.describe()}")
    with jax.set_mesh(mesh), ExitStack() as stack:
        model = inputs.initial_model.load(inputs.compute, mesh)
        objective = make_stage_objective(inputs, batches, model)
        optimizer = make_optimizer(config.optimizer, len(batches))
        state = init_train_state(model, optimizer, mesh)
        del model  # the state holds it now, and the update donates its memory
        options = config.checkpoint.model_dump(exclude={"every"})
        checkpoints = stack.enter_context(CheckpointStore(inputs.folder.checkpoints, **options))
        start = checkpoints.latest_step() or 0
        if start:
            state = checkpoints.restore(state)
            checkpoints.read_validations(inputs.folder.validation, last=start)
            log_info(f"{config.name}: resuming from update {start}")
        guard = DivergenceGuard(config, len(batches), checkpoints, inputs.folder, start)
        train_step = compile_train_step(inputs, batches, objective, optimizer, state)
        on_validation = (guard.add_validation, checkpoints.add_validation)
        evaluations = make_periodic_evaluations(inputs, batches, objective, state.model, on_validation, start, stack)
        for evaluation in evaluations:
            evaluation.run_if_due(start, state.model)
        vote, interrupts = DelayedVote(mesh, num_flags=2), stack.enter_context(defer_interrupts())
        metrics, save_is_due = StageMetrics(inputs, batches, guard, start, stack), False
        for update, batch in enumerate(place_ahead(batches.prefetch_from(start), mesh), start + 1):
            state, step_metrics = train_step(state, batch.device)
            metrics.add(update, step_metrics, batch)  # waits for the update before this one
            should_stop, is_time = vote(interrupts.requested, checkpoints.is_time())
            is_last = update == len(batches)
            # A stage that stops here evaluates when it resumes. Before an evaluation, which may take long, it saves.
            due = [] if should_stop else [evaluation for evaluation in evaluations if evaluation.is_due(update)]
            is_due = update % config.checkpoint.every == 0 or is_time or bool(due)
            if save_is_due := save_is_due or is_due or should_stop or is_last or checkpoints.must_retry():
                metrics.drain()
                if is_last or guard.allows_save(is_stopping=should_stop):
                    inputs.folder.upload()
                    checkpoints.save(state, update, wait=should_stop or is_last)
                    save_is_due = False
            if due:
                with interrupts.allowed():
                    metrics.clock += sum(evaluation.run_if_due(update, state.model) for evaluation in due)
            if should_stop:
                raise KeyboardInterrupt
        if any_process(interrupts.requested):  # a vote of the last update may still be open
            raise KeyboardInterrupt
    lines = read_metrics(inputs.folder.metrics)
    _warn_if_saturated(config, lines[-1] if lines else {})
    seconds = sum(line.get("seconds", 0.0) for line in lines)
    data_notes = (*inputs.dataset.describe_sources(), f"{len(inputs.dataset)} examples", batches.describe())
    notes = (*data_notes, *guard.notes(), *checkpoints.notes())
    return StageResult(state, len(batches), seconds, notes, guard.notes())


def _plan_batches(inputs: StageInputs) -> BatchPlan:
    config, mesh = inputs.config, inputs.mesh
    return BatchPlan(
        inputs.dataset,
        config.batch,
        seed=inputs.seed,
        num_shards=num_data_shards(mesh),
        local_shards=local_data_shards(mesh),
        num_updates=config.steps,
        epochs=config.epochs or 1.0,
        held_out=inputs.held_out,
    )


def compile_train_step(
    inputs: StageInputs,
    batches: BatchPlan,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
) -> TrainStepFn:
    """Returns the compiled update of a stage. Compiled before the loop, its time does not count as training."""
    log_info(f"{inputs.config.name}: compiling the train step")
    began = time.monotonic()
    train_step: Any = make_train_step(objective, optimizer, inputs.mesh, state)
    compiled = train_step.lower(state, put_batch(batches[0], inputs.mesh)).compile()
    log_info(f"{inputs.config.name}: the train step was compiled in {time.monotonic() - began:.1f} s")
    return compiled


def make_periodic_evaluations(
    inputs: StageInputs,
    batches: BatchPlan,
    objective: Objective,
    model: Transformer,
    on_validation: Sequence[Callable[[Mapping[str, float]], None]],
    start: int,
    stack: ExitStack,
) -> list[PeriodicEvaluation]:
    """Returns the validation and the probe, if the stage has them. Compiles the validation."""
    config, folder, evaluations = inputs.config, inputs.folder, list[PeriodicEvaluation]()
    options: dict[str, Any] = {"start": start, "last": len(batches)}
    if config.validation is not None:
        validate = make_validation(objective, batches, model, inputs.mesh)
        watched = {"every": config.validation.every, "on_line": on_validation}
        evaluations += [PeriodicEvaluation("validation", validate, folder.validation, **watched, **options)]
    if config.probe is not None and inputs.probe is not None:
        every = config.probe.every
        evaluations += [PeriodicEvaluation("probe", inputs.probe, folder.probe, every=every, **options)]
    for evaluation in evaluations:
        stack.enter_context(closing(evaluation))
    return evaluations


def make_stage_objective(inputs: StageInputs, batches: BatchPlan, model: Transformer) -> Objective:
    """Returns the objective. For ThinkPO it first sets the reference log-probs of the batches and checks the loss."""
    config = inputs.config
    if not isinstance(config, ThinkpoStage):
        return sft_objective
    # A resumed stage must reuse its original reference log-probs. Another packing would change their last bits.
    log_probs = load_stage_reference(inputs.folder.reference, like=batches.reference_log_probs)
    if log_probs is None:
        log_probs = _reference_log_probs(inputs, batches, model)
        save_stage_reference(inputs.folder.reference, log_probs)
    batches.reference_log_probs = log_probs
    tokenizer = inputs.initial_model.tokenizer
    markers = {"end_of_turn_id": tokenizer.end_of_turn_id, "thought_end_token_ids": tokenizer.thought_end_token_ids()}
    loss = check_initial_loss(config, make_preference_loss(config, **markers), model, batches[0], inputs.mesh)
    log_info(f"{config.name}: the loss before the first update is {loss:.6f}")
    return make_thinkpo_objective(config, **markers)


def _reference_log_probs(inputs: StageInputs, batches: BatchPlan, model: Transformer) -> np.ndarray:
    """Returns the log-probs of the initial model, from the cache of all runs or computed."""
    device = jax.devices()[0]
    identity = {
        "model": str(inputs.initial_model.identity()),
        "dtype": inputs.compute.dtype,
        "attention": inputs.compute.attention,
        "device": f"{device.platform} {device.device_kind}",
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    with ExitStack() as stack:

        @functools.cache  # one reporter, which starts at the first batch
        def reporter(total: int) -> ProgressReporter:
            title = f"{inputs.config.name} reference"
            return stack.enter_context(closing(ProgressReporter(title, total, unit="batch")))

        def on_progress(num_done: int, total: int) -> None:
            reporter(total).update(num_done)

        return load_or_compute_reference(model, batches, inputs.mesh, identity=identity, on_progress=on_progress)


class StageMetrics:
    """Writes one line of `metrics.jsonl` for each update, and shows progress.

    It reads the metrics of an update after the next one was launched. So the devices never wait for the host.
    `clock` is when the time of the next update starts, in seconds. The caller adds the seconds of evaluations.
    Waiting for batches and saving count as training.
    """

    def __init__(
        self, inputs: StageInputs, batches: BatchPlan, guard: DivergenceGuard, start: int, stack: ExitStack
    ) -> None:
        """Removes the lines of updates after `start`, which an interrupted run may have left. Starts the clock."""
        self._inputs, self._batches, self._guard = inputs, batches, guard
        schedule = learning_rate_schedule(inputs.config.optimizer, len(batches))
        self._learning_rates = np.asarray(schedule(np.arange(len(batches))))
        self._file = stack.enter_context(closing(MetricsFile(inputs.folder.metrics, step=start)))
        num_skipped = sum("skipped" in line for line in read_metrics(inputs.folder.metrics))
        self._num_skipped = broadcast_from_primary(num_skipped)
        progress = ProgressReporter(inputs.config.name, len(batches), done=start, unit="update")
        self._progress = stack.enter_context(closing(progress))
        self._pending: tuple[int, Mapping[str, jax.Array], PlacedBatch] | None = None
        self.clock = time.monotonic()

    def add(self, update: int, metrics: Mapping[str, jax.Array], batch: PlacedBatch) -> None:
        """Takes the metrics of an update that was launched, counted from 1. Logs the update before it.

        Raises `RunError` if the update before it is not finite or training diverges, and the stage stops at it.
        """
        self.drain()
        self._pending = (update, metrics, batch)

    def drain(self) -> None:
        """Waits for the last update that was added, and logs it. Raises like `add`."""
        if self._pending is not None:
            (update, metrics, batch), self._pending = self._pending, None
            self._log_update(update, jax.device_get(metrics), batch)

    def _log_update(self, update: int, metrics: Mapping[str, Any], batch: PlacedBatch) -> None:
        inputs, batches = self._inputs, self._batches
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        line: dict[str, float] = {"step": update, "epoch": update / batches.updates_per_epoch}
        line |= finalize_metrics({name: float(value) for name, value in metrics.items()})
        # A skipped update does not move the counter of the optimizer, so its schedule stays behind.
        line["learning_rate"] = self._learning_rates[update - 1 - self._num_skipped].item()
        work, architecture = batches.count_work(batch.host), inputs.initial_model.architecture
        line |= throughput_metrics(work, batches.tokens_per_update(), architecture, inputs.compute, seconds)
        line["data_seconds"] = round(batch.data_seconds, 4)
        if not line.pop("finite"):
            self._num_skipped += 1
            example_ids = batch.host.example_ids
            names = inputs.dataset.describe_examples(example_ids[example_ids >= 0].tolist())
            handle_nonfinite_update(inputs.config, line, self._num_skipped, names)
            line = {name: value for name, value in line.items() if math.isfinite(value)} | {"skipped": 1}
        self._file.write(line)
        self._progress.update(update, headline_metrics(line) | {"tok/s": f"{line['tokens_per_second']:,.0f}"})
        self._guard.add(line)


def handle_nonfinite_update(config: StageConfig, line: Mapping[str, float], num_skipped: int, names: str) -> None:
    """Warns about an update that was not applied. Raises `RunError` if the stage stops at it or skipped too many."""
    problem = (
        f"stage {config.name}, update {line['step']}: the loss is {line['loss']} and the gradient norm is "
        f"{line['grad_norm']}. The update was not applied. Its examples, counted among the rows used of {names}."
    )
    if config.on_nonfinite == "stop":
        raise RunError(
            f"{problem} Lower the learning rate and choose another run_dir, or set `on_nonfinite: skip` to skip such "
            "updates."
        )
    if num_skipped > config.max_skipped:
        raise RunError(f"{problem} More than `max_skipped: {config.max_skipped}` updates are skipped.")
    log_warning(f"{problem} {num_skipped} of at most {config.max_skipped} updates are skipped.")


def _warn_if_saturated(config: StageConfig, line: Mapping[str, float]) -> None:
    """Warns if most pairs had almost no gradient at the last update."""
    if not isinstance(config, ThinkpoStage) or (share := line.get("saturated", 0.0)) <= 0.5:
        return
    advice = "With a smaller beta they would count. For DPO's loss, `loss: sigmoid_norm` helps too."
    if config.loss != "sigmoid_norm" and (margin := line.get("rewards/margins", 0.0)) > 1:
        advice += f" With beta {config.beta / margin:.1g} the mean margin would be 1 (gradient weight 27 %)."
    log_warning(f"stage {config.name}: at its end, {share:.0%} of the pairs had almost no gradient. {advice}")
