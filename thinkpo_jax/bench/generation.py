"""Measures how many tokens per second the sampler generates, by the number of answers at once."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from thinkpo_jax.bench.machine import device_memory
from thinkpo_jax.bench.workload import write_model_config
from thinkpo_jax.inference.engine import SamplingConfig, generate
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.weight_loading import init_model
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh

PROMPT_LENGTH = 128
TEMPERATURE, TOP_P = 0.6, 0.95


def measure_generation(
    model: str, answers_at_once: Sequence[int], tokens_per_answer: int, folder: str
) -> Iterator[dict[str, Any]]:
    """Generates answers of a fixed length with random weights in bfloat16. Yields the rows so far, one per number.

    The first call of each number compiles and is reported apart. Tokens per second include the prompt's pass, but not
    its tokens. `folder` gets the model's config.json.
    """
    arch = write_model_config(model, Path(folder))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    rng, rows = np.random.default_rng(0), []
    with jax.set_mesh(mesh):
        weights = init_model(arch, ComputeConfig(), mesh, seed=0)
        for count in answers_at_once:
            prompts = rng.integers(2, arch.vocab_size, (count, PROMPT_LENGTH)).tolist()
            config = SamplingConfig(
                temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=tokens_per_answer, batch_size=count
            )

            def run(seed: int, prompts: list = prompts, config: SamplingConfig = config) -> float:
                start = time.perf_counter()
                options = {"stop_token_ids": (), "vocab_size": arch.vocab_size, "seed": seed, "mesh": mesh}
                answers = generate(weights, prompts, config, **options)
                assert all(len(answer.token_ids) == tokens_per_answer for answer in answers)
                return time.perf_counter() - start

            first, elapsed = run(0), run(1)
            tokens = count * tokens_per_answer
            rows.append({"answers": count, "tokens_per_second": tokens / elapsed, "compile_seconds": first - elapsed,
                         "seconds": elapsed})  # fmt: skip
            yield {"model": model, "tokens_per_answer": tokens_per_answer, "rows": rows, **device_memory()}
