"""Loads, checks and splits the data of a stage."""

import numpy as np

from thinkpo_jax.data.chat_tokenizer import Chat
from thinkpo_jax.data.examples import Examples
from thinkpo_jax.data.packing import held_out
from thinkpo_jax.data.tokenization import prepare
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.run.run_folder import Run, read_record
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import say, warn
from thinkpo_jax.runtime.processes import from_the_first
from thinkpo_jax.training.stage_config import Stage, ThinkpoStage


def prepared(config: RunConfig, stage: Stage, chat: Chat, *, keep_going: bool = False) -> Examples:
    """The tokenised examples of a stage; see `prepare`. Raises `UserError` that names the stage."""
    options = {"row_length": stage.batch.row_length, "seed": config.seed, "title": f"{stage.name} data"}
    try:
        return prepare(stage.data, chat, **options, keep_going=keep_going)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def not_trained(config: RunConfig, stage: Stage, examples: Examples) -> np.ndarray:
    """The indices of the examples that a stage holds out; none without `validation`. Raises `UserError`."""
    if stage.validation is None:
        return np.zeros(0, np.int64)
    try:
        return held_out(examples, stage.validation.share, seed=config.seed)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def _answers(stage: Stage) -> tuple[str, ...]:
    return ("chosen", "rejected") if isinstance(stage, ThinkpoStage) else ("response",)


def _unfinished(examples: Examples) -> tuple[int, int]:
    """How many (chosen) answers do not end the thinking that they begin, of how many rows."""
    return sum(report.open_thinking for report in examples.reports), sum(report.kept for report in examples.reports)


def pointless(stage: Stage, examples: Examples) -> list[str]:
    """What would stop a stage, or make it pointless."""
    found = [
        f"{report.name}: {report.dropped[reason]} rows: {reason}; the first: {first}"
        for report in examples.reports
        for reason, first in report.fatal.items()
    ]
    if not len(examples):
        found.append("no example is left. Raise batch.row_length, or mend the data.")
    unfinished, kept = _unfinished(examples)
    if 2 * unfinished > kept:
        found.append(
            f"{unfinished} of {kept} {_answers(stage)[0]} answers begin to think and never end that: the model would "
            "learn not to come to an end. Leave cut answers out."
        )
    if isinstance(stage, ThinkpoStage):
        spans = examples.spans()
        shorter = int((spans[:, 0, 1] < spans[:, 1, 1]).sum())
        if 2 * shorter > len(spans):
            found.append(
                f"chosen is shorter than rejected in {shorter} of {len(spans)} pairs: ThinkPO prefers the long answer. "
                "Unless this is the control of swapped pairs, `chosen` and `rejected` are the wrong way round."
            )
    return [f"stage {stage.name}: {problem}" for problem in found]


def read_examples(run: Run, stage: Stage) -> Examples:
    """The tokenised examples of a stage; says what became of the rows. Raises `UserError`."""
    found = prepared(run.config, stage, run.chat)
    for note in found.notes():
        say(f"{stage.name}: {note}")
    problems = pointless(stage, found)
    if not len(found):
        raise UserError("\n".join(problems))
    for problem in problems:
        warn(problem)
    check_data(run, stage, found)
    not_trained(run.config, stage, found)
    return found


def check_data(run: Run, stage: Stage, examples: Examples) -> None:
    """Raises `UserError` where a stage was begun with other data than these."""
    digest = np.frombuffer(examples.digest().encode(), np.uint8)
    if not np.array_equal(digest, from_the_first(digest)):
        raise UserError(
            f"stage {stage.name}: this process reads other data than the first one. Give all processes the same files."
        )
    record = read_record(run.folder / stage.name / "stage.json", "data")
    if record is not None and record["data"] != examples.digest():
        raise UserError(
            f"stage {stage.name} was begun with other data. Remove {run.folder / stage.name} to train it from its "
            "start, or restore the data."
        )
