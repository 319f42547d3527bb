"""Writes what a run keeps of its stages: their records, their exported models and the model cards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml

from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.models.weight_saving import save_model
from thinkpo_jax.run.resolve import ResolvedRun, find_stage_damage, is_stage_finished
from thinkpo_jax.run.run_folder import StageRecord
from thinkpo_jax.run.stage_data import check_data_unchanged
from thinkpo_jax.runtime.bucket_files import reaching_bucket
from thinkpo_jax.runtime.config import UserError, did_you_mean
from thinkpo_jax.runtime.console import log_info, log_warning, read_metrics
from thinkpo_jax.runtime.files import free_name, read_json_record, software_versions
from thinkpo_jax.runtime.paths import AnyPath
from thinkpo_jax.runtime.processes import barrier, is_primary_process
from thinkpo_jax.runtime.sharding import abstract_with_shardings
from thinkpo_jax.training.checkpoints import CheckpointStore
from thinkpo_jax.training.stage_config import StageConfig
from thinkpo_jax.training.train_stage import StageInputs, StageResult


def begin_stage(run: ResolvedRun, inputs: StageInputs) -> None:
    """Writes the record of a stage. Raises `UserError` if the stage was begun with other data.

    If the stage was finished, its model is missing or damaged. Then its files are set aside, and training writes them
    again from the last checkpoint.
    """
    stage = inputs.config
    check_data_unchanged(run, inputs.config, inputs.dataset)
    if is_primary_process() and (damage := find_stage_damage(run, stage)):
        _set_model_aside(inputs.folder.model, damage)
        if run.folder.bucket is not None:
            run.folder.bucket.remove(inputs.folder.model)
    barrier("a damaged model has another name")
    initial = run.config.initial_model_of(stage)
    log_info(f"{stage.name}: starts from {initial}")
    record = run.folder.read_stage_record(initial)  # None for the start model of the run
    for divergence in ((record and record.summary) or {}).get("divergences", ()):
        log_warning(f"stage {stage.name} starts from the model of stage {initial}, but there {divergence}.")
    run.folder.write_stage_record(stage.name, StageRecord(run.settings_of(stage), inputs.dataset.digest()))


def _set_model_aside(folder: Path, damage: str) -> None:
    """Gives a damaged model another name, and logs why."""
    moved = ""
    if folder.exists():
        target = free_name(folder.with_name(f"{folder.name}.damaged"))
        moved = f" Its files are now in {folder.rename(target).name}."
    log_warning(f"{folder}: damaged: {damage}.{moved} The model is exported again from the last good checkpoint.")


def save_stage_output(run: ResolvedRun, inputs: StageInputs, result: StageResult) -> None:
    """Exports the model of a finished stage, and marks the stage as finished in its record."""
    stage, notes = inputs.config, result.notes
    card = _model_card(run, stage, step=result.num_updates, notes=notes)
    _save_model(run, result.state.model, inputs.folder.model, dtype="float32", card=card)
    identity = run.source_of(stage.name).identity() if is_primary_process() else None  # which writes the record
    summary = {"steps": result.num_updates, "seconds": result.seconds, "notes": notes, "model": identity}
    summary |= {"divergences": result.divergences}
    run.folder.write_stage_record(stage.name, StageRecord(run.settings_of(stage), inputs.dataset.digest(), summary))
    barrier("the stage is finished")
    run.folder.share()


def export_checkpoint(
    run: ResolvedRun, name: str | None, *, step: int | None, out: Path, dtype: Literal["float32", "bfloat16"]
) -> None:
    """Writes a checkpoint of a stage to `out`.

    `name` is the stage, by default the last one with a checkpoint. `step` is the update, by default the latest. Raises
    `UserError` if there is no such checkpoint, or `out` cannot be written.
    """
    names = [stage.name for stage in run.config.stages]
    with_checkpoint = [each for each in names if _has_checkpoint(run.folder.stage(each).checkpoints)]
    if not with_checkpoint:
        raise UserError(f"{run.folder.path}: no stage has a checkpoint yet.")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already. Choose another folder with --out.")
    name = name or with_checkpoint[-1]
    if name not in names:
        raise UserError(
            f"{run.folder.path}: there is no stage {name!r}{did_you_mean(name, names)}. The run has the stages {names}."
        )
    stage, folder = run.config.stages[names.index(name)], run.folder.stage(name).checkpoints
    if not folder.is_dir():
        raise UserError(f"{run.folder.path}: stage {name!r} has no checkpoints. These stages have: {with_checkpoint}.")
    is_stage_finished(run, stage)  # raises if the files at model.path are not those that the stage started from
    abstract = abstract_with_shardings(abstract_model(run.model_source.architecture, run.config.compute), run.mesh)
    with CheckpointStore(folder, read_only=True) as checkpoints:
        step = (checkpoints.latest_step() or 0) if step is None else step
        model = checkpoints.restore_model(abstract, step)
    record = run.folder.read_stage_record(name)
    notes = record.summary["notes"] if record and record.summary else ["the stage is not finished"]
    card = _model_card(run, stage, step=step, notes=notes)
    try:
        _save_model(run, model, out, dtype=dtype, card=card)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}. Choose another folder.") from None
    log_info(f"{out}: stage {name}, update {step}, {dtype}")


def _has_checkpoint(folder: AnyPath) -> bool:
    with reaching_bucket(folder):
        if not folder.is_dir():
            return False
    with CheckpointStore(folder, read_only=True) as checkpoints:
        return bool(checkpoints.steps())


def _save_model(
    run: ResolvedRun, model: Transformer, out: Path, *, dtype: Literal["float32", "bfloat16"], card: str
) -> None:
    source = run.model_source
    stop_ids = source.tokenizer.stop_token_ids
    save_model(model, out, template_folder=source.folder, dtype=dtype, stop_token_ids=stop_ids, model_card=card)


def _model_card(run: ResolvedRun, stage: StageConfig, *, step: int, notes: Sequence[str]) -> str:
    """Returns the README.md of an exported model: its start model, data, settings, metrics and scores.

    `notes` describe the data. The metrics are those of update `step`. The scores are those of the run's report, if it
    evaluated this model.
    """
    tags = ["thinkpo_jax", stage.objective]
    head = {"library_name": "transformers", "base_model": run.config.model.path, "tags": tags}
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
    settings = {key: value for key, value in run.settings_of(stage).items() if key != "data_state"}
    settings = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
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
    return record is not None and record["settings"]["model"] == run.identity_of(name)
