"""Maps the columns of a record to a conversation and the answers to it."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import pydantic

from thinkpo_jax.data.chat_tokenizer import Message
from thinkpo_jax.data.readers import DataSourceConfig, Record, RecordError, iterate_records
from thinkpo_jax.runtime.config import ConfigSection, at_most_one_of, did_you_mean

ROLE_ALIASES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# Where the config names no column, these hold a conversation, or the answer to the column `prompt`.
CONVERSATION_COLUMNS = ("messages", "conversations")
RESPONSE_COLUMNS = ("response", "completion")
SHAREGPT_SYSTEM = "system"  # the column of the system text beside `conversations`


class PromptAnswers(NamedTuple):
    """A conversation up to the last user message, and its answers: one, or (chosen, rejected)."""

    messages: list[Message]
    answers: tuple[str, ...]

    def last_user_message(self, suffix: str = "") -> str:
        """Returns the last user message without the suffix that was added."""
        return self.messages[-1]["content"].removesuffix(suffix)


class PromptSourceConfig(DataSourceConfig):
    """A source of prompts. They are in the column `prompt` (default "prompt"), or in the turns before the answer.

    `system` (a text) or `system_column` goes before the conversation. `prompt_suffix` goes after the prompt.
    `on_bad_row`: a record that cannot be used stops the run, or is skipped and counted.
    """

    prompt: str | None = None
    system: str | None = None
    system_column: str | None = None
    prompt_suffix: str = ""
    on_bad_row: Literal["raise", "skip"] = "raise"

    _one_system = at_most_one_of("system", "system_column")


class ResponseSourceConfig(PromptSourceConfig):
    """A source with one answer per prompt. It is in the column `response`, or the last turn of the column `messages`.

    If the config names neither, the first record with one of `CONVERSATION_COLUMNS` and `RESPONSE_COLUMNS` decides.
    """

    response: str | None = None
    messages: str | None = None

    _one_column = at_most_one_of("messages", "response")


class _TrainingDataConfig(ConfigSection):
    """How a source contributes to an epoch.

    An epoch reads each record `weight` times. With 0.5 it reads half of them, drawn with the seed of the run.
    `over_length` applies to an example that does not fit `row_length`. It is dropped and counted, or it stops the run,
    or its answers are cut at the end, the longer one first. A cut answer has no end token. A prompt is never cut.
    """

    weight: float = pydantic.Field(default=1.0, gt=0, le=1000)
    over_length: Literal["drop", "raise", "cut"] = "drop"


class SftDataConfig(ResponseSourceConfig, _TrainingDataConfig):
    """A source of answers for SFT."""


class PreferenceDataConfig(PromptSourceConfig, _TrainingDataConfig):
    """A source of preference pairs for ThinkPO: texts, or lists of messages that include the prompt.

    `rejected_thinking` applies to rejected answers without a thought. `empty_block` puts `<think>` and `</think>`
    before them, as Qwen3 does without thinking. These tokens belong to the prompt and are not trained.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    rejected_thinking: Literal["as_given", "empty_block"] = "as_given"


StageDataConfig = SftDataConfig | PreferenceDataConfig
ColumnConfig = ResponseSourceConfig | PreferenceDataConfig
ColumnConfigT = TypeVar("ColumnConfigT", bound=ColumnConfig)
LocatedResponse = tuple[str, PromptAnswers, Record]  # the location names the record in messages


def infer_columns(config: ColumnConfigT, record: Record, location: str) -> ColumnConfigT:
    """Fills in the columns that `config` does not name. Raises `RecordError` if none or several hold an answer."""
    if isinstance(config, PreferenceDataConfig) or config.messages is not None or config.response is not None:
        return config
    columns = [name for name in (*CONVERSATION_COLUMNS, *RESPONSE_COLUMNS) if name in record]
    if len(columns) != 1:
        known = ", ".join((*CONVERSATION_COLUMNS, *RESPONSE_COLUMNS))
        problem = f"several answers: {', '.join(columns)}" if columns else f"no column with an answer: none of {known}"
        advice = f"The row has: {', '.join(record)}. Name the columns: `prompt` and `response`, or `messages`"
        raise RecordError("unknown columns", f"{location}: {problem}. {advice}.")
    if columns[0] in RESPONSE_COLUMNS:
        return config.model_copy(update={"response": columns[0]})
    has_sharegpt_system = columns[0] == "conversations" and SHAREGPT_SYSTEM in record and config.system is None
    system_column = config.system_column or (SHAREGPT_SYSTEM if has_sharegpt_system else None)
    return config.model_copy(update={"messages": columns[0], "system_column": system_column})


def parse_record(config: ColumnConfig, record: Record, location: str) -> PromptAnswers:
    """Returns the prompt and the answers. Raises `RecordError` for a missing column, a wrong type or an empty text."""
    is_pair = isinstance(config, PreferenceDataConfig)
    columns = (config.chosen, config.rejected) if is_pair else (config.messages or config.response or "response",)
    prompts, answers = zip(*(_prompt_and_answer(config, record, column, location) for column in columns), strict=True)
    if prompts[0] != prompts[-1]:
        raise RecordError("two prompts", f"{location}: {' and '.join(columns)} do not answer the same prompt.")
    if len(set(answers)) < len(answers):
        problem = "are the same text; a pair needs two answers"
        raise RecordError("identical answers", f"{location}: {' and '.join(columns)} {problem}.")
    return PromptAnswers(prompts[0], answers)


def iterate_responses(config: ResponseSourceConfig, *, seed: int) -> Iterator[LocatedResponse | RecordError]:
    """Yields the response of each record, or raises its `RecordError`. `on_bad_row: skip` yields the error instead."""
    for location, record in iterate_records(config, seed=seed):
        try:
            if isinstance(record, RecordError):
                raise record
            config = infer_columns(config, record, location)
            yield location, parse_record(config, record, location), record
        except RecordError as error:
            if config.on_bad_row == "raise":
                raise
            yield error


def _prompt_and_answer(config: ColumnConfig, record: Record, column: str, location: str) -> tuple[list[Message], str]:
    """Reads the answer in a column, and its prompt: the turns before it, or the prompt column."""
    is_conversation = isinstance(config, ResponseSourceConfig) and config.messages is not None
    *prompt, answer = _read_messages(record, column, None if is_conversation else "assistant", location)
    if answer["role"] != "assistant":
        problem = f"the last turn is of the {answer['role']}, expected the assistant's answer"
        raise RecordError("turns out of order", f"{location}, {column}: {problem}.")
    if prompt and config.prompt is not None:
        problem = "holds the prompt before the answer. Leave out `prompt`, which names another column"
        raise RecordError("two prompts", f"{location}, {column}: {problem}.")
    if not prompt:
        column = config.prompt or "prompt"
        prompt = _read_messages(record, column, "user", location)
    if prompt[-1]["role"] != "user":
        problem = f"the turn before the answer is of the {prompt[-1]['role']}, expected a user"
        raise RecordError("turns out of order", f"{location}, {column}: {problem}.")
    prompt[-1]["content"] += config.prompt_suffix
    system = config.system
    if config.system_column is not None:
        value = require_column(record, config.system_column, location)
        system = None if value in (None, "") else require_text(value, f"{location}, {config.system_column}")
    if system is not None:
        if prompt[0]["role"] == "system":
            problem = "has a system turn already. Leave out `system` and `system_column`"
            raise RecordError("turns out of order", f"{location}, {column}: {problem}.")
        prompt.insert(0, {"role": "system", "content": system})
    return prompt, answer["content"]


def _read_messages(record: Record, column: str, text_role: str | None, location: str) -> list[Message]:
    """Reads a text as one message of `text_role`, or a list of messages with role/content or from/value (ShareGPT)."""
    value, location = require_column(record, column, location), f"{location}, {column}"
    if text_role is not None and not isinstance(value, list):
        return [{"role": text_role, "content": require_text(value, location)}]
    if not isinstance(value, list) or not value:
        actual = "an empty list" if isinstance(value, list) else type(value).__name__
        raise RecordError("no conversation", f"{location}: expected a list of messages, found {actual}.")
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        # A table may have the columns of both forms, with nulls in those of the other form.
        fields = {key: text for key, text in turn.items() if text is not None} if isinstance(turn, Mapping) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if not isinstance(role, str) or role not in ROLE_ALIASES:
            problem = f"expected a role of {', '.join(sorted(ROLE_ALIASES))}, found {turn!r:.80}"
            raise RecordError("no conversation", f"{location}, turn {number}: {problem}.")
        messages.append({"role": ROLE_ALIASES[role], "content": require_text(content, f"{location}, turn {number}")})
    return messages


def require_column(record: Record, column: str, location: str) -> Any:
    """Returns the value of a column. Raises `RecordError` if the record does not have it."""
    if column not in record:
        problem = f"no field {column!r}{did_you_mean(column, list(record))}. The row has: {', '.join(map(str, record))}"
        raise RecordError("missing field", f"{location}: {problem}.")
    return record[column]


def require_text(value: Any, location: str) -> str:
    """Returns a value that must be a text. Raises `RecordError` if it is not, or if it is empty or blank."""
    if not isinstance(value, str) or not value.strip():
        actual = "an empty text" if isinstance(value, str) else "null" if value is None else type(value).__name__
        raise RecordError("no text", f"{location}: expected a text, found {actual}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        broken = f"{value[error.start]!r} at character {error.start + 1}"
        raise RecordError("no text", f"{location}: not a text: {broken} is half of a surrogate pair.") from None
    return value
