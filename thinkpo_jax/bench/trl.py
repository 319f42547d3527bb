"""Measures updates of TRL's DPOTrainer on the pairs of a file, on a CPU in float32 or on a GPU in bfloat16.

TRL gets one pair at a time and accumulates. Of the ways to give it several pairs this pads least: on a CPU it was the
fastest and took the least memory (BENCHMARKS.md).
"""

import importlib
import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from thinkpo_jax.bench.machine import peak_resident_memory
from thinkpo_jax.bench.workload import NAMES, Pair, count_tokens
from thinkpo_jax.models.safetensors_files import WEIGHTS_FILE
from thinkpo_jax.runtime.config import RunError, UserError

PAIRS_FILE = "pairs.json"
BETA, LEARNING_RATE = 0.01, 1e-6  # of both sides
LOSS_TOLERANCE = 1e-2  # from ln 2 before the first update, also in bfloat16


def check_trl_installed() -> None:
    """Raises `UserError` if TRL or torch is not installed."""
    if missing := [name for name in ("torch", "trl") if importlib.util.find_spec(name) is None]:
        raise UserError(f'{" and ".join(missing)} not installed. Run: pip install -e ".[test]"')


def cache_variables(folder: Path) -> dict[str, str]:
    """Returns the environment with which TRL's process caches data in `folder`, and not in the home of the user."""
    return {"XDG_CACHE_HOME": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}


def measure_trl(
    folder: str, *, pairs_per_update: int, is_on_cpu: bool, use_liger: bool = False, seconds: float = float("inf")
) -> dict[str, Any]:
    """Trains the pairs of `folder` with the settings that suit TRL best, and returns what it measured.

    The model is that of `folder`, with random weights if it has none. The first update is not timed. Training ends
    after `seconds` seconds of timed updates. In TRL 1.16 further settings have no effect or are refused: `padding_free`
    is disabled and pads, packing is for SFT only, and Liger's loss excludes a precomputed reference. So `use_liger`
    only replaces the layers by Liger's kernels. Raises `UserError` if TRL, torch or a GPU is missing. Raises `RunError`
    if TRL read other tokens, or its first loss is not ln 2.
    """
    check_trl_installed()
    pairs: list[Pair] = json.loads((Path(folder) / PAIRS_FILE).read_text(encoding="utf-8"))
    import torch

    if not is_on_cpu and not torch.cuda.is_available():
        raise UserError("torch finds no GPU")
    if use_liger:
        _use_liger_kernels()
    ends: list[float] = []
    trainer = _make_trainer(Path(folder), pairs, pairs_per_update, is_on_cpu=is_on_cpu, clock=_clock(ends, seconds))
    trainer.train()
    log, timed = trainer.state.log_history, len(ends) - 1
    epoch = trainer.train_dataset[pairs_per_update : (timed + 1) * pairs_per_update]
    tokens = sum(len(ids) for name in ("prompt", *NAMES) for ids in epoch[f"{name}_ids"])
    if tokens != (expected := count_tokens(pairs[: timed * pairs_per_update])):
        raise RunError(f"TRL read {tokens} tokens, but its pairs have {expected}")
    if abs((loss := log[0]["loss"]) - math.log(2)) > LOSS_TOLERANCE:
        raise RunError(f"TRL's loss before training is {loss:.6f}, but must be ln 2")
    return {
        "tokens": tokens,
        "num_updates": timed,
        "seconds": ends[-1] - ends[0],
        "first_loss": loss,
        "reference": [float(np.mean(epoch[f"ref_{name}_logps"])) for name in NAMES[1:]],
        "peak_memory": peak_resident_memory() if is_on_cpu else torch.cuda.max_memory_allocated(),
        "versions": {name: importlib.import_module(name).__version__ for name in ("torch", "trl", "transformers")},
    }


def _clock(step_ends: list[float], seconds: float) -> Any:
    """Returns a callback that notes when each update ended, and ends training when the time is over."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            step_ends.append(time.perf_counter())
            if len(step_ends) > 1 and step_ends[-1] - step_ends[0] >= seconds:
                control = arguments[-1]
                control.should_training_stop = True

    return Clock()


def _make_trainer(folder: Path, pairs: list[Pair], pairs_per_update: int, *, is_on_cpu: bool, clock: Any) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM

    trl: Any = importlib.import_module("trl")  # It exports lazily.
    options = {"dtype": "float32", "attn_implementation": "sdpa"}  # float32 weights, and autocast on a GPU
    if (folder / WEIGHTS_FILE).exists():
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        with torch.device("cpu" if is_on_cpu else "cuda"):  # a GPU draws random weights much faster
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)
    words = ["<pad>", "<end>", *(f"w{index}" for index in range(2, model.config.vocab_size))]
    texts = [{name: "".join(f" {words[index]}" for index in ids) for name, ids in pair.items()} for pair in pairs]
    settings: dict[str, Any] = {"output_dir": str(folder / "trl"), "num_train_epochs": 1, "beta": BETA}
    settings |= {"max_length": None, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"}
    settings |= {"use_cpu": is_on_cpu, "bf16": not is_on_cpu}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": pairs_per_update}
    settings |= {"gradient_checkpointing": not is_on_cpu, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    settings |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 1, "logging_first_step": True}
    settings |= {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none"}
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings),
        train_dataset=Dataset.from_list(texts[:pairs_per_update] + texts),
        processing_class=_word_tokenizer(words),
        callbacks=[clock],
    )


def _word_tokenizer(words: list[str]) -> Any:
    """Returns a tokenizer whose token i is word i, because the trainer takes texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def _use_liger_kernels() -> None:
    """Replaces the layers of Qwen2 by Liger's kernels, but not its loss."""
    kernels: Any = importlib.import_module("liger_kernel.transformers")
    kernels.apply_liger_kernel_to_qwen2(cross_entropy=False, fused_linear_cross_entropy=False)
