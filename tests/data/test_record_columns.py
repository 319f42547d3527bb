"""Rows with columns of all supported forms become a prompt and its answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.byte_tokenizer import TEMPLATE, byte_tokenizer
from support.tokenized import (
    PAIR,
    PROMPT,
    ROW,
    decode,
    error_message,
    only_example,
    tokenize,
    turns,
    write_rows,
)

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig

SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIR_OF_LISTS = {"chosen": turns("q", "long"), "rejected": turns("q", "b")}


@pytest.mark.parametrize(
    ("row", "config", "expected"),
    [
        ({"prompt": "q", "response": "a"}, {}, (PROMPT, "a<end>")),
        ({"question": "q", "long": "a"}, {"prompt": "question", "response": "long"}, (PROMPT, "a<end>")),
        ({"prompt": "q", "response": "a"}, {"prompt_suffix": "!"}, ("[user]q![assistant]", "a<end>")),
        ({"prompt": "q", "response": "a"}, {"system": "S"}, (f"[system]S{PROMPT}", "a<end>")),
        ({"prompt": turns("q"), "response": "a"}, {}, (PROMPT, "a<end>")),
        ({"prompt": turns("q"), "response": "a"}, {"prompt_suffix": "!"}, ("[user]q![assistant]", "a<end>")),
        ({"prompt": "q", "response": turns("q", "a")[1:]}, {}, (PROMPT, "a<end>")),
        ({"m": turns("q", "a")}, {"messages": "m"}, (PROMPT, "a<end>")),
        ({"m": turns("q", "a")}, {"messages": "m", "prompt_suffix": "!"}, ("[user]q![assistant]", "a<end>")),
        (
            {"m": turns("q", "a", "q2", "a2")},
            {"messages": "m"},
            ("[user]q[assistant]a<end>[user]q2[assistant]", "a2<end>"),
        ),
        ({"m": SHAREGPT}, {"messages": "m"}, (PROMPT, "a<end>")),
        ({"m": SHAREGPT, "s": "S"}, {"messages": "m", "system_column": "s"}, (f"[system]S{PROMPT}", "a<end>")),
        ({"m": SHAREGPT}, {"messages": "m", "system": "S"}, (f"[system]S{PROMPT}", "a<end>")),
        (
            {"m": [{"from": "system", "value": "S"}, *SHAREGPT]},
            {"messages": "m"},
            (f"[system]S{PROMPT}", "a<end>"),
        ),
        # Columns that the config does not name are inferred from the row.
        ({"prompt": "q", "completion": "a"}, {}, (PROMPT, "a<end>")),
        ({"question": "q", "completion": "a"}, {"prompt": "question"}, (PROMPT, "a<end>")),
        ({"messages": turns("q", "a")}, {}, (PROMPT, "a<end>")),
        ({"messages": turns("q", "a"), "system": "S"}, {}, (f"[system]S{PROMPT}", "a<end>")),
        ({"prompt": "q", "response": "a", "system": "S"}, {}, (f"[system]S{PROMPT}", "a<end>")),
        ({"prompt": "q", "response": "a", "system": " "}, {}, (PROMPT, "a<end>")),
        (
            {"messages": [{"role": "system", "content": "T"}, *turns("q", "a")], "system": "S"},
            {},
            (f"[system]T{PROMPT}", "a<end>"),
        ),  # the turn wins, and the column is listed as not read
        ({"messages": [{"role": "system", "content": ""}, *turns("q", "a")]}, {}, (PROMPT, "a<end>")),
        (
            {"prompt": turns("p"), "completion": turns("", "so", "q", "a")[1:]},
            {},
            (f"[user]p[assistant]so<end>{PROMPT}", "a<end>"),
        ),
        ({"prompt": "q", "completion": "a", "messages": None}, {}, (PROMPT, "a<end>")),
        ({"conversations": SHAREGPT}, {}, (PROMPT, "a<end>")),
        ({"conversations": SHAREGPT, "system": "S"}, {}, (f"[system]S{PROMPT}", "a<end>")),
        ({"conversations": SHAREGPT, "system": ""}, {}, (PROMPT, "a<end>")),
        ({"conversations": SHAREGPT, "system": None}, {}, (PROMPT, "a<end>")),
        ({"conversations": SHAREGPT, "system": "S"}, {"system": "T"}, (f"[system]T{PROMPT}", "a<end>")),
        ({"messages": turns("q", "a"), "prompt": "q", "response": "b"}, {"response": "response"}, (PROMPT, "b<end>")),
    ],
    ids=str,
)
def test_an_sft_row_becomes_prompt_and_answer(
    row: dict[str, Any], config: dict[str, Any], expected: tuple[str, str], tmp_path: Path, chat: ChatTokenizer
):
    path = write_rows(tmp_path / "rows.jsonl", row)
    (segment,) = only_example(tokenize(SftDataConfig(path=str(path), **config), chat))
    assert decode(segment, chat) == expected
    assert segment.token_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("row", "config", "prompt"),
    [
        (PAIR, {}, PROMPT),
        (PAIR, {"system": "S", "prompt_suffix": "!"}, "[system]S[user]q![assistant]"),
        ({"prompt": "q", "x": "long", "y": "b"}, {"chosen": "x", "rejected": "y"}, PROMPT),
        ({"prompt": turns("p", "a", "q"), "chosen": "long", "rejected": "b"}, {}, f"[user]p[assistant]a<end>{PROMPT}"),
        (PAIR_OF_LISTS, {}, PROMPT),
        (PAIR_OF_LISTS | {"s": "S"}, {"system_column": "s"}, f"[system]S{PROMPT}"),
        ({"prompt": "q", "chosen": turns("", "long")[1:], "rejected": turns("", "b")[1:]}, {}, PROMPT),
        ({"prompt": turns("q"), "chosen": turns("", "long")[1:], "rejected": "b"}, {}, PROMPT),
        ({"prompt": "q", "chosen": turns("q", "long"), "rejected": "b"}, {}, PROMPT),
    ],
    ids=str,
)  # fmt: skip
def test_a_preference_row_becomes_two_answers_to_the_same_prompt(
    row: dict[str, Any], config: dict[str, Any], prompt: str, tmp_path: Path, chat: ChatTokenizer
):
    path = write_rows(tmp_path / "rows.jsonl", row)
    chosen, rejected = only_example(tokenize(PreferenceDataConfig(path=str(path), **config), chat))
    assert (decode(chosen, chat), decode(rejected, chat)) == ((prompt, "long<end>"), (prompt, "b<end>"))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, ": chosen and rejected are the same text"),
        ({"chosen": turns("q", "a"), "rejected": turns("q", "a")}, ": chosen and rejected are the same text"),
        ({"chosen": turns("q", "a"), "rejected": turns("p", "b")}, ": chosen and rejected do not answer the"),
        ({"prompt": "p", "chosen": turns("q", "a"), "rejected": "b"}, ": chosen and rejected do not answer the same"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, ", rejected: expected a text, found an empty text."),
        ({"prompt": "q", "chosen": "a"}, ": no field 'rejected'. The row has: prompt, chosen."),
        ({"prompt": "q", "chosen": "a", "reject": "b"}, ": no field 'rejected' (did you mean reject?)."),
        ({"chosen": turns("q", "a"), "rejected": turns("q")}, ", rejected: the last turn is of the user"),
        ({"chosen": turns("q", "a"), "rejected": []}, ", rejected: expected a list of messages, found an empty list."),
    ],
    ids=str,
)  # fmt: skip
def test_a_pair_needs_one_prompt_and_two_different_answers(
    row: dict[str, Any], problem: str, tmp_path: Path, chat: ChatTokenizer
):
    path = write_rows(tmp_path / "rows.jsonl", row)
    message = error_message(PreferenceDataConfig(path=str(path)), chat)
    assert message.startswith(f"{path}, line 1{problem}")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("text", "m: expected a list of messages, found str."),
        ([], "m: expected a list of messages, found an empty list."),
        (
            [*turns("q"), 3],
            "m, turn 2: expected a role of assistant, bot, developer, gpt, human, model, syst",
        ),
        ([*turns("q"), {"role": "tool", "content": "x"}], "m, turn 2: the role 'tool' belongs to tool calls"),
        ([*turns("q"), {"role": ["user"], "content": "x"}], "m, turn 2: expected a role of"),
        ([*turns("q"), {"role": "assistant", "content": None}], "m, turn 2: has no text in `content` or `value`. Its"),
        (
            [*turns("q"), {"role": "assistant", "text": "a"}],
            "m, turn 2: has no text in `content` or `value`. Its f",
        ),
        (turns("q", "a", "q"), "m: the last turn is of the user, expected the assistant's answer."),
        ([{"role": "system", "content": "S"}, *turns("q", "a")[1:]], "m: the turn before the answer is of the system"),
        ([{"role": "system", "content": "S"}, *turns("q", "a")], "m: has a system turn already"),
    ],
    ids=str,
)
def test_a_conversation_must_be_a_list_of_turns_that_ends_with_question_and_answer(
    messages: Any, problem: str, tmp_path: Path, chat: ChatTokenizer
):
    path = write_rows(tmp_path / "rows.jsonl", {"m": messages})
    message = error_message(SftDataConfig(path=str(path), messages="m", system="T"), chat)
    assert message.startswith(f"{path}, line 1, {problem}")


def test_a_conversation_that_the_template_rejects_is_an_error_with_the_line(tmp_path: Path):
    refusing = "{{ raise_exception('no system turn') if messages[0].role == 'system' }}" + TEMPLATE
    byte_tokenizer(tmp_path, template=refusing)
    path = write_rows(tmp_path / "rows.jsonl", ROW)
    message = error_message(SftDataConfig(path=str(path), system="S"), ChatTokenizer.from_folder(tmp_path))
    assert message.startswith(f"{path}, line 1: the chat template refuses")
    assert message.endswith("['system', 'user']: no system turn")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "q", "answer": "a"}, "no column with an answer: none of messages, conversations, response, comp"),
        ({"messages": turns("q", "a"), "prompt": "q", "completion": "a"}, "several answers: messages, completion."),
        ({"prompt": "q", "response": "a", "completion": "b"}, "several answers: response, completion."),
    ],
    ids=str,
)
def test_no_answer_column_or_several_is_an_error_that_lists_the_columns(
    row: dict[str, Any], problem: str, tmp_path: Path, chat: ChatTokenizer
):
    path = write_rows(tmp_path / "rows.jsonl", row)
    message = error_message(SftDataConfig(path=str(path)), chat)
    assert message.startswith(f"{path}, line 1: {problem}")
    assert f"The row has: {', '.join(row)}. Name the columns:" in message


def test_the_first_row_with_known_columns_decides_for_all_rows(tmp_path: Path, chat: ChatTokenizer):
    rows = [b"not JSON\n", {"other": 1}, {"prompt": "q", "completion": "a"}, {"messages": turns("q", "a")}]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    examples = tokenize(SftDataConfig(path=str(path), on_bad_row="skip"), chat)
    assert [decode(example[0], chat) for example in examples] == [(PROMPT, "a<end>")]
    assert examples.reports[0].dropped == {"not JSON": 1, "missing field": 2}
