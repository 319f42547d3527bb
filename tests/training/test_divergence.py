"""Tests when training counts as diverging, and what happens to the run, its checkpoints and the stages after it.

The numbers are of real runs of the built-in model, with the quickstart's data.
"""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import small
from support.faults import Outcome
from support.stages import make_update_nonfinite, stage_inputs

from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import RunError, parse_config
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.train import main
from thinkpo_jax.training import train_stage
from thinkpo_jax.training.divergence import (
    NUM_LAST_UPDATES,
    NUM_START_UPDATES,
    NUM_UPDATES,
    Divergence,
    DivergenceWatch,
)
from thinkpo_jax.training.stage_config import SftStage, ThinkpoStage
from thinkpo_jax.training.train_stage import StageInputs

Lines = list[dict[str, float]]

# SFT with a learning rate of 1000. The model is dead: each of its 32 tokens has the same probability.
DEAD_LOSSES = [0.032, 0.032, 57100, 96700, 514000, 575000, 995000, 1790000, 60100, 10200, *[3.47] * 30]
# SFT with 0.01, a hundred times the usual rate. It is shaken at update 11, and recovers.
SHAKEN_LOSSES = [
    0.032, 0.032, 0.0197, 0.00711, 0.00223, 0.00136, 0.00121, 0.00102, 0.000958, 0.0017, 0.226, 0.0673, 0.152, 0.252,
    0.11, 0.102, 0.15, 0.0869, 0.139, 0.124, 0.0747, 0.0714, 0.0361, 0.117, 0.124, 0.122, 0.0553, 0.113, 0.0641, 0.0472,
    0.0318, 0.0171, 0.069, 0.0497, 0.0272, 0.0273, 0.0122, 0.0232, 0.0278, 0.0484,
]  # fmt: skip
SHAKEN_NORMS = [
    0.249, 0.249, 0.169, 0.0664, 0.0173, 0.0216, 0.0242, 0.0109, 0.0166, 0.433, 4.45, 3.26, 6.37, 5.04, 1.54, 2.63,
    2.98, 1.86, 4.14, 2.32, 1.71, 1.48, 1.94, 1.78, 2.86, 2.78, 1.13, 1.74, 2.04, 1.01, 1.07, 0.844, 1.5, 0.897, 0.554,
    0.916, 0.263, 0.82, 1.17, 1.16,
]  # fmt: skip
# ThinkPO with 0.02, a hundred times the usual rate. The loss recovers, but the model has forgotten the answers.
COLLAPSED = {
    "loss": [0.693, 0.693, 1.68, 3.91, 7.9, 11.0, 8.39, 8.63, 4.72, 3.14, 1.84, 0.956, 0.373, 0.157, 0.095, 0.0429],
    "nll/chosen": [0, 0, 0.583, 1.38, 2.72, 3.98, 3.08, 3.3, 2.17, 1.91, 1.58, 1.3, 1.29, 1.1, 1.12, 1.01],
    "logps/chosen": [
        -0.016, -0.016, -19.2, -45.4, -89.9, -131, -102, -109, -71.6, -63.1, -52.2, -42.8, -42.7, -36.4, -37, -33.4,
    ],
    "rewards/chosen": [
        0, 0, -1.92, -4.54, -8.99, -13.1, -10.2, -10.9, -7.16, -6.31, -5.21, -4.27, -4.27, -3.64, -3.69, -3.34,
    ],
    "rewards/rejected": [
        0, 0, -0.458, -0.659, -1.09, -2.1, -1.77, -2.27, -2.46, -3.22, -3.6, -3.9, -5.13, -5.46, -6.05, -6.55,
    ],
}  # fmt: skip
# ThinkPO with the usual 0.0002.
LEARNED = {
    "loss": [
        0.693, 0.693, 0.675, 0.639, 0.59, 0.539, 0.508, 0.493, 0.484, 0.476, 0.467, 0.456, 0.445, 0.435, 0.426, 0.419,
    ],
    "nll/chosen": [
        0.00048, 0.00048, 0.00048, 0.00049, 0.00052, 0.00065, 0.00099, 0.0016, 0.0024, 0.0031, 0.0035, 0.0035, 0.0032,
        0.0029, 0.0026, 0.0024,
    ],
    "logps/chosen": [
        -0.016, -0.016, -0.016, -0.016, -0.017, -0.022, -0.033, -0.054, -0.081, -0.1, -0.11, -0.11, -0.11, -0.096,
        -0.086, -0.078,
    ],
    "rewards/chosen": [
        0, 0, 0, -2e-5, -1.3e-4, -5.6e-4, -0.0017, -0.0038, -0.0065, -0.0087, -0.0098, -0.0098, -0.009, -0.008, -0.007,
        -0.0062,
    ],
    "rewards/rejected": [
        0, 0, -0.037, -0.11, -0.22, -0.34, -0.42, -0.46, -0.48, -0.51, -0.53, -0.56, -0.59, -0.62, -0.64, -0.66,
    ],
}  # fmt: skip


def _config(objective: str, **keys: Any) -> SftStage | ThinkpoStage:
    data = {"prompt": "p"} | ({"response": "r"} if objective == "sft" else {"chosen": "c", "rejected": "r"})
    stage = {"name": objective, "objective": objective, "data": {"path": "x", **data}, "steps": 1000}
    stage |= {"batch": {"size": 4, "row_length": 64}, "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.01}}
    return parse_config(SftStage if objective == "sft" else ThinkpoStage, stage | keys, source="test")


def _lines(**columns: list[float]) -> Lines:
    rows = zip(*columns.values(), strict=True)
    return [
        {"step": update, "grad_norm": 0.1} | dict(zip(columns, row, strict=True)) for update, row in enumerate(rows, 1)
    ]


def _watch(lines: Lines, config: SftStage | ThinkpoStage | None = None, *, num_updates: int = 1000) -> list[Divergence]:
    watch = DivergenceWatch(config or _config("sft"), num_updates)
    return [found for line in lines if (found := watch.add(line)) is not None]


def test_a_dead_model_is_found_ten_updates_after_the_start() -> None:
    (found,) = _watch(_lines(loss=DEAD_LOSSES))
    assert found.update == NUM_START_UPDATES + NUM_UPDATES
    assert found.last_good == 0, "it was dead in the first updates, which are not checked"
    assert (
        found.problem
        == "The loss is 3.47, above its limit of 3.032. Its running median is 1.032. This began at update 6"
    )


def test_training_that_recovers_does_not_diverge() -> None:
    assert _watch(_lines(loss=SHAKEN_LOSSES, grad_norm=SHAKEN_NORMS)) == []
    assert _watch(_lines(loss=SHAKEN_LOSSES[:20], grad_norm=SHAKEN_NORMS[:20]), num_updates=20) == []


@pytest.mark.parametrize("loss", ["sigmoid", "apo_down"])
def test_log_probs_that_collapse_are_a_divergence_even_if_the_loss_is_low(loss: str) -> None:
    columns = {name: [*values, *values[-1:] * 4] for name, values in COLLAPSED.items()}
    config = _config("thinkpo", beta=0.1, loss=loss)
    found = _watch(_lines(**columns), config)
    if loss == "apo_down":  # it lowers log-probs on purpose
        assert found == []
        return
    assert [each.update for each in found] == [15]
    assert columns["loss"][14] < 0.1
    assert found[0].problem.startswith(
        "The log-probs collapse. Since the start, those of chosen answers changed by -36.9 ("
    )
    assert "those of rejected answers by -60.5" in found[0].problem


def test_a_dead_model_is_found_with_a_small_beta() -> None:
    """The loss stays near ln 2. A dead model gives all tokens the same probability, so rejected answers may gain."""
    beta, reference, dead = 0.001, [-0.016, -10.6], [-114.0, -10.4]
    dead_line = {"loss": 0.75, "nll/chosen": 3.47, "logps/chosen": dead[0]}
    dead_line |= {
        "rewards/chosen": beta * (dead[0] - reference[0]),
        "rewards/rejected": beta * (dead[1] - reference[1]),
    }
    columns = {name: [*values[:6], *[dead_line[name]] * 10] for name, values in LEARNED.items()}
    (found,) = _watch(_lines(**columns), _config("thinkpo", beta=beta))
    assert (found.update, found.last_good) == (16, 5)


def test_ordinary_training_of_pairs_does_not_diverge() -> None:
    for num_updates in (len(LEARNED["loss"]), 1000):
        assert _watch(_lines(**LEARNED), _config("thinkpo", beta=0.1), num_updates=num_updates) == []
    # Robust DPO has negative losses. Three times such a median is below all values.
    negative = _lines(**LEARNED | {"loss": [0.693, 0.69, 0.3, -0.5, *[-2.0] * 12]})
    assert _watch(negative, _config("thinkpo", beta=0.1, loss="robust"), num_updates=16) == []


@pytest.mark.parametrize(
    ("column", "usual", "high"), [("loss", 0.3, 1.1), ("loss", 0.01, 0.2), ("loss", 6.0, 8.5), ("grad_norm", 0.5, 6.0)]
)
def test_a_divergence_needs_updates_in_a_row_and_is_found_once(column: str, usual: float, high: float) -> None:
    """A spike passes. A second divergence is found only after enough updates within the limits."""

    def found_after(*numbers: int) -> list[Divergence]:
        """`numbers` of updates, alternating between usual and high."""
        values = [value for number, value in zip(numbers, [usual, high] * 4, strict=False) for _ in range(number)]
        config = _config("sft", optimizer={"learning_rate": 1e-3, "warmup_ratio": 0.9})  # no check of the start loss
        return _watch(_lines(**({"loss": [usual] * len(values)} | {column: values})), config)

    assert found_after(30, NUM_UPDATES - 1, 5, NUM_UPDATES - 1, 30) == []
    (found,) = found_after(30, 100)
    assert (found.update, found.last_good) == (30 + NUM_UPDATES, 29), "checkpoint 30 gave the first high value"
    assert len(found_after(30, 12, 5, 12)) == 1
    assert len(found_after(30, 12, NUM_UPDATES, 12)) == 2


def test_a_loss_that_stays_above_its_start_is_a_divergence_after_warm_up() -> None:
    """It creeps up, so that the running median follows."""
    losses = [1.0] * 10 + [1 + 0.01 * index for index in range(300)]
    found = _watch(_lines(loss=losses))
    assert [each.update for each in found] == [131]
    assert "At the start it was 1" in found[0].problem
    late = _config("sft", optimizer={"learning_rate": 1e-3, "warmup_ratio": 0.25})
    assert [each.update for each in _watch(_lines(loss=losses), late)] == [260]


def test_memorized_examples_may_have_any_small_loss() -> None:
    losses = [1.0] * 10 + [1e-6] * 60 + [0.05] * 30
    assert _watch(_lines(loss=losses)) == []


def test_at_the_end_of_a_stage_few_updates_are_enough() -> None:
    for number in (NUM_LAST_UPDATES - 1, NUM_LAST_UPDATES):
        losses = [0.03] * 20 + [3.47] * number
        found = _watch(_lines(loss=losses), num_updates=len(losses))
        assert [each.last_good for each in found] == [19] * (number == NUM_LAST_UPDATES)


@pytest.mark.parametrize("nonfinite", [("loss",), ("grad_norm",), ("loss", "grad_norm")])
def test_skipped_updates_in_a_row_are_a_divergence(nonfinite: tuple[str, ...]) -> None:
    lines = _lines(loss=[0.03] * 30)
    for line in lines[12 : 12 + NUM_UPDATES]:
        for name in nonfinite:
            del line[name]
    (found,) = _watch(lines)
    assert (found.update, found.last_good) == (12 + NUM_UPDATES, 11)


@pytest.mark.parametrize(
    ("margins", "last_good"),
    [
        ([0, 0.4, 0.8, 0.7, 0.5, 0.3], 4),
        ([0, -0.02, -0.06, -0.2], 2),
        ([0, 0.4, 0.8, 0.7, 0.6, 0.5], None),  # still more than half
        ([0, 0.4, 0.8, 0.3, 0.31, 0.2], None),  # not in a row
        ([0, -0.001, -0.002, -0.003], None),  # a small beta and noise
    ],
)
def test_validation_margins_that_fall_are_a_divergence(margins: list[float], last_good: int | None) -> None:
    watch = DivergenceWatch(_config("thinkpo"), 1000)
    found = [watch.add_validation({"step": update, "rewards/margins": value}) for update, value in enumerate(margins)]
    assert [each and each.last_good for each in found] == [None] * (len(margins) - 1) + [last_good]
    assert watch.add_validation({"step": len(margins), "rewards/margins": -5}) is None or last_good is None, (
        "found once"
    )


def _inputs(folder: Path, **stage: Any) -> StageInputs:
    optimizer = {"learning_rate": 1e-4, "schedule": "constant", "warmup_ratio": 0.0}
    return replace(stage_inputs(folder, **{"steps": 24, "optimizer": optimizer} | stage), mesh=small.mesh())


def _saved_steps(inputs: StageInputs) -> list[int]:
    return sorted(int(path.name) for path in inputs.folder.checkpoints.iterdir() if path.name.isdigit())


def _raise_losses(
    monkeypatch: pytest.MonkeyPatch, first: int, last: int, *, start: int = 0, interrupt: int = 0
) -> None:
    """Multiplies the losses of these updates that the host reads. Requests a stop at update `interrupt`."""
    compile_train_step = train_stage.compile_train_step

    def compile_with_high_losses(*args: Any) -> Any:
        train_step, update = compile_train_step(*args), start

        def step(*step_args: Any) -> Any:
            nonlocal update
            update += 1
            if update == interrupt:
                signal.raise_signal(signal.SIGINT)
            state, metrics = train_step(*step_args)
            return state, metrics | {"loss": metrics["loss"] * (1000 if first <= update <= last else 1)}

        return step

    monkeypatch.setattr(train_stage, "compile_train_step", compile_with_high_losses)


@pytest.mark.faults(Outcome.REFUSED)
def test_a_stage_that_diverges_stops_and_its_last_good_checkpoint_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(tmp_path, checkpoint={"every": 1, "keep": 2})
    _raise_losses(monkeypatch, 9, 24)
    with pytest.raises(RunError) as stopped:
        train_stage.train_stage(inputs)
    message = str(stopped.value)
    assert message.startswith("stage thinkpo, update 18: training diverges. The loss is")
    assert "This began at update 9. The last good checkpoint is" in message
    assert f"{inputs.folder.checkpoints / '7'}. Lower the learning rate and choose another run_dir" in message
    # The weights of update 8 gave the loss of update 9, which was not known when they were saved.
    assert _saved_steps(inputs) == [7, 8]
    assert len(read_metrics(inputs.folder.metrics)) == 18


def test_a_resumed_stage_decides_like_one_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is stopped before the divergence is proven, and after."""
    inputs = _inputs(tmp_path, on_divergence="warn", checkpoint={"every": 100, "keep": 10})
    for start, interrupt in ((0, 13), (13, 18)):
        with monkeypatch.context() as patch:
            _raise_losses(patch, 7, 24, start=start, interrupt=interrupt)
            with pytest.raises(KeyboardInterrupt):
                train_stage.train_stage(inputs)
    assert _saved_steps(inputs) == [13, 18]
    with pytest.raises(RunError, match=r"update 16: training diverges.*No good checkpoint is left"):
        train_stage.train_stage(replace(inputs, config=inputs.config.model_copy(update={"on_divergence": "stop"})))
    result = train_stage.train_stage(inputs)
    assert capsys.readouterr().err.count("warning: stage thinkpo, update 16: training diverges.") == 1
    (found,) = _watch(read_metrics(inputs.folder.metrics), inputs.config, num_updates=24)
    assert result.divergences == (f"training diverged at update 16: {found.problem}",)
    assert result.notes[-1:] == result.divergences
    assert found.problem.endswith("This began at update 7")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_in_doubt_waits_and_a_stop_keeps_a_good_checkpoint(
    keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = _inputs(tmp_path, checkpoint={"every": 4, "keep": keep})
    with monkeypatch.context() as patch:
        _raise_losses(patch, 7, 15, interrupt=13)
        with pytest.raises(KeyboardInterrupt):
            train_stage.train_stage(inputs)
    assert _saved_steps(inputs) == ([4] if keep == 1 else [4, 13])
    assert ("This stop keeps the earlier checkpoints: [4]" in capsys.readouterr().err) == (keep == 1)
    if keep == 1:
        return
    saved: list[int] = []
    _raise_losses(monkeypatch, 7, 15, start=13)
    save = train_stage.CheckpointStore.save
    monkeypatch.setattr(
        train_stage.CheckpointStore, "save", lambda *args, **options: (saved.append(args[2]), save(*args, **options))
    )
    train_stage.train_stage(inputs)
    assert saved == [16, 20, 24], "the doubt is gone at update 16"


def test_a_save_after_a_skipped_update_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_update_nonfinite(monkeypatch, update=2)
    inputs = _inputs(tmp_path, steps=5, on_nonfinite="skip", checkpoint={"every": 2, "keep": 10})
    train_stage.train_stage(inputs)
    skipped = [int(line["step"]) for line in read_metrics(inputs.folder.metrics) if "skipped" in line]
    assert 2 in skipped
    assert 2 not in _saved_steps(inputs)
    assert _saved_steps(inputs) == [step for step in (3, 4, 5) if step not in skipped]


@pytest.mark.faults(Outcome.REPORTED)
def test_the_next_stage_does_not_start_silently_from_a_diverged_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"p": "{i}2{i}?", "r": "{i}+2"}}\n' for i in range(8)))
    data = {"path": str(tmp_path / "rows.jsonl"), "prompt": "p", "response": "r"}
    stage = {"objective": "sft", "data": data, "batch": {"size": 4, "row_length": 64}, "steps": 16}
    stages = [
        stage | {"name": "dead", "optimizer": {"learning_rate": 1000.0}},
        stage | {"name": "next", "optimizer": {"learning_rate": 1e-30}, "steps": 1},
    ]
    run = {"run_dir": str(tmp_path / "run"), "model": {"path": "builtin:miniature"}, "compute": {"dtype": "float32"}}
    (tmp_path / "run.yaml").write_text(json.dumps(run | {"stages": stages}))
    command = ["--config", str(tmp_path / "run.yaml")]
    assert run_command(main, command) == 1
    assert (
        "error: stage dead, update 13: training diverges. The gradient is zero, but the loss is 3.466. "
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "next").exists()
    assert run_command(main, [*command, "--set", "stages.dead.on_divergence=warn"]) == 0
    log = capsys.readouterr().err
    note = "training diverged at update 13: The gradient is zero"
    assert re.search(f"warning: stage next starts from the model of stage dead, but there {note}", log)
    for path in ("dead/model/README.md", "report.md"):
        assert note in (tmp_path / "run" / path).read_text()
