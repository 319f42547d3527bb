"""A probe runs when it is due, once for each step, also after a stop. Its time is not time of training."""

import itertools
import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from support import small
from support.stages import TIME_METRICS, stage_inputs

from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.training import periodic_evaluation, train_stage
from thinkpo_jax.training.periodic_evaluation import EvaluateFn, PeriodicEvaluation
from thinkpo_jax.training.train_stage import StageInputs

LAST, SAVE_EVERY = 7, 3


class _CrashError(Exception):
    pass


def _train_on_the_host(path: Path, every: int, *, start: int = 0, crash_at: int | None = None) -> list[int]:
    """Evaluates like the loop of a stage from update `start`. The model is the number of updates.

    Returns the updates after which it evaluated. With `crash_at`, the evaluation after this update crashes.
    """
    evaluated: list[int] = []

    def evaluate(model: Any) -> dict[str, float]:
        if model == crash_at:
            raise _CrashError
        evaluated.append(model)
        return {"accuracy": model / 10}

    model: Any
    evaluation = PeriodicEvaluation("probe", evaluate, path, every=every, start=start, last=LAST)
    try:
        for model in range(start, LAST + 1):
            evaluation.run_if_due(model, model)
    except _CrashError:
        pass
    evaluation.close()
    return evaluated


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_an_evaluation_resumes_after_any_update(every: int, tmp_path: Path) -> None:
    due = sorted({*range(0, LAST, every), LAST})
    whole = tmp_path / "whole.jsonl"
    assert _train_on_the_host(whole, every) == due
    assert [line["step"] for line in read_metrics(whole)] == due
    for crash_at, start in itertools.product(due, range(LAST + 1)):
        if start > crash_at:
            continue
        path = tmp_path / f"{crash_at}-{start}.jsonl"
        assert _train_on_the_host(path, every, crash_at=crash_at) == [update for update in due if update < crash_at]
        # A line of an update that is trained again is removed. One that was written before `start` is not asked again.
        is_kept = start in due and start < crash_at
        assert _train_on_the_host(path, every, start=start) == [update for update in due if update >= start + is_kept]
        assert path.read_bytes() == whole.read_bytes()


def test_other_intervals_and_figures_are_allowed_after_a_stop(tmp_path: Path) -> None:
    path = tmp_path / "probe.jsonl"
    path.write_text("".join(json.dumps({"step": step, "old": 1}) + "\n" for step in (0, 2, 4)))
    assert _train_on_the_host(path, 3, start=3) == [3, 6, 7]
    assert [line["step"] for line in read_metrics(path)] == [0, 2, 3, 6, 7]


def _weight_sum(model: Transformer) -> dict[str, float]:
    return {"accuracy": float(np.abs(np.asarray(model.embedding[...])).sum())}


def _inputs(folder: Path, function: EvaluateFn = _weight_sum, **stage: Any) -> StageInputs:
    inputs = stage_inputs(folder, **{"steps": 4, "checkpoint": {"every": 100}, "probe": {"every": 2}} | stage)
    return replace(inputs, mesh=small.mesh(), probe=function)


def _before_call(number: int, action: Callable[[], Any]) -> EvaluateFn:
    """Returns a probe that calls `action` before its call with this number, counted from 0."""
    calls = itertools.count()

    def probe(model: Transformer) -> dict[str, float]:
        if next(calls) == number:
            action()
        return _weight_sum(model)

    return probe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> StageInputs:
    """A stage that was trained without a stop, with probes after 0, 2 and 4 updates."""
    inputs = _inputs(tmp_path_factory.mktemp("whole"))
    train_stage.train_stage(inputs)
    return inputs


def _metrics(inputs: StageInputs) -> list[dict[str, float]]:
    return [{name: line[name] for name in line.keys() - TIME_METRICS} for line in read_metrics(inputs.folder.metrics)]


def test_a_stage_is_probed_before_during_and_after(whole: StageInputs) -> None:
    lines = read_metrics(whole.folder.probe)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert len({line["accuracy"] for line in lines}) == 3, "each probe gets the weights after its update"
    assert lines[0]["accuracy"] == _weight_sum(whole.initial_model.load(whole.compute, whole.mesh))["accuracy"]


@pytest.mark.parametrize(("call", "saved"), [(0, []), (1, [2]), (2, [2, 4])])
def test_a_stop_during_a_probe_stops_at_once_and_resumes(
    call: int, saved: list[int], whole: StageInputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint is saved before each probe."""
    sent = signal.SIGTERM if call else signal.SIGINT  # Before the first update, only a command handles SIGTERM.
    inputs = _inputs(tmp_path, _before_call(call, lambda: signal.raise_signal(sent)))
    with pytest.raises(KeyboardInterrupt):
        train_stage.train_stage(inputs)
    assert sorted(int(path.name) for path in inputs.folder.checkpoints.iterdir() if path.name.isdigit()) == saved
    assert len(read_metrics(inputs.folder.probe)) == call, "the probe is not completed"
    train_stage.train_stage(replace(inputs, probe=_weight_sum))
    assert inputs.folder.probe.read_bytes() == whole.folder.probe.read_bytes()
    assert _metrics(inputs) == _metrics(whole)
    log = capsys.readouterr().err
    assert log.count("probe after 2 updates (") == 1
    figure = read_metrics(whole.folder.probe)[1]["accuracy"]
    assert f"s): accuracy {figure:.4g}\n" in log


def test_after_a_stop_request_no_probe_starts(
    whole: StageInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop comes before the probe after update 2, which would delay it. It runs on resuming."""
    inputs = _inputs(tmp_path, probe={"every": 1})
    add = train_stage.StageMetrics.add

    def add_and_stop(metrics: train_stage.StageMetrics, update: int, *arguments: Any) -> None:
        add(metrics, update, *arguments)
        if update == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_stage.StageMetrics, "add", add_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_stage.train_stage(inputs)
    monkeypatch.setattr(train_stage.StageMetrics, "add", add)
    assert [line["step"] for line in read_metrics(inputs.folder.probe)] == [0, 1]
    assert [line["step"] for line in read_metrics(inputs.folder.metrics)] == [1, 2]
    train_stage.train_stage(replace(inputs, probe=_weight_sum))
    lines = read_metrics(inputs.folder.probe)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[::2] == read_metrics(whole.folder.probe)


def test_the_time_of_a_probe_does_not_count_as_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + offset[0])
    monkeypatch.setattr(train_stage, "time", clock)
    monkeypatch.setattr(periodic_evaluation, "time", clock)

    def slow(model: Transformer) -> dict[str, float]:
        offset[0] += 10_000
        return _weight_sum(model)

    inputs = _inputs(tmp_path, slow, probe={"every": 1})
    result = train_stage.train_stage(inputs)
    assert offset == [5 * 10_000]
    assert result.seconds < 10_000


def test_without_a_probe_function_nothing_is_asked(whole: StageInputs, tmp_path: Path) -> None:
    inputs = replace(_inputs(tmp_path), probe=None)
    result = train_stage.train_stage(inputs)
    assert not inputs.folder.probe.exists()
    assert _metrics(inputs) == _metrics(whole)
    assert jax.tree.leaves(result.state)
