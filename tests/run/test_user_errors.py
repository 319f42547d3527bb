"""Tests that the commands report a user error with one clear message before any work starts."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT
from support.quickstart import train_quickstart

from thinkpo_jax import evaluate, export, train

# {empty} is a folder with an empty and a wrong data file.
ERRORS = {
    "unknown key": (["stages.sft.batch.sise=3"], "stages.sft.batch.sise (did you mean size?)"),
    "bad value": (["stages.thinkpo.beta=-1"], "stages.thinkpo.beta"),
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
    "options without effect": (["evaluation.sampling={temperature: 0, samples: 4}"], "have no effect"),
    "run_dir is a file": (["run_dir={empty}/row.jsonl"], "run_dir"),
    "mesh that does not fit the devices": (["mesh={data: 3, fsdp: 1, tensor: 1}"], "does not fit 8"),
    "seed too large": (["seed=1000000000000000000000000000000"], "seed"),
    "rows larger than any memory": (["stages.sft.batch.row_length=1000000000000"], "stages.sft.batch.row_length"),
    "far too many epochs": (["stages.sft.epochs=1.0e+300"], "stages.sft.epochs"),
    "too many questions": (["evaluation.benchmarks=[{name: miniature, questions: 200000}]"], "questions"),
    "empty path": (["model.path=''"], "model.path: expected a path or a name, found an empty text"),
    "path too long": ([f"model.path={'x' * 300}"], "longer than 255 bytes"),
    "unknown home folder": (["model.path=~no-such-user/model"], "model.path: cannot be a path"),
    "octal number": (["seed=010"], "--set seed=010: 010 may be an octal number. Write 10 for the decimal number, 8"),
    "run_dir is a URL": (["run_dir=s3://bucket/run"], "run_dir: expected gs://BUCKET/FOLDER, with letters, digits"),
    "unset variable": (["run_dir=$NO_SUCH/run"], "run_dir: the environment variable NO_SUCH is not set. Set it"),
    "key of another program": (["output_dir=x"], "unknown key output_dir. Use `run_dir`, the folder of the run."),
    "reserved stage name": (["stages.thinkpo.name=report.md"], "is taken"),
    "second stage is checked first": (["stages.control.data={path: nowhere.jsonl}"], "stage control: nowhere.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_a_user_error_is_one_message_and_writes_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "empty.jsonl").write_text("")
    (empty / "row.jsonl").write_text('{"question": "1", "response": "2"}\n')
    assignments, expected = ERRORS[case]
    folder = tmp_path / "run"
    assert train_quickstart(folder, *(text.replace("{empty}", str(empty)) for text in assignments)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not folder.exists()


def test_a_missing_config_file_ends_with_exit_status_2() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-m", "thinkpo_jax.train", "--config", "nowhere.yaml"]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 2
    searched = f"there is no such file (searched from the working directory {ROOT})"
    assert result.stderr == f"error: nowhere.yaml: {searched}. Give an existing YAML file with --config.\n"


@pytest.mark.parametrize("module", [train, evaluate, export], ids=lambda module: module.__name__)
def test_help_shows_an_example(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        module.main(["--help"])
    assert exit_info.value.code == 0
    assert f"python -m {module.__name__} --" in capsys.readouterr().out.partition("example")[2]
