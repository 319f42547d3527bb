"""Which answers make a pair? A long and a short answer of one question -> filters -> preference pairs.

Chosen is the long answer, rejected the short one (ThinkPO, arXiv 2502.13173, section 2.3). All stays in the order of
its source; a draw depends on the seed and the texts alone. Lengths and gaps are in tokens, counted by the caller.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, TypeVar

import pydantic

from thinkpo_jax.data.chat_tokenizer import ANSWER_SECTION_TAGS, Message, has_unclosed_tag
from thinkpo_jax.evaluation.grading import extract_boxed, grade_boxed
from thinkpo_jax.runtime.config import ConfigSection

LENGTH_MATCH_TOLERANCE = 0.2  # lengths that differ by no more than this share of the longer one are alike
ControlKind = Literal["none", "swapped", "length_matched", "correct_only"]
ItemT = TypeVar("ItemT")
Counts = dict[str, int]  # reason -> how many it left out


@dataclass(frozen=True)
class PairCandidate:
    """A long and a short answer to one question."""

    question: str
    prompt: tuple[Message, ...]
    reference: str | None
    long: str
    short: str
    long_tokens: int
    short_tokens: int
    short_finished: bool  # False: the token limit cut it
    source: str  # the place of the long answer, such as "rows.jsonl, line 3"

    @property
    def gap(self) -> int:
        """Tokens by which the long answer is longer."""
        return self.long_tokens - self.short_tokens


@dataclass(frozen=True)
class PreferencePair:
    """A chosen and a rejected answer to one question. `agrees` is None where there is no answer to compare."""

    question: str
    prompt: tuple[Message, ...]
    reference: str | None
    chosen: str
    rejected: str
    chosen_tokens: int
    rejected_tokens: int
    short_answer_is_correct: (
        bool | None
    )  # the short answer, with the reference or, where there is none, with the long answer
    source: str

    @property
    def gap(self) -> int:
        """Tokens by which the chosen answer is longer; negative where it is shorter."""
        return self.chosen_tokens - self.rejected_tokens


class FilterConfig(ConfigSection):
    """Which candidates become pairs (the paper's section 2.3)."""

    boxed: bool = True  # both answers hold a closed box that is not empty
    complete: bool = True  # the long answer closes the thought or solution that it opens
    long_agrees: bool = True  # with the reference, where there is one
    # At most this share of the pairs has a short answer that disagrees; 0: none, 1: only such, None: whatever they say.
    disagreeing_share: float | None = pydantic.Field(default=2000 / 10080, ge=0, le=1)
    max_long_tokens: int | None = pydantic.Field(default=None, ge=1)

    @pydantic.model_validator(mode="after")
    def _boxes_to_compare(self) -> "FilterConfig":
        if not self.boxed and (self.long_agrees or self.disagreeing_share is not None):
            raise ValueError("without `boxed` nothing can agree: give long_agrees: false, disagreeing_share: null")
        return self


class SelectConfig(ConfigSection):
    """Which pairs are used: a third by `gap` (Table 5 of the paper) or all; `pairs`: how many (default: the third)."""

    gap: Literal["all", "short", "middle", "long"] = "all"
    pairs: int | None = pydantic.Field(default=None, ge=1)


def normalize_question(question: str) -> str:
    """The question in composed Unicode (NFC), white space as single spaces; A and a, x² and x2 stay apart."""
    return " ".join(unicodedata.normalize("NFC", question).split())


def filter_pairs(
    candidates: Sequence[PairCandidate], config: FilterConfig, *, seed: int
) -> tuple[list[PreferencePair], Counts]:
    """The pairs, and how many candidates each reason left out, each under the first that holds (0: none, or off).

    Disagreeing short answers are drawn up to `disagreeing_share`. Answers are compared by `boxed_answers`.
    """
    counts: Counts = {}
    keys = [(normalize_question(c.question), c.long, c.short) for c in candidates]
    first = {key: i for i, key in reversed([*enumerate(keys)])}
    left = _drop(candidates, [first[key] != i for i, key in enumerate(keys)], "a duplicate", counts)
    flaws: dict[
        str, Callable[[PairCandidate], bool]
    ] = {  # causes before symptoms: a cut answer mostly lacks its box too
        "an answer is empty": lambda c: not (c.long.strip() and c.short.strip()),
        "both answers are the same": lambda c: c.long.strip() == c.short.strip(),
        "the long answer exceeds max_long_tokens": lambda c: c.long_tokens > (config.max_long_tokens or c.long_tokens),
        "the long answer leaves a thought or solution open": lambda c: (
            config.complete and has_unclosed_tag(c.long, ANSWER_SECTION_TAGS)
        ),
        "the short answer was cut": lambda c: not c.short_finished,
        "the long answer has no closed box": lambda c: config.boxed and not extract_boxed(c.long),
        "the short answer has no closed box": lambda c: config.boxed and not extract_boxed(c.short),
    }
    for reason, applies in flaws.items():
        left = _drop(left, map(applies, left), reason, counts)
    asked = [(c.long, c.reference if config.long_agrees else None) for c in left]
    verdicts = _verdicts(
        [*asked, *((c.short, c.reference or extract_boxed(c.long)) for c in left)]
    )  # at once: to start is slow
    right, agrees = verdicts[: len(left)], verdicts[len(left) :]
    pairs = [
        PreferencePair(
            c.question, c.prompt, c.reference, c.long, c.short, c.long_tokens, c.short_tokens, verdict, c.source
        )
        for c, verdict in zip(left, agrees, strict=True)
    ]
    pairs = _drop(pairs, [verdict is False for verdict in right], "the long answer disagrees", counts)
    return _drop(pairs, _outside_share(pairs, config.disagreeing_share, seed), "disagreeing_share", counts), counts


def _verdicts(answers: Sequence[tuple[str, str | None]]) -> list[bool | None]:
    """Whether each (text, expected) agrees; None where the text has no box or nothing is expected."""
    known = {i: (text, expected) for i, (text, expected) in enumerate(answers) if expected and extract_boxed(text)}
    found = grade_boxed([text for text, _ in known.values()], [expected for _, expected in known.values()])
    verdicts = dict(zip(known, found, strict=True))
    return [verdicts.get(i) for i in range(len(answers))]


def _outside_share(pairs: Sequence[PreferencePair], share: float | None, seed: int) -> list[bool]:
    """Which pairs go so that at most `share` of the rest disagrees: disagreeing ones, or, at 1, those that agree."""
    disagrees = [pair.short_answer_is_correct is False for pair in pairs]
    if share is None:
        return [False] * len(pairs)
    if share == 1:
        return [not verdict for verdict in disagrees]
    exact = min(Fraction(share).limit_denominator(10**9), 1 - Fraction(1, 10**9))  # 2000 of 10080, not 1999.9999
    allowed = int(disagrees.count(False) * exact / (1 - exact))
    ordered = sorted((i for i in range(len(pairs)) if disagrees[i]), key=lambda i: _draw_key(pairs[i], seed))
    over = set(ordered[allowed:])
    return [i in over for i in range(len(pairs))]


def _draw_key(pair: PreferencePair, seed: int) -> bytes:
    """The place of a pair in a draw, by seed and content."""
    return hashlib.sha256(repr((seed, pair.question, pair.chosen, pair.rejected)).encode()).digest()


def _drop(items: Sequence[ItemT], leave: Iterable[bool], reason: str, counts: Counts) -> list[ItemT]:
    """The items not to leave out; how many those were is added to `counts`."""
    kept = [item for item, left_out in zip(items, leave, strict=True) if not left_out]
    counts[reason] = len(items) - len(kept)
    return kept


def select_pairs(
    pairs: Sequence[PreferencePair], config: SelectConfig, *, seed: int
) -> tuple[list[PreferencePair], Counts]:
    """The pairs of the shortest, middle or longest gaps (equal ones by lot), or a draw; too few are all taken."""
    n = len(pairs)
    thirds = {"all": n, "short": n // 3, "middle": 2 * n // 3 - n // 3, "long": n - 2 * n // 3}
    size = min(n, config.pairs or thirds[config.gap])
    start = {"all": 0, "short": 0, "middle": (n - size) // 2, "long": n - size}[config.gap]
    ordered = sorted(range(n), key=lambda i: (0 if config.gap == "all" else pairs[i].gap, _draw_key(pairs[i], seed)))
    selected = set(ordered[start : start + size])
    counts: Counts = {}
    return _drop(pairs, [i not in selected for i in range(n)], "not selected", counts), counts


def apply_control(pairs: Sequence[PreferencePair], control: ControlKind) -> tuple[list[PreferencePair], Counts]:
    """The pairs of a control that the paper lacks. length_matched: lengths within `MATCHED` of the longer one."""
    counts: Counts = {}
    if control == "length_matched":
        unequal = [
            abs(pair.gap) > LENGTH_MATCH_TOLERANCE * max(pair.chosen_tokens, pair.rejected_tokens) for pair in pairs
        ]
        return _drop(pairs, unequal, f"lengths differ by more than {LENGTH_MATCH_TOLERANCE:.0%}", counts), counts
    if control == "correct_only":
        unknown = [pair.short_answer_is_correct is not True for pair in pairs]
        return _drop(pairs, unknown, "the short answer is not known to agree", counts), counts
    return [_swapped(pair) if control == "swapped" else pair for pair in pairs], counts


def _swapped(pair: PreferencePair) -> PreferencePair:
    texts = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    return replace(texts, chosen_tokens=pair.rejected_tokens, rejected_tokens=pair.chosen_tokens)
