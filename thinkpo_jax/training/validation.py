"""Held-out loss, and later probes, at intervals."""

import time

import jax
import numpy as np

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.run.run_folder import Run
from thinkpo_jax.runtime.console import VALIDATION, MetricsFile, log_info, read_metrics
from thinkpo_jax.runtime.processes import broadcast_from_primary
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import Objective
from thinkpo_jax.training.preference_metrics import finalize_metrics, headline_metrics
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.train_step import TrainState, make_eval_step


class PeriodicEvaluation:
    """Loss and metrics of the examples that a stage holds out, into `validation.jsonl`; nothing without them."""

    def __init__(self, run: Run, stage: StageConfig, batches: BatchPlan, objective: Objective, *, step: int) -> None:
        """`step`: the updates that are done; lines of later ones, from an earlier try, are removed."""
        self._mesh, self._last, self._every = run.mesh, len(batches), stage.validation and stage.validation.every
        if self._every is not None:
            self._evaluate, self._batches = make_eval_step(objective, run.mesh), batches.batches_of(batches.held_out)
            self._file = MetricsFile(run.folder / stage.name / VALIDATION, step=step)
            done = np.zeros(self._last + 1, bool)
            done[[int(line["step"]) for line in read_metrics(run.folder / stage.name / VALIDATION)]] = True
            self._done = broadcast_from_primary(done)

    def __enter__(self) -> "PeriodicEvaluation":
        return self

    def __exit__(self, *_: object) -> None:
        if self._every is not None:
            self._file.close()

    def __call__(self, state: TrainState) -> float:
        """Computes and writes a line where it is time for one and there is none yet; gives the seconds that it took."""
        step, began = int(state.step), time.monotonic()
        if self._every is None or self._done[step] or (step % self._every and step != self._last):
            return 0.0
        found = [jax.device_get(self._evaluate(state.model, put_batch(batch, self._mesh))) for batch in self._batches]
        total = jax.tree.map(lambda *sums: sum(sums), *found)
        means = {name: float(value / total.weight) for name, value in total.metrics.items()}
        line = finalize_metrics(means | {"loss": float(total.loss / total.weight)})
        self._file.write({"step": step, **line})
        self._done[step] = True
        log_info(
            f"held out, after {step} updates: "
            + ", ".join(f"{name} {value}" for name, value in headline_metrics(line).items())
        )
        return time.monotonic() - began
