"""Tests a whole run of the commands: train, evaluate and export.

Finished stages are not repeated. An interrupted run resumes with equal results. Damaged files are reported.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from filelock import FileLock
from support.disks import on_small_disk
from support.faults import Outcome
from support.paths import ROOT
from support.quickstart import quickstart_arguments, train_quickstart
from support.selection import cases
from support.stages import TIME_METRICS, edit_record

from thinkpo_jax import evaluate, export
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.console import read_metrics


def _weights(folder: Path, stage: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / stage / "model" / "model.safetensors")


def _metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = read_metrics(folder / stage / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIME_METRICS} for line in lines]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train_quickstart(folder) == 0
    return folder


def test_the_run_folder_holds_all_outputs(finished_run: Path) -> None:
    for stage in ("sft", "thinkpo", "control"):
        assert (finished_run / stage / "metrics.jsonl").exists()
        assert (finished_run / stage / "checkpoints").is_dir()
        assert (finished_run / stage / "model" / "config.json").exists()
    assert "# jax: " in (finished_run / "config.yaml").read_text()
    assert {path.name for path in (finished_run / "plots").iterdir()} == {
        "loss.png",
        "rewards.png",
        "accuracy.png",
        "accuracy_by_length.png",
        "accuracy_by_budget.png",
        "response_length.png",
    }
    comparisons = {path.name for path in (finished_run / "comparisons" / "miniature").iterdir()}
    assert comparisons == {"base+sft.md", "sft+thinkpo.md", "sft+control.md", "control+thinkpo.md"}
    report = json.loads((finished_run / "report.json").read_text())
    assert report["prompts"]["miniature"] in (finished_run / "report.md").read_text()
    assert list(report["models"]) == ["base", "sft", "thinkpo", "control"]
    for benchmarks in report["models"].values():
        assert benchmarks["miniature"].keys() == {
            "accuracy", "ci95", "mean_response_tokens", "truncation_rate", "num_questions", "num_samples",
        }  # fmt: skip
    expected = {"from", "to", "benchmark", "accuracy_difference", "ci95", "p_value", "response_tokens_difference"}
    assert all(expected <= row.keys() for row in report["comparisons"])
    assert [(row["from"], row["to"]) for row in report["comparisons"]] == [
        ("base", "sft"), ("sft", "thinkpo"), ("sft", "control"), ("control", "thinkpo"),
    ]  # fmt: skip


def test_the_first_thinkpo_loss_is_ln_2(finished_run: Path) -> None:
    first = _metrics(finished_run, "thinkpo")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_finished_stages_are_not_trained_again(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")}
    capsys.readouterr()
    assert train_quickstart(finished_run) == 0
    output = capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")} == before
    assert "update" not in output.err
    assert "thinkpo" in output.out  # the table is printed again


def test_changed_settings_of_a_finished_stage_are_an_error(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_quickstart(finished_run, "stages.thinkpo.beta=0.2") == 2
    error = capsys.readouterr().err
    assert "stage.beta was 0.1, is 0.2" in error
    assert "run_dir" in error


def test_retraining_a_stage_requires_retraining_the_stages_after_it(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    before = json.loads((folder / "evaluation" / "control" / "miniature.json").read_text())["settings"]["model"]
    shutil.rmtree(folder / "sft")
    assert train_quickstart(folder, "seed=0", "stages.sft.optimizer.learning_rate=3e-3") == 2
    assert "sft/stage.json is missing, but stage 'thinkpo' was trained from it" in capsys.readouterr().err
    shutil.rmtree(folder / "thinkpo")
    shutil.rmtree(folder / "control")
    assert train_quickstart(folder, "stages.sft.optimizer.learning_rate=3e-3") == 0
    # The new models were evaluated again. Saved answers of the old models are not reused.
    record = json.loads((folder / "evaluation" / "control" / "miniature.json").read_text())
    assert record["settings"]["model"] != before


@pytest.mark.faults(Outcome.REFUSED)
def test_an_interrupted_stage_does_not_resume_with_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "123456?", "response": "#1"}\n')
    folder = tmp_path / "run"
    steps = [f"stages.{stage}.steps=1" for stage in ("sft", "thinkpo", "control")]
    arguments = [f"stages.sft.data={{path: '{data}'}}", *steps, "evaluation=null"]
    assert train_quickstart(folder, *arguments) == 0
    edit_record(folder / "sft" / "stage.json", summary=None)
    data.write_text('{"prompt": "123456?", "response": "#2"}\n')
    assert train_quickstart(folder, *arguments) == 2
    assert "begun with other data" in capsys.readouterr().err


@pytest.mark.faults(Outcome.SAME)
def test_ctrl_c_in_the_last_update_of_a_stage_stops_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = _train_command(folder, "stages.sft.steps=1")
    assert _interrupt(arguments, folder / "sft" / "metrics.jsonl", signal.SIGINT, lines=1) == 130
    assert not (folder / "evaluation").exists()


def _train_command(folder: Path, *assignments: str) -> list[str]:
    return [sys.executable, "-m", "thinkpo_jax.train", *quickstart_arguments(folder, *assignments)]


def _interrupt(arguments: Sequence[str], metrics: Path, number: int, *, lines: int) -> int:
    """Starts a command and sends it a signal once the metrics file has `lines` lines. Returns the exit status."""
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(read_metrics(metrics)) < lines and process.poll() is None:
        assert time.monotonic() < deadline, f"the run did not write {lines} lines in 600 s"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=600)


@pytest.mark.parametrize(
    "number",
    cases([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], short=lambda number: number == signal.SIGKILL),
    ids=["ctrl-c", "sigterm", "kill -9"],
)
@pytest.mark.faults(Outcome.SAME)
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(
    number: signal.Signals, finished_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    status = _interrupt(_train_command(folder, "stages.sft.steps=6"), folder / "sft" / "metrics.jsonl", number, lines=3)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status in (130, 0)  # 0 if the run ended before the signal came
    assert train_quickstart(folder) == 0
    for stage in ("sft", "thinkpo", "control"):
        assert _metrics(folder, stage) == _metrics(finished_run, stage)
        expected, resumed = _weights(finished_run, stage), _weights(folder, stage)
        for name, array in expected.items():
            np.testing.assert_array_equal(resumed[name], array, err_msg=f"{stage} {name}")


def test_ctrl_c_saves_a_checkpoint_of_the_last_update(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    metrics = folder / "sft" / "metrics.jsonl"
    long_run = ["stages.sft.steps=3000", "stages.sft.checkpoint={every: 3000}"]
    assert _interrupt(_train_command(folder, *long_run), metrics, signal.SIGINT, lines=3) == 130
    last_update = len(read_metrics(metrics))
    assert last_update < 3000
    steps = [int(path.name) for path in (folder / "sft" / "checkpoints").iterdir() if path.name.isdigit()]
    assert steps == [last_update]


def test_export_writes_a_checkpoint_as_a_model(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    arguments = ["--run", str(finished_run), "--stage", "thinkpo", "--out", str(out), "--dtype", "float32"]
    assert run_command(export.main, arguments) == 0
    expected, exported = _weights(finished_run, "thinkpo"), safetensors.numpy.load_file(out / "model.safetensors")
    for name, array in expected.items():
        np.testing.assert_array_equal(exported[name], array)
    assert run_command(export.main, arguments) == 2  # an existing folder is not overwritten
    card = (out / "README.md").read_text()
    for part in (
        "base_model: builtin:miniature",
        "beta: 0.1",
        "examples",
        "digest of the tokenized data",
        "Metrics of update 4",
        "rewards/margins",
        "miniature: accuracy",
        "jax: ",
    ):
        assert part in card


EXPORT_ALL = """
import contextlib, runpy, sys

run, out = sys.argv[1:]
for step in ("2", "4", "6"):
    arguments = ["--run", run, "--stage", "sft", "--step", step, "--out", f"{out}/step{step}", "--dtype", "float32"]
    sys.argv = ["export", *arguments]
    with contextlib.suppress(SystemExit):
        runpy.run_module("thinkpo_jax.export", run_name="__main__")
"""


def test_every_checkpoint_of_a_mesh_can_be_exported_on_one_device(finished_run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XLA_FLAGS": ""}
    arguments = [sys.executable, "-c", EXPORT_ALL, str(finished_run), str(tmp_path)]
    result = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [f"{tmp_path}/step{step}: stage sft, update {step}, float32\n" for step in (2, 4, 6)]
    assert result.stderr == "".join(lines)
    first, _, last = (safetensors.numpy.load_file(tmp_path / f"step{n}" / "model.safetensors") for n in (2, 4, 6))
    final = _weights(finished_run, "sft")
    assert all(np.array_equal(last[name], final[name]) for name in final)
    assert any(not np.array_equal(first[name], final[name]) for name in final)


def test_evaluating_an_exported_model_gives_the_scores_of_its_run(finished_run: Path, tmp_path: Path) -> None:
    arguments = [
        *quickstart_arguments(finished_run),
        "--model",
        str(finished_run / "sft" / "model"),
        "--out",
        str(tmp_path / "other"),
    ]
    assert run_command(evaluate.main, arguments) == 0
    (scores,) = json.loads((tmp_path / "other" / "report.json").read_text())["models"].values()
    run_scores = json.loads((finished_run / "report.json").read_text())["models"]["sft"]
    assert scores == run_scores


def test_pooling_needs_runs_that_differ_only_in_the_seed(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_run = tmp_path / "seed1"
    shutil.copytree(finished_run, second_run)
    config = (second_run / "config.yaml").read_text()
    assert run_command(evaluate.main, ["--pool", str(finished_run), str(second_run)]) == 2
    assert "have the same seed, 0" in capsys.readouterr().err
    (second_run / "config.yaml").write_text(config.replace("seed: 0", "seed: 1").replace("beta: 0.1", "beta: 0.2"))
    assert run_command(evaluate.main, ["--pool", str(finished_run), str(second_run)]) == 2
    assert "stages differ from" in capsys.readouterr().err
    # The same model may lie at another path, but another model may not.
    moved = config.replace("seed: 0", "seed: 1").replace("builtin:miniature", "elsewhere/miniature")
    assert moved.count("elsewhere") == 1
    (second_run / "config.yaml").write_text(moved)
    answers = second_run / "evaluation" / "base" / "miniature.json"
    settings = json.loads(answers.read_text())["settings"]
    edit_record(answers, settings=settings | {"model": "another"})
    assert run_command(evaluate.main, ["--pool", str(finished_run), str(second_run)]) == 2
    assert "model differ from" in capsys.readouterr().err
    edit_record(answers, settings=settings)
    assert run_command(evaluate.main, ["--pool", str(finished_run), str(second_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "sft -> thinkpo, 2 runs, 24 paired questions" in lines[1]


def test_a_locked_run_is_an_error(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(finished_run / ".lock"):
        assert train_quickstart(finished_run) == 2
    assert f"another process writes to {finished_run}" in capsys.readouterr().err


DAMAGED = {
    "record": (
        "sft/stage.json",
        '{"format": 3}',
        "sft/stage.json is damaged: settings, data_digest, summary is missing",
    ),
    "older record": (
        "sft/stage.json",
        '{"settings": {}, "data": "0", "summary": null}',
        "stage.json has no format number",
    ),
    "newer record": ("sft/stage.json", '{"format": 4}', "sft/stage.json has format 4, but this version of thinkpo_jax"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.faults(Outcome.REFUSED)
def test_the_error_names_a_damaged_file_of_a_run(
    case: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, expected = DAMAGED[case]
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    (folder / name).write_text(content)
    assert train_quickstart(folder) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.faults(Outcome.REFUSED)
def test_the_error_names_a_damaged_checkpoint(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    (folder / "thinkpo" / "checkpoints" / "9").mkdir()
    arguments = ["--run", str(folder), "--stage", "thinkpo", "--out", str(tmp_path / "out")]
    assert run_command(export.main, [*arguments, "--step", "9"]) == 2
    assert "checkpoints/9: damaged: model/thinkpo_jax_manifest.json is missing" in capsys.readouterr().err
    assert run_command(export.main, arguments) == 0
    warning, exported = capsys.readouterr().err.splitlines()
    assert warning.endswith("This checkpoint is not used.")
    assert exported.endswith("out: stage thinkpo, update 4, bfloat16")


def test_export_errors_do_not_change_other_folders(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user_file = tmp_path / ".out.partial" / "thesis.txt"
    user_file.parent.mkdir()
    user_file.write_text("mine")
    assert run_command(export.main, ["--run", str(finished_run), "--out", str(tmp_path / "out")]) == 0
    assert user_file.read_text() == "mine"
    assert run_command(export.main, ["--run", str(finished_run), "--out", str(user_file / "out")]) == 2
    assert (
        run_command(export.main, ["--run", str(finished_run), "--stage", "../sft", "--out", str(tmp_path / "other")])
        == 2
    )
    assert run_command(export.main, ["--run", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")]) == 2
    errors = capsys.readouterr().err
    for part in (
        "cannot be written",
        "there is no stage '../sft'",
        "nowhere/config.yaml: there is no such file. Give the folder of a run.",
    ):
        assert part in errors


@pytest.mark.faults(Outcome.REFUSED)
def test_an_export_to_a_full_disk_is_one_message_and_leaves_nothing(finished_run: Path) -> None:
    export = f"{sys.executable} -m thinkpo_jax.export --run {finished_run} --stage sft --out /mnt/model"
    script = f"{export}; echo status $?; ls -A /mnt; mount -o remount,size=50m /mnt; {export}; ls -A /mnt"
    command = [*on_small_disk("100k"), "sh", "-c", script]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert result.stdout == "status 2\nmodel\n"
    error, exported = result.stderr.splitlines()
    assert error.startswith("error: --out /mnt/model cannot be written: ")
    assert "No space left on device" in error
    assert exported == "/mnt/model: stage sft, update 6, bfloat16"


@pytest.mark.faults(Outcome.SAME)
def test_an_export_removes_what_a_killed_export_left(finished_run: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".out.thinkpo_jax-partial" / "model.safetensors"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    assert run_command(export.main, ["--run", str(finished_run), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_os_error_ends_with_exit_status_1(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "plots")
    (folder / "plots").write_text("a file where a folder should be")
    assert train_quickstart(folder) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: [Errno")


@pytest.mark.faults(Outcome.SAME)
def test_ctrl_c_during_evaluation_keeps_the_saved_answers(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    many_questions = "evaluation.benchmarks=[{name: miniature, questions: 3000}]"
    arguments = [sys.executable, "-m", "thinkpo_jax.evaluate", *quickstart_arguments(folder, many_questions)]
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("base on miniature: answer"):
                process.send_signal(signal.SIGINT)
                break
        assert "goes on from what is saved" in process.stderr.read()
        assert process.wait(timeout=600) == 130
