"""Writes the report of a run: tables, plots and one sentence per comparison.

`write_report` writes `report.json` for programs, and `report.md` and `plots/*.png` for people. The curves come from
`STAGE/metrics.jsonl` in the run folder. `terminal_summary` is the short form that a run prints at its end.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from itertools import product, starmap
from pathlib import Path

from thinkpo_jax.evaluation.plots import draw_figures
from thinkpo_jax.evaluation.results import AnswerCounts, ReportContents, ResultsByModel, benchmark_names, count_answers
from thinkpo_jax.evaluation.statistics import Interval, PairedComparison, ScoresByModel, compare_paired, score_benchmark
from thinkpo_jax.runtime.figures import figure_to_png
from thinkpo_jax.runtime.files import write_atomically

Table = list[tuple[str, ...]]  # the first row is the header
CountsByModel = Mapping[str, Mapping[str, AnswerCounts]]  # model name -> benchmark name -> counts
Comparisons = list[tuple[str, str, str, PairedComparison]]  # (before, after, benchmark, change): names of two models


def write_report(run_dir: Path, contents: ReportContents) -> None:
    """Writes `report.json`, `report.md` and the plots that have data into `run_dir`, each file atomically.

    Raises `ValueError` for a comparison of models without a common benchmark, or results that `statistics` rejects.
    """
    scores, comparisons = _score_models(contents.results), _compare_models(contents)
    figures = draw_figures(run_dir, contents, scores)
    for name, figure in figures.items():
        write_atomically(run_dir / "plots" / f"{name}.png", figure_to_png(figure))
    write_atomically(run_dir / "report.md", _to_markdown(contents, scores, comparisons, list(figures)).encode())
    write_atomically(run_dir / "report.json", _to_json(contents, scores, comparisons).encode())


def terminal_summary(contents: ReportContents) -> str:
    """Returns the tables of models and comparisons as aligned text. Raises the errors of `write_report`."""
    scores, comparisons = _score_models(contents.results), _compare_models(contents)
    parts = [contents.title]
    if scores:
        parts += [_align_columns(_models_table(scores))]
    if comparisons:
        parts += [_align_columns(_comparisons_table(comparisons))]
        parts += ["\n".join(starmap(_describe_comparison, comparisons))]
    return "\n\n".join(parts) + "\n"


def _score_models(results: ResultsByModel) -> ScoresByModel:
    return {
        model: {benchmark: score_benchmark(questions) for benchmark, questions in by_benchmark.items()}
        for model, by_benchmark in results.items()
    }


def _compare_models(contents: ReportContents) -> Comparisons:
    comparisons: Comparisons = []
    for before, after in contents.comparisons:
        old, new = (contents.results.get(model, {}) for model in (before, after))
        shared = [benchmark for benchmark in old if benchmark in new]
        if not shared:
            evaluated = {model: list(by_benchmark) for model, by_benchmark in contents.results.items()}
            raise ValueError(f"cannot compare {before!r} with {after!r}: no common benchmark. Evaluated: {evaluated}.")
        comparisons += [(before, after, name, compare_paired(old[name], new[name])) for name in shared]
    return comparisons


def _models_table(scores: ScoresByModel) -> Table:
    head = ("benchmark", "model", "accuracy % (95 % interval)", "response tokens", "truncated %", "questions x samples")
    table: Table = [head]
    for benchmark, model in product(benchmark_names(scores), scores):
        if score := scores[model].get(benchmark):
            accuracy, low, high = (f"{100 * rate:.1f}" for rate in (score.accuracy, *score.ci95))
            tokens, truncated = f"{score.mean_response_tokens:,.1f}", f"{100 * score.truncation_rate:.1f}"
            counts = f"{score.num_questions:,} x {score.num_samples / score.num_questions:.3g}"
            table += [(benchmark, model, f"{accuracy} ({low} to {high})", tokens, truncated, counts)]
    return table


def _count_answers(results: ResultsByModel) -> CountsByModel:
    return {
        model: {benchmark: count_answers(questions) for benchmark, questions in by_benchmark.items()}
        for model, by_benchmark in results.items()
    }


def _answers_table(counts: CountsByModel) -> Table:
    table: Table = [("benchmark", "model", "answers", "truncated", "cut by the context", "empty", "failed")]
    for benchmark, model in product(benchmark_names(counts), counts):
        if count := counts[model].get(benchmark):
            numbers = (count.answers, count.truncated, count.cut_by_context, count.empty, count.failed)
            table += [(benchmark, model, *(f"{number:,}" for number in numbers))]
    return table


def _describe_errors(counts: CountsByModel) -> list[str]:
    return [
        f"- {benchmark}, {model}: {total:,} failed and count as wrong: {error}"
        for model, by_benchmark in counts.items()
        for benchmark, count in by_benchmark.items()
        for error, total in count.errors.items()
    ]


def _comparisons_table(comparisons: Comparisons) -> Table:
    points_header, tokens_header = "accuracy change, points (95 % interval)", "token change (95 % interval)"
    table: Table = [("comparison", "benchmark", points_header, "p-value", tokens_header)]
    for before, after, benchmark, change in comparisons:
        points = _format_change(change.accuracy_difference, change.ci95, _format_points)
        p_value = "< 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}"
        tokens = _format_change(change.response_tokens_difference, change.response_tokens_ci95, _format_tokens)
        table += [(f"{before} -> {after}", benchmark, points, p_value, tokens)]
    return table


def _describe_comparison(before: str, after: str, benchmark: str, change: PairedComparison) -> str:
    """Returns the change as a sentence, which says higher or lower only if the interval excludes zero."""
    verdict = f"no significant difference between {before} and {after}"
    if change.ci95[0] > 0 or change.ci95[1] < 0:
        verdict = f"{after} scores {'higher' if change.ci95[0] > 0 else 'lower'} than {before}"
    points, interval = _format_points(change.accuracy_difference), _format_interval(change.ci95, _format_points)
    return f"{benchmark}: {verdict} ({points} points, 95 % interval {interval}, {change.num_questions:,} questions)."


def _format_points(fraction: float) -> str:
    """Returns signed percentage points. A difference too small for one decimal is not rounded to zero."""
    text = f"{100 * fraction:+.1f}" if abs(fraction) >= 0.0005 else f"{100 * fraction:+.1g}"
    return text if abs(fraction) > 1e-9 else "0.0"


def _format_tokens(count: float) -> str:
    return f"{count:+,.1f}" if round(count, 1) else "0.0"


def _format_interval(interval: Interval, format_number: Callable[[float], str]) -> str:
    return " to ".join(map(format_number, interval)) if all(map(math.isfinite, interval)) else "unknown"


def _format_change(difference: float, interval: Interval, format_number: Callable[[float], str]) -> str:
    return f"{format_number(difference)} ({_format_interval(interval, format_number)})"


def _align_columns(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [table[0], ["-" * width for width in widths], *table[1:]]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _markdown_table(table: Table) -> str:
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _to_markdown(contents: ReportContents, scores: ScoresByModel, comparisons: Comparisons, plots: list[str]) -> str:
    parts, counts = [f"# {contents.title}"], _count_answers(contents.results)
    if scores:
        parts += ["## Models", _markdown_table(_models_table(scores))]
        parts += ["Response tokens are a mean that includes the answers truncated at the length limit."]
        parts += ["## Answers", _markdown_table(_answers_table(counts))]
        parts += ["\n".join(errors)] if (errors := _describe_errors(counts)) else []
    if comparisons:
        parts += ["## Comparisons", _markdown_table(_comparisons_table(comparisons))]
        parts += ["\n".join(f"- {_describe_comparison(*comparison)}" for comparison in comparisons)]
    if len(comparisons) > 1:
        parts += ["If two models are equally good, one 95 % interval in twenty still excludes zero by chance."]
    if contents.stages:
        stages: Table = [("stage", "objective", "started from", "updates", "time (h:mm:ss)", "notes")]
        for stage in contents.stages:
            time = str(timedelta(seconds=round(stage.seconds)))
            stages += [(stage.name, stage.objective, stage.start, f"{stage.steps:,}", time, "; ".join(stage.notes))]
        parts += ["## Stages", _markdown_table(stages)]
    if contents.settings:
        parts += ["## Settings", _markdown_table([("setting", "value"), *contents.settings.items()])]
    if plots:
        parts += ["## Plots", *(f"![{name.replace('_', ' ')}](plots/{name}.png)" for name in plots)]
    return "\n\n".join(parts) + "\n"


def _to_json(contents: ReportContents, scores: ScoresByModel, comparisons: Comparisons) -> str:
    tree = {
        "title": contents.title,
        "models": scores,
        "answers": _count_answers(contents.results),
        "comparisons": [
            {"from": before, "to": after, "benchmark": benchmark} | asdict(change)
            for before, after, benchmark, change in comparisons
        ],
        "stages": contents.stages,
        "settings": dict(contents.settings),
    }
    finite = json.loads(json.dumps(tree, default=asdict), parse_constant=lambda _: None)  # NaN -> null
    return json.dumps(finite, indent=2, allow_nan=False) + "\n"
