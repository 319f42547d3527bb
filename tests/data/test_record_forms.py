"""Rows in the forms that people have are read, `--check` shows the form, and the key `form` overrides it."""

from pathlib import Path
from typing import Any

import pytest
from support.tokenized import PROMPT, decode, error_message, only_example, tokenize, turns, write_rows

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig
from thinkpo_jax.runtime.config import UserError, parse_config

ALPACA = {"instruction": "q", "input": "", "output": "a"}
SHAREGPT_PAIR = {
    "conversations": [{"from": "human", "value": "q"}],
    "chosen": {"from": "gpt", "value": "long"},
    "rejected": {"from": "gpt", "value": "b"},
}


@pytest.mark.parametrize(
    ("row", "config", "prompt", "form"),
    [
        (ALPACA, {}, PROMPT, "alpaca (instruction, input, output)"),
        ({"instruction": "q", "output": "a"}, {}, PROMPT, "alpaca (instruction, input, output)"),
        (ALPACA | {"input": "1 2"}, {}, "[user]q\n1 2[assistant]", "alpaca (instruction, input, output)"),
        (
            ALPACA | {"input": "1"},
            {"prompt_suffix": "!"},
            "[user]q\n1![assistant]",
            "alpaca (instruction, input, output)",
        ),
        (ALPACA | {"system": "S"}, {}, f"[system]S{PROMPT}", "alpaca (instruction, input, output)"),
        (
            ALPACA | {"history": [["p", "so"]]},
            {},
            f"[user]p[assistant]so<end>{PROMPT}",
            "alpaca (instruction, input, output)",
        ),
        ({"prompt": "q", "completion": "a"}, {}, PROMPT, "columns (prompt, completion)"),
        ({"messages": turns("q", "a")}, {}, PROMPT, "messages (messages)"),
        (
            {"messages": [{"role": "developer", "content": "S"}, *turns("q", "a")]},
            {},
            f"[system]S{PROMPT}",
            "messages (messages)",
        ),
        (
            {"conversations": SHAREGPT_PAIR["conversations"] + [{"from": "gpt", "value": "a"}], "system": "S"},
            {},
            f"[system]S{PROMPT}",
            "sharegpt (conversations)",
        ),
        (
            ALPACA | {"history": '[["p", "so"]]', "input": " ", "system": " "},
            {},
            f"[user]p[assistant]so<end>{PROMPT}",
            "alpaca (instruction, input, output)",
        ),
        (
            ALPACA | {"input": "1"},
            {"prompt": "instruction", "response": "output"},
            "[user]q\n1[assistant]",
            "alpaca (instruction, input, output)",
        ),
        (ALPACA | {"instruction": "", "input": "q"}, {}, PROMPT, "alpaca (instruction, input, output)"),
        # The key `form` decides where several forms fit.
        (ALPACA | {"messages": turns("p", "b")}, {"form": "alpaca"}, PROMPT, "alpaca (instruction, input, output)"),
        (ALPACA | {"messages": turns("q", "a")}, {"form": "messages"}, PROMPT, "messages (messages)"),
        ({"prompt": "q", "response": "a", "output": "b"}, {"form": "columns"}, PROMPT, "columns (prompt, response)"),
        (
            {"question": "q", "answer": "a", "system": "S"},
            {"form": "alpaca", "prompt": "question", "response": "answer"},
            f"[system]S{PROMPT}",
            "alpaca (question, input, answer)",
        ),
    ],
    ids=str,
)
def test_an_sft_row_in_a_common_form(
    row: dict[str, Any], config: dict[str, Any], prompt: str, form: str, tmp_path: Path, chat: ChatTokenizer
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", row)
    dataset = tokenize(SftDataConfig(path=str(path), **config), chat)
    assert decode(only_example(dataset)[0], chat) == (prompt, "a<end>")
    assert f"{path}: form of the rows: {form}" in dataset.describe_sources()


@pytest.mark.parametrize(
    ("row", "prompt", "form"),
    [
        (SHAREGPT_PAIR, PROMPT, "sharegpt (conversations, chosen, rejected)"),
        (SHAREGPT_PAIR | {"system": "S"}, f"[system]S{PROMPT}", "sharegpt (conversations, chosen, rejected)"),
        (
            {"instruction": "q", "input": "1", "chosen": "long", "rejected": "b"},
            "[user]q\n1[assistant]",
            "alpaca (instruction, input, chosen, rejected)",
        ),
        ({"prompt": "q", "chosen": "long", "rejected": "b"}, PROMPT, "columns (prompt, chosen, rejected)"),
        ({"chosen": turns("q", "long"), "rejected": turns("q", "b")}, PROMPT, "messages (chosen, rejected)"),
        (
            {"prompt": "q", "chosen": turns("q", "long"), "rejected": turns("q", "b"), "messages": turns("q", "long")},
            PROMPT,
            "messages (chosen, rejected)",
        ),
    ],
    ids=str,
)
def test_a_pair_in_a_common_form(
    row: dict[str, Any], prompt: str, form: str, tmp_path: Path, chat: ChatTokenizer
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", row)
    dataset = tokenize(PreferenceDataConfig(path=str(path)), chat)
    chosen, rejected = only_example(dataset)
    assert (decode(chosen, chat), decode(rejected, chat)) == ((prompt, "long<end>"), (prompt, "b<end>"))
    assert f"{path}: form of the rows: {form}" in dataset.describe_sources()


@pytest.mark.parametrize(
    ("row", "config", "problem"),
    [
        (ALPACA | {"completion": "b"}, {}, "several answers: completion, output. The row has: instruction"),
        ({"output": "a"}, {}, "no column with an answer: none of messages, conversations, response, completion, outp"),
        (ALPACA, {"form": "messages"}, "no column with an answer: none of messages. The row has"),
        (ALPACA | {"history": ["hi", "yo"]}, {}, "history: expected a list of [question, answer], found"),
        (ALPACA | {"history": [["p", 3]]}, {}, "history, turn 2: expected a text, found int"),
        (ALPACA | {"input": 3}, {}, "input: expected a text, found int"),
    ],
    ids=str,
)
def test_a_row_that_is_not_of_its_form_is_an_error(
    row: dict[str, Any], config: dict[str, Any], problem: str, tmp_path: Path, chat: ChatTokenizer
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", row)
    message = error_message(SftDataConfig(path=str(path), **config), chat)
    assert message.startswith(f"{path}, line 1")
    assert problem in message


@pytest.mark.parametrize(("form", "key"), [("messages", "response"), ("alpaca", "messages"), ("columns", "messages")])
def test_a_column_that_the_form_does_not_have_is_an_error(form: str, key: str) -> None:
    with pytest.raises(UserError, match=f"the form {form} has no `{key}`"):
        parse_config(SftDataConfig, {"path": "x.jsonl", "form": form, key: "m"}, source="data")


def test_columns_that_are_not_read_are_listed(tmp_path: Path, chat: ChatTokenizer) -> None:
    row = {"instruction": "q", "context": "lost", "response": "a", "id": 3, "empty": ""}
    path = write_rows(tmp_path / "rows.jsonl", row, row | {"id": None})
    dataset = tokenize(SftDataConfig(path=str(path), prompt="instruction"), chat)
    assert f"{path}: columns that are not read: context (2 rows), id (1 rows)" in dataset.describe_sources()


def test_a_prompt_column_that_the_turns_do_not_repeat_is_listed(tmp_path: Path, chat: ChatTokenizer) -> None:
    for prompt, is_listed in (("q", False), ("another", True)):
        row = {"prompt": prompt, "chosen": turns("q", "long"), "rejected": turns("q", "b")}
        dataset = tokenize(PreferenceDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", row))), chat)
        assert ("columns that are not read: prompt (1 rows)" in str(dataset.describe_sources())) == is_listed
