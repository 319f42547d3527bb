"""Loads, checks and splits the data of a stage."""

import contextlib
from collections.abc import Iterator

import numpy as np

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import TokenizedDataset, split_held_out
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.evaluation.benchmarks import QuestionsByBenchmark
from thinkpo_jax.evaluation.probes import Probe
from thinkpo_jax.run.agreement import is_same_on_all_processes
from thinkpo_jax.run.resolve import ResolvedRun
from thinkpo_jax.run.stage_checks import find_stage_problems, find_stage_warnings
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.train_stage import StageInputs


def load_stage_inputs(run: ResolvedRun, stage: StageConfig, questions: QuestionsByBenchmark) -> StageInputs:
    """Returns what the training of a stage needs. Logs what became of the rows of its data, and probable mistakes.

    Raises `UserError` if a row cannot be used, no example is left, the validation split is not possible, or the data
    has changed (see `check_data_unchanged`).
    """
    seed, tokenizer = run.config.seed, run.model_source.tokenizer
    dataset = tokenize_stage_data(stage, tokenizer, seed=seed)
    for note in dataset.describe_sources():
        log_info(f"{stage.name}: {note}")
    problems = find_stage_problems(stage, dataset)
    if not len(dataset):
        raise UserError("\n".join(problems))
    for warning in [*problems, *find_stage_warnings(stage, dataset, tokenizer, questions)]:
        log_warning(warning)
    check_data_unchanged(run, stage, dataset)  # all processes reach this exchange before one can fail at the split
    held_out, initial_model = held_out_indices(stage, dataset, seed=seed), run.initial_source_of(stage)
    folder, probe = run.folder.stage(stage.name), make_stage_probe(run, stage, questions)
    return StageInputs(stage, initial_model, run.compute, run.mesh, dataset, held_out, folder, seed, probe)


def make_stage_probe(run: ResolvedRun, stage: StageConfig, questions: QuestionsByBenchmark) -> Probe | None:
    """Returns the probe of a stage, which asks the first questions of the run's first benchmark. None without one."""
    if stage.probe is None:
        return None
    assert run.config.evaluation is not None  # RunConfig checks it
    name, count = run.config.evaluation.benchmarks[0].name, stage.probe.questions
    first = questions[name][:count]
    if len(first) < count:
        log_info(f"{stage.name}: probe.questions is {count}, but {name} has {len(first)} questions. All are asked.")
    limit = stage.probe.max_new_tokens
    return Probe(run.model_source, run.compute, run.config.evaluation, first, max_new_tokens=limit)


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
