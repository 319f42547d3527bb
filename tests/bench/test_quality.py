"""The quality part trains SmolLM2 on GSM8K. Most tests replace the training command by a short script."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import needs_data, smollm2_missing
from support.paths import DATA
from support.selection import exhaustive

from thinkpo_jax.bench import quality
from thinkpo_jax.bench.pack import find_gguf
from thinkpo_jax.bench.quality import FULL, make_answers, make_run_config, measure_quality, quality_table
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.runtime.files import write_json_record

THREE_STEPS = "Ann has 2*3=<<2*3=6>>6 pens.\nBob has 6+994=<<6+994=1000>>1000.\nTogether 6+1000=1,006.\n#### 1,006"
TWO_STEPS = "He has 1+1=<<1+1=2>>2.\nSo 2+2=<<2+2=4>>4.\n#### 4"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out like a joined pack. The model is not read."""
    monkeypatch.setattr(quality, "write_smollm2", lambda gguf_file, out: out)
    folder = tmp_path / "data"
    (folder / "gsm8k").mkdir(parents=True)
    rows = [{"question": f"Question {i}?", "answer": answer} for i, answer in enumerate((THREE_STEPS, TWO_STEPS, "?"))]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "gsm8k" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (folder / "smollm2.gguf").write_bytes(b"weights")
    return folder


def _write_run(run: Path, *, num_correct: int) -> None:
    """Writes the files of a finished run. SFT answers `num_correct` of four questions, and the other models none."""
    for model in ("base", "sft", "thinkpo", "control"):
        items = [
            {
                "question_id": str(i),
                "samples": [{"tokens": 5, "correct": model == "sft" and i < num_correct, "truncated": False}],
                "group": "",
            }
            for i in range(4)
        ]
        folder = run / "evaluation" / model
        folder.mkdir(parents=True)
        write_json_record(folder / "gsm8k.json", {"settings": {}, "items": items})
        (folder / "gsm8k.answers.jsonl").write_text("{}\n", encoding="utf-8")
    score = {"accuracy": 0.25, "ci95": [0.125, 0.5], "mean_response_tokens": 5.04, "truncation_rate": 0.01}
    stage = {"name": "sft", "objective": "sft", "start": "base", "steps": 2, "seconds": 1.5, "notes": ["a path"]}
    report = {"models": {"sft": {"gsm8k": score}}, "comparisons": [{"from": "base"}], "stages": [stage]}
    write_json_record(run / "report.json", report)
    (run / "sft").mkdir()
    (run / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n', encoding="utf-8")


def _replace_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Replaces `python -m thinkpo_jax.train` by a script. It knows `seed`, the folder `run`, and `config`."""
    script = tmp_path / "fake_python"
    head = f"""\
        #!{sys.executable}
        import os, subprocess, sys, time
        from pathlib import Path
        module, _, config, _, seed, run = sys.argv[2:]
        assert (module, seed[:5], run[:8]) == ("thinkpo_jax.train", "seed=", "run_dir=")
        seed, run = int(seed[5:]), Path(run[8:])
        assert Path(config).read_text().startswith("run_dir:")
        """
    script.write_text(textwrap.dedent(head) + textwrap.dedent(body), encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def _has_ended(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_answers_show_all_steps_or_only_the_last() -> None:
    long, short = make_answers(THREE_STEPS) or ("", "")
    assert long == ("Ann has 2*3=6 pens.\nBob has 6+994=1000.\nTogether 6+1000=1,006.\nThe answer is \\boxed{1006}.")
    assert short == "Together 6+1000=1,006.\nThe answer is \\boxed{1006}."
    assert make_answers(TWO_STEPS) == ("He has 1+1=2.\nSo 2+2=4.\nThe answer is \\boxed{4}.", None)


@pytest.mark.parametrize("answer", ["", "no number", "#### 4", "A step.\n####", "None"])
def test_a_row_without_steps_or_number_has_no_answers(answer: str) -> None:
    assert make_answers(answer) is None


def test_training_data_has_the_prompt_of_the_benchmark(data: Path, tmp_path: Path) -> None:
    quality.write_training_data(data / "gsm8k" / "train.jsonl", tmp_path / "work")
    sft, pairs = (
        [json.loads(line) for line in (tmp_path / "work" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "pairs")
    )
    prefix = "Return your final response within \\boxed{}. "
    assert [row["question"] for row in sft] == [f"{prefix}Question 0?", f"{prefix}Question 1?"]
    assert [row["question"] for row in pairs] == [f"{prefix}Question 0?"]
    assert pairs[0].keys() == {"question", "long", "short"}


def test_a_training_file_without_pairs_is_a_user_error(data: Path, tmp_path: Path) -> None:
    train = data / "gsm8k" / "train.jsonl"
    train.write_text(json.dumps({"question": "?", "answer": TWO_STEPS}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="no solution has 3 steps"):
        quality.write_training_data(train, tmp_path)


def test_the_control_has_as_many_updates_and_tokens_as_thinkpo(tmp_path: Path) -> None:
    rows = [{"question": "q" * 100, "long": "l" * 100, "short": "s" * 20}] * 640
    raw = make_run_config(FULL, rows, tmp_path, model=tmp_path, test=tmp_path)
    config = parse_config(RunConfig, raw, source="test")
    _, thinkpo, control = config.stages
    assert (thinkpo.steps, control.steps) == (10, 10)
    assert (thinkpo.batch.size, control.batch.size) == (64, 102)  # 64 x (2 x 100 + 100 + 20) / 200
    assert [config.initial_model_of(stage) for stage in (thinkpo, control)] == ["sft", "sft"]


@pytest.mark.parametrize("name", ["gsm8k/train.jsonl", "gsm8k/test.jsonl", "smollm2.gguf"])
def test_missing_data_is_a_user_error(data: Path, tmp_path: Path, name: str) -> None:
    (data / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: there is no such file. .*bench\.pack"):
        measure_quality(data, tmp_path / "work", seconds=10)


def test_a_missing_package_is_a_user_error(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="the package gguf is not installed"):
        measure_quality(data, tmp_path / "work", seconds=10)


def test_the_time_limit_keeps_finished_seeds_and_ends_all_processes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    _write_run(tmp_path / "finished", num_correct=3)
    body = f"""
        if seed == 0:
            os.rename({str(tmp_path / "finished")!r}, run)
        else:
            for path in ("sft/model", "evaluation/base"):
                (run / path).mkdir(parents=True)
            (run / "evaluation/base/gsm8k.json").write_text("")
            child = subprocess.Popen(["sleep", "600"])
            Path({str(tmp_path / "pids")!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
            time.sleep(600)
        """
    _replace_training(monkeypatch, tmp_path, body)
    start = time.monotonic()
    result = measure_quality(data, work, seconds=3)
    assert time.monotonic() - start < 30
    assert all(_has_ended(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert list(result["seeds"]) == ["0"]
    assert result["unfinished"] == {
        "1": "stopped by the time limit of 3 s, trained: sft, evaluated: base",
        "2": "not started before the time limit of 3 s",
    }
    assert (result["num_solutions"], result["num_pairs"]) == (2, 1)
    assert result["seeds"]["0"]["models"]["sft"]["accuracy"] == 0.25
    (stage,) = result["seeds"]["0"]["stages"]
    assert (stage["seconds"], stage["last_update"]["loss"]) == (1.5, 2.5)
    assert "notes" not in stage
    assert json.dumps(result, allow_nan=False)


def test_sigterm_ends_all_processes(tmp_path: Path) -> None:
    script = tmp_path / "fake_python"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid.part\nmv {tmp_path}/pid.part {tmp_path}/pid\nsleep 600\n")
    script.chmod(0o755)
    code = f"""if True:
        import sys
        from pathlib import Path
        from thinkpo_jax.bench.quality import run_seeds
        sys.executable = {str(script)!r}
        run_seeds(Path({str(tmp_path)!r}), [0], seconds=600)
        """
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) != 0
    assert _has_ended(int((tmp_path / "pid").read_text()))


def test_several_seeds_are_pooled_and_can_share_the_device(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        _write_run(tmp_path / f"finished{seed}", num_correct=4 - 2 * seed)
    body = f"""
        folder = Path({str(tmp_path)!r})
        (folder / f"started{{seed}}").touch()
        while not (folder / f"started{{1 - seed}}").exists():
            time.sleep(0.01)
        names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR", "HF_HUB_OFFLINE")
        (folder / f"started{{seed}}").write_text(" ".join(os.environ[name] for name in names))
        os.rename(folder / f"finished{{seed}}", run)
        """
    _replace_training(monkeypatch, tmp_path, body)
    result = measure_quality(data, tmp_path / "work", seconds=60, seeds=(0, 1), at_once=2)
    assert result["unfinished"] == {}
    assert result["settings"]["batch_size"] == 200
    assert (tmp_path / "started0").read_text() == f"0.45 {tmp_path / 'work' / 'programs'} 1"
    names = [(row["from"], row["to"]) for row in result["pooled"]]
    assert names == [("base", "sft"), ("sft", "thinkpo"), ("sft", "control"), ("control", "thinkpo")]
    assert [row["accuracy_difference"] for row in result["pooled"]] == [0.75, -0.75, -0.75, 0]
    assert {row["num_questions"] for row in result["pooled"]} == {4}


def test_a_failing_seed_is_reported_with_its_last_lines(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _replace_training(monkeypatch, tmp_path, 'print("x" * 1000)\nsys.exit(f"error: seed {seed} is bad")')
    result = measure_quality(data, tmp_path / "work", seconds=60, seeds=(4, 5))
    assert result["seeds"] == {}
    assert result["pooled"] == []
    assert result["unfinished"]["4"].startswith("exit status 1: xxx")
    assert result["unfinished"]["5"].endswith("error: seed 5 is bad")
    assert len(result["unfinished"]["5"]) < 600


def test_the_table_shows_scores_comparisons_and_unfinished_seeds() -> None:
    score = {"accuracy": 0.0625, "ci95": [0.05, 0.075], "mean_response_tokens": 101.26, "truncation_rate": 0.031}
    row: dict[str, Any] = {"from": "sft", "to": "thinkpo", "accuracy_difference": 0.01, "ci95": [-0.004, 0.0241]}
    row |= {"p_value": 0.1234, "response_tokens_difference": 7.25, "response_tokens_ci95": [5.04, 9.0]}
    result = {"seeds": {"0": {"models": {"sft": score}}}, "pooled": [row], "unfinished": {"1": "no time"}}
    table = quality_table(result).splitlines()
    assert table[2] == "| 0 | sft | 6.2 (5.0 to 7.5) | 101.3 | 3.1 |"
    assert "1 seed(s)" in table[4]
    assert table[6] == "| sft to thinkpo | +1.0 (-0.4 to +2.4) | 0.12 | +7.2 (+5.0 to +9.0) |"
    assert table[8:] == ["- Seed 1 did not finish: no time"]
    empty = quality_table({"seeds": {}, "pooled": [], "unfinished": {}}).splitlines()
    assert len(empty) == 2


@exhaustive  # The tests above check its parts in a shorter time.
@pytest.mark.slow
@needs_data
@pytest.mark.skipif(bool(smollm2_missing()), reason=smollm2_missing())
def test_the_small_form_trains_real_weights_on_real_questions(tmp_path: Path) -> None:
    """It runs in its own process, to show that the calling process touches no device."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "gsm8k").symlink_to(DATA / "gsm8k")
    (data / "smollm2.gguf").symlink_to(find_gguf())
    code = textwrap.dedent("""\
        import json, sys
        from pathlib import Path
        from jax._src import xla_bridge
        from thinkpo_jax.bench.quality import measure_quality
        result = measure_quality(Path(sys.argv[1]), Path(sys.argv[2]), seconds=600, is_small=True)
        assert not xla_bridge._backends, "the process uses a device"
        print(json.dumps(result))
        """)
    command = [sys.executable, "-c", code, str(data), str(tmp_path / "work")]
    process = subprocess.run(command, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["unfinished"] == {}, result["unfinished"]
    (scores,) = result["seeds"].values()
    assert scores["models"].keys() == {"base", "sft", "thinkpo", "control"}
    assert all(score["num_samples"] == 6 for score in scores["models"].values())
    assert all(0 < score["mean_response_tokens"] <= 8 for score in scores["models"].values())
    assert [(stage["name"], stage["steps"]) for stage in scores["stages"]] == [
        ("sft", 2),
        ("thinkpo", 2),
        ("control", 2),
    ]
    assert len(result["pooled"]) == 4
    assert "| 0 | thinkpo |" in quality_table(result)
