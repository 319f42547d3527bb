"""Tests the loop of one stage: validation, updates that are not finite, the reference log-probs, and library calls."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from support.stages import ROWS, STAGE, edit_record, make_update_nonfinite, stage_inputs

from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.models.weight_saving import save_model
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.train import main
from thinkpo_jax.training import train_stage as train
from thinkpo_jax.training.train_stage import train_stage


def _config(folder: Path, *, run: str = "run", compute: dict[str, Any] | None = None, **stage: Any) -> str:
    """Writes the configuration of one ThinkPO stage on the built-in model, and returns its path."""
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"path": str(folder / "pairs.jsonl")}
    config = {
        "run_dir": str(folder / run),
        "model": {"path": "builtin:miniature"},
        "compute": compute or {"dtype": "float32"},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "stages": [STAGE | {"data": data} | stage],
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def _run(config: str, *assignments: str) -> int:
    return run_command(main, ["--config", config, *(["--set", *assignments] if assignments else [])])


def _weights(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "run" / "thinkpo" / "model" / "model.safetensors")


def test_held_out_pairs_are_evaluated_before_during_and_after(tmp_path: Path) -> None:
    assert _run(_config(tmp_path, steps=7, validation={"share": 0.25, "every": 3})) == 0
    lines = read_metrics(tmp_path / "run" / "thinkpo" / "validation.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 6, 7]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert {"rewards/accuracies", "rewards/chosen", "logps/chosen", "margins/tail", "logps/end"} <= lines[0].keys()
    assert lines[-1]["rewards/margins"] > lines[1]["rewards/margins"] > 0
    assert lines[-1]["loss"] < lines[1]["loss"] < np.log(2)
    # 6 of 24 pairs are held out, so an epoch has 18 / 6 updates.
    assert read_metrics(tmp_path / "run" / "thinkpo" / "metrics.jsonl")[2]["epoch"] == 1.0


def test_data_that_cannot_be_split_is_an_error_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(globals(), "ROWS", [row | {"prompt": "1?"} for row in ROWS])
    config = _config(tmp_path, validation={"share": 0.25})
    for arguments in (["--config", config], ["--config", config, "--check"]):
        assert run_command(main, arguments) == 2
        assert "stage thinkpo: validation: all examples have the same prompt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validation_does_not_change_the_weights(tmp_path: Path) -> None:
    for name, every in (("a", 1), ("b", 100)):
        assert _run(_config(tmp_path / name, validation={"share": 0.25, "every": every})) == 0
    frequent, rare = _weights(tmp_path / "a"), _weights(tmp_path / "b")
    for name, array in frequent.items():
        np.testing.assert_array_equal(array, rare[name], err_msg=name)


def test_a_nonfinite_update_stops_the_run_and_the_last_good_checkpoint_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_update_nonfinite(monkeypatch, update=3)
    assert _run(_config(tmp_path)) == 1
    error = capsys.readouterr().err
    assert (
        "error: stage thinkpo, update 3: the loss is nan and the gradient norm is nan. The update was not applied."
        in error
    )
    assert f"Its examples, counted among the rows used of {tmp_path / 'pairs.jsonl'}: " in error
    example_numbers = error.split("rows used of ")[1].split(": ")[1].split(".")[0].split(", ")
    assert 4 <= len(example_numbers) <= 8
    assert {int(number) for number in example_numbers} <= set(range(1, 25))
    folder = tmp_path / "run" / "thinkpo"
    assert {path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()} == {"1", "2"}
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    # The advice of the message works: the stage resumes from that checkpoint.
    assert _run(_config(tmp_path, on_nonfinite="skip")) == 0
    messages = capsys.readouterr().err
    assert "resuming from update 2" in messages
    assert "1 of at most 10 updates are skipped" in messages


def test_nonfinite_updates_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_update_nonfinite(monkeypatch, update=3)
    assert _run(_config(tmp_path, on_nonfinite="skip")) == 0
    messages = capsys.readouterr().err
    assert "warning: stage thinkpo, update 3: the loss is nan" in messages
    assert "1 of at most 10 updates are skipped" in messages
    lines = read_metrics(tmp_path / "run" / "thinkpo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.get("skipped") for line in lines] == [None, None, 1, None, None, None]
    assert "loss" not in lines[2]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert all(np.isfinite(array).all() for array in _weights(tmp_path).values())
    assert lines[-1]["rewards/margins"] > lines[3]["rewards/margins"] - 0.5


def test_too_many_skips_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = {"learning_rate": 1e30, "schedule": "constant", "warmup_ratio": 0.0}
    assert _run(_config(tmp_path, optimizer=huge, on_nonfinite="skip", max_skipped=2)) == 1
    error = capsys.readouterr().err
    assert "2 of at most 2 updates are skipped" in error
    assert "More than `max_skipped: 2` updates are skipped." in error
    assert "update 4" in error


def test_skipped_updates_do_not_advance_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_update_nonfinite(monkeypatch, update=3)
    linear = {"learning_rate": 1e-3, "schedule": "linear", "warmup_ratio": 0.0}
    assert _run(_config(tmp_path, optimizer=linear, on_nonfinite="skip")) == 0
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run" / "thinkpo" / "metrics.jsonl")]
    np.testing.assert_allclose(rates, [1e-3 * remaining / 6 for remaining in (6, 5, 4, 4, 3, 2)], rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"max_skipped": 3}, "`max_skipped` has no effect without `on_nonfinite: skip`"),
        ({"on_nonfinite": "ignore"}, "stages.thinkpo.on_nonfinite: Input should be 'stop' or 'skip'"),
        ({"validation": {"share": 0.9}}, "stages.thinkpo.validation.share: Input should be less than or equal to 0.5"),
        ({"validation": {"every": 5}}, "stages.thinkpo.validation.share is required"),
        ({"validation": {"shares": 0.1}}, "unknown key stages.thinkpo.validation.shares (did you mean share?)"),
    ],
    ids=str,
)
def test_invalid_stage_keys_are_errors(
    keys: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(_config(tmp_path, **keys)) == 2
    assert problem in capsys.readouterr().err


def test_a_sweep_computes_the_reference_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(_config(tmp_path, steps=1)) == 0
    assert "computing the log-probs of 24 examples" in capsys.readouterr().err
    sweep: tuple[dict[str, Any], ...] = ({"beta": 0.5}, {"loss": "ipo", "optimizer": {"learning_rate": 1e-4}})
    for number, keys in enumerate(sweep):
        assert _run(_config(tmp_path, run=f"sweep{number}", steps=1, **keys)) == 0
        messages = capsys.readouterr().err
        assert "the log-probs of all 24 examples are cached" in messages
        assert "the loss before the first update is" in messages


def test_a_resumed_stage_reuses_its_original_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_or_compute = train.load_or_compute_reference
    # Other packed rows would give values with another last bit.
    perturbed = lambda *args, **kwargs: np.nextafter(load_or_compute(*args, **kwargs), np.float32(0))  # noqa: E731
    monkeypatch.setattr(train, "load_or_compute_reference", perturbed)
    assert _run(_config(tmp_path)) == 0
    expected = _weights(tmp_path)
    folder = tmp_path / "run" / "thinkpo"
    monkeypatch.setattr(train, "load_or_compute_reference", load_or_compute)
    for damage in (False, True):
        shutil.rmtree(folder / "checkpoints")
        edit_record(folder / "stage.json", summary=None)
        if damage:
            content = bytearray((folder / "reference.npz").read_bytes())
            content[len(content) // 2] ^= 1
            (folder / "reference.npz").write_bytes(content)
        capsys.readouterr()
        assert _run(_config(tmp_path)) == 0
        assert ("reference.npz: damaged" in capsys.readouterr().err) == damage
        is_same = all((array == expected[name]).all() for name, array in _weights(tmp_path).items())
        assert is_same != damage


def test_a_reference_of_other_weights_is_an_error_before_the_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_or_compute = train.load_or_compute_reference
    monkeypatch.setattr(
        train, "load_or_compute_reference", lambda *args, **kwargs: load_or_compute(*args, **kwargs) + np.float32(0.3)
    )
    assert _run(_config(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "before the first update, the model's log-probs differ from the cached reference by" in error
    assert not (tmp_path / "run" / "thinkpo" / "metrics.jsonl").exists()


def test_a_learning_rate_of_1e_7_moves_the_weights_in_bfloat16_compute(tmp_path: Path) -> None:
    slow = {"learning_rate": 1e-7, "schedule": "constant", "warmup_ratio": 0.0, "moment_dtype": "bfloat16"}
    assert _run(_config(tmp_path, compute={"dtype": "bfloat16"}, optimizer=slow, steps=2)) == 0
    builtin = resolve_model_folder("builtin:miniature") / "model.safetensors"
    before, after = safetensors.numpy.load_file(builtin), _weights(tmp_path)
    change_by_name = {name: np.abs(after[name].astype(np.float32) - before[name].astype(np.float32)) for name in before}
    moved_fraction = np.mean(np.concatenate([(change > 0).ravel() for change in change_by_name.values()]))
    assert moved_fraction > 0.5
    assert max(change.max() for change in change_by_name.values()) < 3e-7  # two updates of 1e-7 each


def test_a_stage_can_be_trained_as_a_library_call(tmp_path: Path) -> None:
    """The call needs no YAML file and accepts any folder. It gives the same weights as the command, and resumes."""
    assert _run(_config(tmp_path, steps=3, validation={"share": 0.25, "every": 2})) == 0
    inputs = stage_inputs(tmp_path, steps=3, validation={"share": 0.25, "every": 2})
    result = train_stage(inputs)
    assert (result.num_updates, len(read_metrics(inputs.folder.metrics))) == (3, 3)
    assert [line["step"] for line in read_metrics(inputs.folder.validation)] == [0, 2, 3]
    save_model(
        result.state.model, tmp_path / "model", template_folder=inputs.initial_model.folder, dtype="float32",
        stop_token_ids=[1], model_card="",
    )  # fmt: skip
    expected = _weights(tmp_path)
    for name, array in safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors").items():
        np.testing.assert_array_equal(array, expected[name])
    resumed = train_stage(inputs)
    assert (int(resumed.state.step), resumed.seconds) == (3, result.seconds)
