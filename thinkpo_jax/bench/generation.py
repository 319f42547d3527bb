"""Measures the inference engine: answers of equal and of mixed lengths."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from thinkpo_jax.bench.machine import device_memory
from thinkpo_jax.bench.workload import write_model_config
from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.inference_model import InferenceModel, inference_mesh, prepare_inference_model
from thinkpo_jax.inference.scheduler import Answer
from thinkpo_jax.inference.token_generation import StopConditions, generate_tokens
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.weight_loading import init_model

PROMPT_LENGTH = 128
SAMPLING = SamplingConfig(temperature=0.6, top_p=0.95, max_new_tokens=2**20)
MIXED_ANSWERS, LOG_SPREAD, MEAN_SHARE = 256, 1.0, 0.1  # lognormal lengths with a mean of a tenth of the limit


def measure_generation(
    model: str, answers_at_once: Sequence[int], tokens_per_answer: int, folder: str
) -> Iterator[dict[str, Any]]:
    """Generates answers with random weights in bfloat16. Yields the results so far.

    First come answers of a fixed length, a row for each number of slots. The first call of each number compiles and is
    reported apart. Then come answers of mixed lengths. Tokens per second include prefill, but do not count prompts.
    `folder` gets the model's config.json.
    """
    arch = write_model_config(model, Path(folder))
    mesh = inference_mesh(arch, ComputeConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        weights = init_model(arch, ComputeConfig(), mesh, seed=0, dtype=ComputeConfig().dtype)
    engine = prepare_inference_model(weights, mesh, vocab_size=arch.vocab_size)
    del weights
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"model": model, "tokens_per_answer": tokens_per_answer, "rows": rows}
    for count in answers_at_once:
        lengths = np.full(count, tokens_per_answer)
        first, elapsed = (_generate(engine, lengths, num_slots=count, seed=seed) for seed in (0, 1))
        tokens = count * tokens_per_answer
        rows.append({"answers": count, "tokens_per_second": tokens / elapsed, "compile_seconds": first - elapsed,
                     "seconds": elapsed})  # fmt: skip
        yield result | device_memory()
    num_slots = max(answers_at_once[len(answers_at_once) // 2], 1)
    result["mixed"] = compare_batching(engine, num_slots=num_slots, limit=4 * tokens_per_answer, repeats=1)
    yield result | device_memory()


def _generate(
    engine: InferenceModel, lengths: np.ndarray, *, num_slots: int, seed: int, is_static: bool = False
) -> float:
    """Returns the seconds that answers of these lengths take. Static batches start together, as many as slots."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(2, engine.spec.vocab_size, (len(lengths), PROMPT_LENGTH)).tolist()
    answers = [
        Answer(str(i), prompt, (seed, i), int(length))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    size = num_slots if is_static else len(answers)
    start = time.perf_counter()
    for first in range(0, len(answers), size):
        batch = answers[first : first + size]
        for _ in generate_tokens(engine, batch, SAMPLING, num_slots=num_slots, stop=StopConditions()):
            pass
    assert [len(answer.generated) for answer in answers] == lengths.tolist()
    return time.perf_counter() - start


def compare_batching(engine: InferenceModel, *, num_slots: int, limit: int, repeats: int) -> dict[str, Any]:
    """Compares continuous with static batches of as many slots, on answers of lognormal lengths.

    As many answers as slots run before, so that the programs are compiled. Then the sides take turns.
    """
    draws = np.random.default_rng(0).standard_normal(MIXED_ANSWERS)
    median = limit * MEAN_SHARE / np.exp(LOG_SPREAD**2 / 2)
    lengths = (median * np.exp(LOG_SPREAD * draws)).round().astype(int).clip(1, limit)
    _generate(engine, lengths[:num_slots], num_slots=num_slots, seed=0)
    seconds: dict[str, list[float]] = {"continuous": [], "static": []}
    for _ in range(repeats):
        for name, times in seconds.items():
            is_static = name == "static"
            times.append(_generate(engine, lengths, num_slots=num_slots, seed=0, is_static=is_static))
    ratio = float(np.median(np.array(seconds["static"]) / np.array(seconds["continuous"])))
    return {"answers": len(lengths), "slots": num_slots, "limit": limit, "mean_tokens": float(lengths.mean()),
            "tokens": int(lengths.sum()), "seconds": seconds, "ratio": ratio}  # fmt: skip
