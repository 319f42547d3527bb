"""A folder or a data set gives all of its records, and every damaged or unusable one is an error that names it."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.data_files import (
    FORMATS,
    OTHER_RECORDS,
    RECORDS,
    THREE_RECORDS_GZ,
    Write,
    error_of,
    jsonl,
    read,
    write_hub,
    write_hub_parquet,
    write_jsonl,
    write_saved,
    write_saved_splits,
)

from thinkpo_jax.data.readers import DataSourceConfig, source_fingerprint
from thinkpo_jax.runtime.config import UserError

# Subsets and splits.


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_hub, write_hub_parquet], ids=["JSONL", "Parquet"])
def test_subset_and_split_select_within_a_folder_and_an_error_lists_those_that_exist(
    write: Write, streaming: bool, tmp_path: Path
):
    write(tmp_path / "rows", RECORDS)
    assert read(tmp_path / "rows", subset="one", split="test", streaming=streaming) == OTHER_RECORDS
    assert read(tmp_path / "rows", subset="two", streaming=streaming) == OTHER_RECORDS
    for options, known in (
        ({"subset": "one", "split": "dev"}, "['train', 'test']"),
        ({"subset": "three"}, "['one', 'two']"),
        ({}, "['one', 'two']"),
    ):
        assert known in error_of(tmp_path / "rows", streaming=streaming, **options)
    assert "Leave it out" in error_of(tmp_path / "rows", subset="one", revision="main", streaming=streaming)


def test_keys_that_do_not_apply_to_a_saved_folder_are_errors(tmp_path: Path):
    write_saved_splits(tmp_path / "splits", RECORDS)
    write_saved(tmp_path / "single", RECORDS)
    assert read(tmp_path / "splits", split="test") == OTHER_RECORDS
    folder = tmp_path / "splits"
    expected = f"{folder}: no split 'tests' (did you mean test?). The splits are: ['test', 'train']."
    assert error_of(folder, split="tests") == expected
    assert "no split 'test'. The splits are: ['train']." in error_of(tmp_path / "single", split="test")
    for name in ("splits", "single"):
        assert "no subset 'one'" in error_of(tmp_path / name, subset="one")
        assert "Leave `streaming` out" in error_of(tmp_path / name, streaming=True)
        assert "`revision`" in error_of(tmp_path / name, revision="main")


def test_changed_files_with_the_same_modification_time_are_read_again(tmp_path: Path):
    path = tmp_path / "rows" / "train.jsonl"
    for text in ("a", "b"):
        write_jsonl(path, [{"prompt": "q", "response": text}])
        os.utime(path, ns=(10**18, 10**18))
        assert [record["response"] for record in read(tmp_path / "rows")] == [text]


def fingerprint_of(path: Path) -> str:
    return source_fingerprint(DataSourceConfig(path=str(path)), seed=0)


def test_a_link_has_the_fingerprint_of_what_it_links_to(tmp_path: Path):
    write_jsonl(tmp_path / "rows" / "train.jsonl", RECORDS)
    for name in ("rows", "rows/train.jsonl"):
        link = tmp_path / f"link to {Path(name).name}"
        link.symlink_to(tmp_path / name)
        assert read(link) == RECORDS
        assert fingerprint_of(link) == fingerprint_of(tmp_path / name)


def test_the_fingerprint_covers_a_linked_folder_inside_a_folder(tmp_path: Path):
    write_saved_splits(tmp_path / "rows", RECORDS)
    train = (tmp_path / "rows" / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "rows" / "train").symlink_to(train)
    before = fingerprint_of(tmp_path / "rows")
    assert read(tmp_path / "rows") == RECORDS
    write_saved(train, OTHER_RECORDS)
    assert read(tmp_path / "rows") == OTHER_RECORDS
    assert fingerprint_of(tmp_path / "rows") != before


def test_an_error_in_a_folder_with_an_odd_name_names_that_folder(tmp_path: Path):
    write_jsonl(tmp_path / "[a]" / "train.jsonl", RECORDS)
    (tmp_path / "[a]" / "train-1.arrow").write_bytes(b"cut")
    assert error_of(tmp_path / "[a]").startswith(f"{tmp_path / '[a]' / 'train-1.arrow'}: not an Arrow file")


def test_an_odd_name_inside_a_folder_is_named_as_the_likely_reason(tmp_path: Path):
    write_jsonl(tmp_path / "rows" / "a::b.jsonl", RECORDS)
    assert "may not read the name 'a::b.jsonl'. Rename it" in error_of(tmp_path / "rows")


# Damaged folders.


def arrow_file(folder: Path) -> Path:
    return sorted(folder.rglob("*.arrow"))[-1]


def cut_between_batches(path: Path) -> None:
    """Cuts a stream after its first batch. `datasets` would read it as fewer records."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        reader = pyarrow.ipc.open_stream(file)
        reader.read_next_batch()
        end = file.tell()
    content = path.read_bytes()
    path.write_bytes(content[:end])
    assert 0 < pyarrow.ipc.open_stream(io.BytesIO(content[:end])).read_all().num_rows < len(RECORDS)


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
    for name, write in (("saved", write_saved), ("plain", FORMATS["plain folder of Arrow"][1])):
        folder = tmp_path / name
        write(folder, RECORDS)
        assert read(folder) == RECORDS
        if name == "saved" and damage is cut_between_batches:
            continue  # each of its files has one batch
        damage(arrow_file(folder))
        assert ".arrow" in error_of(folder) or not any(folder.iterdir())


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "3"])
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_saved_folder_with_a_damaged_description_is_an_error(name: str, content: str, tmp_path: Path):
    (write_saved if name == "state.json" else write_saved_splits)(tmp_path / "rows", RECORDS)
    (tmp_path / "rows" / name).write_text(content)
    assert ": cannot be read as a data set: " in error_of(tmp_path / "rows")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"train.jsonl": jsonl(RECORDS) + b'{"prompt":\n' + jsonl(RECORDS)},
        {"train.jsonl": jsonl(RECORDS) + b"[1]\n"},
        {"train.jsonl": b'{"a": 1, "a": 2}\n'},
        {"train-0.jsonl": jsonl(RECORDS), "train-1.jsonl": jsonl(OTHER_RECORDS * 2).replace(b"prompt", b"question")},
        {"train.jsonl.gz": THREE_RECORDS_GZ[:-9]},
        {"train.jsonl.gz": THREE_RECORDS_GZ + b"more"},
        {"train.parquet": b"PAR1" + bytes(100) + b"PAR1"},
        {"train.jsonl": jsonl(RECORDS), "README.md": b"---\nconfigs: [\n---\n"},
        {"train.jsonl": jsonl(RECORDS), "README.md": b"---\nconfigs: \xff\n---\n"},
        {"notes.bin": b"1"},
        {"test.jsonl": jsonl(RECORDS)},
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
    message = error_of(folder, streaming=streaming)
    assert ": cannot be read as a data set: " in message
    assert "\n" not in message


# What a folder reads.


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_reads_nothing_outside_itself(streaming: bool, tmp_path: Path):
    """The fingerprint of the folder would not change with files outside it."""
    write_jsonl(tmp_path / "other.jsonl", OTHER_RECORDS)
    (tmp_path / "rows").mkdir()
    for name in ("../other.jsonl", str(tmp_path / "other.jsonl")):
        readme = f"---\nconfigs:\n- config_name: one\n  data_files: {name}\n---\n"
        (tmp_path / "rows" / "README.md").write_text(readme)
        assert f"names {tmp_path / 'other.jsonl'}, which is not in" in error_of(tmp_path / "rows", streaming=streaming)
    (tmp_path / "rows" / "README.md").unlink()
    (tmp_path / "rows" / "train.jsonl").symlink_to(tmp_path / "other.jsonl")  # the cache of the Hub has such links
    assert read(tmp_path / "rows", streaming=streaming)[0]["prompt"] == OTHER_RECORDS[0]["prompt"]


def test_a_warning_names_the_files_of_a_folder_that_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        write_jsonl(tmp_path / "rows" / name, RECORDS)
    assert len(read(tmp_path / "rows")) == 2 * len(RECORDS)
    write_hub(tmp_path / "hub", RECORDS)
    assert read(tmp_path / "hub", subset="two") == OTHER_RECORDS
    write_jsonl(tmp_path / "rows" / "config.json", RECORDS)  # `datasets` never reads this name
    assert len(read(tmp_path / "rows")) == 2 * len(RECORDS)
    assert "warning" not in capsys.readouterr().err
    for name in ("more.jsonl", "train.parquet", "more.CSV"):
        write_jsonl(tmp_path / "rows" / name, RECORDS)
        assert len(read(tmp_path / "rows")) == 2 * len(RECORDS)
        warning = capsys.readouterr().err
        assert f"warning: {tmp_path / 'rows'}: 1 files are in no split and are not read" in warning
        assert f"such as {tmp_path / 'rows' / name}" in warning
        (tmp_path / "rows" / name).unlink()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("data", [{}, {"train.jsonl": jsonl(RECORDS)}], ids=["alone", "beside data"])
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
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    assert "found the name of a format" in error_of(name)
    with pytest.raises(UserError, match="the name of a format"):
        source_fingerprint(DataSourceConfig(path=name), seed=0)
