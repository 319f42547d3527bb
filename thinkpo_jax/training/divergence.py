"""Decides from the metrics of a stage whether its training diverges, and which of its checkpoints are still good.

| check      | stages  | fails if                                                                               |
|------------|---------|----------------------------------------------------------------------------------------|
| loss       | all     | the loss is far above its running median                                               |
| start      | SFT     | the loss is far above that of the first updates. Checked after warm-up                 |
| gradient   | all     | the gradient norm is far above its running median, or 0 while the loss is not          |
| collapse   | ThinkPO | the chosen answers lost much log-prob against the reference                            |
| validation | ThinkPO | the margins fell several times in a row, to less than half of the largest              |

One spike is not divergence. The first four checks must fail for `NUM_UPDATES` updates in a row.
"""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.console import log_info, log_warning, read_shared_metrics
from thinkpo_jax.runtime.files import StageFolder
from thinkpo_jax.runtime.processes import broadcast_from_primary
from thinkpo_jax.training.checkpoints import CheckpointStore
from thinkpo_jax.training.optimizer import num_warmup_updates
from thinkpo_jax.training.stage_config import StageConfig, ThinkpoStage

NUM_UPDATES = 10  # in a row. A batch of hard examples is not enough, nor a spike that passes.
NUM_LAST_UPDATES = 3  # at the end of a stage, where no later update can clear the suspicion
NUM_START_UPDATES = 5  # Their median is the start loss of SFT. In warm-up they hardly change the model.
MAX_START_RISE = 1.0  # in nats per token, within these updates. If training diverges at once, they are wrong too.
HISTORY_UPDATES = 50  # in a running median
MIN_GRAD_NORM_HISTORY = 20  # The norm changes much in the first updates.
MEDIAN_FACTOR = 3.0
START_FACTOR = 2.0
LOSS_SLACK = 0.1  # nats per token. A loss that rises from 0.001 to 0.01 does no harm.
MAX_SFT_RISE = 2.0  # nats per token. Three times the loss of a random model is more than any model has.
GRAD_NORM_FACTOR = 10.0
MIN_GRAD_NORM = 1.0  # Smaller gradients are not clipped by default, and do no harm.
COLLAPSE_NATS = 1.0  # per token. The probability of each token falls to about a third.
NUM_FALLS = 3
MIN_FALL = 0.1  # of the margin. It changes the loss of a pair by at most 0.1.
WATCHED_METRICS = (
    "loss", "grad_norm", "nll/chosen", "logps/chosen", "rewards/chosen", "rewards/rejected", "rewards/margins",
)  # fmt: skip


@dataclass(frozen=True)
class Divergence:
    """Says that training diverges. Checkpoints up to update `last_good` are from before it began."""

    update: int
    last_good: int
    problem: str


class DivergenceWatch:
    """Watches the lines of `metrics.jsonl` and `validation.jsonl` of one stage.

    It has no other input. So the lines of an interrupted stage give the same state again.
    """

    def __init__(self, config: StageConfig, num_updates: int) -> None:
        self._config, self._num_updates = config, num_updates
        self._num_warmup = num_warmup_updates(config.optimizer, num_updates)
        self._start_losses: list[float] = []
        self._losses, self._grad_norms = deque[float](maxlen=HISTORY_UPDATES), deque[float](maxlen=HISTORY_UPDATES)
        self._first_over: dict[str, int] = {}  # by check, the first of the latest updates that are all over its limit
        self._first_checked, self._last_over = math.inf, 0
        self._is_diverging = False
        self._validations: list[tuple[int, float]] = []  # updates and margins

    @property
    def is_suspicious(self) -> bool:
        """Whether a check fails, but not often enough yet to be a divergence."""
        margins = [margin for _, margin in self._validations]
        return (bool(self._first_over) and not self._is_diverging) or (
            _is_low(margins) and 0 < _num_falls(margins) < NUM_FALLS
        )

    @property
    def last_good(self) -> int:
        """The last update whose weights passed every check.

        The metrics of an update are of the weights before it. So the weights after update u are judged by update u + 1.
        """
        # Weights after update `first - 1` gave the first loss that is over the limit. If it is the first that was
        # checked, training may have diverged before.
        from_lines = [first - 2 if first > self._first_checked else 0 for first in self._first_over.values()]
        margins = [margin for _, margin in self._validations]
        if not _is_low(margins):
            return min(from_lines, default=self._num_updates)
        good = [update for index, (update, _) in enumerate(self._validations, 1) if not _is_low(margins[:index])]
        return min([*from_lines, good[-1]])

    def add(self, line: Mapping[str, float]) -> Divergence | None:
        """Takes the line of the next update. Returns a divergence once, at the update that proves it.

        A divergence is over after `NUM_UPDATES` updates within the limits. The next one is reported again.
        """
        update = int(line["step"])
        problems = self._find_problems(line)
        self._remember(line, is_good=not problems)
        self._first_over = {check: self._first_over.get(check, update) for check in problems}
        if problems:
            self._last_over = update
        elif update - self._last_over >= NUM_UPDATES:
            self._is_diverging = False
        needed = NUM_UPDATES if update < self._num_updates else NUM_LAST_UPDATES
        proven = [check for check, first in self._first_over.items() if update - first + 1 >= needed]
        if not proven or self._is_diverging:
            return None
        self._is_diverging = True
        first = self._first_over[proven[0]]
        problem = f"{problems[proven[0]]}. This began at update {first}"
        return Divergence(update, self.last_good, problem)

    def add_validation(self, line: Mapping[str, float]) -> Divergence | None:
        """Takes the next line of the validation. Returns a divergence once for margins that fall."""
        if (margin := line.get("rewards/margins")) is None:
            return None
        self._validations.append((int(line["step"]), margin))
        margins = [margin for _, margin in self._validations]
        if not _keep_falling(margins) or _keep_falling(margins[:-1]):
            return None
        falls = " to ".join(f"{margin:.4g}" for margin in margins[-NUM_FALLS - 1 :])
        problem = f"The validation margin fell from {falls}. The largest was {max(margins):.4g}"
        return Divergence(int(line["step"]), self.last_good, problem)

    def _find_problems(self, line: Mapping[str, float]) -> dict[str, str]:
        """Returns a sentence for each check whose limit this update is over."""
        problems: dict[str, str] = {}
        if not _was_applied(line):
            return {"loss": "The loss or the gradient is not finite"}
        if line["grad_norm"] == 0 and line["loss"] > LOSS_SLACK:
            problems["no gradient"] = f"The gradient is zero, but the loss is {line['loss']:.4g}"
        if len(self._start_losses) < NUM_START_UPDATES:
            return problems
        self._first_checked = min(self._first_checked, line["step"])
        loss, median, start = line["loss"], statistics.median(self._losses), statistics.median(self._start_losses)
        if loss > (limit := self._loss_limit(median, MEDIAN_FACTOR)):
            problems["loss"] = (
                f"The loss is {loss:.4g}, above its limit of {limit:.4g}. Its running median is {median:.4g}"
            )
        is_start_compared = not isinstance(self._config, ThinkpoStage) and line["step"] > self._num_warmup
        if is_start_compared and loss > (limit := self._loss_limit(start, START_FACTOR)):
            problems["start"] = (
                f"The loss is {loss:.4g}, above its limit of {limit:.4g}. At the start it was {start:.4g}"
            )
        if len(self._grad_norms) >= MIN_GRAD_NORM_HISTORY:
            norm, median = line["grad_norm"], statistics.median(self._grad_norms)
            if norm > (limit := max(GRAD_NORM_FACTOR * median, MIN_GRAD_NORM)):
                text = f"The gradient norm is {norm:.4g}, above its limit of {limit:.4g}"
                problems["gradient"] = f"{text}. Its running median is {median:.4g}"
        return problems | self._find_collapse(line)

    def _loss_limit(self, reference: float, factor: float) -> float:
        """Returns the highest loss that is not suspicious beside a reference, such as the running median."""
        if isinstance(self._config, ThinkpoStage):  # A loss function may be negative, or have any scale.
            return factor * max(reference, 0.0) + self._start_losses[0]
        return min(factor * reference + LOSS_SLACK, reference + MAX_SFT_RISE)

    def _find_collapse(self, line: Mapping[str, float]) -> dict[str, str]:
        """Returns a sentence if the chosen answers of the pairs became much less likely than in the reference."""
        config = self._config
        # APO-down lowers the log-probs of both answers on purpose.
        if not isinstance(config, ThinkpoStage) or config.loss == "apo_down":
            return {}
        if not line.keys() >= {"logps/chosen", "nll/chosen", "rewards/chosen", "rewards/rejected"}:
            return {}  # a damaged line
        if line["logps/chosen"] >= 0:
            return {}
        chosen, rejected = line["rewards/chosen"] / config.beta, line["rewards/rejected"] / config.beta
        per_token = chosen * line["nll/chosen"] / -line["logps/chosen"]
        if per_token > -COLLAPSE_NATS:
            return {}
        return {
            "collapse": (
                f"The log-probs collapse. Since the start, those of chosen answers changed by {chosen:.4g} "
                f"({per_token:.4g} per token, limit {-COLLAPSE_NATS:g}), those of rejected answers by {rejected:.4g}"
            )
        }

    def _remember(self, line: Mapping[str, float], *, is_good: bool) -> None:
        if not _was_applied(line):
            return
        loss = line["loss"]
        if len(self._start_losses) < NUM_START_UPDATES:
            # The first loss of ThinkPO is exact, because policy and reference are equal.
            max_rise = 0.0 if isinstance(self._config, ThinkpoStage) else MAX_START_RISE
            loss = min([loss, *(first + max_rise for first in self._start_losses[:1])])
            self._start_losses.append(loss)
        if is_good:
            self._losses.append(loss)
            self._grad_norms.append(line["grad_norm"])


def _was_applied(line: Mapping[str, float]) -> bool:
    """Whether an update was applied. The line of a skipped one has no values that are not finite."""
    return line.keys() >= {"loss", "grad_norm"}


def _is_low(margins: Sequence[float]) -> bool:
    """Whether the last margin is less than half of the largest, by more than noise."""
    return bool(margins) and margins[-1] < max(margins) / 2 and max(margins) - margins[-1] >= MIN_FALL


def _num_falls(margins: Sequence[float]) -> int:
    """Returns how many times in a row the margin fell, up to the last one."""
    pairs = itertools.pairwise(reversed(margins))
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] < pair[1], pairs))


def _keep_falling(margins: Sequence[float]) -> bool:
    return _is_low(margins) and _num_falls(margins) >= NUM_FALLS


class DivergenceGuard:
    """Stops a stage that diverges, or warns. Until it is clear, it postpones checkpoints.

    All processes must make the same calls with the same lines.
    """

    def __init__(
        self, config: StageConfig, num_updates: int, checkpoints: CheckpointStore, folder: StageFolder, start: int
    ) -> None:
        """Takes the lines up to update `start` from the files of the stage.

        Raises `RunError` if training diverged before, and the stage now stops at it.
        """
        self._config, self._checkpoints = config, checkpoints
        self._watch = DivergenceWatch(config, num_updates)
        paths = (folder.metrics, folder.validation)
        lines, validations = (read_shared_metrics(path, WATCHED_METRICS, last=start) for path in paths)
        found = [*map(self._watch.add, lines), *map(self._watch.add_validation, validations)]
        self._found = sorted(filter(None, found), key=lambda each: each.update)
        if self._found and config.on_divergence == "stop":
            self._report(self._found[-1])

    def add(self, line: Mapping[str, float]) -> None:
        """Takes the line of the next update. Raises `RunError` if training diverges and the stage stops at it."""
        self._handle(self._watch.add(line))

    def add_validation(self, line: Mapping[str, float]) -> None:
        """Takes the next line of the validation. Raises like `add`."""
        self._handle(self._watch.add_validation(line))

    def allows_save(self, *, is_stopping: bool) -> bool:
        """Returns whether a checkpoint may be saved now. In doubt, it could replace the last good one.

        A requested stop may save as long as this keeps a good one.
        """
        if not self._watch.is_suspicious:
            return True
        steps, last_good = self._checkpoints.steps(), self._watch.last_good
        num_good = sum(step <= last_good for step in steps)
        num_after = len(steps) - num_good + 1
        is_allowed = is_stopping and (num_good == 0 or num_after < self._config.checkpoint.keep)
        if is_stopping and not is_allowed:
            log_info(f"{self._config.name}: training may diverge. This stop keeps the earlier checkpoints: {steps}")
        return broadcast_from_primary(is_allowed)

    def notes(self) -> tuple[str, ...]:
        """Returns a note for the first divergence of the stage, if there was one."""
        if not self._found:
            return ()
        times = f" (the first of {len(self._found)} times)" if len(self._found) > 1 else ""
        return (f"training diverged at update {self._found[0].update}{times}: {self._found[0].problem}",)

    def _handle(self, divergence: Divergence | None) -> None:
        if divergence is not None:
            self._found.append(divergence)
            self._report(divergence)

    def _report(self, divergence: Divergence) -> None:
        config, folder = self._config, self._checkpoints.folder
        good = [step for step in self._checkpoints.steps() if step <= divergence.last_good]
        kept = f"The last good checkpoint is {folder / str(good[-1])}." if good else "No good checkpoint is left."
        problem = f"stage {config.name}, update {divergence.update}: training diverges. {divergence.problem}. {kept}"
        if config.on_divergence == "stop":
            raise RunError(
                f"{problem} Lower the learning rate and choose another run_dir, or set `on_divergence: warn` to train "
                "on."
            )
        log_warning(f"{problem} Training goes on, and the next checkpoints replace those that are there.")
