"""What does a row say? Columns of many forms -> a conversation that asks, and the answers to it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pydantic

from thinkpo_jax.data.chat_tokenizer import Message
from thinkpo_jax.data.readers import iterate_records
from thinkpo_jax.data.sources import DataSourceConfig, Record, RecordError
from thinkpo_jax.runtime.config import ConfigSection, did_you_mean

ROLE_ALIASES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
CONVERSATION_COLUMNS = ("messages", "conversations")  # columns that are taken for a conversation where none is named
RESPONSE_COLUMNS = ("response", "completion")  # ... and for the answer to `prompt`
SHAREGPT_SYSTEM = "system"  # the column that comes with `conversations`


class PromptAnswers(NamedTuple):
    """A conversation up to the user's last turn, and the answers to it: one, or (chosen, rejected)."""

    messages: list[Message]
    answers: tuple[str, ...]

    def last_user_message(self, suffix: str = "") -> str:
        """What the user asks last, without the suffix that was added."""
        return self.messages[-1]["content"].removesuffix(suffix)


class PromptSourceConfig(DataSourceConfig):
    """A source of rows that ask something: in a column `prompt` (default "prompt"), or in the turns before the answer.

    `system` (a text) or `system_column` comes before the conversation, `prompt_suffix` after the question. A bad row
    stops the run, or is skipped and counted.
    """

    prompt: str | None = None
    system: str | None = None
    system_column: str | None = None
    prompt_suffix: str = ""
    on_bad_row: Literal["raise", "skip"] = "raise"

    @pydantic.model_validator(mode="after")
    def _one_system(self) -> "PromptSourceConfig":
        if self.system is not None and self.system_column is not None:
            raise ValueError("give either `system` (a text) or `system_column` (a column), not both")
        return self


class ResponseSourceConfig(PromptSourceConfig):
    """A prompt and a response, or a column of messages that ends with the assistant's turn.

    Where neither `response` nor `messages` is named, the first row with one of `CONVERSATIONS` and `RESPONSES` tells.
    """

    response: str | None = None
    messages: str | None = None

    @pydantic.model_validator(mode="after")
    def _one_form(self) -> "ResponseSourceConfig":
        if self.messages is not None and self.response is not None:
            raise ValueError("give either `messages` or `response`, not both")
        return self


class _Trained(ConfigSection):
    """How rows become part of an epoch.

    `weight`: how often an epoch reads each row; 0.5 takes a half of them, drawn by the run's seed.
    `over_length`: what happens where a row does not fit `row_length`: it is dropped and counted, or stops the run, or
    its answers are cut from their ends (the longer one first), and then have no end token. A prompt is never cut.
    """

    weight: float = pydantic.Field(default=1.0, gt=0, le=1000)
    over_length: Literal["drop", "raise", "cut"] = "drop"


class SftDataConfig(ResponseSourceConfig, _Trained):
    """SFT: answers to train on."""


class PreferenceDataConfig(PromptSourceConfig, _Trained):
    """ThinkPO: texts in columns prompt, chosen, rejected; or chosen and rejected as message lists (prompt implied).

    `rejected_thinking`: how a rejected answer without thinking is read: as it is, or after an empty thinking block
    (`<think>`, `</think>`), which belongs to what is read and is not trained, as Qwen3 writes it without thinking.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    rejected_thinking: Literal["as_given", "empty_block"] = "as_given"


StageDataConfig = SftDataConfig | PreferenceDataConfig
ColumnConfig = ResponseSourceConfig | PreferenceDataConfig


def infer_columns(config: ColumnConfig, row: Record, place: str) -> ColumnConfig:
    """The config with the columns that it does not name, as the row has them. Raises `BadRow` where it has none."""
    if isinstance(config, PreferenceDataConfig) or config.messages is not None or config.response is not None:
        return config
    found = [name for name in (*CONVERSATION_COLUMNS, *RESPONSE_COLUMNS) if name in row]
    if len(found) == 1 and found[0] in RESPONSE_COLUMNS:
        return config.model_copy(update={"response": found[0]})
    if len(found) == 1:
        sharegpt = found[0] == "conversations" and SHAREGPT_SYSTEM in row and config.system is None
        column = config.system_column or (SHAREGPT_SYSTEM if sharegpt else None)
        return config.model_copy(update={"messages": found[0], "system_column": column})
    known = ", ".join((*CONVERSATION_COLUMNS, *RESPONSE_COLUMNS))
    problem = f"several answers: {', '.join(found)}" if found else f"no column with an answer: none of {known}"
    raise RecordError(
        "form not known",
        f"{place}: {problem}. The row has: {', '.join(row)}. Name the columns: `prompt` and `response`, or `messages`.",
    )


def parse_record(config: ColumnConfig, row: Record, place: str) -> PromptAnswers:
    """What a row asks and answers. Raises `BadRow`: a missing column, a value of another type, an empty text."""
    if isinstance(config, ResponseSourceConfig):
        messages, answer = _side(config, row, config.messages or config.response or RESPONSE_COLUMNS[0], place)
        return PromptAnswers(messages, (answer,))
    sides = [_side(config, row, column, place) for column in (config.chosen, config.rejected)]
    if sides[0][0] != sides[1][0]:
        problem = f"{config.chosen} and {config.rejected} do not answer the same prompt"
        raise RecordError("two prompts", f"{place}: {problem}.")
    if sides[0][1] == sides[1][1]:
        problem = f"{config.chosen} and {config.rejected} are the same text; a pair needs two answers"
        raise RecordError("identical answers", f"{place}: {problem}.")
    return PromptAnswers(sides[0][0], (sides[0][1], sides[1][1]))


def iterate_responses(
    config: ResponseSourceConfig, *, seed: int
) -> Iterator[tuple[str, PromptAnswers, Record] | RecordError]:
    """(place, what is asked and answered, row) of each row. A bad row is raised, or given where it is to be skipped."""
    form: ResponseSourceConfig | None = None
    for place, row in iterate_records(config, seed=seed):
        try:
            if isinstance(row, RecordError):
                raise row
            found = infer_columns(form or config, row, place)
            assert isinstance(found, ResponseSourceConfig)
            form = form or found
            yield place, parse_record(form, row, place), row
        except RecordError as error:
            if config.on_bad_row == "raise":
                raise
            yield error


def _side(config: ColumnConfig, row: Record, column: str, place: str) -> tuple[list[Message], str]:
    """A text, or a list of messages that ends with the answer; the prompt comes before it or from its own column."""
    value, place_in_row = require_column(row, column, place), f"{place}, {column}"
    if isinstance(value, list) or (isinstance(config, ResponseSourceConfig) and config.messages is not None):
        *before, answer = _messages(value, place_in_row)
        if answer["role"] != "assistant":
            problem = f"the last turn is of the {answer['role']}, expected the assistant's answer"
            raise RecordError("turns out of order", f"{place_in_row}: {problem}.")
        if before and config.prompt is not None:
            problem = "holds the prompt before the answer; leave out `prompt`, which names another column"
            raise RecordError("two prompts", f"{place_in_row}: {problem}.")
        prompt = _question(config, row, before, place, place_in_row) if before else _prompt(config, row, place)
        return prompt, answer["content"]
    return _prompt(config, row, place), require_text(value, place_in_row)


def _prompt(config: ColumnConfig, row: Record, place: str) -> list[Message]:
    column = config.prompt or "prompt"
    value, place_in_row = require_column(row, column, place), f"{place}, {column}"
    if isinstance(value, list):
        return _question(config, row, _messages(value, place_in_row), place, place_in_row)
    return _question(config, row, [{"role": "user", "content": require_text(value, place_in_row)}], place, place_in_row)


def _question(
    config: ColumnConfig, row: Record, messages: Sequence[Message], place: str, place_in_row: str
) -> list[Message]:
    """The conversation that asks: the row's, with the system text before it and the suffix after it."""
    if messages[-1]["role"] != "user":
        problem = f"the turn before the answer is of the {messages[-1]['role']}, expected a user"
        raise RecordError("turns out of order", f"{place_in_row}: {problem}.")
    last: Message = {"role": "user", "content": messages[-1]["content"] + config.prompt_suffix}
    system = config.system
    if config.system_column is not None:
        value = require_column(row, config.system_column, place)
        system = None if value is None or value == "" else require_text(value, f"{place}, {config.system_column}")
    if system is None:
        return [*messages[:-1], last]
    if messages[0]["role"] == "system":
        problem = "has a system turn already; leave out `system` and `system_column`"
        raise RecordError("turns out of order", f"{place_in_row}: {problem}.")
    return [{"role": "system", "content": system}, *messages[:-1], last]


def require_column(row: Record, column: str, place: str) -> Any:
    """The value of a column. Raises `BadRow` where the row lacks it."""
    if column not in row:
        problem = f"no field {column!r}{did_you_mean(column, list(row))}. The row has: {', '.join(map(str, row))}"
        raise RecordError("missing field", f"{place}: {problem}.")
    return row[column]


def require_text(value: Any, place: str) -> str:
    """A value that is a text and not empty. Raises `BadRow`."""
    if not isinstance(value, str) or not value.strip():
        shown = "an empty text" if isinstance(value, str) else "null" if value is None else type(value).__name__
        raise RecordError("no text", f"{place}: expected a text, found {shown}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        broken = f"{value[error.start]!r} at character {error.start + 1}"
        raise RecordError("no text", f"{place}: not a text: {broken} is half of a character (a surrogate).") from None
    return value


def _messages(value: Any, place: str) -> list[Message]:
    """A conversation in the form role/content or from/value (ShareGPT)."""
    if not isinstance(value, list) or not value:
        shown = "an empty list" if isinstance(value, list) else type(value).__name__
        raise RecordError("no conversation", f"{place}: expected a list of messages, found {shown}.")
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        fields = turn if isinstance(turn, Mapping) else {}
        role, content = _either(fields, "role", "from"), _either(fields, "content", "value")
        if not isinstance(role, str) or role not in ROLE_ALIASES:
            problem = f"expected a role of {', '.join(sorted(ROLE_ALIASES))}, found {turn!r:.80}"
            raise RecordError("no conversation", f"{place}, turn {number}: {problem}.")
        messages.append({"role": ROLE_ALIASES[role], "content": require_text(content, f"{place}, turn {number}")})
    return messages


def _either(fields: Mapping[str, Any], name: str, other: str) -> Any:
    """The field under the one name or the other; a table may have both columns, one of them null."""
    value = fields.get(name)
    return fields.get(other) if value is None else value
