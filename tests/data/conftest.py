"""Fixtures that the tests of data share."""

import pytest
from support.byte_tokenizer import byte_tokenizer

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """The byte tokenizer: one token per byte."""
    return ChatTokenizer.from_folder(byte_tokenizer(tmp_path_factory.mktemp("bytes")))
