"""Types of graded answers and of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class GradedSample:
    """One generated answer; `tokens` is the length of the response alone, `truncated` says the limit cut it."""

    response: str
    tokens: int
    correct: bool
    truncated: bool


@dataclass(frozen=True)
class QuestionResult:
    """One question with its samples; `question_id` is what pairs it with the same question put to another model."""

    question_id: str
    samples: tuple[GradedSample, ...]


Results = Mapping[str, Mapping[str, Sequence[QuestionResult]]]


@dataclass(frozen=True)
class StageSummary:
    """One training stage: what it minimised, from which model it started, updates made and seconds taken."""

    name: str
    objective: Literal["sft", "thinkpo"]
    start: str
    steps: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportContents:
    """Everything a report says, in the order in which it says it.

    `results` is model name -> benchmark name -> that model's questions and answers; `comparisons` names (from, to)
    pairs of models, which are compared on every benchmark that both were put to; `settings` is shown as it is.
    """

    title: str
    stages: tuple[StageSummary, ...]
    results: Results
    comparisons: tuple[tuple[str, str], ...]
    settings: Mapping[str, str]


def benchmark_names(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for of_model in results.values() for name in of_model))
