"""Reads the messages of a conversation: roles, texts, thoughts in fields of their own, and fields that are not read."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thinkpo_jax.data.chat_template import THINKING_FIELDS, Message, ThinkingFormat
from thinkpo_jax.data.file_formats import Record, RecordError
from thinkpo_jax.runtime.config import did_you_mean

ROLE_ALIASES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
}
TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython")
FIELD_NAMES = (("role", "from"), ("content", "value"))  # of OpenAI and of ShareGPT
TRAINING_FIELDS = ("weight", "train", "loss")  # of a turn, in the formats of OpenAI, axolotl and ms-swift
UNSUPPORTED_FIELDS = {
    "tool calls": ("tool_calls", "function_call", "tool_call_id", "tools", "functions"),
    "images or audio": ("images", "image", "audio", "audios", "videos", "video"),
}
TEXT_PARTS, THOUGHT_PARTS = ("text", "input_text", "output_text"), ("thinking", "reasoning")
TOOL_PARTS = ("tool_use", "tool_result", "tool_call", "function_call")
MAX_LITERAL_CHARACTERS = 2**20  # Python takes seconds and a gigabyte for a longer literal.
# How a list of messages looks that Python printed. It is no JSON, and without commas it is no Python either.
_PRINTED_MESSAGES = re.compile(r"\s*\[?\s*\{\s*'(role|from)': '(user|human|system|assistant|gpt)'")


@dataclass
class MessageReader:
    """Reads the messages of one record, and notes what it joined and what it did not read."""

    thinking: ThinkingFormat
    location: str
    has_joined_thought: bool = False
    ignored_fields: set[str] = field(default_factory=set)

    def read(self, value: Any, role: str, column: str) -> list[Message]:
        """Reads a text as one message of `role`, or one message, or a list of messages. These may also be JSON text."""
        location = f"{self.location}, {column}"
        value = unwrap_text(parse_messages(value, location))
        if isinstance(value, Mapping):
            value = value.get("messages", [value])  # OpenAI's preference files have {"messages": [...]}
        if not isinstance(value, list):
            return [{"role": role, "content": require_text(value, location)}]
        if not value:
            raise RecordError("no conversation", f"{location}: expected a list of messages, found an empty list.")
        messages = [self._read_turn(turn, f"{location}, turn {number}") for number, turn in enumerate(value, 1)]
        return [message for message in messages if message is not None]

    def answer_text(self, message: Message, thought: Any, column: str, thinking_column: str | None) -> str:
        """Returns the text of an answer. A thought in a field of its own, or in a column, is joined to it."""
        location = f"{self.location}, {column}"
        column_thought = read_thought(thought, f"{self.location}, {thinking_column}")
        if "thinking" in message and column_thought:
            problem = f"the message and the column {thinking_column!r} both hold its thought. Leave out one of them"
            raise RecordError("two thoughts", f"{location}: {problem}.")
        if not (thought := message.get("thinking") or column_thought):
            return message["content"]
        if tag := self.thinking.find_tag(message["content"], thought):
            problem = f"the thought is in a field of its own, but {tag} is in the text too. Leave out one of them"
            raise RecordError("two thoughts", f"{location}: {problem}.")
        self.has_joined_thought = True
        return self.thinking.join(thought, message["content"])

    def _read_turn(self, turn: Any, location: str) -> Message | None:
        """Returns a message, or None for a system message without text."""
        # A table may have the columns of several forms, with nulls in those of the other forms.
        items = turn.items() if isinstance(turn, Mapping) else ()
        fields = {key: value for key, value in items if value is not None}
        role, content = (fields.pop(next((n for n in names if n in fields), ""), None) for names in FIELD_NAMES)
        fields = {key: value for key, value in fields.items() if not is_empty(value)}
        role = role.lower() if isinstance(role, str) else None
        if role in TOOL_ROLES:
            problem = f"the role {role!r} belongs to tool calls, which are not supported"
            raise RecordError("tool calls", f"{location}: {problem}. Remove the row.")
        if role not in ROLE_ALIASES:
            problem = f"expected a role of {', '.join(sorted(ROLE_ALIASES))}, found {turn!r:.80}. Rename it"
            raise RecordError("no conversation", f"{location}: {problem}.")
        check_unsupported_fields(fields, location)
        for name in TRAINING_FIELDS:
            if fields.pop(name, 1) != 1:
                problem = f"the field {name!r} says not to train the turn, which is not supported"
                raise RecordError("weight of a turn", f"{location}: {problem}. Remove the field or the row.")
        if ROLE_ALIASES[role] == "system" and is_empty(content):
            return None
        content, thoughts = _read_parts(content, location) if isinstance(content, list) else (content, [])
        if ROLE_ALIASES[role] == "assistant":
            read = [read_thought(fields.pop(name), f"{location}, {name}") for name in THINKING_FIELDS if name in fields]
            thoughts += filter(None, read)
        if content is None:
            problem = f"has no text in `content` or `value`. Its fields are: {', '.join(map(str, turn))}"
            raise RecordError("no text", f"{location}: {problem}.")
        self.ignored_fields.update(map(str, fields))
        message: Message = {"role": ROLE_ALIASES[role], "content": require_text(content, location)}
        if len(set(thoughts)) > 1:  # a server may write one thought into two fields
            problem = "several fields hold different thoughts. Leave out all but one"
            raise RecordError("two thoughts", f"{location}: {problem}.")
        return {**message, "thinking": thoughts[0]} if thoughts else message


def is_empty(value: Any) -> bool:
    """Tells whether a value stands for nothing: null, an empty list or a text without characters."""
    return value is None or (isinstance(value, str) and not value.strip()) or value == [] or value == {}


def check_unsupported_fields(fields: Mapping[str, Any], location: str) -> None:
    """Raises `RecordError` if a message or a record has tool calls, images or audio."""
    for reason, names in UNSUPPORTED_FIELDS.items():
        for name in names:
            value = fields.get(name)
            if not is_empty(value) and (not isinstance(value, str) or value.strip()[:2] in ("[{", '["')):
                problem = f"has the field {name!r}, but {reason} are not supported"
                raise RecordError(reason, f"{location}: {problem}. Remove the field or the row.")


def parse_messages(value: Any, location: str) -> Any:
    """Returns the message or the list of messages that a text holds as JSON or as a Python literal.

    Any other value is returned as it is. Raises `RecordError` for a list of messages that NumPy printed, or that is a
    literal of more than `MAX_LITERAL_CHARACTERS`.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    is_short = len(value) <= MAX_LITERAL_CHARACTERS
    for parse in (json.loads, ast.literal_eval) if is_short else (json.loads,):
        try:
            parsed = parse(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        messages = parsed if isinstance(parsed, list) else [parsed]
        return parsed if messages and all(map(_is_message, messages)) else value
    if _PRINTED_MESSAGES.match(value):
        problem = "a list of messages is written as Python prints it. Save the data as JSONL or Parquet"
        raise RecordError("messages as text", f"{location}: {problem}.")
    return value


def _is_message(value: Any) -> bool:
    """Tells whether a value of a parsed text is a message, and not data that an answer happens to hold."""
    return isinstance(value, Mapping) and any(
        str(value.get(role)).lower() in (*ROLE_ALIASES, *TOOL_ROLES) and content in value
        for role, content in zip(*FIELD_NAMES, strict=True)
    )


def unwrap_text(value: Any) -> Any:
    """Returns the text of a list with one text, such as a column of several samples, else the value itself."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def read_thought(value: Any, location: str) -> str | None:
    """Returns the thought in a field or a column: a text, or a list of parts. None for an empty one or `false`."""
    if is_empty(value) or value is False:
        return None
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        value = "\n".join(require_text(part.get("text"), location) for part in value)
    return require_text(unwrap_text(value), location)


def _read_parts(parts: Sequence[Any], location: str) -> tuple[str | None, list[str]]:
    """Returns the text of a content that is a list of parts, and its thoughts. Line breaks separate its texts."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in TEXT_PARTS:
            texts.append(require_text(part.get("text"), location))
        elif kind in THOUGHT_PARTS and not texts:
            values = [part.get(name) for name in (kind, "text", "summary") if not is_empty(part.get(name))]
            thoughts += filter(None, [read_thought(value, location) for value in values[:1]])
        elif kind in THOUGHT_PARTS:
            raise RecordError("two thoughts", f"{location}: a thought comes after a text. Put it before the text.")
        else:
            reason = "tool calls" if kind in TOOL_PARTS else "images or audio"
            problem = f"expected parts of type text, found {kind or part!r:.80}. Other parts are not supported"
            raise RecordError(reason, f"{location}: {problem}. Remove the row.")
    return "\n".join(texts) if texts else None, ["\n".join(thoughts)] if thoughts else []


def require_column(record: Record, column: str, location: str, *, key: str | None = None) -> Any:
    """Returns the value of a column, which the config names under `key`. Raises `RecordError` if it is missing."""
    if column not in record:
        problem = f"no field {column!r}{did_you_mean(column, list(record))}. The row has: {', '.join(map(str, record))}"
        problem += f". Name the right column under `{key}`" if key else ""
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
