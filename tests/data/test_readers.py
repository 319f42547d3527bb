"""Every form in which rows are kept gives the same rows; what cannot be read is an error with its name."""

import gzip
import io
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer

from thinkpo_jax.data import readers as rows_module
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.readers import iterate_records, iterate_valid_records, source_fingerprint
from thinkpo_jax.data.record_formats import SftDataConfig
from thinkpo_jax.data.sources import DataSourceConfig, RecordError
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.config import UserError, parse_config

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"{i}?",
        "response": f"{i}\u2028\0\U0001f600\n",
        "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "so" * i}][: 1 + i % 2],
        "more": None if i % 3 else [[i], []],
    }
    for i in range(150)
]
OTHER: list[dict[str, Any]] = [{"prompt": "other?", "response": "other", "messages": None, "more": None}]
CONFIGS = """---
configs:
- config_name: one
  data_files:
  - {split: train, path: one/*.EXT}
  - {split: test, path: one_test/*.EXT}
- config_name: two
  data_files: two/*.EXT
---
Rows.
"""

Write = Callable[[Path, list[dict[str, Any]]], None]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(rows))


def write_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    half = len(rows) // 2
    path.write_bytes(gzip.compress(jsonl(rows[:half])) + gzip.compress(jsonl(rows[half:])))  # as `cat a.gz b.gz` does


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(path, batch_size=60)


def write_saved(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(path, num_shards=min(3, len(rows)))


def write_saved_splits(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"test": Dataset.from_list(OTHER), "train": Dataset.from_list(rows)}).save_to_disk(path)


def write_hub(path: Path, rows: list[dict[str, Any]], extension: str = "jsonl") -> None:
    """A data set as it lies on the Hub: two subsets, of which one has two files and two splits."""
    write: Write = write_jsonl if extension == "jsonl" else write_parquet
    write(path / "one" / f"a.{extension}", rows[:70])
    write(path / "one" / f"b.{extension}", rows[70:])
    write(path / "one_test" / f"a.{extension}", OTHER)
    write(path / "two" / f"a.{extension}", OTHER)
    (path / "README.md").write_text(CONFIGS.replace("EXT", extension), encoding="utf-8")


def write_hub_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    write_hub(path, rows, "parquet")


def read(path: Path | str, **options: Any) -> list[Any]:
    """The rows of a source, without their places."""
    return [row for _, row in iterate_records(DataSourceConfig(path=str(path), **options), seed=0)]


def error_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def texts(*contents: bytes) -> Any:
    """An Arrow column of texts, whether or not they are any."""
    import pyarrow

    binary = pyarrow.array(contents, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(contents), binary.buffers())


FORMS: dict[str, tuple[str, Write, dict[str, Any]]] = {
    "jsonl": ("rows.jsonl", write_jsonl, {}),
    "gz": ("rows.jsonl.gz", write_gz, {}),
    "parquet": ("rows.parquet", write_parquet, {}),
    "saved": ("rows", write_saved, {}),
    "saved splits": ("rows", write_saved_splits, {}),
    "one split of a saved folder": ("rows/train", lambda path, rows: write_saved_splits(path.parent, rows), {}),
    "Hub, JSONL": ("rows", write_hub, {"subset": "one"}),
    "Hub, JSONL, streamed": ("rows", write_hub, {"subset": "one", "streaming": True}),
    "Hub, Parquet": ("rows", write_hub_parquet, {"subset": "one"}),
    "Hub, Parquet, streamed": ("rows", write_hub_parquet, {"subset": "one", "streaming": True}),
    "plain folder": ("rows", lambda path, rows: write_jsonl(path / "train.jsonl", rows), {}),
    "plain folder of Arrow": ("rows", lambda path, rows: write_arrow(path / "train.arrow", rows), {}),
}


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=64)


each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_folder(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


# The same rows from every form.


@each_form
def test_every_form_gives_the_same_rows_in_their_order_with_their_places(form: str, tmp_path: Path):
    name, write, options = FORMS[form]
    write(tmp_path / name, ROWS)
    source = DataSourceConfig(path=str(tmp_path / name), **options)
    found = list(iterate_valid_records(source, seed=0))
    assert [row for _, row in found] == ROWS
    first, word = (1, "line") if "jsonl" in name else (0, "row")
    assert [place for place, _ in found] == [f"{tmp_path / name}, {word} {i}" for i in range(first, first + len(ROWS))]


@each_form
def test_limit_is_the_number_of_rows_from_the_first(form: str, tmp_path: Path):
    name, write, options = FORMS[form]
    write(tmp_path / name, ROWS)
    for limit in (1, 2, len(ROWS) - 1, len(ROWS), len(ROWS) + 1):
        assert read(tmp_path / name, limit=limit, **options) == ROWS[:limit]


@each_form
def test_identity_changes_with_the_content_and_with_nothing_else(form: str, tmp_path: Path):
    name, write, options = FORMS[form]
    source = DataSourceConfig(path=str(tmp_path / name), **options)

    def written(rows: list[dict[str, Any]]) -> str:
        shutil.rmtree(tmp_path / "rows", ignore_errors=True)
        write(tmp_path / name, rows)
        return source_fingerprint(source, seed=0)

    def files() -> list[Path]:
        return [path for path in tmp_path.rglob("*") if path.is_file()]

    before = written(ROWS)
    for path in files():
        os.utime(path, ns=(1, 1))
    assert source_fingerprint(source, seed=1) == before
    assert list(iterate_valid_records(source, seed=0))
    assert source_fingerprint(source, seed=0) == before  # reading leaves nothing behind
    assert written([*ROWS[:-1], ROWS[-1] | {"response": "else"}]) != before
    assert written([*ROWS[1:], ROWS[0]]) != before


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_hub, write_hub_parquet], ids=["JSONL", "Parquet"])
def test_subset_and_split_choose_within_a_folder_and_those_that_are_not_there_are_named(
    write: Write, streaming: bool, tmp_path: Path
):
    write(tmp_path / "rows", ROWS)
    assert read(tmp_path / "rows", subset="one", split="test", streaming=streaming) == OTHER
    assert read(tmp_path / "rows", subset="two", streaming=streaming) == OTHER
    for options, known in (
        ({"subset": "one", "split": "dev"}, "['train', 'test']"),
        ({"subset": "three"}, "['one', 'two']"),
        ({}, "['one', 'two']"),
    ):
        assert known in error_of(tmp_path / "rows", streaming=streaming, **options)
    assert "Leave it out" in error_of(tmp_path / "rows", subset="one", revision="main", streaming=streaming)


def test_what_a_saved_folder_does_not_have_cannot_be_chosen_in_it(tmp_path: Path):
    write_saved_splits(tmp_path / "splits", ROWS)
    write_saved(tmp_path / "whole", ROWS)
    assert read(tmp_path / "splits", split="test") == OTHER
    found = error_of(tmp_path / "splits", split="tests")
    assert found == f"{tmp_path / 'splits'}: no split 'tests' (did you mean test?); there are: ['test', 'train']."
    assert "no split 'test'; the folder holds one data set" in error_of(tmp_path / "whole", split="test")
    for name in ("splits", "whole"):
        assert "no subset 'one'" in error_of(tmp_path / name, subset="one")
        assert "Leave `streaming` out" in error_of(tmp_path / name, streaming=True)
        assert "`revision`" in error_of(tmp_path / name, revision="main")


def test_a_folder_that_changes_without_another_time_gives_its_new_rows(tmp_path: Path):
    path = tmp_path / "rows" / "train.jsonl"
    for text in ("a", "b"):
        write_jsonl(path, [{"prompt": "q", "response": text}])
        os.utime(path, ns=(10**18, 10**18))
        assert [row["response"] for row in read(tmp_path / "rows")] == [text]


def test_another_split_is_prepared_anew(tmp_path: Path, chat: ChatTokenizer):
    write_saved_splits(tmp_path / "rows", ROWS)
    config = SftDataConfig(path=str(tmp_path / "rows"), response="response")
    counts = [
        len(tokenize_sources([config.model_copy(update={"split": split})], chat, row_length=1000, seed=0))
        for split in ("train", "test", "train")
    ]
    assert counts == [len(ROWS), len(OTHER), len(ROWS)]


# Files of lines.


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n \t\n{"a": 2}\n{\n{"a": 3}'  # the last one without its end
    (tmp_path / "rows.jsonl").write_bytes(content)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        found = list(iterate_records(DataSourceConfig(path=str(tmp_path / name)), seed=0))
        assert [place.rpartition(" ")[2] for place, _ in found] == ["1", "4", "5", "6"]
        assert [row for _, row in found if not isinstance(row, RecordError)] == [{"a": 1}, {"a": 2}, {"a": 3}]
        with pytest.raises(RecordError, match=rf"{name}, line 5: not valid JSON: "):
            list(iterate_valid_records(DataSourceConfig(path=str(tmp_path / name)), seed=0))


WHOLE = gzip.compress(jsonl(ROWS[:3]), mtime=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (WHOLE[:-1], ", after line 3: cannot be read: Compressed file ended"),
        (WHOLE[:-9], "cannot be read: Compressed file ended"),
        (WHOLE[:5], ": cannot be read: Compressed file ended"),
        (WHOLE + b"more", ", after line 3: cannot be read: Not a gzipped file"),
        (WHOLE + WHOLE[:-1], ", after line 6: cannot be read: Compressed file ended"),
        (WHOLE[:-8] + bytes(4) + WHOLE[-4:], ", after line 3: cannot be read: CRC check failed"),
        (jsonl(ROWS), ": cannot be read: Not a gzipped file"),
        (b"", ": there are no rows"),
    ],
    ids=["no last byte", "no end", "no head", "more", "half a member", "checksum", "JSONL", "empty"],
)
def test_a_gz_file_that_is_not_whole_is_an_error_after_its_last_good_line(content: bytes, said: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    assert said in error_of(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file_without_line_ends_does_not_fill_the_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 100)
    content = b'{"a": 1}\n' + b'{"a": "' + b"x" * 10**6
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert error_of(tmp_path / name).endswith(", line 2: longer than 100 bytes; expected one row per line.")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows"])
def test_what_is_neither_file_nor_folder_is_an_error_at_once(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    assert ("found another kind of file" if name == "rows" else "found no plain file") in error_of(tmp_path / name)
    with pytest.raises(UserError, match="expected a file"):
        source_fingerprint(DataSourceConfig(path=str(tmp_path / name)), seed=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows"])
def test_what_may_not_be_read_is_an_error_with_its_name(name: str, tmp_path: Path):
    path = tmp_path / name
    path.mkdir() if name == "rows" else path.write_bytes(b"1")
    path.chmod(0)
    assert "Permission denied" in error_of(path)
    with pytest.raises(UserError, match="Permission denied"):
        source_fingerprint(DataSourceConfig(path=str(path)), seed=0)


@pytest.mark.parametrize("method", ["is_dir", "iterdir", "open"])
def test_an_error_of_the_file_system_is_an_error_with_the_name(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "rows" / "train.jsonl", ROWS)
    path = tmp_path / ("rows" if method == "iterdir" else "rows.jsonl")

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, method, refuse)
    assert "Permission denied" in error_of(path)
    with pytest.raises(UserError, match="Permission denied"):
        source_fingerprint(DataSourceConfig(path=str(path)), seed=0)


def test_a_file_that_goes_away_is_read_to_its_end_or_is_an_error(tmp_path: Path):
    for name, write in (("rows.jsonl", write_jsonl), ("rows.jsonl.gz", write_gz), ("rows.parquet", write_parquet)):
        path = tmp_path / name
        write(path, ROWS)
        found = iterate_records(DataSourceConfig(path=str(path)), seed=0)
        first = next(found)[1]
        path.unlink()
        assert [first, *(row for _, row in found)] == ROWS
        assert "there is no such file" in error_of(path)


def test_one_row_of_fifty_megabytes_is_read_and_counted_as_too_long_at_once(tmp_path: Path, chat: ChatTokenizer):
    path = tmp_path / "rows.jsonl"
    long = 50_000_000
    with path.open("wb") as file:
        file.write(b'{"prompt": "q", "response": "' + b"a" * long + b'"}\n' + jsonl(ROWS[:2]))
    tracemalloc.start()
    lengths = [len(row["response"]) for row in read(path, limit=1)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [long]
    assert peak < 6 * long
    start = time.process_time()
    config = SftDataConfig(path=str(path), response="response")
    (report,) = tokenize_sources([config], chat, row_length=1000, seed=0).reports
    assert time.process_time() - start < 5
    assert (report.rows, report.num_used, report.dropped) == (3, 2, {"longer than row_length 1000": 1})
    with pytest.raises(UserError, match=r"line 1: .* do not fit row_length 1000"):
        tokenize_sources([config.model_copy(update={"over_length": "raise"})], chat, row_length=1000, seed=0)


def test_the_message_of_a_bad_row_can_be_printed_and_is_no_copy_of_the_row(tmp_path: Path, chat: ChatTokenizer):
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
        lambda content: jsonl(ROWS),
        gzip.compress,
    ],
    ids=["empty", "no last byte", "half", "a byte less", "zero between", "zero", "magic alone", "JSONL", "gz"],
)
def test_a_parquet_file_that_is_not_whole_is_an_error_with_its_name(damage: Callable[[bytes], bytes], tmp_path: Path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, ROWS)
    path.write_bytes(damage(path.read_bytes()))
    assert error_of(path).startswith(f"{path}: cannot be read as Parquet, after ")


def test_a_parquet_page_that_does_not_match_its_checksum_is_an_error(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"response": ["the answer"]})
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(table, path, write_page_checksum=True, **plain)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"the answer", b"the Answer"))
    assert "CRC" in error_of(path)


@pytest.mark.parametrize("kind", ["parquet", "saved", "folder"])
def test_a_text_that_is_not_utf8_makes_a_bad_row_and_leaves_the_others(kind: str, tmp_path: Path, chat: ChatTokenizer):
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    table = pyarrow.table({"prompt": texts(b"q", b"q", b"q"), "response": texts(b"a", b"\xff", b"c")})
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


def test_a_value_that_python_does_not_have_makes_a_bad_row(tmp_path: Path):
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
    assert "the column 'r' is there twice" in error_of(tmp_path / "rows.parquet")


# Folders.


def arrow_file(folder: Path) -> Path:
    return sorted(folder.rglob("*.arrow"))[-1]


def cut_between_batches(path: Path) -> None:
    """Leaves whole batches of the stream: what `datasets` would read as fewer rows."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        reader = pyarrow.ipc.open_stream(file)
        reader.read_next_batch()
        end = file.tell()
    content = path.read_bytes()
    path.write_bytes(content[:end])
    assert 0 < pyarrow.ipc.open_stream(io.BytesIO(content[:end])).read_all().num_rows < len(ROWS)


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b"text"),
        cut_between_batches,
    ],
    ids=["gone", "empty", "half", "no end", "text", "between batches"],
)
def test_an_arrow_folder_with_a_missing_or_short_file_is_an_error(damage: Callable[[Path], Any], tmp_path: Path):
    for name, write in (("saved", write_saved), ("plain", FORMS["plain folder of Arrow"][1])):
        folder = tmp_path / name
        write(folder, ROWS)
        assert read(folder) == ROWS
        if name == "saved" and damage is cut_between_batches:
            continue  # its files have one batch each
        damage(arrow_file(folder))
        assert ".arrow" in error_of(folder) or not any(folder.iterdir())


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "3"])
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_saved_folder_with_a_damaged_description_is_an_error(name: str, content: str, tmp_path: Path):
    (write_saved if name == "state.json" else write_saved_splits)(tmp_path / "rows", ROWS)
    (tmp_path / "rows" / name).write_text(content)
    assert ": cannot be read as a data set: " in error_of(tmp_path / "rows")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"train.jsonl": jsonl(ROWS) + b'{"prompt":\n' + jsonl(ROWS)},
        {"train.jsonl": jsonl(ROWS) + b"[1]\n"},
        {"train.jsonl": b'{"a": 1, "a": 2}\n'},
        {"train-0.jsonl": jsonl(ROWS), "train-1.jsonl": jsonl(OTHER * 2).replace(b"prompt", b"question")},
        {"train.jsonl.gz": WHOLE[:-9]},
        {"train.jsonl.gz": WHOLE + b"more"},
        {"train.parquet": b"PAR1" + bytes(100) + b"PAR1"},
        {"train.jsonl": jsonl(ROWS), "README.md": b"---\nconfigs: [\n---\n"},
        {"train.jsonl": jsonl(ROWS), "README.md": b"---\nconfigs: \xff\n---\n"},
        {"notes.bin": b"1"},
        {"test.jsonl": jsonl(ROWS)},
    ],
    ids=[
        "malformed line", "list", "key twice", "other columns", "short gz", "long gz", "broken Parquet", "broken YAML",
        "README not UTF-8", "no data", "no such split",
    ],
)  # fmt: skip
def test_a_folder_that_datasets_cannot_read_as_a_whole_is_an_error_with_its_name(
    files: dict[str, bytes], streaming: bool, tmp_path: Path
):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = error_of(folder, streaming=streaming)
    assert ": cannot be read as a data set: " in found
    assert "\n" not in found


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_reads_nothing_outside_itself(streaming: bool, tmp_path: Path):
    """Nothing would tell that those rows have changed."""
    write_jsonl(tmp_path / "other.jsonl", OTHER)
    (tmp_path / "rows").mkdir()
    for name in ("../other.jsonl", str(tmp_path / "other.jsonl")):
        readme = f"---\nconfigs:\n- config_name: one\n  data_files: {name}\n---\n"
        (tmp_path / "rows" / "README.md").write_text(readme)
        assert f"names {tmp_path / 'other.jsonl'}, which is not in" in error_of(tmp_path / "rows", streaming=streaming)
    (tmp_path / "rows" / "README.md").unlink()
    (tmp_path / "rows" / "train.jsonl").symlink_to(tmp_path / "other.jsonl")  # as the cache of the Hub has them
    assert read(tmp_path / "rows", streaming=streaming)[0]["prompt"] == OTHER[0]["prompt"]


def test_files_of_a_folder_that_are_not_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        write_jsonl(tmp_path / "rows" / name, ROWS)
    assert len(read(tmp_path / "rows")) == 2 * len(ROWS)
    write_hub(tmp_path / "hub", ROWS)
    assert read(tmp_path / "hub", subset="two") == OTHER
    assert "warning" not in capsys.readouterr().err
    for name in ("more.jsonl", "train.parquet"):
        write_jsonl(tmp_path / "rows" / name, ROWS)
        assert len(read(tmp_path / "rows")) == 2 * len(ROWS)
        found = capsys.readouterr().err
        assert f"warning: {tmp_path / 'rows'}: 1 files are in no split and are not read" in found
        assert f"such as {tmp_path / 'rows' / name}" in found
        (tmp_path / "rows" / name).unlink()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("data", [{}, {"train.jsonl": jsonl(ROWS)}], ids=["alone", "beside data"])
def test_no_code_of_a_data_set_is_run(data: dict[str, bytes], streaming: bool, tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, content in data.items():
        (folder / name).write_bytes(content)
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "scripts are no longer supported" in error_of(folder, streaming=streaming)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["json", "text", "parquet", "pandas", "imagefolder", "generator"])
def test_the_name_of_a_format_does_not_read_the_working_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert "found the name of a format" in error_of(name)
    with pytest.raises(UserError, match="the name of a format"):
        source_fingerprint(DataSourceConfig(path=name), seed=0)


# What a source is.


@pytest.mark.parametrize(
    ("raw", "said"),
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
def test_a_source_that_cannot_be_is_an_error_before_it_is_read(raw: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        parse_config(DataSourceConfig, raw, source="run.yaml")
    assert str(error.value).startswith("run.yaml: ")
    assert said in str(error.value)
