"""Answers are equal if they mean the same. Each kind has answers that are equal and answers that only look alike."""

import json
import logging
import re

import pytest
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.evaluation.answer_equality import are_equal
from thinkpo_jax.evaluation.answer_forms import normalize, split_equation, split_list

Cases = list[tuple[str, str]]  # answer and reference
EQUAL: dict[str, Cases] = {
    "numbers": [
        ("42", "42"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", r"\frac{1}{2}"),
        ("2/4", "1/2"),
        ("$18", "18"),
        ("18.00", "18"),
        ("42.", "42"),
        ("1e3", "1000"),
        ("-1.5E-3", "-0.0015"),
        ("√2", r"\sqrt{2}"),
        ("2√12", r"4\sqrt 3"),
        ("½", "1/2"),
        ("1½", "1.5"),
        ("1 2/3", r"\frac{5}{3}"),
        ("6(7)", "42"),
        ("0.333333", "1/3"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        (r"\sqrt{3 + 2\sqrt 2}", r"1 + \sqrt 2"),
        (r"\pi \approx 3.14", "3.14"),
    ],
    "thousands": [
        ("1,000", "1000"),
        ("1000", "1,000"),
        ("12,345,678", "12345678"),
        ("1 234", "1234"),
        (r"1\,234", "1234"),
        (r"12\;345\;678.5", "12345678.5"),
        ("1{,}234", "1234"),
        (r"\$32,\!348", "32348"),
        ("200,100", "100,200"),
    ],
    "scientific notation": [
        (r"\frac{3 \times 10^{8}}{2 \times 10^{6}}", "150"),
        (r"4.5 \times 10^{33}", "4.5e33"),
        ("4.5 x 10^33", "4.5e33"),
        ("10^-8", "1e-8"),
        (r"1.325 \cdot 10^{-27}", "1.325e-27"),
        (r"\frac{10^8 M}{7}", r"\frac{10^5 M}{0.007}"),
    ],
    "lists": [
        ("2, 1", "1,2"),
        ("1 and 2", "1,2"),
        (r"x = 1 \text{ or } x = 2", "1, 2"),
        (r"\{2, 1\}", r"\{1,2\}"),
        (r"x \in \{1, 2\}", "1, 2"),
        (r"1 \pm \sqrt{5}", r"1 - \sqrt 5, 1 + \sqrt 5"),
        ("(3, 4), (1, 2)", "(1,2), (3,4)"),
        ("( 3 , \\frac{\\pi}{2} )", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"x \in [2, 3]", "[2,3]"),
        (r"\text{A, B}", "B, A"),
    ],
    "assignments": [
        ("x = 5", "5"),
        ("5", "x = 5"),
        ("a = -2, b = -2", "-2,-2"),
        (r"a = -2 \text{ and } b = 3", "-2, 3"),
        ("b = 3, a = -2", "a = -2, b = 3"),
        ("(a, b) = (1, 2)", "(1,2)"),
        ("f(x) = 2x", "2x"),
        ("n^2 + n", r"m_{\max }=n(n+1)"),
        ("90, 90", r"$\angle B E A_{1}=90$,$\angle A E B_{1}=90$"),
    ],
    "subscripts": [
        ("E_1, E_2", "E_{1},E_{2}"),
        (r"E_2 + \frac{1}{3} E_1", r"\frac{E_{1}}{3}+E_{2}"),
        ("4210_5", "4210_{5}"),
        ("4210", "4210_5"),
    ],
    "units": [
        (r"6630.65 \text{ A}", "6630.65"),
        (r"5\text{ cm}", "5"),
        (r"4.5 \times 10^{33} \, \text{erg s}^{-1}", "4.5e33"),
        (r"15,000 \, \text{kcal m}^{-2} \text{ yr}^{-1}", "15000"),
        ("18 dollars", "18"),
        ("5 m", "5"),
        ("5cm", "5"),
        ("60 km/h", "60"),
        (r"5 \text{ meters}", r"5\mathrm{~m}"),
        (r"15 \text{ square centimeters}", r"15\mbox{ cm}^2"),
        (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}"),
        ("90°", "90"),
        (r"(45^{\circ}, 60^{\circ})", "(45, 60)"),
        (r"12^{\mathrm{th}} \text{ grade}", "12"),
        (r"62.5\%", "0.625"),
        ("50 percent", r"50\%"),
        ("62.5", "62.5%"),
    ],
    "words": [(r"\text{Evelyn}", "Evelyn"), ("yes", r"\text{Yes}"), ("BOB", "Bob"), ("(C)", "C"), (r"\text{(C)}", "C")],
    "expressions": [
        (r"\sin^2 x + \cos^2 x", "1"),
        ("4i + 3", "3 + 4 i"),
        (r"\frac{2 A}{3} (1 - i) e^{i t}", r"\frac{4A}{3+3i}e^{it}"),
        (r"\frac{1}{a} \sinh(at)", r"\frac{1}{2a}(\exp{a*t}-\exp{-a*t})"),
        (r"\pi R^2 - \pi r^2", r"\pi(R^2-r^2)"),
        ("a - b - c", "a - c - b"),
        ("hmg", "mgh"),
        (r"2\mathrm{e}^{x}", "2e^x"),
    ],
}
DIFFERENT: dict[str, Cases] = {
    "numbers": [
        ("41", "42"),
        ("", "42"),
        ("-5", "5"),
        (r"\frac{1}{3}", "0.5"),
        ("√2", "2"),
        ("½", "1/3"),
        ("1 2", "12"),
        ("1 2", "3"),
        ("5", "2(3)"),
        ("0.333", "1/3"),
        ("1000001", "1000002"),
        ("2^{1009} + 1", "2^{1009}"),
        (r"2^{1009} \sqrt 2 + 1", r"2^{1009} \sqrt 2"),
        (r"\sqrt{2} + 10^{-20}", r"\sqrt{2}"),
        (r"-\infty", r"\infty"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
    ],
    "thousands": [("1,00", "100"), ("1 23", "123"), ("1 2345", "12345"), ("(3100)", "(3,100)"), ("1,2", "12")],
    "scientific notation": [
        ("1e3", "1e4"),
        ("1.55e-10", "1.39e-10"),
        ("0.0000001", "0.0000002"),
        (r"3 \times 10^{8}", r"3 \times 10^{-8}"),
    ],
    "lists": [
        (r"\{1,2,3\}", r"\{1,2\}"),
        ("1, 2, 3", "1, 2"),
        ("1, 3", "1, 2"),
        ("2, 2", "2"),
        ("(2,1)", "(1,2)"),
        ("2, 1", "(1, 2)"),
        ("[1, 2]", "1, 2"),
        ("[0,1)", "(0,1)"),
        ("(1, 2), (3, 4)", "(1,2), (4,3)"),
        (r"1 \pm \sqrt 5", r"1 + \sqrt 5"),
    ],
    "assignments": [
        ("a = -2, b = 3", "-2,-2"),
        ("-2", "-2,-2"),
        ("a = 1, b = 2", "a = 2, b = 1"),
        ("x = 5", "y = 5"),
        ("2", "2x + z = 2"),
        ("x > 5", "5"),
    ],
    "subscripts": [("E_1, E_3", "E_{1},E_{2}"), ("I_1", "I_2"), ("4210_5", "4210_6")],
    "letters of two cases": [(r"\pi r^2", r"\pi R^2"), ("2b", "2B"), ("n", "N")],
    "equations": [("2x = 10", "10"), ("2 + 3 = 6", "6")],
    "units": [
        (r"5 \text{ m}", r"5\text{ cm}"),
        ("5 m", "5 cm"),
        ("5 dollars", "5 cents"),
        (r"5 \text{ cm}", r"5 \text{ cm}^2"),
        ("6", "6m"),
        ("6m", "6"),
        ("2 n", "2"),
        ("2", "2 n"),
        ("2 pi", "2"),
        (r"5 \text{ million}", "5"),
        ("3 dozen", "3"),
        ("5 hundredths", "5"),
        ("5 squared", "5"),
        ("5 times x", "5"),
        ("42 is wrong", "42"),
        (r"0.5\%", "0.25"),
    ],
    "words": [("seat", "east"), (r"\text{odd}", "even"), ("(B)", "C"), ("", "east"), ("I do not know", "42")],
    "expressions": [
        (r"\pi(r^2 - R^2)", r"\pi(R^2-r^2)"),
        ("n(n+1)", "n(n-1)"),
        ("x + 1", "x"),
        (r"3\mathrm{i}", "3"),
        (r"2\mathrm{e}^3", "2"),
        (r"2\text{x}", "2"),
        (r"\frac{2 - 3\omega + \omega^{-1994}}{2(1 - \omega)(1 - \omega^2)}", r"\frac{1997}{2}"),
    ],
}


@pytest.fixture(autouse=True)
def _no_warnings_of_math_verify():
    logging.getLogger("math_verify").setLevel(logging.ERROR)


@pytest.mark.parametrize("kind", EQUAL)
def test_answers_that_mean_the_same_are_equal(kind: str):
    assert [case for case in EQUAL[kind] if not are_equal(*case)] == []


@pytest.mark.parametrize("kind", DIFFERENT)
def test_answers_that_only_look_alike_are_different(kind: str):
    assert [case for case in DIFFERENT[kind] if are_equal(*case)] == []


@pytest.mark.parametrize(
    ("answer", "reference", "tolerances", "is_equal"),
    [
        ("0.4", "0.3", (0.1,), True),
        ("0.41", "0.3", (0.1,), False),
        (r"\frac{2}{5} \text{ km}", "0.3", (0.1,), True),
        ("1.05, 0.95", "1.0, 1.1", (0.1,), True),  # 1.05 must match 1.1, although it could match 1.0 too
        ("2.1, 1", "1, 2", (0.0, 0.1), True),
        ("2, 1.1", "1, 2", (0.0, 0.1), False),
        ("(1.1, 2)", "(1, 2)", (0.1, 0.0), True),
        ("(1, 2.1)", "(1, 2)", (0.1, 0.0), False),
        ("0.2", "0.1", (), False),
    ],
)
def test_a_number_may_differ_by_its_absolute_tolerance(
    answer: str, reference: str, tolerances: tuple[float, ...], is_equal: bool
):
    assert are_equal(answer, reference, tolerances) == is_equal


def _references() -> list[str]:
    lines = (DATA / "olympiadbench" / "test.jsonl").read_bytes().split(b"\n")[:-1]
    return [", ".join(json.loads(line)["final_answer"]) for line in lines]


def _rewrite(reference: str) -> str:
    """Returns a right answer in another form: the list turned around, or with a name added or removed."""
    elements = split_list(normalize(reference))
    if len(elements) > 1:
        return r" \text{ and } ".join(reversed(elements))
    sides = split_equation(reference)
    return sides[1] if sides else reference if r"\geqslant" in reference else f"x = {reference}"


def _change(reference: str) -> list[str]:
    """Returns wrong answers: one more than the last number, with another last digit, and without the last number."""
    answers = [reference.rstrip("$. ") + " + 1$"]
    for digit in list(re.finditer(r"\d", reference))[-1:]:
        answers.append(reference[: digit.start()] + str((int(digit[0]) + 1) % 10) + reference[digit.end() :])
    if len(elements := split_list(normalize(reference))) > 1:
        answers.append(", ".join(elements[:-1]))
    return answers


@needs_data
def test_every_reference_of_olympiadbench_can_be_compared():
    references = _references()
    assert len(references) == 200
    assert [reference for reference in references if not are_equal(_rewrite(reference), reference)] == []
    changed = [(answer, reference) for reference in references for answer in _change(reference)]
    assert len(changed) > 350
    assert [pair for pair in changed if are_equal(*pair)] == []
