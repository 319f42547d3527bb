"""Finds the form of a record, and maps its columns to a conversation and the answers to it.

| form | answer (SFT) | answers (pairs) | prompt |
|---|---|---|---|
| `columns` | `response` or `completion` | `chosen`, `rejected` | `prompt` |
| `messages` | the last turn of `messages` | the last turns of `chosen`, `rejected` | the turns before |
| `sharegpt` | the last turn of `conversations` | `chosen`, `rejected`, one message each | `conversations`, `system` |
| `alpaca` | `output` | `chosen`, `rejected` | `instruction`, `input`, `system`, `history` |
| `gsm8k` | `long` or `short`, made from `answer` | the same | `question`, with an instruction (gsm8k.py) |
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import pydantic

from thinkpo_jax.data.chat_template import Message, ThinkingFormat
from thinkpo_jax.data.examples import SourceReport
from thinkpo_jax.data.gsm8k import ANSWER_COLUMNS, add_answers
from thinkpo_jax.data.messages import (
    MessageReader,
    check_unsupported_fields,
    is_empty,
    parse_messages,
    require_column,
    require_text,
)
from thinkpo_jax.data.readers import DataSourceConfig, Record, RecordError, iterate_records
from thinkpo_jax.runtime.config import ConfigSection, at_most_one_of
from thinkpo_jax.runtime.console import log_info

SYSTEM_COLUMN = "system"  # unless the config names another one
_ALPACA_PROMPT = "instruction"
ROLES = ("user", "assistant")
FormName = Literal["columns", "messages", "sharegpt", "alpaca", "gsm8k"]  # `gsm8k` is never detected
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

    `ignored_fields` are fields of its messages that are not read, and `unread_columns` are columns of the record.
    """

    messages: list[Message]
    answers: tuple[str, ...]
    has_joined_thought: bool = False
    ignored_fields: frozenset[str] = frozenset()
    unread_columns: frozenset[str] = frozenset()

    def last_user_message(self, suffix: str = "") -> str:
        """Returns the last user message without the suffix that was added."""
        return self.messages[-1]["content"].removesuffix(suffix)

    def has_earlier_answers(self) -> bool:
        """Tells whether the conversation holds turns of the assistant before the answer."""
        return any(message["role"] == "assistant" for message in self.messages)

    def count_in(self, report: SourceReport, config: "ColumnConfig") -> None:
        """Adds what was joined and what was not read to a report."""
        if self.has_joined_thought or config.thinking_column is not None:
            report.num_joined_thoughts = (report.num_joined_thoughts or 0) + self.has_joined_thought
        names = self.unread_columns - set(config.other_columns) if config.generate is None else ()
        for counts, keys in ((report.ignored_fields, self.ignored_fields), (report.unread_columns, names)):
            counts.update({key: counts.get(key, 0) + 1 for key in keys})


class PromptSourceConfig(DataSourceConfig):
    """A source of prompts. They are in the column `prompt` (default "prompt"), or in the turns before the answer.

    The first record with a known form sets `form`, unless it is given. The text in `system`, or the column that
    `system_column` names (default "system"), goes before the conversation. The text in `prompt_suffix` goes after the
    prompt. The column that `thinking_column` names holds the thought before the (chosen) answer. The key `on_bad_row`
    says whether a record that cannot be used stops the run, or is skipped and counted.
    """

    form: FormName | None = None
    prompt: str | None = None
    system: str | None = None
    system_column: str | None = None
    prompt_suffix: str = ""
    thinking_column: str | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"

    _one_system = at_most_one_of("system", "system_column")

    @property
    def other_columns(self) -> tuple[str, ...]:
        """Columns that the caller reads itself."""
        return ()


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
    if config.form == "gsm8k":
        return config if config.response else config.model_copy(update={"response": "long"})
    if config.messages is not None or config.response is not None:
        form = _form_of_answer(config.messages or config.response or "", record, is_list=config.messages is not None)
        return config if config.form else config.model_copy(update={"form": form})
    columns = [
        column
        for column, form in _FORM_BY_ANSWER_COLUMN.items()
        if record.get(column) is not None
        and (form == config.form or (not config.form and (form != "alpaca" or _ALPACA_PROMPT in record)))
    ]
    if len(columns) != 1:
        known = ", ".join(c for c, form in _FORM_BY_ANSWER_COLUMN.items() if config.form in (None, form))
        problem = f"several answers: {', '.join(columns)}" if columns else f"no column with an answer: none of {known}"
        advice = f"The row has: {', '.join(record)}. Name the columns: `prompt` and `response`, or `messages`"
        raise RecordError("unknown columns", f"{location}: {problem}. {advice}.")
    form = _FORM_BY_ANSWER_COLUMN[columns[0]]
    key = "messages" if form in ("messages", "sharegpt") else "response"
    return config.model_copy(update={"form": form, key: columns[0]})


def _form_of_answer(column: str, record: Record, *, is_list: bool) -> FormName:
    """Returns the form of a record whose answer column is given."""
    if is_list:
        return "sharegpt" if column == _PROMPT_COLUMN_BY_FORM["sharegpt"] else "messages"
    return "alpaca" if column == "output" and _ALPACA_PROMPT in record else "columns"


def _infer_pair_form(config: PreferenceDataConfig, record: Record, location: str) -> FormName:
    if is_empty(record.get(config.chosen)):  # the next record decides
        raise RecordError("missing field", f"{location}: no answer in the column {config.chosen!r}.")
    chosen = parse_messages(record.get(config.chosen), location)
    if isinstance(chosen, list) and len(chosen) > 1:
        return "messages"
    for form, column in _PROMPT_COLUMN_BY_FORM.items():
        if column == config.prompt or (config.prompt is None and column in record):
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
    default = "question" if config.form == "gsm8k" else _PROMPT_COLUMN_BY_FORM.get(config.form or "columns", "prompt")
    return config.prompt or default


def parse_record(config: ColumnConfig, record: Record, location: str, thinking: ThinkingFormat) -> PromptAnswers:
    """Returns the prompt and the answers of a record, whose form `infer_columns` has filled in.

    A thought in a field of its own is joined to its answer as `thinking` says. Raises `RecordError` for a missing
    column, a wrong type, an empty text, tool calls or media.
    """
    check_unsupported_fields(record, location)
    used = set[str]()
    if config.form == "gsm8k":
        record, used = add_answers(record, location), set(ANSWER_COLUMNS)
    parser = _RecordParser(config, record, MessageReader(thinking, location), used)
    if isinstance(config, PreferenceDataConfig):
        columns = (config.chosen, config.rejected)
        thinking_columns = (config.thinking_column, config.rejected_thinking_column)
    else:
        columns, thinking_columns = (config.messages or config.response or "response",), (config.thinking_column,)
    prompts, answers = zip(*map(parser.read_prompt_and_answer, columns), strict=True)
    if prompts[0] != prompts[-1]:
        raise RecordError("two prompts", f"{location}: {' and '.join(columns)} do not answer the same prompt.")
    texts = tuple(map(parser.join_thought, answers, columns, thinking_columns))
    if len(set(texts)) < len(texts):
        problem = "are the same text, but a pair needs two answers. Change one of them or remove the row"
        raise RecordError("identical answers", f"{location}: {' and '.join(columns)} {problem}.")
    unread = frozenset(str(name) for name, value in record.items() if not is_empty(value) and name not in parser.used)
    reader = parser.reader
    return PromptAnswers(prompts[0], texts, reader.has_joined_thought, frozenset(reader.ignored_fields), unread)


def iterate_responses(
    config: ResponseSourceConfig, *, seed: int, thinking: ThinkingFormat
) -> Iterator[LocatedResponse | RecordError]:
    """Yields the response of each record, or raises its `RecordError`. `on_bad_row: skip` yields the error instead.

    Logs at the end what `SourceReport.notes` says of the records.
    """
    report = SourceReport(config.name, thinking_tag=thinking.tags[0])
    for location, record in iterate_records(config, seed=seed):
        try:
            if isinstance(record, RecordError):
                raise record
            config = infer_columns(config, record, location)
            report.form = describe_form(config)
            parsed = parse_record(config, record, location, thinking)
            parsed.count_in(report, config)
            yield location, parsed, record
        except RecordError as error:
            if config.on_bad_row == "raise":
                raise
            yield error
    for note in report.notes():
        log_info(note)


@dataclass
class _RecordParser:
    """Reads the columns of one record. `used` are the columns that were read."""

    config: ColumnConfig
    record: Record
    reader: MessageReader
    used: set[str] = field(default_factory=set)

    def _column(self, name: str) -> Any:
        self.used.add(name)
        return require_column(self.record, name, self.reader.location)

    def read_prompt_and_answer(self, column: str) -> tuple[list[Message], Message]:
        """Reads the answer in a column, and its prompt: the turns before it, or the prompt columns, or both."""
        config, location = self.config, f"{self.reader.location}, {column}"
        value = self._column(column)
        is_conversation = isinstance(config, ResponseSourceConfig) and config.messages is not None
        if is_conversation and not isinstance(value := parse_messages(value, location), list):
            problem = f"expected a list of messages, found {type(value).__name__}"
            raise RecordError("no conversation", f"{location}: {problem}.")
        *prompt, answer = self.reader.read(value, "assistant", column) or [{"role": "system", "content": ""}]
        if answer["role"] != "assistant":
            problem = f"the last turn is of the {answer['role']}, expected the assistant's answer"
            raise RecordError("turns out of order", f"{location}: {problem}.")
        if prompt and config.prompt is not None:
            problem = "holds the prompt before the answer. Leave out `prompt`, which names another column"
            raise RecordError("two prompts", f"{location}: {problem}.")
        if not prompt or prompt[0]["role"] == "assistant":  # the turns go on with the prompt in its column
            column = _prompt_column(config)
            prompt = self._read_prompt(column) + prompt
        elif (other := self.record.get("prompt")) in [message["content"] for message in prompt] or other is None:
            self.used.add("prompt")  # it repeats a turn
        if prompt[-1]["role"] != "user":
            problem = f"the turn before the answer is of the {prompt[-1]['role']}, expected a user"
            raise RecordError("turns out of order", f"{self.reader.location}, {column}: {problem}.")
        prompt[-1]["content"] += config.prompt_suffix
        return self._with_system(prompt, column), answer

    def join_thought(self, answer: Message, column: str, thinking_column: str | None) -> str:
        """Returns the text of an answer with its thought."""
        thought = self._column(thinking_column) if thinking_column else None
        return self.reader.answer_text(answer, thought, column, thinking_column)

    def _read_prompt(self, column: str) -> list[Message]:
        """Reads the prompt column. Alpaca's has the `input` on a line of its own, and earlier turns in `history`."""
        self.used.add(column)
        value = require_column(self.record, column, self.reader.location, key="prompt")
        if self.config.form != "alpaca":
            return self.reader.read(value, "user", column)
        self.used |= {"input", "history"}
        parts = {column: value, "input": self.record.get("input")}
        parts = {name: part for name, part in parts.items() if not is_empty(part)} or {column: value}
        texts = [require_text(part, f"{self.reader.location}, {name}") for name, part in parts.items()]
        return [*self._read_history(self.record.get("history")), {"role": "user", "content": "\n".join(texts)}]

    def _read_history(self, turns: Any) -> list[Message]:
        """Reads Alpaca's earlier turns, a list of [question, answer] that may be JSON text."""
        if isinstance(turns, str):
            with contextlib.suppress(ValueError):
                turns = json.loads(turns or "[]")
        turns = turns or []
        if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            problem = f"expected a list of [question, answer], found {turns!r:.80}"
            raise RecordError("no conversation", f"{self.reader.location}, history: {problem}.")
        messages = [{"role": r, "content": text} for turn in turns for r, text in zip(ROLES, turn, strict=True)]
        return self.reader.read(messages, "user", "history") if messages else []

    def _with_system(self, prompt: list[Message], column: str) -> list[Message]:
        """Puts the system message of the config or of a column before the prompt.

        If the config does not name the column, a system turn of the data wins.
        """
        config, has_turn, system = self.config, prompt[0]["role"] == "system", self.config.system
        if system is None and (config.system_column is not None or not has_turn):
            name = config.system_column or SYSTEM_COLUMN
            value = self._column(name) if config.system_column or name in self.record else None
            system = None if is_empty(value) else require_text(value, f"{self.reader.location}, {name}")
        if system is None:
            return prompt
        if has_turn:
            problem = "has a system turn already. Leave out `system` and `system_column`"
            raise RecordError("turns out of order", f"{self.reader.location}, {column}: {problem}.")
        return [{"role": "system", "content": system}, *prompt]
