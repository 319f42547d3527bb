"""An answer is correct if it is boxed and equals the reference. No answer can block the grading."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.checkpoints import needs_data
from support.paths import DATA
from support.selection import exhaustive

from thinkpo_jax.evaluation import grading
from thinkpo_jax.evaluation.answer_extraction import extract_boxed
from thinkpo_jax.evaluation.grading import (
    Grade,
    Reference,
    compare_answers,
    grade_boxed,
    grade_letter,
    grade_marked,
)

# The rows of DATA/grading/qwen14b.jsonl on which our verdict differs from the other grader's, with a reviewed reason.
DISAGREEMENTS = Path(__file__).with_name("grading_disagreements.jsonl")


def box(text: str) -> str:
    return f"The sum of 1 and 2 is \\boxed{{{text}}}, as asked. \\(7\\)"


def grade(responses: Sequence[str], references: Sequence[str]) -> list[bool]:
    return [each.correct for each in grade_boxed(responses, [Reference((text,)) for text in references])]


def test_all_answers_of_a_reference_count_with_its_tolerances():
    reference = Reference(("$69$,$84$", "3"), (0.0, 0.0, 0.1))
    answers = ["3.1, 84, 69", "69, 84, 3", "3, 84.1, 69", "69, 84", "69"]
    assert compare_answers(answers, [reference] * len(answers)) == [True, True, False, False, False]


def test_the_correct_number_without_a_closed_box_is_wrong():
    responses = ["The answer is 42.", "#### 42", "42", r"\boxed{7} but rather 42", r"\boxed{42"]
    assert grade(responses, ["42"] * 5) == [False] * 5


def test_the_lenient_verdict_reads_what_the_paper_reads_and_never_changes_the_strict_one():
    half, pair = "1/2", "2, 3"
    cases = [
        (r"\boxed{2/4}", half, Grade("2/4", True, lenient_correct=True)),
        ("The answer is 1/2.", half, Grade(None, False, lenient_correct=True)),
        ("no answer, but 0.5", half, Grade(None, False, lenient_correct=True)),
        (r"\boxed{7", half, Grade(None, False, lenient_correct=False)),
        (r"\boxed{1} and \boxed{1/2}", half, Grade("1, 1/2", False, lenient_correct=True)),
        (r"\boxed{3} and \boxed{2}", pair, Grade("3, 2", True, lenient_correct=False)),
        (r"It is \boxed{2}. It is \boxed{3}.", pair, Grade("3", False, lenient_correct=False)),
        ("", half, Grade(None, False, lenient_correct=False)),
    ]
    references = [Reference((reference,)) for _, reference, _ in cases]
    assert grade_boxed([response for response, _, _ in cases], references) == [expected for *_, expected in cases]


def test_a_choice_is_correct_if_its_letter_is_boxed():
    responses = [r"\boxed{C}", r"\boxed{\text{C. 5 m}}", r"\boxed{D}, not C", "The answer is C.", r"\boxed{5 m}"]
    assert grade_letter(responses, [Reference(("C",))] * 5) == [
        Grade("C", True, lenient_correct=True),
        Grade("C", True, lenient_correct=True),
        Grade("D", False, lenient_correct=True),
        Grade(None, False, lenient_correct=True),
        Grade(None, False, lenient_correct=False),
    ]


def test_an_equal_reading_is_compared_once(monkeypatch: pytest.MonkeyPatch):
    compared: list[str | None] = []
    monkeypatch.setattr(
        grading, "compare_answers", lambda answers, _: compared.extend(answers) or [True] * len(answers)
    )
    grade_boxed([r"\boxed{2/4}", r"\boxed{ E_1. }", r"\boxed{1} or \boxed{2}"], [Reference(("1/2",))] * 3)
    assert compared == ["2/4", "E_1.", "1, 2", "2"]


def test_results_are_in_the_order_of_the_responses():
    references = [str(i) for i in range(12)]
    answers = [f"{2 * i}/2" if i % 3 else "no" for i in range(12)]
    assert grade([box(answer) for answer in answers], references) == [i % 3 > 0 for i in range(12)]
    assert grade([], []) == []


def test_every_response_needs_a_reference():
    for grader in (grade_boxed, grade_letter, grade_marked, compare_answers):
        with pytest.raises(ValueError, match="shorter"):
            grader(["a", "b"], [Reference(("a",))])


def test_an_answer_that_cannot_be_computed_is_wrong_and_does_not_block_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("thinkpo_jax.evaluation.grading.GRADING_TIMEOUT_SECONDS", 4.0)
    responses = [box("9^{9^{9^9}}"), box("(" * 3000), box("2/4"), box("3/6")]
    start = time.monotonic()
    assert grade(responses, ["7", "7", "1/2", "1/2"]) == [False, False, True, True]
    assert time.monotonic() - start < 300  # the first answer alone would take forever


def test_a_malformed_answer_is_wrong_and_raises_nothing():
    answers = ["\x00", "\ud800", "1" * 10_000, "\\frac{1}{0}", "\\sqrt{-1}", "\\" * 99, "\\text{" * 99 + "}" * 99, "\n"]
    answers += ["(" * 500 + "8" + ")" * 500, "1," * 9999, " " * 99_999 + "8", "ab" * 99, "1 " * 9999]
    assert grade([f"\\boxed{{{answer}}}" for answer in answers], ["7"] * len(answers)) == [False] * len(answers)


def test_a_short_grading_prints_nothing(capfd: pytest.CaptureFixture[str]):
    assert grade([box("2/4")], ["1/2"]) == [True]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("response", "reference", "is_correct"),
    [
        ("1+2=3;#3", "3", True),
        ("#3", "3", True),
        ("3", "3", False),
        ("#13", "3", False),
        ("#3 ", "3", False),
        ("#3;", "3", False),
        ("#3#4", "3", False),
        ("#3#4", "4", True),
        ("# 3", "3", False),
        ("", "3", False),
    ],
)
def test_a_marked_answer_is_correct_only_at_the_very_end_of_the_response(
    response: str, reference: str, is_correct: bool
):
    (grade,) = grade_marked([response], [Reference((reference,))])
    assert (grade.correct, grade.lenient_correct) == (is_correct, None)


@needs_data
@pytest.mark.parametrize("step", [24, pytest.param(1, marks=exhaustive)])
def test_verdicts_on_real_answers_differ_from_another_grader_only_where_the_list_says_why(step: int):
    """The short form takes the listed rows and every 24th of the others."""
    lines = (DATA / "grading" / "qwen14b.jsonl").read_bytes().split(b"\n")[:-1]
    listed = {each["row"]: each for each in map(json.loads, DISAGREEMENTS.read_text("utf-8").splitlines())}
    assert all(each.pop("reason") for each in listed.values())
    rows = {i: json.loads(line) for i, line in enumerate(lines) if i in listed or i % step == 0}
    verdicts = grade([row["response"] for row in rows.values()], [row["reference"] for row in rows.values()])
    differing = {
        i: {"row": i, "extracted": extract_boxed(row["response"]), "reference": row["reference"], "correct": verdict}
        for (i, row), verdict in zip(rows.items(), verdicts, strict=True)
        if verdict != row["graded_correct"]
    }
    assert differing == listed
