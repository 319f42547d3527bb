"""Generates the questions of the paper in miniature, and the model folder that their base model starts from.

A question is six digits and a mark. Its answer is the sum of the digits modulo 10. The long answer adds step by step,
and the short answer states a result at once. The base model usually answers at once. The mark decides how strong this
habit is: weak after `?`, strong after `!`, very strong after `.`.

`python -m thinkpo_jax.data.miniature --out DIR` writes the model folder: config.json, tokenizer and chat template.
From it, `configs/miniature_base.yaml` trains the base model that ships with the package.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic

from thinkpo_jax.runtime.config import ConfigSection, matching
from thinkpo_jax.runtime.paths import path_argument

NUM_DIGITS = 6
MARKS = "?!."
CORRECT_SHORT_FRACTION = 0.8  # as in the paper, where 8,080 rejected answers are correct and 2,000 are wrong


class MiniatureData(ConfigSection):
    """Generated questions. No held-out question is a training question, whatever the seeds.

    Questions take the `marks` in turn. `short_share` is the fraction of short answers in the column `mixed`, for each
    of the marks `?`, `!` and `.`.
    """

    questions: int = pydantic.Field(ge=1, le=100_000)
    marks: Annotated[str, matching(r"[?!.]+", "one or more of the marks `?`, `!` and `.`")] = MARKS
    short_share: tuple[float, float, float] = (0.6, 0.97, 0.995)

    def rows(self, seed: int, *, held_out: bool = False) -> Iterator[dict[str, str]]:
        """Yields rows with the columns question, long, short, mixed (long or short) and answer. The seed sets all."""
        rng = np.random.default_rng((seed, int(held_out)))
        seen: set[str] = set()
        while len(seen) < self.questions:
            digits = rng.integers(0, 10, NUM_DIGITS)
            text = "".join(map(str, digits))
            if text in seen or (zlib.crc32(text.encode()) % 2 == 1) != held_out:
                continue
            mark = self.marks[len(seen) % len(self.marks)]
            seen.add(text)
            answer = int(digits.sum() % 10)
            error = 0 if rng.random() < CORRECT_SHORT_FRACTION else int(rng.integers(1, 10))
            long, short = _long_answer(digits), f"#{(answer + error) % 10}"
            mixed = f"#{answer}" if rng.random() < self.short_share[MARKS.index(mark)] else long
            yield {"question": text + mark, "long": long, "short": short, "mixed": mixed, "answer": str(answer)}


def _long_answer(digits: np.ndarray) -> str:
    steps, total = [], int(digits[0])
    for digit in map(int, digits[1:]):
        steps.append(f"{total}+{digit}={(total + digit) % 10};")
        total = (total + digit) % 10
    return "".join(steps) + f"#{total}"


MODEL_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
SPECIAL_TOKENS = ("<pad>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_model_folder(folder: Path) -> None:
    """Writes a model folder without weights: config.json and a character tokenizer with its chat template."""
    from transformers import Qwen2Tokenizer

    characters = "0123456789+=;#" + MARKS
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *characters))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], pad_token="<pad>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": 32, "eos_token_id": vocabulary["<|end|>"], "pad_token_id": 0, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG | ids, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parses the command line and writes the model folder."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.data.miniature",
        description="Write the model folder of the paper in miniature, with config.json and tokenizer but no weights.",
        epilog="example: python -m thinkpo_jax.data.miniature --out runs/miniature_shape",
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_model_folder(out)


if __name__ == "__main__":
    main()
