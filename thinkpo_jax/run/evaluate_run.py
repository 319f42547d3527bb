"""Evaluates the models of a run, writes its report, and pools runs that differ in the seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.evaluation.analysis import analyze
from thinkpo_jax.evaluation.benchmarks import Question, QuestionsByBenchmark, load_questions
from thinkpo_jax.evaluation.evaluate_model import (
    EvaluatedModel,
    EvaluationConfig,
    evaluate_model,
    read_answers,
    regrade_answers,
)
from thinkpo_jax.evaluation.protocols import read_system_prompt, system_prompt_of_data
from thinkpo_jax.evaluation.report import terminal_summary, write_report
from thinkpo_jax.evaluation.results import QuestionResult, ReportContents, ResultsByModel, StageSummary
from thinkpo_jax.evaluation.statistics import compare_pooled_runs
from thinkpo_jax.inference.engine import Engine
from thinkpo_jax.inference.local_engine import LocalEngine
from thinkpo_jax.inference.openai_engine import ServerEngine
from thinkpo_jax.run.agreement import is_same_on_all_processes
from thinkpo_jax.run.resolve import ResolvedRun, finished_stages
from thinkpo_jax.run.run_config import PATH_KEYS, RunConfig, load_run_config
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.files import read_json_record, software_versions
from thinkpo_jax.runtime.paths import describe_missing
from thinkpo_jax.runtime.processes import is_primary_process


def load_all_questions(config: RunConfig, tokenizers: Mapping[str, ChatTokenizer]) -> QuestionsByBenchmark:
    """Returns the questions of every benchmark by its name. As a check, each model's tokenizer encodes each question.

    Raises `UserError` if questions or the system prompt cannot be read, a chat template cannot render a question, or
    the processes read different questions.
    """
    questions = _load_questions(config, config.evaluation) if config.evaluation else {}
    for model, tokenizer in tokenizers.items():
        for name, question_list in questions.items():
            for question in question_list:
                try:
                    tokenizer.encode_prompt(question.messages)
                except UserError as error:
                    raise UserError(f"model {model} on {name}: {error}") from None
    if not is_same_on_all_processes(repr(questions)):
        raise UserError("this process reads other questions than process 0. Give all processes the same files.")
    return questions


def _load_questions(config: RunConfig, evaluation: EvaluationConfig) -> dict[str, list[Question]]:
    system = _system_prompt(config, evaluation)
    return {each.name: load_questions(each, seed=config.seed, system=system) for each in evaluation.benchmarks}


def _system_prompt(config: RunConfig, evaluation: EvaluationConfig) -> str | None:
    """Returns the system prompt of all questions: that of `system_prompt`, or the pairs' with the paper's protocol."""
    if evaluation.system_prompt is not None:
        return read_system_prompt(evaluation.system_prompt, seed=config.seed)
    if evaluation.protocol == "modern" or all(each.system is not None for each in evaluation.benchmarks):
        return None
    if not config.stages:
        raise UserError(
            "evaluation.protocol: `paper` uses the system prompt of the training pairs. Set "
            "evaluation.system_prompt to a text file with it, or to the pairs (a file, a folder or a Hub id)."
        )
    last = next((each for each in reversed(config.stages) if each.objective == "thinkpo"), config.stages[-1])
    return system_prompt_of_data(last.data, seed=config.seed)


def evaluate_run(run: ResolvedRun, questions: QuestionsByBenchmark) -> None:
    """Evaluates the start model, the finished stages and `against`. Writes the report and prints its tables."""
    config, evaluation, folder = run.config, run.config.evaluation, run.folder
    results: dict[str, dict[str, list[QuestionResult]]] = {}
    prompts: dict[str, str] = {}
    if evaluation is not None:
        options = {"dtype": run.compute.dtype, "seed": config.seed}
        finished = finished_stages(run)
        own = [EvaluatedModel(name, run.source_of(name), evaluation.server) for name in (config.base_name, *finished)]
        for model in (*own, *run.against):
            engine, out = _make_engine(run, model, evaluation), folder.answers(model.name)
            results[model.name] = evaluate_model(model, engine, evaluation, questions, **options, folder=out)
            for name, (first, *_) in questions.items():
                prompt = model.source.tokenizer.encode_prompt(first.messages).text
                if prompt != prompts.setdefault(name, prompt):  # another chat template
                    prompts[f"{name}, {model.name}"] = prompt
    _write_report(config, folder, results, settings=_settings(run), questions=questions, prompts=prompts)


def _make_engine(run: ResolvedRun, model: EvaluatedModel, evaluation: EvaluationConfig) -> Engine:
    """Returns the engine that answers for a model. It loads weights when the first answer is needed, and keeps them."""
    if model.server is None:
        return LocalEngine(model.source, run.compute, evaluation.local)
    server = model.server.model_copy(update={"template_arguments": run.config.model.template_arguments})
    return ServerEngine(server, model.source.tokenizer.thinking, model.source.tokenizer)


def rescore_run(path: str) -> None:
    """Grades the saved answers of a run again, without its models, and writes the report.

    Raises `UserError` if there are no saved answers, or they do not answer the questions of the configuration.
    """
    folder = RunFolder.open(path, with_models=False)
    if not folder.config.is_file():
        raise UserError(f"--rescore {folder.config}: {describe_missing(folder.config)}. Give the folder of a run.")
    config, report = load_run_config(folder.config), read_json_record(folder.report, "settings", "prompts", "models")
    if config.evaluation is None or report is None:
        raise UserError(f"--rescore {path}: there is no report of an evaluation. Finish the evaluation first.")
    questions = _load_questions(config, config.evaluation)
    results: dict[str, dict[str, list[QuestionResult]]] = {}
    with folder.writing("--rescore"):
        for name, benchmarks in report["models"].items():
            for benchmark in benchmarks:
                file, question_list = folder.answers(name) / f"{benchmark}.json", questions.get(benchmark)
                if question_list is None:
                    raise UserError(f"{folder.config}: the benchmark {benchmark} of the report is not there. Add it.")
                graded = regrade_answers(f"{name} on {benchmark}", question_list, file)
                results.setdefault(name, {})[benchmark] = graded
        settings = report["settings"] | {"thinkpo_jax": software_versions()["thinkpo_jax"]}
        _write_report(config, folder, results, questions=questions, settings=settings, prompts=report["prompts"])


def _write_report(
    config: RunConfig,
    folder: RunFolder,
    results: ResultsByModel,
    *,
    questions: QuestionsByBenchmark,
    settings: Mapping[str, str],
    prompts: Mapping[str, str],
) -> None:
    """Writes the report and prints its tables. Without `compare`, each stage is compared with its start model."""
    by_start = tuple((config.initial_model_of(stage), stage.name) for stage in config.stages)
    comparisons = (config.evaluation.compare if config.evaluation else ()) or by_start
    contents = ReportContents(
        title=config.title,
        stages=tuple(_stage_summaries(config, folder)),
        results=results,
        comparisons=tuple(pair for pair in comparisons if set(pair) <= results.keys()),
        settings=settings,
        questions=questions,
        prompts=prompts,
    )
    if is_primary_process():
        analysis = analyze(contents)
        write_report(folder.path, contents, analysis)
        print(terminal_summary(config.title, analysis))
    log_info(f"report: {folder.path / 'report.md'}, plots: {folder.path / 'plots'}")


def _stage_summaries(config: RunConfig, folder: RunFolder) -> list[StageSummary]:
    summaries: list[StageSummary] = []
    for stage in config.stages:
        record, start = folder.read_stage_record(stage.name), config.initial_model_of(stage)
        if record is not None and (end := record.summary) is not None:
            result = (end["steps"], end["seconds"], tuple(end["notes"]))
            summaries.append(StageSummary(stage.name, stage.objective, start, *result))
    return summaries


def _settings(run: ResolvedRun) -> dict[str, str]:
    settings = {"start model": run.config.model.path, "seed": str(run.config.seed)}
    if run.config.evaluation is not None:
        evaluation = run.config.evaluation
        sampling, server = evaluation.sampling, evaluation.server
        filters = [f"top-p {sampling.top_p}"]
        filters += [] if sampling.top_k is None else [f"top-k {sampling.top_k}"]
        filters += [f"min-p {sampling.min_p}"] if sampling.min_p else []
        filters += [f"stop {list(sampling.stop)}"] if sampling.stop else []
        settings["sampling"] = (
            f"temperature {sampling.temperature}, {', '.join(filters)}, at most {sampling.max_new_tokens} "
            f"new tokens, {sampling.samples} sample(s) per question"
        )
        settings["engine"] = "local" if server is None else f"server, model {server.model}"
        settings["protocol"] = evaluation.protocol
        settings |= {f"model {name}": spec for name, spec in evaluation.against.items()}
    layout = {"compute dtype": run.config.compute.dtype, "mesh": str(dict(run.mesh.shape))}
    return settings | layout | software_versions()


def pool_runs(folders: Sequence[str]) -> str:
    """Returns the comparisons of several runs that differ in the seed, with their questions pooled, one per line.

    Raises `UserError` if the runs are not finished, differ in more than the seed, or have a seed in common.
    """
    if len(folders) < 2:
        raise UserError("--pool needs at least two runs, which differ in the seed.")
    runs = [RunFolder.open(folder, with_models=False) for folder in folders]
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
    if not lines:
        raise UserError(f"{runs[0].path}: the report compares no models, so there is nothing to pool.")
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
    paths = [run.answers(config.base_name) / f"{benchmark.name}.json" for benchmark in benchmarks]
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
