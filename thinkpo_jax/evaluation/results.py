"""Types of graded answers and of the report."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from thinkpo_jax.evaluation.benchmarks import QuestionsByBenchmark


@dataclass(frozen=True)
class GradedSample:
    """One generated answer. `tokens` counts the response alone. `truncated`: a limit cut it off.

    `extracted` is the answer that the grader read in the response, None if it found none. `lenient_correct` is the
    verdict on what the paper's grader reads, None if the benchmark has no such grader. `cut_by_context`: the limit was
    the context of the model, not `max_new_tokens`. `unfinished_thought`: the thought never ends. With an `error` there
    was no answer. The response is then empty and wrong.
    """

    response: str
    tokens: int
    correct: bool
    truncated: bool
    extracted: str | None = None
    lenient_correct: bool | None = None
    cut_by_context: bool = False
    unfinished_thought: bool = False
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the model ended the answer itself."""
        return self.error is None and not self.truncated


@dataclass(frozen=True)
class QuestionResult:
    """The graded samples of one question. Two models are compared on the questions with the same `question_id`.

    `group` is the part of the benchmark that the question belongs to, such as "level 3". It is empty if there are none.
    """

    question_id: str
    samples: tuple[GradedSample, ...]
    group: str = ""


def split_by_group(results: Sequence[QuestionResult]) -> dict[str, list[QuestionResult]]:
    """Returns the questions of each group, without those that have no group. "9 steps" comes before "10 steps"."""
    results_by_group: defaultdict[str, list[QuestionResult]] = defaultdict(list)
    for result in results:
        results_by_group[result.group].append(result)
    names = [name for name in results_by_group if name]
    names.sort(key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))
    return {name: results_by_group[name] for name in names}


@dataclass(frozen=True)
class AnswerCounts:
    """How many answers to a benchmark have a property. `errors` counts the failed ones by reason."""

    answers: int
    truncated: int
    cut_by_context: int
    empty: int
    errors: Mapping[str, int]

    @property
    def failed(self) -> int:
        """The number of answers that failed."""
        return sum(self.errors.values())

    def describe_problems(self) -> str:
        """Returns how many answers failed and why, are empty or were cut by the context. Leaves out what is 0."""
        counts = {
            "failed (count as wrong)": self.failed,
            "empty": self.empty,
            "cut by the context of the model": self.cut_by_context,
        }
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        parts = [f"of {self.answers} answers: {', '.join(parts)}"] if parts else []
        reasons = [f"{count} failed because: {error.rstrip('.')}" for error, count in self.errors.items()]
        advice = ["Run the evaluation again to ask for failed answers"] if self.failed else []
        return ". ".join([*parts, *reasons, *advice])


def count_answers(results: Sequence[QuestionResult]) -> AnswerCounts:
    """Counts the answers to a benchmark. Reasons of errors that differ only in numbers are counted together."""
    samples = [sample for result in results for sample in result.samples]
    errors, first_reason = Counter[str](), dict[str, str]()
    for sample in samples:
        if sample.error is not None:
            pattern = re.sub(r"\d+", "N", sample.error)
            errors[first_reason.setdefault(pattern, sample.error)] += 1
    return AnswerCounts(
        answers=len(samples),
        truncated=sum(sample.truncated for sample in samples),
        cut_by_context=sum(sample.cut_by_context for sample in samples),
        empty=sum(sample.error is None and not sample.response.strip() for sample in samples),
        errors=dict(errors.most_common()),
    )


ResultsByModel = Mapping[str, Mapping[str, Sequence[QuestionResult]]]  # model name -> benchmark name -> questions


@dataclass(frozen=True)
class StageSummary:
    """One training stage: its objective, the model it started from, the number of updates and the time taken."""

    name: str
    objective: Literal["sft", "thinkpo"]
    start: str
    steps: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportContents:
    """What a report shows. `comparisons`: (before, after) models to compare on every benchmark with results of both.

    `questions` has every benchmark of `results`. `prompts`: benchmark name -> what a model gets for its first question.
    """

    title: str
    stages: tuple[StageSummary, ...]
    results: ResultsByModel
    comparisons: tuple[tuple[str, str], ...]
    settings: Mapping[str, str]
    questions: QuestionsByBenchmark
    prompts: Mapping[str, str]


def benchmark_names(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns each benchmark of any model once, in order of appearance."""
    return list(dict.fromkeys(name for results_of_model in results.values() for name in results_of_model))
