r"""Brings the text of an answer into one form, and takes it apart into lists, brackets, names and units.

These functions only read text. `answer_equality.py` compares the parts as mathematics.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^{\circ}",
        "²": "^{2}",
        "³": "^{3}",
        "±": r"\pm ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "€": "",
        "£": "",
    }
)
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")
_TEXT = r"\\(?:text|textbf|textrm|textit|mathrm|mbox)\s*"
_REWRITES = [  # applied in this order
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*(\d+(?:\.\d+)?|[a-z])", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt"),
        (r"(?<!\\)\\(?:[!$()]|(?:left|right)\.|(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z]))|\$", ""),
        (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|~|\s", " "),
        (" +", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (rf"{_TEXT}\{{([ei])\}}", r"\1"),  # the constants in upright letters
        (rf"(?<=\d)(?:\^?\{{?{_TEXT}\{{\s*(?:st|nd|rd|th)\s*\}}\}}?|(?:st|nd|rd|th)\b)", ""),  # 12th
        (rf"\s*(?:{_TEXT}\{{\s*percent\s*\}}|\bpercent\b|(?<!\\)%|\\%)", r"\\%"),
        (r"([_^])\s*(\d+|-\d+|[A-Za-z]|\\circ)", r"\1{\2}"),
        (r"(?<=\d)\{,\}(?=\d{3})", ""),
        (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda match: match[0].replace(" ", "")),  # 1 234 is a number
        (r"(?<![\w.])(\d+) (\d+)/(\d+)(?![\w.])", r"\1\\frac{\2}{\3}"),  # 1 2/3 is a mixed number
        (r"(?<=\d)\s*[x*]\s*(?=10\^)", r" \\times "),
        (r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]\+?(-?\d+)(?!\w)", r"\1 \\times 10^{\2}"),
        (r" +", " "),
    )
]
_WRAPPER = re.compile(rf"(?:{_TEXT})?\{{([^{{}}]*)\}}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")

_SEPARATOR = rf"[,;]|{_TEXT}\{{\s*(?:,|;|,?\s*(?:and|or))\s*\}}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
_OPENING, _CLOSING = r"\\begin(?![a-z])|\\langle|\\\{|[(\[{]", r"\\end(?![a-z])|\\rangle|\\\}|[)\]}]"
_EQUALS = r"(?<![<>!:])=|\\approx|\\in(?![a-zA-Z])"
_INEQUALITY = r"[<>]|\\(?:l|g)(?:e|eq|eqslant|t)(?![a-z])|\\neq?(?![a-z])"
_TOKEN = re.compile(
    rf"(?P<separator>{_SEPARATOR})|(?P<opening>{_OPENING})|(?P<closing>{_CLOSING})|(?P<equals>{_EQUALS})|"
    rf"(?P<inequality>{_INEQUALITY})|\\."
)
_NAME = re.compile(r"(?:\\?[A-Za-z]|_\{[^{}]*\}|\([^()]*\)|[' ])+")

_UNIT = rf"(?:\^\{{\\circ\}}(?: ?[CF]\b)?|\\%|{_TEXT}\{{[^{{}}]*\}}(?:\^\{{-?\d+\}})?)"
_QUANTITY_AND_UNIT = re.compile(rf"(.*?[^_^\s]) ?({_UNIT}(?:(?:[ /]|\\cdot|\\times)*{_UNIT})*)", re.DOTALL)
_BASE = re.compile(r"(\d+)(_\{.+\})")
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?: \\times 10\^\{-?\d+\})?"
_NUMBER_AND_WORDS = re.compile(rf"({_NUMBER})( ?)([A-Za-z][A-Za-z./ ]*(?:\^\{{-?\d+\}})?)")
_NOT_A_UNIT = re.compile(
    r"\b(?:pi|sqrt|(?:hundred|thousand|million|billion|trillion)(?:s|ths?)?|dozen|ten(?:s|ths?)|half|halves|thirds?|"
    r"quarters?|fourths?|fifths?|squared|cubed|factorial|plus|minus|times|divided|over|less|more|and|or|not|is|mod)\b|"
    r"\{ ?[abknpqrxyz] ?\}"
)
_UNIT_LETTERS = frozenset("AJKLNVWghms")


def normalize(answer: str) -> str:
    r"""Returns the answer without dollar signs, sizes and extra spaces, with symbols and numbers as plain LaTeX.

    Examples: `√2` is `\sqrt{2}`, `½` is `\frac{1}{2}`, `1\,234` and `1{,}234` are 1234, `1e3` is `1 \times 10^{3}`,
    `E_1` is `E_{1}`, `12^{\text{th}}` is 12, `\text{C}` is C. Commas between digits stay, see `readings`.
    """
    text = answer.translate(_SYMBOLS)
    text = _VULGAR_FRACTION.sub(
        lambda match: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", match[0]).split("⁄")), text
    )
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<!\.)\.$", "", text.strip())
    while match := _WRAPPER.fullmatch(text):
        text = match[1].strip()
    return text


def squeeze(text: str) -> str:
    """Returns a normal form without spaces, except between digits: "1 2" is not 12."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def readings(text: str) -> list[str]:
    """Returns the ways to read a normal form: `100,200` is one number or two. In brackets it is always two."""
    merged = text if re.search(r"[(\[]|\\\{", text) else _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return list(dict.fromkeys((merged, text)))


def _scan(text: str) -> Iterator[tuple[str | None, re.Match[str]]]:
    """Yields the tokens outside of brackets with their kinds, and the outer brackets themselves."""
    depth = 0
    for match in _TOKEN.finditer(text):
        depth -= match.lastgroup == "closing"
        if depth == 0:
            yield match.lastgroup, match
        depth += match.lastgroup == "opening"


def split_list(text: str) -> list[str]:
    r"""Returns the elements that a comma, "and" or "or" separates outside of brackets. `1 \pm x` gives two."""
    cuts = [match.span() for kind, match in _scan(text) if kind == "separator"]
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
    elements = [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    signed = [[e.replace(r"\pm", sign) for sign in "+-"] if e.count(r"\pm") == 1 else [e] for e in elements if e]
    return [element for both in signed for element in both] or [text]


def split_brackets(text: str) -> tuple[str, str] | None:
    r"""Returns the outer brackets of a text, such as `()`, `[)` or `{}`, and the content. None if it has none."""
    outer = [match for kind, match in _scan(text) if kind in ("opening", "closing")]
    if len(outer) != 2 or outer[0].start() != 0 or outer[1].end() != len(text) or text.startswith(("{", r"\begin")):
        return None
    brackets = (outer[0][0] + outer[1][0]).replace("\\langle", "(").replace("\\rangle", ")").replace("\\", "")
    return brackets, text[outer[0].end() : outer[1].start()].strip()


def split_equation(text: str) -> tuple[str, str] | None:
    r"""Returns the first and the last side of an equation or of `x \in S`. None for anything else."""
    tokens = [(kind, match) for kind, match in _scan(text) if kind in ("equals", "inequality")]
    if not tokens or any(kind == "inequality" for kind, _ in tokens):
        return None
    return text[: tokens[0][1].start()].strip(), text[tokens[-1][1].end() :].strip()


def is_name(text: str) -> bool:
    r"""Says whether a text names a value: `x`, `E_{1}`, `f(x)`, `\angle A B C` or `(a, b)`."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class Quantity:
    """A value and its unit. The unit is empty if there is none. The base of a number counts as its unit."""

    value: str
    unit: str = ""


def split_unit(text: str) -> Quantity:
    r"""Takes the unit off the end of a normal form, such as `\text{cm}^{2}`, `^{\circ}`, `\%` or `dollars`.

    Words outside of `\text` are a unit after a plain number only. They need three letters or must be a unit of physics,
    because `2 n` is a product. A single letter needs a space, because `6m` is a product. Words that change the value,
    such as "million", are no units.
    """
    if match := _BASE.fullmatch(text):
        return Quantity(match[1], match[2])
    match = _QUANTITY_AND_UNIT.fullmatch(text)
    if match and not _NOT_A_UNIT.search(match[2]):
        return Quantity(match[1], match[2])
    match = _NUMBER_AND_WORDS.fullmatch(text)
    if match and not _NOT_A_UNIT.search(match[3]):
        value, space, words = match.groups()
        first = re.split("[^A-Za-z]", words)[0]
        is_known = words in _UNIT_LETTERS if len(words) == 1 else _physical_unit(first) is not None
        if (space and (is_known or len(first) > 2)) or (is_known and len(first) > 1):
            return Quantity(value, words)
    return Quantity(text)


def canonical_unit(unit: str) -> tuple[str, ...]:
    r"""Returns the words and powers of a unit: `\text{ square meters}`, `\text{m}^{2}` and `m^2` are all (meter, 2)."""
    plain = re.sub(_TEXT, "", unit).replace(r"\circ", "degree").replace(r"\%", "percent")
    plain = re.sub(r"\b(?:square|sq\.?) ([A-Za-z]+)", r"\1^2", plain)
    plain = re.sub(r"\bcubic ([A-Za-z]+)", r"\1^3", plain).replace(" per ", "/")
    words = re.findall(r"[A-Za-z]+|-?\d+|/", re.sub(r"\\[a-z]+", " ", plain))
    return tuple(_physical_unit(word) or word.lower().removesuffix("s") for word in words)


def _physical_unit(word: str) -> str | None:
    """Returns the full name of a unit of physics: "meter" for "m" and "meters"."""
    from sympy.physics import units

    unit = vars(units).get(word if len(word) == 1 else word.lower())
    return str(unit.name) if isinstance(unit, units.Quantity) else None
