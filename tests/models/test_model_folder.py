"""Model folders are found by path, Hub id or built-in name, and all their problems are reported together."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.model_folders import edit_json, save_random_model
from support.weights import like

from thinkpo_jax.models import weight_saving
from thinkpo_jax.models.model_folder import ModelConfig, check_model_folder, read_stop_token_ids, resolve_model_folder
from thinkpo_jax.runtime.config import UserError


def test_stop_ids_fall_back_to_config_json(tmp_path: Path) -> None:
    folder = like(tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=None)
    assert read_stop_token_ids(folder) == [1]
    edit_json(folder / "config.json", eos_token_id=None)
    assert read_stop_token_ids(folder) == []


@pytest.mark.parametrize("value", ["<end>", [1, "2"], -1, True])
def test_an_invalid_stop_id_is_refused(tmp_path: Path, value: Any) -> None:
    folder = like(tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(UserError, match="expected a token id or a list of token ids"):
        read_stop_token_ids(folder)


def test_all_problems_of_a_folder_are_reported_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_saving, "MAX_SHARD", "20KB")
    folder = save_random_model(tmp_path)
    edit_json(folder / "config.json", hidden_act="gelu")
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError) as caught:
        check_model_folder(ModelConfig(path=str(folder)), folder, weights=True)
    for part in ("config.json: hidden_act 'gelu'", f"{file}: cannot be read as safetensors", "no usable tokenizer"):
        assert part in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding_is_reported_with_other_problems(tmp_path: Path) -> None:
    folder = like(tmp_path)
    edit_json(folder / "config.json", vocab_size=3)
    with pytest.raises(UserError) as caught:
        check_model_folder(ModelConfig(path=str(folder)), folder, weights=True)
    assert "no *.safetensors file" in str(caught.value)
    assert "the embedding has only 3 rows" in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "", "../builtin/miniature", "."])
def test_an_unknown_builtin_model_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=f"there is no builtin:{name}. Built-in models: builtin:miniature"):
        resolve_model_folder(f"builtin:{name}")


@pytest.mark.parametrize("path", ["./nothing/here", "/nothing", "nothing", "a/b/c"])
def test_a_path_that_is_no_hub_id_must_be_a_folder(path: str) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        resolve_model_folder(path)


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    shutil.copytree(resolve_model_folder("builtin:miniature"), snapshot)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_model_folder("owner/name") == snapshot


@pytest.mark.parametrize("path", ["nobody/nothing", "no body/nothing"])
def test_an_unavailable_hub_id_says_how_to_download_it(path: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=f"hf download {path}"):
        resolve_model_folder(path)
    assert time.monotonic() - start < 120
