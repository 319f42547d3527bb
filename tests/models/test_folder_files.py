"""An export copies only files of the model. A link to another file, a pipe or a huge file is refused at the start."""

import os
import shutil
from pathlib import Path

import pytest
from support import small
from support.faults import Outcome
from support.model_folders import edit_json, save_random_model, save_small_model
from support.weights import like, random_model

from thinkpo_jax.models.folder_files import COPIED_FILES, list_copied_files
from thinkpo_jax.models.model_folder import ModelConfig, check_model_folder
from thinkpo_jax.runtime.config import UserError


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("a private text")
    return tmp_path / "secret"


def _check(folder: Path, *, weights: bool = False) -> None:
    check_model_folder(ModelConfig(path=str(folder)), folder, weights=weights)


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "vocab.txt", "additional_chat_templates/x.jinja"])
@pytest.mark.faults(Outcome.REFUSED)
def test_a_link_out_of_the_folder_is_refused_and_never_copied(name: str, secret: Path, tmp_path: Path) -> None:
    folder = like(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError) as caught:
        _check(folder)
    assert str(caught.value) == (
        f"{folder / name}: expected a file of the model, found a link to {secret}. An export would copy that file. "
        "Replace the link with a copy if it belongs to the model. Otherwise remove it."
    )
    with pytest.raises(UserError, match="found a link to"):
        save_small_model(random_model(small.ARCH), tmp_path / "export", folder)
    assert not (tmp_path / "export").exists()
    assert all(
        secret.read_bytes() not in file.read_bytes() for file in tmp_path.glob(".export*/**/*") if file.is_file()
    )


@pytest.mark.faults(Outcome.REFUSED)
def test_a_linked_folder_of_templates_is_no_way_out(tmp_path: Path) -> None:
    folder = like(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.jinja").write_text("a private text")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"found a link to .*/other/x\.jinja"):
        list_copied_files(folder)


def test_files_that_are_not_known_are_not_copied(secret: Path, tmp_path: Path) -> None:
    folder = like(tmp_path)
    (folder / "notes.txt").symlink_to(secret)
    (folder / "LICENSE").write_text("a license")
    save_small_model(random_model(small.ARCH), tmp_path / "export", folder)
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert "notes.txt" not in names
    assert (tmp_path / "export" / "LICENSE").read_text() == "a license"


def test_links_inside_the_folder_and_links_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = like(tmp_path)
    (folder / "LICENSE.txt").write_text("a license")
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    (tmp_path / "link").symlink_to(folder)
    _check(tmp_path / "link")
    assert {file.name for file in list_copied_files(tmp_path / "link")} >= {"LICENSE", "LICENSE.txt", "config.json"}


def _as_hub_snapshot(model: Path, repository: Path) -> Path:
    """Moves the files of a model to where the cache of the Hub has them. Returns the folder of links."""
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.move(file, repository / "blobs" / f"{number:x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:x}")
    return snapshot


def test_a_snapshot_of_the_hub_links_to_the_blobs_of_its_repository(secret: Path, tmp_path: Path) -> None:
    snapshot = _as_hub_snapshot(save_random_model(tmp_path), tmp_path / "cache" / "models--owner--name")
    _check(snapshot, weights=True)
    (tmp_path / "link").symlink_to(snapshot)
    _check(tmp_path / "link", weights=True)
    save_small_model(random_model(small.ARCH), tmp_path / "export", snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "export").iterdir())
    (snapshot / "LICENSE").symlink_to(secret)
    with pytest.raises(UserError, match="LICENSE: expected a file of the model"):
        _check(snapshot)


def test_weights_may_be_linked_from_anywhere(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    shutil.move(folder / "model.safetensors", tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    _check(folder, weights=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "merges.txt", "LICENSE", "x.safetensors"])
@pytest.mark.faults(Outcome.REFUSED)
def test_a_pipe_in_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = like(tmp_path)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"expected only files and folders, found a pipe, socket or device: {name}."):
        _check(folder, weights=True)


@pytest.mark.parametrize(
    ("name", "limit"), [("config.json", 2**20), ("generation_config.json", 2**20), ("tokenizer_config.json", 2**21),
                        ("tokenizer.json", 2**26), ("model.safetensors.index.json", 2**24)],
)  # fmt: skip
@pytest.mark.faults(Outcome.REFUSED)
def test_a_huge_file_is_refused_before_it_is_read(name: str, limit: int, tmp_path: Path) -> None:
    folder = like(tmp_path)
    with (folder / name).open("ab") as file:
        file.truncate(2**30)  # takes no space on the disk
    with pytest.raises(UserError) as caught:
        _check(folder, weights=True)
    line = f"{folder / name}: expected at most {limit:,} bytes, found {2**30:,}. Put the right file there."
    assert line in str(caught.value).splitlines()


@pytest.mark.faults(Outcome.REFUSED)
def test_the_header_of_a_weight_file_has_a_limit(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"its header has 1,099,511,627,776 bytes, expected at most 16,777,216"):
        _check(folder, weights=True)


def test_code_beside_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    folder = like(tmp_path)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["hostile.Tokenizer", None]})
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    _check(folder)
    assert not (tmp_path / "was_run").exists()
    assert "hostile.py" not in {file.name for file in list_copied_files(folder)}
    assert not any(pattern.endswith(".py") for pattern in COPIED_FILES)
