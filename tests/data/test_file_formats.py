"""JSON arrays and CSV files give their records. Every unreadable file or record is an error that names its place."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.data_files import error_of, read

from thinkpo_jax.data import file_formats
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.readers import DataSourceConfig, RecordError, iterate_records, iterate_valid_records
from thinkpo_jax.data.record_formats import SftDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.config import UserError

TEXTS = [
    "plain",
    "",
    'quotes " and "" more',
    "commas, and\ttabs; too",
    "two\nlines\r\nthree",
    "\u2028\u00fc\U0001f600",
    "0",
]


def located(path: Path) -> list[tuple[str, Any]]:
    """Returns the records of a file, or the reasons of their errors, by the end of their location."""
    return [
        (location.removeprefix(f"{path}, "), record.reason if isinstance(record, RecordError) else record)
        for location, record in iterate_records(DataSourceConfig(path=str(path)), seed=0)
    ]


# JSON.


def test_a_bad_element_of_a_json_array_is_an_error_of_that_element_only(tmp_path: Path, chat: ChatTokenizer):
    path = tmp_path / "rows.json"
    good = '{"prompt": "q", "response": "a"}'
    path.write_bytes(b'\xef\xbb\xbf \n[%b,\r\n{"a": {"b": 1, "b": 2}} ,3,null\t,%b]\n' % (good.encode(), good.encode()))
    assert located(path) == [
        ("element 1", json.loads(good)),
        ("element 2", "not JSON"),
        ("element 3", "not an object"),
        ("element 4", "not an object"),
        ("element 5", json.loads(good)),
    ]
    (report,) = tokenize_sources(
        [SftDataConfig(path=str(path), on_bad_row="skip")], chat, row_length=99, seed=0
    ).reports
    assert (report.num_used, report.dropped) == (2, {"not JSON": 1, "not an object": 2})
    key_twice = f"{path}, element 2: cannot be read as JSON: the key 'b' is given twice."
    assert report.first_error_by_reason["not JSON"] == key_twice


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"a": 1}, {"a": 2}', ", element 2: not valid JSON: expected ',' or ']', at line 1, column 20."),
        (b'[{"a": 1},\n {"a": 2} {"a": 3}]', ", element 2: not valid JSON: expected ',' or ']', at line 2, column 11."),
        (b'[{"a": 1},\n {"a": }]', ", element 2: not valid JSON: Expecting value, at line 2, column 8."),
        (b'[{"a": 1},]', ", element 2: not valid JSON: Expecting value, at line 1, column 11."),
        (b"[", ", element 1: not valid JSON: Expecting value"),
        (b'[{"a": %b}]' % (b"1" * 5000), ", element 1: cannot be read as JSON: Exceeds the limit"),
        (b'[{"a": 1}] [{"a": 2}]', ": expected the end of the file after the list, found '[{\"a\": 2}]'."),
        (b'{"v": 1,\n "data": [{"a": 1}]}', ": expected a list of objects, found one object with the keys v, data."),
        (b'[{"a": "\xff"}]', ": not valid UTF-8: "),
        (json.dumps([{"a": 1}]).encode("utf-16"), ": not valid UTF-8: "),
        (b"", ": there are no rows, expected at least one."),
        (b" [ ] ", ": there are no rows, expected at least one."),
        (b"3", ", line 1: expected a JSON object, found int."),
        (b'{"a": 1}\n{"a"\n', ", line 2: not valid JSON: "),
    ],
)  # fmt: skip
def test_a_json_file_that_is_no_list_of_objects_is_an_error_with_its_place(
    content: bytes, expected: str, tmp_path: Path
):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(iterate_valid_records(DataSourceConfig(path=str(path)), seed=0))
    assert str(error.value).startswith(f"{path}{expected}")


# CSV and TSV.


@pytest.mark.parametrize(
    ("name", "dialect"), [("rows.csv", "excel"), ("rows.TSV", "excel-tab"), ("rows.csv.gz", "unix")]
)
def test_a_csv_file_gives_every_text_as_it_was_written_with_the_line_where_its_row_begins(
    name: str, dialect: str, tmp_path: Path
):
    records = [{"prompt": f"{i}\0", "response": text} for i, text in enumerate(TEXTS)]
    with (tmp_path / "rows").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "response"], dialect=dialect)
        writer.writeheader()
        writer.writerows(records)
    content = (tmp_path / "rows").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    lines = [2, 3, 4, 5, 6, 9, 10]  # the fifth text has three lines
    assert located(tmp_path / name) == [(f"line {n}", record) for n, record in zip(lines, records, strict=True)]


def test_a_bad_row_of_a_csv_file_is_an_error_of_that_row_only(tmp_path: Path, chat: ChatTokenizer):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,response\r\n\r\nq,a\r\nq\r\n"q\n2",a,b\nq,\xfc\nq,\n,\nq,a')
    good = {"prompt": "q", "response": "a"}
    assert located(path) == [
        ("line 3", good),
        ("line 4", "ragged row"),
        ("line 5", "ragged row"),
        ("line 7", "not UTF-8"),
        ("line 8", {"prompt": "q", "response": ""}),
        ("line 9", {"prompt": "", "response": ""}),
        ("line 10", good),
    ]
    (report,) = tokenize_sources(
        [SftDataConfig(path=str(path), on_bad_row="skip")], chat, row_length=99, seed=0
    ).reports
    assert (report.num_used, report.dropped) == (2, {"ragged row": 2, "not UTF-8": 1, "no text": 2})
    ragged = f"{path}, line 4: expected 2 cells (prompt, response), found 1."
    assert report.first_error_by_reason["ragged row"].startswith(ragged)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"prompt;response\nq;a\n", ": the header is one column, 'prompt;response'. Expected "),
        (b"prompt\tresponse\nq\ta\n", ": the header is one column, 'prompt\\tresponse'. Expected ',' between columns"),
        (b"prompt,a,a\nq,b,c\n", ": the column 'a' is given twice."),
        ("prompt,response\nq,a\n".encode("utf-16"), ": the header is not valid UTF-8."),
        (b'prompt,response\nq,a\nq,"b\nq,c\n', ", line 3: not valid CSV: unexpected end of data."),
        (b'prompt,response\nq,"a" b\nq,c\n', ", line 2: not valid CSV: ',' expected after '\"'."),
        (b"prompt,response\n", ": there are no rows, expected at least one."),
        (b"", ": there are no rows, expected at least one."),
        (b"prompt,response\nq,%b\n" % (b"a" * 500), ", line 2: longer than 300 bytes."),
        (b'prompt,response\nq,"%b"\n' % (b"a\n" * 200), ", line 2: not valid CSV: field larger than field limit"),
    ],
)  # fmt: skip
def test_a_csv_file_that_is_no_table_is_an_error_with_its_place(
    content: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(file_formats, "MAX_LINE_BYTES", 300)
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    assert error_of(path).startswith(f"{path}{expected}")


def test_a_long_cell_is_read(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text(f"response\n{'a' * 1_000_000}\n")
    assert read(path) == [{"response": "a" * 1_000_000}]


def test_a_damaged_gz_file_of_csv_is_an_error_after_its_last_good_row(tmp_path: Path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"prompt,response\nq,a\n")[:-1])
    assert error_of(path).startswith(f"{path}, after line 2: cannot be read: Compressed file ended")
