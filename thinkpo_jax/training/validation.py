"""Evaluates the held-out examples of a stage at intervals."""

import time

import jax
import numpy as np
from jax.sharding import Mesh

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.runtime.console import MetricsFile, log_info, read_metrics
from thinkpo_jax.runtime.files import StageFolder
from thinkpo_jax.runtime.processes import broadcast_from_primary
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import Objective
from thinkpo_jax.training.preference_metrics import finalize_metrics, headline_metrics
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.train_step import TrainState, make_eval_step


class PeriodicEvaluation:
    """Writes loss and metrics of the held-out examples to `validation.jsonl`. Does nothing without `validation`."""

    def __init__(
        self,
        config: StageConfig,
        folder: StageFolder,
        mesh: Mesh,
        batches: BatchPlan,
        objective: Objective,
        start: int,
    ) -> None:
        """Removes the lines of updates after `start`, which an interrupted run may have left."""
        self._mesh, self._last, self._every = mesh, len(batches), config.validation and config.validation.every
        if self._every is None:
            return
        self._eval_step, self._batches = make_eval_step(objective, mesh), batches.batches_of(batches.held_out)
        self._file = MetricsFile(folder.validation, step=start)
        is_done = np.zeros(self._last + 1, bool)
        is_done[[int(line["step"]) for line in read_metrics(folder.validation)]] = True
        self._is_done = broadcast_from_primary(is_done)

    def __enter__(self) -> "PeriodicEvaluation":
        return self

    def __exit__(self, *_: object) -> None:
        if self._every is not None:
            self._file.close()

    def run_if_due(self, update: int, state: TrainState) -> float:
        """Evaluates if an evaluation is due after `update` updates and not written yet. Returns the seconds it took."""
        if self._every is None or self._is_done[update] or (update % self._every and update != self._last):
            return 0.0
        began = time.monotonic()
        sums = [jax.device_get(self._eval_step(state.model, put_batch(batch, self._mesh))) for batch in self._batches]
        total = jax.tree.map(lambda *values: sum(values), *sums)
        means = {name: float(value / total.weight) for name, value in total.metrics.items()}
        line = finalize_metrics(means | {"loss": float(total.loss / total.weight)})
        self._file.write({"step": update, **line})
        self._is_done[update] = True
        summary = ", ".join(f"{name} {value}" for name, value in headline_metrics(line).items())
        log_info(f"validation after {update} updates: {summary}")
        return time.monotonic() - began
