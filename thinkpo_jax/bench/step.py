"""Compares a ThinkPO update of this package with one of TRL on the CPU: useful tokens per second, and peak memory.

The sides take turns on the same pairs. Each is its own process. It trains in float32 on all CPU cores, about two pairs
per update, with reference log-probs computed before. Useful tokens are those of prompt + chosen and prompt + rejected,
without padding. The rate of plain matrix products is measured in the same process as our side.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from thinkpo_jax.bench import load
from thinkpo_jax.bench.child import run_in_child
from thinkpo_jax.bench.machine import matmul_rate, peak_resident_memory
from thinkpo_jax.bench.time_by_part import profile_updates
from thinkpo_jax.bench.trl import BETA, LEARNING_RATE, PAIRS_FILE, cache_variables, check_trl_installed, measure_trl
from thinkpo_jax.bench.updates import SEED, speed
from thinkpo_jax.bench.workload import END_ID, REAL_PAIRS, LengthDistribution, count_tokens, draw_pairs, to_examples
from thinkpo_jax.data.batches import BatchConfig, BatchPlan
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training import reference_log_probs, train_step
from thinkpo_jax.training.objectives import PreferenceConfig, make_thinkpo_objective
from thinkpo_jax.training.optimizer import OptimizerConfig, make_optimizer

SHAPE: dict[str, Any] = load.SHAPE | {"architectures": ["LlamaForCausalLM"], "vocab_size": 49_152, "hidden_size": 512}
SHAPE |= {"num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408, "tie_word_embeddings": True}
SHAPE |= {"pad_token_id": 0, "eos_token_id": END_ID}
PAIRS_PER_UPDATE = 2
REAL_MAX_LENGTH = 2048  # of the pairs that `REAL_PAIRS` describes
REFERENCE_TOLERANCE = 1e-4  # relative, of log-probs: both sides read the same tokens with the same weights
LOSS_TOLERANCE = 1e-3  # from ln 2 before the first update: float32 sums of thousands of log-probs


class SideResult(NamedTuple):
    """What one side measured. Losses and log-probs are means over pairs."""

    tokens: int  # useful tokens of all pairs
    seconds: float  # of one epoch
    first_loss: float  # of the first update, which is not timed
    reference: Sequence[float]  # log-probs of chosen and rejected before training
    peak_memory: int  # largest resident memory, in bytes


def bench_step(
    shape: Mapping[str, Any], num_pairs: int, max_length: int, *, row_length: int, repeats: int
) -> dict[str, Any]:
    """Prints the speed and peak memory of both sides, and returns them with the medians of their ratios.

    Raises `UserError` if TRL is not installed, and `RunError` if a side fails or the sides did not do the same work.
    """
    check_trl_installed()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load.write_random_model(folder, {**shape, "max_position_embeddings": max_length}, "float32")
        scale = max_length / REAL_MAX_LENGTH
        lengths = LengthDistribution([scale * n for n in REAL_PAIRS.medians], REAL_PAIRS.log_spreads, [max_length] * 3)
        options = {"max_length": max_length, "vocab_size": shape["vocab_size"], "seed": SEED}
        pairs = draw_pairs(lengths, num_pairs, **options)
        (folder / PAIRS_FILE).write_text(json.dumps(pairs), encoding="utf-8")
        tokens = count_tokens(pairs)
        print(f"{num_pairs} pairs up to {max_length:,} tokens long, {tokens:,} useful tokens; model: {dict(shape)}")
        for _ in range(repeats):
            rounds.append(_run_round(folder, tokens, row_length))
    names = ("speed_ratio", "memory_ratio", "matmul_share")
    medians = {name: float(np.median([each[name] for each in rounds])) for name in names}
    print(
        f"median of {repeats} round(s): {medians['speed_ratio']:.2f} times TRL's useful tokens/s, "
        f"{medians['memory_ratio']:.2f} times its peak memory, {medians['matmul_share']:.0%} of the rate of plain "
        "matrix products"
    )
    return {"tokens": tokens, "model": dict(shape), "rounds": rounds, **medians}


def _run_round(folder: Path, tokens: int, row_length: int) -> dict[str, Any]:
    """Runs both sides once, prints what they measured, and returns it with their ratios."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    variables = cache_variables(folder) | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cores)}
    child = {"folder": folder / "child", "environment": variables}
    measured = run_in_child(measure_thinkpo_jax, {"folder": str(folder), "row_length": row_length}, **child)
    ours = _print_side("thinkpo_jax", measured)
    settings = {"folder": str(folder), "pairs_per_update": PAIRS_PER_UPDATE, "is_on_cpu": True}
    trl = run_in_child(measure_trl, settings, **child)
    theirs = _print_side("TRL", trl)
    check_same_work(tokens, ours, theirs)
    matmul, step = (measured[name] / 1e9 for name in ("matmul_flops", "hardware_flops_per_second"))
    share = step / matmul
    print(f"plain matrix products {matmul:.0f} GFLOP/s, our updates {step:.0f} GFLOP/s ({share:.0%})", flush=True)
    shares = measured["profile"].get("shares", {})
    parts = ", ".join(f"{name} {part:.0%}" for name, part in shares.items())
    print(f"packing efficiency {measured['packing_efficiency']:.1%}; time by part: {parts}", flush=True)
    ratios = {"speed_ratio": theirs.seconds / ours.seconds, "memory_ratio": ours.peak_memory / theirs.peak_memory}
    return {"thinkpo_jax": measured, "trl": trl, **ratios, "matmul_share": share}


def _print_side(title: str, measured: Mapping[str, Any]) -> SideResult:
    side = SideResult(**{name: measured[name] for name in SideResult._fields})
    rate, peak = side.tokens / side.seconds, side.peak_memory / GIB
    print(f"{title}: {rate:,.0f} useful tokens/s, peak {peak:.2f} GiB, first loss {side.first_loss:.4f}", flush=True)
    return side


def check_same_work(tokens: int, ours: SideResult, theirs: SideResult) -> None:
    """Raises `RunError` if the sides did not read the same tokens with the same weights."""
    if not ours.tokens == theirs.tokens == tokens:
        raise RunError(f"the pairs have {tokens} tokens, but the two sides read {ours.tokens} and {theirs.tokens}")
    if not np.allclose(ours.reference, theirs.reference, rtol=REFERENCE_TOLERANCE, atol=0):
        raise RunError(f"the log-probs of the sides before training differ: {ours.reference} and {theirs.reference}")
    if not np.allclose((ours.first_loss, theirs.first_loss), math.log(2), rtol=0, atol=LOSS_TOLERANCE):
        losses = f"{ours.first_loss:.6f} and {theirs.first_loss:.6f}"
        raise RunError(f"the losses before training are {losses}, but both must be ln 2 = {math.log(2):.6f}")


def measure_thinkpo_jax(folder: str, row_length: int) -> dict[str, Any]:
    """Trains with one packed row per update: one update that is not timed, then one epoch.

    Returns the fields of `SideResult`, the rates of plain matrix products and of the updates in FLOP/s, the packing
    efficiency, and the shares of time by part.
    """
    examples = to_examples(json.loads((Path(folder) / PAIRS_FILE).read_text(encoding="utf-8")))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        config = BatchConfig(rows=1, row_length=row_length)
        batches = BatchPlan(examples, config, seed=SEED, num_shards=1, num_updates=None, epochs=1)
        compute = ComputeConfig(dtype="float32", remat="projections")  # recomputes no product with a weight matrix
        model = load_model(Path(folder), compute, mesh)
        arch = model.arch
        batches.reference_log_probs = reference_log_probs.compute_reference(model, batches, mesh)
        settings = OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_ratio=0.0)
        optimizer = make_optimizer(settings, len(batches))
        state = train_step.init_train_state(model, optimizer, mesh)
        del model
        objective = make_thinkpo_objective(PreferenceConfig(beta=BETA), end_of_turn_id=END_ID)
        function: Any = train_step.make_train_step(objective, optimizer, mesh, state)
        update = function.lower(state, put_batch(batches[0], mesh)).compile()
        losses, ends = [], []
        for index in (0, *range(len(batches))):
            state, metrics = update(state, put_batch(batches[index], mesh))
            losses.append(float(metrics["loss"]))
            ends.append(time.perf_counter())
        peak = peak_resident_memory()  # before the profile and the matrix products add to it
        profile = profile_updates(
            lambda: jax.block_until_ready(update(state, put_batch(batches[0], mesh))), update.as_text(), Path(folder)
        )
    tokens = sum(len(segment.token_ids) for example in examples for segment in example)
    reference = batches.reference_log_probs.sum(axis=-1).mean(axis=0).tolist()
    seconds = ends[-1] - ends[0]
    work = [batches.count_work(batches[index]) for index in range(len(batches))]
    result = SideResult(tokens, seconds, losses[0], reference, peak)._asdict()
    result |= {"matmul_flops": matmul_rate("float32"), "profile": profile}
    result["packing_efficiency"] = batches.packing_efficiency()
    return speed("thinkpo", arch, compute, work, seconds) | result
