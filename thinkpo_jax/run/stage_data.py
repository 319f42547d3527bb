"""Loads, checks and splits the data of a stage."""

import contextlib
from collections.abc import Iterator

import numpy as np

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import TokenizedDataset, split_held_out
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.run.resolve import ResolvedRun
from thinkpo_jax.run.run_folder import is_same_on_all_processes
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.training.stage_config import StageConfig, ThinkpoStage
from thinkpo_jax.training.train_stage import StageInputs


def load_stage_inputs(run: ResolvedRun, stage: StageConfig) -> StageInputs:
    """Returns what the training of a stage needs. Logs what became of the rows of its data.

    Raises `UserError` if a row cannot be used, no example is left, the validation split is not possible, or the data
    has changed (see `check_data_unchanged`).
    """
    seed = run.config.seed
    dataset = tokenize_stage_data(stage, run.model_source.tokenizer, seed=seed)
    for note in dataset.describe_sources():
        log_info(f"{stage.name}: {note}")
    problems = find_stage_problems(stage, dataset)
    if not len(dataset):
        raise UserError("\n".join(problems))
    for problem in problems:
        log_warning(problem)
    check_data_unchanged(run, stage, dataset)  # all processes reach this exchange before one can fail at the split
    held_out, initial_model = held_out_indices(stage, dataset, seed=seed), run.initial_source_of(stage)
    folder = run.folder.stage(stage.name)
    return StageInputs(stage, initial_model, run.compute, run.mesh, dataset, held_out, folder, seed)


def tokenize_stage_data(
    stage: StageConfig, tokenizer: ChatTokenizer, *, seed: int, keep_going: bool = False
) -> TokenizedDataset:
    """Returns the examples of a stage, see `tokenize_sources`. A `UserError` names the stage."""
    options = {"row_length": stage.batch.row_length, "seed": seed, "title": f"{stage.name} data"}
    with _naming_stage(stage):
        return tokenize_sources(stage.data, tokenizer, **options, keep_going=keep_going)


def held_out_indices(stage: StageConfig, dataset: TokenizedDataset, *, seed: int) -> np.ndarray:
    """Returns the indices of the validation examples, none without `validation`. A `UserError` names the stage."""
    with _naming_stage(stage):
        return split_held_out(dataset, stage.validation.share, seed=seed) if stage.validation else np.zeros(0, np.int64)


@contextlib.contextmanager
def _naming_stage(stage: StageConfig) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def check_data_unchanged(run: ResolvedRun, stage: StageConfig, dataset: TokenizedDataset) -> None:
    """Raises `UserError` if the processes read different data, or the stage was begun with other data."""
    name, digest = stage.name, dataset.digest()
    if not is_same_on_all_processes(digest):
        raise UserError(
            f"stage {name}: this process reads other data than process 0. Give all processes the same files."
        )
    record = run.folder.read_stage_record(name)
    if record is not None and record.data_digest != digest:
        raise UserError(
            f"stage {name} was begun with other data. Restore that data, or remove {run.folder.stage(name).path} to "
            "train the stage from its start."
        )


def answer_names(stage: StageConfig) -> tuple[str, ...]:
    """Returns the names of the answers of an example."""
    return ("chosen", "rejected") if isinstance(stage, ThinkpoStage) else ("response",)


def count_unclosed_thoughts(dataset: TokenizedDataset) -> tuple[int, int]:
    """Returns how many (chosen) answers open a thought and never close it, and how many rows are used."""
    return sum(r.num_unclosed_thoughts for r in dataset.reports), sum(r.num_used for r in dataset.reports)


def find_stage_problems(stage: StageConfig, dataset: TokenizedDataset) -> list[str]:
    """Returns what would stop a stage, or would make its training useless."""
    problems = [
        f"{report.name}: {report.dropped[reason]} rows: {reason}. The first: {first}"
        for report in dataset.reports
        for reason, first in report.stopping_error_by_reason.items()
    ]
    if not len(dataset):
        problems.append("no example is left. Raise batch.row_length, or fix the data.")
    num_unclosed, num_rows = count_unclosed_thoughts(dataset)
    if 2 * num_unclosed > num_rows:
        problems.append(
            f"{num_unclosed} of {num_rows} {answer_names(stage)[0]} answers open a thought and never close it. The "
            "model would learn not to stop. Remove answers that were cut off."
        )
    if isinstance(stage, ThinkpoStage):
        lengths = dataset.prompt_and_answer_lengths()
        num_shorter = int((lengths[:, 0, 1] < lengths[:, 1, 1]).sum())
        if 2 * num_shorter > len(lengths):
            problems.append(
                f"chosen is shorter than rejected in {num_shorter} of {len(lengths)} pairs, but ThinkPO prefers the "
                "long answer. Swap `chosen` and `rejected`, unless this is the control with swapped pairs."
            )
    return [f"stage {stage.name}: {problem}" for problem in problems]
