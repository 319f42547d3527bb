"""Answers and grades the questions of all benchmarks with one model, and reuses saved answers."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from thinkpo_jax.evaluation.benchmarks import BENCHMARKS, Question, QuestionsByBenchmark, questions_digest
from thinkpo_jax.evaluation.evaluation_config import EvaluationConfig
from thinkpo_jax.evaluation.results import GradedSample, QuestionResult
from thinkpo_jax.inference.engine import generate
from thinkpo_jax.inference.sampling import SamplingConfig
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import ProgressReporter
from thinkpo_jax.runtime.files import read_json_record, write_atomically
from thinkpo_jax.runtime.processes import broadcast_from_primary


def evaluate_model(
    name: str,
    source: ModelSource,
    config: EvaluationConfig,
    questions: QuestionsByBenchmark,
    *,
    compute: ComputeConfig,
    mesh: Mesh,
    seed: int,
    folder: Path,
) -> dict[str, list[QuestionResult]]:
    """Returns the graded answers of a model by benchmark. `name` is shown.

    The answers are saved in `folder`, one JSON file for each benchmark. Saved answers of the same model, questions and
    settings are reused. The model is loaded only if a benchmark needs it.
    """
    results: dict[str, list[QuestionResult]] = {}
    model: Transformer | None = None
    for benchmark in config.benchmarks:
        settings = {
            "benchmark": benchmark.model_dump(mode="json"),
            "sampling": config.sampling.model_dump(mode="json", exclude={"batch_size"}),
            "seed": seed,
            "dtype": compute.dtype,
            "model": source.quick_fingerprint(),
            "questions": questions_digest(questions[benchmark.name]),
        }
        path = folder / f"{benchmark.name}.json"
        record = read_json_record(path, "settings", "items")
        if broadcast_from_primary(record is not None and record["settings"] == settings):
            results[benchmark.name] = read_answers(path)
            continue
        model = model or source.load(compute, mesh)
        progress = ProgressReporter(
            f"{name} on {benchmark.name}", len(questions[benchmark.name]) * config.sampling.samples, unit="answer"
        )
        items = answer_questions(
            model,
            source,
            questions[benchmark.name],
            benchmark.name,
            sampling=config.sampling,
            mesh=mesh,
            seed=seed,
            progress=progress,
        )
        progress.close()
        record = {"settings": settings, "items": [dataclasses.asdict(item) for item in items]}
        write_atomically(path, json.dumps(record).encode())
        results[benchmark.name] = items
    return results


def answer_questions(
    model: Transformer,
    source: ModelSource,
    questions: Sequence[Question],
    benchmark: str,
    *,
    sampling: SamplingConfig,
    mesh: Mesh,
    seed: int,
    progress: ProgressReporter,
) -> list[QuestionResult]:
    """Returns the graded answers to questions. The length of a response does not count the token that ends it."""
    tokenizer, count = source.tokenizer, sampling.samples
    completions = generate(
        model,
        [tokenizer.encode_prompt(question.messages).ids for question in questions for _ in range(count)],
        sampling,
        stop_token_ids=tokenizer.stop_token_ids,
        vocab_size=len(tokenizer.tokenizer),
        seed=seed,
        mesh=mesh,
        on_progress=progress.update,
    )
    responses = [tokenizer.decode(completion.token_ids) for completion in completions]
    references = [question.reference for question in questions for _ in range(count)]
    samples = [
        GradedSample(response, len(completion.token_ids), is_correct, completion.finish_reason == "length")
        for response, completion, is_correct in zip(
            responses, completions, BENCHMARKS[benchmark].check(responses, references), strict=True
        )
    ]
    return [
        QuestionResult(question.id, tuple(samples[i * count : (i + 1) * count])) for i, question in enumerate(questions)
    ]


def read_answers(path: Path) -> list[QuestionResult]:
    """Reads the saved answers to a benchmark. Raises `UserError` if there are none, or the file is damaged."""
    record = read_json_record(path, "items")
    if record is None:
        raise UserError(f"{path}: there are no saved answers. Evaluate the model first.")
    return [_question_result(item) for item in record["items"]]


def _question_result(item: Mapping[str, Any]) -> QuestionResult:
    return QuestionResult(item["question_id"], tuple(GradedSample(**sample) for sample in item["samples"]))
