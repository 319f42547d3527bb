"""The network is the one that transformers computes: logits, gradients, greedy answers, and the folder we write."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import small
from support.checkpoints import needs_data, tiny_checkpoint, torch_logits, torch_model
from support.paths import DATA

from thinkpo_jax.inference.engine import Completion, generate
from thinkpo_jax.inference.sampling import SamplingConfig
from thinkpo_jax.models.attention.dense import TokenPositions
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_mapping import flatten_by_name, weight_mappings
from thinkpo_jax.models.weight_saving import save_model

pytest.importorskip("torch")
pytestmark = pytest.mark.slow

VOCABULARY = 128
ORIGINAL = 32  # tokens of the context that a stretched RoPE was first trained on; the tests go beyond
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
        case["rope_parameters"] = {"rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL} | rope
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), **case)


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load_model(folder, small.FLOAT32, small.mesh())


def _tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (rows, length)).astype(np.int32)


@jax.jit
def _logits(model: Transformer, tokens_BT: jax.Array, places: TokenPositions) -> jax.Array:
    return model(tokens_BT, places)[0] @ model.lm_head()


def _rows(tokens_BT: np.ndarray) -> TokenPositions:
    """Each row one segment."""
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    return TokenPositions(jnp.ones(tokens_BT.shape, jnp.int32), jnp.array(positions_BT))


def test_logits(folder: Path, model: Transformer) -> None:
    tokens_BT = _tokens(3, 40)
    expected = torch_logits(folder, tokens_BT)
    assert expected.std() > 0.1
    np.testing.assert_allclose(_logits(model, jnp.array(tokens_BT), _rows(tokens_BT)), expected, atol=1e-4)


@needs_data
@pytest.mark.parametrize(("family", "tokenizer"), [("qwen2", "qwen2_5"), ("qwen3", "qwen3"), ("llama", "llama3_2")])
def test_logits_of_real_text_under_real_vocabularies(family: str, tokenizer: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tiny_checkpoint(tmp_path / "model", family=family, tokenizer=DATA / "tokenizers" / tokenizer)
    row = json.loads((DATA / "pairs" / "math500_pairs.jsonl").read_text(encoding="utf-8").split("\n")[0])
    tokens_BT = np.array([AutoTokenizer.from_pretrained(folder)(row["long"])["input_ids"][:200]], np.int32)
    found = _logits(load_model(folder, small.FLOAT32, small.mesh()), jnp.array(tokens_BT), _rows(tokens_BT))
    np.testing.assert_allclose(found, torch_logits(folder, tokens_BT), atol=1e-4)


def test_logits_at_any_positions(folder: Path, model: Transformer) -> None:
    import torch

    tokens_BT = _tokens(2, 24)
    steps = np.random.default_rng(1).integers(1, 15, tokens_BT.shape)
    positions_BT = np.cumsum(steps, axis=1) + np.array([[0], [100]])
    with torch.no_grad():
        expected = torch_model(folder)(
            input_ids=torch.from_numpy(tokens_BT.astype(np.int64)),
            position_ids=torch.from_numpy(positions_BT),
            attention_mask=torch.ones(tokens_BT.shape, dtype=torch.int64),  # or jumps are taken for packing
            use_cache=False,
        ).logits.numpy()
    places = _rows(tokens_BT)._replace(positions=jnp.array(positions_BT, jnp.int32))
    np.testing.assert_allclose(_logits(model, jnp.array(tokens_BT), places), expected, atol=1e-4)
    assert np.abs(expected - torch_logits(folder, tokens_BT)).max() > 0.01, "positions matter"


def test_logits_of_a_packed_row(folder: Path, model: Transformer) -> None:
    tokens_BT, split = _tokens(1, 30), 13
    indices = np.arange(30)[None]
    places = TokenPositions(
        jnp.array(np.where(indices < split, 1, 2), jnp.int32),
        jnp.array(np.where(indices < split, indices, indices - split), jnp.int32),
    )
    parts = [torch_logits(folder, part) for part in np.split(tokens_BT, [split], axis=1)]
    found = _logits(model, jnp.array(tokens_BT), places)
    np.testing.assert_allclose(found, np.concatenate(parts, axis=1), atol=1e-4)


def test_gradients(folder: Path, model: Transformer) -> None:
    import torch

    tokens_BT = _tokens(3, 40)
    reference = torch_model(folder)
    rows = torch.from_numpy(tokens_BT.astype(np.int64))
    expected_loss = torch.nn.functional.cross_entropy(
        reference(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
    )
    expected_loss.backward()
    gradients = {name: value.grad.numpy() for name, value in reference.named_parameters() if value.grad is not None}

    def loss(model: Transformer) -> jax.Array:
        logits_BTV = _logits(model, jnp.array(tokens_BT), _rows(tokens_BT))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.array(tokens_BT[:, 1:])).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    assert float(value) == pytest.approx(expected_loss.item(), rel=1e-5)
    ours = flatten_by_name(gradient)
    for entry in weight_mappings(model):
        array = np.asarray(ours[entry.path])
        for name, part in zip(entry.names, array if entry.is_per_layer else array[None], strict=True):
            expected = gradients.pop(name)
            error = np.linalg.norm(entry.to_hf(part) - expected) / np.linalg.norm(expected)
            assert error < 1e-3, name
    assert not gradients, "every parameter of transformers' model was compared"


def test_greedy_answers(folder: Path, model: Transformer) -> None:
    import torch
    from transformers import GenerationConfig

    prompts = [_tokens(1, length)[0].tolist() for length in (3, 17, 40)]
    reference = torch_model(folder)
    settings = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    reference.generation_config = settings
    expected = []
    for prompt in prompts:
        rows = torch.tensor([prompt])
        kwargs = {"attention_mask": torch.ones_like(rows), "generation_config": settings}
        answer = reference.generate(rows, **kwargs)  # pyright: ignore[reportCallIssue] -- torch hides a module's methods
        expected.append(Completion(answer[0, len(prompt) :].tolist(), finish_reason="length"))
    assert [len(generation.token_ids) for generation in expected] == [64] * 3
    mesh = small.mesh()
    with jax.set_mesh(mesh):
        config = SamplingConfig(temperature=0, max_new_tokens=64, batch_size=4)
        found = generate(model, prompts, config, stop_token_ids=(), vocab_size=VOCABULARY, seed=0, mesh=mesh)
    assert found == expected


def test_what_we_write_transformers_reads(folder: Path, model: Transformer, tmp_path: Path) -> None:
    save_model(
        model, tmp_path / "out", template_folder=folder, dtype="float32", stop_token_ids=[1, 2, 3], model_card=""
    )
    tokens_BT = _tokens(3, 40)
    np.testing.assert_array_equal(torch_logits(tmp_path / "out", tokens_BT), torch_logits(folder, tokens_BT))
