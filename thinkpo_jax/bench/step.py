"""Compares a ThinkPO update of this package with one of TRL: useful tokens per second, and peak memory.

The sides take turns on the same pairs. Each is its own process (this file, run as a program). It trains in float32 on
all CPU cores, about two pairs per update, with reference log-probs computed before. Useful tokens are those of prompt +
chosen and prompt + rejected, without padding. TRL gets one pair at a time and accumulates two. Of the ways to give it
two pairs this pads least: it was the fastest and took the least memory (BENCHMARKS.md).
"""

import importlib.util
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from thinkpo_jax.bench import load
from thinkpo_jax.data.batches import BatchConfig, BatchPlan
from thinkpo_jax.data.examples import Example, Segment
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training import reference_log_probs, train_step
from thinkpo_jax.training.objectives import PreferenceConfig, make_thinkpo_objective
from thinkpo_jax.training.optimizer import OptimizerConfig, make_optimizer

END_ID = 1  # ends an answer
SHAPE: dict[str, Any] = load.SHAPE | {"architectures": ["LlamaForCausalLM"], "vocab_size": 49_152, "hidden_size": 512}
SHAPE |= {"num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408, "tie_word_embeddings": True}
SHAPE |= {"pad_token_id": 0, "eos_token_id": END_ID}
NAMES = ("prompt", "chosen", "rejected")
Pair = dict[str, list[int]]  # token ids by name
# Tokens of 522 real pairs with at most 2,048 tokens (README, "On real data"), in the order of NAMES.
REAL_MAX_LENGTH, REAL_MEDIANS, REAL_LOG_SPREADS = 2048, np.array([67, 1625, 427]), np.array([0.5, 0.5, 0.6])
BETA, LEARNING_RATE, SEED = 0.01, 1e-6, 0
REFERENCE_TOLERANCE = 1e-4  # relative, of log-probs: both sides read the same tokens with the same weights
LOSS_TOLERANCE = 1e-3  # from ln 2 before the first update: float32 sums of thousands of log-probs


class SideResult(NamedTuple):
    """What one side measured. Losses and log-probs are means over pairs."""

    tokens: int  # useful tokens of all pairs
    seconds: float  # of one epoch
    first_loss: float  # of the first update, which is not timed
    reference: Sequence[float]  # log-probs of chosen and rejected before training
    peak_memory: int  # largest resident memory, in bytes


def bench_step(shape: Mapping[str, Any], num_pairs: int, max_length: int, *, row_length: int, repeats: int) -> None:
    """Prints the speed and peak memory of both sides, and the medians of their ratios.

    Raises `UserError` if TRL is not installed, and `RunError` if a side fails or the sides did not do the same work.
    """
    if missing := [name for name in ("torch", "trl") if importlib.util.find_spec(name) is None]:
        raise UserError(f'{" and ".join(missing)} not installed. Run: pip install -e ".[test]"')
    ratios: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load.write_random_model(folder, {**shape, "max_position_embeddings": max_length}, "float32")
        tokens = _write_pairs(folder, shape["vocab_size"], num_pairs, max_length)
        print(f"{num_pairs} pairs up to {max_length:,} tokens long, {tokens:,} useful tokens; model: {dict(shape)}")
        for _ in range(repeats):
            ours, theirs = (_run_side(side, folder, row_length) for side in ("thinkpo_jax", "TRL"))
            check_same_work(tokens, ours, theirs)
            ratios.append((theirs.seconds / ours.seconds, ours.peak_memory / theirs.peak_memory))
    speed, memory = np.median(ratios, axis=0)
    print(f"median of {repeats} round(s): {speed:.2f} times TRL's useful tokens/s, {memory:.2f} times its peak memory")


def _write_pairs(folder: Path, vocab_size: int, num_pairs: int, max_length: int) -> int:
    """Writes pairs of random tokens that are as long as real ones. Returns the number of useful tokens."""
    rng = np.random.default_rng(SEED)
    factors = np.exp(REAL_LOG_SPREADS * rng.standard_normal((num_pairs, 3))) * max_length / REAL_MAX_LENGTH
    pairs: list[Pair] = []
    for prompt_length, *answer_lengths in (REAL_MEDIANS * factors).round().astype(int).clip(1).tolist():
        prompt = rng.integers(2, vocab_size, min(prompt_length, max_length - 2)).tolist()
        room = max_length - 1 - len(prompt)
        answers = [rng.integers(2, vocab_size, min(length, room)).tolist() for length in answer_lengths]
        pairs.append(dict(zip(NAMES, (prompt, *([*answer, END_ID] for answer in answers)), strict=True)))
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    return sum(len(pair[name]) for pair in pairs for name in ("prompt", *NAMES))


def _run_side(side: str, folder: Path, row_length: int) -> SideResult:
    """Runs one side in its own process, and prints what it measured. Raises `RunError` if it fails."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    variables = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    variables |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cores)}
    command = [sys.executable, "-m", "thinkpo_jax.bench.step", side, str(folder), str(row_length)]
    process = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RunError(f"{side} ended with exit status {process.returncode}:\n{process.stderr[-2000:]}")
    result = SideResult(**json.loads(process.stdout.splitlines()[-1]))
    speed, peak = result.tokens / result.seconds, result.peak_memory / GIB
    print(f"{side}: {speed:,.0f} useful tokens/s, peak {peak:.2f} GiB, first loss {result.first_loss:.4f}", flush=True)
    return result


def check_same_work(tokens: int, ours: SideResult, theirs: SideResult) -> None:
    """Raises `RunError` if the sides did not read the same tokens with the same weights."""
    if not ours.tokens == theirs.tokens == tokens:
        raise RunError(f"the pairs have {tokens} tokens, but the two sides read {ours.tokens} and {theirs.tokens}")
    if not np.allclose(ours.reference, theirs.reference, rtol=REFERENCE_TOLERANCE, atol=0):
        raise RunError(f"the log-probs of the sides before training differ: {ours.reference} and {theirs.reference}")
    if not np.allclose((ours.first_loss, theirs.first_loss), math.log(2), rtol=0, atol=LOSS_TOLERANCE):
        losses = f"{ours.first_loss:.6f} and {theirs.first_loss:.6f}"
        raise RunError(f"the losses before training are {losses}, but both must be ln 2 = {math.log(2):.6f}")


def measure_thinkpo_jax(folder: Path, pairs: Sequence[Pair], row_length: int) -> SideResult:
    """Trains with one packed row per update: one update that is not timed, then one epoch."""
    examples: list[Example] = [
        tuple(Segment(np.array(prompt + answer, np.int32), len(prompt)) for answer in answers)
        for prompt, *answers in map(dict.values, pairs)
    ]
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        config = BatchConfig(rows=1, row_length=row_length)
        batches = BatchPlan(examples, config, seed=SEED, num_shards=1, num_updates=None, epochs=1)
        model = load_model(folder, ComputeConfig(dtype="float32"), mesh)
        batches.reference_log_probs = reference_log_probs.compute_reference(model, batches, mesh)
        settings = OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_ratio=0.0)
        optimizer = make_optimizer(settings, len(batches))
        state = train_step.init_train_state(model, optimizer, mesh)
        del model
        objective = make_thinkpo_objective(PreferenceConfig(beta=BETA), end_of_turn_id=END_ID)
        update = train_step.make_train_step(objective, optimizer, mesh, state)
        losses, ends = [], []
        for index in (0, *range(len(batches))):
            state, metrics = update(state, put_batch(batches[index], mesh))
            losses.append(float(metrics["loss"]))
            ends.append(time.perf_counter())
    reference = batches.reference_log_probs.sum(axis=-1).mean(axis=0).tolist()
    tokens = sum(len(segment.token_ids) for example in examples for segment in example)
    return SideResult(tokens, ends[-1] - ends[0], losses[0], reference, _peak_memory())


def measure_trl(folder: Path, pairs: Sequence[Pair]) -> SideResult:
    """Trains the same pairs with TRL's DPOTrainer, with the settings that suit it best on a CPU.

    In TRL 1.16 the others have no effect on a CPU or are refused. `padding_free` is disabled: it warns and pads. The
    kernels of Liger and of the Hub need a GPU. Packing is for SFT only.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    trl: Any = importlib.import_module("trl")  # It exports lazily.
    step_ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_ends.append(time.perf_counter())

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    words = ["<pad>", "<end>", *(f"w{index}" for index in range(2, model.config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [{name: "".join(f" {words[index]}" for index in ids) for name, ids in pair.items()} for pair in pairs]
    settings: dict[str, Any] = {"output_dir": str(folder / "trl"), "num_train_epochs": 1, "beta": BETA, "bf16": False}
    settings |= {"max_length": None, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": False}
    settings |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 1, "logging_first_step": True}
    settings |= {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none"}
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings),
        train_dataset=Dataset.from_list(texts[:2] + texts),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"),
        callbacks=[Clock()],
    )
    trainer.train()
    epoch, first_loss = trainer.train_dataset[2:], trainer.state.log_history[0]["loss"]
    tokens = sum(len(ids) for name in ("prompt", *NAMES) for ids in epoch[f"{name}_ids"])
    reference = [float(np.mean(epoch[f"ref_{name}_logps"])) for name in NAMES[1:]]
    return SideResult(tokens, step_ends[-1] - step_ends[0], first_loss, reference, _peak_memory())


def _peak_memory() -> int:
    """Returns the largest resident memory of this process so far, in bytes."""
    if sys.platform == "linux":  # There getrusage also counts the parent process.
        return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    side, folder, row_length = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    pairs = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    result = measure_trl(folder, pairs) if side == "TRL" else measure_thinkpo_jax(folder, pairs, row_length)
    print(json.dumps(result._asdict()))
