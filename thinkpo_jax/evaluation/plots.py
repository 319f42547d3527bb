"""Report as Markdown, JSON and text; its figures."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from thinkpo_jax.evaluation.results import ReportContents, Results, StageSummary, benchmark_names
from thinkpo_jax.evaluation.statistics import Scores
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.runtime.figures import (
    CHOSEN_COLOUR,
    MARGIN_COLOUR,
    REJECTED_COLOUR,
    draw_legend,
    label_axes,
    panel_grid,
)

Curves = dict[str, NDArray[np.float64]]

_PALETTE = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008

_CURVES = ("step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def draw_figures(run_dir: Path, contents: ReportContents, scores: Scores) -> dict[str, Figure]:
    """Every plot that has something to show, by file name without suffix."""
    names = dict.fromkeys([*contents.results, *(stage.name for stage in contents.stages)])
    colours = {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(names)}
    found = {stage: _read_curves(run_dir / stage.name / "metrics.jsonl") for stage in contents.stages}
    curves = {stage: of_stage for stage, of_stage in found.items() if of_stage}
    thinkpo = {stage: of_stage for stage, of_stage in curves.items() if stage.objective == "thinkpo"}
    figures: dict[str, Figure] = {}
    if curves:
        figures["loss"] = _loss_figure(curves, colours)
    if thinkpo:
        figures["rewards"] = _rewards_figure(thinkpo)
    if benchmark_names(scores):
        figures["accuracy"] = _accuracy_figure(scores, colours)
        figures["response_length"] = _length_figure(contents.results, scores, colours)
    return figures


def _read_curves(path: Path) -> Curves:
    """Metric name -> value per update, NaN where it is missing or not finite; empty where there is no file."""
    rows = read_metrics(path)
    curves = {key: np.array([row.get(key) for row in rows], dtype=float) for key in _CURVES if rows}
    return {key: np.where(np.isfinite(values), values, np.nan) for key, values in curves.items()}


def _loss_figure(curves: Mapping[StageSummary, Curves], colours: Mapping[str, str]) -> Figure:
    figure, panels = panel_grid(len(curves), "Training loss of each stage")
    for ax, (stage, of_stage) in zip(panels, curves.items(), strict=True):
        unit = "nats per token" if stage.objective == "sft" else "nats per pair"
        label_axes(ax, f"{stage.name} (from {stage.start})", "update step", f"loss ({unit})")
        _draw_curve(ax, of_stage, "loss", colours[stage.name], "loss")
        if stage.objective == "thinkpo":
            ax.axhline(math.log(2), color="black", linestyle=":", linewidth=1.2, label="ln 2: policy = reference")
        draw_legend(ax)
    return figure


def _rewards_figure(curves: Mapping[StageSummary, Curves]) -> Figure:
    figure = Figure(figsize=(9.6, 3.8 * len(curves) + 0.3), layout="constrained")
    figure.suptitle("ThinkPO rewards: how far the model moved towards chosen and away from rejected answers")
    grid = figure.subplots(len(curves), 2, squeeze=False)
    for (left, right), (stage, of_stage) in zip(grid, curves.items(), strict=True):
        label_axes(left, f"{stage.name}: rewards, beta x log-ratio to the reference", "update step", "reward (nats)")
        _draw_curve(left, of_stage, "rewards/margins", MARGIN_COLOUR, "margin (chosen - rejected)")
        _draw_curve(left, of_stage, "rewards/chosen", CHOSEN_COLOUR, "chosen")
        _draw_curve(left, of_stage, "rewards/rejected", REJECTED_COLOUR, "rejected", linestyle="--")
        label_axes(right, f"{stage.name}: reward accuracy", "update step", "chosen above rejected (fraction of pairs)")
        _draw_curve(right, of_stage, "rewards/accuracies", MARGIN_COLOUR, "reward accuracy")
        right.axhline(0.5, color="black", linestyle=":", linewidth=1.2, label="chance")
        right.set_ylim(-0.03, 1.03)
        draw_legend(left)
        draw_legend(right)
    return figure


def _accuracy_figure(scores: Scores, colours: Mapping[str, str]) -> Figure:
    figure, panels = panel_grid(len(benchmark_names(scores)), "Accuracy of each model, with 95 % intervals")
    for ax, benchmark in zip(panels, benchmark_names(scores), strict=True):
        of_model = {model: scores[model][benchmark] for model in scores if benchmark in scores[model]}
        label_axes(
            ax, f"{benchmark} ({next(iter(of_model.values())).num_questions:,} questions)", "model", "accuracy (%)"
        )
        for place, (model, score) in enumerate(of_model.items()):
            height, low, high = (100 * value for value in (score.accuracy, *score.ci95))
            ax.bar(place, height, width=0.62, color=colours[model])
            ends = [[max(0.0, height - low)], [max(0.0, high - height)]]
            ax.errorbar(place, height, yerr=ends, fmt="none", ecolor="black", elinewidth=1.3, capsize=4)
            ax.annotate(f"{height:.1f}", (place, high), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        crowded = len("".join(of_model)) > 30
        turn = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        ax.set_xticks(range(len(of_model)), list(of_model), **turn)
        ax.set_xlim(-0.6, len(of_model) - 0.4)
        ax.set_ylim(0, 112 * max(0.05, *(score.ci95[1] for score in of_model.values())))
        ax.grid(visible=False, axis="x")
    return figure


def _length_figure(results: Results, scores: Scores, colours: Mapping[str, str]) -> Figure:
    """One histogram per model and benchmark; the models of a benchmark share the axis, so that none hides another."""
    benchmarks, models = benchmark_names(scores), list(scores)
    figure = Figure(figsize=(1.6 + 4.4 * len(benchmarks), 1.6 + 1.5 * len(models)), layout="constrained")
    figure.suptitle("Response length of each model\n(dashed line: mean; black: answers cut off at the length limit)")
    grid = figure.subplots(len(models), len(benchmarks), squeeze=False, sharex="col", sharey="col")
    for column, benchmark in zip(grid.T, benchmarks, strict=True):
        samples = {model: [s for item in results[model].get(benchmark, ()) for s in item.samples] for model in models}
        tokens = [max(1, sample.tokens) for of_model in samples.values() for sample in of_model]
        scale = "log" if max(tokens) > 20 * min(tokens) else "linear"
        bins = np.geomspace(min(tokens), max(tokens), 41) if scale == "log" else np.linspace(0, max(tokens), 41)
        for ax, model in zip(column, models, strict=True):
            label_axes(ax, f"{model} on {benchmark}: not evaluated", "", "answers (%)")
            if samples[model]:
                score = scores[model][benchmark]
                means = f"mean {score.mean_response_tokens:,.1f}, {100 * score.truncation_rate:.1f} % cut off"
                ax.set_title(f"{model} on {benchmark}: {means}", fontsize=10)
                lengths = np.array([max(1, sample.tokens) for sample in samples[model]])
                is_cut = np.array([sample.truncated for sample in samples[model]], dtype=bool)
                groups = [lengths[~is_cut], lengths[is_cut]]
                shares = [np.full(len(group), 100 / len(lengths)) for group in groups]
                ax.hist(groups, bins.tolist(), weights=shares, stacked=True, color=[colours[model], "black"])
                ax.axvline(score.mean_response_tokens, color="black", linestyle="--", linewidth=1.3)
            ax.set_xscale(scale)
        column[-1].set_xlabel(f"response length (tokens{', log scale' if scale == 'log' else ''})")
    return figure


def _draw_curve(ax: Axes, curves: Curves, key: str, colour: str, label: str, *, linestyle: str = "-") -> None:
    """One metric against the step; a long noisy one as a faint line under its running mean. Gaps stay gaps."""
    steps, values = curves["step"], curves[key]
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    finite, window = np.isfinite(values), len(values) // 20
    if not finite.any():
        label = f"{label} (no finite value)"
    elif window > 1:
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        ax.set_xlabel(f"update step (bold: mean of {window} updates)")
        sums, counts = (np.convolve(x, np.ones(window), mode="same") for x in (np.where(finite, values, 0.0), finite))
        values = np.where(finite, sums / np.maximum(counts, 1), np.nan)
    marker = "o" if len(values) < 20 else None
    ax.plot(steps, values, color=colour, linestyle=linestyle, linewidth=1.6, marker=marker, markersize=3, label=label)
