"""Writes data files for tests, tokenizes them, and reads the examples back as text."""

import json
from pathlib import Path

import pytest

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import Example, Segment, TokenizedDataset
from thinkpo_jax.data.record_formats import StageDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.config import UserError

ROW = {"prompt": "2+2?", "response": "4", "chosen": "2+2=4;#4", "rejected": "#4"}
PAIR = {"prompt": "q", "chosen": "long", "rejected": "b"}
PROMPT = "[user]q[assistant]"  # how the template of the byte tokenizer renders the prompt "q"


def json_line(row: object) -> bytes:
    """Returns the line of a JSONL file for a row."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def write_rows(path: Path, *rows: object) -> Path:
    """Writes a JSONL file. Rows of bytes are written as they are."""
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json_line(row) for row in rows))
    return path


def turns(*contents: str) -> list[dict[str, str]]:
    """Returns a conversation in which user and assistant take turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def tokenize(
    config: StageDataConfig, chat: ChatTokenizer, *, row_length: int = 1000, seed: int = 0
) -> TokenizedDataset:
    """Tokenizes one source."""
    return tokenize_sources([config], chat, row_length=row_length, seed=seed)


def error_message(config: StageDataConfig, chat: ChatTokenizer) -> str:
    """Returns the message of the error that a source causes."""
    with pytest.raises(UserError) as error:
        tokenize(config, chat, row_length=10_000)
    return str(error.value)


def decode(segment: Segment, chat: ChatTokenizer) -> tuple[str, str]:
    """Returns the text of a segment's prompt and of its answer."""
    return chat.tokenizer.decode(segment.token_ids[: segment.answer_start]), chat.tokenizer.decode(segment.answer_ids)


def decode_first_segments(examples: TokenizedDataset, chat: ChatTokenizer) -> list[tuple[str, str]]:
    """Returns the text of the first segment of each example."""
    return [decode(example[0], chat) for example in examples]


def only_example(examples: TokenizedDataset) -> Example:
    """Returns the example of a dataset that has one."""
    (example,) = examples
    return example


def record_encoded_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list to which each answer is added when it is tokenized."""
    texts: list[str] = []
    encode_answer = ChatTokenizer.encode_answer
    monkeypatch.setattr(
        ChatTokenizer,
        "encode_answer",
        lambda self, prompt, text: texts.append(text) or encode_answer(self, prompt, text),
    )
    return texts
