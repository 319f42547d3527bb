"""What does a person look at? Tables, plots and one plain sentence per comparison.

`write_report` turns a finished run into `report.json` (for programs), `report.md` (for people) and `plots/*.png`; the
curves come from `STAGE/metrics.jsonl` in the run folder. `terminal_summary` says the same at the end of a run.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from thinkpo_jax.evaluation.plots import draw_figures
from thinkpo_jax.evaluation.results import ReportContents, Results, benchmark_names
from thinkpo_jax.evaluation.statistics import Interval, PairedComparison, Scores, compare_paired, score_benchmark
from thinkpo_jax.runtime.figures import figure_to_png
from thinkpo_jax.runtime.files import write_atomically

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class ModelComparison:
    """One row of the comparison table: what became of the accuracy of `start` in `end` on one benchmark."""

    start: str
    end: str
    benchmark: str
    difference: PairedComparison


def write_report(run_dir: Path, contents: ReportContents) -> None:
    """Write `report.json`, `report.md` and `plots/*.png` of what there is into `run_dir`, each whole or not at all.

    Raises:
        ValueError: a comparison of models without a common benchmark, or answers that `scoring` refuses.
    """
    scores, compared = _score(contents.results), _compare(contents)
    figures = draw_figures(run_dir, contents, scores)
    for name, figure in figures.items():
        write_atomically(run_dir / "plots" / f"{name}.png", figure_to_png(figure))
    write_atomically(run_dir / "report.md", _markdown(contents, scores, compared, list(figures)).encode())
    tree = json.dumps(_without_nan(_json_tree(contents, scores, compared)), indent=2, allow_nan=False)
    write_atomically(run_dir / "report.json", f"{tree}\n".encode())


def terminal_summary(contents: ReportContents) -> str:
    """The models and the comparisons as aligned plain text, for the end of a run; errors as in `write_report`."""
    scores, compared = _score(contents.results), _compare(contents)
    parts = [contents.title]
    if scores:
        parts += [_aligned(*models_table(scores))]
    if compared:
        parts += [_aligned(*comparisons_table(compared)), "\n".join(map(comparison_sentence, compared))]
    return "\n\n".join(parts) + "\n"


def models_table(scores: Scores) -> tuple[Sequence[str], Rows]:
    """Header and rows of the model table, one row per benchmark and model, the models of a benchmark together."""
    header = ("benchmark", "model", "accuracy % (95 % interval)", "response tokens", "cut off %", "questions x samples")
    rows = [
        (
            benchmark,
            model,
            f"{100 * score.accuracy:.1f} ({100 * score.ci95[0]:.1f} to {100 * score.ci95[1]:.1f})",
            f"{score.mean_response_tokens:,.1f}",
            f"{100 * score.truncation_rate:.1f}",
            f"{score.num_questions:,} x {score.num_samples / score.num_questions:.3g}",
        )
        for benchmark in benchmark_names(scores)
        for model in scores
        if (score := scores[model].get(benchmark)) is not None
    ]
    return header, rows


def comparisons_table(compared: Sequence[ModelComparison]) -> tuple[Sequence[str], Rows]:
    """Header and rows of the comparison table; accuracy in percentage points, lengths in tokens, both with interval."""
    header = ("comparison", "benchmark", "accuracy, points (95 % interval)", "p-value", "tokens (95 % interval)")
    rows = [
        (
            f"{row.start} -> {row.end}",
            row.benchmark,
            f"{_points(change.accuracy_difference)} ({_interval(change.ci95, _points)})",
            "< 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}",
            f"{_tokens(change.response_tokens_difference)} ({_interval(change.response_tokens_ci95, _tokens)})",
        )
        for row in compared
        for change in [row.difference]
    ]
    return header, rows


def comparison_sentence(row: ModelComparison) -> str:
    """What the comparison shows, in words: higher or lower only where the interval leaves zero out."""
    low, high = row.difference.ci95
    verdict = f"no difference between {row.start} and {row.end} could be shown"
    if low > 0 or high < 0:
        verdict = f"{row.end} scores {'higher' if low > 0 else 'lower'} than {row.start}"
    points = f"{_points(row.difference.accuracy_difference)} points, 95 % interval {_interval((low, high), _points)}"
    return f"{row.benchmark}: {verdict} ({points}, {row.difference.num_questions:,} questions)."


def _score(results: Results) -> Scores:
    return {
        model: {name: score_benchmark(items) for name, items in of_model.items()} for model, of_model in results.items()
    }


def _compare(contents: ReportContents) -> list[ModelComparison]:
    results, compared = contents.results, list[ModelComparison]()
    for start, end in contents.comparisons:
        shared = [name for name in results.get(start, {}) if name in results.get(end, {})]
        if not shared:
            have = {model: list(of_model) for model, of_model in results.items()}
            raise ValueError(f"cannot compare {start!r} with {end!r}: no benchmark has results of both; found {have}")
        compared += [ModelComparison(start, end, b, compare_paired(results[start][b], results[end][b])) for b in shared]
    return compared


def _points(fraction: float) -> str:
    """A fraction as signed percentage points; a difference too small for one decimal is not rounded down to zero."""
    text = f"{100 * fraction:+.1f}" if abs(fraction) >= 0.0005 else f"{100 * fraction:+.1g}"
    return text if abs(fraction) > 1e-9 else "0.0"


def _tokens(count: float) -> str:
    return f"{count:+,.1f}" if round(count, 1) else "0.0"


def _interval(ends: Interval, form: Callable[[float], str]) -> str:
    return f"{form(ends[0])} to {form(ends[1])}" if all(map(math.isfinite, ends)) else "unknown"


def _aligned(header: Sequence[str], rows: Rows) -> str:
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "  ".join("-" * width for width in widths), *padded[1:]])


def _markdown_table(header: Sequence[str], rows: Rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _markdown(contents: ReportContents, scores: Scores, compared: Sequence[ModelComparison], plots: list[str]) -> str:
    parts = [f"# {contents.title}"]
    if scores:
        parts += ["## Models", _markdown_table(*models_table(scores))]
        parts += ["Response tokens count every answer, also those cut off at the length limit."]
    if compared:
        parts += ["## Comparisons", _markdown_table(*comparisons_table(compared))]
        parts += ["\n".join(f"- {comparison_sentence(row)}" for row in compared)]
    if len(compared) > 1:
        parts += ["Where nothing differs, one 95 % interval in twenty leaves zero out by chance alone."]
    if contents.stages:
        header = ("stage", "objective", "started from", "updates", "time (h:mm:ss)", "notes")
        times = [str(timedelta(seconds=round(stage.seconds))) for stage in contents.stages]
        rows = [
            (s.name, s.objective, s.start, f"{s.steps:,}", time, "; ".join(s.notes))
            for s, time in zip(contents.stages, times, strict=True)
        ]
        parts += ["## Stages", _markdown_table(header, rows)]
    if contents.settings:
        parts += ["## Settings", _markdown_table(("setting", "value"), list(contents.settings.items()))]
    if plots:
        parts += ["## Plots", *(f"![{name.replace('_', ' ')}](plots/{name}.png)" for name in plots)]
    return "\n\n".join(parts) + "\n"


def _json_tree(contents: ReportContents, scores: Scores, compared: Sequence[ModelComparison]) -> dict[str, Any]:
    return {
        "title": contents.title,
        "models": {m: {b: dataclasses.asdict(score) for b, score in row.items()} for m, row in scores.items()},
        "comparisons": [
            {"from": row.start, "to": row.end, "benchmark": row.benchmark} | dataclasses.asdict(row.difference)
            for row in compared
        ],
        "stages": [dataclasses.asdict(stage) for stage in contents.stages],
        "settings": dict(contents.settings),
    }


def _without_nan(tree: Any) -> Any:
    """The tree with null for every number that JSON cannot write."""
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
