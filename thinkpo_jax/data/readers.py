"""Where do rows come from? Files, folders, data sets of the Hub and generators, one row at a time."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import pkgutil
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from thinkpo_jax.data.sources import DATA_FILE_SUFFIXES, DataSourceConfig, Record, RecordError, has_data_file_suffix
from thinkpo_jax.runtime.config import UserError, did_you_mean
from thinkpo_jax.runtime.console import log_warning

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

UNSUPPORTED_FILE_SUFFIXES = (
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".gz",
    ".zst",
    ".arrow",
)  # other dots belong to a Hub id: owner/v1.5
SAVE_TO_DISK_MARKERS = (
    "state.json",
    "dataset_dict.json",
)  # what Dataset.save_to_disk and DatasetDict.save_to_disk write
MAX_LINE_BYTES = 2**28  # bytes; a file without line ends is no JSONL, and must not fill the memory

PARQUET_ROWS = 64
# How an Arrow stream and an Arrow file end; what ends otherwise was cut short, which a reader may not notice.
ARROW_END_MARKERS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")


def iterate_records(source: DataSourceConfig, *, seed: int) -> Iterator[tuple[str, Record | RecordError]]:
    """(place, row) for each row, at most `limit`; the place is what an error names. A row that is none is a `BadRow`.

    Raises `UserError` where the source as a whole cannot be read, and where it has no rows.
    """
    empty = True
    for found in itertools.islice(_all_rows(source, seed), source.limit):
        empty = False
        yield found
    if empty:
        raise UserError(f"{source.name}: there are no rows, expected at least one.")


def iterate_valid_records(source: DataSourceConfig, *, seed: int) -> Iterator[tuple[str, Record]]:
    """As `read_rows`, but a `BadRow` is raised."""
    for place, row in iterate_records(source, seed=seed):
        if isinstance(row, RecordError):
            raise row
        yield place, row


def source_fingerprint(source: DataSourceConfig, *, seed: int) -> str:
    """A text that changes when the rows of the source do: digests of its files, or the commit of its data set."""
    if source.generate is not None:
        return f"{source.generate.model_dump_json()} seed {seed}"
    path = _checked(source)
    try:
        if path.is_file():
            return _file_digest(path)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return " ".join(f"{file.relative_to(path)} {_file_digest(file)}" for file in files)
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read: {error}") from None
    import datasets

    with _loading(source):
        return str(datasets.load_dataset_builder(str(source.path), source.subset, revision=source.revision).hash)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _all_rows(source: DataSourceConfig, seed: int) -> Iterator[tuple[str, Record | RecordError]]:
    if source.generate is not None:
        yield from ((f"generated question {i}", row) for i, row in enumerate(source.generate.rows(seed)))
        return
    path = _checked(source)
    if not path.is_file():
        yield from _dataset_rows(source, path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        yield from _jsonl_rows(path)


def _checked(source: DataSourceConfig) -> Path:
    """The path of a source, once it is seen that it may be one. Raises `UserError`."""
    path = source.location
    expected = f"expected a file ({', '.join(DATA_FILE_SUFFIXES)}), a folder or a Hub id (owner/name)"
    try:
        folder, exists, empty = path.is_dir(), path.exists(), path.is_dir() and not any(path.iterdir())
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read: {error}. Take a path that you may read.") from None
    if has_data_file_suffix(path.name):
        if not path.is_file():
            found = "found a folder" if folder else "found no plain file" if exists else "there is no such file"
            raise UserError(f"{path}: {found}; {expected}.")
    elif folder:
        if empty:
            raise UserError(f"{source.name}: {expected}, found an empty folder.")
        if source.revision is not None:
            raise UserError(f"{source.name}: `revision` is for a data set of the Hub, a folder has none. Leave it out.")
    elif exists or path.name.endswith(UNSUPPORTED_FILE_SUFFIXES) or not HUB_ID.fullmatch(str(source.path)):
        raise UserError(f"{source.name}: {expected}, found {'another kind of' if exists else 'no such'} file.")
    elif str(source.path) in _formats():
        raise UserError(f"{source.name}: {expected}, found the name of a format. Name the file or its folder.")
    return path


def _formats() -> set[str]:
    """Names that `datasets` takes not for data, but for a way to read whatever lies in the working directory."""
    import datasets.packaged_modules

    return {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Record | RecordError]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # Bytes end a line at \n alone; a text may hold U+2028.
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                if len(line) == MAX_LINE_BYTES:
                    raise UserError(
                        f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; expected one row per line."
                    )
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _json_object(line, place)
    except (OSError, EOFError, zlib.error) as error:
        after = f", after line {number}" if number else ""
        raise UserError(f"{path}{after}: cannot be read: {error}. Write the file again.") from None


def _json_object(line: bytes, place: str) -> Record | RecordError:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{place}: not valid UTF-8: {error}. Convert the file to UTF-8.")
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg}, at character {error.pos + 1}. Expected one object per line."
        return RecordError("not JSON", f"{place}: {problem}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        return RecordError("not JSON", f"{place}: cannot be read as JSON: {error}.")
    if not isinstance(row, dict):
        return RecordError("not an object", f"{place}: expected a JSON object, found {type(row).__name__}.")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[0]!r} is given twice")
    return found


def _parquet_rows(path: Path) -> Iterator[tuple[str, Record | RecordError]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = Counter(file.schema_arrow.names)
            if twice := [name for name, count in names.items() if count > 1]:
                raise ValueError(f"the column {twice[0]!r} is there twice")
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for i in range(len(batch)):
                    place = f"{path}, row {number}"
                    yield place, _plain_row(lambda i=i, batch=batch: batch.slice(i, 1).to_pylist()[0], place)
                    number += 1
            if not number == sum(groups) == file.metadata.num_rows:
                raise ValueError(f"expected {file.metadata.num_rows} rows, {sum(groups)} in its groups")
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:  # what damaged bytes make of the reader
        reason = str(error).strip().rstrip(".")
        raise UserError(f"{path}: cannot be read as Parquet, after {number} rows: {reason}. Write it again.") from None


def _plain_row(read: Callable[[], Record], place: str) -> Record | RecordError:
    """What `read` gives, of values that Python has."""
    try:
        return read()
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{place}: holds a text that is not valid UTF-8: {error}.")
    except (ValueError, OverflowError) as error:  # such as a date of the year 5,000,000, or a time zone of nowhere
        reason = str(error).rstrip(".")
        return RecordError(
            "not readable", f"{place}: holds a value that cannot be read: {reason}. Leave the column out."
        )


def _dataset_rows(source: DataSourceConfig, path: Path) -> Iterator[tuple[str, Record | RecordError]]:
    with _loading(source):
        reads: Iterator[Callable[[], Record]] = _reads(_saved(source, path) if _is_saved(path) else _load(source))
    for number in itertools.count():
        place = f"{source.name}, row {number}"
        with _loading(source, f", after {number} rows" if number else ""):
            read = next(reads, None)
            if read is None:
                return
            row = _plain_row(read, place)
        yield place, row


def _reads(rows: Any) -> Iterator[Callable[[], Record]]:
    """What gives each row, so that a bad one leaves the others readable where they have numbers."""
    import datasets  # slow to import, and only this branch needs it

    if isinstance(rows, datasets.Dataset):
        return (lambda i=i: rows[i] for i in range(len(rows)))
    return (lambda row=row: row for row in rows)


def _load(source: DataSourceConfig) -> Any:
    import datasets

    local = source.location.is_dir()
    path = str(source.location) if local else str(source.path)
    if local:
        _check_arrow(source.location)
        _check_files(source, datasets.load_dataset_builder(path, source.subset))
    # `datasets` knows a file by its time alone: what it kept of a folder may be another content's.
    mode = "force_redownload" if local and not source.streaming else None
    options = {"split": source.split, "revision": source.revision, "streaming": source.streaming}
    return datasets.load_dataset(path, source.subset, download_mode=mode, **options)


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVE_TO_DISK_MARKERS)


def _saved(source: DataSourceConfig, path: Path) -> Any:
    import datasets

    if source.subset is not None:
        raise UserError(f"{path}: no subset {source.subset!r}: `save_to_disk` wrote the folder. Leave `subset` out.")
    if source.streaming:
        raise UserError(f"{path}: is read in place, as `save_to_disk` wrote it. Leave `streaming` out.")
    _check_arrow(path)
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.Dataset):
        if source.split not in ("train", found.split):
            raise UserError(f"{path}: no split {source.split!r}; the folder holds one data set. Leave `split` out.")
        return found
    if source.split not in found:
        splits = [str(name) for name in found]
        raise UserError(f"{path}: no split {source.split!r}{did_you_mean(source.split, splits)}; there are: {splits}.")
    return found[source.split]


def _check_arrow(folder: Path) -> None:
    """Raises `UserError` for a file that ends early: one that does so between batches is whole to `datasets`."""
    for path in sorted(folder.rglob("*.arrow")):
        with path.open("rb") as file:
            file.seek(-min(path.stat().st_size, 8), io.SEEK_END)
            if not file.read().endswith(ARROW_END_MARKERS):
                raise UserError(f"{path}: not Arrow, or cut short. Write it again.")


def _check_files(source: DataSourceConfig, builder: Any) -> None:
    """Raises `UserError` for a file outside the folder, which no identity tells; warns of one that is in no split."""
    root = source.location.resolve()
    named = {Path(os.path.normpath(file)) for files in (builder.config.data_files or {}).values() for file in files}
    if outside := sorted(str(file) for file in named if not file.is_relative_to(root)):
        raise UserError(f"{source.name}: its README.md names {outside[0]}, which is not in the folder. Move it there.")
    files = {file for file in root.rglob("*") if file.name.endswith(DATA_FILE_SUFFIXES)}
    if len(builder.builder_configs) < 2 and (left := sorted(files - named)):  # what other subsets have is not lost
        advice = "Name them under `configs:` in its README.md, or give all the same kind and no split in their names."
        log_warning(f"{source.name}: {len(left)} files are in no split and are not read, such as {left[0]}. {advice}")


@contextlib.contextmanager
def _loading(source: DataSourceConfig, after: str = "") -> Iterator[None]:
    """Whatever goes wrong within `datasets` becomes a `UserError` that names the source."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of `datasets`, `fsspec`, `pyarrow` and the network
        hub = not source.location.exists()
        advice = (
            "Without a network, download it first and set `path` to its folder."
            if hub
            else "Where a row is at fault: with `path` set to one of the files, its line is told."
        )
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")  # its cause says what it hides
        raise UserError(
            f"{source.name}{after}: cannot be read as a data set: {reason or type(error).__name__}. {advice}"
        ) from None
