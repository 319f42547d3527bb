"""What is the paper in miniature? Questions a two-layer model can answer, with long and short answers.

A question is six digits and a mark; its answer is the sum of the digits modulo 10. The long answer works the sum out
step by step, the short one names a result at once. How strong the base model's habit of answering at once is depends on
the mark: weak after `?`, strong after `!`, very strong after `.`.

`python -m thinkpo_jax.data.miniature --out DIR` writes the folder (config.json, tokenizer, chat template) from which
`configs/miniature_base.yaml` trains the base model that ships with the package.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydantic

from thinkpo_jax.runtime.config import ConfigSection

DIGITS = 6
MARKS = "?!."
RIGHT_SHORT_ANSWERS = 0.8  # the paper's share: 8,080 right and 2,000 wrong rejected answers


class MiniatureData(ConfigSection):
    """Generated questions. Held-out questions and training questions never overlap, whatever the seed.

    `marks` are taken in turn. `short_share` holds for each of `?`, `!`, `.` how many of the `mixed` answers are short.
    """

    questions: int = pydantic.Field(ge=1, le=100_000)
    marks: str = pydantic.Field(default=MARKS, pattern=r"^[?!.]+$")
    short_share: tuple[float, float, float] = (0.6, 0.97, 0.995)

    def rows(self, seed: int, *, held_out: bool = False) -> Iterator[dict[str, str]]:
        """Rows with the fields question, long, short, mixed (long or short), answer; a function of the seed."""
        rng = np.random.default_rng((seed, int(held_out)))
        seen: set[str] = set()
        while len(seen) < self.questions:
            digits = rng.integers(0, 10, DIGITS)
            text = "".join(map(str, digits))
            if text in seen or (zlib.crc32(text.encode()) % 2 == 1) != held_out:
                continue
            mark = self.marks[len(seen) % len(self.marks)]
            seen.add(text)
            answer = int(digits.sum() % 10)
            off = 0 if rng.random() < RIGHT_SHORT_ANSWERS else int(rng.integers(1, 10))
            long, short = _long_answer(digits), f"#{answer}"
            mixed = short if rng.random() < self.short_share[MARKS.index(mark)] else long
            rejected = f"#{(answer + off) % 10}"
            yield {"question": text + mark, "long": long, "short": rejected, "mixed": mixed, "answer": str(answer)}


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
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
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

    characters = "0123456789+=;#" + MARKS
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
        prog="python -m thinkpo_jax.data.miniature",
        description="Write the model folder (shape and tokenizer, no weights) of the paper in miniature.",
        epilog="example: python -m thinkpo_jax.data.miniature --out runs/miniature_shape",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_shape(out)


if __name__ == "__main__":
    main()
