"""Computes all figures of a report: scores, measures and counts of each model, and the comparisons of models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from thinkpo_jax.evaluation.measures import AnswerMeasures, find_token_budgets, measure_answers
from thinkpo_jax.evaluation.results import (
    AnswerCounts,
    QuestionResult,
    ReportContents,
    ResultsByModel,
    benchmark_names,
    count_answers,
    split_by_group,
)
from thinkpo_jax.evaluation.statistics import (
    BenchmarkScore,
    PairedComparison,
    ScoresByModel,
    compare_groups,
    compare_paired,
    score_benchmark,
)

T = TypeVar("T")


@dataclass(frozen=True)
class ModelComparison:
    """The change from one model to another on one benchmark. `groups`: part of the benchmark -> the change there."""

    before: str
    after: str
    benchmark: str
    change: PairedComparison
    groups: Mapping[str, PairedComparison]


@dataclass(frozen=True)
class Analysis:
    """All figures of a report. The mappings are model name -> benchmark name -> figures. Groups have a score each."""

    scores: ScoresByModel
    measures: Mapping[str, Mapping[str, AnswerMeasures]]
    counts: Mapping[str, Mapping[str, AnswerCounts]]
    groups: Mapping[str, Mapping[str, Mapping[str, BenchmarkScore]]]
    comparisons: Sequence[ModelComparison]


def analyze(contents: ReportContents) -> Analysis:
    """Computes all figures of a report.

    Raises `ValueError` for a comparison of models without a common benchmark, or results that `statistics` rejects.
    """
    results = contents.results
    names = benchmark_names(results)
    budgets = {name: find_token_budgets(by[name] for by in results.values() if name in by) for name in names}
    return Analysis(
        scores=_map_results(results, lambda _, questions: score_benchmark(questions)),
        measures=_map_results(results, lambda benchmark, questions: measure_answers(questions, budgets[benchmark])),
        counts=_map_results(results, lambda _, questions: count_answers(questions)),
        groups=_map_results(
            results, lambda _, questions: {g: score_benchmark(of) for g, of in split_by_group(questions).items()}
        ),
        comparisons=compare_models(contents),
    )


def compare_models(contents: ReportContents) -> list[ModelComparison]:
    """Compares the pairs of models on every benchmark with results of both. Raises the errors of `analyze`."""
    comparisons: list[ModelComparison] = []
    for before, after in contents.comparisons:
        old, new = (contents.results.get(model, {}) for model in (before, after))
        shared = [benchmark for benchmark in old if benchmark in new]
        if not shared:
            evaluated = {model: list(by_benchmark) for model, by_benchmark in contents.results.items()}
            raise ValueError(f"cannot compare {before!r} with {after!r}: no common benchmark. Evaluated: {evaluated}.")
        for name in shared:
            change, groups = compare_paired(old[name], new[name]), compare_groups(old[name], new[name])
            comparisons += [ModelComparison(before, after, name, change, groups)]
    return comparisons


def iterate_by_benchmark(figures: Mapping[str, Mapping[str, T]]) -> Iterator[tuple[str, str, T]]:
    """Yields (benchmark name, model name, figures), the models of one benchmark after each other."""
    for benchmark, model in product(benchmark_names(figures), figures):
        if benchmark in figures[model]:
            yield benchmark, model, figures[model][benchmark]


def _map_results(
    results: ResultsByModel, compute: Callable[[str, Sequence[QuestionResult]], T]
) -> dict[str, dict[str, T]]:
    return {
        model: {benchmark: compute(benchmark, questions) for benchmark, questions in by_benchmark.items()}
        for model, by_benchmark in results.items()
    }
