"""Exports a finished stage with its model card."""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.data.examples import TokenizedDataset
from thinkpo_jax.models.weight_saving import save_model
from thinkpo_jax.run.run_folder import STAGE_RECORD_FILE, Run, read_json_record
from thinkpo_jax.runtime.console import METRICS, log_warning, read_metrics
from thinkpo_jax.runtime.files import software_versions, write_atomically
from thinkpo_jax.runtime.processes import barrier
from thinkpo_jax.training.stage_config import StageConfig, ThinkpoStage
from thinkpo_jax.training.train_step import TrainState


def model_card(run: Run, name: str, *, step: int, notes: Sequence[str]) -> str:
    """The README.md of a model of the run: from what, with what data and settings it was trained, and how it did.

    `notes` say what the data came to; the metrics are those of update `step`, the scores those of the run's report.
    """
    stage = next(stage for stage in run.config.stages if stage.name == name)
    head = {
        "library_name": "transformers",
        "base_model": run.config.model.path,
        "tags": ["thinkpo_jax", stage.objective],
    }
    lines = [line for line in read_metrics(run.folder / name / "metrics.jsonl") if line["step"] == step]
    record = read_json_record(run.folder / name / STAGE_RECORD_FILE, "data", "summary") or {
        "data": None,
        "summary": None,
    }
    report = (
        read_json_record(run.folder / "report.json", "models")
        if (record["summary"] or {}).get("steps") == step
        else None
    )
    scores = {
        benchmark: score
        for benchmark, score in (report["models"].get(name, {}) if report else {}).items()
        if _is_of(run, name, benchmark)
    }
    sections = {
        "Data": [*notes, f"digest of the tokenised data: {record['data']}"],
        f"Metrics of update {step}": [f"{key}: {value:.6g}" for line in lines for key, value in line.items()],
        "Evaluation of the float32 model": [
            f"{benchmark}: accuracy {100 * score['accuracy']:.1f} % (95 % interval {100 * score['ci95'][0]:.1f} to "
            f"{100 * score['ci95'][1]:.1f}, {score['num_questions']} questions), mean response "
            f"{score['mean_response_tokens']:.1f} tokens, {100 * score['truncation_rate']:.1f} % cut off"
            for benchmark, score in scores.items()
        ],
        "Made with": [f"{what}: {version}" for what, version in software_versions().items()],
    }
    settings = yaml.safe_dump(run.settings(name), sort_keys=False, allow_unicode=True)
    listed = "".join(
        f"\n## {title}\n\n" + "".join(f"- {line}\n" for line in lines) for title, lines in sections.items() if lines
    )
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {run.config.title}: {name}\n\n"
        f"Trained with thinkpo_jax from `{run.config.model.path}`, stage `{name}` ({stage.objective}), which started "
        f"from `{run.initial_model_of(stage)}`.\n\n## Settings\n\n```yaml\n{settings}```\n{listed}"
    )


def _is_of(run: Run, name: str, benchmark: str) -> bool:
    """Whether the answers to a benchmark are those of the model as it is now."""
    record = read_json_record(run.folder / "evaluation" / name / f"{benchmark}.json", "settings")
    return record is not None and record["settings"]["model"] == run.fingerprint(name)


def save_stage_output(
    run: Run, stage: StageConfig, state: TrainState, batches: BatchPlan, examples: TokenizedDataset
) -> None:
    """Exports the stage's end and marks the stage as finished."""
    folder = run.folder / stage.name
    lines = read_metrics(folder / METRICS)
    notes = [*examples.describe_sources(), f"{len(examples)} examples", batches.describe()]
    card = model_card(run, stage.name, step=len(batches), notes=notes)
    stops = run.chat.stop_token_ids
    save_model(
        state.model,
        folder / "model",
        template_folder=run.start_folder,
        dtype="float32",
        stop_token_ids=stops,
        model_card=card,
    )
    if lines and (share := lines[-1].get("saturated", 0.0)) > 0.5:
        advice = "A smaller beta lets them count; for DPO's loss, so does `loss: sigmoid_norm`."
        if (
            isinstance(stage, ThinkpoStage)
            and stage.loss != "sigmoid_norm"
            and (margin := lines[-1].get("rewards/margins", 0.0)) > 1
        ):
            advice += f" At {stage.beta / margin:.1g} the mean margin of now would be 1 (gradient weight 27 %)."
        log_warning(f"stage {stage.name}: at its end {share:.0%} of the pairs had next to no gradient left. {advice}")
    summary = {"steps": len(batches), "seconds": sum(line["seconds"] for line in lines), "notes": notes}
    write_stage_record(run, stage, examples, summary)
    barrier("the stage is finished")


def write_stage_record(
    run: Run, stage: StageConfig, examples: TokenizedDataset, summary: dict[str, Any] | None
) -> None:
    """Notes what a stage is trained with and, once it is finished, how it went."""
    record = {"settings": run.settings(stage.name), "data": examples.digest(), "summary": summary}
    write_atomically(run.folder / stage.name / "stage.json", json.dumps(record).encode())
