"""Writes the same records in every format that the package reads."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinkpo_jax.data.readers import DataSourceConfig, iterate_records
from thinkpo_jax.runtime.config import UserError

RECORDS: list[dict[str, Any]] = [
    {
        "prompt": f"{i}?",
        "response": f"{i}\u2028\0\U0001f600\n",
        "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "so" * i}][: 1 + i % 2],
        "more": None if i % 3 else [[i], []],
    }
    for i in range(150)
]
OTHER_RECORDS: list[dict[str, Any]] = [{"prompt": "other?", "response": "other", "messages": None, "more": None}]
README_WITH_SUBSETS = """---
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


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(records))


def write_json(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(records, indent=1, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_gz(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes two gzip members in a row, as `cat a.gz b.gz` does."""
    half = len(records) // 2
    path.write_bytes(gzip.compress(jsonl(records[:half])) + gzip.compress(jsonl(records[half:])))


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(records).to_parquet(path, batch_size=60)


def write_arrow(path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=64)


def write_saved(path: Path, records: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    Dataset.from_list(records).save_to_disk(path, num_shards=min(3, len(records)))


def write_saved_splits(path: Path, records: list[dict[str, Any]]) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"test": Dataset.from_list(OTHER_RECORDS), "train": Dataset.from_list(records)}).save_to_disk(path)


def write_hub(path: Path, records: list[dict[str, Any]], extension: str = "jsonl") -> None:
    """Writes the layout of a Hub data set with two subsets. One of them has two files and two splits."""
    write: Write = write_jsonl if extension == "jsonl" else write_parquet
    write(path / "one" / f"a.{extension}", records[:70])
    write(path / "one" / f"b.{extension}", records[70:])
    write(path / "one_test" / f"a.{extension}", OTHER_RECORDS)
    write(path / "two" / f"a.{extension}", OTHER_RECORDS)
    (path / "README.md").write_text(README_WITH_SUBSETS.replace("EXT", extension), encoding="utf-8")


def write_hub_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    write_hub(path, records, "parquet")


THREE_RECORDS_GZ = gzip.compress(jsonl(RECORDS[:3]), mtime=0)
# For each format: the name of the file or folder, the function that writes it, and keys of the config.
FORMATS: dict[str, tuple[str, Write, dict[str, Any]]] = {
    "jsonl": ("rows.jsonl", write_jsonl, {}),
    "gz": ("rows.jsonl.gz", write_gz, {}),
    "json": ("rows.json", write_json, {}),
    "json gz": ("rows.json.gz", write_json, {}),
    "jsonl as json": ("rows.JSON", write_jsonl, {}),
    "parquet": ("rows.parquet", write_parquet, {}),
    "saved": ("rows", write_saved, {}),
    "saved splits": ("rows", write_saved_splits, {}),
    "one split of a saved folder": ("rows/train", lambda path, records: write_saved_splits(path.parent, records), {}),
    "Hub, JSONL": ("rows", write_hub, {"subset": "one"}),
    "Hub, JSONL, streamed": ("rows", write_hub, {"subset": "one", "streaming": True}),
    "Hub, Parquet": ("rows", write_hub_parquet, {"subset": "one"}),
    "Hub, Parquet, streamed": ("rows", write_hub_parquet, {"subset": "one", "streaming": True}),
    "plain folder": ("rows", lambda path, records: write_jsonl(path / "train.jsonl", records), {}),
    "plain folder of JSON": ("rows.json", lambda path, records: write_json(path / "train.json", records), {}),
    "plain folder of Arrow": ("rows", lambda path, records: write_arrow(path / "train.arrow", records), {}),
}


def read(path: Path | str, **options: Any) -> list[Any]:
    """Returns the records of a source, without their locations."""
    return [record for _, record in iterate_records(DataSourceConfig(path=str(path), **options), seed=0)]


def error_of(path: Path | str, **options: Any) -> str:
    """Returns the message of the error when a source is read. It must begin with the path."""
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert str(error.value).startswith(str(path))
    return str(error.value)
