"""What is in a batch, before it has a row? Rows of a file, a data set or a generator -> tokenised examples.

An example is a tuple of segments that stay together: one for SFT, two (chosen, rejected) for a preference pair.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from thinkpo_jax.chat import Chat, Message
from thinkpo_jax.config import Section, UserError, nearest
from thinkpo_jax.miniature import MiniatureData

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class DataConfig(Section):
    """Where rows come from (`path`: a .jsonl or .parquet file or a Hub id; or `generate`), and which columns."""

    path: str | None = None
    split: str = "train"
    subset: str | None = None
    generate: MiniatureData | None = None
    limit: int | None = pydantic.Field(default=None, ge=1)
    prompt: str = "prompt"
    system: str | None = None
    system_column: str | None = None
    prompt_suffix: str = ""
    over_length: Literal["drop", "raise"] = "drop"

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if (self.path is None) == (self.generate is None):
            raise ValueError("give either `path` or `generate`, one of the two")
        if self.system is not None and self.system_column is not None:
            raise ValueError("give either `system` (a text) or `system_column` (a column), not both")
        return self


class SftData(DataConfig):
    """SFT: a prompt and a response, or one column of `messages` that ends with the assistant's turn."""

    response: str = "response"
    messages: str | None = None


class PairData(DataConfig):
    """ThinkPO: texts in columns prompt, chosen, rejected; or chosen and rejected as message lists (prompt implied)."""

    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True)
class Segment:
    """Token ids of a prompt and its answer; the answer, which alone is trained, starts at `answer_start`."""

    tokens: np.ndarray
    answer_start: int


Example = tuple[Segment, ...]


@dataclass(frozen=True)
class Examples:
    """Tokenised examples in the order of the source, with a count of what was left out and why."""

    examples: tuple[Example, ...]
    rows: int
    dropped: Mapping[str, int]

    def lengths(self) -> np.ndarray:
        """Tokens of each example, all its segments together; int64 [n]."""
        return np.array([sum(len(segment.tokens) for segment in example) for example in self.examples])


def read_rows(config: DataConfig, *, seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) for each row of the source, at most `limit`; the place is what an error names."""
    rows = _all_rows(config, seed)
    empty = True
    for count, found in enumerate(rows):
        if config.limit is not None and count >= config.limit:
            return
        empty = False
        yield found
    if empty:
        raise UserError(f"{config.path or 'generate'}: there are no rows. Expected one JSON object per line.")


def _all_rows(config: DataConfig, seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if config.generate is not None:
        yield from ((f"generated question {i}", row) for i, row in enumerate(config.generate.rows(seed)))
        return
    path = Path(str(config.path))
    if path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
        return
    yield from ((f"{config.path}, row {i}", row) for i, row in enumerate(_dataset(config, path)))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", _json_object(line, f"{path}, line {number}")
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file. Set `path` to a .jsonl or .parquet file or a Hub id."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8: {error}. Convert the file to UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _json_object(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON: {error}. Expected one object per line.") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(row).__name__}.")
    return row


def _dataset(config: DataConfig, path: Path) -> Any:
    import datasets  # slow to import, and only this branch needs it
    from datasets.exceptions import DatasetsError

    try:
        if path.suffix == ".parquet":
            if not path.exists():
                raise UserError(f"{path}: there is no such file. Set `path` to a .jsonl or .parquet file or a Hub id.")
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if path.is_dir() or path.suffix or str(config.path).count("/") > 1 or str(config.path).startswith((".", "/")):
            raise UserError(
                f"{config.path}: expected a .jsonl or .parquet file or a Hub id (owner/name)"
                + (", found a folder." if path.is_dir() else "; there is no such file.")
            )
        return datasets.load_dataset(str(config.path), config.subset, split=config.split)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{config.path}: cannot be loaded as a data set: {error}. Without a network, download it first and "
            "set `path` to the file."
        ) from None


def tokenize(config: SftData | PairData, chat: Chat, *, row_length: int, seed: int) -> Examples:
    """All examples of the source as ids; those of more than `row_length` tokens are dropped and counted, or raise.

    Raises `UserError` naming the row for a missing column, a value of another type or an empty text.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    rows = 0
    for place, row in read_rows(config, seed=seed):
        rows += 1
        example = tuple(_segment(messages, answer, chat) for messages, answer in _sides(config, row, place))
        length = sum(len(segment.tokens) for segment in example)
        if length <= row_length:
            examples.append(example)
        elif config.over_length == "drop":
            dropped[f"longer than row_length {row_length}"] += 1
        else:
            raise UserError(
                f"{place}: {length} tokens do not fit row_length {row_length}. Raise it, or drop over-long rows."
            )
    if not examples:
        raise UserError(
            f"{config.path or 'generate'}: no row is left of {rows}; left out: {dict(dropped)}. Raise row_length."
        )
    return Examples(tuple(examples), rows, dict(dropped))


def _segment(messages: Sequence[Message], answer: str, chat: Chat) -> Segment:
    prompt = chat.prompt_ids(messages)
    return Segment(np.array(prompt + chat.answer_ids(answer), np.int32), len(prompt))


def _sides(config: SftData | PairData, row: Mapping[str, Any], place: str) -> list[tuple[list[Message], str]]:
    """(conversation before the answer, answer) for each segment of the example."""
    if isinstance(config, SftData):
        if config.messages is not None:
            conversation = _messages(_field(row, config.messages, place), f"{place}, {config.messages}")
            return [_split_answer(_with_system(config, row, conversation, place), place)]
        return [
            (_prompt(config, row, place), _text(_field(row, config.response, place), f"{place}, {config.response}"))
        ]
    columns = (config.chosen, config.rejected)
    values = [_field(row, column, place) for column in columns]
    if all(isinstance(value, list) for value in values):
        lists = [_messages(value, f"{place}, {column}") for value, column in zip(values, columns, strict=True)]
        sides = [_split_answer(_with_system(config, row, conversation, place), place) for conversation in lists]
        if sides[0][0] != sides[1][0]:
            raise UserError(f"{place}: {config.chosen} and {config.rejected} do not answer the same prompt.")
    else:
        prompt = _prompt(config, row, place)
        sides = [(prompt, _text(value, f"{place}, {column}")) for value, column in zip(values, columns, strict=True)]
    if sides[0][1] == sides[1][1]:
        raise UserError(f"{place}: {config.chosen} and {config.rejected} are the same text; a pair needs two answers.")
    return sides


def _prompt(config: DataConfig, row: Mapping[str, Any], place: str) -> list[Message]:
    value = _field(row, config.prompt, place)
    if isinstance(value, list):
        return _with_system(config, row, _messages(value, f"{place}, {config.prompt}"), place)
    question = _text(value, f"{place}, {config.prompt}") + config.prompt_suffix
    return _with_system(config, row, [{"role": "user", "content": question}], place)


def _with_system(config: DataConfig, row: Mapping[str, Any], messages: list[Message], place: str) -> list[Message]:
    text = config.system
    if config.system_column is not None:
        text = _text(_field(row, config.system_column, place), f"{place}, {config.system_column}")
    return messages if text is None else [{"role": "system", "content": text}, *messages]


def _field(row: Mapping[str, Any], column: str, place: str) -> Any:
    if column not in row:
        raise UserError(f"{place}: no field {column!r}{nearest(column, list(row))}. The row has: {', '.join(row)}.")
    return row[column]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        shown = "an empty text" if isinstance(value, str) else "null" if value is None else type(value).__name__
        raise UserError(f"{place}: expected a text, found {shown}.")
    return value


def _messages(value: Any, place: str) -> list[Message]:
    """A conversation in the form role/content or from/value (ShareGPT)."""
    messages: list[Message] = []
    for turn in value if isinstance(value, list) else []:
        fields = turn if isinstance(turn, Mapping) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if role not in ROLES:
            raise UserError(f"{place}: expected turns with a role of {sorted(ROLES)}, found {turn!r:.80}.")
        messages.append({"role": ROLES[role], "content": _text(content, place)})
    if not messages:
        raise UserError(f"{place}: expected a list of messages, found {type(value).__name__}.")
    return messages


def _split_answer(messages: list[Message], place: str) -> tuple[list[Message], str]:
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{place}: the conversation does not end with an answer of the assistant after a question.")
    return messages[:-1], messages[-1]["content"]
