"""Every candidate is a pair or is counted once as dropped. Random draws depend only on the seed and the texts."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import needs_data
from support.pairs import nonzero
from support.paths import DATA

from thinkpo_jax.evaluation.grading import Reference
from thinkpo_jax.pair_building import filters
from thinkpo_jax.pair_building.filters import (
    ControlKind,
    FilterConfig,
    PreferencePair,
    SelectConfig,
    filter_for_control,
    filter_pairs,
    normalize_question,
    select_pairs,
)
from thinkpo_jax.runtime.config import UserError, parse_config

LONG = "<|begin_of_thought|>hm, wait<|end_of_thought|><|begin_of_solution|>\\boxed{%s}<|end_of_solution|>"
GOOD = PreferencePair(
    question="What is 1+1?",
    prompt=({"role": "user", "content": "What is 1+1?"},),
    reference="2",
    chosen=LONG % 2,
    source="a, line 1",
    rejected="\\boxed{2}",
    chosen_tokens=90,
    rejected_tokens=9,
)
ALL_OFF = FilterConfig(boxed=False, complete=False, long_agrees=False, max_wrong_short_fraction=None)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]


def filtered(
    candidates: Sequence[PreferencePair], config: FilterConfig, *, seed: int = 0
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Returns the pairs and the counts of dropped candidates. Checks that they account for every candidate."""
    counts = Counter[str]()
    pairs = filter_pairs(list(candidates), config, thought_tags=(("<reason>", "</reason>"),), seed=seed, counts=counts)
    assert len(pairs) + sum(counts.values()) == len(candidates)
    return pairs, dict(counts)


def dropped(candidates: Sequence[PreferencePair], config: FilterConfig) -> dict[str, int]:
    """Returns the counts that are not zero."""
    return nonzero(filtered(candidates, config)[1])


def selected(
    pairs: Sequence[PreferencePair], config: SelectConfig, *, seed: int = 0
) -> tuple[list[PreferencePair], dict[str, int]]:
    counts = Counter[str]()
    return select_pairs(list(pairs), config, seed=seed, counts=counts), dict(counts)


def for_control(pairs: Sequence[PreferencePair], control: ControlKind) -> tuple[list[PreferencePair], dict[str, int]]:
    counts = Counter[str]()
    return filter_for_control(list(pairs), control, counts), dict(counts)


BAD = {
    "an answer is empty": replace(GOOD, rejected=" \n"),
    "both answers are the same": replace(GOOD, rejected=GOOD.chosen + "\n"),
    "the long answer exceeds max_long_tokens": replace(GOOD, chosen_tokens=101),
    "the long answer leaves a thought or solution open": replace(GOOD, chosen="<think>\\boxed{2}"),
    "the short answer was cut": replace(GOOD, short_is_truncated=True),
    "the long answer has no closed box": replace(GOOD, chosen="it is \\boxed{2 then 2"),
    "the short answer has no closed box": replace(GOOD, rejected="it is 2"),
    "the long answer disagrees with the reference": replace(GOOD, chosen=LONG % 3),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_candidate_with_a_flaw_is_dropped_and_counted_under_its_reason(reason: str):
    config = FilterConfig(max_long_tokens=100)
    assert dropped([BAD[reason]], config) == {reason: 1}
    assert dropped([replace(GOOD, chosen_tokens=100)], config) == {}


@pytest.mark.parametrize("reason", [reason for reason in list(BAD)[2:] if reason != "the short answer was cut"])
def test_a_filter_that_is_off_drops_nothing(reason: str):
    assert dropped([BAD[reason]], ALL_OFF) == {}


def test_all_reasons_are_counted_in_the_order_of_the_filters():
    _, counts = filtered([], FilterConfig())
    assert list(counts) == ["a duplicate", *BAD, "outside max_wrong_short_fraction"]
    assert set(counts.values()) == {0}


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("no tags", False),
        ("<think>a</think>b", False),
        ("a</think>b", False),
        ("<think>a", True),
        ("<think>a</think><think>b", True),
        ("<|begin_of_thought|>a", True),
        ("<|begin_of_thought|>a<|end_of_thought|>b", False),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>b", True),
        ("<|begin_of_solution|>b<|end_of_solution|>", False),
        ("<|begin_of_thought|>a</think>", True),
    ],
)
def test_a_thought_or_solution_that_is_opened_must_be_closed(text: str, is_open: bool):
    candidate = replace(GOOD, chosen=f"\\boxed{{2}} {text}")
    assert bool(dropped([candidate], FilterConfig())) is is_open


def test_an_empty_box_counts_as_no_box():
    assert dropped([replace(GOOD, rejected="\\boxed{ }")], FilterConfig()) == {"the short answer has no closed box": 1}


def test_a_duplicate_repeats_question_and_both_answers():
    duplicate = replace(GOOD, question=" What is\n1+1?", source="b, line 7")
    others = [replace(GOOD, question="What is 2*1?"), replace(GOOD, rejected="so \\boxed{2}")]
    pairs, counts = filtered([GOOD, duplicate, *others], FilterConfig())
    assert counts["a duplicate"] == sum(counts.values()) == 1
    assert [pair.source for pair in pairs] == ["a, line 1"] * 3


def test_a_short_answer_is_compared_with_the_reference_or_else_with_the_long_answer():
    cases = [
        (GOOD, True),
        (replace(GOOD, rejected="\\boxed{4/2}"), True),
        (replace(GOOD, rejected="\\boxed{3}"), False),
        (replace(GOOD, reference=None, chosen=LONG % 3, rejected="\\boxed{3}"), True),
        (replace(GOOD, reference=None, chosen=LONG % 3), False),
        (replace(GOOD, reference=None, chosen="no box"), None),
        (replace(GOOD, rejected="no box"), None),
    ]
    pairs, _ = filtered([candidate for candidate, _ in cases], ALL_OFF)
    assert [pair.short_answer_is_correct for pair in pairs] == [is_correct for _, is_correct in cases]


def test_a_candidate_without_flaws_only_gets_its_grade():
    (pair,), _ = filtered([GOOD], FilterConfig())
    assert pair == replace(GOOD, short_answer_is_correct=True)
    assert pair.gap == 81


@pytest.mark.parametrize("change", [{}, {"long_agrees": False}, {"max_wrong_short_fraction": None}])
def test_without_boxes_answers_cannot_be_compared(change: dict[str, Any]):
    with pytest.raises(UserError, match=r"long_agrees: false, max_wrong_short_fraction: null"):
        parse_config(FilterConfig, {"boxed": False, **change}, source="pairs.yaml")


def candidates_with(num_correct: int, num_wrong: int) -> list[PreferencePair]:
    """Returns candidates with correct and with wrong short answers."""
    answers = ["\\boxed{2}"] * num_correct + ["\\boxed{3}"] * num_wrong
    return [
        replace(GOOD, question=f"Question {i}?", reference=None, rejected=answer) for i, answer in enumerate(answers)
    ]


@pytest.fixture
def text_answers(monkeypatch: pytest.MonkeyPatch):
    """Compares answers as text. This is for tests of the random draw, and starts no grading processes."""

    def compare(answers: Sequence[str], references: Sequence[Reference]) -> list[bool]:
        return [(answer,) == reference.answers for answer, reference in zip(answers, references, strict=True)]

    monkeypatch.setattr(filters, "compare_answers", compare)


@pytest.mark.usefixtures("text_answers")
@settings(deadline=None)
@given(st.data())
def test_the_wrong_fraction_is_used_fully_and_never_exceeded_in_any_order(data: st.DataObject):
    num_correct, num_wrong = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 30))
    fraction = data.draw(st.sampled_from([0.0, 0.1, 0.25, 2000 / 10080, 0.5, 0.9, 1.0]) | st.floats(0, 1))
    seed = data.draw(st.integers(0, 3))
    candidates = candidates_with(num_correct, num_wrong)
    config = FilterConfig(max_wrong_short_fraction=fraction)
    pairs, _ = filtered(candidates, config, seed=seed)
    questions = {pair.question for pair in pairs}
    assert [pair.question for pair in pairs] == [c.question for c in candidates if c.question in questions]
    wrong = sum(pair.short_answer_is_correct is False for pair in pairs)
    if fraction == 1:
        assert wrong == len(pairs) == num_wrong
    else:
        assert len(pairs) - wrong == num_correct
        assert wrong <= fraction * len(pairs) + 1e-6
        # One more wrong answer would be too many.
        assert wrong == num_wrong or wrong + 1 > fraction * (len(pairs) + 1) - 1e-6
    shuffled, _ = filtered(data.draw(st.permutations(candidates)), config, seed=seed)
    assert {pair.question for pair in shuffled} == questions


@pytest.mark.usefixtures("text_answers")
def test_the_default_fraction_is_that_of_the_paper():
    pairs, counts = filtered(candidates_with(808, 400), FilterConfig())
    assert (sum(pair.short_answer_is_correct is True for pair in pairs), len(pairs)) == (808, 1008)
    assert counts["outside max_wrong_short_fraction"] == 200


@pytest.mark.usefixtures("text_answers")
def test_another_seed_draws_other_pairs():
    draws = [filtered(candidates_with(40, 40), FilterConfig(), seed=seed)[0] for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(draws[0]) == len(draws[2])


def pairs_with(gaps: Sequence[int]) -> list[PreferencePair]:
    return [
        PreferencePair(
            f"{i}?", (), "2", f"long {i}", f"line {i}", "short", 100 + gap, 100, short_answer_is_correct=True
        )
        for i, gap in enumerate(gaps)
    ]


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 2))
def test_thirds_by_gap_are_disjoint_complete_and_ordered(gaps: list[int], seed: int):
    pairs = pairs_with(gaps)
    thirds = [selected(pairs, SelectConfig(gap=gap), seed=seed) for gap in ("short", "middle", "long")]
    chosen = [[pair.question for pair in third] for third, _ in thirds]
    assert sorted(itertools.chain.from_iterable(chosen)) == sorted(pair.question for pair in pairs)
    assert max(map(len, chosen)) - min(map(len, chosen)) <= 1
    assert all(len(third) + sum(counts.values()) == len(pairs) for third, counts in thirds)
    for (lower, _), (upper, _) in itertools.pairwise(thirds):
        assert max((p.gap for p in lower), default=0) <= min((p.gap for p in upper), default=100)
    for third in chosen:
        assert third == sorted(third, key=lambda question: int(question[:-1]))  # the order of the source


@given(st.permutations(pairs_with([3, 3, 3, 5, 5, 8, 9, 9])), st.sampled_from(["all", "short", "middle", "long"]))
def test_a_selection_depends_on_the_pairs_and_not_on_their_order(shuffled: list[PreferencePair], gap: Any):
    config = SelectConfig(gap=gap, pairs=2)
    ordered, _ = selected(pairs_with([3, 3, 3, 5, 5, 8, 9, 9]), config, seed=1)
    assert {pair.question for pair in selected(shuffled, config, seed=1)[0]} == {pair.question for pair in ordered}


def test_a_number_of_pairs_is_taken_from_each_part():
    pairs = pairs_with([7, 1, 6, 2, 5, 3, 4])
    gaps = {
        gap: [pair.gap for pair in selected(pairs, SelectConfig(gap=gap, pairs=3))[0]]
        for gap in ("short", "middle", "long")
    }
    assert gaps == {"short": [1, 2, 3], "middle": [5, 3, 4], "long": [7, 6, 5]}
    assert selected(pairs, SelectConfig()) == (pairs, {"not selected": 0})
    assert selected(pairs, SelectConfig(gap="long", pairs=99)) == (pairs, {"not selected": 0})
    draws = [selected(pairs, SelectConfig(pairs=3), seed=seed)[0] for seed in range(9)]
    assert {len(draw) for draw in draws} == {3}
    assert len({tuple(pair.gap for pair in draw) for draw in draws}) > 1


def test_controls_drop_pairs():
    pair, wider = pairs_with([25])[0], pairs_with([26])[0]
    wrong, unknown = (replace(pair, short_answer_is_correct=verdict) for verdict in (False, None))
    pairs = [pair, wider, wrong, unknown]
    swapped = [pair.swapped() for pair in pairs]
    assert for_control(pairs, "none") == (pairs, {})
    assert for_control(pairs, "swapped") == (pairs, {})
    reason = "lengths differ by more than 20%"
    assert for_control(pairs, "length_matched") == ([pair, wrong, unknown], {reason: 1})
    assert for_control(swapped, "length_matched") == ([swapped[0], *swapped[2:]], {reason: 1})
    reason = "the short answer is not known to be correct"
    assert for_control(pairs, "correct_only") == ([pair, wider], {reason: 2})


@pytest.mark.parametrize("is_correct", [True, False, None])
def test_a_swapped_pair_swaps_texts_and_lengths_and_keeps_the_grade(is_correct: bool | None):
    pair = replace(pairs_with([26])[0], short_answer_is_correct=is_correct)
    swapped = replace(pair, chosen="short", rejected="long 0", chosen_tokens=100, rejected_tokens=126)
    assert pair.swapped() == swapped
    assert swapped.gap == -26


@pytest.mark.parametrize("same", ["Find  caf\u00e9 $x$.", " Find caf\u00e9\n$x$. ", "Find cafe\u0301\u00a0$x$.\r\n"])
def test_normalized_questions_ignore_spacing_and_composition(same: str):
    assert normalize_question(same) == "Find caf\u00e9 $x$."


@pytest.mark.parametrize(("left", "right"), [("x²", "x2"), ("area of A", "area of a"), ("1 2", "12"), ("2-1", "2+1")])
def test_normalized_questions_keep_case_symbols_and_word_breaks(left: str, right: str):
    assert normalize_question(left) != normalize_question(right)


@needs_data
def test_real_long_and_short_answers_become_pairs():
    short = {normalize_question(row["question"]): row["response"] for row in rows("raw/math500_short.jsonl")}
    candidates = [
        PreferencePair(
            question=row["question"],
            prompt=({"role": "user", "content": row["question"]},),
            reference=row["reference"],
            chosen=row["response"],
            source=f"line {number}",
            rejected=(answer := short[normalize_question(row["question"])]),
            chosen_tokens=len(row["response"]) // 4,
            rejected_tokens=len(answer) // 4,
        )
        for number, row in enumerate(rows("raw/math500_long.jsonl"), start=1)
    ]
    assert sum("<|end_of_thought|>" not in candidate.chosen for candidate in candidates) == 304
    # Of those 304 only 94 open a thought, and 16 others leave their solution open. Another grader finds 19 of the 214
    # long answers wrong. The 3 others have a damaged reference: a column of numbers without separators.
    pairs, counts = filtered(candidates, FilterConfig())
    assert nonzero(counts) == {
        "the long answer leaves a thought or solution open": 110,
        "the long answer has no closed box": 166,
        "the short answer has no closed box": 10,
        "the long answer disagrees with the reference": 22,
        "outside max_wrong_short_fraction": 2,
    }
    assert Counter(pair.short_answer_is_correct for pair in pairs) == {True: 153, False: 37}
    assert all(pair.gap > 0 for pair in pairs)
    sizes = [len(selected(pairs, SelectConfig(gap=gap))[0]) for gap in ("short", "middle", "long")]
    assert sizes == [63, 63, 64]
