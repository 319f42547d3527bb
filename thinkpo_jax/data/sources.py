"""The config section of a data source, and the error class for one record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, UserError

Record = Mapping[str, Any]

DATA_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
MAX_MESSAGE_CHARACTERS = 2000  # a message may quote keys of a record, and some keys have millions of characters


class RecordError(UserError):
    """One record cannot be used. `reason` is the kind of problem, and the message says where and what it is."""

    def __init__(self, reason: str, message: str) -> None:
        message = message.encode(errors="backslashreplace").decode()  # a quoted key may hold a lone surrogate
        is_too_long = len(message) > MAX_MESSAGE_CHARACTERS
        super().__init__(f"{message[:MAX_MESSAGE_CHARACTERS]} ..." if is_too_long else message)
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

    @pydantic.model_validator(mode="after")
    def _check_source(self) -> "DataSourceConfig":
        if (self.path is None) == (self.generate is None):
            raise ValueError("give either `path` or `generate`, one of the two")
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
        return Path(str(self.path)).expanduser()
