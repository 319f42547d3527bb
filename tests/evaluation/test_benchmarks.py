"""Benchmarks load every question in order, with its reference answer. A bad row is an error."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.evaluation.benchmarks import BENCHMARKS, BenchmarkConfig, Question, load_questions
from thinkpo_jax.evaluation.evaluate_model import EvaluationConfig
from thinkpo_jax.evaluation.grading import Reference
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
        (number,) = question.reference.answers
        float(number)  # a number, without the commas of 1,000
        assert f"#### {row['answer'].split('#### ')[1]}".replace(",", "") == f"#### {number}"
    with_comma = [row for row in rows if "," in row["answer"].split("#### ")[1]]
    assert with_comma  # so the commas were there to remove


@needs_data
def test_math500_loads_every_problem_with_its_answer():
    path = DATA / "math500" / "test.jsonl"
    rows, questions = read_rows(path), load_questions(config("math500", path=str(path)), seed=0)
    assert len(questions) == 500
    assert [question.reference.answers for question in questions] == [(row["answer"],) for row in rows]
    assert prompts(questions) == [BOXED + row["problem"] for row in rows]


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_boxed_references_are_graded_correct_and_unboxed_ones_are_not(name: str):
    questions = load_questions(config(name, path=str(DATA / name / "test.jsonl")), seed=0)
    references = [question.reference for question in questions]
    grade, answers = BENCHMARKS[name].grade, [reference.answers[0] for reference in references]
    assert all(each.correct for each in grade([f"so \\boxed{{{answer}}}" for answer in answers], references))
    assert not any(each.correct for each in grade([f"so {answer}" for answer in answers], references))


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


CHOICES = {
    "Question": "Which?", "Correct Answer": "right", "Incorrect Answer 1": "x", "Incorrect Answer 2": "y",
    "Incorrect Answer 3": "z",
}  # fmt: skip
GOOD = {
    "gsm8k": {"question": "q?", "answer": "1 #### 1"},
    "math500": {"problem": "q?", "answer": "1"},
    "aime25": {"problem": "q?", "answer": "1", "id": "0"},
    "olympiadbench": {"question": "q?", "final_answer": ["1"], "error": None},
    "gpqa_diamond": CHOICES,
    "mine": {"question": "q?", "answer": "1"},
}


@pytest.mark.parametrize(
    ("name", "bad", "problem"),
    [
        ("gsm8k", {"problem": "q?", "answer": "#### 1"}, ": no field 'question'.* problem, answer"),
        ("gsm8k", {"question": "q?", "reply": "#### 1"}, ": no field 'answer'.* question, reply"),
        ("gsm8k", {"question": None, "answer": "#### 1"}, ", question: .*text.* null"),
        ("gsm8k", {"question": 7, "answer": "#### 1"}, ", question: .*text.* int"),
        ("math500", {"question": "q?", "answer": "1"}, ": no field 'problem'.* question, answer"),
        ("math500", {"problem": " ", "answer": "1"}, ", problem: .* empty text"),
        ("mine", {"question": "q?"}, ": no field 'answer'"),
        ("olympiadbench", {"question": "q?", "final_answer": ["1"], "error": "small"}, ", error: expected a number or"),
        ("gpqa_diamond", {**CHOICES, "Incorrect Answer 2": None}, ", Incorrect Answer 2: .*text.* null"),
    ],
    ids=str,
)
def test_a_row_without_question_or_answer_is_an_error_with_its_line(
    name: str, bad: dict[str, Any], problem: str, tmp_path: Path
):
    path = write(tmp_path / "rows.jsonl", GOOD[name], bad)
    with pytest.raises(UserError, match=rf"^{name}, {re.escape(path)}, line 2{problem}"):
        load_questions(config(name, path=path), seed=0)


NO_ANSWER = {
    "gsm8k": [{"answer": "so it is 1"}, {"answer": "1 #### "}, {"answer": None}],
    "aime25": [{"answer": None}, {"answer": " "}],
    "olympiadbench": [{"final_answer": None}, {"final_answer": []}, {"final_answer": ["1", " "]}],
    "gpqa_diamond": [{"Correct Answer": None}],
    "mine": [{"answer": None}, {"answer": float("nan")}],
}


@pytest.mark.parametrize("name", NO_ANSWER)
def test_rows_without_a_reference_answer_are_left_out_and_counted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bad = [GOOD[name] | changes for changes in NO_ANSWER[name]]
    path = write(tmp_path / "rows.jsonl", GOOD[name], *bad)
    assert len(load_questions(config(name, path=path), seed=0)) == 1
    count = f"{len(bad)} of {1 + len(bad)} rows have no reference answer"
    message = f"warning: {name}: {count} and are left out. The first: {name}, {path}, line 2.\n"
    assert capsys.readouterr().err == message
    path = write(tmp_path / "none.jsonl", *bad)
    with pytest.raises(UserError, match=rf"^{name}, {re.escape(path)}, line 1: no reference answer. None of the"):
        load_questions(config(name, path=path), seed=0)


@needs_data
def test_questions_know_their_group_and_olympiadbench_its_answers():
    gsm8k = load_questions(config("gsm8k", path=str(DATA / "gsm8k" / "test.jsonl"), questions=3), seed=0)
    assert [question.group for question in gsm8k] == ["2 steps", "2 steps", "4 steps"]
    math500 = load_questions(config("math500", path=str(DATA / "math500" / "test.jsonl"), questions=3), seed=0)
    assert [question.group for question in math500] == ["level 2", "level 5", "level 3"]
    path = DATA / "olympiadbench" / "test.jsonl"
    rows, questions = read_rows(path), load_questions(config("olympiadbench", path=str(path)), seed=0)
    assert [question.reference.answers for question in questions] == [tuple(row["final_answer"]) for row in rows]
    assert prompts(questions) == [BOXED + row["question"] for row in rows]


def test_the_errors_of_olympiadbench_are_tolerances(tmp_path: Path):
    rows = [GOOD["olympiadbench"] | {"error": error} for error in (None, "", "1e-1", "0.5,1", 2)]
    questions = load_questions(config("olympiadbench", path=write(tmp_path / "rows.jsonl", *rows)), seed=0)
    assert [question.reference.tolerances for question in questions] == [(), (), (0.1,), (0.5, 1.0), (2.0,)]


def test_the_choices_of_gpqa_are_shuffled_by_question_and_the_letter_follows_the_right_one(tmp_path: Path):
    rows = [CHOICES | {"Question": f"Which of {i}?"} for i in range(200)]
    path = write(tmp_path / "rows.jsonl", *rows)
    questions = load_questions(config("gpqa_diamond", path=path), seed=0)
    assert questions == load_questions(config("gpqa_diamond", path=path), seed=1)
    letters = [question.reference.answers[0] for question in questions]
    for row, question, letter in zip(rows, questions, letters, strict=True):
        text, *lines = question.messages[0]["content"].split("\n")
        assert text.endswith("within \\boxed{}. " + row["Question"])
        assert f"{letter}) right" in lines
        assert sorted(line[3:] for line in lines) == ["right", "x", "y", "z"]
        assert [line[:3] for line in lines] == ["A) ", "B) ", "C) ", "D) "]
    assert all(30 < letters.count(letter) < 70 for letter in "ABCD")
    reversed_questions = load_questions(config("gpqa_diamond", path=write(tmp_path / "b.jsonl", *rows[::-1])), seed=0)
    assert reversed_questions[::-1] == questions


def test_a_jsonl_or_parquet_file_of_the_user_is_a_benchmark(tmp_path: Path):
    rows = [{"question": "1+1?", "answer": 2}, {"question": "The two roots of x^2=1?", "answer": -1}]
    jsonl, parquet = write(tmp_path / "mine.jsonl", *rows), tmp_path / "mine.parquet"
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    questions = load_questions(config("mine", path=jsonl), seed=0)
    assert prompts(questions) == [BOXED + row["question"] for row in rows]
    assert [question.reference.answers for question in questions] == [("2",), ("-1",)]
    assert load_questions(config("mine", path=str(parquet)), seed=0) == questions


def test_a_gated_data_set_says_how_to_get_access(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        name = "Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub. You must be authenticated to access it."
        raise DatasetNotFoundError(name)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    hint = (
        "Accept its conditions at https://huggingface.co/datasets/Idavidrein/gpqa with your account. Then set HF_TOKEN "
        "to a token of that account, or run `hf auth login`."
    )
    with pytest.raises(UserError, match=re.escape(hint)):
        load_questions(config("gpqa_diamond"), seed=0)


def test_a_reference_that_is_a_number_is_read_as_text(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {"problem": "q?", "answer": 7})
    assert load_questions(config("math500", path=path), seed=0)[0].reference == Reference(("7",))


def test_a_missing_file_and_an_unknown_benchmark_are_errors(tmp_path: Path):
    with pytest.raises(UserError, match="there is no such file"):
        load_questions(config("gsm8k", path=str(tmp_path / "absent.jsonl")), seed=0)
    with pytest.raises(UserError, match=r"no benchmark 'gsm9k' \(did you mean gsm8k\?\). There are: .* needs `path`"):
        config("gsm9k")
    with pytest.raises(UserError, match="name: expected a name of letters, digits"):
        config("../mine", path="rows.jsonl")
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
    grade = BENCHMARKS["miniature"].grade
    assert all(each.correct for each in grade(long_answers, references))
    shifted = [*references[1:], references[0]]
    is_equal = [a == b for a, b in zip(references, shifted, strict=True)]
    assert [each.correct for each in grade(long_answers, shifted)] == is_equal
    assert shifted != references
