"""A saved model loads again with the same bits. Malformed weights are refused."""

import dataclasses
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import small
from support.model_folders import edit_json, save_random_model, save_small_model
from support.weights import MINIATURE, TOKENIZER, hf_config, like, random_model

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.models import weight_saving
from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.model_folder import read_stop_token_ids
from thinkpo_jax.models.safetensors_files import WEIGHTS_INDEX_FILE
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_mapping import flatten_by_name
from thinkpo_jax.runtime.config import UserError

VARIANTS = {
    "untied-bias": small.ARCH,
    "tied-bias": dataclasses.replace(small.ARCH, tied_head=True),
    "untied-plain": dataclasses.replace(small.ARCH, qkv_bias=False),
    "tied-plain": dataclasses.replace(small.ARCH, qkv_bias=False, tied_head=True),
    "untied-norm": dataclasses.replace(small.ARCH, qkv_bias=False, qk_norm=True),
}


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(weight_saving, "MAX_SHARD", "20KB")
    return save_random_model(tmp_path)


def _assert_equal(actual: Transformer, expected: Transformer) -> None:
    parameters, expected_parameters = flatten_by_name(actual), flatten_by_name(expected)
    assert parameters.keys() == expected_parameters.keys()
    for name, value in parameters.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, expected_parameters[name], err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_loads_with_the_same_bits(tmp_path: Path, variant: str) -> None:
    folder = save_random_model(tmp_path, VARIANTS[variant])
    assert read_architecture(folder) == VARIANTS[variant]
    _assert_equal(load_model(folder, small.FLOAT32, small.mesh()), random_model(VARIANTS[variant]))


def test_a_model_on_a_mesh_loads_and_saves_the_same_bits(tmp_path: Path) -> None:
    model = load_model(save_random_model(tmp_path), small.FLOAT32, small.mesh(data=2, fsdp=2, tensor=2))
    assert not model.blocks.q[...].sharding.is_fully_replicated
    _assert_equal(model, random_model())
    save_small_model(model, tmp_path / "resaved", tmp_path / "like")
    files = [tmp_path / folder / "model.safetensors" for folder in ("saved", "resaved")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_saving_in_bfloat16_rounds_weights_and_sets_the_dtype(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32), random_model())
    _assert_equal(load_model(folder, small.FLOAT32, small.mesh()), rounded)
    assert {array.dtype for array in load_file(folder / "model.safetensors").values()} == {np.dtype("bfloat16")}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_several_weight_files_load_like_a_single_one(sharded: Path) -> None:
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert set(json.loads((sharded / WEIGHTS_INDEX_FILE).read_text())["weight_map"].values()) == set(files)
    _assert_equal(load_model(sharded, small.FLOAT32, small.mesh()), random_model())


def test_saved_files_are_readable_by_all_users(sharded: Path) -> None:
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in sharded.iterdir()} == {"0o644"}


def test_saving_copies_the_config_and_the_tokenizer(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
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


def test_saving_replaces_an_existing_folder_completely(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"from an earlier export")
    save_small_model(random_model(), folder, tmp_path / "like")
    _assert_equal(load_model(folder, small.FLOAT32, small.mesh()), random_model())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["like", "saved"]


def test_a_saved_model_has_the_stop_ids_of_the_sampler(tmp_path: Path) -> None:
    folder = like(tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=7)  # not what the template ends a turn with
    chat = ChatTokenizer.from_folder(folder, stop_token_ids=read_stop_token_ids(folder))
    assert set(chat.stop_token_ids) == {chat.end_of_turn_id, 7} != {7}
    save_small_model(random_model(), tmp_path / "out", folder, stop_token_ids=chat.stop_token_ids)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": sorted(chat.stop_token_ids), "temperature": 0.6}


def test_a_tied_head_that_differs_from_the_embedding_is_load_error(tmp_path: Path) -> None:
    file = save_random_model(tmp_path, VARIANTS["tied-bias"]) / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    assert "lm_head.weight differs from the tied embedding. Remove it" in _load_error(file.parent)


def test_a_copy_of_the_tied_embedding_is_ignored(tmp_path: Path) -> None:
    arch = VARIANTS["tied-bias"]
    file = save_random_model(tmp_path, arch) / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    _assert_equal(load_model(file.parent, small.FLOAT32, small.mesh()), random_model(arch))


def _load_error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder, small.FLOAT32, small.mesh())
    return str(caught.value)


def test_all_problems_of_the_tensors_are_reported_together(tmp_path: Path) -> None:
    file = save_random_model(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors["model.norm.weight"] = np.ones(33, np.float32)
    save_file(tensors, file)
    message = _load_error(file.parent)
    assert "tensor model.layers.1.self_attn.k_proj.bias is missing" in message
    assert "tensor model.layers.0.self_attn.q_norm.weight is unknown for this architecture. Remove it" in message
    assert "tensor model.norm.weight has shape (33,), but config.json asks for (32,)" in message
    assert message.startswith(f"{file.parent}: the weights do not match config.json")
    assert len(message.splitlines()) == 4


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = save_random_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = _load_error(file.parent)
    assert message.startswith(f"{file}: cannot be read as safetensors")
    assert "Download it again" in message


def test_a_missing_shard_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    message = f"{sharded}: {WEIGHTS_INDEX_FILE} lists missing files: {file.name}. Download them."
    assert _load_error(sharded) == message


def test_an_index_that_lists_a_missing_tensor_is_load_error(sharded: Path) -> None:
    weight_map = json.loads((sharded / WEIGHTS_INDEX_FILE).read_text())["weight_map"]
    first = min(weight_map.values())
    edit_json(sharded / WEIGHTS_INDEX_FILE, weight_map=weight_map | {"model.layers.7.extra": first})
    message = _load_error(sharded)
    assert f"model.layers.7.extra in {first}" in message
    assert message.startswith(str(sharded / WEIGHTS_INDEX_FILE))


@pytest.mark.parametrize("weight_map", [["a"], {"a": 1}, None], ids=["list", "number", "none"])
def test_an_index_without_a_weight_map_is_load_error(sharded: Path, weight_map: Any) -> None:
    edit_json(sharded / WEIGHTS_INDEX_FILE, weight_map=weight_map)
    assert _load_error(sharded).startswith(f"{sharded / WEIGHTS_INDEX_FILE}: expected weight_map")


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "..", ""])
def test_an_index_of_files_outside_the_folder_is_load_error(sharded: Path, name: str) -> None:
    weight_map = json.loads((sharded / WEIGHTS_INDEX_FILE).read_text())["weight_map"]
    edit_json(sharded / WEIGHTS_INDEX_FILE, weight_map=weight_map | {"model.norm.weight": name})
    message = _load_error(sharded)
    assert message.startswith(f"{sharded / WEIGHTS_INDEX_FILE}: expected weight_map to name a file in this folder")
    assert f"found {name!r}." in message


def test_a_tensor_that_is_not_where_the_index_says_is_load_error(sharded: Path) -> None:
    weight_map = json.loads((sharded / WEIGHTS_INDEX_FILE).read_text())["weight_map"]
    file = weight_map["model.norm.weight"]
    other = min(set(weight_map.values()) - {file})
    edit_json(sharded / WEIGHTS_INDEX_FILE, weight_map=weight_map | {"model.norm.weight": other})
    expected = f"{sharded}: expected tensor model.norm.weight only in {other}, found it in {file}."
    assert _load_error(sharded).startswith(expected)


def test_a_tensor_in_two_files_is_load_error(sharded: Path) -> None:
    (sharded / WEIGHTS_INDEX_FILE).unlink()
    first = min(sharded.glob("*.safetensors"))
    shutil.copyfile(first, sharded / "z.safetensors")
    lines = _load_error(sharded).splitlines()
    assert len(lines) == len(load_file(first))
    assert all(f"only in {first.name}, found it in z.safetensors" in line for line in lines)


def test_a_stale_file_beside_the_index_is_load_error(sharded: Path) -> None:
    shutil.copyfile(min(sharded.glob("*.safetensors")), sharded / "model.safetensors")
    expected = f"{sharded}: {WEIGHTS_INDEX_FILE} does not list model.safetensors. Remove the stale one."
    assert _load_error(sharded) == expected


@pytest.mark.parametrize("name", [None, "model.gguf"], ids=["nothing", "gguf"])
def test_only_safetensors_are_read(tmp_path: Path, name: str | None) -> None:
    folder = like(tmp_path)
    if name is not None:
        (folder / name).write_bytes(b"weights")
    message = _load_error(folder)
    assert message.startswith(f"{folder}: no *.safetensors file (found chat_template.jinja, config.json, ")
    assert name is None or name in message
    assert "Other formats are not read. Download the model again" in message


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_rotary_frequencies_of_old_checkpoints_are_ignored(name: str, tmp_path: Path) -> None:
    file = save_random_model(tmp_path) / "model.safetensors"
    save_file(load_file(file) | {name: np.ones(4, np.float32)}, file)
    _assert_equal(load_model(file.parent, small.FLOAT32, small.mesh()), random_model())


def test_saving_copies_known_files_only(tmp_path: Path) -> None:
    template = like(tmp_path)
    (template / "additional_chat_templates").mkdir()
    copied = {"LICENSE.txt", "NOTICE", "additional_chat_templates/tool_use.jinja", "special_tokens_map.json"}
    left_out = {"adapter_config.json", "trainer_state.json", ".secret.json", "other.jinja", "notes.txt"}
    for name in copied | left_out:
        (template / name).write_text("{}")
    save_small_model(random_model(), tmp_path / "saved", template)
    saved = {str(file.relative_to(tmp_path / "saved")) for file in (tmp_path / "saved").rglob("*") if file.is_file()}
    known = {"config.json", "generation_config.json", "model.safetensors", "README.md", "thinkpo_jax_manifest.json"}
    assert saved == copied | known | set(TOKENIZER)
    templates = ChatTokenizer.from_folder(tmp_path / "saved").tokenizer.chat_template
    assert templates.keys() == {"default", "tool_use"}
