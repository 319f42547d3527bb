"""The config section of a data source, and the error class of one record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, UserError

Record = Mapping[str, Any]

DATA_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

MAX_MESSAGE_CHARACTERS = 2000  # characters; it may quote the keys of a row, of which some have millions


class RecordError(UserError):
    """A row that cannot be used: `reason` is the kind of fault, the message says where and what."""

    def __init__(self, reason: str, message: str) -> None:
        printable = message.encode(errors="backslashreplace").decode()  # a key may be half of a character
        super().__init__(
            printable if len(printable) <= MAX_MESSAGE_CHARACTERS else f"{printable[:MAX_MESSAGE_CHARACTERS]} ..."
        )
        self.reason = reason


def has_data_file_suffix(path: str) -> bool:
    """Whether a `path` names a file, not a folder or a data set of the Hub."""
    return path.endswith(DATA_FILE_SUFFIXES)


class DataSourceConfig(ConfigSection):
    """Where rows come from: `path` (a file, a folder, or a data set of the Hub) or `generate`.

    Files: .jsonl, .jsonl.gz, .parquet. Folders: what `Dataset.save_to_disk` wrote, or a data set as it lies on the Hub.
    `split`, `subset`, `revision` choose within a data set; `streaming` reads it while it is downloaded, instead of
    keeping all of it on the disk first. At most `limit` rows are read.
    """

    path: ConfigPath | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    generate: MiniatureData | None = None
    limit: int | None = pydantic.Field(default=None, ge=1)

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "DataSourceConfig":
        if (self.path is None) == (self.generate is None):
            raise ValueError("give either `path` or `generate`, one of the two")
        within = (self.split != "train", self.subset is not None, self.revision is not None, self.streaming)
        if any(within) and (self.path is None or has_data_file_suffix(self.path)):
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
