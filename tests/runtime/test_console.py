"""Metrics are on disk when `write` returns. A resumed run has one line per update. Progress is a bar or plain lines."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from thinkpo_jax.runtime import console
from thinkpo_jax.runtime.console import MetricsFile, ProgressReporter, log_info, read_metrics


def steps(path: Path) -> list[float]:
    return [line["step"] for line in read_metrics(path)]


def test_a_line_is_in_the_file_when_write_returns(tmp_path: Path):
    path = tmp_path / "stage" / "metrics.jsonl"
    metrics = MetricsFile(path, step=0)
    assert path.read_text(encoding="utf-8") == ""
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.5})
        assert path.read_text(encoding="utf-8").count("\n") == step  # while the file is still open
    metrics.close()
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]


def test_a_resumed_run_removes_lines_of_later_updates(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, step=0)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0})
    first.close()
    second = MetricsFile(path, step=3)
    assert steps(path) == [1, 2, 3]
    second.write({"step": 4, "loss": 2.0})
    second.close()
    assert read_metrics(path)[2:] == [{"step": 3, "loss": 1.0}, {"step": 4, "loss": 2.0}]
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_a_run_that_starts_at_update_0_removes_all_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n', encoding="utf-8")
    MetricsFile(path, step=0).close()
    assert steps(path) == []


@pytest.mark.parametrize("cut", ["", '{"st', '{"step": 3', '{"step": 3}'])
def test_a_last_line_that_was_cut_short_is_ignored_and_replaced(cut: str, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + cut, encoding="utf-8")
    assert steps(path) == [1, 2]
    metrics = MetricsFile(path, step=2)
    metrics.write({"step": 3})
    metrics.close()
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3},
    ]


def test_a_missing_file_has_no_metrics(tmp_path: Path):
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_progress_in_a_pipe_is_plain_lines_up_to_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert not sys.stderr.isatty()
    monkeypatch.setattr(console, "PROGRESS_LINE_INTERVAL_SECONDS", 0.0)
    progress = ProgressReporter("train", 4, done=1)
    for done in (2, 3, 4):
        progress.update(done, {"loss": f"{done / 10}", "margin": "0.0"})
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.split("\n")
    assert lines[-1] == ""
    assert [line.split(",")[0] for line in lines[:-1]] == ["train: step 2/4", "train: step 3/4", "train: step 4/4"]
    assert lines[0].endswith(" s left, loss 0.2, margin 0.0")
    assert lines[-2] == "train: step 4/4, 0 s left, loss 0.4, margin 0.0"
    assert "\r" not in err
    assert "\x1b" not in err


def test_progress_in_a_pipe_is_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = [100.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = ProgressReporter("evaluate", 100, unit="answer")
    for done in range(1, 51):
        now[0] += 1.0
        progress.update(done)
    assert capsys.readouterr().err.split("\n")[:-1] == [
        f"evaluate: answer {done}/100, {100 - done} s left" for done in (10, 20, 30, 40, 50)
    ]
    progress.update(99)
    progress.update(100)  # the last line is printed however soon it comes
    assert capsys.readouterr().err == "evaluate: answer 100/100, 0 s left\n"


def test_a_resumed_run_estimates_its_time_from_where_it_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = ProgressReporter("train", 100, done=90)
    now[0] = 20.0
    progress.update(92)
    assert capsys.readouterr().err == "train: step 92/100, 80 s left\n"


def test_progress_on_a_terminal_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = ProgressReporter("train", 4, done=1)
    assert "1/4" in capsys.readouterr().err
    progress.update(4, {"loss": "0.1"})
    progress.close()
    err = capsys.readouterr().err
    assert "\r" in err
    assert "train: 100%" in err
    assert "4/4" in err
    assert "loss=0.1" in err


def test_messages_go_to_stderr(capsys: pytest.CaptureFixture[str]):
    log_info("stage sft is done")
    assert capsys.readouterr() == ("", "stage sft is done\n")
