"""Answers and grades the questions of all benchmarks with one model, and reuses saved answers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pydantic

from thinkpo_jax.evaluation.benchmarks import BENCHMARKS, BenchmarkConfig, Benchmarks, Question, QuestionsByBenchmark
from thinkpo_jax.evaluation.results import GradedSample, QuestionResult, count_answers
from thinkpo_jax.inference.engine import Completion, Engine, Request, SamplingConfig
from thinkpo_jax.inference.engine_config import EngineConfig
from thinkpo_jax.inference.saved_answers import SavedAnswers
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.files import read_json_record, write_atomically
from thinkpo_jax.runtime.processes import broadcast_from_primary, is_primary_process

# Tokens of a server's answer are counted again from its text, which may give a few tokens less than were generated.
SERVER_COUNT_TOLERANCE = 0.05


class EvaluationConfig(EngineConfig):
    """Benchmarks, engine and sampling for every model of a run, and the pairs of models to compare.

    The models are the start model and each stage. A server answers for one model.
    """

    benchmarks: Benchmarks = pydantic.Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    compare: tuple[tuple[str, str], ...] = ()

    @pydantic.model_validator(mode="after")
    def _check_template_arguments(self) -> "EvaluationConfig":
        if self.server is not None and self.server.template_arguments:
            raise ValueError(
                "server.template_arguments: an evaluation sends `model.template_arguments`. Set those of the model"
            )
        return self


def evaluate_model(
    name: str,
    engine: Engine,
    source: ModelSource,
    config: EvaluationConfig,
    questions: QuestionsByBenchmark,
    *,
    compute: ComputeConfig,
    seed: int,
    folder: Path,
) -> dict[str, list[QuestionResult]]:
    """Returns the graded answers of a model by benchmark. `name` appears in the log.

    `folder` gets one JSON file for each benchmark. Saved answers of the same model, questions and settings are reused.
    Answers are saved as they arrive, so an interrupted evaluation resumes. An answer that failed counts as wrong, and a
    rerun asks for it again.
    """
    results: dict[str, list[QuestionResult]] = {}
    for benchmark in config.benchmarks:
        settings = _answer_settings(source, config, benchmark, questions[benchmark.name])
        settings |= {"seed": seed} | ({"dtype": compute.dtype} if config.engine == "local" else {})
        path = folder / f"{benchmark.name}.json"
        record = read_json_record(path, "settings", "items")
        is_complete = record is not None and record["settings"] == settings and not record.get("failed")
        if broadcast_from_primary(is_complete):
            results[benchmark.name] = read_answers(path)
            continue
        arriving_path, title = folder / f"{benchmark.name}.answers.jsonl", f"{name} on {benchmark.name}"
        requests = [
            Request(f"{question.id}/{sample}", question.messages, sample)
            for question in questions[benchmark.name]
            for sample in range(config.sampling.samples)
        ]
        saved = SavedAnswers(arriving_path, settings, on_mismatch="restart")
        completions = saved.complete(engine, requests, config.sampling, seed=seed, title=title)
        items = _grade(benchmark.name, questions[benchmark.name], [completions[each.key] for each in requests], config)
        counts = count_answers(items)
        if problems := counts.describe_problems():
            log_warning(f"{title}: {problems}.")
        record = {"settings": settings, "failed": counts.failed, "items": [asdict(item) for item in items]}
        write_atomically(path, json.dumps(record).encode())
        if is_primary_process() and not counts.failed:
            arriving_path.unlink(missing_ok=True)
        results[benchmark.name] = items
    return results


def _answer_settings(
    source: ModelSource, config: EvaluationConfig, benchmark: BenchmarkConfig, questions: Sequence[Question]
) -> dict[str, Any]:
    """Returns what determines the answers, except for the seed and the dtype of the local engine."""
    prompts = [source.tokenizer.encode_prompt(question.messages).ids for question in questions]
    settings = {
        "benchmark": benchmark.model_copy(update={"path": None}).model_dump(mode="json"),
        "sampling": config.sampling.model_dump(mode="json"),
        "engine": config.engine,
        "model": source.quick_fingerprint(),
        "questions": hashlib.sha256(repr(list(questions)).encode()).hexdigest()[:16],
        "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],  # with template and its arguments
    }
    if config.server is not None:  # its url and limits do not change the answers
        settings["served_model"] = config.server.model
        settings["thinking_tags"] = list(source.tokenizer.thinking.tags)
    return settings


def _grade(
    benchmark: str, questions: Sequence[Question], completions: Sequence[Completion], config: EvaluationConfig
) -> list[QuestionResult]:
    """Grades the completions, the same number for each question. Their lengths do not count the stop token."""
    limit = config.sampling.max_new_tokens * (1 - SERVER_COUNT_TOLERANCE if config.engine == "server" else 1)
    num_samples = config.sampling.samples
    references = [question.reference for question in questions for _ in range(num_samples)]
    grades = BENCHMARKS[benchmark].check([completion.text for completion in completions], references)
    samples = (_graded_sample(each, correct, limit) for each, correct in zip(completions, grades, strict=True))
    return [QuestionResult(question.id, tuple(islice(samples, num_samples))) for question in questions]


def _graded_sample(completion: Completion, is_correct: bool, limit: float) -> GradedSample:
    """Returns a sample. A truncated answer with fewer tokens than `limit` was cut by the context of the model."""
    if completion.error is not None:
        return GradedSample("", 0, correct=False, truncated=False, error=completion.error)
    tokens, is_truncated = completion.num_tokens, completion.finish_reason == "length"
    is_cut = is_truncated and 0 < tokens < limit  # a server may hide a thought that took all tokens
    return GradedSample(completion.text, tokens, is_correct, is_truncated, cut_by_context=is_cut)


def read_answers(path: Path) -> list[QuestionResult]:
    """Reads the saved answers to a benchmark. Raises `UserError` if there are none, or the file is damaged."""
    record = read_json_record(path, "items")
    if record is None:
        raise UserError(f"{path}: there are no saved answers. Evaluate the model first.")
    return [
        QuestionResult(item["question_id"], tuple(GradedSample(**sample) for sample in item["samples"]))
        for item in record["items"]
    ]
