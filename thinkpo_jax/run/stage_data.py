"""Loads, checks and splits the data of a stage."""

import numpy as np

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import TokenizedDataset
from thinkpo_jax.data.packing import split_held_out
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.run.run_folder import Run, read_json_record
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.runtime.processes import broadcast_from_primary
from thinkpo_jax.training.stage_config import StageConfig, ThinkpoStage


def tokenize_stage_data(
    config: RunConfig, stage: StageConfig, chat: ChatTokenizer, *, keep_going: bool = False
) -> TokenizedDataset:
    """The tokenised examples of a stage; see `prepare`. Raises `UserError` that names the stage."""
    options = {"row_length": stage.batch.row_length, "seed": config.seed, "title": f"{stage.name} data"}
    try:
        return tokenize_sources(stage.data, chat, **options, keep_going=keep_going)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def held_out_indices(config: RunConfig, stage: StageConfig, examples: TokenizedDataset) -> np.ndarray:
    """The indices of the examples that a stage holds out; none without `validation`. Raises `UserError`."""
    if stage.validation is None:
        return np.zeros(0, np.int64)
    try:
        return split_held_out(examples, stage.validation.share, seed=config.seed)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def answer_names(stage: StageConfig) -> tuple[str, ...]:
    return ("chosen", "rejected") if isinstance(stage, ThinkpoStage) else ("response",)


def count_unclosed_thoughts(examples: TokenizedDataset) -> tuple[int, int]:
    """How many (chosen) answers do not end the thinking that they begin, of how many rows."""
    return sum(report.num_unclosed_thoughts for report in examples.reports), sum(
        report.num_used for report in examples.reports
    )


def find_stage_problems(stage: StageConfig, examples: TokenizedDataset) -> list[str]:
    """What would stop a stage, or make it pointless."""
    found = [
        f"{report.name}: {report.dropped[reason]} rows: {reason}; the first: {first}"
        for report in examples.reports
        for reason, first in report.stopping_error_by_reason.items()
    ]
    if not len(examples):
        found.append("no example is left. Raise batch.row_length, or mend the data.")
    unfinished, kept = count_unclosed_thoughts(examples)
    if 2 * unfinished > kept:
        found.append(
            f"{unfinished} of {kept} {answer_names(stage)[0]} answers begin to think and never end that: the model would "
            "learn not to come to an end. Leave cut answers out."
        )
    if isinstance(stage, ThinkpoStage):
        spans = examples.prompt_and_answer_lengths()
        shorter = int((spans[:, 0, 1] < spans[:, 1, 1]).sum())
        if 2 * shorter > len(spans):
            found.append(
                f"chosen is shorter than rejected in {shorter} of {len(spans)} pairs: ThinkPO prefers the long answer. "
                "Unless this is the control of swapped pairs, `chosen` and `rejected` are the wrong way round."
            )
    return [f"stage {stage.name}: {problem}" for problem in found]


def read_examples(run: Run, stage: StageConfig) -> TokenizedDataset:
    """The tokenised examples of a stage; says what became of the rows. Raises `UserError`."""
    found = tokenize_stage_data(run.config, stage, run.chat)
    for note in found.describe_sources():
        log_info(f"{stage.name}: {note}")
    problems = find_stage_problems(stage, found)
    if not len(found):
        raise UserError("\n".join(problems))
    for problem in problems:
        log_warning(problem)
    check_data_unchanged(run, stage, found)
    held_out_indices(run.config, stage, found)
    return found


def check_data_unchanged(run: Run, stage: StageConfig, examples: TokenizedDataset) -> None:
    """Raises `UserError` where a stage was begun with other data than these."""
    digest = np.frombuffer(examples.digest().encode(), np.uint8)
    if not np.array_equal(digest, broadcast_from_primary(digest)):
        raise UserError(
            f"stage {stage.name}: this process reads other data than the first one. Give all processes the same files."
        )
    record = read_json_record(run.folder / stage.name / "stage.json", "data")
    if record is not None and record["data"] != examples.digest():
        raise UserError(
            f"stage {stage.name} was begun with other data. Remove {run.folder / stage.name} to train it from its "
            "start, or restore the data."
        )
