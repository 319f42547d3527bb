"""Where do rows come from? Files, folders, data sets of the Hub and generators, one row at a time."""

import contextlib
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from thinkpo_jax.config import PathText, Section, UserError, nearest
from thinkpo_jax.miniature import MiniatureData

Row = Mapping[str, Any]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FILES = (".jsonl", ".jsonl.gz", ".parquet")
OTHER_FILES = (".json", ".csv", ".tsv", ".txt", ".gz", ".zst", ".arrow")  # other dots belong to a Hub id: owner/v1.5
SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk and DatasetDict.save_to_disk write
LONGEST_LINE = 2**28  # bytes; a file without line ends is no JSONL, and must not fill the memory
PARQUET_ROWS = 64


class BadRow(UserError):  # noqa: N818 -- it is a value more often than it is raised
    """A row that cannot be used: `reason` is the kind of fault, the message says where and what."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def is_file(path: str) -> bool:
    """Whether a `path` names a file, not a folder or a data set of the Hub."""
    return path.endswith(FILES)


class Source(Section):
    """Where rows come from: `path` (a file, a folder, or a data set of the Hub) or `generate`.

    Files: .jsonl, .jsonl.gz, .parquet. Folders: what `Dataset.save_to_disk` wrote, or a data set as it lies on the Hub.
    `split`, `subset`, `revision` choose within a data set; `streaming` reads it while it is downloaded, instead of
    keeping all of it on the disk first. At most `limit` rows are read.
    """

    path: PathText | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    generate: MiniatureData | None = None
    limit: int | None = pydantic.Field(default=None, ge=1)

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "Source":
        if (self.path is None) == (self.generate is None):
            raise ValueError("give either `path` or `generate`, one of the two")
        within = (self.split != "train", self.subset is not None, self.revision is not None, self.streaming)
        if any(within) and (self.path is None or is_file(self.path)):
            raise ValueError(
                "`split`, `subset`, `revision` and `streaming` are for a data set; a file has none of them"
            )
        return self

    @property
    def name(self) -> str:
        """What messages call the source."""
        return self.path or "generate"

    @property
    def location(self) -> Path:
        """`path` in the file system, whether or not something is there."""
        return Path(str(self.path)).expanduser()


def read_rows(source: Source, *, seed: int) -> Iterator[tuple[str, Row | BadRow]]:
    """(place, row) for each row, at most `limit`; the place is what an error names. A row that is none is a `BadRow`.

    Raises `UserError` where the source as a whole cannot be read, and where it has no rows.
    """
    empty = True
    for found in itertools.islice(_all_rows(source, seed), source.limit):
        empty = False
        yield found
    if empty:
        raise UserError(f"{source.name}: there are no rows, expected at least one.")


def good_rows(source: Source, *, seed: int) -> Iterator[tuple[str, Row]]:
    """As `read_rows`, but a `BadRow` is raised."""
    for place, row in read_rows(source, seed=seed):
        if isinstance(row, BadRow):
            raise row
        yield place, row


def identity(source: Source, *, seed: int) -> str:
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


def _all_rows(source: Source, seed: int) -> Iterator[tuple[str, Row | BadRow]]:
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


def _checked(source: Source) -> Path:
    """The path of a source, once it is seen that it may be one. Raises `UserError`."""
    path = source.location
    expected = f"expected a file ({', '.join(FILES)}), a folder or a Hub id (owner/name)"
    if path.is_dir() and not is_file(path.name):
        if any(path.iterdir()):
            return path
        raise UserError(f"{source.name}: {expected}, found an empty folder.")
    if is_file(path.name):
        if not path.is_file():
            found = "found a folder" if path.is_dir() else "there is no such file"
            raise UserError(f"{path}: {found}; {expected}.")
    elif path.exists() or path.name.endswith(OTHER_FILES) or not HUB_ID.fullmatch(str(source.path)):
        raise UserError(f"{source.name}: {expected}, found {'another kind of' if path.exists() else 'no such'} file.")
    return path


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # Bytes end a line at \n alone; a text may hold U+2028.
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if len(line) == LONGEST_LINE:
                    raise UserError(
                        f"{path}, line {number}: longer than {LONGEST_LINE} bytes; expected one row per line."
                    )
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _json_object(line, place)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read: {error}. Rows before that may be whole; write the file again."
        ) from None


def _json_object(line: bytes, place: str) -> Row | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"{place}: not valid UTF-8: {error}. Convert the file to UTF-8.")
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg}, at character {error.pos + 1}. Expected one object per line."
        return BadRow("not JSON", f"{place}: {problem}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        return BadRow("not JSON", f"{place}: cannot be read as JSON: {error}.")
    if not isinstance(row, dict):
        return BadRow("not an object", f"{place}: expected a JSON object, found {type(row).__name__}.")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[0]!r} is given twice")
    return found


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for i in range(len(batch)):
                    place = f"{path}, row {number}"
                    yield place, _plain_row(batch.slice(i, 1).to_pylist, place)
                    number += 1
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:  # what damaged bytes make of the reader
        raise UserError(f"{path}: cannot be read as Parquet, after {number} rows: {error}. Write it again.") from None


def _plain_row(read: Any, place: str) -> Row | BadRow:
    try:
        return read()[0]
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"{place}: holds a text that is not valid UTF-8: {error}.")


def _dataset_rows(source: Source, path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    with _loading(source):
        rows: Iterable[Any] = _saved(source, path) if any((path / name).is_file() for name in SAVED) else _load(source)
        iterator = iter(rows)
    for number in itertools.count():
        with _loading(source):
            row = next(iterator, None)
        if row is None:
            return
        yield f"{source.name}, row {number}", row


def _load(source: Source) -> Any:
    import datasets  # slow to import, and only this branch needs it

    path = str(source.location) if source.location.is_dir() else str(source.path)
    options = {"split": source.split, "revision": source.revision, "streaming": source.streaming}
    return datasets.load_dataset(path, source.subset, **options)


def _saved(source: Source, path: Path) -> Any:
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.Dataset):
        return found
    if source.split not in found:
        splits = [str(name) for name in found]
        raise UserError(f"{path}: no split {source.split!r}{nearest(source.split, splits)}; there are: {splits}.")
    return found[source.split]


@contextlib.contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Whatever goes wrong within `datasets` becomes a `UserError` that names the source."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of `datasets`, `fsspec`, `pyarrow` and the network
        hub = not source.location.exists()
        advice = " Without a network, download it first and set `path` to its folder." if hub else ""
        reason = (
            str(error.__cause__ or error).strip().rstrip(".") or type(error).__name__
        )  # its cause says what it hides
        raise UserError(f"{source.name}: cannot be read as a data set: {reason}.{advice}") from None
