"""A file or a row that cannot be read is an error that names the file and the line."""

from pathlib import Path

import pytest
from support.tokenized import ROW, decode_first_segments, error_message, json_line, tokenize, turns, write_rows

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.readers import DataSourceConfig, iterate_records
from thinkpo_jax.data.record_formats import SftDataConfig
from thinkpo_jax.runtime.config import UserError

LINE_SEPARATOR = "\u2028"
EXPECTED = (
    "expected a file (.jsonl, .json, .csv, .tsv, all also with .gz, or .parquet), a folder or a Hub id (owner/name)"
)


@pytest.mark.parametrize(
    ("bad_line", "problem"),
    [
        (b'{"prompt": "q",\n', "not valid JSON: "),
        (b'{"prompt": "q"} {"prompt": "q"}\n', "not valid JSON: Extra data, at character 17."),
        (b"[1, 2]\n", "expected a JSON object, found list."),
        (b"null\n", "expected a JSON object, found NoneType."),
        (b'{"prompt": "\xff", "response": "a"}\n', "not valid UTF-8: "),
        (b'{"prompt": ' + b"1" * 5000 + b"}\n", "cannot be read as JSON: "),
        (
            json_line({"promt": "q", "response": "a"}),
            "no field 'prompt' (did you mean promt?). The row has: promt, response.",
        ),
        (json_line({"prompt": None, "response": "a"}), "prompt: expected a text, found null."),
        (json_line({"prompt": 3, "response": "a"}), "prompt: expected a text, found int."),
        (json_line({"prompt": "q", "response": ""}), "response: expected a text, found an empty text."),
        (json_line({"prompt": "q", "response": " \n"}), "response: expected a text, found an empty text."),
        (b'{"prompt": "q", "response": "ab\\ud83d"}\n', "response: not a text: '\\ud83d' at character 3 is half"),
        (json_line({"prompt": "q", "response": "a<end>b"}), "the answer holds '<end>', special to this tokenizer."),
        (json_line({"prompt": [], "response": "a"}), "prompt: expected a list of messages, found an empty list."),
        (
            json_line({"prompt": turns("q", "a"), "response": "a"}),
            "prompt: the turn before the answer is of the assistant",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_bad_row_stops_the_run_with_its_file_and_line(
    bad_line: bytes, problem: str, tmp_path: Path, chat: ChatTokenizer
):
    path = write_rows(tmp_path / "rows.jsonl", ROW, b"\n", b"  \n", ROW, bad_line, ROW)  # blank lines count as lines
    message = error_message(SftDataConfig(path=str(path)), chat)
    assert message.startswith(f"{path}, line 5")
    assert problem in message


@pytest.mark.parametrize("content", [b"", b"\n \n\n"], ids=["empty", "blank"])
def test_a_file_without_rows_is_an_error_with_its_name(content: bytes, tmp_path: Path, chat: ChatTokenizer):
    path = write_rows(tmp_path / "rows.jsonl", content)
    assert error_message(SftDataConfig(path=str(path)), chat) == f"{path}: there are no rows, expected at least one."


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet"])
def test_a_missing_file_is_an_error_with_its_name(name: str, tmp_path: Path, chat: ChatTokenizer):
    message = error_message(SftDataConfig(path=str(tmp_path / name)), chat)
    assert message.startswith(f"{tmp_path / name}: there is no such file, {EXPECTED}.")


@pytest.mark.parametrize("name", ["rows", "rows.jsonl", "rows.parquet"])
def test_an_empty_folder_is_an_error_with_its_name(name: str, tmp_path: Path, chat: ChatTokenizer):
    (tmp_path / name).mkdir()
    message = error_message(SftDataConfig(path=str(tmp_path / name)), chat)
    assert message == f"{tmp_path / name}: found an empty folder, {EXPECTED}."


def test_a_local_folder_takes_precedence_over_a_hub_data_set_of_the_same_name(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert error_message(SftDataConfig(path="owner/name"), chat) == f"owner/name: found an empty folder, {EXPECTED}."
    (tmp_path / "owner" / "name" / "other.bin").write_bytes(b"1")
    message = error_message(SftDataConfig(path="owner/name"), chat)
    assert message.startswith("owner/name: cannot be read as a data set: ")


def test_a_file_with_another_suffix_is_an_error_with_its_name(tmp_path: Path, chat: ChatTokenizer):
    path = write_rows(tmp_path / "rows.txt", ROW)
    message = error_message(SftDataConfig(path=str(path)), chat)
    assert message == f"{path}: found another kind of file, {EXPECTED}."


def test_an_error_of_a_missing_relative_path_names_the_folder_that_was_searched(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for absent in ("absent.jsonl", "rows/absent.txt", "a/b/c", "../rows"):
        message = error_message(SftDataConfig(path=absent), chat)
        assert message == f"{absent}: there is no such file in {tmp_path}, {EXPECTED}."
    absent = str(tmp_path / "rows")
    assert error_message(SftDataConfig(path=absent), chat) == f"{absent}: there is no such file, {EXPECTED}."
    assert f"There is no folder {tmp_path / 'owner/name'}. " in error_message(SftDataConfig(path="owner/name"), chat)


def test_a_hub_data_set_that_cannot_be_loaded_is_an_error_with_its_name(chat: ChatTokenizer):
    # Tests run offline. A dot in the name does not make it a file.
    for name in ("owner/name", "owner/name-v1.5"):
        message = error_message(SftDataConfig(path=name), chat)
        assert message.startswith(f"{name}: cannot be read as a data set: ")
        assert "Without a network" in message


def test_only_a_newline_ends_a_line(tmp_path: Path, chat: ChatTokenizer):
    texts = [f"a{LINE_SEPARATOR}b\u2029c\u0085d\x0be\x0cf", "second"]
    path = write_rows(tmp_path / "rows.jsonl", *(ROW | {"response": text} for text in texts))
    assert LINE_SEPARATOR.encode() in path.read_bytes()  # it is not escaped
    examples = tokenize(SftDataConfig(path=str(path)), chat)
    assert [answer for _, answer in decode_first_segments(examples, chat)] == [f"{text}<end>" for text in texts]


def test_a_byte_order_mark_and_windows_line_ends_are_not_part_of_a_text(tmp_path: Path, chat: ChatTokenizer):
    content = b"\xef\xbb\xbf" + json_line(ROW).replace(b"\n", b"\r\n") * 2
    examples = tokenize(SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", content))), chat)
    assert [answer for _, answer in decode_first_segments(examples, chat)] == ["4<end>", "4<end>"]


def test_limit_bounds_the_number_of_rows_that_are_read(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", ROW, ROW, b"not JSON\n")
    rows = list(iterate_records(DataSourceConfig(path=str(path), limit=2), seed=0))
    assert rows == [(f"{path}, line 1", ROW), (f"{path}, line 2", ROW)]


def test_parquet_gives_the_same_examples_as_jsonl(tmp_path: Path, chat: ChatTokenizer):
    from datasets import Dataset

    rows = [ROW | {"conversation": turns(f"q{i}", "a" * i)} for i in range(1, 4)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    write_rows(tmp_path / "rows.jsonl", *rows)
    for messages in ("conversation", None):
        from_parquet, from_jsonl = (
            tokenize(SftDataConfig(path=str(tmp_path / f"rows.{kind}"), messages=messages), chat)
            for kind in ("parquet", "jsonl")
        )
        assert from_parquet.reports[0].rows == from_jsonl.reports[0].rows == 3
        assert decode_first_segments(from_parquet, chat) == decode_first_segments(from_jsonl, chat)


def test_a_path_is_never_read_as_a_pattern(tmp_path: Path, chat: ChatTokenizer):
    from datasets import Dataset

    for name, count in (("a*b.parquet", 2), ("aXb.parquet", 3), ("a[1].parquet", 4)):
        Dataset.from_list([ROW] * count).to_parquet(tmp_path / name)
    for name, count in (("a*b.parquet", 2), ("a[1].parquet", 4)):
        examples = tokenize(SftDataConfig(path=str(tmp_path / name)), chat, row_length=512)
        assert examples.reports[0].rows == count


def test_a_key_given_twice_in_a_row_is_an_error(tmp_path: Path, chat: ChatTokenizer):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "response": "c"}\n')
    with pytest.raises(UserError, match="line 1: cannot be read as JSON: the key 'response' is given twice"):
        tokenize(SftDataConfig(path=str(tmp_path / "rows.jsonl")), chat, row_length=512)


def test_errors_of_parquet_files_name_the_file_and_the_row(tmp_path: Path, chat: ChatTokenizer):
    from datasets import Dataset

    Dataset.from_list([ROW, ROW | {"response": None}]).to_parquet(tmp_path / "rows.parquet")
    message = error_message(SftDataConfig(path=str(tmp_path / "rows.parquet")), chat)
    assert message == f"{tmp_path / 'rows.parquet'}, row 1, response: expected a text, found null."
    broken = write_rows(tmp_path / "broken.parquet", ROW)
    assert error_message(SftDataConfig(path=str(broken)), chat).startswith(f"{broken}: ")


@pytest.mark.parametrize(("path", "kind"), [("d/*.jsonl", "Patterns"), ("https://a.b/c.jsonl", "URLs")])
def test_a_pattern_and_a_url_are_refused_as_such(path: str, kind: str, chat: ChatTokenizer):
    assert f"({kind} are not read. Give a file, a folder or a list of sources)" in error_message(
        SftDataConfig(path=path), chat
    )
