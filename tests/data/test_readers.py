"""Every file format gives the same records, and every unreadable file or record is an error that names it."""

import gzip
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.data_files import (
    FORMATS,
    OTHER_RECORDS,
    RECORDS,
    THREE_RECORDS_GZ,
    error_of,
    jsonl,
    read,
    write_gz,
    write_jsonl,
    write_parquet,
    write_saved_splits,
)

from thinkpo_jax.data import file_formats
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.readers import (
    DataSourceConfig,
    RecordError,
    iterate_records,
    iterate_valid_records,
    source_fingerprint,
)
from thinkpo_jax.data.record_formats import SftDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.config import UserError, parse_config

each_format = pytest.mark.parametrize("format_name", FORMATS)


# The same records from every format.


@each_format
def test_every_format_gives_the_same_records_in_order_with_their_locations(format_name: str, tmp_path: Path):
    name, write, options = FORMATS[format_name]
    write(tmp_path / name, RECORDS)
    source = DataSourceConfig(path=str(tmp_path / name), **options)
    locations, records = zip(*iterate_valid_records(source, seed=0), strict=True)
    assert list(records) == RECORDS
    places = {"rows.jsonl": "line", "rows.jsonl.gz": "line", "rows.JSON": "line"}
    places |= {"rows.json": "element", "rows.json.gz": "element"} if (tmp_path / name).is_file() else {}
    word = places.get(name, "row")
    first = 0 if word == "row" else 1
    assert list(locations) == [f"{tmp_path / name}, {word} {i}" for i in range(first, first + len(RECORDS))]


@each_format
def test_limit_reads_that_many_records_from_the_start(format_name: str, tmp_path: Path):
    name, write, options = FORMATS[format_name]
    write(tmp_path / name, RECORDS)
    for limit in (1, 2, len(RECORDS) - 1, len(RECORDS), len(RECORDS) + 1):
        assert read(tmp_path / name, limit=limit, **options) == RECORDS[:limit]


@each_format
def test_the_fingerprint_changes_with_the_content_and_with_nothing_else(format_name: str, tmp_path: Path):
    name, write, options = FORMATS[format_name]
    source = DataSourceConfig(path=str(tmp_path / name), **options)

    def fingerprint_of(records: list[dict[str, Any]]) -> str:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        write(tmp_path / name, records)
        return source_fingerprint(source, seed=0)

    before = fingerprint_of(RECORDS)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(1, 1))
    assert source_fingerprint(source, seed=1) == before
    assert list(iterate_valid_records(source, seed=0))
    assert source_fingerprint(source, seed=0) == before  # reading leaves nothing behind
    assert fingerprint_of([*RECORDS[:-1], RECORDS[-1] | {"response": "else"}]) != before
    assert fingerprint_of([*RECORDS[1:], RECORDS[0]]) != before


def test_each_split_has_its_own_entry_in_the_token_cache(tmp_path: Path, chat: ChatTokenizer):
    write_saved_splits(tmp_path / "rows", RECORDS)
    config = SftDataConfig(path=str(tmp_path / "rows"), response="response")
    counts = [
        len(tokenize_sources([config.model_copy(update={"split": split})], chat, row_length=1000, seed=0))
        for split in ("train", "test", "train")
    ]
    assert counts == [len(RECORDS), len(OTHER_RECORDS), len(RECORDS)]


@each_format
def test_no_character_of_a_folder_changes_what_is_read(format_name: str, tmp_path: Path):
    """`datasets` reads some paths as patterns. Then they match nothing, or the files of another folder."""
    name, write, options = FORMATS[format_name]
    for folder, records in (("plain", RECORDS), ("aXb", OTHER_RECORDS)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, records)
    before = tmp_path / "plain"  # `datasets` cannot write to the others either
    for odd_name in ("a?b", "[1] *%20#{x}", "a::b\n\u00fc"):
        before = before.rename(tmp_path / odd_name)
        assert read(before / name, **options) == RECORDS


# JSONL files, and errors of the file system.


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n \t\n{"a": 2}\n{\n{"a": 3}'  # no newline at the end
    (tmp_path / "rows.jsonl").write_bytes(content)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        locations, records = zip(*iterate_records(DataSourceConfig(path=str(tmp_path / name)), seed=0), strict=True)
        assert [location.rpartition(" ")[2] for location in locations] == ["1", "4", "5", "6"]
        assert [record for record in records if not isinstance(record, RecordError)] == [{"a": 1}, {"a": 2}, {"a": 3}]
        with pytest.raises(RecordError, match=rf"{name}, line 5: not valid JSON: "):
            list(iterate_valid_records(DataSourceConfig(path=str(tmp_path / name)), seed=0))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (THREE_RECORDS_GZ[:-1], ", after line 3: cannot be read: Compressed file ended"),
        (THREE_RECORDS_GZ[:-9], "cannot be read: Compressed file ended"),
        (THREE_RECORDS_GZ[:5], ": cannot be read: Compressed file ended"),
        (THREE_RECORDS_GZ + b"more", ", after line 3: cannot be read: Not a gzipped file"),
        (THREE_RECORDS_GZ + THREE_RECORDS_GZ[:-1], ", after line 6: cannot be read: Compressed file ended"),
        (THREE_RECORDS_GZ[:-8] + bytes(4) + THREE_RECORDS_GZ[-4:], ", after line 3: cannot be read: CRC check failed"),
        (jsonl(RECORDS), ": cannot be read: Not a gzipped file"),
        (b"", ": there are no rows"),
    ],
    ids=["no last byte", "no end", "no head", "more", "half a member", "checksum", "JSONL", "empty"],
)
def test_a_damaged_gz_file_is_an_error_after_its_last_good_line(content: bytes, expected: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    assert expected in error_of(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file_without_line_ends_does_not_fill_the_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_formats, "MAX_LINE_BYTES", 100)
    content = b'{"a": 1}\n' + b'{"a": "' + b"x" * 10**6
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert error_of(tmp_path / name).endswith(", line 2: longer than 100 bytes. Expected one row per line.")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows"])
def test_a_path_that_is_neither_file_nor_folder_is_an_error_at_once(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / name)  # reading it would wait forever
    assert "not a regular file" in error_of(tmp_path / name)
    with pytest.raises(UserError, match="expected a file"):
        source_fingerprint(DataSourceConfig(path=str(tmp_path / name)), seed=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows"])
def test_a_path_without_read_permission_is_an_error_with_its_name(name: str, tmp_path: Path):
    path = tmp_path / name
    path.mkdir() if name == "rows" else path.write_bytes(b"1")
    path.chmod(0)
    assert "Permission denied" in error_of(path)
    with pytest.raises(UserError, match="Permission denied"):
        source_fingerprint(DataSourceConfig(path=str(path)), seed=0)


@pytest.mark.parametrize("method", ["is_dir", "iterdir", "open"])
def test_an_error_of_the_file_system_names_the_path(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_jsonl(tmp_path / "rows.jsonl", RECORDS)
    write_jsonl(tmp_path / "rows" / "train.jsonl", RECORDS)
    path = tmp_path / ("rows" if method == "iterdir" else "rows.jsonl")

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, method, refuse)
    assert "Permission denied" in error_of(path)
    with pytest.raises(UserError, match="Permission denied"):
        source_fingerprint(DataSourceConfig(path=str(path)), seed=0)


def test_a_file_deleted_during_reading_is_read_to_its_end(tmp_path: Path):
    for name, write in (("rows.jsonl", write_jsonl), ("rows.jsonl.gz", write_gz), ("rows.parquet", write_parquet)):
        path = tmp_path / name
        write(path, RECORDS)
        located_records = iterate_records(DataSourceConfig(path=str(path)), seed=0)
        _, first = next(located_records)
        path.unlink()
        assert [first, *(record for _, record in located_records)] == RECORDS
        assert "there is no such file" in error_of(path)


def test_a_record_of_fifty_megabytes_is_quickly_counted_as_too_long(tmp_path: Path, chat: ChatTokenizer):
    path = tmp_path / "rows.jsonl"
    num_characters = 50_000_000
    with path.open("wb") as file:
        file.write(b'{"prompt": "q", "response": "' + b"a" * num_characters + b'"}\n' + jsonl(RECORDS[:2]))
    tracemalloc.start()
    lengths = [len(record["response"]) for record in read(path, limit=1)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [num_characters]
    assert peak < 6 * num_characters
    start = time.process_time()
    config = SftDataConfig(path=str(path), response="response")
    (report,) = tokenize_sources([config], chat, row_length=1000, seed=0).reports
    assert time.process_time() - start < 5
    assert (report.rows, report.num_used, report.dropped) == (3, 2, {"longer than row_length 1000": 1})
    with pytest.raises(UserError, match=r"line 1: .* do not fit row_length 1000"):
        tokenize_sources([config.model_copy(update={"over_length": "raise"})], chat, row_length=1000, seed=0)


def test_the_message_of_a_bad_record_is_printable_and_short(tmp_path: Path, chat: ChatTokenizer):
    path = tmp_path / "rows.jsonl"
    for content in (
        b'{"\\ud83d": 1}',
        json.dumps({"k" * 10**6: 1}).encode(),
        b'{"%s": 1, "%s": 2}' % ((b"k" * 10**6,) * 2),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            tokenize_sources([SftDataConfig(path=str(path), response="response")], chat, row_length=100, seed=0)
        assert str(error.value).startswith(f"{path}, line 1: ")
        assert len(str(error.value).encode()) < 3000


# Parquet.


def text_column(*contents: bytes) -> Any:
    """Returns an Arrow column of texts. Arrow does not check that the bytes are UTF-8."""
    import pyarrow

    binary = pyarrow.array(contents, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(contents), binary.buffers())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:300] + content[301:],
        lambda content: b"PAR1" + bytes(len(content) - 8) + b"PAR1",
        lambda content: bytes(1000),
        lambda content: b"PAR1PAR1",
        lambda content: jsonl(RECORDS),
        gzip.compress,
    ],
    ids=["empty", "no last byte", "half", "a byte less", "zero between", "zero", "magic alone", "JSONL", "gz"],
)
def test_a_damaged_parquet_file_is_an_error_with_its_name(damage: Callable[[bytes], bytes], tmp_path: Path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, RECORDS)
    path.write_bytes(damage(path.read_bytes()))
    assert error_of(path).startswith(f"{path}: cannot be read as Parquet after ")


def test_a_parquet_page_that_does_not_match_its_checksum_is_an_error(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"response": ["the answer"]})
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(table, path, write_page_checksum=True, **options)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"the answer", b"the Answer"))
    assert "CRC" in error_of(path)


@pytest.mark.parametrize("kind", ["parquet", "saved", "folder"])
def test_a_text_that_is_not_utf8_is_an_error_of_its_record_only(kind: str, tmp_path: Path, chat: ChatTokenizer):
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    table = pyarrow.table({"prompt": text_column(b"q", b"q", b"q"), "response": text_column(b"a", b"\xff", b"c")})
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows")
    if kind == "saved":
        Dataset(table).save_to_disk(path)
    else:
        file = path if kind == "parquet" else path / "train.parquet"
        file.parent.mkdir(exist_ok=True)
        parquet.write_table(table, file)
    first, bad, last = read(path)
    assert (first, last) == ({"prompt": "q", "response": "a"}, {"prompt": "q", "response": "c"})
    assert isinstance(bad, RecordError)
    assert (bad.reason, str(bad).startswith(f"{path}, row 1: ")) == ("not UTF-8", True)
    skipping = SftDataConfig(path=str(path), on_bad_row="skip")
    (report,) = tokenize_sources([skipping], chat, row_length=100, seed=0).reports
    assert (report.rows, report.num_used, report.dropped) == (3, 2, {"not UTF-8": 1})
    with pytest.raises(UserError, match=r"row 1: holds a text that is not valid UTF-8"):
        tokenize_sources([SftDataConfig(path=str(path))], chat, row_length=100, seed=0)


def test_a_value_that_python_cannot_represent_is_an_error_of_its_record_only(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    dates = pyarrow.array([1, 2**31 - 1, 3], pyarrow.int32()).cast(pyarrow.date32())
    parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], "date": dates}), tmp_path / "rows.parquet")
    first, bad, last = read(tmp_path / "rows.parquet")
    assert (first["prompt"], last["prompt"]) == ("a", "c")
    assert isinstance(bad, RecordError)
    assert str(bad).startswith(f"{tmp_path / 'rows.parquet'}, row 1: holds a value that cannot be read: ")


def test_a_column_given_twice_is_an_error(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table([pyarrow.array(["q"]), pyarrow.array(["a"]), pyarrow.array(["b"])], ["p", "r", "r"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert "the column 'r' is given twice" in error_of(tmp_path / "rows.parquet")


# Configs of sources.


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, "give either `path` or `generate`"),
        ({"path": ""}, "path: expected a path or a name, found an empty text"),
        ({"path": "a\0b"}, "path: cannot be a path"),
        ({"path": "x" * 300}, "path: cannot be a path"),
        ({"path": "rows.jsonl", "split": "test"}, "a file has none of them"),
        ({"path": "rows.jsonl.gz", "subset": "one"}, "a file has none of them"),
        ({"path": "rows.parquet", "streaming": True}, "a file has none of them"),
        ({"path": "rows.parquet", "revision": "main"}, "a file has none of them"),
        ({"path": "rows.jsonl", "limit": 0}, "limit: "),
        ({"path": "rows.jsonl", "limit": 1.5}, "limit: "),
        ({"path": "rows.jsonl", "spilt": "x"}, "unknown key spilt (did you mean split?)"),
        ({"path": 3}, "path: "),
    ],
    ids=str,
)
def test_an_invalid_source_is_an_error_before_it_is_read(raw: dict[str, Any], expected: str):
    with pytest.raises(UserError) as error:
        parse_config(DataSourceConfig, raw, source="run.yaml")
    assert str(error.value).startswith("run.yaml: ")
    assert expected in str(error.value)
