"""Compares two answers as mathematics. A comparison may take forever, so `grading.py` runs it with a time limit.

Lists, brackets, names and units are compared part by part. `math-verify` parses and compares the parts.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import math_verify
import numpy as np
import sympy
from latex2sympy2_extended import NormalizationConfig
from scipy.optimize import linear_sum_assignment
from sympy.functions.elementary.hyperbolic import HyperbolicFunction

from thinkpo_jax.evaluation.answer_forms import (
    canonical_unit,
    is_name,
    normalize,
    readings,
    split_brackets,
    split_equation,
    split_list,
    split_unit,
    squeeze,
)

# A decimal may be rounded: 0.333333 is 1/3. The relative limit is there for small numbers: 1e-10 is not 2e-10.
DECIMAL_ERROR, RELATIVE_DECIMAL_ERROR = 1e-6, 1e-5
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*")
_COMMAND = re.compile(r"\\(?:text|mathrm)\{[^{}]*\}|\\[A-Za-z]+")
# What math-verify reads wrong, or not at all.
_PARSER_REWRITES = (
    (r"(?<=\d) ?\((?=\d+\))", r"\\cdot("),  # 2(3) would be 2 + 3
    (r"(?<![A-Za-z\\])([EeI])(?=_\{)", r"\\text{\1}"),  # I_{2} would be the imaginary unit
    (r"_\{\\([A-Za-z]+) ?\}", r"_{\1}"),  # x_{\max}
)
# Units are ours to read: math-verify would read the product `6m` as 6.
_LATEX = math_verify.LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="last"),
)


def are_equal(answer: str, reference: str, tolerances: Sequence[float] = ()) -> bool:
    """Returns whether two answers are equal.

    Lists without brackets and sets may be in any order, other brackets keep their order. `tolerances` are absolute
    errors, one for each element of the reference. If there are more or fewer, the smallest holds for all.
    """
    answers, references = readings(normalize(answer)), readings(normalize(reference))
    return any(_are_equal(each, expected, tolerances) for each in answers for expected in references)


def _are_equal(answer: str, reference: str, tolerances: Sequence[float]) -> bool:
    if squeeze(answer) == squeeze(reference):
        return True
    answers, references = split_list(answer), split_list(reference)
    if len(answers) == len(references) == 1:
        return _is_equal_element(answers[0], references[0], tolerances)
    if len(answers) > 1 and len(references) > 1:
        return _match(answers, references, tolerances, any_order=True)
    # One side has several elements. The other may have them in brackets.
    single = answers[0] if len(answers) == 1 else references[0]
    sides = split_equation(single)
    brackets, elements = _split_elements(sides[1] if sides else single)
    if brackets not in ("{}", "()"):
        return False
    pair = (elements, references) if len(answers) == 1 else (answers, elements)
    return _match(*pair, tolerances, any_order=brackets == "{}")


def _match(answers: list[str], references: list[str], tolerances: Sequence[float], *, any_order: bool) -> bool:
    """Returns whether each answer equals another one of the references."""
    if len(answers) != len(references):
        return False
    if len(tolerances) != len(references):
        tolerances = [min(tolerances, default=0.0)] * len(references)
    limits = [(tolerance,) for tolerance in tolerances]
    if not any_order:
        return all(_are_equal(*each) for each in zip(answers, references, limits, strict=True))
    expected = list(zip(references, limits, strict=True))
    is_equal = np.array([[_are_equal(answer, *each) for each in expected] for answer in answers], dtype=int)
    return bool(is_equal[linear_sum_assignment(is_equal, maximize=True)].all())


def _is_equal_element(answer: str, reference: str, tolerances: Sequence[float]) -> bool:
    """Compares two answers that are no lists. The name of an equation counts if both sides have one."""
    equation, expected = split_equation(answer), split_equation(reference)
    if equation and expected and squeeze(equation[0]) == squeeze(expected[0]):
        return _are_equal(equation[1], expected[1], tolerances)
    if equation and not expected:
        is_result = is_name(equation[0]) or _are_equal(equation[0], equation[1], ())  # such as 2+3=5
        return is_result and _are_equal(equation[1], reference, tolerances)
    if expected and not equation:
        return is_name(expected[0]) and _are_equal(answer, expected[1], tolerances)
    (brackets, elements), (expected_brackets, references) = _split_elements(answer), _split_elements(reference)
    if brackets and brackets == expected_brackets:
        return _match(elements, references, tolerances, any_order=brackets == "{}")
    # Brackets around a single element mean nothing: `(C)` is C.
    inner = [
        content[0] if kind in ("()", "{}") and len(content) == 1 else text
        for kind, content, text in ((brackets, elements, answer), (expected_brackets, references, reference))
    ]
    if inner != [answer, reference]:
        return _are_equal(inner[0], inner[1], tolerances)
    return _is_equal_quantity(answer, reference, min(tolerances, default=0.0))


def _split_elements(text: str) -> tuple[str, list[str]]:
    brackets, content = split_brackets(text) or ("", text)
    return brackets, split_list(content)


def _is_equal_quantity(answer: str, reference: str, tolerance: float) -> bool:
    """Compares values and units. A unit that is missing on one side is right. So is a percentage as a fraction."""
    given, expected = split_unit(answer), split_unit(reference)
    if given.unit and expected.unit and canonical_unit(given.unit) != canonical_unit(expected.unit):
        return False
    if _is_equal_value(given.value, expected.value, tolerance):
        return True
    if (given.unit == r"\%") != (expected.unit == r"\%"):
        values = [f"({each.value})/100" if each.unit == r"\%" else each.value for each in (given, expected)]
        return _is_equal_value(values[0], values[1], tolerance)
    return False


def _is_equal_value(answer: str, reference: str, tolerance: float) -> bool:
    texts = squeeze(answer), squeeze(reference)
    if texts[0] == texts[1]:
        return True
    if _WORDS.fullmatch(answer) and _WORDS.fullmatch(reference):
        if texts[0].casefold() == texts[1].casefold():
            return True
        if len(reference) > 3:  # math-verify would read the product of the letters, so that "seat" is "east"
            return False
    # C and c are the same constant of integration, unless one side has both.
    both = f"{answer} {reference}".translate(str.maketrans("", "", "Cc"))
    if any(map(_has_letter_in_both_cases, (answer, reference, both))):
        answer, reference = _mark_capitals(answer), _mark_capitals(reference)
    given, expected = _parse(answer), _parse(reference)
    if given is None or expected is None:
        return False
    if not (isinstance(given, sympy.Expr) and isinstance(expected, sympy.Expr)):
        return math_verify.verify(expected, given, timeout_seconds=None)
    has_decimal = given.has(sympy.Float) or expected.has(sympy.Float)
    given, expected = _make_exact(given), _make_exact(expected)
    if given.is_number and expected.is_number:
        return _is_equal_number(given, expected, tolerance, has_decimal=has_decimal)
    if _differs_at_a_point(given - expected):
        return False  # the simplification below takes much longer
    return math_verify.verify(expected, given, timeout_seconds=None)


def _has_letter_in_both_cases(text: str) -> bool:
    letters = set(filter(str.isalpha, _COMMAND.sub("", text)))
    return any(letter.swapcase() in letters for letter in letters)


def _mark_capitals(text: str) -> str:
    r"""Returns the text with `\hat{R}` for R, because math-verify would read R and r as one symbol."""
    return re.sub(
        rf"{_COMMAND.pattern}|[A-Z]", lambda match: match[0] if len(match[0]) > 1 else rf"\hat{{{match[0]}}}", text
    )


@lru_cache(maxsize=256)
def _parse(text: str) -> Any | None:
    """Returns a SymPy object, or None if the text cannot be read as one."""
    if re.search(r"(?<![\^\d.])\d[\d.]* \d", text):  # math-verify would read 1 2 as 1 + 2
        return None
    for pattern, replacement in _PARSER_REWRITES:
        text = re.sub(pattern, replacement, text)
    limits: Any = {"parsing_timeout": None}  # its limits need signals and the main thread
    parsed = math_verify.parse(f"\\boxed{{{text}}}", [_LATEX], fallback_mode="no_fallback", **limits)
    return parsed[0] if parsed and not parsed[0].has(sympy.nan, sympy.zoo) else None


def _make_exact(value: sympy.Expr) -> sympy.Expr:
    """Returns the expression with fractions for decimals, the imaginary unit for `i` and exponentials for sinh."""
    # math-verify takes the symbols of a text for real or not. They must be the same on both sides.
    symbols = {each: sympy.Symbol(str(each), real=True) for each in value.free_symbols}
    symbols |= {each: sympy.I for each in symbols if str(each) == "i"}
    exact = sympy.nsimplify(value.xreplace(symbols).doit(), rational=True)
    return exact.rewrite(HyperbolicFunction, sympy.exp)


def _differs_at_a_point(difference: sympy.Expr) -> bool:
    """Says whether a difference is a number other than 0 where its variables are positive and have no relation."""
    variables = sorted(difference.free_symbols, key=str)
    value = difference.evalf(30, subs={symbol: sympy.sqrt(2 + 3 * i) / 3 for i, symbol in enumerate(variables)})
    return bool(value.is_finite and sympy.Abs(value) > DECIMAL_ERROR)


def _is_equal_number(answer: sympy.Expr, reference: sympy.Expr, tolerance: float, *, has_decimal: bool) -> bool:
    if answer == reference or answer.is_infinite or reference.is_infinite:
        return answer == reference
    error, size = (sympy.Abs(number).evalf(30, maxn=1000) for number in (answer - reference, reference))
    if has_decimal:
        limit = min(DECIMAL_ERROR, RELATIVE_DECIMAL_ERROR * size)
    else:  # one number in two forms may have no exact difference of 0
        limit = sympy.Rational(1, 10**100) * min(1, size)
    return bool(error <= max(limit, sympy.Rational(str(tolerance))))
