"""Evaluates the models of a run, writes its report, and pools runs that differ in the seed."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.evaluation.benchmarks import QuestionsByBenchmark, load_questions
from thinkpo_jax.evaluation.evaluate_model import EvaluationConfig, evaluate_model, read_answers
from thinkpo_jax.evaluation.report import terminal_summary, write_report
from thinkpo_jax.evaluation.results import QuestionResult, ReportContents, StageSummary
from thinkpo_jax.evaluation.statistics import compare_pooled_runs
from thinkpo_jax.inference.engine import Engine
from thinkpo_jax.inference.local_engine import LocalEngine
from thinkpo_jax.inference.openai_engine import ServerEngine
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.run.resolve import ResolvedRun, is_stage_finished
from thinkpo_jax.run.run_config import BASE_MODEL_NAME, PATH_KEYS, RunConfig, load_run_config
from thinkpo_jax.run.run_folder import RunFolder, is_same_on_all_processes
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.files import read_json_record, software_versions
from thinkpo_jax.runtime.paths import describe_missing
from thinkpo_jax.runtime.processes import is_primary_process


def load_all_questions(config: EvaluationConfig | None, tokenizer: ChatTokenizer, *, seed: int) -> QuestionsByBenchmark:
    """Returns the questions of every benchmark by its name. Each question is rendered once as a check.

    Raises `UserError` if questions cannot be read, or the chat template cannot render one.
    """
    benchmarks = config.benchmarks if config else ()
    questions = {benchmark.name: load_questions(benchmark, seed=seed) for benchmark in benchmarks}
    for question in itertools.chain.from_iterable(questions.values()):
        tokenizer.encode_prompt(question.messages)
    return questions


def evaluate_run(run: ResolvedRun, questions: QuestionsByBenchmark) -> None:
    """Evaluates the start model and the finished stages, writes the report and prints its tables."""
    config, evaluation, folder = run.config, run.config.evaluation, run.folder
    results: dict[str, dict[str, list[QuestionResult]]] = {}
    if evaluation is not None:
        if not is_same_on_all_processes(repr(questions)):
            raise UserError("this process reads other questions than process 0. Give all processes the same files.")
        finished = [stage.name for stage in config.stages if is_stage_finished(run, stage)]
        for name in (BASE_MODEL_NAME, *finished):
            source, out = run.source_of(name), folder.answers(name)
            options = {"compute": run.compute, "seed": config.seed, "folder": out}
            engine = _make_engine(run, source, evaluation)
            results[name] = evaluate_model(name, engine, source, evaluation, questions, **options)
    # Without `compare`, each stage is compared with the model that it started from.
    by_start = tuple((config.initial_model_of(stage), stage.name) for stage in config.stages)
    comparisons = (evaluation.compare if evaluation else ()) or by_start
    contents = ReportContents(
        title=config.title,
        stages=tuple(_stage_summaries(run)),
        results=results,
        comparisons=tuple(pair for pair in comparisons if set(pair) <= results.keys()),
        settings=_settings(run),
    )
    if is_primary_process():
        write_report(folder.path, contents)
        print(terminal_summary(contents))
    log_info(f"report: {folder.path / 'report.md'}, plots: {folder.path / 'plots'}")


def _make_engine(run: ResolvedRun, source: ModelSource, evaluation: EvaluationConfig) -> Engine:
    """Returns the engine that answers for a model. It loads the model when the first answer is needed."""
    if evaluation.server is None:
        return LocalEngine(source, run.compute, evaluation.local)
    server = evaluation.server.model_copy(update={"template_arguments": run.config.model.template_arguments})
    return ServerEngine(server, source.tokenizer.thinking, source.tokenizer)


def _stage_summaries(run: ResolvedRun) -> list[StageSummary]:
    summaries: list[StageSummary] = []
    for stage in run.config.stages:
        record, start = run.folder.read_stage_record(stage.name), run.config.initial_model_of(stage)
        if record is not None and (end := record.summary) is not None:
            result = (end["steps"], end["seconds"], tuple(end["notes"]))
            summaries.append(StageSummary(stage.name, stage.objective, start, *result))
    return summaries


def _settings(run: ResolvedRun) -> dict[str, str]:
    settings = {"start model": run.config.model.path, "seed": str(run.config.seed)}
    if run.config.evaluation is not None:
        sampling, server = run.config.evaluation.sampling, run.config.evaluation.server
        filters = [f"top-p {sampling.top_p}"]
        filters += [] if sampling.top_k is None else [f"top-k {sampling.top_k}"]
        filters += [f"min-p {sampling.min_p}"] if sampling.min_p else []
        filters += [f"stop {list(sampling.stop)}"] if sampling.stop else []
        settings["sampling"] = (
            f"temperature {sampling.temperature}, {', '.join(filters)}, at most {sampling.max_new_tokens} "
            f"new tokens, {sampling.samples} sample(s) per question"
        )
        settings["engine"] = "local" if server is None else f"server, model {server.model}"
    layout = {"compute dtype": run.config.compute.dtype, "mesh": str(dict(run.mesh.shape))}
    return settings | layout | software_versions()


def pool_runs(folders: Sequence[Path]) -> str:
    """Returns the comparisons of several runs that differ in the seed, with their questions pooled, one per line.

    Raises `UserError` if the runs are not finished, differ in more than the seed, or have a seed in common.
    """
    runs = [RunFolder(folder) for folder in folders]
    _check_runs_can_be_pooled(runs)
    lines: list[str] = []
    report = read_json_record(runs[0].report, "comparisons")
    if report is None:
        raise UserError(f"{runs[0].path}: no report.json. Give the folders of finished runs.")
    for row in report["comparisons"]:
        start, end, benchmark = row["from"], row["to"], row["benchmark"]
        pairs = [(_read_answers(run, start, benchmark), _read_answers(run, end, benchmark)) for run in runs]
        try:
            pooled = compare_pooled_runs(pairs)
        except ValueError as error:
            raise UserError(f"{start} -> {end} on {benchmark}: {error}") from None
        low, high = (100 * bound for bound in pooled.ci95)
        lines.append(
            f"{benchmark}: {start} -> {end}, {len(runs)} runs, {pooled.num_questions} "
            f"paired questions: accuracy {100 * pooled.accuracy_difference:+.1f} points (95 % interval {low:+.1f} "
            f"to {high:+.1f}, p = {pooled.p_value:.2g}), response tokens {pooled.response_tokens_difference:+.1f}"
        )
    return "\n".join(lines)


def _check_runs_can_be_pooled(runs: Sequence[RunFolder]) -> None:
    for run in runs:
        if not run.config.is_file():
            raise UserError(f"--pool {run.config}: {describe_missing(run.config)}. Give the folders of finished runs.")
    configs = [load_run_config(run.config) for run in runs]
    path_by_seed: dict[int, Path] = {}
    for run, config in zip(runs, configs, strict=True):
        if (seed := config.seed) in path_by_seed:
            raise UserError(
                f"{path_by_seed[seed]} and {run.path} have the same seed, {seed}. Their answers are no new evidence. "
                "Give runs with different seeds."
            )
        path_by_seed[seed] = run.path
        settings, first_settings = (
            each.model_dump(exclude={"run_dir", "title", "seed"}) for each in (config, configs[0])
        )
        contents, first_contents = _contents(run, config), _contents(runs[0], configs[0])
        different = [
            key
            for key in settings
            if settings[key] != first_settings[key] and contents[key] != first_contents[key]  # only a path differs
        ]
        if different:
            problem = f"{run.path}: {', '.join(different)} differ from {runs[0].path}."
            raise UserError(f"{problem} Pool runs of one configuration.")


def _contents(run: RunFolder, config: RunConfig) -> dict[str, object]:
    """Returns the configuration of a run with the digests of its model, data and questions instead of their paths."""
    benchmarks = config.evaluation.benchmarks if config.evaluation else ()
    paths = [run.answers(BASE_MODEL_NAME) / f"{benchmark.name}.json" for benchmark in benchmarks]
    answers = [record["settings"] for path in paths if (record := read_json_record(path, "settings"))]
    records = [run.read_stage_record(stage.name) for stage in config.stages]
    digests = {
        "model": [settings.get("model") for settings in answers],
        "stages": [record and record.data_digest for record in records],
        "evaluation": [settings.get("questions") for settings in answers],
    }
    return {key: (value, digests.get(key)) for key, value in config.model_dump(exclude=PATH_KEYS).items()}


def _read_answers(run: RunFolder, model: str, benchmark: str) -> list[QuestionResult]:
    path = run.answers(model) / f"{benchmark}.json"
    if not path.exists():
        problem = f"{run.path}: model {model!r} was not evaluated on {benchmark}."
        raise UserError(f"{problem} Pool runs of one configuration.")
    return read_answers(path)
