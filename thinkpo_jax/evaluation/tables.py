"""Builds the tables of a report, and formats their numbers."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

from thinkpo_jax.evaluation.analysis import Analysis, ModelComparison, iterate_by_benchmark
from thinkpo_jax.evaluation.results import benchmark_names
from thinkpo_jax.evaluation.statistics import BenchmarkScore, Estimate, Interval, PairedComparison, ScoresByModel

Table = list[tuple[str, ...]]  # the first row is the header
Probes = Mapping[str, Sequence[Mapping[str, float]]]  # stage -> the lines of its `probe.jsonl`


def models_table(scores: ScoresByModel) -> Table:
    """Returns accuracy, mean length and truncation rate of each model and benchmark."""
    head = ("benchmark", "model", "accuracy % (95 % interval)", "response tokens", "truncated %", "questions x samples")
    table: Table = [head]
    for benchmark, model, score in iterate_by_benchmark(scores):
        tokens, truncated = _format_number(score.mean_response_tokens), _format_percent(score.truncation_rate)
        counts = f"{score.num_questions:,} x {score.num_samples / score.num_questions:.3g}"
        table += [(benchmark, model, _format_accuracy(score), tokens, truncated, counts)]
    return table


def comparisons_table(comparisons: Sequence[ModelComparison]) -> Table:
    """Returns the differences in accuracy and length of each comparison."""
    points_header, tokens_header = "accuracy change, points (95 % interval)", "token change (95 % interval)"
    table: Table = [("comparison", "benchmark", points_header, "p-value", tokens_header)]
    for each in comparisons:
        change = each.change
        points = _format_change(change.accuracy_difference, change.ci95, format_points)
        tokens = _format_change(change.response_tokens_difference, change.response_tokens_ci95, _format_tokens)
        table += [(_pair(each), each.benchmark, points, _format_p_value(change), tokens)]
    return table


def changed_questions_table(comparisons: Sequence[ModelComparison], links: Sequence[str]) -> Table:
    """Returns how many questions each comparison gained and lost, with a link to them, and how many it would need."""
    points = list(comparisons[0].change.questions_needed)
    needed_headers = (f"questions to show {point} point{'s' if point > 1 else ''}" for point in points)
    table: Table = [("comparison", "benchmark", "questions", "gained", "lost", "answers", *needed_headers)]
    for each, link in zip(comparisons, links, strict=True):
        change = each.change
        counts = (change.num_questions, change.after_better, change.before_better)
        needed = (f"{change.questions_needed[point]:,}" for point in points)
        table += [(_pair(each), each.benchmark, *(f"{n:,}" for n in counts), f"[side by side]({link})", *needed)]
    return table


def lengths_table(analysis: Analysis) -> Table:
    """Returns the lengths of all answers and of the finished ones."""
    kinds = ("mean, all (95 % interval)", "median, all", "mean, finished (95 % interval)", "median, finished")
    table: Table = [("benchmark", "model", *kinds, "tokens per right answer")]
    for benchmark, model, measures in iterate_by_benchmark(analysis.measures):
        row = (
            _format_mean(measures.tokens),
            _format_number(measures.median_tokens),
            _format_mean(measures.finished_tokens),
            _format_number(measures.median_finished_tokens),
            _format_number(measures.tokens_per_right_answer),
        )
        table += [(benchmark, model, *row)]
    return table


def budgets_table(analysis: Analysis) -> Table:
    """Returns the accuracy within each token budget that some answer exceeds."""
    rows = list(iterate_by_benchmark(analysis.measures))
    budgets = sorted({budget for *_, measures in rows for budget in measures.accuracy_within_budget})
    table: Table = [("benchmark", "model", *(f"{budget:,} tokens" for budget in budgets), "within the limit")]
    for benchmark, model, measures in rows:
        within = [measures.accuracy_within_budget.get(budget) for budget in budgets]
        cells = [_format_rate(rate) if rate else "as the last" for rate in within]
        table += [(benchmark, model, *cells, _format_rate(measures.accuracy_finished))]
    return table


def reflection_table(analysis: Analysis) -> Table:
    """Returns how often reflection words occur in right and in wrong answers."""
    table: Table = [("benchmark", "model", "right answers", "wrong answers")]
    for benchmark, model, measures in iterate_by_benchmark(analysis.measures):
        rates = (measures.reflection_words_if_right, measures.reflection_words_if_wrong)
        table += [(benchmark, model, *(f"{rate:.2f}" if math.isfinite(rate) else "-" for rate in rates))]
    return table


def pass_at_k_table(analysis: Analysis) -> Table:
    """Returns pass@k in percent. It has only a header if no question has several samples."""
    rows = [row for row in iterate_by_benchmark(analysis.measures) if len(row[2].pass_at_k) > 1]
    ks = sorted({k for *_, measures in rows for k in measures.pass_at_k})
    table: Table = [("benchmark", "model", *(f"pass@{k} %" for k in ks))]
    for benchmark, model, measures in rows:
        table += [(benchmark, model, *(_format_percent(measures.pass_at_k.get(k, math.nan)) for k in ks))]
    return table


def lenient_table(analysis: Analysis) -> Table:
    """Returns strict and lenient accuracy. It has only a header if no benchmark has lenient grades."""
    table: Table = [("benchmark", "model", "strict accuracy % (95 % interval)", "lenient accuracy % (95 % interval)")]
    for benchmark, model, measures in iterate_by_benchmark(analysis.measures):
        if measures.lenient_accuracy:
            strict = _format_accuracy(analysis.scores[model][benchmark])
            table += [(benchmark, model, strict, _format_rate(measures.lenient_accuracy))]
    return table


def answers_table(analysis: Analysis) -> Table:
    """Returns how many answers were cut off, are empty or without a result, or failed."""
    kinds = ("truncated", "cut by the context", "unfinished thought", "empty", "without a result %", "failed")
    table: Table = [("benchmark", "model", "answers", *kinds)]
    for benchmark, model, count in iterate_by_benchmark(analysis.counts):
        measures = analysis.measures[model][benchmark]
        numbers = (count.answers, count.truncated, count.cut_by_context, measures.unfinished_thoughts, count.empty)
        without_result = _format_percent(measures.share_without_result)
        table += [(benchmark, model, *(f"{number:,}" for number in numbers), without_result, f"{count.failed:,}")]
    return table


def probes_table(probes: Probes) -> Table:
    """Returns the first and the last probe of each stage."""
    keys = ("accuracy", "mean_response_tokens", "truncation_rate", "finished_thoughts")
    table: Table = [("stage", "update", "accuracy %", "response tokens", "truncated %", "finished thoughts %")]
    for stage, lines in probes.items():
        for figures in lines[:: max(1, len(lines) - 1)]:
            scaled = [figures.get(key, math.nan) * (1 if key == "mean_response_tokens" else 100) for key in keys]
            table += [(stage, f"{figures['step']:,}", *("-" if math.isnan(x) else f"{x:.1f}" for x in scaled))]
    return table


def group_tables(analysis: Analysis) -> dict[str, tuple[Table, Table | None]]:
    """Returns a table of accuracies and one of differences for each benchmark with groups, by its name.

    There are no differences if no models are compared.
    """
    tables: dict[str, tuple[Table, Table | None]] = {}
    for benchmark in benchmark_names(analysis.groups):
        by_model = {model: by[benchmark] for model, by in analysis.groups.items() if by.get(benchmark)}
        if not by_model:
            continue
        changes = [each for each in analysis.comparisons if each.benchmark == benchmark]
        scores: Table = [("group", "questions", *(f"{model}, accuracy % (95 % interval)" for model in by_model))]
        headers = (f"{_pair(each)}, points (95 % interval), p-value" for each in changes)
        differences: Table = [("group", "questions", *headers)]
        for group in dict.fromkeys(itertools.chain.from_iterable(by_model.values())):
            of_group = [by.get(group) for by in by_model.values()]
            questions = f"{max(score.num_questions for score in of_group if score):,}"
            scores += [(group, questions, *(_format_accuracy(score) if score else "-" for score in of_group))]
            differences += [(group, questions, *(_format_group_change(each, group) for each in changes))]
        tables[benchmark] = (scores, differences if changes else None)
    return tables


def describe_comparison(comparison: ModelComparison) -> str:
    """Returns the change as a sentence, which says higher or lower only if the interval excludes zero."""
    before, after, change = comparison.before, comparison.after, comparison.change
    verdict = f"no significant difference between {before} and {after}"
    if change.ci95[0] > 0 or change.ci95[1] < 0:
        verdict = f"{after} scores {'higher' if change.ci95[0] > 0 else 'lower'} than {before}"
    points, interval = format_points(change.accuracy_difference), _format_interval(change.ci95, format_points)
    numbers = f"{points} points, 95 % interval {interval}, {change.num_questions:,} questions"
    return f"{comparison.benchmark}: {verdict} ({numbers})."


def align_columns(table: Table) -> str:
    """Returns a table as plain text."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [table[0], ["-" * width for width in widths], *table[1:]]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown_table(table: Table) -> str:
    """Returns a table as Markdown."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def fenced_block(text: str) -> str:
    """Returns any text as a Markdown code block. Its fence has more backticks than any run of them in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def format_points(fraction: float) -> str:
    """Returns signed percentage points. A difference too small for one decimal is not rounded to zero."""
    text = f"{100 * fraction:+.1f}" if abs(fraction) >= 0.0005 else f"{100 * fraction:+.1g}"
    return text if abs(fraction) > 1e-9 else "0.0"


def _pair(comparison: ModelComparison) -> str:
    return f"{comparison.before} -> {comparison.after}"


def _format_number(number: float) -> str:
    return f"{number:,.1f}" if math.isfinite(number) else "-"


def _format_percent(fraction: float) -> str:
    return _format_number(100 * fraction)


def _format_accuracy(score: BenchmarkScore) -> str:
    return _format_rate(Estimate(score.accuracy, score.ci95))


def _format_rate(rate: Estimate) -> str:
    return f"{_format_percent(rate.mean)} ({_format_interval(rate.ci95, _format_percent)})"


def _format_mean(mean: Estimate) -> str:
    is_known = math.isfinite(mean.mean)
    return f"{_format_number(mean.mean)} ({_format_interval(mean.ci95, _format_number)})" if is_known else "-"


def _format_tokens(count: float) -> str:
    return f"{count:+,.1f}" if round(count, 1) else "0.0"


def _format_p_value(change: PairedComparison) -> str:
    return "< 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}"


def _format_group_change(comparison: ModelComparison, group: str) -> str:
    if group not in comparison.groups:
        return "-"
    change = comparison.groups[group]
    points = _format_change(change.accuracy_difference, change.ci95, format_points)
    return f"{points}, {_format_p_value(change)}"


def _format_interval(interval: Interval, format_number: Callable[[float], str]) -> str:
    return " to ".join(map(format_number, interval)) if all(map(math.isfinite, interval)) else "unknown"


def _format_change(difference: float, interval: Interval, format_number: Callable[[float], str]) -> str:
    text = format_number(difference) if math.isfinite(difference) else "unknown"
    return f"{text} ({_format_interval(interval, format_number)})"
