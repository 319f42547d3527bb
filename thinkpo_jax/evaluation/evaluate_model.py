"""Answers and grades the questions of all benchmarks with one model, and reuses saved answers."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import pydantic
from jax.sharding import Mesh

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.evaluation.benchmarks import BENCHMARKS, Benchmarks, Question, QuestionsByBenchmark
from thinkpo_jax.evaluation.results import GradedSample, QuestionResult
from thinkpo_jax.inference.engine import Completion, SamplingConfig, generate
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import ConfigSection, UserError
from thinkpo_jax.runtime.console import ProgressReporter
from thinkpo_jax.runtime.files import read_json_record, write_atomically
from thinkpo_jax.runtime.processes import broadcast_from_primary


class EvaluationConfig(ConfigSection):
    """Benchmarks and sampling for every model of a run (the start model and each stage), and the pairs to compare."""

    benchmarks: Benchmarks = pydantic.Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    compare: tuple[tuple[str, str], ...] = ()


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
    tokenizer, sampling = source.tokenizer, config.sampling
    for benchmark in config.benchmarks:
        benchmark_questions = questions[benchmark.name]
        prompts = [tokenizer.encode_prompt(question.messages).ids for question in benchmark_questions]
        settings = {
            "benchmark": benchmark.model_copy(update={"path": None}).model_dump(mode="json"),
            "sampling": sampling.model_dump(mode="json", exclude={"batch_size"}),
            "seed": seed,
            "dtype": compute.dtype,
            "model": source.quick_fingerprint(),
            "questions": hashlib.sha256(repr(list(benchmark_questions)).encode()).hexdigest()[:16],
            "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],  # with template and its arguments
        }
        path = folder / f"{benchmark.name}.json"
        record = read_json_record(path, "settings", "items")
        if broadcast_from_primary(record is not None and record["settings"] == settings):
            results[benchmark.name] = read_answers(path)
            continue
        model = model or source.load(compute, mesh)
        repeated = [prompt for prompt in prompts for _ in range(sampling.samples)]
        with closing(ProgressReporter(f"{name} on {benchmark.name}", len(repeated), unit="answer")) as progress:
            completions = generate(
                model,
                repeated,
                sampling,
                stop_token_ids=tokenizer.stop_token_ids,
                vocab_size=tokenizer.vocab_size,
                seed=seed,
                mesh=mesh,
                on_progress=progress.update,
            )
        items = _grade(benchmark.name, benchmark_questions, completions, tokenizer)
        record = {"settings": settings, "items": [dataclasses.asdict(item) for item in items]}
        write_atomically(path, json.dumps(record).encode())
        results[benchmark.name] = items
    return results


def _grade(
    benchmark: str, questions: Sequence[Question], completions: Sequence[Completion], tokenizer: ChatTokenizer
) -> list[QuestionResult]:
    """Grades the completions, the same number for each question. Their lengths do not count the stop token."""
    num_samples = len(completions) // max(1, len(questions))
    responses = [tokenizer.decode(completion.token_ids) for completion in completions]
    references = [question.reference for question in questions for _ in range(num_samples)]
    grades = BENCHMARKS[benchmark].check(responses, references)
    samples = (
        GradedSample(response, len(completion.token_ids), is_correct, completion.finish_reason == "length")
        for response, completion, is_correct in zip(responses, completions, grades, strict=True)
    )
    return [QuestionResult(question.id, tuple(islice(samples, num_samples))) for question in questions]


def read_answers(path: Path) -> list[QuestionResult]:
    """Reads the saved answers to a benchmark. Raises `UserError` if there are none, or the file is damaged."""
    record = read_json_record(path, "items")
    if record is None:
        raise UserError(f"{path}: there are no saved answers. Evaluate the model first.")
    return [
        QuestionResult(item["question_id"], tuple(GradedSample(**sample) for sample in item["samples"]))
        for item in record["items"]
    ]
