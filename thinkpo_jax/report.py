"""What does a person look at? Tables, plots and one plain sentence per comparison.

`write_report` turns a finished run into `report.json` (for programs), `report.md` (for people) and `plots/*.png`; the
curves come from `STAGE/metrics.jsonl` in the run folder. `terminal_summary` says the same at the end of a run.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from thinkpo_jax.log import read_metrics, write_whole
from thinkpo_jax.scoring import Comparison, Interval, Item, Score, compare, summarise

Results = Mapping[str, Mapping[str, Sequence[Item]]]
Scores = dict[str, dict[str, Score]]
Curves = dict[str, NDArray[np.float64]]
Rows = Sequence[Sequence[str]]

_PALETTE = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008
_CHOSEN, _REJECTED, _MARGIN = "#5B3FD6", "#882255", "#333333"  # never the colour of a model
_PANELS_PER_ROW = 3
_CURVES = ("step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


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


@dataclass(frozen=True)
class ComparedModels:
    """One row of the comparison table: what became of the accuracy of `start` in `end` on one benchmark."""

    start: str
    end: str
    benchmark: str
    difference: Comparison


def write_report(run_dir: Path, contents: ReportContents) -> None:
    """Write `report.json`, `report.md` and `plots/*.png` of what there is into `run_dir`, each whole or not at all.

    Raises:
        ValueError: a comparison of models without a common benchmark, or answers that `scoring` refuses.
    """
    scores, compared = _score(contents.results), _compare(contents)
    figures = _figures(run_dir, contents, scores)
    for name, figure in figures.items():
        write_whole(run_dir / "plots" / f"{name}.png", png(figure))
    write_whole(run_dir / "report.md", _markdown(contents, scores, compared, list(figures)).encode())
    tree = json.dumps(_without_nan(_json_tree(contents, scores, compared)), indent=2, allow_nan=False)
    write_whole(run_dir / "report.json", f"{tree}\n".encode())


def png(figure: Figure) -> bytes:
    """A figure as a picture file."""
    figure.savefig(buffer := BytesIO(), format="png", dpi=130)
    return buffer.getvalue()


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
        for benchmark in _benchmarks(scores)
        for model in scores
        if (score := scores[model].get(benchmark)) is not None
    ]
    return header, rows


def comparisons_table(compared: Sequence[ComparedModels]) -> tuple[Sequence[str], Rows]:
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


def comparison_sentence(row: ComparedModels) -> str:
    """What the comparison shows, in words: higher or lower only where the interval leaves zero out."""
    low, high = row.difference.ci95
    verdict = f"no difference between {row.start} and {row.end} could be shown"
    if low > 0 or high < 0:
        verdict = f"{row.end} scores {'higher' if low > 0 else 'lower'} than {row.start}"
    points = f"{_points(row.difference.accuracy_difference)} points, 95 % interval {_interval((low, high), _points)}"
    return f"{row.benchmark}: {verdict} ({points}, {row.difference.num_questions:,} questions)."


def _score(results: Results) -> Scores:
    return {model: {name: summarise(items) for name, items in of_model.items()} for model, of_model in results.items()}


def _compare(contents: ReportContents) -> list[ComparedModels]:
    results, compared = contents.results, list[ComparedModels]()
    for start, end in contents.comparisons:
        shared = [name for name in results.get(start, {}) if name in results.get(end, {})]
        if not shared:
            have = {model: list(of_model) for model, of_model in results.items()}
            raise ValueError(f"cannot compare {start!r} with {end!r}: no benchmark has results of both; found {have}")
        compared += [ComparedModels(start, end, b, compare(results[start][b], results[end][b])) for b in shared]
    return compared


def _benchmarks(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for of_model in results.values() for name in of_model))


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


def _markdown(contents: ReportContents, scores: Scores, compared: Sequence[ComparedModels], plots: list[str]) -> str:
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


def _json_tree(contents: ReportContents, scores: Scores, compared: Sequence[ComparedModels]) -> dict[str, Any]:
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


def _figures(run_dir: Path, contents: ReportContents, scores: Scores) -> dict[str, Figure]:
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
    if _benchmarks(scores):
        figures["accuracy"] = _accuracy_figure(scores, colours)
        figures["response_length"] = _length_figure(contents.results, scores, colours)
    return figures


def _read_curves(path: Path) -> Curves:
    """Metric name -> value per update, NaN where it is missing or not finite; empty where there is no file."""
    rows = read_metrics(path)
    curves = {key: np.array([row.get(key) for row in rows], dtype=float) for key in _CURVES if rows}
    return {key: np.where(np.isfinite(values), values, np.nan) for key, values in curves.items()}


def _loss_figure(curves: Mapping[StageSummary, Curves], colours: Mapping[str, str]) -> Figure:
    figure, panels = _grid(len(curves), "Training loss of each stage")
    for ax, (stage, of_stage) in zip(panels, curves.items(), strict=True):
        unit = "nats per token" if stage.objective == "sft" else "nats per pair"
        _label(ax, f"{stage.name} (from {stage.start})", "update step", f"loss ({unit})")
        _draw_curve(ax, of_stage, "loss", colours[stage.name], "loss")
        if stage.objective == "thinkpo":
            ax.axhline(math.log(2), color="black", linestyle=":", linewidth=1.2, label="ln 2: policy = reference")
        _legend(ax)
    return figure


def _rewards_figure(curves: Mapping[StageSummary, Curves]) -> Figure:
    figure = Figure(figsize=(9.6, 3.8 * len(curves) + 0.3), layout="constrained")
    figure.suptitle("ThinkPO rewards: how far the model moved towards chosen and away from rejected answers")
    grid = figure.subplots(len(curves), 2, squeeze=False)
    for (left, right), (stage, of_stage) in zip(grid, curves.items(), strict=True):
        _label(left, f"{stage.name}: rewards, beta x log-ratio to the reference", "update step", "reward (nats)")
        _draw_curve(left, of_stage, "rewards/margins", _MARGIN, "margin (chosen - rejected)")
        _draw_curve(left, of_stage, "rewards/chosen", _CHOSEN, "chosen")
        _draw_curve(left, of_stage, "rewards/rejected", _REJECTED, "rejected", linestyle="--")
        _label(right, f"{stage.name}: reward accuracy", "update step", "chosen above rejected (fraction of pairs)")
        _draw_curve(right, of_stage, "rewards/accuracies", _MARGIN, "reward accuracy")
        right.axhline(0.5, color="black", linestyle=":", linewidth=1.2, label="chance")
        right.set_ylim(-0.03, 1.03)
        _legend(left)
        _legend(right)
    return figure


def _accuracy_figure(scores: Scores, colours: Mapping[str, str]) -> Figure:
    figure, panels = _grid(len(_benchmarks(scores)), "Accuracy of each model, with 95 % intervals")
    for ax, benchmark in zip(panels, _benchmarks(scores), strict=True):
        of_model = {model: scores[model][benchmark] for model in scores if benchmark in scores[model]}
        _label(ax, f"{benchmark} ({next(iter(of_model.values())).num_questions:,} questions)", "model", "accuracy (%)")
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
    benchmarks, models = _benchmarks(scores), list(scores)
    figure = Figure(figsize=(1.6 + 4.4 * len(benchmarks), 1.6 + 1.5 * len(models)), layout="constrained")
    figure.suptitle("Response length of each model\n(dashed line: mean; black: answers cut off at the length limit)")
    grid = figure.subplots(len(models), len(benchmarks), squeeze=False, sharex="col", sharey="col")
    for column, benchmark in zip(grid.T, benchmarks, strict=True):
        samples = {model: [s for item in results[model].get(benchmark, ()) for s in item.samples] for model in models}
        tokens = [max(1, sample.tokens) for of_model in samples.values() for sample in of_model]
        scale = "log" if max(tokens) > 20 * min(tokens) else "linear"
        bins = np.geomspace(min(tokens), max(tokens), 41) if scale == "log" else np.linspace(0, max(tokens), 41)
        for ax, model in zip(column, models, strict=True):
            _label(ax, f"{model} on {benchmark}: not evaluated", "", "answers (%)")
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


def pair_lengths_figure(chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> Figure:
    """Histograms of the tokens of chosen and rejected answers, and of their differences."""
    figure, (left, right) = _grid(2, f"Answer lengths of {len(chosen):,} pairs")
    _label(left, f"medians {np.median(chosen):,.0f} and {np.median(rejected):,.0f}", "tokens (log scale)", "pairs")
    both, gaps = np.maximum(1, [chosen, rejected]), chosen - rejected
    bins, colours = np.geomspace(both.min() / 2, both.max() * 2, 41).tolist(), (_CHOSEN, _REJECTED)
    left.hist(list(both), bins, color=colours, label=("chosen", "rejected"), histtype="stepfilled", alpha=0.6)
    left.set_xscale("log")
    _legend(left)
    _label(right, f"chosen - rejected: median {np.median(gaps):,.0f}", "tokens", "pairs")
    right.hist(gaps, np.linspace(gaps.min() - 20, gaps.max() + 20, 42).tolist(), color=_MARGIN)
    for axis in (left.yaxis, right.yaxis, right.xaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
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


def _grid(count: int, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(count, _PANELS_PER_ROW)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(5.6, 4.6 * columns), 3.9 * rows), layout="constrained")
    figure.suptitle(title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _label(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(color="#E4E4E4", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False, fontsize=8.5)
