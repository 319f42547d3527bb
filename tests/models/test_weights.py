"""A model goes out as a Hugging Face folder and comes back bit for bit; whatever is not such a folder is refused."""

import dataclasses
import json
import stat
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import small
from support.weights import MINIATURE, TOKENIZER, hf_config, like, random_model

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.models import weight_saving
from thinkpo_jax.models.architecture import Architecture, read_architecture
from thinkpo_jax.models.model_folder import check_model_folder, read_stop_token_ids, resolve_model_folder
from thinkpo_jax.models.rope import build_rope
from thinkpo_jax.models.safetensors_files import WEIGHTS_INDEX_FILE
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_mapping import flatten_by_name
from thinkpo_jax.models.weight_saving import save_model
from thinkpo_jax.runtime.config import UserError

VARIANTS = {
    "untied-bias": small.ARCH,
    "tied-bias": dataclasses.replace(small.ARCH, tied_head=True),
    "untied-plain": dataclasses.replace(small.ARCH, qkv_bias=False),
    "tied-plain": dataclasses.replace(small.ARCH, qkv_bias=False, tied_head=True),
    "untied-norm": dataclasses.replace(small.ARCH, qkv_bias=False, qk_norm=True),
}


def _saved(tmp_path: Path, arch: Architecture = small.ARCH, dtype: Literal["float32", "bfloat16"] = "float32") -> Path:
    save_model(
        random_model(arch),
        tmp_path / "saved",
        template_folder=like(tmp_path, arch),
        dtype=dtype,
        stop_token_ids=[1, 2, 3],
        model_card="# A card\n",
    )
    return tmp_path / "saved"


def _edit(file: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; None takes one away."""
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def _assert_equal(found: Transformer, expected: Transformer) -> None:
    a, b = flatten_by_name(found), flatten_by_name(expected)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_import_undoes_export_bit_for_bit(tmp_path: Path, variant: str) -> None:
    folder = _saved(tmp_path, VARIANTS[variant])
    assert read_architecture(folder) == VARIANTS[variant]
    _assert_equal(load_model(folder, small.FLOAT32, small.mesh()), random_model(VARIANTS[variant]))


def test_import_onto_a_mesh_reads_the_same_numbers(tmp_path: Path) -> None:
    model = load_model(_saved(tmp_path), small.FLOAT32, small.mesh(data=2, fsdp=2, tensor=2))
    assert not model.blocks.q[...].sharding.is_fully_replicated
    _assert_equal(model, random_model())
    save_model(
        model,
        tmp_path / "again",
        template_folder=tmp_path / "like",
        dtype="float32",
        stop_token_ids=[1, 2, 3],
        model_card="",
    )
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "saved" / "model.safetensors"
    ).read_bytes()


def test_bfloat16_export_rounds_and_says_so(tmp_path: Path) -> None:
    folder = _saved(tmp_path, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32), random_model())
    _assert_equal(load_model(folder, small.FLOAT32, small.mesh()), rounded)
    assert {array.dtype for array in load_file(folder / "model.safetensors").values()} == {np.dtype("bfloat16")}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(weight_saving, "MAX_SHARD", "20KB")
    return _saved(tmp_path)


def test_shards_load_as_one_file_does(sharded: Path) -> None:
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert set(json.loads((sharded / WEIGHTS_INDEX_FILE).read_text())["weight_map"].values()) == set(files)
    _assert_equal(load_model(sharded, small.FLOAT32, small.mesh()), random_model())


def test_all_files_can_be_read_by_others(sharded: Path) -> None:
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in sharded.iterdir()} == {"0o644"}


def test_everything_beside_the_weights_is_carried_over(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    for name in TOKENIZER:
        assert (folder / name).read_bytes() == (MINIATURE / name).read_bytes()
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 2, 3],
        "temperature": 0.6,
    }
    assert read_stop_token_ids(folder) == [1, 2, 3]
    assert (folder / "README.md").read_text() == "# A card\n"
    config = json.loads((folder / "config.json").read_text())
    assert config == hf_config(small.ARCH) | {"dtype": "float32", "torch_dtype": "float32"}


def test_export_replaces_a_folder_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier export")
    save_model(
        random_model(),
        folder,
        template_folder=tmp_path / "like",
        dtype="float32",
        stop_token_ids=[1, 2, 3],
        model_card="",
    )
    _assert_equal(load_model(folder, small.FLOAT32, small.mesh()), random_model())
    assert sorted(found.name for found in tmp_path.iterdir()) == ["like", "saved"]


def test_stop_ids_fall_back_to_config_json(tmp_path: Path) -> None:
    folder = like(tmp_path)
    _edit(folder / "generation_config.json", eos_token_id=None)
    assert read_stop_token_ids(folder) == [1]
    _edit(folder / "config.json", eos_token_id=None)
    assert read_stop_token_ids(folder) == []


def test_an_export_stops_where_the_sampler_does(tmp_path: Path) -> None:
    folder = like(tmp_path)
    _edit(folder / "generation_config.json", eos_token_id=7)  # not what the template ends a turn with
    chat = ChatTokenizer.from_folder(folder, stop_token_ids=read_stop_token_ids(folder))
    assert set(chat.stop_token_ids) == {chat.end_of_turn_id, 7} != {7}
    save_model(
        random_model(),
        tmp_path / "out",
        template_folder=folder,
        dtype="float32",
        stop_token_ids=chat.stop_token_ids,
        model_card="",
    )
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": sorted(chat.stop_token_ids), "temperature": 0.6}


@pytest.mark.parametrize("value", ["<end>", [1, "2"], -1, True])
def test_a_stop_id_is_a_number(tmp_path: Path, value: Any) -> None:
    folder = like(tmp_path)
    _edit(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(UserError, match="expected a token id or a list of them"):
        read_stop_token_ids(folder)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    file = _saved(tmp_path, VARIANTS["tied-bias"]) / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    assert "tensor lm_head.weight differs from the embedding, to which config.json ties it" in _refused(file.parent)


def test_a_copy_of_the_tied_head_is_left_alone(tmp_path: Path) -> None:
    arch = VARIANTS["tied-bias"]
    file = _saved(tmp_path, arch) / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    _assert_equal(load_model(file.parent, small.FLOAT32, small.mesh()), random_model(arch))


def _refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder, small.FLOAT32, small.mesh())
    return str(caught.value)


def test_all_problems_of_the_tensors_are_reported_together(tmp_path: Path) -> None:
    file = _saved(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors["model.norm.weight"] = np.ones(33, np.float32)
    save_file(tensors, file)
    message = _refused(file.parent)
    assert "tensor model.layers.1.self_attn.k_proj.bias is missing" in message
    assert "tensor model.layers.0.self_attn.q_norm.weight is not known here" in message
    assert "tensor model.norm.weight has the shape (33,), expected (32,) from config.json" in message
    assert len(message.splitlines()) == 3


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = _saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = _refused(file.parent)
    assert message.startswith(f"{file}: cannot be read as safetensors")
    assert "Download it again" in message


def test_a_missing_shard_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    assert (
        _refused(sharded)
        == f"{sharded}: lacks {file.name}, which {WEIGHTS_INDEX_FILE} names. Download what is missing."
    )


def test_an_index_that_names_what_is_not_there_is_refused(sharded: Path) -> None:
    weight_map = json.loads((sharded / WEIGHTS_INDEX_FILE).read_text())["weight_map"]
    first = min(weight_map.values())
    _edit(sharded / WEIGHTS_INDEX_FILE, weight_map=weight_map | {"model.layers.7.extra": first})
    message = _refused(sharded)
    assert f"model.layers.7.extra in {first}" in message
    assert message.startswith(str(sharded / WEIGHTS_INDEX_FILE))


@pytest.mark.parametrize("weight_map", [["a"], {"a": 1}, None], ids=["list", "number", "none"])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: Any) -> None:
    _edit(sharded / WEIGHTS_INDEX_FILE, weight_map=weight_map)
    assert _refused(sharded).startswith(f"{sharded / WEIGHTS_INDEX_FILE}: expected weight_map")


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (None, "no *.safetensors file"),
        ("model.gguf", "no *.safetensors file. Other formats (GGUF"),
        ("pytorch_model.bin", "has only pickled weights (pytorch_model.bin), which can run code and are never loaded"),
    ],
    ids=["nothing", "gguf", "bin"],
)
def test_only_safetensors_are_read(tmp_path: Path, other: str | None, expected: str) -> None:
    folder = like(tmp_path)
    if other is not None:
        (folder / other).write_bytes(b"pickle")
    assert _refused(folder).startswith(f"{folder}: {expected}")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
REFUSED_CONFIGS = {
    "family": ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported; supported: qwen2, qwen3, llama"),
    "no-family": ({"model_type": None}, "model_type None is not supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, "use the unquantised one"),
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
    "endless": (
        {"num_hidden_layers": 10**30},
        "0000000, expected at most 100000",
    ),
    "field": ({"hidden_size": None}, "hidden_size is missing"),
    "text": ({"vocab_size": "many"}, "Field 'vocab_size' expected int, got str (value: 'many')"),
    "number": ({"tie_word_embeddings": 3}, "Field 'tie_word_embeddings' expected bool"),
    "zero": ({"intermediate_size": 0}, "intermediate_size is 0, expected at least 1"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    "width": ({"head_dim": None, "hidden_size": 34}, "hidden_size 34 is no multiple of num_attention_heads 4"),
    "odd": ({"head_dim": 7}, "even"),
    "epsilon": ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
}


def _refused_config(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_architecture(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: ")
    return message


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_a_config_that_would_be_computed_wrongly_is_refused(tmp_path: Path, case: str) -> None:
    changes, expected = REFUSED_CONFIGS[case]
    folder = like(tmp_path)
    _edit(folder / "config.json", **changes)
    message = _refused_config(folder)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_all_problems_of_a_config_are_reported_together(tmp_path: Path) -> None:
    folder = like(tmp_path)
    _edit(folder / "config.json", vocab_size=None, rms_norm_eps=None, hidden_act="gelu", rope_scaling=DYNAMIC)
    message = _refused_config(folder)
    for part in ("vocab_size is missing", "rms_norm_eps is missing", "hidden_act", "RoPE of type 'dynamic'"):
        assert part in message


def test_all_problems_of_a_folder_are_reported_together(sharded: Path) -> None:
    _edit(sharded / "config.json", hidden_act="gelu")
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    (sharded / "tokenizer.json").write_text("{")
    with pytest.raises(UserError) as caught:
        check_model_folder(sharded, weights=True)
    for part in ("config.json: hidden_act 'gelu'", f"{file}: cannot be read as safetensors", "no usable tokenizer"):
        assert part in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused_beside_other_problems(tmp_path: Path) -> None:
    folder = like(tmp_path)
    _edit(folder / "config.json", vocab_size=3)
    with pytest.raises(UserError) as caught:
        check_model_folder(folder, weights=True)
    assert "no *.safetensors file" in str(caught.value)
    assert "the embedding has only 3 rows" in str(caught.value)


def test_fields_that_have_a_default_may_be_left_out_or_null(tmp_path: Path) -> None:
    folder = like(tmp_path)
    _edit(folder / "config.json", model_type="llama", head_dim=None, tie_word_embeddings=None, initializer_range=None)
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
def test_all_spellings_of_the_rope_settings_are_one(tmp_path: Path, kind: str) -> None:
    folder, settings = like(tmp_path), ROPES[kind] | {"rope_type": kind}
    _edit(folder / "config.json", rope_theta=None, rope_parameters=settings | {"rope_theta": 5e5})
    newer = read_architecture(folder)
    assert newer.rope == build_rope(settings | {"rope_theta": 5e5}, 8)
    assert (newer.rope == build_rope({"rope_theta": 5e5}, 8)) == (kind == "default")
    for older in (settings, {"type" if key == "rope_type" else key: value for key, value in settings.items()}):
        _edit(folder / "config.json", rope_theta=5e5, rope_parameters=None, rope_scaling=older)
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
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: bytes | None, expected: str) -> None:
    file = like(tmp_path) / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert expected in _refused_config(file.parent)


@pytest.mark.parametrize("name", ["nothing", "", "../builtin/miniature", "."])
def test_an_unknown_builtin_lists_those_that_are(name: str) -> None:
    with pytest.raises(UserError, match=f"there is no builtin:{name}. Built-in models: builtin:miniature"):
        resolve_model_folder(f"builtin:{name}")


@pytest.mark.parametrize("path", ["./nothing/here", "/nothing", "nothing", "a/b/c"])
def test_what_is_no_hub_id_must_be_a_folder(path: str) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        resolve_model_folder(path)


@pytest.mark.parametrize("path", ["nobody/nothing", "no body/nothing"])
def test_a_hub_id_that_is_out_of_reach_says_what_to_do(path: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=f"hf download {path}"):
        resolve_model_folder(path)
    assert time.monotonic() - start < 120
