"""Damages each file of a run in several ways, and runs a command again. No damage is used in silence.

`pytest -m faults` runs all cases. The end of its output says how many of them had which outcome.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.faults import DAMAGES, Outcome, judge, read_result
from support.quickstart import quickstart_arguments, train_quickstart
from support.selection import combinations
from support.stages import edit_record

from thinkpo_jax import evaluate, export, train

pytestmark = pytest.mark.faults

# Of each kind, all files are damaged in turn, one in each case.
KINDS = {
    "model weights": "*/model/model.safetensors",
    "model tokenizer": "*/model/tokenizer*.json",
    "model configuration": "*/model/*config.json",
    "model manifest": "*/model/thinkpo_jax_manifest.json",
    "chat template": "*/model/chat_template.jinja",
    "stage record": "*/stage.json",
    "metrics": "*/metrics.jsonl",
    "reference": "*/reference.npz",
    "resolved configuration": "config.yaml",
    "report": "report.json",
    "answers": "evaluation/*/*.answers.jsonl",
    "verdicts": "evaluation/*/miniature.json",
}
SHORT = {("model weights", "flip"), ("stage record", "flip"), ("answers", "flip"), ("verdicts", "cut")}
NUMBERS = range(4)  # cases of each kind and damage


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train_quickstart(folder) == 0
    return folder


@pytest.fixture(scope="module")
def begun_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first stage only, as a stop after update 4 of 6 leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "begun"
    shutil.copytree(finished_run / "sft", folder / "sft")
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    config |= {"stages": config["stages"][:1], "evaluation": None}
    (folder / "config.yaml").write_text("# thinkpo_jax: \n" + yaml.safe_dump(config, sort_keys=False))
    edit_record(folder / "sft" / "stage.json", summary=None)
    for name in ("model", "checkpoints/6"):
        shutil.rmtree(folder / "sft" / name)
    return folder


def check(record_property: Callable[[str, object], None], outcome: Outcome, text: str, expected: set[Outcome]) -> None:
    record_property("outcome of a fault", outcome.value)
    assert outcome in expected, text


def damage(run: Path, pattern: str, kind: str, number: int) -> Path:
    """Damages a file that matches the pattern, and returns its path. The number chooses the file and the place."""
    chance = random.Random(f"{pattern} {kind} {number}")
    files = [path for path in sorted(run.glob(pattern)) if path.is_file() and path.stat().st_size]
    file = files[number % len(files)]
    DAMAGES[kind](file, chance)
    return file


def weights_digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def is_short(*case: object) -> bool:
    return case[:2] in SHORT and case[2] == 0


@pytest.mark.parametrize(("kind", "how", "number"), combinations(KINDS, DAMAGES, NUMBERS, short=is_short))
def test_a_rerun_of_a_finished_run(
    kind: str,
    how: str,
    number: int,
    finished_run: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    file = damage(run, KINDS[kind], how, number)
    arguments, expected = quickstart_arguments(run), read_result(finished_run)
    judged = judge(train.main, arguments, damaged=file, result=lambda: read_result(run), expected=expected)
    check(record_property, *judged, {Outcome.SAME, Outcome.REFUSED})


@pytest.mark.parametrize(
    ("pattern", "how", "number"),
    combinations(
        ["sft/checkpoints/4/**/*", "sft/checkpoints/*/**/*", "sft/metrics.jsonl", "sft/stage.json"],
        DAMAGES,
        range(12),
        short=lambda pattern, how, number: "4" in pattern and how == "flip" and number < 2,
    ),
)
def test_a_resumed_stage(
    pattern: str,
    how: str,
    number: int,
    finished_run: Path,
    begun_run: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun_run, run)
    file = damage(run, pattern, how, number)
    arguments = ["--config", str(run / "config.yaml"), "--set", f"run_dir={run}"]

    model, expected = run / "sft" / "model", weights_digest(finished_run / "sft" / "model")
    judged = judge(train.main, arguments, damaged=file, result=lambda: weights_digest(model), expected=expected)
    check(record_property, *judged, {Outcome.SAME, Outcome.REFUSED})


@pytest.mark.parametrize(
    ("pattern", "how", "number"),
    combinations(
        ["thinkpo/checkpoints/4/**/*", "thinkpo/stage.json", "config.yaml", "thinkpo/metrics.jsonl"],
        DAMAGES,
        range(4),
        short=lambda *case: case == ("thinkpo/checkpoints/4/**/*", "flip", 0),
    ),
)
def test_an_export(
    pattern: str,
    how: str,
    number: int,
    finished_run: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(finished_run, run)
    file = damage(run, pattern, how, number)
    arguments = ["--run", str(run), "--stage", "thinkpo", "--out", str(out), "--dtype", "float32"]

    expected = weights_digest(finished_run / "thinkpo" / "model")
    judged = judge(export.main, arguments, damaged=file, result=lambda: weights_digest(out), expected=expected)
    check(record_property, *judged, {Outcome.SAME, Outcome.REFUSED, Outcome.REPORTED})


@pytest.mark.parametrize(
    ("name", "how", "number"),
    combinations(
        ["model.safetensors", "chat_template.jinja", "tokenizer.json", "config.json", "thinkpo_jax_manifest.json"],
        DAMAGES,
        range(2),
        short=lambda *case: case == ("model.safetensors", "flip", 0),
    ),
)
def test_an_evaluation_of_a_stage(
    name: str,
    how: str,
    number: int,
    finished_run: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(finished_run, run)
    file = damage(run, f"thinkpo/model/{name}", how, number)
    arguments = ["--config", str(finished_run / "config.yaml"), "--model", f"{run}:thinkpo", "--out", str(out)]

    def scores(path: Path) -> object:
        return json.loads(path.read_text())["models"]["thinkpo"]

    judged = judge(evaluate.main, arguments, damaged=file, result=lambda: scores(out / "report.json"), expected=None)
    check(record_property, *judged, {Outcome.REFUSED})
