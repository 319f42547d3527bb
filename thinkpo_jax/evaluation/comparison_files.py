"""Shows the questions that a model gained or lost compared with another, with the answers of both, as Markdown."""

from collections.abc import Mapping
from urllib.parse import quote

from thinkpo_jax.evaluation.analysis import ModelComparison
from thinkpo_jax.evaluation.benchmarks import Question
from thinkpo_jax.evaluation.results import GradedSample, QuestionResult, ReportContents
from thinkpo_jax.evaluation.tables import fenced_block

MAX_RESPONSE_CHARACTERS = 1500  # the end of a longer response is shown


def comparison_path(comparison: ModelComparison) -> str:
    """Returns the path of the file in the folder of the report. `+` occurs in no name of a model."""
    return f"comparisons/{comparison.benchmark}/{comparison.before}+{comparison.after}.md"


def comparison_link(comparison: ModelComparison) -> str:
    """Returns the target of a Markdown link to the file, relative to the report."""
    return quote(comparison_path(comparison))


def describe_changed_questions(comparison: ModelComparison, contents: ReportContents) -> str:
    """Returns the text of the file: every question that was gained or lost, its reference and both answers.

    All texts stand in code blocks, so nothing in them is read as Markdown. `contents.questions` must have the questions
    of the benchmark.
    """
    before, after, benchmark = comparison.before, comparison.after, comparison.benchmark
    results = {m: {q.question_id: q for q in contents.results[m][benchmark]} for m in (before, after)}
    questions = {question.id: question for question in contents.questions[benchmark]}
    gains = {i: _rate(results[after][i]) - _rate(results[before][i]) for i in results[before]}
    gained, lost = [i for i, gain in gains.items() if gain > 0], [i for i, gain in gains.items() if gain < 0]
    parts = [
        f"# {benchmark}: {before} -> {after}",
        f"Of {len(gains):,} questions, {len(gained):,} are gained and {len(lost):,} are lost. A question is gained if "
        f"{after} answers it correctly more often than {before}. Questions of equal accuracy are not shown. If a model "
        "gave several answers, one that fits is shown: a right one of the better model, a wrong one of the other.",
    ]
    for name, ids in (("Gained", gained), ("Lost", lost)):
        for number, question_id in enumerate(ids, start=1):
            title = f"{name} {number:,} of {len(ids):,}"
            of_models = {model: by_id[question_id] for model, by_id in results.items()}
            better = after if name == "Gained" else before
            parts += _describe_question(title, questions[question_id], of_models, better=better)
    return "\n\n".join(parts) + "\n"


def _describe_question(
    title: str, question: Question, results: Mapping[str, QuestionResult], *, better: str
) -> list[str]:
    reference = ", ".join(question.reference.answers)
    if question.reference.tolerances:
        reference += f"\ntolerance: {', '.join(map(str, question.reference.tolerances))}"
    parts = [f"## {title}: question {question.id}", fenced_block(question.messages[-1]["content"])]
    parts += ["Reference:", fenced_block(reference)]
    for model, result in results.items():
        is_shown = [sample.correct == (model == better) for sample in result.samples]
        index = is_shown.index(True)
        parts += _describe_answer(model, result, index)
    return parts


def _describe_answer(model: str, result: QuestionResult, index: int) -> list[str]:
    sample, total = result.samples[index], len(result.samples)
    verdict = "right" if sample.correct else "wrong"
    if total > 1:
        verdict += f" (answer {index + 1} of {total}, of which {sum(s.correct for s in result.samples)} are right)"
    heading = f"### {model}: {verdict}"
    if sample.error is not None:
        return [heading, "The answer failed:", fenced_block(sample.error)]
    extracted = ["No result was found in the response."]
    if sample.extracted is not None:
        extracted = ["Extracted result:", fenced_block(sample.extracted)]
    return [heading, *extracted, _describe_response(sample), fenced_block(_end_of(sample.response))]


def _describe_response(sample: GradedSample) -> str:
    length = f"{sample.tokens:,} tokens{', truncated' if sample.truncated else ''}"
    if len(sample.response) > MAX_RESPONSE_CHARACTERS:
        return (
            f"The last {MAX_RESPONSE_CHARACTERS:,} of {len(sample.response):,} characters of the response ({length}):"
        )
    return f"Response ({length}):"


def _end_of(response: str) -> str:
    return response[-MAX_RESPONSE_CHARACTERS:]


def _rate(result: QuestionResult) -> float:
    return sum(sample.correct for sample in result.samples) / len(result.samples)
