"""Reads the records of one data file: JSONL, a JSON array, CSV, TSV or Parquet."""

import codecs
import contextlib
import csv
import gzip
import json
import re
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from thinkpo_jax.runtime.config import UserError

MAX_MESSAGE_CHARACTERS = 2000  # a message may quote keys of a record, and some keys have millions of characters
MAX_LINE_BYTES = 2**28  # a file without line ends is not JSONL, and must not fill the memory
PARQUET_BATCH_ROWS = 64
DELIMITERS = {"csv": ",", "tsv": "\t"}
BLANKS = re.compile(r"[ \t\r\n]*")  # of JSON

Record = Mapping[str, Any]
LocatedRecord = tuple[str, "Record | RecordError"]  # the location is for messages: "rows.jsonl, line 7"


class RecordError(UserError):
    """One record cannot be used. `reason` is the kind of problem, and the message says where and what it is."""

    def __init__(self, reason: str, message: str) -> None:
        message = message.encode(errors="backslashreplace").decode()  # a quoted key may hold a lone surrogate
        shortened = f"{message[:MAX_MESSAGE_CHARACTERS]} ..."
        super().__init__(shortened if len(message) > MAX_MESSAGE_CHARACTERS else message)
        self.reason = reason


def read_data_file(path: Path) -> Iterator[LocatedRecord]:
    """Yields the records of a file. Its suffix gives the format. A record that cannot be read is a `RecordError`.

    Raises `UserError` if the file cannot be read, or what follows a damaged place is not known to be a record.
    """
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    read = {"jsonl": _read_jsonl, "json": _read_json}.get(kind, _read_csv)
    after = ""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for location, record in read(path, file):
                after = f", after {location.rpartition(', ')[2]}"
                yield location, record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}{after}: cannot be read: {error}. Write the file again.") from None


def _read_lines(path: Path, file: BufferedIOBase) -> Iterator[tuple[str, bytes]]:
    """Yields the location and the bytes of each line. Lines end at \\n only. A text may hold others, such as U+2028."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
        if len(line) == MAX_LINE_BYTES:
            problem = f"longer than {MAX_LINE_BYTES} bytes. Expected one row per line"
            raise UserError(f"{path}, line {number}: {problem}.")
        yield f"{path}, line {number}", line


def _read_jsonl(path: Path, file: BufferedIOBase) -> Iterator[LocatedRecord]:
    for location, line in _read_lines(path, file):
        if line.strip():
            yield location, _parse_json_object(line, location)


def _parse_json_object(line: bytes, location: str) -> Record | RecordError:
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{location}: not valid UTF-8: {error}. Convert the file to UTF-8.")
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg}, at character {error.pos + 1}. Expected one object per line."
        return RecordError("not JSON", f"{location}: {problem}")
    except (ValueError, RecursionError) as error:  # such as a number with thousands of digits, or thousands of brackets
        return RecordError("not JSON", f"{location}: cannot be read as JSON: {error}.")
    return _as_record(record, location)


def _as_record(value: Any, location: str) -> Record | RecordError:
    if not isinstance(value, dict):
        return RecordError("not an object", f"{location}: expected a JSON object, found {type(value).__name__}.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"the key {statistics.mode(key for key, _ in pairs)!r} is given twice")
    return fields


def _read_json(path: Path, file: BufferedIOBase) -> Iterator[LocatedRecord]:
    """Yields the elements of a list, or the lines of a file that is JSONL in truth. The file is read as a whole."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8: {error}. Convert the file to UTF-8.") from None
    if text.lstrip().startswith("["):
        yield from _read_json_array(path, text)
        return
    whole: Any = None  # of JSONL with several lines
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(text)
    if isinstance(whole, dict):
        problem = f"expected a list of objects, found one object with the keys {', '.join(whole):.200}"
        remedy = "Write only the list of rows to the file, or name it .jsonl if each line is a row"
        raise UserError(f"{path}: {problem}. {remedy}.")
    file.seek(0)
    yield from _read_jsonl(path, file)


def _read_json_array(path: Path, text: str) -> Iterator[LocatedRecord]:
    number, position = 0, _skip_blanks(text, text.index("[") + 1)
    separator = text[position : position + 1]
    try:
        while separator != "]":  # `]` right after `[`: an empty list
            number += 1
            record, position = _decode_element(text, position, f"{path}, element {number}")
            yield f"{path}, element {number}", record
            position = _skip_blanks(text, position)
            separator = text[position : position + 1]
            if separator == ",":
                position = _skip_blanks(text, position + 1)
            elif separator != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
    except json.JSONDecodeError as error:
        place = f"at line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}, element {number}: not valid JSON: {error.msg}, {place}. Correct the file.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, element {number}: cannot be read as JSON: {error}. Correct the file.") from None
    if rest := text[position + 1 :].strip():
        problem = f"expected the end of the file after the list, found {rest[:30]!r}"
        raise UserError(f"{path}: {problem}. Write one list, or name the file .jsonl if each line is a row.")


def _skip_blanks(text: str, position: int) -> int:
    match = BLANKS.match(text, position)
    assert match is not None
    return match.end()


def _decode_element(text: str, position: int, location: str) -> tuple[Record | RecordError, int]:
    """Returns an element of a list and where it ends. Raises `ValueError` if the end is not known."""
    try:
        value, end = json.JSONDecoder(object_pairs_hook=_unique_keys).raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # the syntax is right, but a key is given twice
        _, end = json.JSONDecoder().raw_decode(text, position)
        return RecordError("not JSON", f"{location}: cannot be read as JSON: {error}."), end
    return _as_record(value, location), end


def _read_csv(path: Path, file: BufferedIOBase) -> Iterator[LocatedRecord]:
    """Yields the rows below the header. A row may span lines, so its location is that of its first line."""
    delimiter = DELIMITERS[path.name.lower().removesuffix(".gz").rpartition(".")[2]]
    csv.field_size_limit(MAX_LINE_BYTES)  # the default is shorter than some thoughts
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    # A byte that is not UTF-8 becomes a lone surrogate, so it is an error of its row only.
    lines = (line.decode(errors="surrogateescape") for _, line in _read_lines(path, file))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    num_lines = 0
    try:
        for cells in reader:
            location, num_lines = f"{path}, line {num_lines + 1}", reader.line_num
            if header is None and cells:
                header = _checked_header(path, cells, delimiter)
            elif header is not None and cells:  # a blank line has no cells
                yield location, _parse_cells(header, cells, location)
    except csv.Error as error:
        problem = f"not valid CSV: {error}. Put quotes around texts with line breaks, and double the quotes in them"
        raise UserError(f"{path}, line {num_lines + 1}: {problem}.") from None


def _checked_header(path: Path, header: list[str], delimiter: str) -> list[str]:
    try:
        "".join(header).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: the header is not valid UTF-8. Save the file as CSV in UTF-8.") from None
    if len(set(header)) < len(header):
        raise UserError(f"{path}: the column {statistics.mode(header)!r} is given twice. Give each its own name.")
    found = next((other for other in ";\t," if other != delimiter and other in header[0]), None)
    if len(header) == 1 and found is not None:
        problem = (
            f"the header is one column, {header[0]!r:.80}. Expected {delimiter!r} between columns, found {found!r}"
        )
        remedy = {"\t": "Name the file .tsv", ",": "Name the file .csv"}.get(found, "Save the file with commas")
        raise UserError(f"{path}: {problem}. {remedy}.")
    return header


def _parse_cells(header: list[str], cells: list[str], location: str) -> Record | RecordError:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return RecordError("not UTF-8", f"{location}: not valid UTF-8. Save the file as CSV in UTF-8.")
    if len(cells) != len(header):
        problem = f"expected {len(header)} cells ({', '.join(header)}), found {len(cells)}"
        return RecordError("ragged row", f"{location}: {problem}. Put quotes around texts that hold a separator.")
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[LocatedRecord]:
    import pyarrow
    from pyarrow import parquet

    num_read = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            if len(set(columns)) < len(columns):
                raise ValueError(f"the column {statistics.mode(columns)!r} is given twice")
            num_in_groups = sum(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for i in range(len(batch)):
                    location = f"{path}, row {num_read}"
                    yield location, read_record(lambda i=i, batch=batch: batch.slice(i, 1).to_pylist()[0], location)
                    num_read += 1
            if not num_read == num_in_groups == file.metadata.num_rows:
                raise ValueError(f"expected {file.metadata.num_rows} rows, {num_in_groups} in its groups")
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:  # errors of the reader on damaged bytes
        reason = str(error).strip().rstrip(".")
        raise UserError(f"{path}: cannot be read as Parquet after {num_read} rows: {reason}. Write it again.") from None


def read_record(read: Callable[[], Record], location: str) -> Record | RecordError:
    """Returns the record that `read` returns, or a `RecordError` if Python cannot represent one of its values."""
    try:
        return read()
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{location}: holds a text that is not valid UTF-8: {error}.")
    except (ValueError, OverflowError) as error:  # such as a date in the year 5,000,000, or an unknown time zone
        problem = f"holds a value that cannot be read: {str(error).rstrip('.')}. Leave the column out."
        return RecordError("unreadable value", f"{location}: {problem}")
