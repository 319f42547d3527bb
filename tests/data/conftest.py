"""Fixtures that the tests of data share."""

from collections.abc import Callable
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.real_tokenizers import real_tokenizer, write_r1_tokenizer

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """The byte tokenizer: one token per byte."""
    return ChatTokenizer.from_folder(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ChatTokenizer]:
    """Loads a real tokenizer by name. "r1" has the token names and the template of DeepSeek-R1-Distill-Qwen."""
    r1 = tmp_path_factory.mktemp("r1")
    loaded: dict[str, ChatTokenizer] = {}

    def load(name: str, **options: Any) -> ChatTokenizer:
        key = f"{name} {options}"
        if key not in loaded:
            folder = write_r1_tokenizer(r1) if name == "r1" else real_tokenizer(name)
            loaded[key] = ChatTokenizer.from_folder(folder, **options)
        return loaded[key]

    return load
