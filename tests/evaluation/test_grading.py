"""An answer is correct if it is boxed and equals the reference. No answer can block the grading."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.evaluation.grading import extract_boxed, grade_boxed, grade_marked


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{ 42 }", "42"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{\text{a {b} c}}", r"\text{a {b} c}"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\} b}", r"a \\"),
        ("\\boxed{two\nlines}", "two\nlines"),
        (r"\boxed{}", ""),
    ],
)
def test_extract_boxed_returns_the_content_of_the_last_box(text: str, content: str):
    assert extract_boxed(text) == content


UNCLOSED = (r"\boxed", r"\boxed{42", r"\boxed{\frac{1}{2}", r"\boxed{1} then \boxed{2", r"\boxed{\}")


@pytest.mark.parametrize("text", ["", "The answer is 42.", "42", "{42}", r"\fbox{42}", *UNCLOSED])
def test_extract_boxed_returns_none_for_a_missing_or_unclosed_box(text: str):
    assert extract_boxed(text) is None


@given(
    st.recursive(
        st.text("ab1+,", max_size=4), lambda inner: st.lists(inner, max_size=3).map(lambda xs: f"{{{''.join(xs)}}}")
    )
)
def test_extract_boxed_returns_any_content_with_paired_braces(content: str):  # fmt: skip
    assert extract_boxed(f"so {{x}} \\boxed{{{content}}} }} and {{") == content


EQUAL = [
    ("42", "42"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", r"\frac{1}{2}"),
    ("2/4", "1/2"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("12,345,678", "12345678"),
    ("$18", "18"),
    ("18.00", "18"),
    (r"\{2, 1\}", r"\{1,2\}"),
    ("2, 1", "1,2"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("( 3 , \\frac{\\pi}{2} )", r"\left( 3, \frac{\pi}{2} \right)"),
    ("x = 5", "5"),
    (r"5\text{ cm}", "5"),
]
DIFFERENT = [
    ("41", "42"),
    ("", "42"),
    (r"\frac{1}{3}", "0.5"),
    ("(2,1)", "(1,2)"),
    ("[0,1)", "(0,1)"),
    (r"\{1,2,3\}", r"\{1,2\}"),
    ("1 2", "12"),
    ("(3100)", "(3,100)"),
    ("1,00", "100"),
    ("-5", "5"),
    ("I do not know", "42"),
]


def box(text: str) -> str:
    return f"The sum of 1 and 2 is \\boxed{{{text}}}, as asked. \\(7\\)"


def test_exactly_the_answers_that_are_equal_as_mathematics_are_correct():
    cases = [*EQUAL, *DIFFERENT]
    verdicts = grade_boxed([box(answer) for answer, _ in cases], [reference for _, reference in cases])
    assert [case for case, is_correct in zip(cases, verdicts, strict=True) if is_correct] == EQUAL


def test_the_correct_number_without_a_closed_box_is_wrong():
    responses = ["The answer is 42.", "#### 42", "42", r"\boxed{7} but rather 42", r"\boxed{42"]
    assert grade_boxed(responses, ["42"] * 5) == [False] * 5


def test_results_are_in_the_order_of_the_responses():
    references = [str(i) for i in range(12)]
    answers = [f"{2 * i}/2" if i % 3 else "no" for i in range(12)]
    assert grade_boxed([box(answer) for answer in answers], references) == [i % 3 > 0 for i in range(12)]
    assert grade_boxed([], []) == []


def test_every_response_needs_a_reference():
    for grade in (grade_boxed, grade_marked):
        with pytest.raises(ValueError, match="shorter"):
            grade(["a", "b"], ["a"])


def test_an_answer_that_cannot_be_computed_is_wrong_and_does_not_block_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("thinkpo_jax.evaluation.grading.GRADING_TIMEOUT_SECONDS", 4.0)
    responses = [box("9^{9^{9^9}}"), box("(" * 3000), box("2/4"), box("3/6")]
    start = time.monotonic()
    assert grade_boxed(responses, ["7", "7", "1/2", "1/2"]) == [False, False, True, True]
    assert time.monotonic() - start < 300  # the first answer alone would take forever


def test_a_malformed_answer_is_wrong_and_raises_nothing():
    answers = ["\x00", "\ud800", "1" * 10_000, "\\frac{1}{0}", "\\sqrt{-1}", "\\" * 99, "\\text{" * 99 + "}" * 99, "\n"]
    assert grade_boxed([f"\\boxed{{{answer}}}" for answer in answers], ["7"] * len(answers)) == [False] * len(answers)


def test_a_short_grading_prints_nothing(capfd: pytest.CaptureFixture[str]):
    assert grade_boxed([box("2/4")], ["1/2"]) == [True]
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
    assert grade_marked([response], [reference]) == [is_correct]


@needs_data
def test_verdicts_on_real_answers_agree_with_another_grader():
    lines = (DATA / "grading" / "qwen14b.jsonl").read_bytes().split(b"\n")[:-1]
    rows = [row for row in map(json.loads, lines) if row["benchmark"] == "math500"][::4]
    verdicts = grade_boxed([row["response"] for row in rows], [row["reference"] for row in rows])
    other_verdicts = [row["graded_correct"] for row in rows]
    assert len(rows) > 90
    assert 0.6 < sum(other_verdicts) / len(rows) < 0.95  # so neither "all right" nor "all wrong" would agree
    num_equal = sum(verdict == other for verdict, other in zip(verdicts, other_verdicts, strict=True))
    assert num_equal / len(rows) > 0.97
