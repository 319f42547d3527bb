"""A run of the commands: what is finished is not run again, a stop loses nothing, errors come before any work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.numpy
from filelock import FileLock
from support.paths import ROOT

from thinkpo_jax import evaluate, export, train
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.console import read_metrics

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SMALL = [
    "stages.sft.steps=6",
    "stages.thinkpo.steps=4",
    "stages.control.steps=2",
    "stages.sft.checkpoint={every: 2, keep: 3}",
    "evaluation.benchmarks=[{name: miniature, questions: 24}]",
    "evaluation.sampling={temperature: 0.7, max_new_tokens: 40, batch_size: 24}",
    "mesh={data: 2, fsdp: 2, tensor: 2}",
]
TIMES = {"seconds", "tokens_per_second", "padded_tokens_per_second", "tflops_per_device"}


def _arguments(folder: Path, *assignments: str) -> list[str]:
    return ["--config", QUICKSTART, "--set", *SMALL, f"run_dir={folder}", *assignments]


def _train(folder: Path, *assignments: str) -> int:
    return run_command(train.main, _arguments(folder, *assignments))


def _weights(folder: Path, stage: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / stage / "model" / "model.safetensors")


def _metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = read_metrics(folder / stage / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert _train(folder) == 0
    return folder


def test_the_run_folder_holds_what_is_promised(straight: Path) -> None:
    for stage in ("sft", "thinkpo", "control"):
        assert (straight / stage / "metrics.jsonl").exists()
        assert (straight / stage / "checkpoints").is_dir()
        assert (straight / stage / "model" / "config.json").exists()
    assert "# jax: " in (straight / "config.yaml").read_text()
    assert {path.name for path in (straight / "plots").iterdir()} == {
        "loss.png",
        "rewards.png",
        "accuracy.png",
        "response_length.png",
    }
    report = json.loads((straight / "report.json").read_text())
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


def test_the_first_thinkpo_update_starts_at_ln_2(straight: Path) -> None:
    first = _metrics(straight, "thinkpo")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_finished_stages_are_not_run_again(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*.safetensors")}
    capsys.readouterr()
    assert _train(straight) == 0
    said = capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*.safetensors")} == before
    assert "update" not in said.err
    assert "thinkpo" in said.out  # the table is printed again


def test_other_settings_for_a_finished_stage_are_an_error(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(straight, "stages.thinkpo.beta=0.2") == 2
    error = capsys.readouterr().err
    assert "stage.beta was 0.1, is 0.2" in error
    assert "run_dir" in error


def test_a_retrained_stage_asks_for_what_stands_on_it(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = json.loads((folder / "evaluation" / "control" / "miniature.json").read_text())["settings"]["model"]
    shutil.rmtree(folder / "sft")
    assert _train(folder, "seed=0", "stages.sft.optimizer.learning_rate=3e-3") == 2
    assert "there is no model, but stage 'thinkpo' was trained from it" in capsys.readouterr().err
    shutil.rmtree(folder / "thinkpo")
    shutil.rmtree(folder / "control")
    assert _train(folder, "stages.sft.optimizer.learning_rate=3e-3") == 0
    # The answers of the models that are gone are not those of the new ones.
    record = json.loads((folder / "evaluation" / "control" / "miniature.json").read_text())
    assert record["settings"]["model"] != before


def test_an_interrupted_stage_does_not_go_on_with_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "123456?", "response": "#1"}\n')
    folder = tmp_path / "run"
    steps = [f"stages.{stage}.steps=1" for stage in ("sft", "thinkpo", "control")]
    arguments = [f"stages.sft.data={{path: '{data}'}}", *steps, "evaluation=null"]
    assert _train(folder, *arguments) == 0
    record = json.loads((folder / "sft" / "stage.json").read_text())
    (folder / "sft" / "stage.json").write_text(json.dumps(record | {"summary": None}))
    data.write_text('{"prompt": "123456?", "response": "#2"}\n')
    assert _train(folder, *arguments) == 2
    assert "begun with other data" in capsys.readouterr().err


def test_a_stop_in_the_last_update_of_a_stage_stops_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = _command(folder, "stages.sft.steps=1")
    assert _interrupt(arguments, folder / "sft" / "metrics.jsonl", signal.SIGINT, lines=1) == 130
    assert not (folder / "evaluation").exists()


def _command(folder: Path, *assignments: str) -> list[str]:
    return [sys.executable, "-m", "thinkpo_jax.train", *_arguments(folder, *assignments)]


def _interrupt(arguments: Sequence[str], metrics: Path, number: int, *, lines: int) -> int:
    """Starts a command, sends it a signal once the metrics file has that many lines, and gives its exit status."""
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(read_metrics(metrics)) < lines and process.poll() is None:
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=600)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl-c", "sigterm", "kill -9"]
)
def test_stop_and_resume_equals_a_straight_run_bit_for_bit(
    number: signal.Signals, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    slow = ["stages.sft.steps=6"]
    status = _interrupt(_command(folder, *slow), folder / "sft" / "metrics.jsonl", number, lines=3)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status in (130, 0)  # 0 where the run was over before the signal came
    assert _train(folder) == 0
    for stage in ("sft", "thinkpo", "control"):
        assert _metrics(folder, stage) == _metrics(straight, stage)
        expected, found = _weights(straight, stage), _weights(folder, stage)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{stage} {name}")


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    metrics = folder / "sft" / "metrics.jsonl"
    many = ["stages.sft.steps=3000", "stages.sft.checkpoint={every: 3000}"]
    assert _interrupt(_command(folder, *many), metrics, signal.SIGINT, lines=3) == 130
    stopped = len(read_metrics(metrics))
    assert stopped < 3000
    steps = [int(path.name) for path in (folder / "sft" / "checkpoints").iterdir() if path.name.isdigit()]
    assert steps == [stopped]


def test_export_writes_a_checkpoint_as_a_model(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    arguments = ["--run", str(straight), "--stage", "thinkpo", "--out", str(out), "--dtype", "float32"]
    assert run_command(export.main, arguments) == 0
    expected, found = _weights(straight, "thinkpo"), safetensors.numpy.load_file(out / "model.safetensors")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert run_command(export.main, arguments) == 2  # never over a folder that is there
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


def test_every_checkpoint_of_a_mesh_exports_on_one_device(straight: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XLA_FLAGS": ""}
    arguments = [sys.executable, "-c", EXPORT_ALL, str(straight), str(tmp_path)]
    told = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    lines = [f"{tmp_path}/step{step}: stage sft, update {step}, float32\n" for step in (2, 4, 6)]
    assert told.stderr == "".join(lines)
    first, _, last = (safetensors.numpy.load_file(tmp_path / f"step{n}" / "model.safetensors") for n in (2, 4, 6))
    end = _weights(straight, "sft")
    assert all(np.array_equal(last[name], end[name]) for name in end)
    assert any(not np.array_equal(first[name], end[name]) for name in end)


def test_any_model_can_be_evaluated(straight: Path, tmp_path: Path) -> None:
    arguments = [*_arguments(straight), "--model", str(straight / "sft" / "model"), "--out", str(tmp_path / "other")]
    assert run_command(evaluate.main, arguments) == 0
    theirs = json.loads((tmp_path / "other" / "report.json").read_text())["models"]["base"]
    ours = json.loads((straight / "report.json").read_text())["models"]["sft"]
    assert theirs == ours


def test_pooling_two_runs(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "seed1"
    shutil.copytree(straight, other)
    config = (other / "config.yaml").read_text()
    assert run_command(evaluate.main, ["--pool", str(straight), str(other)]) == 2
    assert "have the same seed, 0" in capsys.readouterr().err
    (other / "config.yaml").write_text(config.replace("seed: 0", "seed: 1").replace("beta: 0.1", "beta: 0.2"))
    assert run_command(evaluate.main, ["--pool", str(straight), str(other)]) == 2
    assert "stages differ from" in capsys.readouterr().err
    (other / "config.yaml").write_text(config.replace("seed: 0", "seed: 1"))
    assert run_command(evaluate.main, ["--pool", str(straight), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "sft -> thinkpo, 2 runs, 24 paired questions" in lines[1]


ERRORS = {
    "unknown key": (["stages.sft.batch.sise=3"], "stages.0.batch.sise (did you mean size?)"),
    "bad value": (["stages.thinkpo.beta=-1"], "stages.1.beta"),
    "missing model": (["model.path=./nowhere"], "./nowhere"),
    "folder without config.json": (["model.path={empty}"], "config.json: there is no such file"),
    "missing data file": (["stages.sft.data={path: nowhere.jsonl}"], "nowhere.jsonl: there is no such file"),
    "empty data file": (["stages.sft.data={path: '{empty}/empty.jsonl'}"], "empty.jsonl: there are no rows"),
    "row without the field": (["stages.sft.data={path: '{empty}/row.jsonl'}"], "row.jsonl, line 1: no field 'prompt'"),
    "missing benchmark file": (
        ["evaluation.benchmarks=[{name: gsm8k, path: nowhere.jsonl}]"],
        "nowhere.jsonl: there is no such file",
    ),
    "same benchmark twice": (["evaluation.benchmarks=[{name: miniature}, {name: miniature}]"], "named twice"),
    "no effect": (["evaluation.sampling={temperature: 0, samples: 4}"], "have no effect"),
    "run_dir is a file": (["run_dir={empty}/row.jsonl"], "run_dir"),
    "mesh": (["mesh={data: 3, fsdp: 1, tensor: 1}"], "does not fit 8"),
    "seed": (["seed=1000000000000000000000000000000"], "seed"),
    "rows beyond all memory": (["stages.sft.batch.row_length=1000000000000"], "stages.0.batch.row_length"),
    "epochs without end": (["stages.sft.epochs=1.0e+300"], "stages.0.epochs"),
    "too many questions": (["evaluation.benchmarks=[{name: miniature, questions: 200000}]"], "questions"),
    "no path": (["model.path=''"], "model.path: expected a path or a name, found an empty text"),
    "long path": ([f"model.path={'x' * 300}"], "longer than 255 bytes"),
    "no home": (["model.path=~no-such-user/model"], "model.path: cannot be a path"),
    "no date": (["title=2026-13-45"], "not valid YAML"),
    "a name of the run's": (["stages.thinkpo.name=report.md"], "is taken"),
    "second stage is checked first": (["stages.control.data={path: nowhere.jsonl}"], "stage control: nowhere.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_a_users_error_is_one_message_and_nothing_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "empty.jsonl").write_text("")
    (empty / "row.jsonl").write_text('{"question": "1", "response": "2"}\n')
    assignments, expected = ERRORS[case]
    folder = tmp_path / "run"
    assert _train(folder, *(text.replace("{empty}", str(empty)) for text in assignments)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not folder.exists()


def test_a_run_has_one_writer(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(straight / ".lock"):
        assert _train(straight) == 2
    assert f"another process writes to {straight}" in capsys.readouterr().err


DAMAGED = {
    "record": (
        "sft/stage.json",
        '{"format": 2}',
        "sft/stage.json is damaged: settings, data_digest, summary is missing",
    ),
    "older record": (
        "sft/stage.json",
        '{"settings": {}, "data": "0", "summary": null}',
        "stage.json has no format number",
    ),
    "newer record": ("sft/stage.json", '{"format": 3}', "sft/stage.json has format 3, but this version of thinkpo_jax"),
    "answers": ("evaluation/sft/miniature.json", "{", "miniature.json: cannot be read as JSON"),
    "metrics": ("thinkpo/metrics.jsonl", "{\n", "thinkpo/metrics.jsonl: damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_of_a_run_is_named(
    case: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, expected = DAMAGED[case]
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    (folder / name).write_text(content)
    assert _train(folder) == 2
    assert expected in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    (folder / "thinkpo" / "checkpoints" / "9").mkdir()
    arguments = ["--run", str(folder), "--stage", "thinkpo", "--out", str(tmp_path / "out")]
    assert run_command(export.main, arguments) == 2
    assert "checkpoints/9: the checkpoint cannot be read" in capsys.readouterr().err
    assert run_command(export.main, [*arguments, "--step", "4"]) == 0


def test_export_leaves_other_folders_alone(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / ".out.partial" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert run_command(export.main, ["--run", str(straight), "--out", str(tmp_path / "out")]) == 2
    assert mine.read_text() == "mine"
    assert run_command(export.main, ["--run", str(straight), "--out", str(mine / "out")]) == 2
    assert (
        run_command(export.main, ["--run", str(straight), "--stage", "../sft", "--out", str(tmp_path / "other")]) == 2
    )
    assert run_command(export.main, ["--run", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")]) == 2
    errors = capsys.readouterr().err
    for part in (
        "left from an interrupted export",
        "cannot be written",
        "there is no stage '../sft'",
        "no config.yaml there",
    ):
        assert part in errors


def test_trouble_with_the_disk_is_exit_status_1(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "plots")
    (folder / "plots").write_text("a file where a folder should be")
    assert _train(folder) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: [Errno")


def test_ctrl_c_while_answers_are_sampled_ends_as_it_should(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    many = "evaluation.benchmarks=[{name: miniature, questions: 3000}]"
    arguments = [sys.executable, "-m", "thinkpo_jax.evaluate", *_arguments(folder, many)]
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("base on miniature: answer"):
                process.send_signal(signal.SIGINT)
                break
        assert "goes on from what is saved" in process.stderr.read()
        assert process.wait(timeout=600) == 130


def test_a_missing_config_file_is_exit_status_2() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-m", "thinkpo_jax.train", "--config", "nowhere.yaml"]
    told = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert told.returncode == 2
    assert told.stderr == "error: nowhere.yaml: there is no such file. Give an existing YAML file with --config.\n"


@pytest.mark.parametrize("module", [train, evaluate, export], ids=lambda module: module.__name__)
def test_help_shows_an_example(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert f"python -m {module.__name__} --" in capsys.readouterr().out.partition("example")[2]
