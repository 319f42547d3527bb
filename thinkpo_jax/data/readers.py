"""Configures a data source (a file, a folder, a Hub id or a generator) and reads its records one at a time."""

import gzip
import hashlib
import importlib.resources
import itertools
import json
import os
import re
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, UserError, did_you_mean, exactly_one_of
from thinkpo_jax.runtime.console import log_warning

DATA_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
MAX_MESSAGE_CHARACTERS = 2000  # a message may quote keys of a record, and some keys have millions of characters
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Any other ending may belong to a Hub id such as owner/v1.5.
UNSUPPORTED_FILE_SUFFIXES = (".json", ".csv", ".tsv", ".txt", ".gz", ".zst", ".arrow")
SAVE_TO_DISK_MARKERS = ("state.json", "dataset_dict.json")  # Dataset.save_to_disk and DatasetDict.save_to_disk
MAX_LINE_BYTES = 2**28  # a file without line ends is not JSONL, and must not fill the memory
PARQUET_BATCH_ROWS = 64
# How an Arrow stream and an Arrow file end. A file with another end was cut short, which a reader may not notice.
ARROW_END_MARKERS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")

Record = Mapping[str, Any]
LocatedRecord = tuple[str, "Record | RecordError"]  # the location is for messages: "rows.jsonl, line 7"


class RecordError(UserError):
    """One record cannot be used. `reason` is the kind of problem, and the message says where and what it is."""

    def __init__(self, reason: str, message: str) -> None:
        message = message.encode(errors="backslashreplace").decode()  # a quoted key may hold a lone surrogate
        shortened = f"{message[:MAX_MESSAGE_CHARACTERS]} ..."
        super().__init__(shortened if len(message) > MAX_MESSAGE_CHARACTERS else message)
        self.reason = reason


def has_data_file_suffix(path: str) -> bool:
    """Tells whether `path` has the ending of a data file. Other paths are folders or data sets of the Hub."""
    return path.endswith(DATA_FILE_SUFFIXES)


class DataSourceConfig(ConfigSection):
    """Where records come from: either `path` or `generate`. At most `limit` records are read.

    `path` is a file (.jsonl, .jsonl.gz, .parquet), a folder or a Hub id. A folder holds the output of
    `Dataset.save_to_disk`, or has the layout of a Hub data set. `split`, `subset` and `revision` select within a data
    set. `streaming` reads records during the download. Without it, the whole data set is first stored on disk.
    """

    path: ConfigPath | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    generate: MiniatureData | None = None
    limit: int | None = pydantic.Field(default=None, ge=1)

    _one_source = exactly_one_of("path", "generate")

    @pydantic.model_validator(mode="after")
    def _check_selection(self) -> "DataSourceConfig":
        has_selection = self.split != "train" or self.subset is not None or self.revision is not None or self.streaming
        if has_selection and (self.path is None or has_data_file_suffix(self.path)):
            keys = "`split`, `subset`, `revision` and `streaming`"
            raise ValueError(f"{keys} select within a data set, but a file has none of them. Leave them out")
        return self

    @property
    def name(self) -> str:
        """The name of the source in messages."""
        return self.path or "generate"

    @property
    def local_path(self) -> Path:
        """`path` in the file system, whether or not it exists."""
        return Path(str(self.path))


def iterate_records(source: DataSourceConfig, *, seed: int) -> Iterator[LocatedRecord]:
    """Yields at most `limit` records. A record that cannot be read is yielded as a `RecordError`.

    Raises `UserError` if the source itself cannot be read or has no records.
    """
    records = itertools.islice(_all_records(source, seed), source.limit)
    if (first := next(records, None)) is None:
        raise UserError(f"{source.name}: there are no rows, expected at least one.")
    yield from itertools.chain([first], records)


def iterate_valid_records(source: DataSourceConfig, *, seed: int) -> Iterator[tuple[str, Record]]:
    """Yields records as `iterate_records` does, but raises the first `RecordError`."""
    for location, record in iterate_records(source, seed=seed):
        if isinstance(record, RecordError):
            raise record
        yield location, record


def source_fingerprint(source: DataSourceConfig, *, seed: int) -> str:
    """Returns a text that changes with the records. It holds digests of files, or the commit of a Hub data set."""
    if source.generate is not None:
        return f"{source.generate.model_dump_json()} seed {seed}"
    path = _checked_path(source)
    try:
        if path.is_file():
            return _file_digest(path)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return " ".join(f"{file.relative_to(path)} {_file_digest(file)}" for file in files)
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read: {error}") from None
    import datasets

    try:
        return str(datasets.load_dataset_builder(str(source.path), source.subset, revision=source.revision).hash)
    except Exception as error:
        raise _as_user_error(error, source) from None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _all_records(source: DataSourceConfig, seed: int) -> Iterator[LocatedRecord]:
    if source.generate is not None:
        return ((f"generated question {i}", record) for i, record in enumerate(source.generate.rows(seed)))
    path = _checked_path(source)
    if not path.is_file():
        return _read_dataset(source)
    return _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def _checked_path(source: DataSourceConfig) -> Path:
    """Returns the local path of a source. Raises `UserError` if it is not a data file, a folder or a Hub id."""
    path = source.local_path
    expected = f"expected a file ({', '.join(DATA_FILE_SUFFIXES)}), a folder or a Hub id (owner/name)"
    try:
        exists, is_folder = path.exists(), path.is_dir()
        is_empty_folder = is_folder and not any(path.iterdir())
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read: {error}. Give a path that you are allowed to read.") from None
    problem = None
    if has_data_file_suffix(path.name):
        if not path.is_file():
            reason = "found a folder" if is_folder else "not a regular file" if exists else "there is no such file"
            raise UserError(f"{path}: {reason}; {expected}.")
    elif is_empty_folder:
        problem = "found an empty folder"
    elif is_folder:
        if source.revision is not None:
            raise UserError(f"{source.name}: `revision` only applies to a data set of the Hub. Leave it out.")
    elif exists or path.name.endswith(UNSUPPORTED_FILE_SUFFIXES) or not HUB_ID.fullmatch(str(source.path)):
        problem = f"found {'another kind of' if exists else 'no such'} file"
    elif (importlib.resources.files("datasets.packaged_modules") / str(source.path)).is_dir():
        # Given a name such as `json`, `datasets` would read the files of the working directory in that format.
        problem = "found the name of a format. Name the file or its folder"
    if problem is not None:
        raise UserError(f"{source.name}: {expected}, {problem}.")
    return path


def _read_jsonl(path: Path) -> Iterator[LocatedRecord]:
    line_number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # Lines of bytes end at \n only. A text may hold other line breaks, such as U+2028.
            for line_number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                location = f"{path}, line {line_number}"
                if len(line) == MAX_LINE_BYTES:
                    raise UserError(f"{location}: longer than {MAX_LINE_BYTES} bytes. Expected one row per line.")
                if line.strip():
                    yield location, _parse_json_object(line, location)
    except (OSError, EOFError, zlib.error) as error:
        after = f", after line {line_number}" if line_number else ""
        raise UserError(f"{path}{after}: cannot be read: {error}. Write the file again.") from None


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
    if not isinstance(record, dict):
        return RecordError("not an object", f"{location}: expected a JSON object, found {type(record).__name__}.")
    return record


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"the key {statistics.mode(key for key, _ in pairs)!r} is given twice")
    return fields


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
                    yield location, _read_record(lambda i=i, batch=batch: batch.slice(i, 1).to_pylist()[0], location)
                    num_read += 1
            if not num_read == num_in_groups == file.metadata.num_rows:
                raise ValueError(f"expected {file.metadata.num_rows} rows, {num_in_groups} in its groups")
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:  # errors of the reader on damaged bytes
        reason = str(error).strip().rstrip(".")
        raise UserError(f"{path}: cannot be read as Parquet after {num_read} rows: {reason}. Write it again.") from None


def _read_record(read: Callable[[], Record], location: str) -> Record | RecordError:
    """Returns the record that `read` returns, or a `RecordError` if Python cannot represent one of its values."""
    try:
        return read()
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{location}: holds a text that is not valid UTF-8: {error}.")
    except (ValueError, OverflowError) as error:  # such as a date in the year 5,000,000, or an unknown time zone
        problem = f"holds a value that cannot be read: {str(error).rstrip('.')}. Leave the column out."
        return RecordError("unreadable value", f"{location}: {problem}")


def _read_dataset(source: DataSourceConfig) -> Iterator[LocatedRecord]:
    num_read = 0
    try:
        dataset = _open_dataset(source)
        if source.streaming:
            reads = (lambda record=record: record for record in dataset)
        else:  # by index, so reading can go on after an error
            reads = (lambda i=i: dataset[i] for i in range(len(dataset)))
        for read in reads:
            location = f"{source.name}, row {num_read}"
            yield location, _read_record(read, location)
            num_read += 1
    except Exception as error:
        raise _as_user_error(error, source, num_read) from None


def _open_dataset(source: DataSourceConfig) -> Any:
    """Opens a folder or a data set of the Hub as a `Dataset`, or as an `IterableDataset` with `streaming`."""
    import datasets  # slow to import, and only this kind of source needs it

    folder, is_local = source.local_path, source.local_path.is_dir()
    path = str(folder if is_local else source.path)
    if is_local:
        _check_arrow_files(folder)
        if any((folder / name).is_file() for name in SAVE_TO_DISK_MARKERS):
            return _open_saved_dataset(source)
        _check_data_files(source, datasets.load_dataset_builder(path, source.subset))
    # `datasets` recognizes a cached file by its time alone, so it could return the old content of a folder.
    mode = "force_redownload" if is_local and not source.streaming else None
    options = {"split": source.split, "revision": source.revision, "streaming": source.streaming}
    return datasets.load_dataset(path, source.subset, download_mode=mode, **options)


def _open_saved_dataset(source: DataSourceConfig) -> Any:
    import datasets

    folder = source.local_path
    if source.subset is not None:
        raise UserError(f"{folder}: `save_to_disk` wrote no subset {source.subset!r} there. Leave `subset` out.")
    if source.streaming:
        raise UserError(f"{folder}: `save_to_disk` wrote the folder, so it is read in place. Leave `streaming` out.")
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split or "train"): saved, "train": saved}  # "train" is the default of `split`
    if source.split not in saved:
        hint = did_you_mean(source.split, splits := list(map(str, saved)))
        raise UserError(f"{folder}: no split {source.split!r}{hint}. The splits are: {splits}.")
    return saved[source.split]


def _check_arrow_files(folder: Path) -> None:
    """Raises `UserError` if an Arrow file was cut short. `datasets` does not notice a cut between two batches."""
    for path in sorted(folder.rglob("*.arrow")):
        with path.open("rb") as file:
            file.seek(-min(path.stat().st_size, 8), os.SEEK_END)
            if not file.read().endswith(ARROW_END_MARKERS):
                raise UserError(f"{path}: not an Arrow file, or cut short. Write it again.")


def _check_data_files(source: DataSourceConfig, builder: Any) -> None:
    """Warns of files in no split. Raises `UserError` for one outside, which `source_fingerprint` would not cover."""
    root = source.local_path.resolve()
    used = {Path(os.path.normpath(file)) for files in (builder.config.data_files or {}).values() for file in files}
    if outside := sorted(str(file) for file in used if not file.is_relative_to(root)):
        raise UserError(f"{source.name}: its README.md names {outside[0]}, which is not in the folder. Move it there.")
    files = {file for file in root.rglob("*") if file.name.endswith(DATA_FILE_SUFFIXES)}
    if len(builder.builder_configs) < 2 and (unused := sorted(files - used)):  # other subsets may use the rest
        hint = "Name them under `configs:` in its README.md, or give all the same kind and no split in their names."
        log_warning(f"{source.name}: {len(unused)} files are in no split and are not read, such as {unused[0]}. {hint}")


def _as_user_error(error: Exception, source: DataSourceConfig, num_read: int = 0) -> UserError:
    """Turns an error of `datasets`, `fsspec`, `pyarrow` or the network into a `UserError` with the source name."""
    if isinstance(error, UserError):
        return error
    after = f", after {num_read} rows" if num_read else ""
    reason = " ".join(str(error.__cause__ or error).split()).rstrip(".") or type(error).__name__
    hint = "Without a network, download it first and set `path` to its folder."
    if source.local_path.exists():
        hint = "To see the line of a bad row, set `path` to one of the files."
    return UserError(f"{source.name}{after}: cannot be read as a data set: {reason}. {hint}")
