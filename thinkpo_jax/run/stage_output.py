"""Connects a stage to its run: the inputs of its training, its record, its exported model and the model card."""

from collections.abc import Sequence

import yaml

from thinkpo_jax.models.weight_saving import save_model
from thinkpo_jax.run.resolve import ResolvedRun
from thinkpo_jax.run.run_folder import StageRecord
from thinkpo_jax.run.stage_data import StageData, check_data_unchanged
from thinkpo_jax.runtime.console import log_info, read_metrics
from thinkpo_jax.runtime.files import read_json_record, software_versions
from thinkpo_jax.runtime.processes import barrier
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.train_stage import StageInputs, StageResult


def begin_stage(run: ResolvedRun, stage: StageConfig, data: StageData) -> StageInputs:
    """Writes the record of a stage and returns the inputs of its training.

    Raises `UserError` if the stage was begun with other data.
    """
    check_data_unchanged(stage, data, run.folder)
    log_info(f"{stage.name}: starts from {run.config.initial_model_of(stage)}")
    run.folder.write_stage_record(stage.name, StageRecord(run.settings_of(stage), data.dataset.digest()))
    return StageInputs(
        config=stage,
        initial_model=run.initial_source_of(stage),
        compute=run.compute,
        mesh=run.mesh,
        dataset=data.dataset,
        held_out=data.held_out,
        folder=run.folder.stage(stage.name),
        seed=run.config.seed,
    )


def save_stage_output(run: ResolvedRun, inputs: StageInputs, result: StageResult) -> None:
    """Exports the model of a finished stage, and marks the stage as finished in its record."""
    stage = inputs.config
    save_model(
        result.state.model,
        inputs.folder.model,
        template_folder=run.model_source.folder,
        dtype="float32",
        stop_token_ids=run.model_source.tokenizer.stop_token_ids,
        model_card=model_card(run, stage, step=result.num_updates, notes=result.notes),
    )
    summary = {"steps": result.num_updates, "seconds": result.seconds, "notes": result.notes}
    record = StageRecord(run.settings_of(stage), inputs.dataset.digest(), summary)
    run.folder.write_stage_record(stage.name, record)
    barrier("the stage is finished")


def model_card(run: ResolvedRun, stage: StageConfig, *, step: int, notes: Sequence[str]) -> str:
    """Returns the README.md of an exported model: its start model, data, settings, metrics and scores.

    `notes` describe the data. The metrics are those of update `step`. The scores are those of the run's report, if it
    evaluated this model.
    """
    head = {
        "library_name": "transformers",
        "base_model": run.config.model.path,
        "tags": ["thinkpo_jax", stage.objective],
    }
    lines = [line for line in read_metrics(run.folder.stage(stage.name).metrics) if line["step"] == step]
    record = run.folder.read_stage_record(stage.name)
    is_final = record is not None and record.summary is not None and record.summary["steps"] == step
    report = read_json_record(run.folder.report, "models") if is_final else None
    scores = {
        benchmark: score
        for benchmark, score in (report["models"].get(stage.name, {}) if report else {}).items()
        if _is_score_of_current_model(run, stage.name, benchmark)
    }
    sections = {
        "Data": [*notes, f"digest of the tokenized data: {record.data_digest if record else None}"],
        f"Metrics of update {step}": [f"{key}: {value:.6g}" for line in lines for key, value in line.items()],
        "Evaluation of the float32 model": [
            f"{benchmark}: accuracy {100 * score['accuracy']:.1f} % (95 % interval {100 * score['ci95'][0]:.1f} to "
            f"{100 * score['ci95'][1]:.1f}, {score['num_questions']} questions), mean response "
            f"{score['mean_response_tokens']:.1f} tokens, {100 * score['truncation_rate']:.1f} % truncated"
            for benchmark, score in scores.items()
        ],
        "Made with": [f"{name}: {version}" for name, version in software_versions().items()],
    }
    settings = yaml.safe_dump(run.settings_of(stage), sort_keys=False, allow_unicode=True)
    body = "".join(
        f"\n## {title}\n\n" + "".join(f"- {line}\n" for line in lines) for title, lines in sections.items() if lines
    )
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {run.config.title}: {stage.name}\n\n"
        f"Trained with thinkpo_jax from `{run.config.model.path}`. This is stage `{stage.name}` ({stage.objective}), "
        f"which started from `{run.config.initial_model_of(stage)}`.\n\n## Settings\n\n```yaml\n{settings}```\n{body}"
    )


def _is_score_of_current_model(run: ResolvedRun, name: str, benchmark: str) -> bool:
    record = read_json_record(run.folder.answers(name) / f"{benchmark}.json", "settings")
    return record is not None and record["settings"]["model"] == run.source_of(name).quick_fingerprint()
