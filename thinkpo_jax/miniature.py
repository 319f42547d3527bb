"""What is the paper in miniature? Questions a two-layer model can answer, with long and short answers.

A question asks for a sum of single digits modulo 10. The long answer works it out, one running sum after the other;
the short answer names the result at once. `python -m thinkpo_jax.miniature --out DIR` writes the folder (config.json,
tokenizer, chat template) from which `configs/miniature_base.yaml` trains the base model that ships with the package.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydantic

from thinkpo_jax.config import Section

DIGITS = 6


class MiniatureData(Section):
    """Generated questions. Held-out questions and training questions never overlap, whatever the seed."""

    questions: int = pydantic.Field(ge=1)
    held_out: bool = False
    short_share: float = pydantic.Field(default=0.5, ge=0, le=1)

    def rows(self, seed: int) -> Iterator[dict[str, str]]:
        """Rows with the fields question, long, short, mixed (long or short), answer; a pure function of the seed."""
        rng = np.random.default_rng((seed, int(self.held_out)))
        seen: set[str] = set()
        while len(seen) < self.questions:
            digits = rng.integers(0, 10, DIGITS)
            question = "+".join(map(str, digits)) + "?"
            if question in seen or (zlib.crc32(question.encode()) % 2 == 1) != self.held_out:
                continue
            seen.add(question)
            long, short = _long_answer(digits), f"#{digits.sum() % 10}"
            mixed = short if rng.random() < self.short_share else long
            yield {"question": question, "long": long, "short": short, "mixed": mixed, "answer": short[1:]}


def _long_answer(digits: np.ndarray) -> str:
    steps, total = [], int(digits[0])
    for digit in map(int, digits[1:]):
        steps.append(f"{total}+{digit}={(total + digit) % 10};")
        total = (total + digit) % 10
    return "".join(steps) + f"#{total}"


ARCHITECTURE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
SPECIAL = ("<pad>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_shape(folder: Path) -> None:
    """Writes config.json and a character tokenizer with its chat template: a model folder without weights."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = "0123456789+=;#?"
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    ids = {"vocab_size": 32, "eos_token_id": vocabulary["<|end|>"], "pad_token_id": 0, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE | ids, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.miniature",
        description="Write the model folder (shape and tokenizer, no weights) of the paper in miniature.",
        epilog="example: python -m thinkpo_jax.miniature --out runs/miniature_shape",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_shape(out)


if __name__ == "__main__":
    main()
