"""Tests that the loop keeps the devices busy: in which order it launches, reads and saves, and what it compiles."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from support.stages import RAGGED_ROWS, TIME_METRICS, make_update_nonfinite, stage_inputs

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.runtime import console
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.training import pipeline, train_stage
from thinkpo_jax.training.checkpoints import CheckpointStore
from thinkpo_jax.training.periodic_evaluation import PeriodicEvaluation
from thinkpo_jax.training.train_stage import StageInputs, StageResult

NEVER = {"every": 1000}  # only the last update of a stage is saved
LINEAR = {"learning_rate": 1e-3, "schedule": "linear", "warmup_ratio": 0.0}


class _RecordedMetric:
    """A metric that calls `on_read` when the host reads it."""

    def __init__(self, value: jax.Array, on_read: Callable[[], None]) -> None:
        self._value, self._on_read = value, on_read

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self._on_read()
        return np.asarray(self._value)


def _before_each_update(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], object]) -> None:
    """Calls `action` with the number of each update before the loop launches it. Counts from 1."""
    compile_train_step = train_stage.compile_train_step

    def compile_with_action(*args: Any) -> Callable[..., Any]:
        train_step, updates = compile_train_step(*args), itertools.count(1)

        def step(*step_args: Any) -> Any:
            action(next(updates))
            return train_step(*step_args)

        return step

    monkeypatch.setattr(train_stage, "compile_train_step", compile_with_action)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the order of the loop: place a batch (p), launch (l), read (r), validate (v) and save (s) an update."""
    recorded: list[str] = []
    compile_train_step, put_batch = train_stage.compile_train_step, pipeline.put_batch
    save, run_if_due = CheckpointStore.save, PeriodicEvaluation.run_if_due

    def compile_recorded(*args: Any) -> Callable[..., Any]:
        train_step = compile_train_step(*args)

        def step(*step_args: Any) -> Any:
            update = sum(event[0] == "l" for event in recorded) + 1
            recorded.append(f"l{update}")
            state, metrics = train_step(*step_args)
            return state, metrics | {"loss": _RecordedMetric(metrics["loss"], lambda: recorded.append(f"r{update}"))}

        return step

    def put_recorded(*args: Any) -> Any:
        recorded.append(f"p{sum(event[0] == 'p' for event in recorded) + 1}")
        return put_batch(*args)

    def save_recorded(store: CheckpointStore, state: Any, step: int, **options: Any) -> None:
        recorded.append(f"s{step}")
        save(store, state, step, **options)

    def run_recorded(validation: PeriodicEvaluation, update: int, model: Any) -> float:
        if validation.is_due(update):
            recorded.append(f"v{update}")
        return run_if_due(validation, update, model)

    monkeypatch.setattr(train_stage, "compile_train_step", compile_recorded)
    monkeypatch.setattr(pipeline, "put_batch", put_recorded)
    monkeypatch.setattr(CheckpointStore, "save", save_recorded)
    monkeypatch.setattr(PeriodicEvaluation, "run_if_due", run_recorded)
    return recorded


def _train(inputs: StageInputs) -> tuple[StageResult, list[dict[str, float]]]:
    """Returns the result of a stage, and its metrics without those that measure time."""
    result = train_stage.train_stage(inputs)
    lines = read_metrics(inputs.folder.metrics)
    return result, [{name: line[name] for name in line.keys() - TIME_METRICS} for line in lines]


def _assert_same_state(result: StageResult, expected: StageResult) -> None:
    for array, expected_array in zip(jax.tree.leaves(result.state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected_array))


def _saved_steps(inputs: StageInputs) -> list[int]:
    return sorted(int(path.name) for path in inputs.folder.checkpoints.iterdir() if path.name.isdigit())


def test_an_update_is_launched_before_the_metrics_of_the_one_before_it_are_read(
    tmp_path: Path, events: list[str]
) -> None:
    train_stage.train_stage(stage_inputs(tmp_path, steps=4, checkpoint=NEVER))
    assert events == ["p1", "p2", "l1", "p3", "l2", "r1", "p4", "l3", "r2", "l4", "r3", "r4", "s4"]


def test_all_metrics_are_read_before_a_validation_and_a_save(tmp_path: Path, events: list[str]) -> None:
    stage = {"steps": 5, "checkpoint": {"every": 2}, "validation": {"share": 0.25, "every": 3}}
    train_stage.train_stage(stage_inputs(tmp_path, **stage))
    order = [event for event in events if event[0] != "p"]
    assert order == [
        "v0", "l1", "l2", "r1", "r2", "s2", "l3", "r3", "s3", "v3", "l4", "r4", "s4", "l5", "r5", "s5", "v5",
    ]  # fmt: skip


def test_the_metrics_do_not_depend_on_when_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_update_nonfinite(monkeypatch, update=3)
    stage = {"steps": 6, "optimizer": LINEAR, "on_nonfinite": "skip"}
    # A save after each update leaves no update that is read late.
    expected, expected_lines = _train(stage_inputs(tmp_path / "at once", **stage))
    result, lines = _train(stage_inputs(tmp_path / "late", **stage, checkpoint=NEVER))
    assert lines == expected_lines
    assert "skipped" in lines[2]
    rates = [line["learning_rate"] for line in lines[:4]]
    np.testing.assert_allclose(rates, [1e-3 * remaining / 6 for remaining in (6, 5, 4, 4)], rtol=1e-6)
    _assert_same_state(result, expected)


def test_an_update_launched_after_a_nonfinite_one_is_discarded_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_update_nonfinite(monkeypatch, update=3)
    stage = {"steps": 4, "checkpoint": {"every": 2, "keep": 10}}
    expected, expected_lines = _train(stage_inputs(tmp_path / "skip", **stage, on_nonfinite="skip"))
    launched: list[int] = []
    with monkeypatch.context() as patch:
        _before_each_update(patch, launched.append)
        inputs = stage_inputs(tmp_path / "stop", **stage)
        with pytest.raises(RunError, match="stage thinkpo, update 3: the loss is nan"):
            train_stage.train_stage(inputs)
    assert launched == [1, 2, 3, 4]
    assert [line["step"] for line in read_metrics(inputs.folder.metrics)] == [1, 2]
    assert _saved_steps(inputs) == [2]
    result, lines = _train(stage_inputs(tmp_path / "stop", **stage, on_nonfinite="skip"))
    assert lines == expected_lines
    _assert_same_state(result, expected)


def test_a_stop_saves_the_launched_update_and_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, expected_lines = _train(stage_inputs(tmp_path / "whole", checkpoint=NEVER))
    with monkeypatch.context() as patch:
        _before_each_update(patch, lambda update: update == 3 and signal.raise_signal(signal.SIGINT))
        inputs = stage_inputs(tmp_path / "stopped", checkpoint=NEVER)
        with pytest.raises(KeyboardInterrupt):
            train_stage.train_stage(inputs)
    assert [line["step"] for line in read_metrics(inputs.folder.metrics)] == [1, 2, 3]
    assert _saved_steps(inputs) == [3]
    result, lines = _train(inputs)
    assert lines == expected_lines
    _assert_same_state(result, expected)


def test_nothing_is_compiled_after_the_first_update_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data are ragged. The loop skips an update, validates and saves. The second call resumes."""
    make_update_nonfinite(monkeypatch, update=2)
    compiled_after: list[int] = []
    launched = [0]

    def on_duration(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled_after.append(launched[0])

    _before_each_update(monkeypatch, lambda update: launched.__setitem__(0, update))
    common = {"checkpoint": {"every": 2}, "validation": {"share": 0.25, "every": 2}, "on_nonfinite": "skip"}
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        for steps in (2, 5):
            launched[0] = 0
            jax.clear_caches()  # other tests may have compiled the same programs
            stage: dict[str, Any] = common | {"steps": steps, "batch": {"size": 4, "row_length": 128}}
            inputs = stage_inputs(tmp_path, rows=RAGGED_ROWS, **stage)
            train_stage.train_stage(inputs)
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
    assert [line["step"] for line in read_metrics(inputs.folder.metrics)] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in read_metrics(inputs.folder.validation)] == [0, 2, 4, 5]
    assert "skipped" in read_metrics(inputs.folder.metrics)[1]
    assert set(compiled_after) == {0}


def test_the_loop_never_reads_the_step_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: jax.Array) -> int:
        raise AssertionError("an array on the devices was read as an integer")

    inputs = stage_inputs(tmp_path, steps=2)
    monkeypatch.setattr(type(jax.numpy.zeros(())), "__int__", fail)
    train_stage.train_stage(inputs)


def test_each_line_says_how_long_the_loop_waited_for_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefetch_from = BatchPlan.prefetch_from

    def with_a_slow_batch(plan: BatchPlan, start: int) -> Iterator[Any]:
        for update, batch in enumerate(prefetch_from(plan, start), start + 1):
            if update == 3:
                time.sleep(0.5)
            yield batch

    monkeypatch.setattr(BatchPlan, "prefetch_from", with_a_slow_batch)
    inputs = stage_inputs(tmp_path, steps=4, checkpoint=NEVER)
    train_stage.train_stage(inputs)
    seconds = [line["data_seconds"] for line in read_metrics(inputs.folder.metrics)]
    assert len(seconds) == 4
    assert min(seconds) >= 0
    assert seconds[2] >= 0.5
    assert seconds[2] == max(seconds)


def test_compiling_is_announced_once_and_does_not_count_as_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offset = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + offset[0])
    monkeypatch.setattr(console, "time", clock)
    monkeypatch.setattr(train_stage, "time", clock)
    monkeypatch.setattr(console, "PROGRESS_LINE_INTERVAL_SECONDS", 0.0)
    make_train_step = train_stage.make_train_step

    def make_slowly_compiled_step(*args: Any) -> Any:
        step: Any = make_train_step(*args)

        def compile_slowly(lowered: Any) -> Any:
            offset[0] += 10_000
            return lowered.compile()

        return SimpleNamespace(lower=lambda *a: SimpleNamespace(compile=lambda: compile_slowly(step.lower(*a))))

    monkeypatch.setattr(train_stage, "make_train_step", make_slowly_compiled_step)
    result = train_stage.train_stage(stage_inputs(tmp_path, steps=3, checkpoint=NEVER))
    messages = capsys.readouterr().err.splitlines()
    assert messages.count("thinkpo: compiling the train step") == 1
    assert sum("the train step was compiled in 100" in line for line in messages) == 1
    estimates = [float(line.split(", ")[1].split()[0]) for line in messages if " s left" in line and "update" in line]
    assert len(estimates) == 3
    assert max(estimates) < 10_000
    assert result.seconds < 10_000
