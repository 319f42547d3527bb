"""The file of a comparison shows exactly the questions that were gained or lost, whatever is in their texts."""

import json

import pytest
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.evaluation.analysis import compare_models
from thinkpo_jax.evaluation.benchmarks import Question
from thinkpo_jax.evaluation.comparison_files import MAX_RESPONSE_CHARACTERS, describe_changed_questions
from thinkpo_jax.evaluation.grading import Reference
from thinkpo_jax.evaluation.results import GradedSample, QuestionResult, ReportContents
from thinkpo_jax.evaluation.tables import fenced_block

WRONG, RIGHT = (GradedSample("text", 3, correct, False, extracted=str(correct)) for correct in (False, True))
HOSTILE = (
    "```\nleft the block\n```",
    "````text\n```\n~~~\n`````` ",
    "| a | b |\n|---|---|\n</pre></td><script>alert(1)</script><!--",
    "one\u2028two\u2029three\x0b\x0c\x85\r\n\r\n# four\n\n\n    five",
    "`", "", "\n", "\\", "\x00\x1b[31m", "$\\boxed{`x`}$", "<details>",
)  # fmt: skip


def report_of(before, after, questions):
    results = {
        model: {"gsm8k": [QuestionResult(q.id, tuple(samples)) for q, samples in zip(questions, side, strict=True)]}
        for model, side in (("base", before), ("sft", after))
    }
    return ReportContents("A run", (), results, (("base", "sft"),), {}, {"gsm8k": questions}, {})


def file_of(before, after, questions):
    contents = report_of(before, after, questions)
    (comparison,) = compare_models(contents)
    return describe_changed_questions(comparison, contents)


def question(number, text="How many?", reference=("7",), tolerances=()):
    return Question(f"id{number}", ({"role": "user", "content": text},), Reference(reference, tolerances))


def split_blocks(markdown):
    """Returns the text outside of code blocks and the blocks, by the rules of CommonMark for fences of backticks."""
    outside, blocks, fence = [], [], ""
    for line in markdown.split("\n"):
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence and len(ticks) >= len(fence) and not line.strip("` "):
            fence = ""
        elif fence:
            blocks[-1].append(line)
        elif len(ticks) >= 3:
            fence = ticks
            blocks.append([])
        else:
            outside.append(line)
    assert not fence
    return "\n".join(outside), ["\n".join(lines) for lines in blocks]


def test_only_gained_and_lost_questions_are_shown_and_the_gained_ones_come_first():
    questions = [question(number) for number in range(4)]
    outside, blocks = split_blocks(
        file_of([[RIGHT], [WRONG], [WRONG], [RIGHT]], [[WRONG], [RIGHT], [WRONG], [RIGHT]], questions)
    )
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert headings == [
        "# gsm8k: base -> sft",
        "## Gained 1 of 1: question id1", "### base: wrong", "### sft: right",
        "## Lost 1 of 1: question id0", "### base: right", "### sft: wrong",
    ]  # fmt: skip
    assert "Of 4 questions, 1 are gained and 1 are lost." in outside
    assert blocks == [
        *("How many?", "7", "False", "text", "True", "text"),
        *("How many?", "7", "True", "text", "False", "text"),
    ]


def test_without_changes_the_file_says_so():
    text = file_of([[RIGHT]], [[RIGHT]], [question(0)])
    assert "Of 1 questions, 0 are gained and 0 are lost." in text
    assert "##" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_can_leave_its_block(text):
    sample = GradedSample(text, 3, correct=False, truncated=False, extracted=text)
    markdown = file_of([[sample]], [[RIGHT]], [question(0, text, (text,))])
    outside, blocks = split_blocks(markdown)
    assert blocks == [text, text, text, text, "True", "text"]
    assert outside == split_blocks(file_of([[WRONG]], [[RIGHT]], [question(0)]))[0]
    assert split_blocks(fenced_block(text)) == ("", [text])


def test_a_long_response_is_shortened_to_its_end_and_the_file_says_so():
    long = GradedSample("a" * 5000 + "the end", 1234, correct=True, truncated=True, extracted="7")
    outside, blocks = split_blocks(file_of([[WRONG]], [[long]], [question(0)]))
    assert blocks[-1] == long.response[-MAX_RESPONSE_CHARACTERS:]
    assert "The last 1,500 of 5,007 characters of the response (1,234 tokens, truncated):" in outside
    whole = GradedSample("b" * MAX_RESPONSE_CHARACTERS, 5, correct=True, truncated=False)
    outside, blocks = split_blocks(file_of([[WRONG]], [[whole]], [question(0)]))
    assert blocks[-1] == whole.response
    assert "The last" not in outside
    assert "No result was found in the response." in outside


def test_of_several_answers_one_that_fits_is_shown():
    outside, blocks = split_blocks(file_of([[RIGHT, WRONG, WRONG]], [[WRONG, RIGHT, RIGHT]], [question(0)]))
    assert "### base: wrong (answer 2 of 3, of which 1 are right)" in outside
    assert "### sft: right (answer 2 of 3, of which 2 are right)" in outside
    assert blocks[2:] == ["False", "text", "True", "text"]


def test_failures_tolerances_and_several_references_are_shown():
    failed = GradedSample("", 0, correct=False, truncated=False, error="HTTP 400: ```too long```")
    outside, blocks = split_blocks(
        file_of([[RIGHT]], [[failed]], [question(0, reference=("1", "2"), tolerances=(0.1,))])
    )
    assert "The answer failed:" in outside
    assert blocks == ["How many?", "1, 2\ntolerance: 0.1", "True", "text", failed.error]


@needs_data
def test_real_questions_and_answers_are_shown_unchanged():
    lines = (DATA / "grading" / "qwen14b.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    before = [[GradedSample(row["response"], 9, correct=False, truncated=False)] for row in rows]
    questions = [question(number, row["question"], (row["reference"],)) for number, row in enumerate(rows)]
    outside, blocks = split_blocks(file_of(before, [[RIGHT]] * len(rows), questions))
    assert outside.count("\n## Gained ") == len(rows)
    assert blocks[::5] == [row["question"] for row in rows]
    assert blocks[2::5] == [row["response"][-MAX_RESPONSE_CHARACTERS:] for row in rows]
