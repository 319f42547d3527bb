"""Writes a set of pairs: the Parquet file, a README that describes it, and a plot of the answer lengths."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from thinkpo_jax.pair_building.filters import PreferencePair
from thinkpo_jax.runtime import figures
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.files import write_atomically

PAIRS_FILE, CARD_FILE, PLOT_FILE = "pairs.parquet", "README.md", "lengths.png"
CONTAMINATION_FILE = "contaminated.jsonl"
Tables = Mapping[str, Mapping[str, int]]  # title -> what is counted -> count
Settings = Mapping[str, Any]  # a `PairsConfig` as JSON


def write_pair_set(folder: Path, settings: Settings, pairs: Sequence[PreferencePair], tables: Tables) -> None:
    """Writes the pairs, the data card with the tables, and the plot into a folder. Logs where they are."""
    write_atomically(folder / PAIRS_FILE, _parquet(pairs))
    write_atomically(folder / PLOT_FILE, figures.figure_to_png(_pair_lengths_figure(pairs)))
    write_atomically(folder / CARD_FILE, _data_card(settings, pairs, tables).encode())
    log_info(f"{len(pairs)} pairs: {folder / PAIRS_FILE}, data card: {folder / CARD_FILE}")


def summarize_counts(tables: Tables) -> str:
    """Returns the counts that are not zero, on one line."""
    return "; ".join(
        f"{title}: " + (", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none")
        for title, counts in tables.items()
    )


def _parquet(pairs: Sequence[PreferencePair]) -> bytes:
    """Returns a Parquet file with one row per pair. A ThinkPO stage reads prompt, chosen and rejected by default."""
    import pyarrow
    from pyarrow import parquet

    text, integer = pyarrow.string(), pyarrow.int64()
    has_thoughts = any("thinking" in message for pair in pairs for message in pair.prompt)
    fields = ("role", "content", "thinking") if has_thoughts else ("role", "content")
    prompt = pyarrow.list_(pyarrow.struct([(field, text) for field in fields]))
    columns = {"question": text, "prompt": prompt, "reference": text, "chosen": text, "rejected": text}
    columns |= {"chosen_tokens": integer, "rejected_tokens": integer, "short_answer_is_correct": pyarrow.bool_()}
    columns |= {"source": text, "gap": integer}
    rows, buffer = [asdict(pair) | {"gap": pair.gap} for pair in pairs], io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(columns)), buffer)
    return buffer.getvalue()


def _data_card(settings: Settings, pairs: Sequence[PreferencePair], tables: Tables) -> str:
    header = f"tags: [thinkpo_jax, preference]\nconfigs: [{{config_name: default, data_files: {PAIRS_FILE}}}]\n"
    settings_yaml = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    labels = {True: "correct", False: "wrong", None: "not graded"}
    verdicts = Counter(labels[pair.short_answer_is_correct] for pair in pairs)
    verdict_text = ", ".join(f"{count:,} are {verdict}" for verdict, count in sorted(verdicts.items()))
    count_tables = "".join(
        f"\n## {title}\n\n| | |\n|---|--:|\n" + "".join(f"| {what} | {count:,} |\n" for what, count in counts.items())
        for title, counts in tables.items()
    )
    gaps = np.array([pair.gap for pair in pairs])
    benchmarks = ", ".join(benchmark["name"] for benchmark in settings["decontaminate"]["against"])
    decontamination = "The questions were not compared with those of any benchmark."
    if benchmarks:
        decontamination = f"Questions of {benchmarks} are left out and listed in `{CONTAMINATION_FILE}`."
    return (
        f"---\n{header}---\n\n# {settings['title']}\n\n"
        f"{len(pairs):,} pairs of a chosen and a rejected answer for ThinkPO (arXiv 2502.13173), in `{PAIRS_FILE}`. "
        f"`python -m thinkpo_jax.pairs` built them.\n\nOf the short answers {verdict_text} (column "
        "`short_answer_is_correct`). They were compared with the reference or, without one, with the long answer. "
        f"Chosen minus rejected: mean {gaps.mean():,.0f}, median {np.median(gaps):,.0f} tokens. {decontamination}\n\n"
        f"![lengths]({PLOT_FILE})\n{count_tables}\n## Settings\n\n```yaml\n{settings_yaml}```\n"
    )


def _pair_lengths_figure(pairs: Sequence[PreferencePair]) -> Figure:
    """Draws histograms of the answer lengths and of their differences."""
    chosen, rejected = np.array([(pair.chosen_tokens, pair.rejected_tokens) for pair in pairs]).T
    figure, (left, right) = figures.subplots(2, f"Answer lengths of {len(pairs):,} pairs")
    medians = f"medians {np.median(chosen):,.0f} and {np.median(rejected):,.0f}"
    figures.label_axes(left, medians, "tokens (log scale)", "pairs")
    lengths, gaps = np.maximum(1, [chosen, rejected]), chosen - rejected
    bins = np.geomspace(lengths.min() / 2, lengths.max() * 2, 41).tolist()
    colors = (figures.CHOSEN_COLOR, figures.REJECTED_COLOR)
    left.hist(list(lengths), bins, color=colors, label=("chosen", "rejected"), histtype="stepfilled", alpha=0.6)
    left.set_xscale("log")
    figures.draw_legend(left)
    figures.label_axes(right, f"chosen - rejected: median {np.median(gaps):,.0f}", "tokens", "pairs")
    right.hist(gaps, np.linspace(gaps.min() - 20, gaps.max() + 20, 42).tolist(), color=figures.MARGIN_COLOR)
    for axis in (left.yaxis, right.yaxis, right.xaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure
