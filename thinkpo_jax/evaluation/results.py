"""Types of graded answers and of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class GradedSample:
    """One generated answer. `tokens` counts the response alone. `truncated`: the length limit cut it off."""

    response: str
    tokens: int
    correct: bool
    truncated: bool


@dataclass(frozen=True)
class QuestionResult:
    """The graded samples of one question. Two models are compared on the questions with the same `question_id`."""

    question_id: str
    samples: tuple[GradedSample, ...]


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
    """What a report shows. `comparisons`: (before, after) models to compare on every benchmark with results of both."""

    title: str
    stages: tuple[StageSummary, ...]
    results: ResultsByModel
    comparisons: tuple[tuple[str, str], ...]
    settings: Mapping[str, str]


def benchmark_names(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns each benchmark of any model once, in order of appearance."""
    return list(dict.fromkeys(name for results_of_model in results.values() for name in results_of_model))
