"""Evaluates the model during training: the held-out examples and the probe, each at its own interval."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.console import MetricsFile, log_info, read_metrics
from thinkpo_jax.runtime.processes import broadcast_from_primary
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import Objective
from thinkpo_jax.training.preference_metrics import finalize_metrics, headline_metrics
from thinkpo_jax.training.train_step import make_eval_step

EvaluateFn = Callable[[Transformer], Mapping[str, float]]


class PeriodicEvaluation:
    """Evaluates before the first update, after every `every` updates and after update `last`.

    Each evaluation writes a line to a file and to the log. With several processes, all of them evaluate.
    """

    def __init__(
        self,
        title: str,
        evaluate: EvaluateFn,
        path: Path,
        *,
        every: int,
        start: int,
        last: int,
        on_line: Sequence[Callable[[Mapping[str, float]], None]] = (),
    ) -> None:
        """Removes the lines of updates after `start`, which an interrupted run may have left.

        The functions `on_line` are called with each line that was written.
        """
        self._title, self._evaluate, self._every, self._last, self._on_line = title, evaluate, every, last, on_line
        self._file = MetricsFile(path, step=start)
        is_done = np.zeros(last + 1, bool)
        is_done[[int(line["step"]) for line in read_metrics(path)]] = True
        self._is_done = broadcast_from_primary(is_done)

    def is_due(self, update: int) -> bool:
        """Returns whether an evaluation is due after `update` updates and not written yet."""
        return not self._is_done[update] and (update % self._every == 0 or update == self._last)

    def run_if_due(self, update: int, model: Transformer) -> float:
        """Evaluates if an evaluation is due after `update` updates. Returns the seconds it took."""
        if not self.is_due(update):
            return 0.0
        began = time.monotonic()
        line = self._evaluate(model)
        self._file.write({"step": update, **line})
        self._is_done[update] = True
        seconds = time.monotonic() - began
        # A probe has few figures, and no loss.
        figures = headline_metrics(line) or {name.replace("_", " "): f"{value:.4g}" for name, value in line.items()}
        summary = ", ".join(f"{name} {value}" for name, value in figures.items())
        log_info(f"{self._title} after {update} updates ({seconds:.1f} s): {summary}")
        for on_line in self._on_line:
            on_line({"step": update, **line})
        return seconds

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def make_validation(objective: Objective, batches: BatchPlan, model: Transformer, mesh: Mesh) -> EvaluateFn:
    """Returns a function that gives the loss and the metrics of the held-out examples. Compiles it for this model."""
    eval_step: Any = make_eval_step(objective, mesh)
    compiled = eval_step.lower(model, put_batch(batches[0], mesh)).compile()
    held_out = batches.batches_of(batches.held_out)

    def validate(model: Transformer) -> dict[str, float]:
        sums = [jax.device_get(compiled(model, put_batch(batch, mesh))) for batch in held_out]
        total = jax.tree.map(lambda *values: sum(values), *sums)
        means = {name: float(value / total.weight) for name, value in total.metrics.items()}
        return finalize_metrics(means | {"loss": float(total.loss / total.weight)})

    return validate
