"""What is a run? Read `run_all` and `train_stage` top to bottom.

Example: python -m thinkpo_jax.train --config configs/quickstart.yaml --set seed=1
"""

import argparse
import importlib.metadata
import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np

from thinkpo_jax.check import check_run, not_trained, pointless, prepared
from thinkpo_jax.checkpoint import Checkpoints
from thinkpo_jax.commands import config_arguments, program, stop_requests
from thinkpo_jax.config import RunError, UserError
from thinkpo_jax.convert import save_model
from thinkpo_jax.data import Examples
from thinkpo_jax.evaluate import evaluate_run, read_questions
from thinkpo_jax.flops import throughput
from thinkpo_jax.hosts import from_the_first, host_arguments, in_any, join, wait
from thinkpo_jax.log import MetricsFile, Progress, read_metrics, say, warn, write_whole
from thinkpo_jax.model import Transformer, placement
from thinkpo_jax.objectives import Objective, comparison, readable, sft, thinkpo
from thinkpo_jax.optimizer import learning_rate, make_optimizer
from thinkpo_jax.packing import Batches
from thinkpo_jax.reference import check_start, read_logprobs, stored_logprobs, write_logprobs
from thinkpo_jax.run import (
    Run,
    RunConfig,
    SftStage,
    Stage,
    ThinkpoStage,
    load_config,
    model_card,
    open_run,
    read_record,
)  # fmt: skip
from thinkpo_jax.sharding import data_shards, own_shards, put_batch
from thinkpo_jax.step import TrainState, initial_state, make_evaluation, make_step

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"  # of a stage, one line for each (validated) update


def run_all(config: RunConfig) -> Run:
    """Trains the stages that are not finished, in order, then evaluates every model and writes the report."""
    run = open_run(config)
    say(placement(run.compute, run.mesh))
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
    not_trained(run.config, stage, found)
    return found


def check_data(run: Run, stage: Stage, examples: Examples) -> None:
    """Raises `UserError` where a stage was begun with other data than these."""
    digest = np.frombuffer(examples.digest().encode(), np.uint8)
    if not np.array_equal(digest, from_the_first(digest)):
        raise UserError(
            f"stage {stage.name}: this process reads other data than the first one. Give all processes the same files."
        )
    record = read_record(run.folder / stage.name / "stage.json", "data")
    if record is not None and record["data"] != examples.digest():
        raise UserError(
            f"stage {stage.name} was begun with other data. Remove {run.folder / stage.name} to train it from its "
            "start, or restore the data."
        )


def train_stage(run: Run, stage: Stage, examples: Examples) -> None:
    """Trains one stage from its last checkpoint, or from its start model, and exports its end."""
    folder, start = run.folder / stage.name, run.start_of(stage)
    batches = Batches(
        examples,
        stage.batch,
        seed=run.config.seed,
        shards=data_shards(run.mesh),
        own=own_shards(run.mesh),
        steps=stage.steps,
        epochs=stage.epochs or 1.0,
        held_out=not_trained(run.config, stage, examples),
    )
    say(f"{stage.name}: {batches.describe()}, from {start}")
    write_record(run, stage, examples, None)
    model = run.load(start)
    objective = sft if isinstance(stage, SftStage) else against_reference(run, stage, batches, model)
    optimizer = make_optimizer(stage.optimizer, len(batches))
    state = initial_state(model, optimizer, run.mesh)
    del model  # it is part of the state now
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep=stage.checkpoint.keep))
        stopping = stack.enter_context(stop_requests())
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
            say(f"{stage.name}: going on from update {int(state.step)}")
        step = make_step(objective, optimizer, run.mesh, state)
        metrics_file = stack.enter_context(closing(MetricsFile(folder / METRICS, step=int(state.step))))
        validate = stack.enter_context(Validation(run, stage, batches, objective, step=int(state.step)))
        progress = stack.enter_context(closing(Progress(stage.name, len(batches), done=int(state.step), unit="update")))
        rate = learning_rate(stage.optimizer, len(batches))
        skipped = int(from_the_first(np.array(sum("skipped" in line for line in read_metrics(folder / METRICS)))))
        validate(state)
        began = time.monotonic()
        for index, batch in enumerate(batches.stream(int(state.step)), int(state.step)):
            # What is skipped moves no counter of the optimizer, so its schedule stays behind.
            line = {"learning_rate": np.asarray(rate(index - skipped)).item()}
            state, metrics = step(state, put_batch(batch, run.mesh))
            line = metrics_line(jax.device_get(metrics), index, batches) | line
            seconds = time.monotonic() - began  # the wait for data and saving included, looking at held-out ones not
            line |= throughput(batches.work(batch), batches.slots(), state.model.arch, state.model.compute, seconds)
            if not line.pop("finite"):
                skipped += 1
                not_finite(stage, line, skipped, examples.names(batch.examples[batch.examples >= 0].tolist()))
                line = {name: value for name, value in line.items() if math.isfinite(value)} | {"skipped": 1}
            metrics_file.write(line)
            progress.update(index + 1, shown(line))
            stop = in_any(stopping())
            began = time.monotonic() + validate(state)
            if (index + 1) % stage.checkpoint.every == 0 or index + 1 == len(batches) or stop:
                checkpoints.save(state)
            if stop:  # asked of this process, or of another one
                raise KeyboardInterrupt
    finish_stage(run, stage, state, batches, examples)


def against_reference(run: Run, stage: ThinkpoStage, batches: Batches, model: Transformer) -> Objective:
    """ThinkPO against the start model: puts its log-probs into the batches, and sees that the first loss is right."""
    # A stage keeps the values that it was begun with: others, of other rows, may differ in their last bits.
    path = run.folder / stage.name / "reference.npz"
    begun = read_logprobs(path, like=batches.reference)
    if begun is None:
        begun = looked_up(run, stage, batches, model)
        write_logprobs(path, begun)
    batches.reference = begun
    tags = {"end_id": run.chat.end_id, "thought_ends": run.chat.thought_ends()}
    loss = check_start(stage, comparison(stage, **tags), model, batches[0], run.mesh)
    say(f"{stage.name}: before the first update the loss is {loss:.6f}")
    return thinkpo(stage, **tags)


def looked_up(run: Run, stage: ThinkpoStage, batches: Batches, model: Transformer) -> np.ndarray:
    """The start model's log-probs, as they are kept for all runs, or computed."""
    device = jax.devices()[0]
    identity = {
        "weights": run.weights(run.start_of(stage)),
        "dtype": run.config.compute.dtype,
        "attention": run.compute.attention,
        "device": f"{device.platform} {device.device_kind}",
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    progress: Progress | None = None

    def watch(done: int, total: int) -> None:
        nonlocal progress
        progress = progress or Progress(f"{stage.name} reference", total, unit="batch")
        progress.update(done)

    found = stored_logprobs(model, batches, run.mesh, identity=identity, watch=watch)
    if progress is not None:
        progress.close()
    return found


class Validation:
    """Loss and metrics of the examples that a stage holds out, into `validation.jsonl`; nothing without them."""

    def __init__(self, run: Run, stage: Stage, batches: Batches, objective: Objective, *, step: int) -> None:
        """`step`: the updates that are done; lines of later ones, from an earlier try, are removed."""
        self._mesh, self._last, self._every = run.mesh, len(batches), stage.validation and stage.validation.every
        if self._every is not None:
            self._evaluate, self._batches = make_evaluation(objective, run.mesh), batches.over(batches.held_out)
            self._file = MetricsFile(run.folder / stage.name / VALIDATION, step=step)
            done = np.zeros(self._last + 1, bool)
            done[[int(line["step"]) for line in read_metrics(run.folder / stage.name / VALIDATION)]] = True
            self._done = from_the_first(done)

    def __enter__(self) -> "Validation":
        return self

    def __exit__(self, *_: object) -> None:
        if self._every is not None:
            self._file.close()

    def __call__(self, state: TrainState) -> float:
        """Computes and writes a line where it is time for one and there is none yet; gives the seconds that it took."""
        step, began = int(state.step), time.monotonic()
        if self._every is None or self._done[step] or (step % self._every and step != self._last):
            return 0.0
        found = [jax.device_get(self._evaluate(state.model, put_batch(batch, self._mesh))) for batch in self._batches]
        total = jax.tree.map(lambda *sums: sum(sums), *found)
        means = {name: float(value / total.weight) for name, value in total.metrics.items()}
        line = readable(means | {"loss": float(total.loss / total.weight)})
        self._file.write({"step": step, **line})
        self._done[step] = True
        say(f"held out, after {step} updates: " + ", ".join(f"{name} {value}" for name, value in told(line).items()))
        return time.monotonic() - began


def not_finite(stage: Stage, line: dict[str, float], skipped: int, names: str) -> None:
    """Says which update was not applied. Raises `RunError` where the stage stops at it, or has skipped too many."""
    problem = (
        f"stage {stage.name}, update {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}; the "
        f"update was not applied. Its examples, counted among the rows kept of {names}."
    )
    if stage.on_nonfinite == "stop":
        raise RunError(f"{problem} A lower learning rate may help; `on_nonfinite: skip` leaves such updates out.")
    if skipped > stage.max_skipped:
        raise RunError(f"{problem} These are more than `max_skipped: {stage.max_skipped}`.")
    warn(f"{problem} {skipped} of at most {stage.max_skipped} are skipped.")


def metrics_line(metrics: dict[str, Any], index: int, batches: Batches) -> dict[str, float]:
    """The metrics of update `index` (from 0) as plain numbers."""
    line = readable({name: float(value) for name, value in metrics.items()})
    return {"step": index + 1, "epoch": (index + 1) / batches.steps_per_epoch, **line}


def told(line: dict[str, float]) -> dict[str, str]:
    """The loss and, where there are pairs, margin and accuracy, as a person is told them."""
    names = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    return {name: f"{line[metric]:.4f}" for name, metric in names.items() if metric in line}


def shown(line: dict[str, float]) -> dict[str, str]:
    """What the progress bar shows of an update."""
    return told(line) | {"tok/s": f"{line['tokens_per_second']:,.0f}"}


def finish_stage(run: Run, stage: Stage, state: TrainState, batches: Batches, examples: Examples) -> None:
    """Exports the stage's end and marks the stage as finished."""
    folder = run.folder / stage.name
    lines = read_metrics(folder / METRICS)
    notes = [*examples.notes(), f"{len(examples)} examples", batches.describe()]
    card = model_card(run, stage.name, step=len(batches), notes=notes)
    stops = run.chat.stop_ids
    save_model(state.model, folder / "model", like=run.start_folder, dtype="float32", stops=stops, card=card)
    if lines and (share := lines[-1].get("saturated", 0.0)) > 0.5:
        advice = "A smaller beta lets them count; for DPO's loss, so does `loss: sigmoid_norm`."
        if (
            isinstance(stage, ThinkpoStage)
            and stage.loss != "sigmoid_norm"
            and (margin := lines[-1].get("rewards/margins", 0.0)) > 1
        ):
            advice += f" At {stage.beta / margin:.1g} the mean margin of now would be 1 (gradient weight 27 %)."
        warn(f"stage {stage.name}: at its end {share:.0%} of the pairs had next to no gradient left. {advice}")
    summary = {"steps": len(batches), "seconds": sum(line["seconds"] for line in lines), "notes": notes}
    write_record(run, stage, examples, summary)
    wait("the stage is finished")


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
    host_arguments(parser)
    parser.add_argument("--check", action="store_true", help="only read, count and show the data; touches no device")
    parsed = parser.parse_args(arguments)
    if not parsed.check:
        join(parsed)
    config = load_config(parsed.config, parsed.assignments)
    if parsed.check:
        check_run(config)
    else:
        run_all(config)


if __name__ == "__main__":
    program(main)
