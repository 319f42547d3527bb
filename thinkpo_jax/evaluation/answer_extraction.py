r"""Reads the final answer of a response.

The strict readers take what the prompt asks for, a `\boxed{...}`. The lenient readers fall back to weaker signs, as the
grader of the ThinkPO paper does. A truncated response can be right by chance under the lenient reading.
"""

import re

_BOX = re.compile(r"\\boxed\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are characters of the answer, not brackets
# What may stand between two boxes of one answer: "," or "and" or "or", spaces, and the signs around a formula.
_SPACING = r"(?:\s|\$|\\[()\[\],;! ]|\\q?quad){0,20}"  # bounded, so that a long gap costs no time
_JOINER = re.compile(rf"{_SPACING}(?:,|,?{_SPACING}(?:and|or|\\text\s*\{{\s*(?:and|or)\s*\}})){_SPACING}")
_LETTER = re.compile(r"\(?([A-D])(?:\s*[).:].*)?", re.DOTALL)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*(?=\{)|[{}$]")


def extract_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` of a text, or None if there is none or it is not closed.

    Boxes that "and", "or" or a comma joins are one answer: their contents, separated by commas.
    """
    contents: list[str] = []
    next_start = len(text)
    for box in reversed(list(_BOX.finditer(text))):
        end = _closing_brace(text, box.end())
        if end is None or (contents and not _JOINER.fullmatch(text, end + 1, next_start)):
            break
        contents.insert(0, text[box.end() : end].strip())
        next_start = box.start()
    return ", ".join(contents) if contents else None


def _closing_brace(text: str, start: int) -> int | None:
    """Returns the index of the brace that closes the one before `start`, or None."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def extract_letter(text: str) -> str | None:
    r"""Returns the choice A, B, C or D of the last box, such as `\boxed{\text{C. 5 m}}`, or None."""
    content = _TEXT_COMMAND.sub("", extract_boxed(text) or "").strip()
    match = _LETTER.fullmatch(content)
    return match and match.group(1)


def extract_lenient(text: str) -> str | None:
    r"""Returns the answer that the paper's grader would read, or None if there is not even a number.

    It takes the first of these:
    1. the text between "final answer is $" and "$. I hope" (the form of Minerva)
    2. what follows the last "boxed": the braces, or the text up to a dollar sign
    3. what follows the last "he answer is", then "final answer is", then "答案是"
    4. the last number
    """
    if minerva := re.search(r"final answer is \$(.*?)\$\. I hope", text, re.DOTALL):
        return _trim(minerva.group(1))
    _, boxed, rest = text.rpartition("boxed")
    if boxed:
        return _trim(rest[1 : _closing_brace(rest, 1)] if rest.startswith("{") else rest.partition("$")[0])
    for phrase in ("he answer is", "final answer is", "答案是"):
        if phrase in text:
            return _trim(text.rpartition(phrase)[2])
    numbers = re.findall(r"-?\d*\.?\d+", text.replace(",", ""))
    return numbers[-1] if numbers else None


def _trim(answer: str) -> str | None:
    return re.sub(r"\n\s*", "", answer).strip().lstrip(":").rstrip("./").strip() or None


def extract_lenient_letter(text: str) -> str | None:
    """Returns the last letter A, B, C or D that stands alone in the upper-cased text, or None."""
    letters = re.findall(r"\b[A-D]\b", text.upper())
    return letters[-1] if letters else None
