"""A run with probes: its files and its report, what it says of bad keys, and that a probe may change."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.stages import ROWS, STAGE

from thinkpo_jax.run.resolve import resolve_run
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.train import main

EVALUATION: dict[str, Any] = {
    "benchmarks": [{"name": "miniature", "questions": 5}],
    "sampling": {"temperature": 0.7, "max_new_tokens": 12},
}


def _raw(folder: Path, probe: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": "builtin:miniature"},
        "compute": {"dtype": "float32"},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "stages": [STAGE | {"steps": 3, "data": {"path": str(path)}, "probe": probe}],
        "evaluation": EVALUATION,
    } | changes


def _train(folder: Path, probe: dict[str, Any] | None) -> int:
    (folder / "run.yaml").write_text(yaml.safe_dump(_raw(folder, probe)))
    return run_command(main, ["--config", str(folder / "run.yaml")])


def test_a_run_writes_and_plots_its_probes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path, {"every": 2, "questions": 8}) == 0
    log, run = capsys.readouterr().err, tmp_path / "run"
    assert log.count("thinkpo: probe.questions is 8, but miniature has 5 questions. All are asked.") == 1
    lines = read_metrics(run / "thinkpo" / "probe.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 3]
    names = {"step", "accuracy", "mean_response_tokens", "truncation_rate", "finished_thoughts"}
    for line in lines:
        assert line.keys() == names
        assert 5 * line["accuracy"] == pytest.approx(round(5 * line["accuracy"])), "a share of all five questions"
        figures = ", ".join(f"{name.replace('_', ' ')} {line[name]:.4g}" for name in line if name != "step")
        assert f"probe after {line['step']} updates (" in log
        assert f" s): {figures}\n" in log
    assert (run / "plots" / "probe.png").read_bytes().startswith(b"\x89PNG")
    report = (run / "report.md").read_text()
    assert "](plots/probe.png)" in report
    for line in (lines[0], lines[-1]):
        assert (
            f"| thinkpo | {line['step']} | {100 * line['accuracy']:.1f} | {line['mean_response_tokens']:.1f} |"
            in report
        )
    assert json.loads((run / "report.json").read_text())["probes"] == {"thinkpo": lines}
    # The finished stage stays finished with another probe, or without one.
    for probe in ({"every": 1, "questions": 2, "max_new_tokens": 3}, None):
        assert _train(tmp_path, probe) == 0
        assert "probe after" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("probe", "problem"),
    [
        ({"every": 0}, "stages.thinkpo.probe.every: Input should be greater than or equal to 1"),
        ({"questions": 0}, "stages.thinkpo.probe.questions: Input should be greater than or equal to 1"),
        ({"max_new_tokens": 0}, "stages.thinkpo.probe.max_new_tokens: Input should be greater than or equal to 1"),
        ({"evry": 5}, "unknown key stages.thinkpo.probe.evry (did you mean every?)"),
    ],
    ids=str,
)
def test_invalid_keys_are_named(probe: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        parse_config(RunConfig, _raw(tmp_path, probe), source="test")
    assert problem in str(error.value)


def test_a_probe_without_an_evaluation_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.thinkpo\.probe asks questions .* there is no such section"):
        parse_config(RunConfig, _raw(tmp_path, {}, evaluation=None), source="test")
    parse_config(RunConfig, _raw(tmp_path, None, evaluation=None), source="test")
    assert parse_config(RunConfig, _raw(tmp_path, {}), source="test").stages[0].probe is not None


def test_a_probe_is_no_setting_of_its_stage(tmp_path: Path) -> None:
    probes = (None, {}, {"every": 7, "questions": 3, "max_new_tokens": 5})
    runs = [resolve_run(parse_config(RunConfig, _raw(tmp_path, probe), source="test")) for probe in probes]
    settings = [run.settings_of(run.config.stages[0]) for run in runs]
    assert settings[0] == settings[1] == settings[2]
