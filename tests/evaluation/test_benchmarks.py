"""A benchmark asks every question of its file, in order, and checks it against the reference that stands there."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.evaluation.benchmarks import BENCHMARKS, load_questions
from thinkpo_jax.evaluation.evaluation_config import BenchmarkConfig
from thinkpo_jax.runtime.config import UserError, parse_config

BOXED = "Return your final response within \\boxed{}. "


def config(name: str, **keys: Any) -> BenchmarkConfig:
    return parse_config(BenchmarkConfig, {"name": name, **keys}, source="test")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


@needs_data
def test_gsm8k_asks_every_question_and_expects_the_number_after_the_hashes():
    path = DATA / "gsm8k" / "test.jsonl"
    rows, asked = rows_of(path), load_questions(config("gsm8k", path=str(path)), seed=0)
    assert len(asked) == len(rows) == 800
    assert [question.messages for question in asked] == [
        ({"role": "user", "content": BOXED + row["question"]},) for row in rows
    ]
    for row, question in zip(rows, asked, strict=True):
        float(question.reference)  # a number, without the commas of 1,000
        assert f"#### {row['answer'].split('#### ')[1]}".replace(",", "") == f"#### {question.reference}"
    with_comma = [row for row in rows if "," in row["answer"].split("#### ")[1]]
    assert with_comma  # so the commas were there to remove


@needs_data
def test_math500_asks_every_problem_and_expects_its_answer():
    path = DATA / "math500" / "test.jsonl"
    rows, asked = rows_of(path), load_questions(config("math500", path=str(path)), seed=0)
    assert len(asked) == 500
    assert [question.reference for question in asked] == [row["answer"] for row in rows]
    assert [question.messages[-1]["content"] for question in asked] == [BOXED + row["problem"] for row in rows]


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_references_pass_their_own_check_and_an_unboxed_one_does_not(name: str):
    asked = load_questions(config(name, path=str(DATA / name / "test.jsonl")), seed=0)
    references = [question.reference for question in asked]
    check = BENCHMARKS[name].check
    assert all(check([f"so \\boxed{{{reference}}}" for reference in references], references))
    assert not any(check([f"so {reference}" for reference in references], references))


@needs_data
def test_a_limit_takes_the_first_questions_and_a_system_text_comes_first():
    path = str(DATA / "gsm8k" / "test.jsonl")
    whole = load_questions(config("gsm8k", path=path), seed=0)
    some = load_questions(config("gsm8k", path=path, questions=7, system="Think."), seed=3)
    assert [question.id for question in some] == [question.id for question in whole[:7]]
    assert [question.messages for question in some] == [
        ({"role": "system", "content": "Think."}, *question.messages) for question in whole[:7]
    ]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_ids_tell_questions_apart_and_are_the_same_in_every_order(tmp_path: Path):
    rows = [{"problem": text, "answer": "1"} for text in ("a?", "b?", "a?", "c?", "a?")]
    ids = [
        question.id for question in load_questions(config("math500", path=write(tmp_path / "a.jsonl", *rows)), seed=0)
    ]
    assert len(set(ids)) == 5
    turned = write(tmp_path / "b.jsonl", *rows[::-1])
    assert {question.id for question in load_questions(config("math500", path=turned), seed=0)} == set(ids)
    assert load_questions(config("math500", path=turned), seed=0)[1].id == ids[3]


GOOD = {"gsm8k": {"question": "q?", "answer": "1 #### 1"}, "math500": {"problem": "q?", "answer": "1"}}


@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("gsm8k", {"problem": "q?", "answer": "#### 1"}, "no field 'question'. The row has: problem, answer."),
        ("gsm8k", {"question": "q?", "reply": "#### 1"}, "no field 'answer'. The row has: question, reply."),
        ("gsm8k", {"question": "q?", "answer": "so it is 1"}, "it has no reference answer."),
        ("gsm8k", {"question": "q?", "answer": "1 #### "}, "it has no reference answer."),
        ("gsm8k", {"question": None, "answer": "#### 1"}, "it has no question."),
        ("gsm8k", {"question": 7, "answer": "#### 1"}, "it has no question."),
        ("math500", {"question": "q?", "answer": "1"}, "no field 'problem'. The row has: question, answer."),
        ("math500", {"problem": "q?", "answer": None}, "it has no reference answer."),
        ("math500", {"problem": " ", "answer": "1"}, "it has no question."),
    ],
    ids=str,
)
def test_a_row_of_another_form_is_an_error_with_its_line(name: str, bad: dict[str, Any], said: str, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", GOOD[name], bad)
    with pytest.raises(UserError) as error:
        load_questions(config(name, path=path), seed=0)
    assert str(error.value) == f"{path}, line 2: not a row of {name}: {said}"


def test_a_reference_that_is_a_number_is_read_as_text(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {"problem": "q?", "answer": 7})
    assert load_questions(config("math500", path=path), seed=0)[0].reference == "7"


def test_a_missing_file_and_an_unknown_benchmark_are_errors(tmp_path: Path):
    with pytest.raises(UserError, match="there is no such file"):
        load_questions(config("gsm8k", path=str(tmp_path / "absent.jsonl")), seed=0)
    with pytest.raises(UserError, match="name: Input should be 'miniature', 'gsm8k', 'math500' or 'aime24'"):
        config("gsm9k")
    with pytest.raises(UserError, match="are generated; leave out `path`"):
        config("miniature", path="rows.jsonl")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_questions_of_the_miniature_never_occur_in_training(seed: int):
    trained = {row["question"] for row in MiniatureData(questions=4000).rows(seed)}
    asked = [
        question.messages[-1]["content"] for question in load_questions(config("miniature", questions=500), seed=seed)
    ]
    assert (len(trained), len(asked), len(set(asked))) == (4000, 500, 500)
    for other in range(3):
        held_out = {row["question"] for row in MiniatureData(questions=500).rows(other, held_out=True)}
        assert not held_out & trained
    assert not set(asked) & trained


def test_the_long_answers_of_the_miniature_are_right():
    rows = list(MiniatureData(questions=100).rows(5, held_out=True))
    asked = load_questions(config("miniature", questions=100), seed=5)
    references = [question.reference for question in asked]
    assert [question.messages[-1]["content"] for question in asked] == [row["question"] for row in rows]
    long = [row["long"] for row in rows]
    assert all(BENCHMARKS["miniature"].check(long, references))
    moved = [*references[1:], references[0]]
    assert BENCHMARKS["miniature"].check(long, moved) == [a == b for a, b in zip(references, moved, strict=True)]
    assert moved != references
