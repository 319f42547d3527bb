"""Answers and grades the questions of all benchmarks with one model, and reuses saved answers."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pydantic

from thinkpo_jax.data.chat_template import THOUGHT_TAGS, has_unclosed_tag
from thinkpo_jax.evaluation.benchmarks import Benchmarks, FileName, Question, QuestionsByBenchmark, benchmark_spec
from thinkpo_jax.evaluation.grading import Grade
from thinkpo_jax.evaluation.protocols import ProtocolName, with_protocol_defaults
from thinkpo_jax.evaluation.results import GradedSample, QuestionResult, count_answers
from thinkpo_jax.inference.engine import Completion, Engine, Request, SamplingConfig
from thinkpo_jax.inference.engine_config import EngineConfig
from thinkpo_jax.inference.openai_engine import ServerConfig
from thinkpo_jax.inference.saved_answers import SavedAnswers, read_saved_answers
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.runtime.config import ConfigPath, UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.files import read_json_record, software_versions, write_json_record
from thinkpo_jax.runtime.processes import broadcast_from_primary

# Tokens of a server's answer are counted again from its text, which may give a few tokens less than were generated.
SERVER_COUNT_TOLERANCE = 0.05


class EvaluationConfig(EngineConfig):
    """Benchmarks, engine and sampling for every model of a run, and the pairs of models to compare.

    The models are the start model, each stage, and those of `against`: a name, and a run folder, a stage of a run
    (`runs/mine:sft`), a model folder, a Hub id or `server:MODEL@URL`. The protocol gives the sampling parameters that
    are not set. `system_prompt` is a text file, or a data set whose rows have the prompt.
    """

    protocol: ProtocolName = "modern"
    system_prompt: ConfigPath | None = None
    benchmarks: Benchmarks = pydantic.Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    against: dict[FileName, ConfigPath] = pydantic.Field(default_factory=dict)
    compare: tuple[tuple[str, str], ...] = ()

    _defaults = pydantic.model_validator(mode="before")(with_protocol_defaults)

    @pydantic.model_validator(mode="after")
    def _check_template_arguments(self) -> "EvaluationConfig":
        if self.server is not None and self.server.template_arguments:
            raise ValueError(
                "server.template_arguments: an evaluation sends `model.template_arguments`. Set those of the model"
            )
        return self


@dataclass(frozen=True)
class EvaluatedModel:
    """A model and its name in the report. With a `server` that answers, the source only gives the tokenizer."""

    name: str
    source: ModelSource
    server: ServerConfig | None = None


def evaluate_model(
    model: EvaluatedModel,
    engine: Engine,
    config: EvaluationConfig,
    questions: QuestionsByBenchmark,
    *,
    dtype: str,
    seed: int,
    folder: Path,
) -> dict[str, list[QuestionResult]]:
    """Returns the graded answers of a model by benchmark. `dtype` is that of the local engine.

    `folder` gets two files for each benchmark: the answers (`BENCHMARK.answers.jsonl`) and what the grader says of them
    (`BENCHMARK.json`). Answers are saved as they arrive, so an interrupted evaluation resumes. At the end they are
    sorted. Saved answers with the same settings are reused, also for more questions or samples. An answer that failed
    counts as wrong, and a rerun asks for it again.
    """
    return {
        benchmark.name: _evaluate_benchmark(
            model,
            engine,
            config=config,
            benchmark=benchmark.name,
            questions=questions[benchmark.name],
            dtype=dtype,
            seed=seed,
            folder=folder,
        )
        for benchmark in config.benchmarks
    }


def _evaluate_benchmark(
    model: EvaluatedModel,
    engine: Engine,
    *,
    config: EvaluationConfig,
    benchmark: str,
    questions: Sequence[Question],
    dtype: str,
    seed: int,
    folder: Path,
) -> list[QuestionResult]:
    answers_path, path = folder / f"{benchmark}.answers.jsonl", folder / f"{benchmark}.json"
    settings = answer_settings(model, config, questions[0]) | {"benchmark": benchmark, "seed": seed}
    settings |= {} if model.server else {"dtype": dtype}
    num_samples = config.sampling.samples
    keys = _keys(questions, num_samples)
    limits = [_server_limit(model, config, question) if model.server else None for question in questions]
    requests = [
        Request(key, questions[i // num_samples].messages, i % num_samples, limits[i // num_samples])
        for i, key in enumerate(keys)
    ]
    title = f"{model.name} on {benchmark}"
    saved = SavedAnswers(answers_path, settings, on_mismatch="restart")
    record_settings = settings | _grading_settings(questions, num_samples)
    record = _read_verdicts(path)
    is_complete = (
        record is not None
        and record["settings"] == record_settings
        and not record.get("failed")
        and saved.completions.keys() >= set(keys)
        and record.get("texts") == _digest_texts(saved.completions, keys)
    )
    if broadcast_from_primary(is_complete):
        return read_answers(path)
    completions = saved.complete(engine, requests, config.sampling, seed=seed, title=title)
    saved.sort(keys)
    return grade_answers(questions, completions, title=title, settings=record_settings, path=path)


def _read_verdicts(path: Path) -> dict[str, Any] | None:
    """Returns the record of a graded benchmark. None if there is none, or it is damaged. Then answers are graded."""
    try:
        return read_json_record(path, "settings", "items", remedy="The answers are graded again.")
    except UserError as error:
        log_warning(str(error))
        return None


def _server_limit(model: EvaluatedModel, config: EvaluationConfig, question: Question) -> int:
    """Returns how many tokens a server may generate. Servers refuse more than the context of the model has left."""
    source, limit = model.source, config.sampling.max_new_tokens
    room = source.architecture.max_positions - len(source.tokenizer.encode_prompt(question.messages).ids)
    return min(limit, room) if room > 0 else limit


def grade_answers(
    questions: Sequence[Question],
    completions: Mapping[str, Completion],
    *,
    title: str,
    settings: Mapping[str, Any],
    path: Path,
) -> list[QuestionResult]:
    """Grades the answers to a benchmark, logs what is wrong with them, and writes the verdicts to `path`.

    The key of a completion is the id of its question, `/` and the number of the sample. `settings` are those of the
    record in `path`.
    """
    keys = _keys(questions, settings["samples"])
    items = grade_completions(settings, questions, [completions[key] for key in keys])
    counts = count_answers(items)
    if problems := counts.describe_problems():
        log_warning(f"{title}: {problems}.")
    without_texts = [asdict(item) for item in items]
    for sample in (sample for item in without_texts for sample in item["samples"]):
        del sample["response"]  # it is in the file of the answers
    record = {"settings": settings, "failed": counts.failed, "items": without_texts}
    write_json_record(path, record | {"texts": _digest_texts(completions, keys)})
    return items


def regrade_answers(title: str, questions: Sequence[Question], path: Path) -> list[QuestionResult]:
    """Grades saved answers again, and writes the verdicts to `path`, the `BENCHMARK.json` of `evaluate_model`.

    An answer that is not saved failed, and stays so. Raises `UserError` if the answers are to other questions, or have
    other settings than the verdicts.
    """
    record = read_json_record(path, "settings", "items", remedy="Remove it, and run the evaluation again.")
    if record is None:
        raise UserError(f"{path}: there are no verdicts. Finish the evaluation first.")
    ids = [question.id for question in questions]
    if [item["question_id"] for item in record["items"]] != ids:
        raise UserError(f"{path}: the answers are to other questions than those of the configuration. Restore them.")
    completions = _read_completions(path, record)
    for item in record["items"]:
        for number, sample in enumerate(item["samples"]):
            if sample["error"] is not None:
                completions.setdefault(f"{item['question_id']}/{number}", Completion(error=sample["error"]))
    if missing := [key for key in _keys(questions, record["settings"]["samples"]) if key not in completions]:
        raise UserError(f"{path}: {len(missing)} answers are missing, such as {missing[0]}. Evaluate the model again.")
    settings = record["settings"] | _grading_settings(questions, record["settings"]["samples"])
    return grade_answers(questions, completions, title=title, settings=settings, path=path)


def _digest_texts(completions: Mapping[str, Completion], keys: Sequence[str]) -> str:
    """Returns a digest of the answers. One that is missing or failed counts as empty."""
    return _digest([completions.get(key, Completion()).text for key in keys])


def _read_completions(path: Path, record: Mapping[str, Any]) -> dict[str, Completion]:
    """Reads the answers beside `BENCHMARK.json`. Raises `UserError` if they have other settings than its record."""
    answers_path = path.with_suffix(".answers.jsonl")
    settings, completions = read_saved_answers(answers_path)
    if any(record["settings"].get(key) != value for key, value in settings.items()):
        raise UserError(f"{answers_path}: has other settings than {path.name}. Finish the evaluation first.")
    return completions


def answer_settings(model: EvaluatedModel, config: EvaluationConfig, question: Question) -> dict[str, Any]:
    """Returns what determines an answer besides the question and the sample.

    The seed, the benchmark and the dtype of the local engine are not in it.
    """
    tokenizer = model.source.tokenizer
    system = [message for message in question.messages if message["role"] == "system"]
    prompt = tokenizer.encode_prompt([*system, {"role": "user", "content": "?"}])
    settings = {
        "sampling": config.sampling.model_dump(mode="json", exclude={"samples"}),
        "engine": "local" if model.server is None else "server",
        "model": model.source.identity(),
        "system": system[0]["content"] if system else None,
        "template": _digest(prompt.ids),  # with its arguments
        "open_thought_tag": prompt.open_thought_tag,
        "thought_tags": [list(tags) for tags in dict.fromkeys((*tokenizer.thought_tags, *THOUGHT_TAGS))],
    }
    if model.server is not None:  # its url and limits do not change the answers
        settings["served_model"] = model.server.model
    return settings


def _keys(questions: Sequence[Question], num_samples: int) -> list[str]:
    return [f"{question.id}/{sample}" for question in questions for sample in range(num_samples)]


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _grading_settings(questions: Sequence[Question], num_samples: int) -> dict[str, Any]:
    """Returns what determines the verdicts besides the answers."""
    return {"questions": _digest(list(questions)), "samples": num_samples, "grader": software_versions()["thinkpo_jax"]}


def grade_completions(
    settings: Mapping[str, Any], questions: Sequence[Question], completions: Sequence[Completion]
) -> list[QuestionResult]:
    """Grades completions, `settings["samples"]` for each question. Their lengths do not count the stop token.

    A response is graded with the tag of the thought that its prompt opened. In a thought that never ends, nothing is an
    answer. Only the lenient grader looks there.
    """
    num_samples, tags = settings["samples"], [tuple(pair) for pair in settings["thought_tags"]]
    is_served = settings["engine"] == "server"
    limit = settings["sampling"]["max_new_tokens"] * (1 - SERVER_COUNT_TOLERANCE if is_served else 1)
    texts = [settings["open_thought_tag"] + completion.text for completion in completions]
    references = [question.reference for question in questions for _ in range(num_samples)]
    grades = benchmark_spec(settings["benchmark"]).grade(texts, references)

    def samples() -> Iterator[GradedSample]:
        for completion, grade, text in zip(completions, grades, texts, strict=True):
            yield _graded_sample(completion, grade, limit, unfinished_thought=has_unclosed_tag(text, tags))

    graded = samples()
    return [QuestionResult(each.id, tuple(islice(graded, num_samples)), each.group) for each in questions]


def _graded_sample(completion: Completion, grade: Grade, limit: float, *, unfinished_thought: bool) -> GradedSample:
    """Returns a sample. A truncated answer with fewer tokens than `limit` was cut by the context of the model."""
    if completion.error is not None:
        return GradedSample("", 0, correct=False, truncated=False, error=completion.error)
    is_truncated = completion.finish_reason == "length"
    return GradedSample(
        completion.text,
        completion.num_tokens,
        grade.correct and not unfinished_thought,
        is_truncated,
        None if unfinished_thought else grade.extracted,
        grade.lenient_correct,
        # A server may hide a thought that took all tokens.
        cut_by_context=is_truncated and 0 < completion.num_tokens < limit,
        unfinished_thought=unfinished_thought,
    )


def read_answers(path: Path) -> list[QuestionResult]:
    """Reads the graded answers to a benchmark from `BENCHMARK.json`, and their texts from the file beside it.

    Raises `UserError` if there are none, or a file is damaged.
    """
    record = read_json_record(path, "settings", "items")
    if record is None:
        raise UserError(f"{path}: there are no saved answers. Evaluate the model first.")
    completions = _read_completions(path, record)
    results: list[QuestionResult] = []
    for item in record["items"]:
        texts = [completions.get(f"{item['question_id']}/{i}", Completion()).text for i in range(len(item["samples"]))]
        samples = (GradedSample(text, **sample) for text, sample in zip(texts, item["samples"], strict=True))
        results.append(QuestionResult(item["question_id"], tuple(samples), item["group"]))
    return results
