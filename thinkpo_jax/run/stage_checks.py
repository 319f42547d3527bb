"""Finds what would stop a stage, make its training useless, or is probably a mistake. Training and `--check` use it."""

import textwrap
from collections.abc import Iterator

import numpy as np

from thinkpo_jax.data.batches import MAX_ROW_LENGTH
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import TokenizedDataset
from thinkpo_jax.evaluation.benchmarks import QuestionsByBenchmark, question_texts
from thinkpo_jax.evaluation.decontamination import CONTAMINATION_NGRAM, find_contamination
from thinkpo_jax.runtime.integers import round_up
from thinkpo_jax.training.reference_cache import example_digest
from thinkpo_jax.training.stage_config import StageConfig, ThinkpoStage

ROW_MULTIPLE = 256  # of tokens, which every attention kernel accepts
MAX_DROPPED_FRACTION = 0.1  # of rows that are too long, without a warning
PEAK_LEARNING_RATES = (1e-8, 1e-2)  # outside of these, an exponent is probably wrong


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
        problems.append(_explain_no_example(stage, dataset))
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


def _explain_no_example(stage: StageConfig, dataset: TokenizedDataset) -> str:
    """Returns why no example is left, with the remedy for each kind of row that was dropped."""
    has_long_rows = any(report.too_long_tokens for report in dataset.reports)
    remedies = [_describe_long_rows(stage, dataset)] if has_long_rows else []
    remedies += [
        f"{report.dropped[reason]} rows of {report.name} are dropped: {reason}. Correct them. The first: {first}"
        for report in dataset.reports
        for reason, first in report.first_error_by_reason.items()
        if reason not in report.stopping_error_by_reason
    ]
    return " ".join(["no example is left.", *(remedies or ["Correct the rows of the data."])])


def _describe_long_rows(stage: StageConfig, dataset: TokenizedDataset) -> str:
    """Returns how many rows were dropped for their length, and how many of them longer packed rows would keep."""
    needed = np.array([num_tokens for report in dataset.reports for num_tokens in report.too_long_tokens])
    lengths = np.percentile(needed, (0, 50, 90, 100), method="higher").tolist()
    lengths = dict.fromkeys(min(round_up(length, ROW_MULTIPLE), MAX_ROW_LENGTH) for length in lengths)
    kept = ", ".join(f"{length} keeps {int((needed <= length).sum())}" for length in lengths)
    num_rows, row_length = sum(report.rows for report in dataset.reports), stage.batch.row_length
    dropped = f"{len(needed)} of {num_rows} rows are dropped, because they do not fit batch.row_length {row_length}"
    return f"{dropped}. Increase it: {kept} of these rows."


def find_stage_warnings(
    stage: StageConfig, dataset: TokenizedDataset, tokenizer: ChatTokenizer, questions: QuestionsByBenchmark
) -> list[str]:
    """Returns what is probably a mistake in a stage with examples. Each line says what to do."""
    warnings: list[str] = []
    num_too_long = sum(len(report.too_long_tokens) for report in dataset.reports)
    if num_too_long > MAX_DROPPED_FRACTION * sum(report.rows for report in dataset.reports):
        warnings.append(_describe_long_rows(stage, dataset))
    warnings += _find_repeated_rows(dataset)
    rate, (lowest, highest) = stage.optimizer.learning_rate, PEAK_LEARNING_RATES
    if not lowest <= rate <= highest:
        warnings.append(
            f"optimizer.learning_rate is {rate:g}. A rate outside of {lowest:g} to {highest:g} is unusual. Check its "
            "exponent."
        )
    warnings += _find_contaminated_prompts(dataset, tokenizer, questions) if questions else []
    return [f"stage {stage.name}: {warning}" for warning in warnings]


def _find_repeated_rows(dataset: TokenizedDataset) -> Iterator[str]:
    """Yields a warning if rows have the same tokens. A `weight` above 1 repeats rows on purpose and does not count."""
    first_by_digest: dict[bytes, int] = {}
    repeats: list[tuple[int, int]] = []
    _, distinct = np.unique(dataset.source_and_index, axis=0, return_index=True)
    for index in np.sort(distinct).tolist():
        first = first_by_digest.setdefault(example_digest(dataset[index]), index)
        repeats += [(first, index)] if first != index else []
    if repeats:
        yield (
            f"{len(repeats)} of {len(distinct)} used rows repeat an earlier row token by token, such as "
            f"{dataset.describe_examples(repeats[0])} (counted from 1). Remove the copies. To repeat rows on purpose, "
            "set `weight`."
        )


def _find_contaminated_prompts(
    dataset: TokenizedDataset, tokenizer: ChatTokenizer, questions: QuestionsByBenchmark
) -> Iterator[str]:
    """Yields a warning for each benchmark whose questions occur in the training prompts."""
    prompts = {ids.tobytes(): ids for ids in (segment.token_ids[: segment.answer_start] for segment, *_ in dataset)}
    texts = tokenizer.tokenizer.batch_decode(list(prompts.values()), skip_special_tokens=True)
    held_out = {name: question_texts(name, questions[name]) for name in questions}
    matches = find_contamination(texts, held_out, ngram=CONTAMINATION_NGRAM)
    for name, texts_of_benchmark in held_out.items():
        found = [match for match in matches if match.benchmark == name]
        if found:
            num_prompts, num_questions = len({m.index for m in found}), len({m.held_out for m in found})
            first = textwrap.shorten(found[0].held_out, 80, placeholder=" ...")
            yield (
                f"{num_prompts} of {len(texts)} training prompts share text with {num_questions} of "
                f"{len(texts_of_benchmark)} questions of {name}, so its accuracy would be too high. The first: "
                f"{first!r}. Remove these rows, such as with `decontaminate` of the command `pairs`."
            )
