"""Fixtures that the tests of data share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.real_tokenizers import real_tokenizer, write_r1_tokenizer

from thinkpo_jax.data.chat_template import ChatTemplate
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """The byte tokenizer: one token per byte."""
    return ChatTokenizer.from_folder(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ChatTokenizer]:
    """Loads a real tokenizer by name. "r1" has the token names and the template of DeepSeek-R1-Distill-Qwen."""
    r1 = tmp_path_factory.mktemp("r1")

    @functools.cache
    def load_folder(name: str) -> ChatTokenizer:
        return ChatTokenizer.from_folder(write_r1_tokenizer(r1) if name == "r1" else real_tokenizer(name))

    def load(
        name: str, *, template_arguments: dict[str, Any] | None = None, thinking_tags: tuple[str, str] | None = None
    ) -> ChatTokenizer:
        chat = load_folder(name)
        template = ChatTemplate(chat.tokenizer, template_arguments or {}, thinking_tags)
        template.check_arguments(name)
        return dataclasses.replace(chat, template=template)

    return load
