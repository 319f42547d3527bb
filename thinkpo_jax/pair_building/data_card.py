"""README, Parquet file and plot of a pair set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from thinkpo_jax.pair_building.filters import PreferencePair
from thinkpo_jax.pair_building.pairs_config import PairsConfig
from thinkpo_jax.runtime.figures import (
    CHOSEN_COLOUR,
    MARGIN_COLOUR,
    REJECTED_COLOUR,
    draw_legend,
    label_axes,
    panel_grid,
)

PAIRS, CARD, PLOT, CONTAMINATION_FILE = "pairs.parquet", "README.md", "lengths.png", "contaminated.jsonl"
NOT_COMPARED = "The questions were not compared with those of any evaluation."


def summarize_counts(tables: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{title}: " + (", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none")
        for title, counts in tables.items()
    )


def data_card(config: PairsConfig, pairs: Sequence[PreferencePair], tables: Mapping[str, Mapping[str, int]]) -> str:
    head: dict[str, Any] = {
        "tags": ["thinkpo_jax", "preference"],
        "configs": [{"config_name": "default", "data_files": PAIRS}],
    }
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    verdicts = Counter(
        {True: "agree", False: "disagree", None: "cannot be compared"}[pair.short_answer_is_correct] for pair in pairs
    )
    shares = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    counted = "".join(
        f"\n## {title}\n\n| | |\n|---|--:|\n" + "".join(f"| {what} | {count:,} |\n" for what, count in counts.items())
        for title, counts in tables.items()
    )
    gaps = np.array([pair.gap for pair in pairs])
    benchmarks = ", ".join(benchmark.name for benchmark in config.decontaminate.against)
    held_out = (
        f"Questions of {benchmarks} are left out and listed in `{CONTAMINATION_FILE}`." if benchmarks else NOT_COMPARED
    )
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {config.title}\n\n"
        f"{len(pairs):,} pairs of a chosen and a rejected answer for ThinkPO (arXiv 2502.13173), in `{PAIRS}`, built "
        f"by `python -m thinkpo_jax.pairs`.\n\nOf the short answers {shares} with the reference, or, without one, with "
        f"the long answer (column `short_answer_is_correct`). Chosen minus rejected: mean {gaps.mean():,.0f}, median "
        f"{np.median(gaps):,.0f} tokens. {held_out}\n\n"
        f"![lengths]({PLOT})\n{counted}\n## Settings\n\n```yaml\n{settings}```\n"
    )


def pair_lengths_figure(chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> Figure:
    """Histograms of the tokens of chosen and rejected answers, and of their differences."""
    figure, (left, right) = panel_grid(2, f"Answer lengths of {len(chosen):,} pairs")
    label_axes(left, f"medians {np.median(chosen):,.0f} and {np.median(rejected):,.0f}", "tokens (log scale)", "pairs")
    both, gaps = np.maximum(1, [chosen, rejected]), chosen - rejected
    bins, colours = np.geomspace(both.min() / 2, both.max() * 2, 41).tolist(), (CHOSEN_COLOUR, REJECTED_COLOUR)
    left.hist(list(both), bins, color=colours, label=("chosen", "rejected"), histtype="stepfilled", alpha=0.6)
    left.set_xscale("log")
    draw_legend(left)
    label_axes(right, f"chosen - rejected: median {np.median(gaps):,.0f}", "tokens", "pairs")
    right.hist(gaps, np.linspace(gaps.min() - 20, gaps.max() + 20, 42).tolist(), color=MARGIN_COLOUR)
    for axis in (left.yaxis, right.yaxis, right.xaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure
