"""Writes the report of a run: tables, plots, changed answers and one sentence per comparison.

`write_report` writes `report.json` for programs, and `report.md`, `plots/*.png` and `comparisons/` for people. The
curves come from `STAGE/metrics.jsonl` in the run folder. `terminal_summary` is the short form that a run prints at its
end.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from thinkpo_jax.evaluation import tables
from thinkpo_jax.evaluation.analysis import Analysis
from thinkpo_jax.evaluation.comparison_files import comparison_link, comparison_path, describe_changed_questions
from thinkpo_jax.evaluation.plots import draw_figures
from thinkpo_jax.evaluation.results import ReportContents
from thinkpo_jax.evaluation.tables import (
    Probes,
    Table,
    align_columns,
    describe_comparison,
    fenced_block,
    markdown_table,
)
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.runtime.figures import figure_to_png
from thinkpo_jax.runtime.files import StageFolder, write_atomically, write_json_record


def write_report(run_dir: Path, contents: ReportContents, analysis: Analysis) -> None:
    """Writes the report into `run_dir`, each file atomically. It has the plots that have data.

    `analysis` is that of the contents.
    """
    figures = draw_figures(run_dir, contents, analysis)
    for name, figure in figures.items():
        write_atomically(run_dir / "plots" / f"{name}.png", figure_to_png(figure))
    paths = {run_dir / comparison_path(comparison): comparison for comparison in analysis.comparisons}
    for path, comparison in paths.items():
        _write_text(path, describe_changed_questions(comparison, contents))
    for path in (run_dir / "comparisons").glob("*/*+*.md"):
        if path not in paths:
            path.unlink()  # of an earlier report
    probes = {stage.name: read_metrics(StageFolder(run_dir / stage.name).probe) for stage in contents.stages}
    probes = {stage: lines for stage, lines in probes.items() if lines}
    _write_text(run_dir / "report.md", _to_markdown(contents, analysis, probes, list(figures)))
    write_json_record(run_dir / "report.json", _to_record(contents, analysis, probes), indent=2)


def terminal_summary(title: str, analysis: Analysis) -> str:
    """Returns the tables of models and comparisons as aligned text, below the title."""
    parts = [title]
    if analysis.scores:
        parts += [align_columns(tables.models_table(analysis.scores))]
    if analysis.comparisons:
        parts += [align_columns(tables.comparisons_table(analysis.comparisons))]
        parts += ["\n".join(map(describe_comparison, analysis.comparisons))]
    return "\n\n".join(parts) + "\n"


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode(errors="backslashreplace"))  # a server may send half a surrogate pair


def _to_markdown(contents: ReportContents, analysis: Analysis, probes: Probes, plots: Sequence[str]) -> str:
    parts = [f"# {contents.title}"]
    if analysis.scores:
        parts += ["## Models", markdown_table(tables.models_table(analysis.scores))]
        parts += ["Response tokens are a mean that includes the answers truncated at the length limit."]
    parts += _comparison_section(analysis)
    if analysis.scores:
        parts += _length_sections(analysis)
        parts += _accuracy_sections(analysis)
        parts += ["## Answers", markdown_table(tables.answers_table(analysis))]
        parts += ["\n".join(errors)] if (errors := _describe_errors(analysis)) else []
    if contents.prompts:
        parts += [
            "## Prompts",
            "This is the first question of each benchmark in the chat template of the model. Servers use their own.",
        ]
        for benchmark, prompt in contents.prompts.items():
            parts += [f"### {benchmark}", fenced_block(prompt)]
    if contents.stages:
        stages: Table = [("stage", "objective", "started from", "updates", "time (h:mm:ss)", "notes")]
        for stage in contents.stages:
            time = str(timedelta(seconds=round(stage.seconds)))
            stages += [(stage.name, stage.objective, stage.start, f"{stage.steps:,}", time, "; ".join(stage.notes))]
        parts += ["## Stages", markdown_table(stages)]
    if probes:
        parts += ["## Probes", markdown_table(tables.probes_table(probes))]
        parts += ["These are the first and the last probe of each stage. All are in `STAGE/probe.jsonl`."]
    if contents.settings:
        parts += ["## Settings", markdown_table([("setting", "value"), *contents.settings.items()])]
    if plots:
        parts += ["## Plots", *(f"![{name.replace('_', ' ')}](plots/{name}.png)" for name in plots)]
    return "\n\n".join(parts) + "\n"


def _comparison_section(analysis: Analysis) -> list[str]:
    comparisons = analysis.comparisons
    if not comparisons:
        return []
    parts = ["## Comparisons", "\n".join(f"- {describe_comparison(comparison)}" for comparison in comparisons)]
    if len(comparisons) > 1:
        parts += ["If two models are equally good, one 95 % interval in twenty still excludes zero by chance."]
    links = [comparison_link(comparison) for comparison in comparisons]
    return [
        *parts,
        markdown_table(tables.comparisons_table(comparisons)),
        markdown_table(tables.changed_questions_table(comparisons, links)),
        "A question is gained if the second model answers it correctly more often. The last columns say how many "
        "questions would show a true difference of this size, with 80 % power at a two-sided level of 5 %. They follow "
        "from the observed variance of the differences, and hold for the same number of answers per question.",
    ]


def _length_sections(analysis: Analysis) -> list[str]:
    return [
        "## Response length in tokens",
        markdown_table(tables.lengths_table(analysis)),
        "An answer is finished if no limit cut it off. Failed answers have no length and are left out. Tokens per "
        "right answer are all generated tokens divided by the number of right answers.",
        "## Accuracy within a token budget, % (95 % interval)",
        markdown_table(tables.budgets_table(analysis)),
        "This is the share of all answers that are right, finished and not longer than the budget. A budget that no "
        "answer to the benchmark exceeds is left out. It equals the last column, unless a higher limit would have "
        "finished truncated answers.",
        "## Reflection words per 1,000 tokens",
        markdown_table(tables.reflection_table(analysis)),
        'Counts the whole words "wait" and "hmm" in any case.',
    ]


def _accuracy_sections(analysis: Analysis) -> list[str]:
    parts: list[str] = []
    if len(pass_at_k := tables.pass_at_k_table(analysis)) > 1:
        parts += ["## pass@k", markdown_table(pass_at_k)]
        parts += ["This is the estimated chance that at least one of k answers to a question is right."]
    if len(lenient := tables.lenient_table(analysis)) > 1:
        parts += ["## Lenient grading", markdown_table(lenient)]
        parts += ["The lenient grader also accepts answers outside the requested form, as the paper's grader does."]
        parts += ["All other sections use the strict grader."]
    for benchmark, (scores, differences) in tables.group_tables(analysis).items():
        parts += [f"## {benchmark} by group", markdown_table(scores)]
        if differences is not None:
            parts += [markdown_table(differences)]
            parts += ["With many groups, some intervals exclude zero by chance."]
    return parts


def _describe_errors(analysis: Analysis) -> list[str]:
    return [
        f"- {benchmark}, {model}: {total:,} failed and count as wrong: {error}"
        for model, by_benchmark in analysis.counts.items()
        for benchmark, count in by_benchmark.items()
        for error, total in count.errors.items()
    ]


def _to_record(contents: ReportContents, analysis: Analysis, probes: Probes) -> dict[str, Any]:
    tree = {
        "title": contents.title,
        "models": analysis.scores,
        "measures": analysis.measures,
        "groups": analysis.groups,
        "answers": analysis.counts,
        "comparisons": [
            {"from": each.before, "to": each.after, "benchmark": each.benchmark}
            | asdict(each.change)
            | {"groups": each.groups, "changed_questions": comparison_path(each)}
            for each in analysis.comparisons
        ],
        "prompts": dict(contents.prompts),
        "stages": contents.stages,
        "probes": probes,
        "settings": dict(contents.settings),
    }
    return json.loads(json.dumps(tree, default=asdict), parse_constant=lambda _: None)  # NaN -> null
