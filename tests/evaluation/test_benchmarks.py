"""Benchmarks load every question in order, with its reference answer. A bad row is an error."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.evaluation.benchmarks import BENCHMARKS, BenchmarkConfig, Question, load_questions
from thinkpo_jax.evaluation.evaluate_model import EvaluationConfig
from thinkpo_jax.runtime.config import UserError, parse_config

BOXED = "Return your final response within \\boxed{}. "


def config(name: str, **keys: Any) -> BenchmarkConfig:
    return parse_config(BenchmarkConfig, {"name": name, **keys}, source="test")


def prompts(questions: list[Question]) -> list[str]:
    return [question.messages[-1]["content"] for question in questions]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


@needs_data
def test_gsm8k_loads_every_question_with_the_number_after_the_hashes():
    path = DATA / "gsm8k" / "test.jsonl"
    rows, questions = read_rows(path), load_questions(config("gsm8k", path=str(path)), seed=0)
    assert len(questions) == len(rows) == 800
    assert [question.messages for question in questions] == [
        ({"role": "user", "content": BOXED + row["question"]},) for row in rows
    ]
    for row, question in zip(rows, questions, strict=True):
        float(question.reference)  # a number, without the commas of 1,000
        assert f"#### {row['answer'].split('#### ')[1]}".replace(",", "") == f"#### {question.reference}"
    with_comma = [row for row in rows if "," in row["answer"].split("#### ")[1]]
    assert with_comma  # so the commas were there to remove


@needs_data
def test_math500_loads_every_problem_with_its_answer():
    path = DATA / "math500" / "test.jsonl"
    rows, questions = read_rows(path), load_questions(config("math500", path=str(path)), seed=0)
    assert len(questions) == 500
    assert [question.reference for question in questions] == [row["answer"] for row in rows]
    assert prompts(questions) == [BOXED + row["problem"] for row in rows]


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_boxed_references_are_graded_correct_and_unboxed_ones_are_not(name: str):
    questions = load_questions(config(name, path=str(DATA / name / "test.jsonl")), seed=0)
    references = [question.reference for question in questions]
    check = BENCHMARKS[name].check
    assert all(check([f"so \\boxed{{{reference}}}" for reference in references], references))
    assert not any(check([f"so {reference}" for reference in references], references))


@needs_data
def test_a_limit_takes_the_first_questions_and_a_system_text_comes_first():
    path = str(DATA / "gsm8k" / "test.jsonl")
    all_questions = load_questions(config("gsm8k", path=path), seed=0)
    limited = load_questions(config("gsm8k", path=path, questions=7, system="Think."), seed=3)
    assert [question.id for question in limited] == [question.id for question in all_questions[:7]]
    assert [question.messages for question in limited] == [
        ({"role": "system", "content": "Think."}, *question.messages) for question in all_questions[:7]
    ]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_question_ids_differ_and_do_not_depend_on_the_order_of_rows(tmp_path: Path):
    def load(name: str, rows: list[dict[str, Any]]) -> list[Question]:
        return load_questions(config("math500", path=write(tmp_path / name, *rows)), seed=0)

    rows = [{"problem": text, "answer": "1"} for text in ("a?", "b?", "a?", "c?", "a?")]
    ids = [question.id for question in load("a.jsonl", rows)]
    assert len(set(ids)) == 5
    reversed_questions = load("b.jsonl", rows[::-1])
    assert {question.id for question in reversed_questions} == set(ids)
    assert reversed_questions[1].id == ids[3]


GOOD = {"gsm8k": {"question": "q?", "answer": "1 #### 1"}, "math500": {"problem": "q?", "answer": "1"}}


@pytest.mark.parametrize(
    ("name", "bad", "problem"),
    [
        ("gsm8k", {"problem": "q?", "answer": "#### 1"}, ": no field 'question'.* problem, answer"),
        ("gsm8k", {"question": "q?", "reply": "#### 1"}, ": no field 'answer'.* question, reply"),
        ("gsm8k", {"question": "q?", "answer": "so it is 1"}, ", answer: no reference answer. Check .* `path`"),
        ("gsm8k", {"question": "q?", "answer": "1 #### "}, ", answer: no reference answer. Check .* `path`"),
        ("gsm8k", {"question": None, "answer": "#### 1"}, ", question: .*text.* null"),
        ("gsm8k", {"question": 7, "answer": "#### 1"}, ", question: .*text.* int"),
        ("math500", {"question": "q?", "answer": "1"}, ": no field 'problem'.* question, answer"),
        ("math500", {"problem": "q?", "answer": None}, ", answer: no reference answer. Check .* `path`"),
        ("math500", {"problem": " ", "answer": "1"}, ", problem: .* empty text"),
    ],
    ids=str,
)
def test_a_row_without_question_or_answer_is_an_error_with_its_line(
    name: str, bad: dict[str, Any], problem: str, tmp_path: Path
):
    path = write(tmp_path / "rows.jsonl", GOOD[name], bad)
    with pytest.raises(UserError, match=rf"^{name}, {re.escape(path)}, line 2{problem}"):
        load_questions(config(name, path=path), seed=0)


def test_a_reference_that_is_a_number_is_read_as_text(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {"problem": "q?", "answer": 7})
    assert load_questions(config("math500", path=path), seed=0)[0].reference == "7"


def test_a_missing_file_and_an_unknown_benchmark_are_errors(tmp_path: Path):
    with pytest.raises(UserError, match="there is no such file"):
        load_questions(config("gsm8k", path=str(tmp_path / "absent.jsonl")), seed=0)
    with pytest.raises(UserError, match="name: Input should be 'miniature', 'gsm8k', 'math500' or 'aime24'"):
        config("gsm9k")
    with pytest.raises(UserError, match=r"are generated, not read from a file. Remove `path`"):
        config("miniature", path="rows.jsonl")


def test_a_benchmark_that_is_named_twice_is_an_error_that_names_it():
    benchmarks = [{"name": name} for name in ("miniature", "gsm8k", "miniature", "math500", "gsm8k", "miniature")]
    with pytest.raises(UserError, match=r"^test: benchmarks: a benchmark is named twice: gsm8k, miniature. List each"):
        parse_config(EvaluationConfig, {"benchmarks": benchmarks}, source="test")
    named_once = parse_config(EvaluationConfig, {"benchmarks": benchmarks[:2]}, source="test")
    assert [benchmark.name for benchmark in named_once.benchmarks] == ["miniature", "gsm8k"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_questions_of_the_miniature_never_occur_in_training(seed: int):
    training_questions = {row["question"] for row in MiniatureData(questions=4000).rows(seed)}
    questions = prompts(load_questions(config("miniature", questions=500), seed=seed))
    assert (len(training_questions), len(questions), len(set(questions))) == (4000, 500, 500)
    for other_seed in range(3):
        held_out = {row["question"] for row in MiniatureData(questions=500).rows(other_seed, held_out=True)}
        assert not held_out & training_questions
    assert not set(questions) & training_questions


def test_the_long_answers_of_the_miniature_are_correct():
    rows = list(MiniatureData(questions=100).rows(5, held_out=True))
    questions = load_questions(config("miniature", questions=100), seed=5)
    references = [question.reference for question in questions]
    assert prompts(questions) == [row["question"] for row in rows]
    long_answers = [row["long"] for row in rows]
    assert all(BENCHMARKS["miniature"].check(long_answers, references))
    shifted = [*references[1:], references[0]]
    is_equal = [a == b for a, b in zip(references, shifted, strict=True)]
    assert BENCHMARKS["miniature"].check(long_answers, shifted) == is_equal
    assert shifted != references
