"""Pairs are what the filters say: every candidate is counted once, draws follow seed and content, copies are found."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.evaluation.decontamination import ContaminationMatch, find_contamination
from thinkpo_jax.evaluation.grading import extract_boxed
from thinkpo_jax.pair_building import filters as curation
from thinkpo_jax.pair_building.filters import (
    ControlKind,
    FilterConfig,
    PairCandidate,
    PreferencePair,
    SelectConfig,
    apply_control,
    filter_pairs,
    normalize_question,
    select_pairs,
)
from thinkpo_jax.runtime.config import UserError, parse_config

LONG = "<|begin_of_thought|>hm, wait<|end_of_thought|><|begin_of_solution|>\\boxed{%s}<|end_of_solution|>"
GOOD = PairCandidate(
    "What is 1+1?",
    ({"role": "user", "content": "What is 1+1?"},),
    "2",
    LONG % 2,
    "\\boxed{2}",
    90,
    9,
    True,
    "a, line 1",
)
ANY = FilterConfig(boxed=False, complete=False, long_agrees=False, disagreeing_share=None)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]


def left_out(candidates: Sequence[PairCandidate], config: FilterConfig) -> dict[str, int]:
    """The reasons that left something out, once it is seen that they and the pairs account for every candidate."""
    pairs, counts = filter_pairs(candidates, config, seed=0)
    assert len(pairs) + sum(counts.values()) == len(candidates)
    return {reason: count for reason, count in counts.items() if count}


BAD = {
    "an answer is empty": replace(GOOD, short=" \n"),
    "both answers are the same": replace(GOOD, short=GOOD.long + "\n"),
    "the long answer exceeds max_long_tokens": replace(GOOD, long_tokens=101),
    "the long answer leaves a thought or solution open": replace(GOOD, long="<think>\\boxed{2}"),
    "the short answer was cut": replace(GOOD, short_finished=False),
    "the long answer has no closed box": replace(GOOD, long="it is \\boxed{2 then 2"),
    "the short answer has no closed box": replace(GOOD, short="it is 2"),
    "the long answer disagrees": replace(GOOD, long=LONG % 3),
}


@pytest.mark.parametrize("reason", BAD)
def test_each_flaw_is_left_out_under_its_reason_and_nothing_else_is(reason: str):
    config = FilterConfig(max_long_tokens=100)
    assert left_out([BAD[reason]], config) == {reason: 1}
    assert left_out([replace(GOOD, long_tokens=100)], config) == {}


@pytest.mark.parametrize("reason", [reason for reason in list(BAD)[2:] if reason != "the short answer was cut"])
def test_a_filter_that_is_off_leaves_nothing_out(reason: str):
    assert left_out([BAD[reason]], ANY) == {}


def test_all_reasons_are_told_in_the_order_of_the_filters():
    _, counts = filter_pairs([], FilterConfig(), seed=0)
    assert list(counts) == ["a duplicate", *BAD, "disagreeing_share"]
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
def test_what_is_opened_must_be_closed(text: str, is_open: bool):
    candidate = replace(GOOD, long=f"\\boxed{{2}} {text}")
    assert bool(left_out([candidate], FilterConfig())) is is_open


def test_an_empty_box_is_none():
    assert left_out([replace(GOOD, short="\\boxed{ }")], FilterConfig()) == {"the short answer has no closed box": 1}


def test_a_duplicate_repeats_question_and_both_answers():
    again = replace(GOOD, question=" What is\n1+1?", source="b, line 7")
    others = [replace(GOOD, question="What is 2*1?"), replace(GOOD, short="so \\boxed{2}")]
    pairs, counts = filter_pairs([GOOD, again, *others], FilterConfig(), seed=0)
    assert counts["a duplicate"] == sum(counts.values()) == 1
    assert [pair.source for pair in pairs] == ["a, line 1"] * 3


def test_agreement_is_with_the_reference_or_else_with_the_long_answer():
    cases = [
        (GOOD, True),
        (replace(GOOD, short="\\boxed{4/2}"), True),
        (replace(GOOD, short="\\boxed{3}"), False),
        (replace(GOOD, reference=None, long=LONG % 3, short="\\boxed{3}"), True),
        (replace(GOOD, reference=None, long=LONG % 3), False),
        (replace(GOOD, reference=None, long="no box"), None),
        (replace(GOOD, short="no box"), None),
    ]
    pairs, _ = filter_pairs([candidate for candidate, _ in cases], ANY, seed=0)
    assert [pair.short_answer_is_correct for pair in pairs] == [agrees for _, agrees in cases]


def test_a_pair_holds_the_long_answer_as_chosen():
    (pair,), _ = filter_pairs([GOOD], FilterConfig(), seed=0)
    assert pair == PreferencePair(GOOD.question, GOOD.prompt, "2", GOOD.long, GOOD.short, 90, 9, True, "a, line 1")
    assert pair.gap == GOOD.gap == 81


@pytest.mark.parametrize("change", [{}, {"long_agrees": False}, {"disagreeing_share": None}])
def test_without_boxes_nothing_can_be_asked_to_agree(change: dict[str, Any]):
    with pytest.raises(UserError, match=r"long_agrees: false, disagreeing_share: null"):
        parse_config(FilterConfig, {"boxed": False, **change}, source="pairs.yaml")


def candidates_with(agreeing: int, disagreeing: int) -> list[PairCandidate]:
    """Answers that agree as text, so that no process is started for them."""
    return [
        replace(GOOD, question=f"Question {i}?", reference=None, short="\\boxed{2}" if i < agreeing else "\\boxed{3}")
        for i in range(agreeing + disagreeing)
    ]


@pytest.fixture
def text_answers(monkeypatch: pytest.MonkeyPatch):
    """Answers compared as text, which takes no processes: for tests of what is drawn, not of what is equal."""
    monkeypatch.setattr(
        curation, "grade_boxed", lambda texts, refs: [extract_boxed(a) == b for a, b in zip(texts, refs)]
    )


@pytest.mark.usefixtures("text_answers")
@settings(deadline=None)
@given(st.data())
def test_the_share_is_filled_and_never_exceeded_and_ignores_the_order(data: st.DataObject):
    agreeing, disagreeing = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 30))
    share = data.draw(st.sampled_from([0.0, 0.1, 0.25, 2000 / 10080, 0.5, 0.9, 1.0]) | st.floats(0, 1))
    seed = data.draw(st.integers(0, 3))
    candidates = candidates_with(agreeing, disagreeing)
    config = FilterConfig(disagreeing_share=share)
    pairs, counts = filter_pairs(candidates, config, seed=seed)
    assert len(pairs) + sum(counts.values()) == len(candidates)
    assert [p.question for p in pairs] == [c.question for c in candidates if c.question in {p.question for p in pairs}]
    wrong = sum(pair.short_answer_is_correct is False for pair in pairs)
    if share == 1:
        assert wrong == len(pairs) == disagreeing
    else:
        assert len(pairs) - wrong == agreeing
        assert wrong <= share * len(pairs) + 1e-6
        assert wrong == disagreeing or wrong + 1 > share * (len(pairs) + 1) - 1e-6  # one more would be too many
    mixed, _ = filter_pairs(data.draw(st.permutations(candidates)), config, seed=seed)
    assert {pair.question for pair in mixed} == {pair.question for pair in pairs}


@pytest.mark.usefixtures("text_answers")
def test_the_default_share_is_that_of_the_paper():
    pairs, counts = filter_pairs(candidates_with(808, 400), FilterConfig(), seed=0)
    assert (sum(pair.short_answer_is_correct is True for pair in pairs), len(pairs)) == (808, 1008)
    assert counts["disagreeing_share"] == 200


@pytest.mark.usefixtures("text_answers")
def test_another_seed_draws_others():
    drawn = [filter_pairs(candidates_with(40, 40), FilterConfig(), seed=seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len(drawn[0]) == len(drawn[2])


def pairs_with(gaps: Sequence[int]) -> list[PreferencePair]:
    return [
        PreferencePair(f"{i}?", (), "2", f"long {i}", "short", 100 + gap, 100, True, f"line {i}")
        for i, gap in enumerate(gaps)
    ]


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 2))
def test_thirds_by_gap_are_disjoint_cover_all_and_are_ordered(gaps: list[int], seed: int):
    pairs = pairs_with(gaps)
    thirds = [select_pairs(pairs, SelectConfig(gap=gap), seed=seed) for gap in ("short", "middle", "long")]
    chosen = [[pair.question for pair in third] for third, _ in thirds]
    assert sorted(itertools.chain.from_iterable(chosen)) == sorted(pair.question for pair in pairs)
    assert max(map(len, chosen)) - min(map(len, chosen)) <= 1
    assert all(len(third) + sum(counts.values()) == len(pairs) for third, counts in thirds)
    for (lower, _), (upper, _) in itertools.pairwise(thirds):
        assert max((p.gap for p in lower), default=0) <= min((p.gap for p in upper), default=100)
    for third in chosen:
        assert third == sorted(third, key=lambda question: int(question[:-1]))  # the order of the source


@given(st.permutations(pairs_with([3, 3, 3, 5, 5, 8, 9, 9])), st.sampled_from(["all", "short", "middle", "long"]))
def test_a_selection_depends_on_the_pairs_and_not_on_their_order(mixed: list[PreferencePair], gap: Any):
    config = SelectConfig(gap=gap, pairs=2)
    straight, _ = select_pairs(pairs_with([3, 3, 3, 5, 5, 8, 9, 9]), config, seed=1)
    assert {pair.question for pair in select_pairs(mixed, config, seed=1)[0]} == {pair.question for pair in straight}


def test_a_number_of_pairs_is_taken_from_each_place():
    pairs = pairs_with([7, 1, 6, 2, 5, 3, 4])
    found = {
        gap: [p.gap for p in select_pairs(pairs, SelectConfig(gap=gap, pairs=3), seed=0)[0]]
        for gap in ("short", "middle", "long")
    }
    assert found == {"short": [1, 2, 3], "middle": [5, 3, 4], "long": [7, 6, 5]}
    assert select_pairs(pairs, SelectConfig(), seed=0) == (pairs, {"not selected": 0})
    assert select_pairs(pairs, SelectConfig(gap="long", pairs=99), seed=0) == (pairs, {"not selected": 0})
    draws = [select_pairs(pairs, SelectConfig(pairs=3), seed=seed)[0] for seed in range(9)]
    assert {len(draw) for draw in draws} == {3}
    assert len({tuple(p.gap for p in draw) for draw in draws}) > 1


def test_controls():
    pair = pairs_with([25])[0]
    wider, wrong, unknown = (
        pairs_with([26])[0],
        replace(pair, short_answer_is_correct=False),
        replace(pair, short_answer_is_correct=None),
    )
    pairs = [pair, wider, wrong, unknown]
    controls: tuple[ControlKind, ...] = ("none", "swapped", "length_matched", "correct_only")
    found = {control: apply_control(pairs, control) for control in controls}
    assert found["none"] == (pairs, {})
    assert found["swapped"][0][0] == replace(
        pair, chosen="short", rejected="long 0", chosen_tokens=100, rejected_tokens=125
    )
    assert [p.short_answer_is_correct for p in found["swapped"][0]] == [True, True, False, None]
    assert found["swapped"][0][1].gap == -26
    assert found["length_matched"] == ([pair, wrong, unknown], {"lengths differ by more than 20%": 1})
    assert found["length_matched"][0] == [p for p in pairs if p.gap <= 25]
    assert apply_control(found["swapped"][0], "length_matched")[1] == {"lengths differ by more than 20%": 1}
    assert found["correct_only"] == ([pair, wider], {"the short answer is not known to agree": 2})


@pytest.mark.parametrize("same", ["Find  caf\u00e9 $x$.", " Find caf\u00e9\n$x$. ", "Find cafe\u0301\u00a0$x$.\r\n"])
def test_a_key_joins_spacing_and_composition(same: str):
    assert normalize_question(same) == "Find caf\u00e9 $x$."


@pytest.mark.parametrize(("one", "other"), [("x²", "x2"), ("area of A", "area of a"), ("1 2", "12"), ("2-1", "2+1")])
def test_a_key_keeps_questions_apart(one: str, other: str):
    assert normalize_question(one) != normalize_question(other)


QUESTION = "Let $a$ and $b$ be integers such that $a+b = \\frac{7}{2}$. What is the largest value of $ab$?"


def shared_run(question: str, held_out: str, ngram: int = 8) -> list[str]:
    return [hit.shared for hit in find_contamination([question], {"test": [held_out]}, ngram=ngram)]


@pytest.mark.parametrize(
    "copy",
    [
        QUESTION,
        QUESTION.upper().replace("FRAC", "frac"),
        QUESTION.replace("$", " "),
        QUESTION.replace("$a$", "\\(a\\)").replace("\\frac", "\\dfrac"),
        QUESTION.replace("integers such", "integers, such").replace(" = ", "="),
        "[asy] draw((0,0)--(1,1)); [/asy] " + QUESTION,
    ],
)
def test_another_way_of_writing_is_the_whole_question(copy: str):
    assert shared_run(copy, QUESTION) == shared_run(QUESTION, copy) == ["the whole question"]


def test_a_shared_run_must_have_ngram_tokens():
    seven, eight = "be integers such that a + b", "be integers such that a + b ="
    for run, found in ((seven, []), (eight, [eight])):
        assert shared_run(f"One two three four {run} five six seven eight.", QUESTION) == found


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("Compute $\\sin 60^\\circ$.", "Please compute $\\sin 60^\\circ$ now.", ["compute \\sin 60 ^ \\circ"]),
        ("Compute 2", "Compute 2.", ["the whole question"]),
        ("Compute 2", "Compute 2 then add seven", []),
        ("Compute 2+", "Compute 2+ then add seven", []),
        ("Compute 2+3", "Compute 2+3 then add seven", ["compute 2 + 3"]),
        ("Compute 2+3", "Compute 2+31", []),
        ("", "", []),
        ("$$", "", []),
    ],
)
def test_a_short_question_is_shared_as_a_whole(one: str, other: str, shared: list[str]):
    assert shared_run(one, other) == shared_run(other, one) == shared


def test_hits_name_the_benchmark_once_per_pair_of_questions():
    held_out = {
        "a": ["Compute 2+3 and then 4+5 please"],
        "b": ["other words", "Compute 2+3 and then 4+5 please, twice"],
    }
    found = find_contamination(["nothing", "compute 2+3 and then 4+5 please"], held_out, ngram=4)
    run = "compute 2 + 3 and then 4 + 5 please"
    assert found == [
        ContaminationMatch(1, "a", held_out["a"][0], "the whole question"),
        ContaminationMatch(1, "b", held_out["b"][1], run),
    ]


@given(
    st.lists(st.text("ab", min_size=1, max_size=1), max_size=14),
    st.lists(st.text("ab", min_size=1, max_size=1), max_size=14),
)
def test_a_hit_is_a_shared_run_of_the_shorter_length_or_ngram(one: list[str], other: list[str]):
    size = min(6, len(one), len(other))
    runs = [{tuple(t[i : i + size]) for i in range(len(t) - size + 1)} for t in (one, other)]
    expected = bool(runs[0] & runs[1]) if size >= 4 else bool(one and one == other)
    assert bool(shared_run(" ".join(one), " ".join(other), 6)) is expected


@pytest.fixture(scope="module")
def questions() -> dict[str, list[str]]:
    return {
        "gsm8k train": [row["question"] for row in rows("gsm8k/train.jsonl")],
        "gsm8k": [row["question"] for row in rows("gsm8k/test.jsonl")],
        "math500": [row["problem"] for row in rows("math500/test.jsonl")],
        "aime24": [row["problem"] for row in rows("aime24/test.jsonl")],
        "olympiadbench": [row["question"] for row in rows("olympiadbench/test.jsonl")],
        "pairs": sorted({row["question"] for row in rows("pairs/math500_pairs.jsonl")}),
    }


@needs_data
def test_real_questions_keep_different_keys_and_join_across_files(questions: dict[str, list[str]]):
    every = {question for of_one in questions.values() for question in of_one}
    assert len({normalize_question(question) for question in every}) == len(every) == 9003
    math = {normalize_question(question) for question in questions["math500"]}
    assert {normalize_question(row["question"]) for row in rows("raw/math500_long.jsonl")} == math
    assert {normalize_question(row["question"]) for row in rows("raw/math500_short.jsonl")} == math
    assert {normalize_question(question) for question in questions["pairs"]} < math


# (questions, held out, how many questions are hit with runs of 8, 10 and 13 tokens); at 13 those of GSM8K are the same
# stories with other numbers, at 8 mostly phrases.
MEASURED = [
    ("gsm8k train", "gsm8k", (66, 9, 4)),
    ("gsm8k train", "math500", (0, 0, 0)),
    ("math500", "math500", (500, 500, 500)),
    ("pairs", "math500", (174, 174, 174)),
    ("aime24", "math500", (2, 0, 0)),
    ("olympiadbench", "math500", (17, 4, 1)),
]


@needs_data
@pytest.mark.parametrize(("of", "held_out", "counts"), MEASURED, ids=[f"{m[0]}-{m[1]}" for m in MEASURED])
def test_real_contamination(questions: dict[str, list[str]], of: str, held_out: str, counts: tuple[int, ...]):
    for ngram, expected in zip((8, 10, 13), counts, strict=True):
        hits = find_contamination(questions[of], {held_out: questions[held_out]}, ngram=ngram)
        assert len({hit.index for hit in hits}) == expected
        assert len({(hit.index, hit.held_out) for hit in hits}) == len(hits)


@needs_data
def test_real_long_and_short_answers_become_pairs():
    short = {normalize_question(row["question"]): row["response"] for row in rows("raw/math500_short.jsonl")}
    candidates = [
        PairCandidate(
            question=row["question"],
            prompt=({"role": "user", "content": row["question"]},),
            reference=row["reference"],
            long=row["response"],
            short=(answer := short[normalize_question(row["question"])]),
            long_tokens=len(row["response"]) // 4,
            short_tokens=len(answer) // 4,
            short_finished=True,
            source=f"line {number}",
        )
        for number, row in enumerate(rows("raw/math500_long.jsonl"), start=1)
    ]
    assert sum("<|end_of_thought|>" not in candidate.long for candidate in candidates) == 304
    # Of those 304 only 94 ever opened a thought, and 16 others leave their solution open. Another grader finds 19 of
    # the 214 long answers wrong; of the 4 more, 3 have a damaged reference (a column of numbers run together).
    pairs, counts = filter_pairs(candidates, FilterConfig(), seed=0)
    assert {reason: count for reason, count in counts.items() if count} == {
        "the long answer leaves a thought or solution open": 110,
        "the long answer has no closed box": 166,
        "the short answer has no closed box": 10,
        "the long answer disagrees": 23,
        "disagreeing_share": 4,
    }
    assert [sum(pair.short_answer_is_correct is agrees for pair in pairs) for agrees in (True, False, None)] == [
        150,
        37,
        0,
    ]
    assert len(pairs) + sum(counts.values()) == 500
    assert all(pair.gap > 0 for pair in pairs)
    assert [len(select_pairs(pairs, SelectConfig(gap=gap), seed=0)[0]) for gap in ("short", "middle", "long")] == [
        62,
        62,
        63,
    ]
