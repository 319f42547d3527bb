"""Every row of a source is an example, is counted as left out, or stops the run with the place where it stands."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokenizer import TEMPLATE, byte_tokenizer
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer, RenderedPrompt
from thinkpo_jax.data.examples import Example, Segment, TokenizedDataset
from thinkpo_jax.data.readers import iterate_records
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig
from thinkpo_jax.data.sources import DataSourceConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.files import token_cache_folder

LINE_SEPARATOR = "\u2028"
EXPECTED = "expected a file (.jsonl, .jsonl.gz, .parquet), a folder or a Hub id (owner/name)"
ROW = {"prompt": "2+2?", "response": "4", "chosen": "2+2=4;#4", "rejected": "#4"}


def line(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else line(row) for row in rows))
    return path


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def tokenize(
    config: SftDataConfig | PreferenceDataConfig, chat: ChatTokenizer, *, row_length: int, seed: int
) -> TokenizedDataset:
    """The examples of one source."""
    return tokenize_sources([config], chat, row_length=row_length, seed=seed)


def error_of(config: SftDataConfig | PreferenceDataConfig, chat: ChatTokenizer) -> str:
    with pytest.raises(UserError) as error:
        tokenize(config, chat, row_length=10_000, seed=0)
    return str(error.value)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_folder(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def read(segment: Segment, chat: ChatTokenizer) -> tuple[str, str]:
    """The text of a segment's prompt and of what is trained."""
    start = segment.answer_start
    return chat.tokenizer.decode(segment.token_ids[:start]), chat.tokenizer.decode(segment.token_ids[start:])


def only(examples: TokenizedDataset) -> Example:
    (example,) = examples
    return example


# Files.


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b'{"prompt": "q",\n', "not valid JSON: "),
        (b'{"prompt": "q"} {"prompt": "q"}\n', "not valid JSON: Extra data, at character 17."),
        (b"[1, 2]\n", "expected a JSON object, found list."),
        (b"null\n", "expected a JSON object, found NoneType."),
        (b'{"prompt": "\xff", "response": "a"}\n', "not valid UTF-8: "),
        (b'{"prompt": ' + b"1" * 5000 + b"}\n", "cannot be read as JSON: "),
        (
            line({"promt": "q", "response": "a"}),
            "no field 'prompt' (did you mean promt?). The row has: promt, response.",
        ),
        (line({"prompt": None, "response": "a"}), "prompt: expected a text, found null."),
        (line({"prompt": 3, "response": "a"}), "prompt: expected a text, found int."),
        (line({"prompt": "q", "response": ""}), "response: expected a text, found an empty text."),
        (line({"prompt": "q", "response": " \n"}), "response: expected a text, found an empty text."),
        (b'{"prompt": "q", "response": "ab\\ud83d"}\n', "response: not a text: '\\ud83d' at character 3 is half"),
        (line({"prompt": "q", "response": "a<end>b"}), "the answer holds '<end>', special to this tokenizer."),
        (line({"prompt": [], "response": "a"}), "prompt: expected a list of messages, found an empty list."),
        (line({"prompt": turns("q", "a"), "response": "a"}), "prompt: the turn before the answer is of the assistant"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_bad_row_stops_the_run_with_its_file_and_line(bad: bytes, said: str, tmp_path: Path, chat: ChatTokenizer):
    path = write(tmp_path / "rows.jsonl", ROW, b"\n", b"  \n", ROW, bad, ROW)  # blank lines count as lines
    found = error_of(SftDataConfig(path=str(path)), chat)
    assert found.startswith(f"{path}, line 5")
    assert said in found


@pytest.mark.parametrize("content", [b"", b"\n \n\n"], ids=["empty", "blank"])
def test_a_file_without_rows_is_an_error_with_its_name(content: bytes, tmp_path: Path, chat: ChatTokenizer):
    path = write(tmp_path / "rows.jsonl", content)
    assert error_of(SftDataConfig(path=str(path)), chat) == f"{path}: there are no rows, expected at least one."


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet"])
def test_a_missing_file_is_an_error_with_its_name(name: str, tmp_path: Path, chat: ChatTokenizer):
    found = error_of(SftDataConfig(path=str(tmp_path / name)), chat)
    assert found.startswith(f"{tmp_path / name}: there is no such file; {EXPECTED}.")


@pytest.mark.parametrize("name", ["rows", "rows.jsonl", "rows.parquet"])
def test_a_folder_is_an_error_with_its_name(name: str, tmp_path: Path, chat: ChatTokenizer):
    (tmp_path / name).mkdir()
    found = error_of(SftDataConfig(path=str(tmp_path / name)), chat)
    assert found.startswith(f"{tmp_path / name}: ")
    assert ("found a folder" if "." in name else "found an empty folder") in found
    assert EXPECTED in found


def test_a_folder_is_not_taken_for_a_data_set_of_the_hub_of_that_name(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert error_of(SftDataConfig(path="owner/name"), chat) == f"owner/name: {EXPECTED}, found an empty folder."
    (tmp_path / "owner" / "name" / "other.bin").write_bytes(b"1")
    assert error_of(SftDataConfig(path="owner/name"), chat).startswith("owner/name: cannot be read as a data set: ")


def test_a_file_of_another_kind_is_an_error_with_its_name(tmp_path: Path, chat: ChatTokenizer):
    path = write(tmp_path / "rows.csv", ROW)
    found = error_of(SftDataConfig(path=str(path)), chat)
    assert found == f"{path}: {EXPECTED}, found another kind of file."
    for absent in ("rows/absent.csv", "a/b/c", "../rows", str(tmp_path / "rows")):
        assert error_of(SftDataConfig(path=absent), chat) == f"{absent}: {EXPECTED}, found no such file."


def test_a_data_set_of_the_hub_that_cannot_be_had_is_an_error_with_its_name(chat: ChatTokenizer):
    # Off line, as the tests are; a dot in the name does not make it a file.
    for name in ("owner/name", "owner/name-v1.5"):
        found = error_of(SftDataConfig(path=name), chat)
        assert found.startswith(f"{name}: cannot be read as a data set: ")
        assert "Without a network" in found


def test_a_line_ends_at_a_newline_and_at_nothing_else(tmp_path: Path, chat: ChatTokenizer):
    texts = [f"a{LINE_SEPARATOR}b\u2029c\u0085d\x0be\x0cf", "second"]
    rows = [ROW | {"response": text} for text in texts]
    content = b"".join(line(row) for row in rows)
    assert LINE_SEPARATOR.encode() in content  # as itself, not escaped
    path = write(tmp_path / "rows.jsonl", content)
    examples = tokenize(SftDataConfig(path=str(path)), chat, row_length=1000, seed=0)
    assert [read(example[0], chat)[1] for example in examples] == [f"{text}<end>" for text in texts]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_text(tmp_path: Path, chat: ChatTokenizer):
    content = b"\xef\xbb\xbf" + line(ROW).replace(b"\n", b"\r\n") * 2
    examples = tokenize(SftDataConfig(path=str(write(tmp_path / "rows.jsonl", content))), chat, row_length=1000, seed=0)
    assert [read(example[0], chat)[1] for example in examples] == ["4<end>", "4<end>"]


def test_no_more_than_limit_rows_are_read(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", ROW, ROW, b"not JSON\n")
    rows = list(iterate_records(DataSourceConfig(path=str(path), limit=2), seed=0))
    assert rows == [(f"{path}, line 1", ROW), (f"{path}, line 2", ROW)]


def test_parquet_gives_the_same_examples_as_jsonl(tmp_path: Path, chat: ChatTokenizer):
    from datasets import Dataset

    rows = [ROW | {"conversation": turns(f"q{i}", "a" * i)} for i in range(1, 4)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", *rows)
    for messages in ("conversation", None):
        one, other = (
            tokenize(
                SftDataConfig(path=str(tmp_path / f"rows.{kind}"), messages=messages), chat, row_length=1000, seed=0
            )
            for kind in ("parquet", "jsonl")
        )
        assert one.reports[0].rows == other.reports[0].rows == 3
        assert [read(example[0], chat) for example in one] == [read(example[0], chat) for example in other]


def test_a_path_is_a_name_and_no_pattern(tmp_path: Path, chat: ChatTokenizer):
    from datasets import Dataset

    for name, count in (("a*b.parquet", 2), ("aXb.parquet", 3), ("a[1].parquet", 4)):
        Dataset.from_list([ROW] * count).to_parquet(tmp_path / name)
    for name, count in (("a*b.parquet", 2), ("a[1].parquet", 4)):
        found = tokenize(SftDataConfig(path=str(tmp_path / name)), chat, row_length=512, seed=0)
        assert found.reports[0].rows == count


def test_a_key_given_twice_in_a_row_is_an_error(tmp_path: Path, chat: ChatTokenizer):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "response": "c"}\n')
    with pytest.raises(UserError, match="line 1: cannot be read as JSON: the key 'response' is given twice"):
        tokenize(SftDataConfig(path=str(tmp_path / "rows.jsonl")), chat, row_length=512, seed=0)


def test_a_bad_row_of_a_parquet_file_is_named_and_so_is_a_broken_file(tmp_path: Path, chat: ChatTokenizer):
    from datasets import Dataset

    Dataset.from_list([ROW, ROW | {"response": None}]).to_parquet(tmp_path / "rows.parquet")
    found = error_of(SftDataConfig(path=str(tmp_path / "rows.parquet")), chat)
    assert found == f"{tmp_path / 'rows.parquet'}, row 1, response: expected a text, found null."
    write(tmp_path / "broken.parquet", ROW)
    assert error_of(SftDataConfig(path=str(tmp_path / "broken.parquet")), chat).startswith(
        f"{tmp_path / 'broken.parquet'}: "
    )


# Forms of a row.

SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ASKED = "[user]q[assistant]"
PAIR = {"prompt": "q", "chosen": "long", "rejected": "b"}
PAIR_OF_LISTS = {"chosen": turns("q", "long"), "rejected": turns("q", "b")}


@pytest.mark.parametrize(
    ("row", "config", "expected"),
    [
        ({"prompt": "q", "response": "a"}, {}, (ASKED, "a<end>")),
        ({"question": "q", "long": "a"}, {"prompt": "question", "response": "long"}, (ASKED, "a<end>")),
        ({"prompt": "q", "response": "a"}, {"prompt_suffix": "!"}, ("[user]q![assistant]", "a<end>")),
        ({"prompt": "q", "response": "a"}, {"system": "S"}, (f"[system]S{ASKED}", "a<end>")),
        ({"prompt": turns("q"), "response": "a"}, {}, (ASKED, "a<end>")),
        ({"prompt": turns("q"), "response": "a"}, {"prompt_suffix": "!"}, ("[user]q![assistant]", "a<end>")),
        ({"prompt": "q", "response": turns("q", "a")[1:]}, {}, (ASKED, "a<end>")),
        ({"m": turns("q", "a")}, {"messages": "m"}, (ASKED, "a<end>")),
        ({"m": turns("q", "a")}, {"messages": "m", "prompt_suffix": "!"}, ("[user]q![assistant]", "a<end>")),
        (
            {"m": turns("q", "a", "q2", "a2")},
            {"messages": "m"},
            ("[user]q[assistant]a<end>[user]q2[assistant]", "a2<end>"),
        ),
        ({"m": SHAREGPT}, {"messages": "m"}, (ASKED, "a<end>")),
        ({"m": SHAREGPT, "s": "S"}, {"messages": "m", "system_column": "s"}, (f"[system]S{ASKED}", "a<end>")),
        ({"m": SHAREGPT}, {"messages": "m", "system": "S"}, (f"[system]S{ASKED}", "a<end>")),
        (
            {"m": [{"from": "system", "value": "S"}, *SHAREGPT]},
            {"messages": "m"},
            (f"[system]S{ASKED}", "a<end>"),
        ),
        # The form is told by the row, as far as it is not named.
        ({"prompt": "q", "completion": "a"}, {}, (ASKED, "a<end>")),
        ({"question": "q", "completion": "a"}, {"prompt": "question"}, (ASKED, "a<end>")),
        ({"messages": turns("q", "a")}, {}, (ASKED, "a<end>")),
        ({"messages": turns("q", "a"), "system": "not ShareGPT's"}, {}, (ASKED, "a<end>")),
        ({"conversations": SHAREGPT}, {}, (ASKED, "a<end>")),
        ({"conversations": SHAREGPT, "system": "S"}, {}, (f"[system]S{ASKED}", "a<end>")),
        ({"conversations": SHAREGPT, "system": ""}, {}, (ASKED, "a<end>")),
        ({"conversations": SHAREGPT, "system": None}, {}, (ASKED, "a<end>")),
        ({"conversations": SHAREGPT, "system": "S"}, {"system": "T"}, (f"[system]T{ASKED}", "a<end>")),
        ({"messages": turns("q", "a"), "prompt": "q", "response": "b"}, {"response": "response"}, (ASKED, "b<end>")),
    ],
    ids=str,
)
def test_sft_form_gives_prompt_and_answer(
    row: dict[str, Any], config: dict[str, Any], expected: tuple[str, str], tmp_path: Path, chat: ChatTokenizer
):
    path = write(tmp_path / "rows.jsonl", row)
    (segment,) = only(tokenize(SftDataConfig(path=str(path), **config), chat, row_length=1000, seed=0))
    assert read(segment, chat) == expected
    assert segment.token_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("row", "config", "prompt"),
    [
        (PAIR, {}, ASKED),
        (PAIR, {"system": "S", "prompt_suffix": "!"}, "[system]S[user]q![assistant]"),
        ({"prompt": "q", "x": "long", "y": "b"}, {"chosen": "x", "rejected": "y"}, ASKED),
        ({"prompt": turns("p", "a", "q"), "chosen": "long", "rejected": "b"}, {}, f"[user]p[assistant]a<end>{ASKED}"),
        (PAIR_OF_LISTS, {}, ASKED),
        (PAIR_OF_LISTS | {"s": "S"}, {"system_column": "s"}, f"[system]S{ASKED}"),
        ({"prompt": "q", "chosen": turns("", "long")[1:], "rejected": turns("", "b")[1:]}, {}, ASKED),
        ({"prompt": turns("q"), "chosen": turns("", "long")[1:], "rejected": "b"}, {}, ASKED),
        ({"prompt": "q", "chosen": turns("q", "long"), "rejected": "b"}, {}, ASKED),
    ],
    ids=str,
)  # fmt: skip
def test_pair_form_gives_the_same_prompt_and_two_answers(
    row: dict[str, Any], config: dict[str, Any], prompt: str, tmp_path: Path, chat: ChatTokenizer
):
    path = write(tmp_path / "rows.jsonl", row)
    chosen, rejected = only(tokenize(PreferenceDataConfig(path=str(path), **config), chat, row_length=1000, seed=0))
    assert (read(chosen, chat), read(rejected, chat)) == ((prompt, "long<end>"), (prompt, "b<end>"))


@pytest.mark.parametrize(
    ("row", "said"),
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
def test_a_pair_has_one_prompt_and_two_answers(row: dict[str, Any], said: str, tmp_path: Path, chat: ChatTokenizer):
    path = write(tmp_path / "rows.jsonl", row)
    found = error_of(PreferenceDataConfig(path=str(path)), chat)
    assert found.startswith(f"{path}, line 1{said}")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("text", "m: expected a list of messages, found str."),
        ([], "m: expected a list of messages, found an empty list."),
        ([*turns("q"), 3], "m, turn 2: expected a role of assistant, gpt, human, system, user, found 3."),
        ([*turns("q"), {"role": "tool", "content": "x"}], "m, turn 2: expected a role of"),
        ([*turns("q"), {"role": ["user"], "content": "x"}], "m, turn 2: expected a role of"),
        ([*turns("q"), {"role": "assistant", "content": None}], "m, turn 2: expected a text, found null."),
        ([*turns("q"), {"role": "assistant"}], "m, turn 2: expected a text, found null."),
        (turns("q", "a", "q"), "m: the last turn is of the user, expected the assistant's answer."),
        ([{"role": "system", "content": "S"}, *turns("q", "a")[1:]], "m: the turn before the answer is of the system"),
        ([{"role": "system", "content": "S"}, *turns("q", "a")], "m: has a system turn already"),
    ],
    ids=str,
)
def test_a_conversation_is_a_list_of_turns_that_ends_with_question_and_answer(
    messages: Any, said: str, tmp_path: Path, chat: ChatTokenizer
):
    path = write(tmp_path / "rows.jsonl", {"m": messages})
    found = error_of(SftDataConfig(path=str(path), messages="m", system="T"), chat)
    assert found.startswith(f"{path}, line 1, {said}")


def test_a_template_that_refuses_a_conversation_is_an_error_with_the_line(tmp_path: Path):
    refusing = "{{ raise_exception('no system turn') if messages[0].role == 'system' }}" + TEMPLATE
    byte_tokenizer(tmp_path, template=refusing)
    path = write(tmp_path / "rows.jsonl", ROW)
    found = error_of(SftDataConfig(path=str(path), system="S"), ChatTokenizer.from_folder(tmp_path))
    assert found.startswith(f"{path}, line 1: the chat template refuses")
    assert found.endswith("['system', 'user']: no system turn")


# Rows that are too long.


def test_an_over_long_row_is_left_out_and_counted_or_stops_the_run(tmp_path: Path, chat: ChatTokenizer):
    longest = len(f"{ASKED}{'a' * 20}") + 1
    rows = [{"prompt": "q", "response": "a" * count} for count in (1, 21, 20, 22)]
    path = write(tmp_path / "rows.jsonl", *rows)
    examples = tokenize(SftDataConfig(path=str(path)), chat, row_length=longest, seed=0)
    assert (examples.reports[0].rows, len(examples)) == (4, 2)
    assert examples.reports[0].dropped == {f"longer than row_length {longest}": 2}
    assert examples.prompt_and_answer_lengths().sum(axis=(1, 2)).tolist() == [longest - 19, longest]
    with pytest.raises(UserError, match=rf"line 2: {longest + 1} tokens do not fit row_length {longest}\."):
        tokenize(SftDataConfig(path=str(path), over_length="raise"), chat, row_length=longest, seed=0)


def test_a_source_may_have_no_row_left(tmp_path: Path, chat: ChatTokenizer):
    path = write(tmp_path / "rows.jsonl", ROW, ROW)
    found = tokenize(SftDataConfig(path=str(path)), chat, row_length=3, seed=0)
    assert (len(found), list(found), found.prompt_and_answer_lengths().shape) == (0, [], (0, 1, 2))
    assert str(found.reports[0]) == f"0 of 2 rows of {path}; 2 left out: longer than row_length 3"


def test_the_length_of_one_answer_never_changes_the_other(tmp_path: Path, chat: ChatTokenizer):
    """A pair is whole or left out: nothing is cut, on either side."""
    row = {"prompt": "q", "chosen": "a" * 10_000, "rejected": "b" * 300}
    path = write(tmp_path / "rows.jsonl", ROW, row)
    whole = sum(len(f"{ASKED}{row[side]}") + 1 for side in ("chosen", "rejected"))
    for row_length, kept in ((whole, 2), (whole - 1, 1)):
        examples = tokenize(PreferenceDataConfig(path=str(path)), chat, row_length=row_length, seed=0)
        assert len(examples) == kept
        assert sum(examples.reports[0].dropped.values()) == 2 - kept
        assert all(segment.answer_start < len(segment.token_ids) for pair in examples for segment in pair)
    chosen, rejected = tokenize(PreferenceDataConfig(path=str(path)), chat, row_length=whole, seed=0)[1]
    assert read(chosen, chat) == (ASKED, row["chosen"] + "<end>")
    assert read(rejected, chat) == (ASKED, row["rejected"] + "<end>")


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12),
    room=st.integers(40, 120),
)
def test_every_row_is_kept_whole_and_in_order_or_counted(
    lengths: list[tuple[int, int]], room: int, tmp_path_factory: pytest.TempPathFactory, chat: ChatTokenizer
):
    rows = [
        {"prompt": f"{i}?", "chosen": "a" * long, "rejected": "b" * short} for i, (long, short) in enumerate(lengths)
    ]
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", *rows)
    overhead = len("[user]?[assistant]") + 1
    fits = [
        row for row in rows
        if len(row["chosen"] + row["rejected"]) + 2 * (overhead + len(row["prompt"]) - 1) <= room
    ]  # fmt: skip
    examples = tokenize(PreferenceDataConfig(path=str(path)), chat, row_length=room, seed=0)
    assert examples.reports[0].rows == len(rows) == len(examples) + sum(examples.reports[0].dropped.values())
    found = [tuple(read(segment, chat)[1] for segment in pair) for pair in examples]
    assert found == [(row["chosen"] + "<end>", row["rejected"] + "<end>") for row in fits]
    assert examples.prompt_and_answer_lengths().sum(axis=(1, 2)).tolist() == [
        sum(len(segment.token_ids) for segment in pair) for pair in examples
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer": "a"}, "no column with an answer: none of messages, conversations, response, comp"),
        ({"messages": turns("q", "a"), "prompt": "q", "completion": "a"}, "several answers: messages, completion."),
        ({"prompt": "q", "response": "a", "completion": "b"}, "several answers: response, completion."),
    ],
    ids=str,
)
def test_a_form_that_is_none_or_several_is_an_error_with_the_columns(
    row: dict[str, Any], said: str, tmp_path: Path, chat: ChatTokenizer
):
    path = write(tmp_path / "rows.jsonl", row)
    found = error_of(SftDataConfig(path=str(path)), chat)
    assert found.startswith(f"{path}, line 1: {said}")
    assert f"The row has: {', '.join(row)}. Name the columns:" in found


def test_the_first_row_that_tells_the_form_tells_it_for_all(tmp_path: Path, chat: ChatTokenizer):
    rows = [b"not JSON\n", {"other": 1}, {"prompt": "q", "completion": "a"}, {"messages": turns("q", "a")}]
    path = write(tmp_path / "rows.jsonl", *rows)
    found = tokenize(SftDataConfig(path=str(path), on_bad_row="skip"), chat, row_length=1000, seed=0)
    assert [read(example[0], chat) for example in found] == [(ASKED, "a<end>")]
    assert found.reports[0].dropped == {"not JSON": 1, "missing field": 2}


# Bad rows.


def test_bad_rows_are_skipped_and_counted_by_reason(tmp_path: Path, chat: ChatTokenizer):
    bad = [b"{\n", {"prompt": "q"}, ROW | {"response": None}, ROW | {"response": 3}, ROW | {"response": "a<end>b"}]
    path = write(tmp_path / "rows.jsonl", *bad, ROW, [1], ROW)
    found = tokenize(
        SftDataConfig(path=str(path), response="response", on_bad_row="skip"), chat, row_length=1000, seed=0
    )
    (report,) = found.reports
    expected = {"not JSON": 1, "missing field": 1, "no text": 2, "cannot be tokenised": 1, "not an object": 1}
    assert (report.rows, report.num_used, report.dropped, report.stopping_error_by_reason) == (8, 2, expected, {})
    assert (
        report.first_error_by_reason["no text"] == f"{path}, line 3, response: expected a text, found null."
    )  # the first of its kind
    assert report.first_error_by_reason.keys() == expected.keys()
    assert str(report).startswith(
        f"2 of 8 rows of {path}; 1 left out: not JSON; 1 left out: missing field; 2 left out:"
    )


def test_all_bad_rows_are_counted_where_asked_for(tmp_path: Path, chat: ChatTokenizer):
    """What `--check` does: it goes on, and remembers what would have stopped the run."""
    path = write(tmp_path / "rows.jsonl", ROW, b"{\n", b"[\n", ROW | {"response": "a" * 2000})
    for config in (SftDataConfig(path=str(path)), SftDataConfig(path=str(path), over_length="raise")):
        (report,) = tokenize_sources([config], chat, row_length=1000, seed=0, keep_going=True).reports
        assert "line 2: not valid JSON" in report.stopping_error_by_reason["not JSON"]
        assert ("longer than row_length 1000" in report.stopping_error_by_reason) == (config.over_length == "raise")
        assert report.dropped == {"not JSON": 2, "longer than row_length 1000": 1}
        assert report.first_error_by_reason.keys() == {"not JSON"}  # a row that is long is no bad row
        with pytest.raises(UserError, match="line 2: not valid JSON"):  # also when it was prepared before
            tokenize_sources([config], chat, row_length=1000, seed=0)


def test_answers_with_the_same_tokens_are_no_pair(tmp_path: Path):
    """Two ways to write é are one to a tokenizer that composes them."""
    if not (DATA / "tokenizers" / "qwen2_5").is_dir():
        pytest.skip("the real tokenizers are not there")
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "chosen": "caf\u00e9", "rejected": "cafe\u0301"})
    found = error_of(PreferenceDataConfig(path=str(path)), ChatTokenizer.from_folder(DATA / "tokenizers" / "qwen2_5"))
    assert found == f"{path}, line 1: the two answers have the same tokens; a pair needs two answers."


# Cutting.


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ((30, 5), 37, (31, 6)),  # with their end tokens
        ((30, 5), 36, (30, 6)),
        ((30, 5), 30, (24, 6)),
        ((5, 30), 30, (6, 24)),
        ((30, 20), 30, (15, 15)),
        ((30, 5), 7, (3, 3)),
        ((30, 5), 2, (1, 1)),
    ],
)
def test_a_cut_takes_from_the_end_of_the_longer_answer_and_takes_the_end_token(
    lengths: tuple[int, int], room: int, kept: tuple[int, int], tmp_path: Path, chat: ChatTokenizer
):
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "chosen": "a" * lengths[0], "rejected": "b" * lengths[1]})
    row_length = 2 * len(ASKED) + room
    found = tokenize(PreferenceDataConfig(path=str(path), over_length="cut"), chat, row_length=row_length, seed=0)
    for segment, letter, length, count in zip(only(found), "ab", lengths, kept, strict=True):
        whole = letter * length + "<end>" if count == length + 1 else letter * count
        assert read(segment, chat) == (ASKED, whole)
    assert found.reports[0].num_truncated == sum(count <= length for length, count in zip(lengths, kept, strict=True))


def test_what_has_no_room_for_a_token_of_each_answer_is_left_out(tmp_path: Path, chat: ChatTokenizer):
    path = write(tmp_path / "rows.jsonl", PAIR)
    for room, kept in ((1, 0), (2, 1)):
        found = tokenize(
            PreferenceDataConfig(path=str(path), over_length="cut"), chat, row_length=2 * len(ASKED) + room, seed=0
        )
        assert len(found) == kept


def test_answers_that_a_cut_makes_equal_are_left_out_and_counted(tmp_path: Path, chat: ChatTokenizer):
    row = {"prompt": "q", "chosen": "a" * 40 + "b", "rejected": "a" * 40 + "c"}
    path = write(tmp_path / "rows.jsonl", row, PAIR)
    found = tokenize(
        PreferenceDataConfig(path=str(path), over_length="cut"), chat, row_length=2 * len(ASKED) + 20, seed=0
    )
    assert (len(found), found.reports[0].dropped) == (1, {"identical after the cut": 1})


def test_a_cut_that_takes_the_end_of_the_thinking_is_counted(tmp_path: Path, chat: ChatTokenizer):
    answer = "<think>" + "t" * 50 + "</think>#4"
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "response": answer}, {"prompt": "q", "response": answer[:20]})
    for row_length, unfinished in ((1000, 1), (len(ASKED) + 40, 2)):
        found = tokenize(SftDataConfig(path=str(path), over_length="cut"), chat, row_length=row_length, seed=0)
        assert (len(found), found.reports[0].num_unclosed_thoughts) == (2, unfinished)


@pytest.mark.parametrize("column", ["response", "prompt"])
def test_a_row_that_cannot_fit_is_not_tokenised(
    column: str, tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    path = write(tmp_path / "rows.jsonl", ROW | {column: "a" * 1_000_000}, ROW)
    seen: list[int] = []
    answer_ids = ChatTokenizer.encode_answer
    monkeypatch.setattr(
        ChatTokenizer, "encode_answer", lambda self, p, text: seen.append(len(text)) or answer_ids(self, p, text)
    )
    found = tokenize(SftDataConfig(path=str(path)), chat, row_length=1000, seed=0)
    assert found.reports[0].dropped == {"longer than row_length 1000": 1}
    assert seen == [1]


def test_a_cut_tokenises_no_more_than_could_fit(tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "rows.jsonl", ROW | {"response": "a" * 1_000_000})
    seen: list[int] = []
    answer_ids = ChatTokenizer.encode_answer
    monkeypatch.setattr(
        ChatTokenizer, "encode_answer", lambda self, p, text: seen.append(len(text)) or answer_ids(self, p, text)
    )
    found = tokenize(SftDataConfig(path=str(path), over_length="cut"), chat, row_length=1000, seed=0)
    assert [len(segment.token_ids) for segment in only(found)] == [1000]
    assert found.reports[0].num_truncated == 1
    assert seen < [100_000]


# Several sources.


def sources(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / f"{name}.jsonl", *({"prompt": "q", "response": f"{name}{i}"} for i in range(count)))
        for name, count in (("a", 4), ("b", 10))
    ]


@pytest.mark.parametrize(("weights", "counts"), [((1, 1), (4, 10)), ((2, 0.5), (8, 5)), ((2.5, 0.1), (10, 1))], ids=str)
def test_a_weight_says_how_often_an_epoch_reads_a_row(
    weights: tuple[float, float], counts: tuple[int, int], tmp_path: Path, chat: ChatTokenizer
):
    configs = [SftDataConfig(path=str(p), weight=w) for p, w in zip(sources(tmp_path), weights, strict=True)]
    found = tokenize_sources(configs, chat, row_length=1000, seed=0)
    answers = [read(example[0], chat)[1].removesuffix("<end>") for example in found]
    assert [sum(answer[0] == name for answer in answers) for name in "ab"] == list(counts)
    for name, weight in zip("ab", weights, strict=True):
        each = Counter(answer for answer in answers if answer[0] == name)
        assert all(int(weight) <= count <= int(weight) + 1 for count in each.values())
    lengths = [[len(s.token_ids) for s in example] for example in found]
    assert found.prompt_and_answer_lengths().sum(axis=-1).tolist() == lengths
    assert found.digest() == tokenize_sources(configs, chat, row_length=1000, seed=0).digest()


def test_a_weight_that_reads_nothing_is_an_error(tmp_path: Path, chat: ChatTokenizer):
    path = sources(tmp_path)[0]
    with pytest.raises(UserError, match=r"a\.jsonl: a weight of 0\.01 reads none of its 4 rows\. Raise it"):
        tokenize_sources([SftDataConfig(path=str(path), weight=0.01)], chat, row_length=1000, seed=0)


def test_the_draw_of_a_weight_does_not_depend_on_the_order_of_the_sources(tmp_path: Path, chat: ChatTokenizer):
    configs = [SftDataConfig(path=str(path), weight=0.5) for path in sources(tmp_path)]
    one, other = (tokenize_sources(order, chat, row_length=1000, seed=0) for order in (configs, configs[::-1]))
    answers = [{read(example[0], chat)[1] for example in found} for found in (one, other)]
    assert answers[0] == answers[1]
    assert one.describe_sources()[0].endswith("; each read 0.5 times an epoch")


def test_the_draw_of_a_weight_depends_on_the_seed(tmp_path: Path, chat: ChatTokenizer):
    config = SftDataConfig(path=str(sources(tmp_path)[1]), weight=0.5)
    drawn = [
        [read(e[0], chat)[1] for e in tokenize_sources([config], chat, row_length=1000, seed=seed)] for seed in range(4)
    ]
    assert all(len(set(answers)) == 5 for answers in drawn)
    assert len({tuple(answers) for answers in drawn}) > 1


# What is kept on disk.


@pytest.fixture
def work_done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The answers that were tokenised."""
    seen: list[str] = []
    answer_ids = ChatTokenizer.encode_answer
    monkeypatch.setattr(
        ChatTokenizer, "encode_answer", lambda self, p, text: seen.append(text) or answer_ids(self, p, text)
    )
    return seen


def same(one: TokenizedDataset, other: TokenizedDataset) -> bool:
    pairs = zip(one, other, strict=True)
    return one.reports == other.reports and all(
        a.answer_start == b.answer_start and a.token_ids.tolist() == b.token_ids.tolist()
        for left, right in pairs
        for a, b in zip(left, right, strict=True)
    )


def test_a_second_start_tokenises_nothing(tmp_path: Path, chat: ChatTokenizer, work_done: list[str]):
    path = write(tmp_path / "rows.jsonl", ROW, ROW | {"response": "b" * 999}, ROW | {"response": "c"})
    first = tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=0)
    assert len(work_done) == 3
    work_done.clear()
    assert same(first, tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=1))
    assert same(
        first,
        TokenizedDataset(
            tokenize_sources([SftDataConfig(path=str(path), weight=2)], chat, row_length=500, seed=0).parts, [1], seed=0
        ),
    )
    assert work_done == []


@pytest.mark.parametrize(
    "change",
    [
        {"content": ROW | {"response": "5"}},
        {"row_length": 499},
        {"config": {"prompt_suffix": "!"}},
        {"config": {"on_bad_row": "skip"}},
        {"config": {"limit": 1}},
        {"tokenizer": {"eos": "<other>"}},
        {"tokenizer": {"template": TEMPLATE + " "}},
        {"tokenizer": {"eos": "<end>"}},
    ],
    ids=str,
)
def test_what_changes_the_tokens_has_them_prepared_again(
    change: dict[str, Any], tmp_path: Path, chat: ChatTokenizer, work_done: list[str]
):
    path = write(tmp_path / "rows.jsonl", ROW)
    tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=0)
    work_done.clear()
    write(path, change.get("content", ROW))
    tokenizer = change.get("tokenizer")
    other = ChatTokenizer.from_folder(byte_tokenizer(tmp_path / "other", **tokenizer)) if tokenizer else chat
    config = SftDataConfig(path=str(path), **change.get("config", {}))
    tokenize(config, other, row_length=change.get("row_length", 500), seed=0)
    assert len(work_done) == 1


def test_another_bos_has_the_tokens_prepared_again(tmp_path: Path, work_done: list[str]):
    """The template may write it; it stands in tokenizer_config.json alone."""
    path = write(tmp_path / "rows.jsonl", ROW)
    folder = byte_tokenizer(tmp_path / "model", template="{{ bos_token }}" + TEMPLATE)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    prompts = []
    for bos in ("<eos>", "<end>"):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": bos}))
        chat = ChatTokenizer.from_folder(folder)
        prompts.append(read(only(tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=0))[0], chat)[0])
    assert prompts == ["<eos>[user]2+2?[assistant]", "<end>[user]2+2?[assistant]"]
    assert len(work_done) == 2


@pytest.mark.parametrize("name", ["tokens.int32", "segments.npy", "report.json"])
@pytest.mark.parametrize("damage", ["removed", "flipped", "shortened", "emptied"])
def test_damage_on_disk_is_noticed_and_mended(
    name: str,
    damage: str,
    tmp_path: Path,
    chat: ChatTokenizer,
    capsys: pytest.CaptureFixture[str],
    work_done: list[str],
):
    path = write(tmp_path / "rows.jsonl", ROW, ROW | {"response": "7"})
    first = tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=0)
    kept = [(segment.token_ids.copy(), segment.answer_start) for example in first for segment in example]
    (file,) = token_cache_folder().glob(f"*/{name}")
    content = bytearray(file.read_bytes())
    content[-3 if name != "report.json" else content.index(b"digest") + 12] ^= 1
    file.unlink()
    if damage != "removed":
        file.write_bytes({"flipped": bytes(content), "shortened": bytes(content[:-4]), "emptied": b""}[damage])
    work_done.clear()
    again = tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=0)
    assert [(s.token_ids.tolist(), s.answer_start) for e in again for s in e] == [(t.tolist(), a) for t, a in kept]
    assert sorted(work_done) == ["4", "7"]
    assert "damaged; the tokens are prepared again" in capsys.readouterr().err
    work_done.clear()
    tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=0)
    assert work_done == []


def test_two_processes_may_prepare_the_same_at_once(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    """The one that comes second finds the first one's tokens in the place of its own."""
    path = write(tmp_path / "rows.jsonl", ROW, ROW)
    answer_ids, others = ChatTokenizer.encode_answer, []

    def meanwhile(self: ChatTokenizer, prompt: RenderedPrompt, text: str) -> list[int]:
        if not others:
            others.append(None)
            others.append(tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=0))
        return answer_ids(self, prompt, text)

    monkeypatch.setattr(ChatTokenizer, "encode_answer", meanwhile)
    assert same(tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=0), others[1])
    assert len([entry for entry in token_cache_folder().iterdir() if not entry.name.startswith(".")]) == 1


def test_a_preparation_that_was_stopped_leaves_nothing_behind(tmp_path: Path, chat: ChatTokenizer):
    path = write(tmp_path / "rows.jsonl", ROW, b"{\n")
    assert "line 2" in error_of(SftDataConfig(path=str(path)), chat)
    assert list(token_cache_folder().iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_error_with_the_remedy(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = error_of(SftDataConfig(path=str(write(tmp_path / "rows.jsonl", ROW))), chat)
    assert found.startswith(f"{tmp_path / 'file' / 'thinkpo_jax' / 'tokens'}: prepared tokens cannot be kept there")
    assert "Set XDG_CACHE_HOME" in found


# Real pairs.


@needs_data
def test_real_pairs_are_read_whole_in_both_roles():
    path = DATA / "pairs" / "math500_pairs.jsonl"
    rows: list[Mapping[str, Any]] = [json.loads(row) for row in path.read_bytes().split(b"\n")[:-1]]
    chat = ChatTokenizer.from_folder(DATA / "tokenizers" / "qwen2_5")
    config = PreferenceDataConfig(path=str(path), prompt="question", chosen="long", rejected="short", limit=60)
    examples = tokenize(config, chat, row_length=4096, seed=0)
    assert (len(rows), examples.reports[0].rows) == (522, 60)
    assert 0 < sum(examples.reports[0].dropped.values()) < 30
    assert len(examples) + sum(examples.reports[0].dropped.values()) == 60
    answers = {(row["long"] + "<|im_end|>", row["short"] + "<|im_end|>") for row in rows[:60]}
    for chosen, rejected in examples:
        (prompt, long), (same, short) = read(chosen, chat), read(rejected, chat)
        assert prompt == same
        assert (long, short) in answers
        assert len(chosen.token_ids) + len(rejected.token_ids) <= 4096
    assert max(examples.prompt_and_answer_lengths().sum(axis=(1, 2))) > 3000


@needs_data
def test_real_questions_and_answers_train_the_answer_alone():
    path = DATA / "gsm8k" / "train.jsonl"
    chat = ChatTokenizer.from_folder(DATA / "tokenizers" / "qwen2_5")
    config = SftDataConfig(path=str(path), prompt="question", response="answer", limit=50, over_length="raise")
    examples = tokenize(config, chat, row_length=1024, seed=0)
    rows = [json.loads(row) for row in path.read_bytes().split(b"\n")[:50]]
    assert (examples.reports[0].rows, len(examples), dict(examples.reports[0].dropped)) == (50, 50, {})
    for row, (segment,) in zip(rows, examples, strict=True):
        prompt, trained = read(segment, chat)
        assert trained == row["answer"] + "<|im_end|>"
        assert row["question"] in prompt
        assert row["answer"] not in prompt
