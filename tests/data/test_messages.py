"""Thoughts in fields of their own are joined, other fields are counted, and what is not supported makes a row bad."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.real_tokenizers import END_OF_TURN
from support.tokenized import PROMPT, decode, error_message, only_example, tokenize, turns, write_rows

from thinkpo_jax.data import messages
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.file_formats import RecordError
from thinkpo_jax.data.messages import THINKING_FIELDS
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig

THOUGHT, JOINED = "carry\n\nthe one", "<think>\ncarry\n\nthe one\n</think>\n\n6"


def assistant(content: Any = "6", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def sft_row(**fields: Any) -> dict[str, Any]:
    return {"messages": [*turns("q"), assistant(**fields)]}


@pytest.mark.parametrize("name", THINKING_FIELDS)
@pytest.mark.parametrize("space", ["", "\n"])
def test_a_thought_in_a_field_of_its_own_is_joined_to_the_answer(
    name: str, space: str, tmp_path: Path, chat: ChatTokenizer
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", sft_row(content=f"{space}6", **{name: f"{space}{THOUGHT}{space}"}))
    dataset = tokenize(SftDataConfig(path=str(path)), chat)
    assert decode(only_example(dataset)[0], chat) == (PROMPT, f"{JOINED}<end>")
    assert dataset.reports[0].num_joined_thoughts == 1
    assert f"{path}: thoughts in a field of their own are joined, with <think>, in 1 rows" in dataset.describe_sources()


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"chosen": [*turns("q"), assistant(thinking=THOUGHT)], "rejected": [*turns("q"), assistant("5")]}, {}),
        ({"prompt": "q", "chosen": [assistant(reasoning=THOUGHT)], "rejected": [assistant("5")]}, {}),
        ({"prompt": "q", "chosen": assistant(reasoning_content=THOUGHT), "rejected": "5"}, {}),
        ({"prompt": "q", "chosen": "6", "rejected": "5", "why": THOUGHT}, {"thinking_column": "why"}),
        ({"prompt": "q", "chosen": assistant(), "rejected": "5", "why": THOUGHT}, {"thinking_column": "why"}),
        (
            {"prompt": "q", "chosen": "6", "rejected": "5", "why": THOUGHT, "no": ""},
            {"thinking_column": "why", "rejected_thinking_column": "no"},
        ),
    ],
    ids=str,
)
def test_the_thought_of_a_chosen_answer_is_joined(
    row: dict[str, Any], columns: dict[str, Any], tmp_path: Path, chat: ChatTokenizer
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", row)
    dataset = tokenize(PreferenceDataConfig(path=str(path), **columns), chat)
    chosen, rejected = only_example(dataset)
    assert (decode(chosen, chat), decode(rejected, chat)) == ((PROMPT, f"{JOINED}<end>"), (PROMPT, "5<end>"))
    assert dataset.reports[0].num_joined_thoughts == 1


def test_a_column_holds_the_thought_of_a_response_or_of_a_rejected_answer(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "q", "response": "6", "chosen": "7", "why": THOUGHT})
    (segment,) = only_example(tokenize(SftDataConfig(path=str(path), thinking_column="why"), chat))
    assert decode(segment, chat) == (PROMPT, f"{JOINED}<end>")
    config = PreferenceDataConfig(path=str(path), rejected="response", rejected_thinking_column="why")
    assert decode(only_example(tokenize(config, chat))[1], chat) == (PROMPT, f"{JOINED}<end>")


@pytest.mark.parametrize("name", END_OF_TURN)
def test_the_joined_answer_is_what_the_template_of_the_model_writes(
    name: str, tmp_path: Path, load: Callable[[str], ChatTokenizer]
) -> None:
    """Qwen3's template writes the field. The others ignore it, so they get the format of R1 and Qwen3."""
    chat, row = load(name), sft_row(reasoning_content=f"\n{THOUGHT}\n")
    (segment,) = only_example(tokenize(SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", row))), chat))
    text = chat.tokenizer.decode(segment.token_ids)
    assert text.endswith(JOINED + END_OF_TURN[name])
    assert text.count("<think>") == text.count("</think>") == 1
    if name == "qwen3":
        assert text == chat.tokenizer.apply_chat_template(row["messages"], tokenize=False).removesuffix("\n")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"content": "<think>\na\n</think>\n\n6", "reasoning": "b"}, "but <think> is in the text too"),
        ({"content": "b</think>6", "reasoning": "b"}, "but </think> is in the text too"),
        ({"reasoning": "<think>b</think>"}, "but <think> is in the text too. Leave out one of them."),
        ({"reasoning": "a", "thinking": "b"}, "several fields hold different thoughts"),
        ({"reasoning": 3}, "expected a text, found int"),
        ({"reasoning": "a", "content": ""}, "expected a text, found an empty text"),
        (
            {"reasoning": "a", "content": None},
            "has no text in `content` or `value`. Its fields are: role, cont",
        ),
    ],
    ids=str,
)
def test_a_thought_in_two_places_or_without_answer_makes_a_row_bad(
    fields: dict[str, Any], problem: str, tmp_path: Path, chat: ChatTokenizer
) -> None:
    message = error_message(SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", sft_row(**fields)))), chat)
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}, line 1, messages")
    assert problem in message


def test_a_thought_in_a_message_and_in_a_column_makes_a_row_bad(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", sft_row(reasoning="a") | {"why": "b"})
    message = error_message(SftDataConfig(path=str(path), thinking_column="why"), chat)
    assert "the message and the column 'why' both hold its thought" in message


def test_one_thought_in_two_fields_and_empty_fields_are_fine(tmp_path: Path, chat: ChatTokenizer) -> None:
    rows = [
        sft_row(reasoning=THOUGHT, reasoning_content=THOUGHT, thinking=None),
        sft_row(reasoning=" \n", tool_calls=[]),
    ]
    examples = tokenize(SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", *rows))), chat)
    assert [decode(example[0], chat)[1] for example in examples] == [f"{JOINED}<end>", "6<end>"]
    assert examples.reports[0].num_joined_thoughts == 1


def test_a_thinking_column_that_is_not_named_is_reported(tmp_path: Path, chat: ChatTokenizer) -> None:
    rows = [{"prompt": "q", "response": "6", "reasoning": THOUGHT}, {"prompt": "q", "response": "6", "reasoning": ""}]
    dataset = tokenize(SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", *rows))), chat)
    (note,) = [line for line in dataset.describe_sources() if "not read" in line]
    assert note.endswith("reasoning (1 rows). To join a thought to its answer, set `thinking_column: reasoning`")


# Fields that are not read, and fields that make a row bad.


def test_fields_that_are_not_read_are_listed_once_with_counts(tmp_path: Path, chat: ChatTokenizer) -> None:
    rows = [sft_row(name="bot", timestamp=3), sft_row(name="bot", language=None), sft_row(weight=1)]
    dataset = tokenize(SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", *rows))), chat)
    assert dataset.reports[0].ignored_fields == {"name": 2, "timestamp": 1}
    (note,) = [line for line in dataset.describe_sources() if "not read" in line]
    assert note.endswith("fields of messages that are not read: name (2 rows), timestamp (1 rows)")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (sft_row(tool_calls=[{"id": 1}]), "tool calls"),
        (sft_row(function_call={"name": "f"}), "tool calls"),
        ({"messages": [*turns("q"), {"role": "tool", "content": "x"}, assistant()]}, "tool calls"),
        ({"conversations": [{"from": "observation", "value": "x"}, {"from": "gpt", "value": "a"}]}, "tool calls"),
        ({"conversations": [{"from": "function_call", "value": "x"}, {"from": "gpt", "value": "a"}]}, "tool calls"),
        (sft_row() | {"tools": '[{"name": "f"}]'}, "tool calls"),
        (sft_row(images=["a.png"]), "images or audio"),
        (sft_row(content=[{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "a"}]), "images or audio"),
        ({"messages": [{"role": "user", "content": "q", "audio": {"path": "x"}}, assistant()]}, "images or audio"),
        (sft_row(weight=0), "weight of a turn"),
        (sft_row(weight=0.5), "weight of a turn"),
    ],
    ids=str,
)
def test_what_is_not_supported_makes_the_row_bad(
    row: dict[str, Any], reason: str, tmp_path: Path, chat: ChatTokenizer
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *([sft_row()] if "messages" in row else []), row)
    dataset = tokenize(SftDataConfig(path=str(path), on_bad_row="skip"), chat)
    assert dataset.reports[0].dropped == {reason: 1}
    assert "not supported" in error_message(SftDataConfig(path=str(path)), chat)


def test_empty_lists_of_tools_are_fine(tmp_path: Path, chat: ChatTokenizer) -> None:
    rows = [sft_row(tool_calls=[], images=None) | {"tools": "[]"}, sft_row() | {"tools": []}]
    assert len(tokenize(SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", *rows))), chat)) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": "6"}], "6"),
        ([{"type": "text", "text": "6"}, {"type": "text", "text": "7"}], "6\n7"),
        (["6"], "6"),
        ([{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": "6"}], JOINED),
    ],
    ids=str,
)
def test_content_may_be_a_list_of_parts(content: Any, expected: str, tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", sft_row(content=content))
    (segment,) = only_example(tokenize(SftDataConfig(path=str(path)), chat))
    assert decode(segment, chat) == (PROMPT, f"{expected}<end>")


@pytest.mark.parametrize("dump", [json.dumps, lambda value: json.dumps(value, indent=2), str])
def test_messages_as_text_are_read_as_messages(dump: Callable[[Any], str], tmp_path: Path, chat: ChatTokenizer) -> None:
    """A CSV file holds a list as JSON, or as Python prints it."""
    rows: list[dict[str, Any]] = [
        {"chosen": dump([*turns("q"), assistant(reasoning=THOUGHT)]), "rejected": dump(turns("q", "5"))},
        {"prompt": "q", "chosen": dump(assistant(reasoning=THOUGHT)), "rejected": dump({"from": "gpt", "value": "5"})},
    ]
    examples = tokenize(PreferenceDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", *rows))), chat)
    for chosen, rejected in examples:
        assert (decode(chosen, chat), decode(rejected, chat)) == ((PROMPT, f"{JOINED}<end>"), (PROMPT, "5<end>"))
    assert len(examples) == 2


@pytest.mark.parametrize(
    "text",
    [
        '[{"value": 3, "unit": "m"}]',
        "[{'value': 3}]",
        '[{"role": "admin", "content": "x"}]',
        '[{"role": "user", "content": "x"}] is right.',
        '{"role": "user"}',
        "[1, 2]",
        "[]",
        "{",
        '[{"role":' + "[" * 200_000,
    ],
    ids=lambda text: text[:20],
)
def test_an_answer_that_is_data_stays_a_text(text: str, tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "q", "response": text})
    (segment,) = only_example(tokenize(SftDataConfig(path=str(path)), chat, row_length=201_000))
    assert decode(segment, chat) == (PROMPT, f"{text}<end>")


def test_messages_that_numpy_printed_are_an_error(tmp_path: Path, chat: ChatTokenizer) -> None:
    """pandas writes an array of messages without commas."""
    printed = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"
    config = SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", {"messages": printed})))
    assert "is written as Python prints it. Save the data as JSONL or Parquet" in error_message(config, chat)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": turns("q"), "completion": turns("", "a")[1:], "tools": [{"name": "f"}]},
        {"prompt": "what is in <image>?", "response": "cat", "images": ["a.png"]},
        {"instruction": "q", "output": "a", "images": ["a.png"]},
        {"prompt": "q", "response": "a", "tools": '[{"name": "f"}]'},
    ],
    ids=str,
)
def test_tools_and_images_of_a_row_make_it_bad_in_every_form(
    row: dict[str, Any], tmp_path: Path, chat: ChatTokenizer
) -> None:
    message = error_message(SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", row))), chat)
    assert "are not supported. Remove the field or the row." in message


def test_a_list_with_one_text_and_a_thought_in_parts_are_read(tmp_path: Path, chat: ChatTokenizer) -> None:
    rows = [
        {"prompt": "q", "response": ["6"], "why": [THOUGHT]},
        {"prompt": "q", "response": [assistant(reasoning=[{"type": "text", "text": THOUGHT}])], "why": []},
    ]
    config = SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", *rows)), thinking_column="why")
    assert [decode(example[0], chat) for example in tokenize(config, chat)] == [(PROMPT, f"{JOINED}<end>")] * 2
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "q", "response": "6", "why": ["a", "b"]})
    message = error_message(SftDataConfig(path=str(path), thinking_column="why"), chat)
    assert message.startswith(f"{path}, line 1, why: expected a text, found list")


def test_a_thinking_column_without_thoughts_is_counted_as_such(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "q", "response": "6", "why": ""})
    lines = tokenize(SftDataConfig(path=str(path), thinking_column="why"), chat).describe_sources()
    assert f"{path}: thoughts in a field of their own are joined, with <think>, in 0 rows" in lines


def test_an_answer_that_closes_a_thought_it_did_not_open_is_counted(
    tmp_path: Path, load: Callable[[str], ChatTokenizer]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "q", "response": "why\n</think>\n\n6"})
    for name, count in (("qwen3", 1), ("r1", 0)):  # the prompt of R1 opens the thought
        (report,) = tokenize(SftDataConfig(path=str(path)), load(name)).reports
        assert report.num_unopened_thoughts == count
        assert ("1 answers close a thought that nothing opens" in str(report.notes())) == (count == 1)


def test_a_huge_python_literal_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python needs a gigabyte for some literals of a megabyte. JSON of any length is read."""
    text = str([{"role": "user", "content": "a"}])
    assert messages.parse_messages(text, "row 1") == [{"role": "user", "content": "a"}]
    monkeypatch.setattr(messages, "MAX_LITERAL_CHARACTERS", len(text) - 1)
    with pytest.raises(RecordError, match=r"row 1: a list of messages is written as Python prints it\. Save the data"):
        messages.parse_messages(text, "row 1")
    assert messages.parse_messages(text.replace("'", '"'), "row 1") == [{"role": "user", "content": "a"}]
