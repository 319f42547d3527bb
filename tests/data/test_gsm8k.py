"""Rows of GSM8K become long and short answers to the prompts of the benchmark."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import needs_data
from support.paths import DATA
from support.tokenized import decode, error_message, only_example, tokenize, write_rows

from thinkpo_jax.data.chat_template import ThinkingFormat
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.gsm8k import add_answers
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig, parse_record
from thinkpo_jax.evaluation.benchmarks import BenchmarkConfig, load_questions
from thinkpo_jax.evaluation.grading import extract_boxed
from thinkpo_jax.runtime.config import UserError, parse_config

TRAIN = DATA / "gsm8k" / "train.jsonl"
ROW = {
    "question": "How many?",
    "answer": "2*5=<<2*5=10>>10, 10*200=<<10*200=2000>>2,000.\nAll: $<<2000>>2,000.\n#### 2,000",
}
PROMPT = "[user]Return your final response within \\boxed{}. How many?[assistant]"
LONG, SHORT = "2*5=10, 10*200=2,000.\nAll: $2,000.\n\\boxed{2000}", "\\boxed{2000}"


def _real_rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize(("column", "answer"), [(None, LONG), ("long", LONG), ("short", SHORT)])
def test_an_sft_source_trains_the_long_answer_unless_it_names_the_short_one(
    column: str | None, answer: str, tmp_path: Path, chat: ChatTokenizer
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROW)
    dataset = tokenize(SftDataConfig(path=str(path), form="gsm8k", response=column), chat)
    assert decode(only_example(dataset)[0], chat) == (PROMPT, f"{answer}<end>")
    form = f"{path}: form of the rows: gsm8k (question, {column or 'long'})"
    assert form in dataset.describe_sources()
    assert "not read" not in str(dataset.describe_sources())


def test_a_thinkpo_source_names_both_answers(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROW | {"system": "S"})
    config = PreferenceDataConfig(path=str(path), form="gsm8k", prompt="question", chosen="long", rejected="short")
    chosen, rejected = only_example(tokenize(config, chat))
    assert decode(chosen, chat) == (f"[system]S{PROMPT}", f"{LONG}<end>")
    assert decode(rejected, chat) == (f"[system]S{PROMPT}", f"{SHORT}<end>")
    unnamed = PreferenceDataConfig(path=str(path), form="gsm8k")
    assert "no field 'chosen'. The row has: question, answer, system, long, short." in error_message(unnamed, chat)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": "It is 5."}, "answer: expected a solution, then `####` and the result, found no result. Correct"),
        ({"answer": "It is 5.\n#### "}, "answer: expected a solution, then `####` and the result, found no result."),
        ({"answer": 5}, "answer: expected a text, found int."),
        ({"answer": ""}, "answer: expected a text, found an empty text."),
        ({"question": None}, "question: expected a text, found null."),
        ({"answer": "#### 5"}, "are the same text, but a pair needs two answers."),
    ],
)
def test_a_row_without_a_result_is_an_error_that_names_its_line(
    row: dict[str, Any], problem: str, tmp_path: Path, chat: ChatTokenizer
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROW, ROW | row)
    config = PreferenceDataConfig(path=str(path), form="gsm8k", chosen="long", rejected="short")
    message = error_message(config, chat)
    assert message.startswith(f"{path}, line 2")
    assert problem in message
    skipping = tokenize(config.model_copy(update={"on_bad_row": "skip"}), chat)
    assert len(skipping) == 1


def test_a_row_without_an_answer_column_names_the_columns(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"question": "q", "answr": "5 #### 5"})
    message = error_message(SftDataConfig(path=str(path), form="gsm8k"), chat)
    assert message == f"{path}, line 1: no field 'answer' (did you mean answr?). The row has: question, answr."


def test_the_form_has_no_messages() -> None:
    with pytest.raises(UserError, match="the form gsm8k has no `messages`"):
        parse_config(SftDataConfig, {"path": "x.jsonl", "form": "gsm8k", "messages": "m"}, source="data")


@needs_data
def test_real_solutions_lose_only_their_annotations_and_end_in_their_result() -> None:
    for row in _real_rows():
        record = add_answers(row, "row")
        solution, _, result = row["answer"].partition("\n#### ")
        first, *rest = solution.split("<<")
        without = first + "".join(part.partition(">>")[2] for part in rest)
        assert record["long"] == f"{without.strip()}\n{record['short']}"
        assert extract_boxed(record["long"]) == extract_boxed(record["short"]) == result.replace(",", "")


@needs_data
def test_real_prompts_and_results_are_those_of_the_benchmark() -> None:
    questions = load_questions(BenchmarkConfig(name="gsm8k", path=str(TRAIN), questions=500), seed=0)
    config = SftDataConfig(path=str(TRAIN), form="gsm8k", response="long")
    for row, question in zip(itertools.islice(_real_rows(), 500), questions, strict=True):
        parsed = parse_record(config, row, "row", ThinkingFormat())
        assert tuple(parsed.messages) == question.messages
        assert question.reference.answers == (extract_boxed(parsed.answers[0]),)
