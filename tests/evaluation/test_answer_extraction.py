"""The strict readers take an answer only from a closed box. The lenient readers take what the paper's grader takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkpo_jax.evaluation.answer_extraction import (
    extract_boxed,
    extract_lenient,
    extract_lenient_letter,
    extract_letter,
)


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


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{2} and \boxed{3}",
        r"\boxed{2} or \boxed{3}",
        r"\boxed{2}, \boxed{3}",
        r"\boxed{2},\boxed{3}.",
        r"$\boxed{2}$, and $\boxed{3}$",
        r"\(\boxed{2}\) and \(\boxed{3}\)",
        r"\[ \boxed{2} \quad \text{or} \quad \boxed{3} \]",
        "\\boxed{2}\nand\n\\boxed{3}",
        r"first \boxed{1}. Then \boxed{2} and \boxed{3}",
    ],
)
def test_boxes_that_and_or_or_a_comma_joins_are_one_answer(text: str):
    assert extract_boxed(text) == "2, 3"


@pytest.mark.parametrize(
    "text",
    [
        r"It is \boxed{2}. It is \boxed{3}.",
        r"\boxed{2} \boxed{3}",
        r"\boxed{2}. And \boxed{3}",
        r"\boxed{2} and so \boxed{3}",
        r"\boxed{2}, that is, \boxed{3}",
        r"\boxed{2} is \boxed{3}",
        r"\boxed{2, \boxed{3}",
        r"\boxed{2 and \boxed{3}}",
    ],
)
def test_other_boxes_are_answers_of_their_own(text: str):
    assert extract_boxed(text) == "3"


def test_three_boxes_can_be_joined():
    assert extract_boxed(r"\boxed{1}, \boxed{-2}, and \boxed{\{3\}}") == r"1, -2, \{3\}"


@pytest.mark.parametrize(
    "content",
    [
        *("C", " C ", r"\text{C}", "(C)", r"\text{(C)}", r"\textbf{C}", r"\mathrm{C}", "C.", "C)", "C. 5 m", "C) 5 m"),
        *(r"\text{C. 5 m}", "(C) 5 m", "C: 5 m", r"\text{C}. A and B", "$C$", r"\mathbf{(C)}"),
    ],
)
def test_extract_letter_returns_the_choice_in_the_last_box(content: str):
    assert extract_letter(rf"Not \boxed{{A}}. It is \boxed{{{content}}}, not B.") == "C"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "The answer is C.",
            "C",
            "",
            r"\boxed{}",
            r"\boxed{E}",
            r"\boxed{c}",
            r"\boxed{C",
            r"\boxed{Carbon}",
            r"\fbox{C}",
        ),
        *(r"\boxed{C and D}", r"\boxed{C} or \boxed{D}", r"\boxed{C, D}", r"\boxed{5 m}", r"\boxed{A 5 m}"),
    ],
)
def test_extract_letter_returns_none_without_a_boxed_choice(text: str):
    assert extract_letter(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The final answer is $x+1$. I hope it is correct. Or \\boxed{2}", "x+1"),
        (r"\boxed{1}, no: \boxed{\frac{1}{2}} or 7", r"\frac{1}{2}"),
        (r"\boxed{2} and \boxed{3}", "3"),
        (r"so \boxed{42", "42"),
        (r"so $\boxed 42$ or 7", "42"),
        ("The answer is 5. No, the answer is: 6.", "6"),
        ("The final answer is 7/", "7"),
        ("答案是 8.", "8"),
        ("First 3, then 1,234.5 apples", "1234.5"),
        ("It falls by -3", "-3"),
        ("the answer is\n  9", "9"),
    ],
)
def test_extract_lenient_returns_the_first_sign_that_a_text_has(text: str, answer: str):
    assert extract_lenient(text) == answer


@pytest.mark.parametrize("text", ["", "I do not know", r"\boxed{}", "the answer is "])
def test_extract_lenient_returns_none_without_any_sign(text: str):
    assert extract_lenient(text) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [("It is A, no: (c).", "C"), (r"\boxed{D}", "D"), ("Both a and b", "B"), ("ABCD E", None), ("", None)],
)
def test_extract_lenient_letter_returns_the_last_letter_that_stands_alone(text: str, letter: str | None):
    assert extract_lenient_letter(text) == letter
