"""Filters pairs of a long and a short answer to one question, and selects the pairs to train on.

The long answer is chosen and the short one rejected (ThinkPO, arXiv 2502.13173, section 2.3). Every function keeps the
order of its input. Random draws depend only on the seed and the texts. Lengths and gaps are in tokens.
"""

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import pydantic

from thinkpo_jax.data.chat_template import ANSWER_SECTION_TAGS, Message, has_unclosed_tag
from thinkpo_jax.evaluation.answer_extraction import extract_boxed
from thinkpo_jax.evaluation.grading import Reference, compare_answers
from thinkpo_jax.runtime.config import ConfigSection

ThoughtTags = Sequence[tuple[str, str]]  # the opening and the closing tag of each kind of thought
LENGTH_MATCH_TOLERANCE = 0.2  # largest difference of matched lengths, as a fraction of the longer one
ControlKind = Literal["none", "swapped", "length_matched", "correct_only"]
_ALIASES = pydantic.AliasChoices("max_wrong_short_fraction", "disagreeing_share")  # the new and the old name


@dataclass(frozen=True)
class PreferencePair:
    """A long (chosen) and a short (rejected) answer to one question.

    The long answer comes from the location `source`, such as "long.jsonl, line 3". The fields after it are empty until
    the short answer is added. `filter_pairs` sets `short_answer_is_correct`. It compares the short answer with the
    reference, or with the long answer if there is no reference. Without anything to compare, it stays None.
    """

    question: str
    prompt: tuple[Message, ...]
    reference: str | None
    chosen: str
    source: str
    rejected: str = ""
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    short_is_truncated: bool = False
    short_answer_is_correct: bool | None = None

    @property
    def gap(self) -> int:
        """Tokens of the chosen answer minus tokens of the rejected one."""
        return self.chosen_tokens - self.rejected_tokens

    def swapped(self) -> "PreferencePair":
        """Returns the pair with the short answer as chosen and the long one as rejected."""
        pair = replace(self, chosen=self.rejected, rejected=self.chosen)
        return replace(pair, chosen_tokens=self.rejected_tokens, rejected_tokens=self.chosen_tokens)


Pairs = list[PreferencePair]
PairTest = Callable[[PreferencePair], bool]


class FilterConfig(ConfigSection):
    """Which candidates become pairs (section 2.3 of the paper)."""

    boxed: bool = True  # Both answers need a closed box that is not empty.
    complete: bool = True  # The long answer closes every thought and solution that it opens.
    long_agrees: bool = True  # The long answer agrees with the reference, if there is one.
    # The largest fraction of pairs with a wrong short answer. With 0 all short answers are correct, with 1 all are
    # wrong, and with None any are used. The old name, `disagreeing_share`, still works.
    max_wrong_short_fraction: float | None = pydantic.Field(default=2000 / 10080, ge=0, le=1, validation_alias=_ALIASES)
    max_long_tokens: int | None = pydantic.Field(default=None, ge=1)

    @pydantic.model_validator(mode="after")
    def _check_boxes_to_compare(self) -> "FilterConfig":
        if not self.boxed and (self.long_agrees or self.max_wrong_short_fraction is not None):
            remedy = "set long_agrees: false, max_wrong_short_fraction: null"
            raise ValueError(f"without `boxed` nothing is compared: {remedy}")
        return self


class SelectConfig(ConfigSection):
    """All pairs, or the third with short, middle or long gaps (Table 5 of the paper). `pairs` sets another number."""

    gap: Literal["all", "short", "middle", "long"] = "all"
    pairs: int | None = pydantic.Field(default=None, ge=1)


def normalize_question(question: str) -> str:
    """Returns the question in composed Unicode (NFC) with single spaces. Case and symbols stay: x² is not x2."""
    return " ".join(unicodedata.normalize("NFC", question).split())


def filter_pairs(
    candidates: Pairs, config: FilterConfig, *, thought_tags: ThoughtTags, seed: int, counts: Counter[str]
) -> Pairs:
    """Returns the candidates that pass all filters, with `short_answer_is_correct` set.

    `thought_tags` are those of the model, which `complete` checks besides the tags of other sections.
    The number of dropped candidates goes into `counts`, under the first reason that applies. Boxed answers are compared
    by `compare_answers`. Pairs with a wrong short answer are drawn at random up to `max_wrong_short_fraction`.
    """
    distinct: dict[tuple[str, str, str], PreferencePair] = {}
    for pair in candidates:
        distinct.setdefault((normalize_question(pair.question), pair.chosen, pair.rejected), pair)
    pairs = list(distinct.values())
    counts["a duplicate"] = len(candidates) - len(pairs)
    # Causes come before symptoms: a truncated answer mostly lacks its box too.
    flaws: dict[str, PairTest] = {
        "an answer is empty": lambda p: not (p.chosen.strip() and p.rejected.strip()),
        "both answers are the same": lambda p: p.chosen.strip() == p.rejected.strip(),
        "the long answer exceeds max_long_tokens": lambda p: p.chosen_tokens > (config.max_long_tokens or math.inf),
        "the long answer leaves a thought or solution open": lambda p: (
            config.complete and has_unclosed_tag(p.chosen, (*thought_tags, *ANSWER_SECTION_TAGS))
        ),
        "the short answer was cut": lambda p: p.short_is_truncated,
        "the long answer has no closed box": lambda p: config.boxed and not extract_boxed(p.chosen),
        "the short answer has no closed box": lambda p: config.boxed and not extract_boxed(p.rejected),
    }
    for reason, has_flaw in flaws.items():
        pairs = _drop(pairs, has_flaw, reason, counts)
    long_answers = [(p.chosen, p.reference if config.long_agrees else None) for p in pairs]
    short_answers = [(p.rejected, p.reference or extract_boxed(p.chosen)) for p in pairs]
    verdicts = _grade([*long_answers, *short_answers])  # one call, because starting the grading processes is slow
    long_verdicts, short_verdicts = verdicts[: len(pairs)], verdicts[len(pairs) :]
    graded = [replace(p, short_answer_is_correct=verdict) for p, verdict in zip(pairs, short_verdicts, strict=True)]
    agreeing = [p for p, verdict in zip(graded, long_verdicts, strict=True) if verdict is not False]
    counts["the long answer disagrees with the reference"] = len(graded) - len(agreeing)
    limited = _limit_wrong_fraction(agreeing, config.max_wrong_short_fraction, seed)
    counts["outside max_wrong_short_fraction"] = len(agreeing) - len(limited)
    return limited


def _grade(answers: Sequence[tuple[str, str | None]]) -> list[bool | None]:
    """Says whether each (answer, expected) agrees. None: the answer has no box, or nothing is expected."""
    gradable = {
        i: (box, expected) for i, (text, expected) in enumerate(answers) if expected and (box := extract_boxed(text))
    }
    boxes, references = [box for box, _ in gradable.values()], [Reference((text,)) for _, text in gradable.values()]
    verdicts = dict(zip(gradable, compare_answers(boxes, references), strict=True))
    return [verdicts.get(i) for i in range(len(answers))]


def _limit_wrong_fraction(pairs: Pairs, fraction: float | None, seed: int) -> Pairs:
    """Drops random wrong pairs until at most `fraction` is wrong. If it is 1, drops all others instead."""
    wrong = [i for i, pair in enumerate(pairs) if pair.short_answer_is_correct is False]
    if fraction is None:
        return pairs
    if fraction == 1:
        return [pairs[i] for i in wrong]
    exact = min(Fraction(fraction).limit_denominator(10**9), 1 - Fraction(1, 10**9))  # 2000 of 10080, not 1999.9999
    num_allowed = int((len(pairs) - len(wrong)) * exact / (1 - exact))
    excess = set(sorted(wrong, key=lambda i: _draw_key(pairs[i], seed))[num_allowed:])
    return [pair for i, pair in enumerate(pairs) if i not in excess]


def _draw_key(pair: PreferencePair, seed: int) -> bytes:
    """Returns the sort key of a pair in a random draw."""
    return hashlib.sha256(repr((seed, pair.question, pair.chosen, pair.rejected)).encode()).digest()


def _drop(pairs: Pairs, should_drop: PairTest, reason: str, counts: Counter[str]) -> Pairs:
    remaining = [pair for pair in pairs if not should_drop(pair)]
    counts[reason] = len(pairs) - len(remaining)
    return remaining


def select_pairs(pairs: Pairs, config: SelectConfig, *, seed: int, counts: Counter[str]) -> Pairs:
    """Returns the pairs with short, middle or long gaps, or a random draw from all. Ties are broken at random.

    If there are fewer pairs than the configuration wants, it returns all.
    """
    n = len(pairs)
    third = {"all": n, "short": n // 3, "middle": 2 * n // 3 - n // 3, "long": n - 2 * n // 3}[config.gap]
    size = min(n, config.pairs or third)
    start = {"all": 0, "short": 0, "middle": (n - size) // 2, "long": n - size}[config.gap]
    ordered = sorted(range(n), key=lambda i: (0 if config.gap == "all" else pairs[i].gap, _draw_key(pairs[i], seed)))
    counts["not selected"] = n - size
    return [pairs[i] for i in sorted(ordered[start : start + size])]


def filter_for_control(pairs: Pairs, control: ControlKind, counts: Counter[str]) -> Pairs:
    """Drops the pairs that a control experiment leaves out. The paper has no such controls."""
    if control == "length_matched":
        reason, limit = f"lengths differ by more than {LENGTH_MATCH_TOLERANCE:.0%}", LENGTH_MATCH_TOLERANCE
        return _drop(pairs, lambda p: abs(p.gap) > limit * max(p.chosen_tokens, p.rejected_tokens), reason, counts)
    if control == "correct_only":
        reason = "the short answer is not known to be correct"
        return _drop(pairs, lambda p: p.short_answer_is_correct is not True, reason, counts)
    return pairs
