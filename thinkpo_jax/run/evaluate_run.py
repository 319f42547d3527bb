"""How good is a model, and is it really better than another one?

Example: python -m thinkpo_jax.evaluate --config configs/quickstart.yaml
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.evaluation.benchmarks import BENCHMARKS, Asked, Question, load_questions, questions_digest
from thinkpo_jax.evaluation.evaluation_config import EvaluationConfig
from thinkpo_jax.evaluation.report import terminal_summary, write_report
from thinkpo_jax.evaluation.results import GradedSample, QuestionResult, ReportContents, StageSummary
from thinkpo_jax.evaluation.statistics import compare_pooled_runs
from thinkpo_jax.inference.engine import generate
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.run.run_config import BASE_MODEL_NAME, RunConfig, load_run_config
from thinkpo_jax.run.run_folder import Run, read_json_record
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import ProgressReporter, log_info
from thinkpo_jax.runtime.files import software_versions, write_atomically
from thinkpo_jax.runtime.processes import broadcast_from_primary, is_primary_process

Results = dict[str, dict[str, list[QuestionResult]]]


def load_all_questions(config: RunConfig, chat: ChatTokenizer) -> Asked:
    """The questions of every benchmark of a run, each rendered once to see that it can be. Raises `UserError`."""
    benchmarks = config.evaluation.benchmarks if config.evaluation else ()
    asked = {benchmark.name: load_questions(benchmark, seed=config.seed) for benchmark in benchmarks}
    for question in itertools.chain.from_iterable(asked.values()):
        chat.encode_prompt(question.messages)
    return asked


def evaluate_run(run: Run, asked: Asked) -> None:
    """Evaluates the models of a run that are there, writes the report and prints its tables.

    Answers are kept in `evaluation/MODEL/BENCHMARK.json`; what was evaluated with the same settings is not run again.
    """
    results: Results = {}
    if run.config.evaluation is not None:
        for name in run.model_names():
            if name == BASE_MODEL_NAME or run.finished(name):
                results[name] = _evaluate_model(run, run.config.evaluation, asked, name)
    contents = ReportContents(
        title=run.config.title,
        stages=tuple(_stage_summaries(run)),
        results=results,
        comparisons=tuple(pair for pair in _comparisons(run) if set(pair) <= results.keys()),
        settings=_settings(run),
    )
    if is_primary_process():
        write_report(run.folder, contents)
        print(terminal_summary(contents))
    log_info(f"report: {run.folder / 'report.md'}, plots: {run.folder / 'plots'}")


def _comparisons(run: Run) -> tuple[tuple[str, str], ...]:
    """The comparisons that the configuration names; without any, each stage against the model that it started from."""
    named = run.config.evaluation.compare if run.config.evaluation else ()
    return named or tuple((run.initial_model_of(stage), stage.name) for stage in run.config.stages)


def _evaluate_model(run: Run, config: EvaluationConfig, asked: Asked, name: str) -> dict[str, list[QuestionResult]]:
    found: dict[str, list[QuestionResult]] = {}
    model: Transformer | None = None
    for benchmark in config.benchmarks:
        path = run.folder / "evaluation" / name / f"{benchmark.name}.json"
        settings = {
            "benchmark": benchmark.model_dump(mode="json"),
            "sampling": config.sampling.model_dump(mode="json", exclude={"batch_size"}),
            "seed": run.config.seed,
            "dtype": run.config.compute.dtype,
            "model": run.fingerprint(name),
            "questions": questions_digest(asked[benchmark.name]),
        }
        record = read_json_record(path, "settings", "items")
        current = record is not None and record["settings"] == settings
        if not broadcast_from_primary(np.array(current)):
            if model is None:
                model = run.load(name)
            items = answer_questions(run, model, asked[benchmark.name], benchmark=benchmark.name, name=name)
            record = {"settings": settings, "items": [dataclasses.asdict(item) for item in items]}
            write_atomically(path, json.dumps(record).encode())
        assert record is not None
        found[benchmark.name] = [_item(item) for item in record["items"]]
    return found


def _item(raw: Mapping[str, Any]) -> QuestionResult:
    return QuestionResult(raw["question_id"], tuple(GradedSample(**sample) for sample in raw["samples"]))


def answer_questions(
    run: Run, model: Transformer, asked: Sequence[Question], *, benchmark: str, name: str
) -> list[QuestionResult]:
    """The sampled answers of a model (`name` is shown), checked. The token that ends a response is not counted."""
    assert run.config.evaluation is not None
    sampling = run.config.evaluation.sampling
    count = sampling.samples
    prompts = [run.chat.encode_prompt(question.messages).ids for question in asked for _ in range(count)]
    progress = ProgressReporter(f"{name} on {benchmark}", len(prompts), unit="answer")
    generations = generate(
        model,
        prompts,
        sampling,
        stop_token_ids=run.chat.stop_token_ids,
        vocab_size=len(run.chat.tokenizer),
        seed=run.config.seed,
        mesh=run.mesh,
        on_progress=progress.update,
    )
    progress.close()
    responses = [run.chat.decode(generation.ids) for generation in generations]
    correct = BENCHMARKS[benchmark].check(responses, [question.reference for question in asked for _ in range(count)])
    samples = [
        GradedSample(response, len(generation.ids), right, not generation.finished)
        for response, generation, right in zip(responses, generations, correct, strict=True)
    ]
    return [QuestionResult(q.id, tuple(samples[i * count : (i + 1) * count])) for i, q in enumerate(asked)]


def _stage_summaries(run: Run) -> list[StageSummary]:
    found: list[StageSummary] = []
    for stage in run.config.stages:
        record = read_json_record(run.folder / stage.name / "stage.json", "summary")
        if record is not None and record["summary"] is not None:
            summary = record["summary"]
            start, notes = run.initial_model_of(stage), tuple(summary["notes"])
            found.append(StageSummary(stage.name, stage.objective, start, summary["steps"], summary["seconds"], notes))
    return found


def _settings(run: Run) -> dict[str, str]:
    settings = {"start model": run.config.model.path, "seed": str(run.config.seed)}
    if run.config.evaluation is not None:
        sampling = run.config.evaluation.sampling
        settings["sampling"] = (
            f"temperature {sampling.temperature}, top-p {sampling.top_p}, at most {sampling.max_new_tokens} "
            f"new tokens, {sampling.samples} sample(s) per question"
        )
    return settings | {
        "compute dtype": run.config.compute.dtype,
        "mesh": str(dict(run.mesh.shape)),
        **software_versions(),
    }


def pool_runs(folders: Sequence[Path]) -> str:
    """The comparisons of several runs (seeds) of one configuration, their questions pooled, as a table in words."""
    _check_pool(folders)
    lines: list[str] = []
    for row in _report(folders[0])["comparisons"]:
        pairs = [tuple(_read_items(folder, row[end], row["benchmark"]) for end in ("from", "to")) for folder in folders]
        try:
            found = compare_pooled_runs([(before, after) for before, after in pairs])
        except ValueError as error:
            raise UserError(f"{row['from']} -> {row['to']} on {row['benchmark']}: {error}") from None
        low, high = (100 * bound for bound in found.ci95)
        lines.append(
            f"{row['benchmark']}: {row['from']} -> {row['to']}, {len(folders)} runs, {found.num_questions} "
            f"paired questions: accuracy {100 * found.accuracy_difference:+.1f} points (95 % interval {low:+.1f} "
            f"to {high:+.1f}, p = {found.p_value:.2g}), response tokens {found.response_tokens_difference:+.1f}"
        )
    return "\n".join(lines)


def _check_pool(folders: Sequence[Path]) -> None:
    """Raises `UserError` unless the runs are of one configuration and of as many seeds as there are runs."""
    if missing := [folder for folder in folders if not (folder / "config.yaml").is_file()]:
        raise UserError(f"{missing[0]}: no config.yaml. Give the folders of finished runs.")
    configs = [load_run_config(folder / "config.yaml").model_dump(mode="json") for folder in folders]
    seeds: dict[int, Path] = {}
    for folder, config in zip(folders, configs, strict=True):
        if (seed := config.pop("seed")) in seeds:
            raise UserError(
                f"{seeds[seed]} and {folder} have the same seed, {seed}: their answers are no new evidence."
            )
        seeds[seed] = folder
        different = [key for key in config if key not in ("run_dir", "title") and config[key] != configs[0][key]]
        if different:
            raise UserError(
                f"{folder}: {', '.join(different)} differ from {folders[0]}. Pool runs of one configuration."
            )


def _report(folder: Path) -> dict[str, Any]:
    record = read_json_record(folder / "report.json", "comparisons")
    if record is None:
        raise UserError(f"{folder}: no report.json. Give the folders of finished runs.")
    return record


def _read_items(folder: Path, model: str, benchmark: str) -> list[QuestionResult]:
    record = read_json_record(folder / "evaluation" / model / f"{benchmark}.json", "items")
    if record is None:
        raise UserError(f"{folder}: model {model!r} was not evaluated on {benchmark}. Pool runs of one configuration.")
    return [_item(item) for item in record["items"]]
