"""A tokenizer with more tokens than the embedding has rows: new rows are the mean, old logits stay the same."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import small
from support.checkpoints import torch_logits
from support.model_folders import edit_json, save_random_model, save_small_model
from support.quickstart import train_quickstart
from support.selection import exhaustive
from support.weights import MINIATURE

from thinkpo_jax import evaluate, export
from thinkpo_jax.models.architecture import Architecture, read_architecture
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.model_folder import ModelConfig, resolve_architecture, resolve_model_source
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_mapping import flatten_by_name
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import UserError

NUM_ROWS = 128  # the next multiple of 128
TIED = dataclasses.replace(small.ARCH, tied_head=True)
TOKENS_BT = np.random.default_rng(0).integers(0, small.ARCH.vocab_size, (2, 24)).astype(np.int32)


def with_more_tokens(folder: Path, count: int) -> Path:
    """Adds tokens to the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(count)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def miniature(tmp_path: Path) -> Path:
    """The miniature model, which has 32 rows, with a tokenizer of 42 tokens."""
    return with_more_tokens(Path(shutil.copytree(MINIATURE, tmp_path / "miniature")), 20)


@jax.jit
def _logits(model: Transformer, tokens_BT: jax.Array, positions: TokenPositions) -> jax.Array:
    return model(tokens_BT, positions) @ model.lm_head()


def logits(model: Transformer) -> np.ndarray:
    positions_BT = jnp.broadcast_to(jnp.arange(TOKENS_BT.shape[1], dtype=jnp.int32), TOKENS_BT.shape)
    positions = TokenPositions(jnp.ones(TOKENS_BT.shape, jnp.int32), positions_BT)
    return np.asarray(_logits(model, jnp.array(TOKENS_BT), positions))


@pytest.mark.parametrize("arch", [small.ARCH, TIED], ids=["untied", "tied"])
def test_old_logits_stay_and_new_rows_are_the_mean(arch: Architecture, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, arch)
    old = load_model(folder, small.FLOAT32, small.mesh())
    resized = load_model(folder, small.FLOAT32, small.mesh(), vocab_size=NUM_ROWS)
    num_old = arch.vocab_size
    np.testing.assert_allclose(logits(resized)[..., :num_old], logits(old), atol=1e-4)
    parameters = flatten_by_name(resized)
    rows = [parameters["embedding"]] + ([] if arch.tied_head else [parameters["untied_head"].T])
    for rows_VD in map(np.asarray, rows):
        assert rows_VD.shape == (NUM_ROWS, arch.hidden_size)
        mean_VD = np.broadcast_to(rows_VD[:num_old].mean(0), rows_VD[num_old:].shape)
        np.testing.assert_allclose(rows_VD[num_old:], mean_VD, atol=1e-6)
    sharded = load_model(folder, small.FLOAT32, small.mesh(data=2, fsdp=2, tensor=2), vocab_size=NUM_ROWS)
    assert sharded.embedding[...].sharding.shard_shape((NUM_ROWS, arch.hidden_size))[0] == NUM_ROWS // 2
    for name, value in flatten_by_name(sharded).items():
        np.testing.assert_array_equal(value, parameters[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [small.ARCH, TIED], ids=["untied", "tied"])
def test_transformers_reads_an_exported_resized_model(arch: Architecture, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = save_random_model(tmp_path, arch)
    resized = load_model(folder, small.FLOAT32, small.mesh(), vocab_size=NUM_ROWS)
    save_small_model(resized, tmp_path / "resized", folder)
    assert read_architecture(tmp_path / "resized") == dataclasses.replace(arch, vocab_size=NUM_ROWS)
    np.testing.assert_allclose(torch_logits(tmp_path / "resized", TOKENS_BT), logits(resized), rtol=1e-4, atol=1e-3)


def test_without_the_key_the_error_names_it(miniature: Path) -> None:
    with pytest.raises(
        UserError, match=r"has 42 tokens, but the embedding has only 32 rows.*`resize_embeddings: true`"
    ):
        resolve_model_source(ModelConfig(path=str(miniature)), seed=0)


def test_every_way_to_a_model_has_the_new_rows(miniature: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(path=str(miniature), resize_embeddings=True)
    source = resolve_model_source(config, seed=0)
    assert "It gets 96 more rows" in capsys.readouterr().err
    assert source.architecture == resolve_architecture(config)
    for each in (source, dataclasses.replace(source, random_seed=3)):
        model = each.load(small.FLOAT32, small.mesh(tensor=2))
        assert model.arch.vocab_size == NUM_ROWS
        assert model.embedding[...].shape[0] == NUM_ROWS


def test_a_resized_model_has_its_own_identity(miniature: Path) -> None:
    resized = resolve_model_source(ModelConfig(path=str(miniature), resize_embeddings=True), seed=0)
    plain = dataclasses.replace(resized, architecture=read_architecture(miniature))
    assert resized.identity() == f"{plain.identity()}, resized to 128 rows"


def test_a_model_with_enough_rows_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    resized, plain = (
        resolve_model_source(ModelConfig(path="builtin:miniature", resize_embeddings=resize), seed=0)
        for resize in (True, False)
    )
    assert resized.architecture == plain.architecture
    assert resized.identity() == plain.identity()
    assert capsys.readouterr().err == ""


@exhaustive
def test_a_run_trains_resumes_evaluates_and_exports_a_resized_model(miniature: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", [f"model.path={miniature}", "model.resize_embeddings=true"]
    assert train_quickstart(run, *model, "stages.thinkpo.steps=2") == 0
    folder = run / "thinkpo" / "model"
    assert read_architecture(folder).vocab_size == NUM_ROWS
    shutil.rmtree(run / "control")
    assert train_quickstart(run, *model, "stages.thinkpo.steps=2") == 0  # resumes
    assert run_command(export.main, ["--run", str(run), "--stage", "sft", "--out", str(tmp_path / "out")]) == 0
    edit_json(tmp_path / "out" / "generation_config.json", temperature=None)
    assert resolve_model_source(ModelConfig(path=str(tmp_path / "out")), seed=0).architecture.vocab_size == NUM_ROWS
    config = ["--config", str(run / "config.yaml"), "--model", str(miniature), "--out", str(tmp_path / "other")]
    assert run_command(evaluate.main, config) == 0
