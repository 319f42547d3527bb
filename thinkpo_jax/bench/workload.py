"""What do the two sides of `bench step` train on, and what do they tell?

Both read one folder: a random model of Llama's shape with a tokenizer of made-up words, and pairs of such words as long
as real ones. Each is a process of its own, so that its memory is its own, and leaves what it measured in a file.
"""

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.safetensors_files import WEIGHTS_FILE
from thinkpo_jax.models.weight_mapping import expected_tensor_shapes

# What both sides train with. The learning rate is small, so that the losses stay comparable although packing and
# padding put different pairs into an update.
BETA, LEARNING_RATE, SEED = 0.01, 1e-6, 0
SHAPE: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49_152,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1408,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
SPECIAL = ("<pad>", "<user>", "<assistant>", "<end>")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ '<end>' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Tokens of 522 real pairs under a cap of 2,048 (README, "On real data"): median, and spread of the logarithm.
CAP, LENGTHS = 2048, {"prompt": (67, 0.5), "chosen": (1625, 0.5), "rejected": (427, 0.6)}


class SideResult(NamedTuple):
    """What one side tells. Losses are means over pairs, memory is in bytes."""

    tokens: int  # of prompt + chosen and prompt + rejected of all pairs, without padding
    seconds: float  # for as many epochs over the pairs as were asked for
    first_loss: float  # of the first update, which is not timed
    mean_loss: float  # over the timed updates
    reference: tuple[float, float]  # log-probs of chosen and rejected before training, means over pairs
    loaded: int  # largest resident memory once the model was loaded
    peak: int  # ... at the end


class BenchFolder(NamedTuple):
    """Where the two sides find model and pairs."""

    path: Path

    @property
    def model(self) -> Path:
        """The Hugging Face folder."""
        return self.path / "model"

    @property
    def pairs(self) -> Path:
        """The pairs: one JSON object a line."""
        return self.path / "pairs.jsonl"


def write_folder(folder: BenchFolder, shape: Mapping[str, Any], *, pairs: int, max_length: int) -> int:
    """Writes model, tokenizer and pairs; gives the number of useful tokens of one epoch."""
    folder.model.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    _write_tokenizer(folder.model, shape["vocab_size"])
    limit = {"max_position_embeddings": max_length, "eos_token_id": SPECIAL.index("<end>"), "pad_token_id": 0}
    (folder.model / "config.json").write_text(json.dumps({**shape, **limit}), encoding="utf-8")
    shapes = expected_tensor_shapes(read_architecture(folder.model))
    tensors = {
        name: (0.02 * rng.standard_normal(size, np.float32) if len(size) > 1 else np.ones(size, np.float32))
        for name, size in shapes.items()
    }
    save_file(tensors, folder.model / WEIGHTS_FILE, metadata={"format": "pt"})
    rows = [_row(rng, shape["vocab_size"], max_length) for _ in range(pairs)]
    folder.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # A prompt is framed by two special tokens, an answer is closed by one.
    return sum(2 * (len(row["prompt"].split()) + 2) + len((row["chosen"] + " " + row["rejected"]).split()) + 2
               for row in rows)  # fmt: skip


def _row(rng: np.random.Generator, vocabulary: int, max_length: int) -> dict[str, str]:
    """A pair of random words, prompt and answer together of at most `max_length` tokens."""
    row: dict[str, str] = {}
    room = max_length - 3  # the special tokens
    for name, (median, spread) in LENGTHS.items():
        drawn = round(median * max_length / CAP * float(np.exp(spread * rng.standard_normal())))
        length = max(1, min(drawn, room - 1 if name == "prompt" else room - len(row["prompt"].split())))
        row[name] = " ".join(f"w{word}" for word in rng.integers(0, vocabulary - len(SPECIAL), length))
    return row


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Words w0, w1, ... divided by spaces, and a template that frames turns by special tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIAL, *(f"w{number}" for number in range(vocabulary - len(SPECIAL))))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the process that started this one, too
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_side_process(measure: Callable[..., SideResult], arguments: list[str]) -> None:
    """One side as a program: a folder, a JSON object of settings, and the file for what it measured."""
    folder, settings, out = arguments
    found = measure(BenchFolder(Path(folder)), **json.loads(settings))
    Path(out).write_text(json.dumps(found._asdict()), encoding="utf-8")
