"""Questions that share a run of tokens with a benchmark question are found."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.evaluation.decontamination import ContaminationMatch, find_contamination
from thinkpo_jax.pair_building.filters import normalize_question


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]


QUESTION = "Let $a$ and $b$ be integers such that $a+b = \\frac{7}{2}$. What is the largest value of $ab$?"


def shared_run(question: str, held_out: str, ngram: int = 8) -> list[str]:
    return [match.shared for match in find_contamination([question], {"test": [held_out]}, ngram=ngram)]


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
def test_another_notation_is_the_same_question(copy: str):
    assert shared_run(copy, QUESTION) == shared_run(QUESTION, copy) == ["the whole question"]


def test_a_match_needs_ngram_tokens_in_a_row():
    seven, eight = "be integers such that a + b", "be integers such that a + b ="
    for run, matches in ((seven, []), (eight, [eight])):
        assert shared_run(f"One two three four {run} five six seven eight.", QUESTION) == matches


@pytest.mark.parametrize(
    ("question", "held_out", "shared"),
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
def test_a_short_question_matches_only_as_a_whole(question: str, held_out: str, shared: list[str]):
    assert shared_run(question, held_out) == shared_run(held_out, question) == shared


def test_a_match_names_the_benchmark_once_per_pair_of_questions():
    held_out = {
        "a": ["Compute 2+3 and then 4+5 please"],
        "b": ["other words", "Compute 2+3 and then 4+5 please, twice"],
    }
    matches = find_contamination(["nothing", "compute 2+3 and then 4+5 please"], held_out, ngram=4)
    run = "compute 2 + 3 and then 4 + 5 please"
    assert matches == [
        ContaminationMatch(1, "a", held_out["a"][0], "the whole question"),
        ContaminationMatch(1, "b", held_out["b"][1], run),
    ]


@given(
    st.lists(st.text("ab", min_size=1, max_size=1), max_size=14),
    st.lists(st.text("ab", min_size=1, max_size=1), max_size=14),
)
def test_a_match_is_a_shared_run_of_ngram_tokens_or_the_whole_shorter_question(left: list[str], right: list[str]):
    size = min(6, len(left), len(right))
    runs = [{tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)} for tokens in (left, right)]
    expected = bool(runs[0] & runs[1]) if size >= 4 else bool(left and left == right)
    assert bool(shared_run(" ".join(left), " ".join(right), 6)) is expected


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
def test_real_questions_stay_distinct_and_match_across_files(questions: dict[str, list[str]]):
    distinct = {question for texts in questions.values() for question in texts}
    assert len({normalize_question(question) for question in distinct}) == len(distinct) == 9003
    math = {normalize_question(question) for question in questions["math500"]}
    assert {normalize_question(row["question"]) for row in rows("raw/math500_long.jsonl")} == math
    assert {normalize_question(row["question"]) for row in rows("raw/math500_short.jsonl")} == math
    assert {normalize_question(question) for question in questions["pairs"]} < math


# Each row: the questions, the held-out questions, and the number of matches with runs of 8, 10 and 13 tokens.
# With 13 tokens the matches of GSM8K are the same stories with other numbers. With 8 most are common phrases.
MEASURED = [
    ("gsm8k train", "gsm8k", (66, 9, 4)),
    ("gsm8k train", "math500", (0, 0, 0)),
    ("math500", "math500", (500, 500, 500)),
    ("pairs", "math500", (174, 174, 174)),
    ("aime24", "math500", (2, 0, 0)),
    ("olympiadbench", "math500", (17, 4, 1)),
]


@needs_data
@pytest.mark.parametrize(("name", "held_out", "counts"), MEASURED, ids=[f"{m[0]}-{m[1]}" for m in MEASURED])
def test_contamination_of_real_data_sets(
    questions: dict[str, list[str]], name: str, held_out: str, counts: tuple[int, ...]
):
    for ngram, expected in zip((8, 10, 13), counts, strict=True):
        matches = find_contamination(questions[name], {held_out: questions[held_out]}, ngram=ngram)
        assert len({match.index for match in matches}) == expected
        assert len({(match.index, match.held_out) for match in matches}) == len(matches)
