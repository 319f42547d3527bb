"""Model folders are found by path, Hub id or built-in name, and all their problems are reported together."""

import functools
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from support.model_folders import edit_json, save_random_model
from support.weights import like

from thinkpo_jax.models import weight_saving
from thinkpo_jax.models.model_folder import (
    ModelConfig,
    check_model_folder,
    read_stop_token_ids,
    resolve_architecture,
    resolve_model_folder,
    resolve_model_source,
)
from thinkpo_jax.models.safetensors_files import WEIGHTS_INDEX_FILE, find_weight_problems
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


def _adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_a_lora_adapter_is_named_before_any_other_problem(tmp_path: Path) -> None:
    config = ModelConfig(path=str(_adapter(tmp_path)))
    for resolve in (functools.partial(resolve_model_source, seed=0), resolve_architecture):
        with pytest.raises(UserError) as caught:
            resolve(config)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}: holds only a LoRA adapter (adapter_config.json, adapter_model.safe")
        assert "merge_and_unload()" in message
        assert "\n" not in message


def test_weight_files_are_judged_by_their_names(tmp_path: Path) -> None:
    model = save_random_model(tmp_path)
    assert find_weight_problems(model) == find_weight_problems(_adapter(model)) == []  # a merged model
    folder = tmp_path / "like"
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickle")
    (problem,) = find_weight_problems(folder)
    assert problem.startswith(f"{folder}: the weights are pickled (pytorch_model-00001-of-00002.bin).")
    assert "save_pretrained(OUT, safe_serialization=True)" in problem
    (problem,) = find_weight_problems(_adapter(folder))
    assert problem.startswith(f"{folder}: holds only a LoRA adapter")
    (folder / WEIGHTS_INDEX_FILE).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert "lists missing files: model-1.safetensors" in find_weight_problems(folder)[0]


def test_weights_of_a_hub_id_may_be_missing_before_they_are_downloaded(tmp_path: Path) -> None:
    like(tmp_path).rename(tmp_path / "snapshots")
    (tmp_path / "snapshots" / "abc").mkdir()
    assert find_weight_problems(tmp_path / "snapshots" / "abc") == []


REPOSITORY = (
    "config.json", "tokenizer.json", "LICENSE", "additional_chat_templates/rag.jinja", "adapter_config.json",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "trainer_state.json", "pytorch_model.bin",
)  # fmt: skip


@pytest.mark.parametrize(("weights", "expected"), [(True, REPOSITORY[:7]), (False, REPOSITORY[:5])])
def test_a_download_has_the_files_that_are_used(
    weights: bool, expected: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded: list[str] = []

    def download(path: str, *, allow_patterns: list[str]) -> str:
        downloaded.extend(filter_repo_objects(REPOSITORY, allow_patterns=allow_patterns))
        return path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve_model_folder("owner/name", weights=weights)
    assert downloaded == list(expected)


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


def test_an_adapter_beside_the_weights_gives_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers applies it if peft is installed."""
    folder = save_random_model(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    check_model_folder(ModelConfig(path=str(folder)), folder, weights=True)
    assert "the LoRA adapter in adapter_model.safetensors is not applied" in capsys.readouterr().err


def test_a_tokenizer_with_an_id_beyond_the_embedding_is_an_error(tmp_path: Path) -> None:
    """Its ids have a gap, so its number of tokens is smaller than its largest id."""
    folder = save_random_model(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["?"] = 100
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the tokenizer has 101 tokens, but the embedding has only"):
        check_model_folder(ModelConfig(path=str(folder)), folder, weights=False)
