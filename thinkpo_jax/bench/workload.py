"""The models and pairs that the benchmarks train: shapes of real models, and lengths like real ones.

Weights and tokens are random, because neither changes the work of an update.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thinkpo_jax.data.examples import Example, Segment
from thinkpo_jax.models.architecture import Architecture, read_architecture

END_ID = 1  # ends an answer
NAMES = ("prompt", "chosen", "rejected")
Pair = dict[str, list[int]]  # token ids by name

_QWEN: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151_936}
_QWEN |= {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "pad_token_id": 0}
_QWEN |= {"eos_token_id": END_ID, "bos_token_id": None}
_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def _qwen(*sizes: int, **others: Any) -> dict[str, Any]:
    return _QWEN | dict(zip(_SIZES, sizes, strict=True)) | others


# config.json by name. The Qwen2.5 shapes are those of the published models.
MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-1.5B": _qwen(1536, 28, 8960, 12, 2, tie_word_embeddings=True),
    "Qwen2.5-3B": _qwen(2048, 36, 11_008, 16, 2, tie_word_embeddings=True),
    "Qwen2.5-7B": _qwen(3584, 28, 18_944, 28, 4, tie_word_embeddings=False, vocab_size=152_064),
    "Qwen2.5-14B": _qwen(5120, 48, 13_824, 40, 8, tie_word_embeddings=False, vocab_size=152_064),
    "small": _qwen(512, 4, 1536, 8, 4, tie_word_embeddings=True, vocab_size=32_768),
    "tiny": _qwen(64, 2, 192, 2, 1, tie_word_embeddings=True, vocab_size=512),
}


class LengthDistribution(NamedTuple):
    """Lognormal lengths in tokens, in the order of `NAMES`. A longer prompt or answer is cut off at its maximum."""

    medians: Sequence[float]
    log_spreads: Sequence[float]
    maxima: Sequence[int]


# Tokens of 522 real pairs with at most 2,048 tokens (docs/data.md, "On real data").
REAL_PAIRS = LengthDistribution((67, 1625, 427), (0.5, 0.5, 0.6), (2046, 2048, 2048))
# Pairs as long as the paper's by the maximum length of an answer. See BENCHMARKS.md, "Packing at the lengths of the
# paper". The medians of prompts and of rejected answers do not depend on it.
_PAPER_CHOSEN = {8192: (4350, 0.55), 16_384: (6600, 0.6), 32_768: (9100, 0.7)}


def paper_lengths(max_length: int) -> LengthDistribution:
    """Returns lengths like the paper's for rows of `max_length` tokens. Shorter rows get scaled lengths."""
    base = min((length for length in _PAPER_CHOSEN if length >= max_length), default=max(_PAPER_CHOSEN))
    median, spread = _PAPER_CHOSEN[base]
    scale = min(1.0, max_length / base)
    maxima = (max_length // 16, max_length, max_length // 6)
    return LengthDistribution((100 * scale, median * scale, 600 * scale), (0.5, spread, 0.5), maxima)


def draw_pairs(lengths: LengthDistribution, num_pairs: int, *, max_length: int, vocab_size: int, seed: int,
               share_length: bool = False) -> list[Pair]:  # fmt: skip
    """Returns pairs of random tokens. Prompt and answer together have at most `max_length` tokens.

    With `share_length` this holds for both sequences of a pair together. Then each pair fits into a row of
    `max_length` tokens. Raises `ValueError` if a prompt is so long that its pair does not fit.
    """
    rng = np.random.default_rng(seed)
    factors = np.exp(np.array(lengths.log_spreads) * rng.standard_normal((num_pairs, 3)))
    drawn = (np.array(lengths.medians) * factors).round().astype(int).clip(1, lengths.maxima)
    pairs: list[Pair] = []
    for prompt_length, chosen_length, rejected_length in drawn.tolist():
        prompt = rng.integers(2, vocab_size, min(prompt_length, max_length - 2)).tolist()
        room = max_length - 1 - len(prompt)  # beside the end token
        rejected_length = min(rejected_length, room)
        room -= rejected_length + 1 + len(prompt) if share_length else 0
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt)} and an answer of {rejected_length} tokens do not fit twice")
        answers = [rng.integers(2, vocab_size, n).tolist() for n in (min(chosen_length, room), rejected_length)]
        pairs.append(dict(zip(NAMES, (prompt, *([*answer, END_ID] for answer in answers)), strict=True)))
    return pairs


def count_tokens(pairs: Sequence[Pair]) -> int:
    """Returns the useful tokens: those of prompt + chosen and of prompt + rejected, without padding."""
    return sum(len(pair[name]) for pair in pairs for name in ("prompt", *NAMES))


def to_examples(pairs: Sequence[Pair], *, answers: Sequence[str] = NAMES[1:]) -> list[Example]:
    """Returns the pairs as examples with a segment for each of the `answers`."""
    return [
        tuple(Segment(np.array(pair["prompt"] + pair[name], np.int32), len(pair["prompt"])) for name in answers)
        for pair in pairs
    ]


def write_model_config(model: str, folder: Path) -> Architecture:
    """Writes the config.json of a model of `MODEL_CONFIGS` and reads it as any other."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIGS[model]), encoding="utf-8")
    return read_architecture(folder)
