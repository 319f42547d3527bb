"""How fast is a ThinkPO update, and how much memory does it take, against TRL's? The two take turns on the same pairs.

Both train in float32 on all cores of the CPU, with log-probs of the reference that were computed before, and about two
pairs an update: ours packed into one row, TRL's in the best of the ways that it offers (bench_trl.py). Useful tokens
are those of prompt + chosen and prompt + rejected, padding left out.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from thinkpo_jax.bench import trl as bench_trl
from thinkpo_jax.bench.workload import (
    BETA,
    LEARNING_RATE,
    SEED,
    BenchFolder,
    SideResult,
    available_cores,
    peak_memory,
    run_side_process,
    write_folder,
)
from thinkpo_jax.data.batches import BatchConfig, BatchPlan
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.record_formats import PreferenceDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import PreferenceConfig, make_thinkpo_objective
from thinkpo_jax.training.optimizer import OptimizerConfig, make_optimizer
from thinkpo_jax.training.reference_log_probs import compute_reference
from thinkpo_jax.training.train_step import init_train_state, make_train_step

OURS = "thinkpo_jax"
REFERENCE_TOLERANCE = 1e-4  # of the log-probs, relative: both sides read the same tokens with the same weights
LOSS_TOLERANCE = 1e-3  # of ln 2 before the first update: log-probs of thousands of tokens are summed in float32
EPOCHS = 1  # that are timed


def measure(folder: BenchFolder, *, row_length: int, epochs: int) -> SideResult:
    """Trains one update that is not timed, then `epochs` epochs of one packed row an update."""
    chat, mesh = ChatTokenizer.from_folder(folder.model), make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    examples = tokenize_sources([PreferenceDataConfig(path=str(folder.pairs))], chat, row_length=row_length, seed=SEED)
    with jax.set_mesh(mesh):
        config = BatchConfig(rows=1, row_length=row_length)
        batches = BatchPlan(examples, config, seed=SEED, num_shards=1, num_updates=None, epochs=epochs)
        model = load_model(folder.model, ComputeConfig(dtype="float32"), mesh)
        loaded = peak_memory()
        objective = make_thinkpo_objective(PreferenceConfig(beta=BETA), end_of_turn_id=chat.end_of_turn_id)
        batches.reference_log_probs = compute_reference(model, batches, mesh)
        settings = OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_ratio=0.0)
        optimizer = make_optimizer(settings, len(batches))
        state = init_train_state(model, optimizer, mesh)
        del model
        step = make_train_step(objective, optimizer, mesh, state)
        state, first = step(state, put_batch(batches[0], mesh))
        told = [jax.device_get(first)]
        began = time.perf_counter()
        for batch in batches.prefetch_from(0):
            state, metrics = step(state, put_batch(batch, mesh))
            told.append(jax.device_get(metrics))
        seconds = time.perf_counter() - began
    weight = sum(float(line["weight"]) for line in told[1:])
    chosen, rejected = batches.reference_log_probs.sum(axis=-1).mean(axis=0).tolist()
    return SideResult(
        tokens=sum(len(segment.token_ids) for example in examples for segment in example),
        seconds=seconds,
        first_loss=float(told[0]["loss"]),
        mean_loss=sum(float(line["loss"]) * float(line["weight"]) for line in told[1:]) / weight,
        reference=(chosen, rejected),
        loaded=loaded,
        peak=peak_memory(),
    )


def bench_step(shape: Mapping[str, Any], *, pairs: int, max_length: int, row_length: int, repeats: int) -> None:
    """Prints both sides' useful tokens per second and peak memory, and the medians of the rounds' ratios.

    The first round runs every variant of TRL, the others the fastest of them. Raises `UserError` where TRL is missing,
    `RunError` where a side fails or the two did not do the same work.
    """
    if absent := bench_trl.missing():
        raise UserError(f'{" and ".join(absent)} not installed. Run: pip install -e ".[test]"')
    rounds: list[tuple[SideResult, SideResult]] = []
    best = ""
    with tempfile.TemporaryDirectory() as name:
        folder = BenchFolder(Path(name))
        tokens = write_folder(folder, shape, pairs=pairs, max_length=max_length)
        print(
            f"{pairs} pairs, prompt + answer up to {max_length:,} tokens, {tokens:,} useful tokens in all; "
            f"Llama's shape: {shape['hidden_size']} wide, {shape['num_hidden_layers']} layers, "
            f"vocabulary {shape['vocab_size']:,}; float32, {available_cores()} core(s)"
        )
        variants = dict(bench_trl.VARIANTS)
        for number in range(repeats):
            print(f"round {number + 1}", flush=True)
            ours = run_side(folder, "step", {"row_length": row_length}, OURS)
            theirs = {name: run_side(folder, "trl", given, f"TRL, {name}") for name, given in variants.items()}
            for measured in (ours, *theirs.values()):
                check_same_work(tokens, ours, measured)
            best = min(theirs, key=lambda name: theirs[name].seconds)
            variants = {best: variants[best]}
            rounds.append((ours, theirs[best]))
            print(f"  {_ratios(rounds[-1:])} of TRL, {best}", flush=True)
    print(f"median of {repeats} round(s): {_ratios(rounds)} of TRL, {best}")


def run_side(folder: BenchFolder, module: str, settings: Mapping[str, Any], title: str) -> SideResult:
    """Runs one side as a process of its own, and prints what it measured. Raises `RunError` where it fails."""
    out = folder.path / "measured.json"
    own = {"XDG_CACHE_HOME": str(folder.path / "cache"), "HF_DATASETS_CACHE": str(folder.path / "datasets")}
    own |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(available_cores())}
    arguments = [str(folder.path), json.dumps({**settings, "epochs": EPOCHS}), str(out)]
    command = [sys.executable, "-m", f"thinkpo_jax.bench.{module}", *arguments]
    ended = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode:
        raise RunError(f"{title} ended with status {ended.returncode}:\n{ended.stderr[-2000:]}")
    found = SideResult(**json.loads(out.read_text(encoding="utf-8")))
    print(
        f"  {title}: {EPOCHS * found.tokens / found.seconds:,.0f} useful tokens/s, peak {found.peak / 2**30:.2f} GiB "
        f"({found.loaded / 2**30:.2f} with the model loaded), loss {found.first_loss:.4f} before training, "
        f"{found.mean_loss:.4f} on average",
        flush=True,
    )
    return found


def check_same_work(tokens: int, ours: SideResult, theirs: SideResult) -> None:
    """Raises `RunError` where the two sides did not read the same tokens with the same weights."""
    if not ours.tokens == theirs.tokens == tokens:
        raise RunError(f"the pairs have {tokens} tokens, the two sides read {ours.tokens} and {theirs.tokens}")
    apart = [abs(our - their) / abs(their) for our, their in zip(ours.reference, theirs.reference, strict=True)]
    if not max(apart) <= REFERENCE_TOLERANCE:
        raise RunError(f"the two sides' log-probs before training differ: {ours.reference} and {theirs.reference}")
    for found in (ours, theirs):
        if not abs(found.first_loss - math.log(2)) <= LOSS_TOLERANCE:
            raise RunError(f"the loss before training is {found.first_loss:.6f}, not ln 2 = {math.log(2):.6f}")


def _ratios(rounds: Sequence[tuple[SideResult, SideResult]]) -> str:
    """How many times TRL's speed and memory ours are: medians over the rounds."""
    speed = statistics.median(theirs.seconds / ours.seconds for ours, theirs in rounds)
    memory = statistics.median(ours.peak / theirs.peak for ours, theirs in rounds)
    return f"{speed:.2f} times the useful tokens/s, {memory:.2f} times the peak memory"


if __name__ == "__main__":
    run_side_process(measure, sys.argv[1:])
