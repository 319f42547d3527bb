"""Reads config.json into the shape of the decoder, and rejects settings that the decoder does not support."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from thinkpo_jax.models.rope import RopeTable, build_rope
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.files import read_json_object

MAX_CONFIG_BYTES = 2**20  # Real ones have some thousand.
SUPPORTED_MODEL_TYPES = ("qwen2", "qwen3", "llama")
REQUIRED_KEYS = {  # field of `Architecture` -> key of config.json
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
MAX_SIZES = {  # Real models stay below a tenth of each. Larger numbers would make huge lists here or in transformers.
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "num_hidden_layers": 2000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "intermediate_size": 2**24,
    "max_position_embeddings": 2**40,
}
# Keys without effect on a decoder. transformers would make a list of `num_labels` labels.
IGNORED_KEYS = ("dtype", "torch_dtype", "num_labels", "id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder. Only q, k and v can have biases (`qkv_bias`)."""

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
    """Reads config.json of a model folder, with the defaults of transformers.

    Raises `UserError` if fields are missing, wrong or not supported. The message has one line for each of them.
    """
    path = folder / "config.json"
    missing_hint = "A model is a folder with config.json and *.safetensors."
    raw = read_json_object(path, missing_hint=missing_hint, max_bytes=MAX_CONFIG_BYTES)
    blocking_problems = list(_find_blocking_problems(raw))
    problems = blocking_problems + list(_find_raw_problems(raw))
    if not blocking_problems:
        try:
            # The config has the defaults of transformers, and one spelling of the RoPE settings.
            fields = {key: value for key, value in raw.items() if key not in IGNORED_KEYS}
            config = CONFIG_MAPPING[raw["model_type"]].from_dict(fields)
            problems += _find_unsupported_values(config)
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(config.num_attention_heads, 1)
            arch = Architecture(
                **{field: getattr(config, key) for field, key in REQUIRED_KEYS.items()},
                head_dim=head_dim,
                rope=build_rope(config.rope_parameters or {}, head_dim),
                qkv_bias=config.model_type == "qwen2",
                qk_norm=config.model_type == "qwen3",
                tied_head=config.tie_word_embeddings,
                init_std=config.initializer_range,
            )
            if not problems:
                return arch
        except (StrictDataclassError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            problems.append(" ".join(str(error.args[0] if error.args else error).split()))
    raise UserError("\n".join(f"{path}: {problem}." for problem in problems))


def _find_blocking_problems(raw: Mapping[str, Any]) -> Iterable[str]:
    """Yields problems with which transformers must not load the config."""
    if raw.get("model_type") not in SUPPORTED_MODEL_TYPES:
        yield f"model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
    if "per_layer_config" in raw:
        yield "per_layer_config is not supported. All layers must have the same shape"
    for key, limit in MAX_SIZES.items():
        if isinstance(raw.get(key), int) and raw[key] > limit:
            yield f"{key} is {raw[key]}, expected at most {limit}"


def _find_raw_problems(raw: Mapping[str, Any]) -> Iterable[str]:
    """Yields problems that are hidden once transformers has filled in its defaults."""
    if "quantization_config" in raw:
        yield "quantization_config is not supported. The checkpoint is quantized, use the unquantized one"
    if "auto_map" in raw:
        yield "auto_map asks for remote code, which is never run. Use a checkpoint of a standard architecture"
    yield from (f"{key} is missing" for key in REQUIRED_KEYS.values() if key not in raw)
    rope_sections = (raw, raw.get("rope_parameters"), raw.get("rope_scaling"))
    if not any(isinstance(section, Mapping) and "rope_theta" in section for section in rope_sections):
        yield "rope_theta is missing. Add it at the top level or in rope_parameters (models before 2023-08: 10000.0)"


def _find_unsupported_values(config: PretrainedConfig) -> Iterable[str]:
    """Yields values that no model can have, and values that the decoder here would compute wrongly."""
    hidden_size, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    sizes = {key: value for key in REQUIRED_KEYS.values() if isinstance(value := getattr(config, key), int)}
    if head_dim := getattr(config, "head_dim", None):
        sizes["head_dim"] = head_dim
    elif heads > 0 and hidden_size % heads:
        yield f"hidden_size {hidden_size} is no multiple of num_attention_heads {heads}"
    yield from (f"{key} is {value}, expected at least 1" for key, value in sizes.items() if value < 1)
    if kv_heads > 0 and heads % kv_heads:
        yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
    if not 0 < config.rms_norm_eps < 1:
        yield f"rms_norm_eps is {config.rms_norm_eps}, expected a number between 0 and 1"
    if config.hidden_act != "silu":
        yield f"hidden_act {config.hidden_act!r} is not supported; supported: silu"
    if layer_types := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        yield f"layers of {', '.join(sorted(layer_types))} (sliding windows) are not supported"
    biases = ("attention_bias", "mlp_bias")
    yield from (f"{key} is on, which is not supported" for key in biases if getattr(config, key, False))
    if getattr(config, "is_causal", True) is False:
        yield "is_causal is off, and attention to later tokens is not supported"
    if config.attention_dropout:
        yield f"attention_dropout {config.attention_dropout} is not supported. Set it to 0"
