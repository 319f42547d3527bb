"""The parity tests can rely on checkpoints.py: the real model is read correctly, and every tiny weight matters."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.checkpoints import (
    needs_data,
    smollm2_folder,
    tiny_checkpoint,
    torch_logits,
    torch_model,
)
from support.paths import DATA

from thinkpo_jax.bench.smollm2 import SMOLLM2_FILES, write_smollm2
from thinkpo_jax.runtime.config import UserError

# Plain English, written for this test. It has 105 tokens.
PASSAGE = (
    "Water moves around our planet in a cycle. The heat of the sun turns water from the oceans, lakes and rivers into "
    "vapor, which rises into the air. As the vapor rises it cools and turns back into tiny drops of water, which form "
    "clouds. When the drops become too heavy, they fall to the ground as rain or snow. Some of this water flows into "
    "rivers and back to the sea, and some of it sinks into the soil, where plants take it up through their roots. Then "
    "the cycle begins again."
)


def mean_nll(logits_BTV: np.ndarray, tokens_BT: np.ndarray) -> float:
    logits, targets = logits_BTV[:, :-1].astype(np.float64), tokens_BT[:, 1:, None]
    logits -= logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    return float((log_z - np.take_along_axis(logits, targets, -1)).mean())


def real_texts() -> Iterator[str]:
    for path in sorted(DATA.rglob("*.jsonl")):
        with path.open(encoding="utf-8", newline="\n") as rows:
            for _, row in zip(range(4), rows, strict=False):
                yield from (value for value in json.loads(row).values() if isinstance(value, str) and value)


@pytest.fixture
def passage_tokens(smollm2: Path) -> np.ndarray:
    from transformers import AutoTokenizer

    return np.array([AutoTokenizer.from_pretrained(smollm2)(PASSAGE)["input_ids"]])


@pytest.mark.slow
def test_smollm2_predicts_english_text(smollm2: Path, passage_tokens: np.ndarray) -> None:
    pytest.importorskip("torch")
    assert mean_nll(torch_logits(smollm2, passage_tokens), passage_tokens) == pytest.approx(2.107, abs=0.01)


@pytest.mark.slow
def test_smollm2_predicts_badly_with_q_and_k_in_gguf_order(smollm2: Path, passage_tokens: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    model = torch_model(smollm2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                halves = weight.reshape(-1, 2, model.config.head_dim // 2, weight.shape[1])
                weight.copy_(halves.swapaxes(1, 2).reshape(weight.shape))
        logits = model(input_ids=torch.from_numpy(passage_tokens)).logits.numpy()
    assert mean_nll(logits, passage_tokens) > 3


@pytest.mark.slow
def test_smollm2_answers_with_its_chat_template(smollm2: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer

    model: Any = torch_model(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is 3+4? Answer briefly."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0]
    answer = answer[prompt["input_ids"].shape[1] :].tolist()
    assert "7" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id, "generation_config.json must name the end-of-turn token"


@pytest.mark.slow
@needs_data
def test_smollm2_tokenizer_decodes_real_texts_exactly(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = list(real_texts())
    assert len(texts) > 50
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_smollm2_tokenizer_knows_its_special_tokens(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (len(tokenizer), tokenizer.unk_token_id) == (49_152, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("<|im_start|>user\nhi<|im_end|>\n")["input_ids"] == [1, 4093, 198, 6004, 2, 198]
    assert tokenizer("<repo_name>hi")["input_ids"] == [3, 6004]
    assert tokenizer.decode([1, 3, 6004, 2], skip_special_tokens=True) == "hi"


@pytest.mark.slow
def test_smollm2_tokenizer_splits_digits_before_spaces(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n 17")["input_ids"]) == ["ĊĊĠ", "1", "7"]


@pytest.mark.slow
def test_smollm2_folder_is_written_once_and_never_over_other_files(smollm2: Path, tmp_path: Path) -> None:
    before = {name: (smollm2 / name).stat().st_mtime_ns for name in SMOLLM2_FILES}
    assert smollm2_folder(smollm2) == smollm2
    assert {name: (smollm2 / name).stat().st_mtime_ns for name in SMOLLM2_FILES} == before
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="remove it or name another"):
        smollm2_folder(tmp_path)


def test_a_file_that_is_not_gguf_is_a_user_error_and_leaves_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="no such file"):
        write_smollm2(tmp_path / "missing.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_bytes(b"no GGUF file" * 10)
    with pytest.raises(UserError, match=r"text\.gguf: not a GGUF file"):
        write_smollm2(tmp_path / "text.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text.gguf"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_tensor_of_a_tiny_checkpoint_changes_its_logits(family: str, tied: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tiny_checkpoint(tmp_path / "tiny", family=family, tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    assert ("model.layers.1.self_attn.k_proj.bias" in tensors) is (family == "qwen2")
    assert ("model.layers.1.self_attn.q_norm.weight" in tensors) is (family == "qwen3")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}
    tokens = np.arange(128).reshape(4, 32)
    logits = torch_logits(folder, tokens)
    assert (logits.shape, logits.dtype) == ((4, 32, 128), np.float32)
    model = torch_model(folder)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.fill_(name.endswith("norm.weight"))  # the values that norms and biases have in a new model
            changed = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
            assert np.abs(changed - logits).max() > 1e-3, f"{name} does not change the logits"
            parameter.copy_(torch.from_numpy(tensors[name]))


def test_tiny_checkpoints_depend_on_their_seed_only(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = torch.random.get_rng_state()
    seeds = {"first": 0, "again": 0, "other": 1}
    folders = [tiny_checkpoint(tmp_path / name, family="qwen2", seed=seed) for name, seed in seeds.items()]
    first, again, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tiny_checkpoint_takes_transformers_config_names(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    folder = tiny_checkpoint(tmp_path / "tiny", family="llama", vocab_size=64, rope_parameters=rope)
    config = torch_model(folder).config
    assert (config.vocab_size, config.rope_parameters) == (64, rope)
    with pytest.raises(ValueError, match="family: expected one of qwen2, qwen3, llama, found 'gpt2'"):
        tiny_checkpoint(tmp_path / "gpt2", family="gpt2")


@needs_data
@pytest.mark.parametrize(
    ("name", "family", "vocab_size", "eos"),
    [
        ("qwen2_5", "qwen2", 151_680, 151_645),
        ("qwen3", "qwen3", 151_680, 151_645),
        ("llama3_2", "llama", 128_256, 128_009),
    ],
)
def test_tiny_checkpoint_takes_a_real_tokenizer(
    name: str, family: str, vocab_size: int, eos: int, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from transformers import AutoConfig, AutoTokenizer

    source = DATA / "tokenizers" / name
    folder = tiny_checkpoint(tmp_path / "tiny", family=family, tokenizer=source, hidden_size=16)
    config = AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.eos_token_id) == (vocab_size, eos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoTokenizer.from_pretrained(source)
    assert tokenizer.eos_token_id == eos
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer(PASSAGE)["input_ids"] == original(PASSAGE)["input_ids"]
