"""What is in a batch, before it has a row? Rows of a file, a data set or a generator -> tokenised examples.

An example is a tuple of segments that stay together: one for SFT, two (chosen, rejected) for a preference pair.
"""

import glob
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from thinkpo_jax.chat import Chat, Message
from thinkpo_jax.config import PathText, Section, UserError, nearest
from thinkpo_jax.miniature import MiniatureData

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FILE_SUFFIXES = (".json", ".csv", ".tsv", ".txt", ".gz", ".zst", ".arrow")  # other dots belong to a Hub id: owner/v1.5
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def is_file(path: str) -> bool:
    """Whether a `path` names a file, not a data set of the Hub."""
    return path.endswith((".jsonl", ".parquet"))


class DataConfig(Section):
    """Where rows come from (`path`: a .jsonl or .parquet file or a Hub id; or `generate`), and which columns."""

    path: PathText | None = None
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
        if (self.path is None or is_file(self.path)) and (self.split != "train" or self.subset is not None):
            raise ValueError("`split` and `subset` choose within a data set of the Hub; a file has neither")
        return self


class SftData(DataConfig):
    """SFT: a prompt and a response, or one column of `messages` that ends with the assistant's turn."""

    response: str = "response"
    messages: str | None = None

    @pydantic.model_validator(mode="after")
    def _one_form(self) -> "SftData":
        if self.messages is not None and self.response != "response":
            raise ValueError("give either `messages` or `response`, not both")
        return self


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

    def digest(self) -> str:
        """A digest of all ids and answer spans: whether a resumed stage still reads the same data."""
        found = hashlib.sha256()
        for segment in itertools.chain.from_iterable(self.examples):
            found.update(f"{len(segment.tokens)} {segment.answer_start} ".encode())
            found.update(segment.tokens.tobytes())
        return found.hexdigest()[:16]

    def lengths(self) -> np.ndarray:
        """Tokens of each example, all its segments together; int64 [n]."""
        return np.array([sum(len(segment.tokens) for segment in example) for example in self.examples])


def read_rows(config: DataConfig, *, seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) for each row of the source, at most `limit`; the place is what an error names."""
    empty = True
    for found in itertools.islice(_all_rows(config, seed), config.limit):
        empty = False
        yield found
    if empty:
        raise UserError(f"{config.path or 'generate'}: there are no rows, expected at least one.")


def _all_rows(config: DataConfig, seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if config.generate is not None:
        yield from ((f"generated question {i}", row) for i, row in enumerate(config.generate.rows(seed)))
        return
    path = Path(str(config.path)).expanduser()
    if is_file(path.name) and not path.is_file():
        found = "found a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{path}: {found}. Set `path` to a .jsonl or .parquet file or a Hub id.")
    if path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
        return
    try:
        yield from ((f"{config.path}, row {i}", row) for i, row in enumerate(_dataset(config, path)))
    except UnicodeDecodeError as error:
        raise UserError(f"{config.path}: holds a text that is not valid UTF-8: {error}. Write it again.") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open("rb") as file:  # bytes end a line at \n alone; a text may hold U+2028
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", _json_object(line, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _json_object(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not valid UTF-8: {error}. Convert the file to UTF-8.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON: {error.msg}, at character {error.pos + 1}. Expected one object per line."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise UserError(f"{place}: cannot be read as JSON: {error}.") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(row).__name__}.")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[0]!r} is given twice")
    return found


def _dataset(config: DataConfig, path: Path) -> Any:
    import datasets  # slow to import, and only this branch needs it
    from datasets.exceptions import DatasetsError

    parquet = path.suffix == ".parquet"
    if not parquet and (path.exists() or path.suffix in FILE_SUFFIXES or not HUB_ID.fullmatch(str(config.path))):
        found = "a folder" if path.is_dir() else "another kind of file" if path.exists() else "no such file"
        raise UserError(f"{config.path}: expected a .jsonl or .parquet file or a Hub id (owner/name), found {found}.")
    try:
        if parquet:
            return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        return datasets.load_dataset(str(config.path), config.subset, split=config.split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        advice = "" if parquet else " Without a network, download it first and set `path` to the file."
        reason = str(error.__cause__ or error).rstrip(".")  # the cause says what datasets' own error hides
        raise UserError(f"{config.path}: cannot be loaded as a data set: {reason}.{advice}") from None


def tokenize(config: SftData | PairData, chat: Chat, *, row_length: int, seed: int) -> Examples:
    """All examples of the source as ids; those of more than `row_length` tokens are dropped and counted, or raise.

    Raises `UserError` naming the row for a missing column, a value of another type or an empty text.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    rows = 0
    for place, row in read_rows(config, seed=seed):
        rows += 1
        example = tuple(_segment(*side, chat, place) for side in _sides(config, row, place))
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


def _segment(messages: Sequence[Message], answer: str, chat: Chat, place: str) -> Segment:
    try:
        prompt_ids, answer_ids = chat.example_ids(messages, answer)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return Segment(np.array(prompt_ids + answer_ids, np.int32), len(prompt_ids))


def _sides(config: SftData | PairData, row: Mapping[str, Any], place: str) -> list[tuple[list[Message], str]]:
    """(conversation before the answer, answer) for each segment of the example."""
    if isinstance(config, SftData):
        return [_side(config, row, config.messages or config.response, place)]
    sides = [_side(config, row, column, place) for column in (config.chosen, config.rejected)]
    if sides[0][0] != sides[1][0]:
        raise UserError(f"{place}: {config.chosen} and {config.rejected} do not answer the same prompt.")
    if sides[0][1] == sides[1][1]:
        raise UserError(f"{place}: {config.chosen} and {config.rejected} are the same text; a pair needs two answers.")
    return sides


def _side(config: DataConfig, row: Mapping[str, Any], column: str, place: str) -> tuple[list[Message], str]:
    """A text, or a list of messages that ends with the answer; the prompt comes before it or from its own column."""
    value, place_in_row = _field(row, column, place), f"{place}, {column}"
    if isinstance(value, list) or (isinstance(config, SftData) and config.messages is not None):
        *before, answer = _messages(value, place_in_row)
        if answer["role"] != "assistant":
            raise UserError(
                f"{place_in_row}: the last turn is of the {answer['role']}, expected the assistant's answer."
            )
        prompt = _question(config, row, before, place, place_in_row) if before else _prompt(config, row, place)
        return prompt, answer["content"]
    return _prompt(config, row, place), _text(value, place_in_row)


def _prompt(config: DataConfig, row: Mapping[str, Any], place: str) -> list[Message]:
    value, place_in_row = _field(row, config.prompt, place), f"{place}, {config.prompt}"
    if isinstance(value, list):
        return _question(config, row, _messages(value, place_in_row), place, place_in_row)
    return _question(config, row, [{"role": "user", "content": _text(value, place_in_row)}], place, place_in_row)


def _question(
    config: DataConfig, row: Mapping[str, Any], messages: list[Message], place: str, place_in_row: str
) -> list[Message]:
    """The conversation that asks: the row's, with the system text before it and the suffix after it."""
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{place_in_row}: the turn before the answer is of the {messages[-1]['role']}, expected a user."
        )
    asked: Message = {"role": "user", "content": messages[-1]["content"] + config.prompt_suffix}
    text = config.system
    if config.system_column is not None:
        text = _text(_field(row, config.system_column, place), f"{place}, {config.system_column}")
    if text is None:
        return [*messages[:-1], asked]
    if messages[0]["role"] == "system":
        raise UserError(f"{place_in_row}: has a system turn already; leave out `system` and `system_column`.")
    return [{"role": "system", "content": text}, *messages[:-1], asked]


def _field(row: Mapping[str, Any], column: str, place: str) -> Any:
    if column not in row:
        raise UserError(f"{place}: no field {column!r}{nearest(column, list(row))}. The row has: {', '.join(row)}.")
    return row[column]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        shown = "an empty text" if isinstance(value, str) else "null" if value is None else type(value).__name__
        raise UserError(f"{place}: expected a text, found {shown}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        broken = f"{value[error.start]!r} at character {error.start + 1}"
        raise UserError(f"{place}: not a text: {broken} is half of a character (a surrogate).") from None
    return value


def _messages(value: Any, place: str) -> list[Message]:
    """A conversation in the form role/content or from/value (ShareGPT)."""
    if not isinstance(value, list) or not value:
        shown = "an empty list" if isinstance(value, list) else type(value).__name__
        raise UserError(f"{place}: expected a list of messages, found {shown}.")
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        fields = turn if isinstance(turn, Mapping) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(
                f"{place}, turn {number}: expected a role of {', '.join(sorted(ROLES))}, found {turn!r:.80}."
            )
        messages.append({"role": ROLES[role], "content": _text(content, f"{place}, turn {number}")})
    return messages
