"""Reads the messages of a conversation: roles, texts, thoughts in fields of their own, and fields that are not read."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thinkpo_jax.data.chat_template import Message, ThinkingFormat
from thinkpo_jax.data.readers import RecordError

ROLE_ALIASES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
ROLE_ALIASES |= {"developer": "system"}
TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython")
THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")
TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id", "tools", "functions")
MEDIA_FIELDS = ("images", "image", "audio", "audios", "videos", "video")
_TEXT_PARTS, _THOUGHT_PARTS = ("text", "input_text", "output_text"), ("thinking", "reasoning")
_MESSAGE_LIST = re.compile(r"\s*\[\s*\{\s*(['\"])(role|from|content|value)\1\s*:")


@dataclass
class MessageReader:
    """Reads the messages of one record, and notes what it joined and what it did not read."""

    thinking: ThinkingFormat
    location: str
    has_joined_thought: bool = False
    ignored_fields: set[str] = field(default_factory=set)

    def read(self, value: Any, role: str, column: str) -> list[Message]:
        """Reads a text as one message of `role`, or one message, or a list of messages (also as JSON text)."""
        location = f"{self.location}, {column}"
        value = parse_message_list(value, location)
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list):
            return [{"role": role, "content": require_text(value, location)}]
        if not value:
            raise RecordError("no conversation", f"{location}: expected a list of messages, found an empty list.")
        return [self._read_turn(turn, f"{location}, turn {number}") for number, turn in enumerate(value, 1)]

    def answer_text(self, message: Message, thought: Any, column: str) -> str:
        """Returns the text of an answer. A thought in a field of its own, or in a column, is joined to it."""
        location = f"{self.location}, {column}"
        field_thought = message.get("thinking")
        column_thought = None if _is_empty(thought) else require_text(thought, location)
        if field_thought and column_thought:
            problem = "the message and the column both hold its thought. Leave out one of them"
            raise RecordError("two thoughts", f"{location}: {problem}.")
        thought = field_thought or column_thought
        if thought is None:
            return message["content"]
        if tag := self.thinking.find_tag(message["content"]) or self.thinking.find_tag(thought):
            problem = f"the thought is in a field of its own, but {tag} is in the text too. Leave out one of them"
            raise RecordError("two thoughts", f"{location}: {problem}.")
        self.has_joined_thought = True
        return self.thinking.join(thought, message["content"])

    def _read_turn(self, turn: Any, location: str) -> Message:
        # A table may have the columns of several forms, with nulls in those of the other forms.
        items = turn.items() if isinstance(turn, Mapping) else ()
        fields = {key: value for key, value in items if not _is_empty(value)}
        role, content = (fields.pop(first, fields.pop(second, None)) for first, second in _FIELD_NAMES)
        check_unsupported_fields(fields, location)
        if role in TOOL_ROLES:
            problem = f"the role {role!r} belongs to tool calls, which are not supported"
            raise RecordError("tool calls", f"{location}: {problem}. Remove the row.")
        if not isinstance(role, str) or role not in ROLE_ALIASES:
            problem = f"expected a role of {', '.join(sorted(ROLE_ALIASES))}, found {turn!r:.80}"
            raise RecordError("no conversation", f"{location}: {problem}.")
        if fields.pop("weight", 1) != 1:
            problem = "the weight of a turn is not supported. Remove the field, or the row"
            raise RecordError("weight of a turn", f"{location}: {problem}.")
        content, thoughts = _read_parts(content, location) if isinstance(content, list) else (content, [])
        if role in ("assistant", "gpt"):
            thoughts += [require_text(fields.pop(name), location) for name in THINKING_FIELDS if name in fields]
        self.ignored_fields.update(map(str, fields))
        message: Message = {"role": ROLE_ALIASES[role], "content": require_text(content, location)}
        if len(set(thoughts)) > 1:  # a server may write one thought into two fields
            problem = "several fields hold different thoughts. Leave out all but one"
            raise RecordError("two thoughts", f"{location}: {problem}.")
        return {**message, "thinking": thoughts[0]} if thoughts else message


_FIELD_NAMES = (("role", "from"), ("content", "value"))  # of OpenAI and of ShareGPT


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value == [] or value == {}


def check_unsupported_fields(fields: Mapping[str, Any], location: str) -> None:
    """Raises `RecordError` if a message or a record with messages has tool calls, images or audio."""
    for names, reason in ((TOOL_FIELDS, "tool calls"), (MEDIA_FIELDS, "images or audio")):
        if found := [name for name in names if not _is_empty(fields.get(name)) and fields[name] not in ("[]", "{}")]:
            problem = f"has the field {found[0]!r}, but {reason} are not supported"
            raise RecordError(reason, f"{location}: {problem}. Remove the row.")


def parse_message_list(value: Any, location: str) -> Any:
    """Returns the list if the value is a text that holds a list of messages as JSON, else the value itself.

    Raises `RecordError` if such a text is not JSON. It would be trained as it is.
    """
    if not isinstance(value, str) or not _MESSAGE_LIST.match(value):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        problem = f"a text that looks like a list of messages is not JSON: {error}. Write it as JSON, or as a list"
        raise RecordError("messages as text", f"{location}: {problem}.") from None


def _read_parts(parts: Sequence[Any], location: str) -> tuple[str, list[str]]:
    """Returns the text of a content that is a list of parts, and its thoughts. Line breaks separate its texts."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXT_PARTS:
            texts.append(require_text(part.get("text"), location))
        elif kind in _THOUGHT_PARTS:
            thoughts.append(require_text(part.get(kind, part.get("text")), location))
        else:
            problem = f"expected parts of type text, found {kind or part!r:.80}. Other parts are not supported"
            raise RecordError("images or audio", f"{location}: {problem}.")
    return "\n".join(texts), ["\n".join(thoughts)] if thoughts else []


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
