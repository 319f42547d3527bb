"""An unsupported or malformed config.json is refused. All formats of the RoPE settings are read."""

import dataclasses
import json
from pathlib import Path

import pytest
from support import small
from support.model_folders import edit_json
from support.weights import like

from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.rope import build_rope
from thinkpo_jax.runtime.config import UserError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
REFUSED_CONFIGS = {
    "family": ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported; supported: qwen2, qwen3, llama"),
    "no-family": ({"model_type": None}, "model_type None is not supported"),
    "quantized": ({"quantization_config": {"bits": 4}}, "use the unquantized one"),
    "remote-code": ({"auto_map": {"AutoModel": "x.Y"}}, "remote code, which is never run"),
    "window": ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "(sliding windows) are not"),
    "layers": ({"layer_types": ["full_attention", "chunked_attention"]}, "layers of chunked_attention"),
    "rope-kind": ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "RoPE of type 'dynamic' is not supported"),
    "old-rope-kind": ({"rope_scaling": {"type": "longrope"}}, "longrope"),
    "rope-key": ({"rope_scaling": {"rope_type": "yarn"}}, "'factor'"),
    "rope-number": ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "RoPE: factor is '4', expected a positive"),
    "rope-theta": ({"rope_theta": -1.0}, "RoPE: rope_theta is -1.0, expected a positive number"),
    "no-theta": ({"rope_theta": None}, "rope_theta is missing"),
    "rope-part": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is"),
    "rope-null": ({"rope_theta": None, "rope_parameters": {"rope_theta": None}}, "RoPE: rope_theta is None"),
    "rope-one": ({"rope_theta": 1.0}, "rope_theta is 1.0, expected a number above 1"),
    "rope-factor": (
        {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8}},
        "RoPE: factor is None",
    ),
    "rope-layers": ({"rope_theta": 1e4, "rope_parameters": {"full_attention": None}}, "RoPE: "),
    "per-layer": ({"per_layer_config": {}}, "per_layer_config is not supported"),
    "both-ways": ({"is_causal": False}, "is_causal is off"),
    "rope-order": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 9.0}}, "low_freq_factor 9.0 must be below"),
    "rope-list": ({"rope_scaling": [1]}, "rope_parameters"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
    "llama-bias": ({"model_type": "llama", "attention_bias": True}, "attention_bias is on"),
    "qwen3-bias": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is on"),
    "mlp-bias": ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is on"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
    "endless": ({"num_hidden_layers": 10**30}, "0000000, expected at most 2000"),
    "huge-vocabulary": ({"vocab_size": 10**9}, "vocab_size is 1000000000, expected at most 16777216"),
    "huge-width": ({"hidden_size": 2**40, "num_attention_heads": 1}, "hidden_size is 1099511627776, expected at most"),
    "huge-head": ({"head_dim": 2**34}, "head_dim is 17179869184, expected at most 65536"),
    "field": ({"hidden_size": None}, "hidden_size is missing"),
    "text": ({"vocab_size": "many"}, "Field 'vocab_size' expected int, got str (value: 'many')"),
    "number": ({"tie_word_embeddings": 3}, "Field 'tie_word_embeddings' expected bool"),
    "zero": ({"intermediate_size": 0}, "intermediate_size is 0, expected at least 1"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    "width": ({"head_dim": None, "hidden_size": 34}, "hidden_size 34 is no multiple of num_attention_heads 4"),
    "odd": ({"head_dim": 7}, "even"),
    "epsilon": ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
}


def _config_error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_architecture(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: ")
    return message


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_an_unsupported_config_is_refused(tmp_path: Path, case: str) -> None:
    changes, expected = REFUSED_CONFIGS[case]
    folder = like(tmp_path)
    edit_json(folder / "config.json", **changes)
    message = _config_error(folder)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_all_problems_of_a_config_are_reported_together(tmp_path: Path) -> None:
    folder = like(tmp_path)
    edit_json(folder / "config.json", vocab_size=None, rms_norm_eps=None, hidden_act="gelu", rope_scaling=DYNAMIC)
    message = _config_error(folder)
    for part in ("vocab_size is missing", "rms_norm_eps is missing", "hidden_act", "RoPE of type 'dynamic'"):
        assert part in message


def test_fields_that_have_a_default_may_be_left_out_or_null(tmp_path: Path) -> None:
    folder = like(tmp_path)
    edit_json(
        folder / "config.json", model_type="llama", head_dim=None, tie_word_embeddings=None, initializer_range=None
    )
    expected = dataclasses.replace(small.ARCH, qkv_bias=False, init_std=0.02)
    assert read_architecture(folder) == expected
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_architecture(folder) == dataclasses.replace(expected, num_kv_heads=small.ARCH.num_heads)


ROPES = {
    "default": {},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 4.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPES)
def test_all_formats_of_the_rope_settings_give_the_same_rope(tmp_path: Path, kind: str) -> None:
    folder, settings = like(tmp_path), ROPES[kind] | {"rope_type": kind}
    edit_json(folder / "config.json", rope_theta=None, rope_parameters=settings | {"rope_theta": 5e5})
    newer = read_architecture(folder)
    assert newer.rope == build_rope(settings | {"rope_theta": 5e5}, 8)
    assert (newer.rope == build_rope({"rope_theta": 5e5}, 8)) == (kind == "default")
    for older in (settings, {"type" if key == "rope_type" else key: value for key, value in settings.items()}):
        edit_json(folder / "config.json", rope_theta=5e5, rope_parameters=None, rope_scaling=older)
        assert read_architecture(folder) == newer


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no such file"),
        (b"{'a': 1}", "as JSON"),
        (b"\xff\xfe", "as JSON"),
        (b"[]", "found list"),
        (b"[" * 100_000, "as JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "as JSON"),
    ],
    ids=["absent", "python", "binary", "list", "deep", "long-number"],
)
def test_an_unreadable_config_is_refused(tmp_path: Path, content: bytes | None, expected: str) -> None:
    file = like(tmp_path) / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert expected in _config_error(file.parent)


def test_labels_are_not_counted_out(tmp_path: Path) -> None:
    """transformers would make a list of them."""
    folder = like(tmp_path)
    edit_json(folder / "config.json", num_labels=10**12)
    assert read_architecture(folder) == small.ARCH
