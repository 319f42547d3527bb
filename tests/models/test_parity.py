"""Logits, gradients, greedy completions and saved folders are the same as in transformers."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import generation, small
from support.attention import packed_positions
from support.checkpoints import needs_data, tiny_checkpoint, torch_logits, torch_model
from support.paths import DATA

from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.inference_model import prepare_inference_model
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_mapping import flatten_by_name, weight_mappings
from thinkpo_jax.models.weight_saving import save_model

pytest.importorskip("torch")
pytestmark = pytest.mark.slow

VOCAB_SIZE = 128
ORIGINAL_CONTEXT = 32  # tokens. The tests use longer rows, so that scaled RoPE has an effect.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {"family": "qwen2"},
    "qwen2.5-0.5b": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2.5-yarn": {"family": "qwen2", "rope": {"rope_type": "yarn", "factor": 4.0}},
    "qwen3-8b": {"family": "qwen3"},
    "qwen3-0.6b": {"family": "qwen3", "tie_word_embeddings": True, "head_dim": 16},
    "llama-3": {"family": "llama"},
    "llama-3.1": {"family": "llama", "rope": LLAMA3},
    "llama-3.2": {"family": "llama", "tie_word_embeddings": True, "rope": LLAMA3 | {"factor": 32.0}, "head_dim": 16},
    "llama-linear": {"family": "llama", "rope": {"rope_type": "linear", "factor": 2.0}},
    "smollm2": {"family": "llama", "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = dict(CASES[request.param])
    rope = case.pop("rope", None)
    if rope is not None:
        case["rope_parameters"] = {"rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL_CONTEXT} | rope
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), **case)


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load_model(folder, small.FLOAT32, small.mesh())


def _random_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (rows, length)).astype(np.int32)


@jax.jit
def _logits(model: Transformer, tokens_BT: jax.Array, positions: TokenPositions) -> jax.Array:
    return model(tokens_BT, positions) @ model.lm_head()


def _unpacked(tokens_BT: np.ndarray) -> TokenPositions:
    """Returns positions for rows that are one segment each."""
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    return TokenPositions(jnp.ones(tokens_BT.shape, jnp.int32), jnp.array(positions_BT))


def test_logits_of_random_tokens(folder: Path, model: Transformer) -> None:
    tokens_BT = _random_tokens(3, 40)
    expected = torch_logits(folder, tokens_BT)
    assert expected.std() > 0.1
    np.testing.assert_allclose(_logits(model, jnp.array(tokens_BT), _unpacked(tokens_BT)), expected, atol=1e-4)


@needs_data
@pytest.mark.parametrize(("family", "tokenizer"), [("qwen2", "qwen2_5"), ("qwen3", "qwen3"), ("llama", "llama3_2")])
def test_logits_of_real_text_under_real_vocabularies(family: str, tokenizer: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tiny_checkpoint(tmp_path / "model", family=family, tokenizer=DATA / "tokenizers" / tokenizer)
    row = json.loads((DATA / "pairs" / "math500_pairs.jsonl").read_text(encoding="utf-8").split("\n")[0])
    tokens_BT = np.array([AutoTokenizer.from_pretrained(folder)(row["long"])["input_ids"][:200]], np.int32)
    logits = _logits(load_model(folder, small.FLOAT32, small.mesh()), jnp.array(tokens_BT), _unpacked(tokens_BT))
    np.testing.assert_allclose(logits, torch_logits(folder, tokens_BT), atol=1e-4)


def test_logits_at_any_positions(folder: Path, model: Transformer) -> None:
    import torch

    tokens_BT = _random_tokens(2, 24)
    steps = np.random.default_rng(1).integers(1, 15, tokens_BT.shape)
    positions_BT = np.cumsum(steps, axis=1) + np.array([[0], [100]])
    with torch.no_grad():
        expected = torch_model(folder)(
            input_ids=torch.from_numpy(tokens_BT.astype(np.int64)),
            position_ids=torch.from_numpy(positions_BT),
            # Without a mask, transformers takes jumps of positions for packed rows.
            attention_mask=torch.ones(tokens_BT.shape, dtype=torch.int64),
            use_cache=False,
        ).logits.numpy()
    positions = _unpacked(tokens_BT)._replace(positions=jnp.array(positions_BT, jnp.int32))
    np.testing.assert_allclose(_logits(model, jnp.array(tokens_BT), positions), expected, atol=1e-4)
    assert np.abs(expected - torch_logits(folder, tokens_BT)).max() > 0.01, "positions change the logits"


def test_logits_of_a_packed_row(folder: Path, model: Transformer) -> None:
    tokens_BT, split = _random_tokens(1, 30), 13
    segment_logits = [torch_logits(folder, segment) for segment in np.split(tokens_BT, [split], axis=1)]
    logits = _logits(model, jnp.array(tokens_BT), packed_positions([[split, 30 - split]], 30))
    np.testing.assert_allclose(logits, np.concatenate(segment_logits, axis=1), atol=1e-4)


def test_gradients_of_all_parameters(folder: Path, model: Transformer) -> None:
    import torch

    tokens_BT = _random_tokens(3, 40)
    reference = torch_model(folder)
    rows = torch.from_numpy(tokens_BT.astype(np.int64))
    expected_loss = torch.nn.functional.cross_entropy(
        reference(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
    )
    expected_loss.backward()
    expected_gradients = {
        name: value.grad.numpy() for name, value in reference.named_parameters() if value.grad is not None
    }

    def loss(model: Transformer) -> jax.Array:
        logits_BTV = _logits(model, jnp.array(tokens_BT), _unpacked(tokens_BT))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.array(tokens_BT[:, 1:])).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    assert float(value) == pytest.approx(expected_loss.item(), rel=1e-5)
    gradients = flatten_by_name(gradient)
    for mapping in weight_mappings(model):
        array = np.asarray(gradients[mapping.path])
        for name, layer in zip(mapping.names, array if mapping.is_per_layer else array[None], strict=True):
            expected = expected_gradients.pop(name)
            error = np.linalg.norm(mapping.to_hf(layer) - expected) / np.linalg.norm(expected)
            assert error < 1e-3, name
    assert not expected_gradients, "every parameter of the torch model was compared"


def test_greedy_completions(folder: Path, model: Transformer) -> None:
    import torch
    from transformers import GenerationConfig

    prompts = [_random_tokens(1, length)[0].tolist() for length in (3, 17, 40)]
    reference = torch_model(folder)
    settings = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    reference.generation_config = settings
    expected = []
    for prompt in prompts:
        rows = torch.tensor([prompt])
        kwargs = {"attention_mask": torch.ones_like(rows), "generation_config": settings}
        answer = reference.generate(rows, **kwargs)  # pyright: ignore[reportCallIssue] -- torch hides a module's methods
        expected.append(generation.Generated(answer[0, len(prompt) :].tolist(), "length"))
    assert [len(answer.ids) for answer in expected] == [64] * 3
    mesh = small.mesh()
    with jax.set_mesh(mesh):
        prepared = prepare_inference_model(model, mesh, vocab_size=VOCAB_SIZE)
    assert generation.generate(prompts, SamplingConfig(temperature=0), limits=64, model=prepared) == expected


def test_transformers_reads_saved_folders(folder: Path, model: Transformer, tmp_path: Path) -> None:
    save_model(
        model, tmp_path / "out", template_folder=folder, dtype="float32", stop_token_ids=[1, 2, 3], model_card=""
    )
    tokens_BT = _random_tokens(3, 40)
    np.testing.assert_array_equal(torch_logits(tmp_path / "out", tokens_BT), torch_logits(folder, tokens_BT))
