"""Small models with random weights, and model folders without weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from support import small

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import abstract_model

MINIATURE = resolve_model_folder("builtin:miniature")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def hf_config(arch: Architecture) -> dict[str, Any]:
    return {
        "model_type": "qwen2" if arch.qkv_bias else "qwen3" if arch.qk_norm else "llama",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.mlp_size,
        "rms_norm_eps": arch.norm_eps,
        "max_position_embeddings": arch.max_positions,
        "rope_theta": small.THETA,
        "tie_word_embeddings": arch.tied_head,
        "initializer_range": arch.init_std,
        "eos_token_id": 1,
    }


def random_model(arch: Architecture = small.ARCH) -> Transformer:
    rng = np.random.default_rng(0)
    abstract = abstract_model(arch, small.FLOAT32)
    return jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape), leaf.dtype), abstract)


def like(tmp_path: Path, arch: Architecture = small.ARCH) -> Path:
    """Writes a model folder that has everything but weights."""
    folder = tmp_path / "like"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(arch)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3], "temperature": 0.6}))
    for name in TOKENIZER:
        shutil.copyfile(MINIATURE / name, folder / name)
    return folder
