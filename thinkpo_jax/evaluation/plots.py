"""Draws the figures of a run report: training curves and accuracies. Those of lengths are in `length_plots`."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from thinkpo_jax.evaluation.analysis import Analysis
from thinkpo_jax.evaluation.length_plots import draw_accuracy_by_budget, draw_accuracy_by_length, draw_response_lengths
from thinkpo_jax.evaluation.results import ReportContents, StageSummary, benchmark_names
from thinkpo_jax.evaluation.statistics import ScoresByModel
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.runtime.figures import CHOSEN_COLOR, MARGIN_COLOR, REJECTED_COLOR, draw_legend, label_axes, subplots
from thinkpo_jax.runtime.files import StageFolder

Metrics = list[dict[str, float]]  # one dict per update
_PALETTE = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008


def draw_figures(run_dir: Path, contents: ReportContents, analysis: Analysis) -> dict[str, Figure]:
    """Returns the figures that have data, by file name without suffix."""
    names = dict.fromkeys([*contents.results, *(stage.name for stage in contents.stages)])
    colors = {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(names)}
    metrics = {s: rows for s in contents.stages if (rows := read_metrics(StageFolder(run_dir / s.name).metrics))}
    figures: dict[str, Figure] = {}
    if metrics:
        figures["loss"] = _draw_losses(metrics, colors)
    if thinkpo_metrics := {stage: rows for stage, rows in metrics.items() if stage.objective == "thinkpo"}:
        figures["rewards"] = _draw_rewards(thinkpo_metrics)
    if probes := {s: rows for s in contents.stages if (rows := read_metrics(StageFolder(run_dir / s.name).probe))}:
        figures["probe"] = _draw_probes(probes, colors)
    if benchmark_names(analysis.scores):
        figures["accuracy"] = _draw_accuracies(analysis.scores, colors)
        figures["accuracy_by_length"] = draw_accuracy_by_length(analysis, colors)
        figures["accuracy_by_budget"] = draw_accuracy_by_budget(contents.results, analysis, colors)
        figures["response_length"] = draw_response_lengths(contents.results, analysis.scores, colors)
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


def _draw_probes(probes: Mapping[StageSummary, Metrics], colors: Mapping[str, str]) -> Figure:
    """Draws the accuracy and the mean length of the answers during each stage. The stages share both vertical axes."""
    figure = Figure(figsize=(9.6, 3.3 * len(probes) + 0.3), layout="constrained")
    figure.suptitle("Answers to the questions of the probe during training")
    labels = {"accuracy": "accuracy (%)", "mean_response_tokens": "mean response length (tokens)"}
    grid = figure.subplots(len(probes), 2, squeeze=False, sharey="col")
    for row, (stage, lines) in zip(grid, probes.items(), strict=True):
        for ax, (key, label) in zip(row, labels.items(), strict=True):
            label_axes(ax, f"{stage.name} (started from {stage.start})", "step", label)
            values = np.array([line.get(key, np.nan) for line in lines]) * (100 if key == "accuracy" else 1)
            ax.plot([line["step"] for line in lines], values, color=colors[stage.name], marker="o", markersize=3)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    grid[0, 0].set_ylim(-3, 103)
    grid[0, 1].set_ylim(bottom=0)
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
