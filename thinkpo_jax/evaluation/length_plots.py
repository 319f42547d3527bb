"""Draws response lengths, and accuracy against response length and against a token budget."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from thinkpo_jax.evaluation.analysis import Analysis
from thinkpo_jax.evaluation.results import QuestionResult, ResultsByModel, benchmark_names
from thinkpo_jax.evaluation.statistics import Interval, ScoresByModel
from thinkpo_jax.runtime.figures import label_axes, subplots

Floats = NDArray[np.float64]
# Lengths that differ by more stand on a logarithmic axis, single answers and means of models.
_MAX_LINEAR_RATIO, _MAX_LINEAR_RATIO_OF_MEANS = 4, 20
_DODGE = 1.05  # the error bars of two models at the same budget stand side by side, this factor apart


def draw_accuracy_by_length(analysis: Analysis, colors: Mapping[str, str]) -> Figure:
    """Draws a point with both intervals for each model, one panel per benchmark. Arrows lead to the compared model."""
    benchmarks = benchmark_names(analysis.scores)
    figure, panels = subplots(len(benchmarks), "Accuracy and mean response length (bars: 95 % intervals)")
    for ax, benchmark in zip(panels, benchmarks, strict=True):
        points: dict[str, tuple[float, float]] = {}
        for model in analysis.scores:
            if benchmark not in analysis.scores[model]:
                continue
            score, length = analysis.scores[model][benchmark], analysis.measures[model][benchmark].tokens
            if np.isfinite(length.mean):
                points[model] = (length.mean, 100 * score.accuracy)
                low, high = score.ci95
                bars = {
                    "xerr": _error_bar(length.mean, length.ci95),
                    "yerr": _error_bar(100 * score.accuracy, (100 * low, 100 * high)),
                }
                style = {"color": colors[model], "markersize": 6, "elinewidth": 1.3, "capsize": 3}
                ax.errorbar(*points[model], **bars, fmt="o", label=model, **style)
        label_axes(ax, benchmark, "mean response length (tokens)", "accuracy (%)")
        _scale_lengths(ax, [x for x, _ in points.values()])
        for each in analysis.comparisons:
            if each.benchmark == benchmark and {each.before, each.after} <= points.keys():
                arrow = {"arrowstyle": "-|>", "color": "#555555", "shrinkA": 6, "shrinkB": 6, "linewidth": 0.9}
                ax.annotate("", points[each.after], points[each.before], arrowprops=arrow)
    _draw_shared_legend(figure, panels)
    return figure


def draw_accuracy_by_budget(results: ResultsByModel, analysis: Analysis, colors: Mapping[str, str]) -> Figure:
    """Draws the share of answers that are right, finished and within a token budget, one panel per benchmark.

    The budgets of the report have error bars.
    """
    benchmarks = benchmark_names(results)
    figure, panels = subplots(len(benchmarks), "Accuracy within a token budget (bars: 95 % intervals)")
    for ax, benchmark in zip(panels, benchmarks, strict=True):
        by_model = {model: results[model][benchmark] for model in results if benchmark in results[model]}
        lengths = [_answer_lengths(questions) for questions in by_model.values()]
        shortest, longest = _range(np.concatenate([lengths_N2[:, 0] for lengths_N2 in lengths]))
        for index, (model, questions) in enumerate(by_model.items()):
            tokens_N, percent_N = _accuracy_curve(questions)
            x, y = [shortest, *tokens_N, longest], [0.0, *percent_N, percent_N[-1] if len(percent_N) else 0.0]
            ax.step(x, y, where="post", color=colors[model], linewidth=1.6, label=model)
            shift = _DODGE ** (index - (len(by_model) - 1) / 2)
            for budget, rate in analysis.measures[model][benchmark].accuracy_within_budget.items():
                height, interval = 100 * rate.mean, (100 * rate.ci95[0], 100 * rate.ci95[1])
                style = {"color": colors[model], "markersize": 3.5, "elinewidth": 1.1, "capsize": 2}
                ax.errorbar(budget * shift, height, _error_bar(height, interval), fmt="o", **style)
        label_axes(ax, benchmark, "token budget (log scale, 1k = 1,024)", "right and finished (%)")
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter(FuncFormatter(_format_budget))
        ax.xaxis.set_minor_formatter(NullFormatter())
    _draw_shared_legend(figure, panels)
    return figure


def draw_response_lengths(results: ResultsByModel, scores: ScoresByModel, colors: Mapping[str, str]) -> Figure:
    """Draws one histogram per model and benchmark. The models of a benchmark share both axes."""
    benchmarks, models = benchmark_names(scores), list(scores)
    figure = Figure(figsize=(1.6 + 4.4 * len(benchmarks), 1.6 + 1.7 * len(models)), layout="constrained")
    figure.suptitle("Response length by model\n(dashed line: mean, black: truncated at the length limit)")
    grid = figure.subplots(len(models), len(benchmarks), squeeze=False, sharex="col", sharey="col")
    for column, benchmark in zip(grid.T, benchmarks, strict=True):
        lengths = {model: _answer_lengths(results[model].get(benchmark, ())) for model in models}
        shortest, longest = _range(np.concatenate([lengths_N2[:, 0] for lengths_N2 in lengths.values()]))
        scale = "log" if longest > _MAX_LINEAR_RATIO * shortest else "linear"
        bins = np.geomspace(shortest, longest, 41) if scale == "log" else np.linspace(0, longest, 41)
        for ax, (model, lengths_N2) in zip(column, lengths.items(), strict=True):
            problem = "all answers failed" if benchmark in results[model] else "not evaluated"
            label_axes(ax, f"{model} on {benchmark}: {problem}", "", "answers (%)")
            if len(lengths_N2):
                score = scores[model][benchmark]
                means = f"mean {score.mean_response_tokens:,.1f} tokens, {100 * score.truncation_rate:.1f} % truncated"
                ax.set_title(f"{model} on {benchmark}\n{means}", fontsize=10)
                groups = [lengths_N2[lengths_N2[:, 1] == is_truncated, 0] for is_truncated in (False, True)]
                weights = [np.full(len(group), 100 / len(lengths_N2)) for group in groups]
                ax.hist(groups, bins.tolist(), weights=weights, stacked=True, color=[colors[model], "black"])
                ax.axvline(score.mean_response_tokens, color="black", linestyle="--", linewidth=1.3)
            ax.set_xscale(scale)
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        column[-1].set_xlabel(f"response length (tokens{', log scale' if scale == 'log' else ''})")
    return figure


def _answer_lengths(questions: Sequence[QuestionResult]) -> Floats:
    """Returns tokens (at least 1, for a log axis) and `truncated` of each answer that did not fail, [N, 2]."""
    samples = [sample for question in questions for sample in question.samples if sample.error is None]
    return np.array([(max(1, sample.tokens), sample.truncated) for sample in samples], dtype=float).reshape(-1, 2)


def _range(lengths_N: Floats) -> tuple[float, float]:
    """Returns the smallest and the largest length, or an arbitrary range if there are no answers."""
    return (float(lengths_N.min()), float(lengths_N.max())) if len(lengths_N) else (1.0, 2.0)


def _accuracy_curve(questions: Sequence[QuestionResult]) -> tuple[Floats, Floats]:
    """Returns the sorted lengths of the right and finished answers, and the accuracy in percent within each, [N]."""
    weight = {question.question_id: 100 / len(questions) / len(question.samples) for question in questions}
    solved = [
        (max(1, s.tokens), weight[q.question_id]) for q in questions for s in q.samples if s.correct and s.finished
    ]
    solved_N2 = np.array(sorted(solved), dtype=float).reshape(-1, 2)
    return solved_N2[:, 0], np.cumsum(solved_N2[:, 1])


def _error_bar(center: float, interval: Interval) -> list[list[float]]:
    """Returns the lengths of an error bar below and above its center. An unknown interval has none."""
    if not np.isfinite(interval).all():
        return [[0.0], [0.0]]
    return [[max(0.0, center - interval[0])], [max(0.0, interval[1] - center)]]


def _scale_lengths(ax: Axes, lengths: Sequence[float]) -> None:
    if lengths and max(lengths) > _MAX_LINEAR_RATIO_OF_MEANS * min(lengths) > 0:
        ax.set_xscale("log")
        ax.set_xlabel(f"{ax.get_xlabel().removesuffix(')')}, log scale)")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _format_budget(tokens: float, _: int | None) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"


def _draw_shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Draws one legend below all panels, with each model once."""
    handles = {label: handle for ax in panels for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        columns = min(len(handles), 5)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
