"""What does config.json say? The shape of a decoder as transformers reads it; what is not built here is an error."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from thinkpo_jax.models.rope import RopeTable, build_rope
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.files import read_json_object

SUPPORTED_MODEL_TYPES = ("qwen2", "qwen3", "llama")
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rms_norm_eps",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder. Attention and MLP have no biases but those that a flag states."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope: RopeTable
    norm_eps: float
    max_positions: int
    qkv_bias: bool
    qk_norm: bool
    tied_head: bool
    init_std: float = 0.02


def read_architecture(folder: Path) -> Architecture:
    """What config.json says. Raises one `UserError` with every field that is missing, or is not supported here."""
    path = folder / "config.json"
    raw = read_json_object(path, missing_hint="A model is a folder with config.json and *.safetensors.")
    try:
        return _architecture(raw)
    except _ConfigError as found:
        raise UserError("\n".join(f"{path}: {problem}." for problem in found.args)) from None


class _ConfigError(Exception):
    """What is wrong with a config.json, one argument each."""


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    problems = list(_unreadable(raw))
    if raw.get("model_type") not in SUPPORTED_MODEL_TYPES:
        raise _ConfigError(*problems)
    if "per_layer_config" in raw or any(_too_large(raw)):
        raise _ConfigError(*problems)
    try:
        config = _as_transformers_reads(raw)
    except _ConfigError as error:
        raise _ConfigError(*problems, *error.args) from None
    problems += _unsupported(config)
    heads = config.num_attention_heads
    rope, head_dim = None, getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    try:
        rope = build_rope(config.rope_parameters or {}, head_dim)
    except ValueError as error:
        problems.append(str(error))
    if problems or rope is None:
        raise _ConfigError(*problems)
    return Architecture(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        mlp_size=config.intermediate_size,
        rope=rope,
        norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        qkv_bias=config.model_type == "qwen2",
        qk_norm=config.model_type == "qwen3",
        tied_head=config.tie_word_embeddings,
        init_std=config.initializer_range,
    )


def _unreadable(raw: Mapping[str, Any]) -> Iterable[str]:
    """What is wrong with a config.json before transformers fills in its defaults."""
    if raw.get("model_type") not in SUPPORTED_MODEL_TYPES:
        yield f"model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
    if "quantization_config" in raw:
        yield "the checkpoint is quantised; use the unquantised one"
    if "per_layer_config" in raw:
        yield "per_layer_config is not supported: all layers are alike here"
    if "auto_map" in raw:
        yield "auto_map asks for remote code, which is never run; use a checkpoint of a standard architecture"
    for key in REQUIRED_KEYS:
        if key not in raw:
            yield f"{key} is missing"
    yield from _too_large(raw)
    places = (raw, raw.get("rope_parameters"), raw.get("rope_scaling"))
    if not any(isinstance(place, Mapping) and "rope_theta" in place for place in places):
        yield "rope_theta is missing, at the top or in rope_parameters; add it (models before 2023-08: 10000.0)"


def _too_large(raw: Mapping[str, Any]) -> Iterable[str]:
    """Sizes beyond any model; transformers would make a list of so many layers."""
    for key, most in {**dict.fromkeys(REQUIRED_KEYS, 2**40), "num_hidden_layers": 100_000}.items():
        if isinstance(raw.get(key), int) and raw[key] > most:
            yield f"{key} is {raw[key]}, expected at most {most}"


def _as_transformers_reads(raw: Mapping[str, Any]) -> PretrainedConfig:
    """The config with transformers' defaults, its checks, and either spelling of the RoPE settings made one."""
    given = {key: value for key, value in copy.deepcopy(dict(raw)).items() if key not in ("dtype", "torch_dtype")}
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(given)
    except (StrictDataclassError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise _ConfigError(" ".join(str(error.args[0] if error.args else error).split())) from None


def _unsupported(config: PretrainedConfig) -> Iterable[str]:
    """Values that make no model, and those that would change the result and are not built here."""
    sizes = {key: value for key in REQUIRED_KEYS if isinstance(value := getattr(config, key), int)}
    if head_dim := getattr(config, "head_dim", None):
        sizes["head_dim"] = head_dim
    elif config.num_attention_heads > 0 and config.hidden_size % config.num_attention_heads:
        yield f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {config.num_attention_heads}"
    yield from (f"{key} is {value}, expected at least 1" for key, value in sizes.items() if value < 1)
    if config.num_key_value_heads > 0 and config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads "
            f"{config.num_key_value_heads}"
        )
    if not 0 < config.rms_norm_eps < 1:
        yield f"rms_norm_eps is {config.rms_norm_eps}, expected a small positive number"
    if config.hidden_act != "silu":
        yield f"hidden_act {config.hidden_act!r} is not supported; supported: silu"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        yield f"layers of {', '.join(sorted(kinds))} (sliding windows) are not supported"
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            yield f"{key} is on, and is not supported"
    if getattr(config, "is_causal", True) is False:
        yield "is_causal is off, and attention in both directions is not supported"
    if config.attention_dropout:
        yield f"attention_dropout {config.attention_dropout} is not supported; set it to 0"
