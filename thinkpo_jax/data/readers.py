"""Configures a data source (a file, a folder, a Hub id or a generator) and reads its records one at a time."""

import contextlib
import hashlib
import importlib.resources
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from thinkpo_jax.data.file_formats import LocatedRecord, Record, RecordError, read_data_file, read_record
from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, UserError, did_you_mean, exactly_one_of
from thinkpo_jax.runtime.console import log_warning

TEXT_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
DATA_FILE_SUFFIXES = (*TEXT_FILE_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_FILE_SUFFIXES), ".parquet")
EXPECTED = (
    f"expected a file ({', '.join(TEXT_FILE_SUFFIXES)}, all also with .gz, or .parquet), a folder or a Hub id "
    "(owner/name)"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Any other ending may belong to a Hub id such as owner/v1.5.
UNSUPPORTED_FILE_SUFFIXES = (".txt", ".gz", ".zip", ".zst", ".arrow", ".xlsx")
SAVE_TO_DISK_MARKERS = ("state.json", "dataset_dict.json")  # Dataset.save_to_disk and DatasetDict.save_to_disk
# How an Arrow stream and an Arrow file end. A file with another end was cut short, which a reader may not notice.
ARROW_END_MARKERS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")
PATTERN_CHARACTERS = re.compile(r"[*?\[\]\n]|::")  # `datasets` reads a path with one of these as a pattern or as a URL


def has_data_file_suffix(path: str) -> bool:
    """Tells whether `path` has the ending of a data file. Other paths are folders or data sets of the Hub."""
    return path.lower().endswith(DATA_FILE_SUFFIXES)


class DataSourceConfig(ConfigSection):
    """Where records come from: either `path` or `generate`. At most `limit` records are read.

    `path` is a file (see `DATA_FILE_SUFFIXES`), a folder or a Hub id. A folder holds the output of
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
            return " ".join(f"{file.relative_to(path)} {_file_digest(file)}" for file in _files_of(path))
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read: {error}") from None
    import datasets

    try:
        return str(datasets.load_dataset_builder(str(source.path), source.subset, revision=source.revision).hash)
    except Exception as error:
        raise _as_user_error(error, source) from None


def source_state(source: DataSourceConfig) -> str:
    """Returns where the data of a source are, and the sizes and times of its files. Reads none of them.

    The time of the last change counts too, because a program may set the time of the last write again.
    """
    path = source.local_path
    files = [path] if path.is_file() else _files_of(path) if source.path and path.is_dir() else []
    times = [(file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ctime_ns) for file in files]
    stats = [(str(file.resolve()), *each) for file, each in zip(files, times, strict=True)]
    return hashlib.sha256(repr((source.name if not files else "", source.revision, stats)).encode()).hexdigest()[:16]


def _files_of(folder: Path) -> list[Path]:
    """Returns the sorted files of a folder, also those in linked folders, because `datasets` may read them."""
    files: list[Path] = []
    seen: set[Path] = set()  # a folder may link to itself
    for path, subfolders, names in os.walk(folder, followlinks=True):
        if (real := Path(path).resolve()) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        files += [file for name in names if (file := Path(path, name)).is_file()]
    return sorted(files)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _all_records(source: DataSourceConfig, seed: int) -> Iterator[LocatedRecord]:
    if source.generate is not None:
        return ((f"generated question {i}", record) for i, record in enumerate(source.generate.rows(seed)))
    path = _checked_path(source)
    if not path.is_file():
        return _read_dataset(source)
    return read_data_file(path)


def _checked_path(source: DataSourceConfig) -> Path:
    """Returns the local path of a source. Raises `UserError` if it is not a data file, a folder or a Hub id."""
    path = source.local_path
    try:
        exists, is_folder = path.exists(), path.is_dir()
        is_empty_folder = is_folder and not any(path.iterdir())
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read: {error}. Give a path that you are allowed to read.") from None
    problem = None
    if is_empty_folder:
        problem = "found an empty folder"
    elif is_folder:
        if source.revision is not None:
            raise UserError(f"{source.name}: `revision` only applies to a data set of the Hub. Leave it out.")
    elif exists and not path.is_file():
        problem = "not a regular file"
    elif exists and not has_data_file_suffix(path.name):
        problem = "found another kind of file"
    elif not exists and (
        path.name.lower().endswith((*DATA_FILE_SUFFIXES, *UNSUPPORTED_FILE_SUFFIXES))
        or not HUB_ID.fullmatch(str(source.path))
    ):
        kind = "URLs" if "://" in source.name else "Patterns" if set("*?") & set(source.name) else None
        remedy = f" ({kind} are not read. Give a file, a folder or a list of sources)" if kind else ""
        problem = f"there is no such file{_searched_folder(path)}{remedy}"
    elif not exists and (importlib.resources.files("datasets.packaged_modules") / str(source.path)).is_dir():
        # Given a name such as `json`, `datasets` would read the files of the working directory in that format.
        problem = "found the name of a format"
    if problem is not None:
        raise UserError(f"{source.name}: {problem}, {EXPECTED}.")
    return path


def _searched_folder(path: Path) -> str:
    """Returns where a relative path was searched, as the end of a message."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def _read_dataset(source: DataSourceConfig) -> Iterator[LocatedRecord]:
    num_read, folder = 0, source.local_path
    try:
        with _without_pattern(folder) as folder:
            dataset = _open_dataset(source, folder)
            if source.streaming:
                reads = (lambda record=record: record for record in dataset)
            else:  # by index, so reading can go on after an error
                reads = (lambda i=i: dataset[i] for i in range(len(dataset)))
            for read in reads:
                location = f"{source.name}, row {num_read}"
                yield location, read_record(read, location)
                num_read += 1
    except Exception as error:
        message = str(_as_user_error(error, source, num_read))
        raise UserError(message.replace(str(folder), str(source.local_path))) from None


@contextlib.contextmanager
def _without_pattern(folder: Path) -> Iterator[Path]:
    """Yields the path of a folder. If `datasets` would not take it literally, yields a folder of links to its files."""
    if not folder.is_dir() or not PATTERN_CHARACTERS.search(str(folder.resolve())):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="thinkpo_jax_") as temporary:
        links = Path(temporary).resolve() / "data"
        shutil.copytree(folder.resolve(), links, copy_function=os.symlink)
        yield links


def _open_dataset(source: DataSourceConfig, folder: Path) -> Any:
    """Opens a folder or a data set of the Hub as a `Dataset`, or as an `IterableDataset` with `streaming`."""
    import datasets  # slow to import, and only this kind of source needs it

    is_local = folder.is_dir()
    path = str(folder if is_local else source.path)
    if is_local:
        _check_arrow_files(folder)
        if any((folder / name).is_file() for name in SAVE_TO_DISK_MARKERS):
            return _open_saved_dataset(source, folder)
        _check_data_files(source, folder, datasets.load_dataset_builder(path, source.subset))
    # `datasets` recognizes a cached file by its time alone, so it could return the old content of a folder.
    mode = "force_redownload" if is_local and not source.streaming else None
    options = {"split": source.split, "revision": source.revision, "streaming": source.streaming}
    if folder != source.local_path:  # a new path each time, so nothing in the cache would be used again
        options["cache_dir"] = str(folder.parent / "cache")
    return datasets.load_dataset(path, source.subset, download_mode=mode, **options)


def _open_saved_dataset(source: DataSourceConfig, folder: Path) -> Any:
    import datasets

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
    for path in (file for file in _files_of(folder) if file.suffix == ".arrow"):
        with path.open("rb") as file:
            file.seek(-min(path.stat().st_size, 8), os.SEEK_END)
            if not file.read().endswith(ARROW_END_MARKERS):
                raise UserError(f"{path}: not an Arrow file, or cut short. Write it again.")


def _check_data_files(source: DataSourceConfig, folder: Path, builder: Any) -> None:
    """Warns of files in no split. Raises `UserError` for one outside, which `source_fingerprint` would not cover."""
    from datasets.data_files import FILES_TO_IGNORE

    root = folder.resolve()
    used = {Path(os.path.normpath(file)) for files in (builder.config.data_files or {}).values() for file in files}
    if outside := sorted(str(file) for file in used if not file.is_relative_to(root)):
        raise UserError(f"{source.name}: its README.md names {outside[0]}, which is not in the folder. Move it there.")
    files = {file for file in _files_of(root) if has_data_file_suffix(file.name) and file.name not in FILES_TO_IGNORE}
    if len(builder.builder_configs) < 2 and (unused := sorted(files - used)):  # other subsets may use the rest
        hint = "Name them under `configs:` in its README.md, or give all the same kind and no split in their names."
        first = source.local_path / unused[0].relative_to(root)
        log_warning(f"{source.name}: {len(unused)} files are in no split and are not read, such as {first}. {hint}")


def _as_user_error(error: Exception, source: DataSourceConfig, num_read: int = 0) -> UserError:
    """Turns an error of `datasets`, `fsspec`, `pyarrow` or the network into a `UserError` with the source name."""
    if isinstance(error, UserError):
        return error
    after = f", after {num_read} rows" if num_read else ""
    reason = " ".join(str(error.__cause__ or error).split()).rstrip(".") or type(error).__name__
    hint = f"There is no folder {Path.cwd() / source.local_path}. Without a network, set `path` to a downloaded folder."
    if "gated" in reason.lower():
        hint = (
            f"Accept its conditions at https://huggingface.co/datasets/{source.path} with your account. Then set "
            "HF_TOKEN to a token of that account, or run `hf auth login`."
        )
    if source.local_path.exists():
        hint = "To see the line of a bad row, set `path` to one of the files."
        odd_names = (file for file in source.local_path.rglob("*") if PATTERN_CHARACTERS.search(file.name))
        if (odd_name := next(odd_names, None)) is not None:
            hint = f"`datasets` may not read the name {odd_name.name!r}. Rename it, or set `path` to one of the files."
    return UserError(f"{source.name}{after}: cannot be read as a data set: {reason}. {hint}")
