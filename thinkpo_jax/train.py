"""What is a run? Read `run_all` and `train_stage` top to bottom.

Example: python -m thinkpo_jax.train --config configs/quickstart.yaml --set seed=1
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from thinkpo_jax.check import check_run, pointless, prepared
from thinkpo_jax.checkpoint import Checkpoints
from thinkpo_jax.commands import config_arguments, program, stop_requests
from thinkpo_jax.config import RunError, UserError
from thinkpo_jax.convert import save_model
from thinkpo_jax.data import Examples
from thinkpo_jax.evaluate import evaluate_run, read_questions
from thinkpo_jax.log import MetricsFile, Progress, read_metrics, say, warn, write_whole
from thinkpo_jax.model import Transformer
from thinkpo_jax.objectives import readable, sft, thinkpo
from thinkpo_jax.optimizer import learning_rate, make_optimizer
from thinkpo_jax.packing import Batches
from thinkpo_jax.reference import check_start, reference_logprobs
from thinkpo_jax.run import (
    Run,
    RunConfig,
    Stage,
    ThinkpoStage,
    load_config,
    model_card,
    open_run,
    read_record,
)  # fmt: skip
from thinkpo_jax.sharding import data_shards, put_batch
from thinkpo_jax.step import TrainState, initial_state, make_step


def run_all(config: RunConfig) -> Run:
    """Trains the stages that are not finished, in order, then evaluates every model and writes the report."""
    run = open_run(config)
    stages = [stage for stage in config.stages if not run.finished(stage.name)]
    # All that is read, before anything is written: what is wrong with the last stage shows before the first one trains.
    examples = {stage.name: read_examples(run, stage) for stage in stages}
    asked = read_questions(config, run.chat)
    with run.writing(), jax.set_mesh(run.mesh):
        for stage in stages:
            if not run.finished(stage.name):  # asked again: another process may have written before this one could
                check_data(run, stage, examples[stage.name])
                train_stage(run, stage, examples.pop(stage.name))
        evaluate_run(run, asked)
    return run


def read_examples(run: Run, stage: Stage) -> Examples:
    """The tokenised examples of a stage; says what became of the rows. Raises `UserError`."""
    found = prepared(run.config, stage, run.chat)
    for note in found.notes():
        say(f"{stage.name}: {note}")
    problems = pointless(stage, found)
    if not len(found):
        raise UserError("\n".join(problems))
    for problem in problems:
        warn(problem)
    check_data(run, stage, found)
    return found


def check_data(run: Run, stage: Stage, examples: Examples) -> None:
    """Raises `UserError` where a stage was begun with other data than these."""
    record = read_record(run.folder / stage.name / "stage.json", "data")
    if record is not None and record["data"] != examples.digest():
        raise UserError(
            f"stage {stage.name} was begun with other data. Remove {run.folder / stage.name} to train it from its "
            "start, or restore the data."
        )


def train_stage(run: Run, stage: Stage, examples: Examples) -> None:
    """Trains one stage from its last checkpoint, or from its start model, and exports its end."""
    folder, start = run.folder / stage.name, run.start_of(stage)
    shards = data_shards(run.mesh)
    batches = Batches(
        examples,
        stage.batch,
        seed=run.config.seed,
        shards=shards,
        steps=stage.steps,
        epochs=stage.epochs or 1.0,
    )
    say(f"{stage.name}: {batches.describe()}, from {start}")
    write_record(run, stage, examples, None)
    model = run.load(start)
    objective = sft
    if isinstance(stage, ThinkpoStage):
        objective = thinkpo(stage, end_id=run.chat.end_id)
        batches.reference = stage_reference(run, stage, batches, model)
        check_start(objective, model, batches[0], run.mesh)
    optimizer = make_optimizer(stage.optimizer, len(batches))
    state = initial_state(model, optimizer, run.mesh)
    del model
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep=stage.checkpoint.keep))
        stopping = stack.enter_context(stop_requests())
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
            say(f"{stage.name}: going on from update {int(state.step)}")
        step = make_step(objective, optimizer, run.mesh, state)
        metrics_file = stack.enter_context(closing(MetricsFile(folder / "metrics.jsonl", step=int(state.step))))
        progress = stack.enter_context(closing(Progress(stage.name, len(batches), done=int(state.step), unit="update")))
        rate = learning_rate(stage.optimizer, len(batches))
        began = time.monotonic()
        for index, batch in enumerate(batches.stream(int(state.step)), int(state.step)):
            state, metrics = step(state, put_batch(batch, run.mesh))
            line = metrics_line(jax.device_get(metrics), index, batches)
            seconds, began = time.monotonic() - began, time.monotonic()  # the wait for data and saving included
            line |= {"learning_rate": np.asarray(rate(index)).item(), **speed(batch.segments, seconds)}
            if not line.pop("finite"):
                raise RunError(
                    f"stage {stage.name}, update {index + 1}: loss {line['loss']}, gradient norm {line['grad_norm']}; "
                    "the update was not applied. A lower learning rate may help. Its examples: "
                    f"{sorted(batch.examples[batch.examples >= 0].tolist())}."
                )
            metrics_file.write(line)
            progress.update(index + 1, shown(line))
            stop = stopping()
            if (index + 1) % stage.checkpoint.every == 0 or index + 1 == len(batches) or stop:
                checkpoints.save(state)
            if stop:
                break
    finish_stage(run, stage, state, batches, examples)


def stage_reference(run: Run, stage: Stage, batches: Batches, model: Transformer) -> np.ndarray:
    """The start model's log-probs of a stage's answers; kept in its folder, so that a resumed stage has the same."""
    path = run.folder / stage.name / "reference.npy"
    if path.exists():
        return _cached_reference(path, batches)
    progress = Progress(f"{stage.name} reference", len(batches.first_epoch()), unit="batch")
    found = reference_logprobs(model, batches, run.mesh, progress=progress.update)
    progress.close()
    partial = path.with_suffix(".partial.npy")
    np.save(partial, found)
    partial.rename(path)
    return found


def _cached_reference(path: Path, batches: Batches) -> np.ndarray:
    expected = batches.reference.shape
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged: {error}. Remove it; it is computed again.") from None
    if found.shape != expected:
        raise UserError(f"{path}: has the shape {found.shape}, expected {expected}. Remove it; it is computed again.")
    return found


def metrics_line(metrics: dict[str, Any], index: int, batches: Batches) -> dict[str, float]:
    """The metrics of update `index` (from 0) as plain numbers."""
    line = readable({name: float(value) for name, value in metrics.items()})
    return {"step": index + 1, "epoch": (index + 1) / batches.steps_per_epoch, **line}


def speed(segments: np.ndarray, seconds: float) -> dict[str, float]:
    """Useful tokens (padding left out) of an update, and per second."""
    tokens = int((segments > 0).sum())
    return {"tokens": tokens, "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}


def shown(line: dict[str, float]) -> dict[str, str]:
    """What the progress bar shows of an update."""
    values = {"loss": f"{line['loss']:.4f}"}
    if "rewards/margins" in line:
        values["margin"] = f"{line['rewards/margins']:.3f}"
    return values | {"tok/s": f"{line['tokens_per_second']:,.0f}"}


def finish_stage(run: Run, stage: Stage, state: TrainState, batches: Batches, examples: Examples) -> None:
    """Exports the stage's end and marks the stage as finished."""
    folder = run.folder / stage.name
    lines = read_metrics(folder / "metrics.jsonl")
    notes = [*examples.notes(), f"{len(examples)} examples", batches.describe()]
    card = model_card(run, stage.name, step=len(batches), notes=notes)
    stops = run.chat.stop_ids
    save_model(state.model, folder / "model", like=run.start_folder, dtype="float32", stops=stops, card=card)
    if lines and (share := lines[-1].get("saturated", 0.0)) > 0.5:
        advice = "A smaller beta, or `loss: sigmoid_norm`, lets them count."
        warn(f"stage {stage.name}: at its end {share:.0%} of the pairs had next to no gradient left. {advice}")
    summary = {"steps": len(batches), "seconds": sum(line["seconds"] for line in lines), "notes": notes}
    write_record(run, stage, examples, summary)


def write_record(run: Run, stage: Stage, examples: Examples, summary: dict[str, Any] | None) -> None:
    """Notes what a stage is trained with and, once it is finished, how it went."""
    record = {"settings": run.settings(stage.name), "data": examples.digest(), "summary": summary}
    write_whole(run.folder / stage.name / "stage.json", json.dumps(record).encode())


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.train",
        description="Train and evaluate the stages of a run. What is finished is not run again.",
        epilog="example: python -m thinkpo_jax.train --config configs/quickstart.yaml --set seed=1 run_dir=runs/seed1",
    )
    config_arguments(parser)
    parser.add_argument("--check", action="store_true", help="only read, count and show the data; touches no device")
    parsed = parser.parse_args(arguments)
    config = load_config(parsed.config, parsed.assignments)
    if parsed.check:
        check_run(config)
    else:
        run_all(config)


if __name__ == "__main__":
    program(main)
