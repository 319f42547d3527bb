"""Draws the figures of a run report: training curves, accuracies and response lengths."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from thinkpo_jax.evaluation.results import ReportContents, ResultsByModel, StageSummary, benchmark_names
from thinkpo_jax.evaluation.statistics import ScoresByModel
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.runtime.figures import CHOSEN_COLOR, MARGIN_COLOR, REJECTED_COLOR, draw_legend, label_axes, subplots
from thinkpo_jax.runtime.files import StageFolder

Metrics = list[dict[str, float]]  # one dict per update
_PALETTE = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008


def draw_figures(run_dir: Path, contents: ReportContents, scores: ScoresByModel) -> dict[str, Figure]:
    """Returns the figures that have data, by file name without suffix."""
    names = dict.fromkeys([*contents.results, *(stage.name for stage in contents.stages)])
    colors = {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(names)}
    metrics = {s: rows for s in contents.stages if (rows := read_metrics(StageFolder(run_dir / s.name).metrics))}
    figures: dict[str, Figure] = {}
    if metrics:
        figures["loss"] = _draw_losses(metrics, colors)
    if thinkpo_metrics := {stage: rows for stage, rows in metrics.items() if stage.objective == "thinkpo"}:
        figures["rewards"] = _draw_rewards(thinkpo_metrics)
    if benchmark_names(scores):
        figures["accuracy"] = _draw_accuracies(scores, colors)
        figures["response_length"] = _draw_response_lengths(contents.results, scores, colors)
    return figures


def _draw_losses(metrics: Mapping[StageSummary, Metrics], colors: Mapping[str, str]) -> Figure:
    figure, panels = subplots(len(metrics), "Training loss by stage")
    for ax, (stage, rows) in zip(panels, metrics.items(), strict=True):
        unit = "nats per token" if stage.objective == "sft" else "nats per pair"
        label_axes(ax, f"{stage.name} (started from {stage.start})", "step", f"loss ({unit})")
        _draw_curve(ax, rows, "loss", colors[stage.name], "loss")
        if stage.objective == "thinkpo":
            ax.axhline(math.log(2), color="black", linestyle=":", linewidth=1.2, label="ln 2 (policy = reference)")
        draw_legend(ax)
    return figure


def _draw_rewards(metrics: Mapping[StageSummary, Metrics]) -> Figure:
    figure = Figure(figsize=(9.6, 3.8 * len(metrics) + 0.3), layout="constrained")
    figure.suptitle("ThinkPO rewards of chosen and rejected answers during training")
    grid = figure.subplots(len(metrics), 2, squeeze=False)
    for (left, right), (stage, rows) in zip(grid, metrics.items(), strict=True):
        label_axes(left, f"{stage.name}: reward = beta x (log-prob - reference log-prob)", "step", "reward (nats)")
        _draw_curve(left, rows, "rewards/margins", MARGIN_COLOR, "margin (chosen - rejected)")
        _draw_curve(left, rows, "rewards/chosen", CHOSEN_COLOR, "chosen")
        _draw_curve(left, rows, "rewards/rejected", REJECTED_COLOR, "rejected", linestyle="--")
        label_axes(right, f"{stage.name}: reward accuracy", "step", "fraction of pairs with margin > 0")
        _draw_curve(right, rows, "rewards/accuracies", MARGIN_COLOR, "reward accuracy")
        right.axhline(0.5, color="black", linestyle=":", linewidth=1.2, label="chance")
        right.set_ylim(-0.03, 1.03)
        draw_legend(left)
        draw_legend(right)
    return figure


def _draw_accuracies(scores: ScoresByModel, colors: Mapping[str, str]) -> Figure:
    benchmarks = benchmark_names(scores)
    figure, panels = subplots(len(benchmarks), "Accuracy by model (error bars: 95 % intervals)")
    for ax, benchmark in zip(panels, benchmarks, strict=True):
        by_model = {model: scores[model][benchmark] for model in scores if benchmark in scores[model]}
        num_questions = next(iter(by_model.values())).num_questions
        label_axes(ax, f"{benchmark} ({num_questions:,} questions)", "model", "accuracy (%)")
        for x, (model, score) in enumerate(by_model.items()):
            height, low, high = (100 * value for value in (score.accuracy, *score.ci95))
            ax.bar(x, height, width=0.62, color=colors[model])
            errors = [[max(0.0, height - low)], [max(0.0, high - height)]]
            ax.errorbar(x, height, yerr=errors, fmt="none", ecolor="black", elinewidth=1.3, capsize=4)
            ax.annotate(f"{height:.1f}", (x, high), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        is_crowded = len("".join(by_model)) > 30
        rotation = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if is_crowded else {}
        ax.set_xticks(range(len(by_model)), list(by_model), **rotation)
        top = 112 * max(0.05, *(score.ci95[1] for score in by_model.values()))
        ax.set(xlim=(-0.6, len(by_model) - 0.4), ylim=(0, top))
        ax.grid(visible=False, axis="x")
    return figure


def _draw_response_lengths(results: ResultsByModel, scores: ScoresByModel, colors: Mapping[str, str]) -> Figure:
    """Draws one histogram per model and benchmark. The models of a benchmark share both axes."""
    benchmarks, models = benchmark_names(scores), list(scores)
    figure = Figure(figsize=(1.6 + 4.4 * len(benchmarks), 1.6 + 1.7 * len(models)), layout="constrained")
    figure.suptitle("Response length by model\n(dashed line: mean, black: truncated at the length limit)")
    grid = figure.subplots(len(models), len(benchmarks), squeeze=False, sharex="col", sharey="col")
    for column, benchmark in zip(grid.T, benchmarks, strict=True):
        samples_by_model = {
            m: np.array([(max(1, s.tokens), s.truncated) for q in results[m].get(benchmark, ()) for s in q.samples])
            for m in models
        }
        tokens = np.concatenate([samples_N2[:, 0] for samples_N2 in samples_by_model.values() if len(samples_N2)])
        scale = "log" if tokens.max() > 20 * tokens.min() else "linear"
        bins = np.geomspace(tokens.min(), tokens.max(), 41) if scale == "log" else np.linspace(0, tokens.max(), 41)
        for ax, (model, samples_N2) in zip(column, samples_by_model.items(), strict=True):
            label_axes(ax, f"{model} on {benchmark}: not evaluated", "", "answers (%)")
            if len(samples_N2):
                score = scores[model][benchmark]
                means = f"mean {score.mean_response_tokens:,.1f} tokens, {100 * score.truncation_rate:.1f} % truncated"
                ax.set_title(f"{model} on {benchmark}\n{means}", fontsize=10)
                groups = [samples_N2[samples_N2[:, 1] == is_truncated, 0] for is_truncated in (False, True)]
                weights = [np.full(len(group), 100 / len(samples_N2)) for group in groups]
                ax.hist(groups, bins.tolist(), weights=weights, stacked=True, color=[colors[model], "black"])
                ax.axvline(score.mean_response_tokens, color="black", linestyle="--", linewidth=1.3)
            ax.set_xscale(scale)
        column[-1].set_xlabel(f"response length (tokens{', log scale' if scale == 'log' else ''})")
    return figure


def _draw_curve(ax: Axes, rows: Metrics, key: str, color: str, label: str, *, linestyle: str = "-") -> None:
    """Draws one metric against the step. A long curve is faint under its running mean. NaN values leave gaps."""
    steps, values = (np.array([row.get(name) for row in rows], dtype=float) for name in ("step", key))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    is_finite, window = np.isfinite(values), len(values) // 20
    values = np.where(is_finite, values, np.nan)
    if not is_finite.any():
        label = f"{label} (no finite value)"
    elif window > 1:
        ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        ax.set_xlabel(f"step (bold: running mean over {window} steps)")
        sums, counts = (np.convolve(x, np.ones(window), mode="same") for x in (np.nan_to_num(values), is_finite))
        values = np.where(is_finite, sums / np.maximum(counts, 1), np.nan)
    marker = "o" if len(values) < 20 else None
    ax.plot(steps, values, color=color, linestyle=linestyle, linewidth=1.6, marker=marker, markersize=3, label=label)
