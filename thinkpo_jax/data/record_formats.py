"""Finds the form of a record, and maps its columns to a conversation and the answers to it.

| form | answer (SFT) | answers (pairs) | prompt |
|---|---|---|---|
| `columns` | `response` or `completion` | `chosen`, `rejected` | `prompt` |
| `messages` | the last turn of `messages` | the last turns of `chosen`, `rejected` | the turns before |
| `sharegpt` | the last turn of `conversations` | `chosen`, `rejected`, one message each | `conversations`, `system` |
| `alpaca` | `output` | `chosen`, `rejected` | `instruction`, `input`, `system`, `history` |
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import pydantic

from thinkpo_jax.data.chat_template import Message, ThinkingFormat
from thinkpo_jax.data.messages import (
    THINKING_FIELDS,
    MessageReader,
    check_unsupported_fields,
    parse_message_list,
    require_text,
)
from thinkpo_jax.data.readers import DataSourceConfig, Record, RecordError, iterate_records
from thinkpo_jax.runtime.config import ConfigSection, at_most_one_of, did_you_mean

SYSTEM_COLUMN = "system"  # of the forms sharegpt and alpaca
ROLES = ("user", "assistant")
FormName = Literal["columns", "messages", "sharegpt", "alpaca"]
# The columns of an answer, and the form that each of them stands for. `output` needs `instruction` beside it.
_FORM_BY_ANSWER_COLUMN: dict[str, FormName] = {
    "messages": "messages",
    "conversations": "sharegpt",
    "response": "columns",
    "completion": "columns",
    "output": "alpaca",
}
_PROMPT_COLUMN_BY_FORM: dict[FormName, str] = {
    "columns": "prompt",
    "sharegpt": "conversations",
    "alpaca": "instruction",
}


class PromptAnswers(NamedTuple):
    """A conversation up to the last user message, and its answers: one, or (chosen, rejected).

    `ignored_fields` are fields of its messages that are not read.
    """

    messages: list[Message]
    answers: tuple[str, ...]
    has_joined_thought: bool = False
    ignored_fields: frozenset[str] = frozenset()

    def last_user_message(self, suffix: str = "") -> str:
        """Returns the last user message without the suffix that was added."""
        return self.messages[-1]["content"].removesuffix(suffix)

    def has_earlier_answers(self) -> bool:
        """Tells whether the conversation holds turns of the assistant before the answer."""
        return any(message["role"] == "assistant" for message in self.messages)


class PromptSourceConfig(DataSourceConfig):
    """A source of prompts. They are in the column `prompt` (default "prompt"), or in the turns before the answer.

    `form` is inferred from the first record that has a known one, unless it is given. `system` (a text) or
    `system_column` goes before the conversation. `prompt_suffix` goes after the prompt. `thinking_column` holds the
    thought before the (chosen) answer. `on_bad_row`: a record that cannot be used stops the run, or is skipped and
    counted.
    """

    form: FormName | None = None
    prompt: str | None = None
    system: str | None = None
    system_column: str | None = None
    prompt_suffix: str = ""
    thinking_column: str | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"

    _one_system = at_most_one_of("system", "system_column")


class ResponseSourceConfig(PromptSourceConfig):
    """A source with one answer per prompt. It is in the column `response`, or the last turn of the column `messages`.

    If the config names neither, the first record with a known form decides.
    """

    response: str | None = None
    messages: str | None = None

    _one_column = at_most_one_of("messages", "response")

    @pydantic.model_validator(mode="after")
    def _check_form(self) -> "ResponseSourceConfig":
        is_conversation = self.form in ("messages", "sharegpt")
        if self.form is not None and (self.response if is_conversation else self.messages) is not None:
            key = "response" if is_conversation else "messages"
            raise ValueError(f"the form {self.form} has no `{key}`. Leave out one of the two keys")
        return self


class _TrainingDataConfig(ConfigSection):
    """How a source contributes to an epoch.

    An epoch reads each record `weight` times. With 0.5 it reads half of them, drawn with the seed of the run.
    `over_length` applies to an example that does not fit `row_length`. It is dropped and counted, or it stops the run,
    or its answers are cut at the end, the longer one first. A cut answer has no end token. A prompt is never cut.
    """

    weight: float = pydantic.Field(default=1.0, gt=0, le=1000)
    over_length: Literal["drop", "raise", "cut"] = "drop"


class SftDataConfig(ResponseSourceConfig, _TrainingDataConfig):
    """A source of answers for SFT. `train_on: all` also trains the earlier turns of the assistant."""

    train_on: Literal["last", "all"] = "last"


class PreferenceDataConfig(PromptSourceConfig, _TrainingDataConfig):
    """A source of preference pairs for ThinkPO: texts, or lists of messages that include the prompt.

    `rejected_thinking` applies to rejected answers without a thought. `empty_block` puts the tags of a thought without
    content before them, as Qwen3 does without thinking. These tokens belong to the prompt and are not trained.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    rejected_thinking_column: str | None = None
    rejected_thinking: Literal["as_given", "empty_block"] = "as_given"


StageDataConfig = SftDataConfig | PreferenceDataConfig
ColumnConfig = ResponseSourceConfig | PreferenceDataConfig
ColumnConfigT = TypeVar("ColumnConfigT", bound=ColumnConfig)
LocatedResponse = tuple[str, PromptAnswers, Record]  # the location names the record in messages


def infer_columns(config: ColumnConfigT, record: Record, location: str) -> ColumnConfigT:
    """Fills in the form and the columns that `config` does not name. Raises `RecordError` if none or several fit."""
    if isinstance(config, PreferenceDataConfig):
        return config if config.form else config.model_copy(update={"form": _infer_pair_form(config, record, location)})
    if config.messages is not None or config.response is not None:
        form = _FORM_BY_ANSWER_COLUMN.get(config.messages, "messages") if config.messages else "columns"
        return config if config.form else config.model_copy(update={"form": form})
    columns = [
        column
        for column, form in _FORM_BY_ANSWER_COLUMN.items()
        if column in record and (form == config.form or (not config.form and _is_complete(form, record)))
    ]
    if len(columns) != 1:
        known = ", ".join(c for c, form in _FORM_BY_ANSWER_COLUMN.items() if config.form in (None, form))
        problem = f"several answers: {', '.join(columns)}" if columns else f"no column with an answer: none of {known}"
        advice = f"The row has: {', '.join(record)}. Name the columns: `prompt` and `response`, or `messages`"
        raise RecordError("unknown columns", f"{location}: {problem}. {advice}.")
    form = _FORM_BY_ANSWER_COLUMN[columns[0]]
    key = "messages" if form in ("messages", "sharegpt") else "response"
    return config.model_copy(update={"form": form, key: columns[0]})


def _is_complete(form: FormName, record: Record) -> bool:
    return form != "alpaca" or "instruction" in record


def _infer_pair_form(config: PreferenceDataConfig, record: Record, location: str) -> FormName:
    chosen = parse_message_list(record.get(config.chosen), location)
    if isinstance(chosen, Sequence) and not isinstance(chosen, str) and len(chosen) > 1:
        return "messages"
    if config.prompt is None:
        for form, column in _PROMPT_COLUMN_BY_FORM.items():
            if column in record:
                return form
    return "columns"


def describe_form(config: ColumnConfig) -> str:
    """Returns the form of a source and the columns that are read, such as "columns (prompt, response)"."""
    is_pair = isinstance(config, PreferenceDataConfig)
    answers = (config.chosen, config.rejected) if is_pair else (config.messages or config.response or "",)
    has_prompt = config.form != "messages" and (is_pair or config.messages is None)
    prompt = (_prompt_column(config), *(("input",) if config.form == "alpaca" else ())) if has_prompt else ()
    return f"{config.form} ({', '.join((*prompt, *answers))})"


def _prompt_column(config: ColumnConfig) -> str:
    return config.prompt or _PROMPT_COLUMN_BY_FORM.get(config.form or "columns", "prompt")


def parse_record(config: ColumnConfig, record: Record, location: str, thinking: ThinkingFormat) -> PromptAnswers:
    """Returns the prompt and the answers of a record, whose form `infer_columns` has filled in.

    A thought in a field of its own is joined to its answer as `thinking` says. Raises `RecordError` for a missing
    column, a wrong type, an empty text, tool calls or media.
    """
    reader = MessageReader(thinking, location)
    if isinstance(config, PreferenceDataConfig):
        columns = (config.chosen, config.rejected)
        thinking_columns = (config.thinking_column, config.rejected_thinking_column)
    else:
        columns, thinking_columns = (config.messages or config.response or "response",), (config.thinking_column,)
    if config.form in ("messages", "sharegpt"):
        check_unsupported_fields(record, location)
    parsed = [_prompt_and_answer(config, record, column, reader) for column in columns]
    prompts, answers = zip(*parsed, strict=True)
    if prompts[0] != prompts[-1]:
        raise RecordError("two prompts", f"{location}: {' and '.join(columns)} do not answer the same prompt.")
    texts = tuple(
        reader.answer_text(answer, require_column(record, thought, location) if thought else None, column)
        for answer, column, thought in zip(answers, columns, thinking_columns, strict=True)
    )
    if len(set(texts)) < len(texts):
        problem = "are the same text; a pair needs two answers"
        raise RecordError("identical answers", f"{location}: {' and '.join(columns)} {problem}.")
    reader.ignored_fields.update(_unread_thinking_columns(record, {*columns, *thinking_columns}))
    return PromptAnswers(prompts[0], texts, reader.has_joined_thought, frozenset(reader.ignored_fields))


def _unread_thinking_columns(record: Record, read: set[str | None]) -> list[str]:
    hint = "the column `{}`, which `thinking_column: {}` would join to the answer"
    return [hint.format(name, name) for name in THINKING_FIELDS if record.get(name) and name not in read]


def iterate_responses(
    config: ResponseSourceConfig, *, seed: int, thinking: ThinkingFormat
) -> Iterator[LocatedResponse | RecordError]:
    """Yields the response of each record, or raises its `RecordError`. `on_bad_row: skip` yields the error instead."""
    for location, record in iterate_records(config, seed=seed):
        try:
            if isinstance(record, RecordError):
                raise record
            config = infer_columns(config, record, location)
            yield location, parse_record(config, record, location, thinking), record
        except RecordError as error:
            if config.on_bad_row == "raise":
                raise
            yield error


def _prompt_and_answer(
    config: ColumnConfig, record: Record, column: str, reader: MessageReader
) -> tuple[list[Message], Message]:
    """Reads the answer in a column, and its prompt: the turns before it, or the prompt columns."""
    is_conversation = isinstance(config, ResponseSourceConfig) and config.messages is not None
    value = require_column(record, column, reader.location)
    if is_conversation and not isinstance(value := parse_message_list(value, f"{reader.location}, {column}"), list):
        problem = f"expected a list of messages, found {type(value).__name__}"
        raise RecordError("no conversation", f"{reader.location}, {column}: {problem}.")
    *prompt, answer = reader.read(value, "assistant", column)
    if answer["role"] != "assistant":
        problem = f"the last turn is of the {answer['role']}, expected the assistant's answer"
        raise RecordError("turns out of order", f"{reader.location}, {column}: {problem}.")
    if prompt and config.prompt is not None:
        problem = "holds the prompt before the answer. Leave out `prompt`, which names another column"
        raise RecordError("two prompts", f"{reader.location}, {column}: {problem}.")
    if not prompt:
        column = _prompt_column(config)
        prompt = _read_prompt(config, record, column, reader)
    if prompt[-1]["role"] != "user":
        problem = f"the turn before the answer is of the {prompt[-1]['role']}, expected a user"
        raise RecordError("turns out of order", f"{reader.location}, {column}: {problem}.")
    prompt[-1]["content"] += config.prompt_suffix
    if (system := _read_system(config, record, reader.location)) is not None:
        if prompt[0]["role"] == "system":
            problem = "has a system turn already. Leave out `system` and `system_column`"
            raise RecordError("turns out of order", f"{reader.location}, {column}: {problem}.")
        prompt.insert(0, {"role": "system", "content": system})
    return prompt, answer


def _read_prompt(config: ColumnConfig, record: Record, column: str, reader: MessageReader) -> list[Message]:
    """Reads the prompt column. Alpaca's has the `input` on a line of its own, and earlier turns in `history`."""
    value = require_column(record, column, reader.location)
    if config.form != "alpaca":
        return reader.read(value, "user", column)
    question = require_text(value, f"{reader.location}, {column}")
    if record.get("input") not in (None, ""):
        question += "\n" + require_text(record["input"], f"{reader.location}, input")
    turns = record.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, Sequence) and len(turn) == 2 for turn in turns):
        problem = f"expected a list of [question, answer], found {turns!r:.80}"
        raise RecordError("no conversation", f"{reader.location}, history: {problem}.")
    history = [{"role": r, "content": text} for turn in turns for r, text in zip(ROLES, turn, strict=True)]
    return [*(reader.read(history, "user", "history") if history else ()), {"role": "user", "content": question}]


def _read_system(config: ColumnConfig, record: Record, location: str) -> str | None:
    column = config.system_column
    if config.system is not None or (column is None and config.form not in ("sharegpt", "alpaca")):
        return config.system
    value = record.get(SYSTEM_COLUMN) if column is None else require_column(record, column, location)
    return None if value in (None, "") else require_text(value, f"{location}, {column or SYSTEM_COLUMN}")


def require_column(record: Record, column: str, location: str) -> Any:
    """Returns the value of a column. Raises `RecordError` if the record does not have it."""
    if column not in record:
        problem = f"no field {column!r}{did_you_mean(column, list(record))}. The row has: {', '.join(map(str, record))}"
        raise RecordError("missing field", f"{location}: {problem}.")
    return record[column]
