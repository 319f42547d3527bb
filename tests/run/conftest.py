"""Fixtures that the tests of runs share."""

import json
from pathlib import Path

import pytest
from support.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the byte tokenizer. It supports 512 tokens. Its tests read no weights."""
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    shape = {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 320, "max_position_embeddings": 512}
    shape |= {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(shape | {"architectures": ["Qwen2ForCausalLM"]}))
    return folder
