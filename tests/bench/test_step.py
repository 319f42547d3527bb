"""`bench step` trains the same pairs with this package and with TRL. No speed is asserted."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
from support.checkpoints import needs_trl
from support.selection import exhaustive

from thinkpo_jax.bench import __main__ as bench
from thinkpo_jax.bench import step as bench_step
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import RunError

TINY = {
    **bench_step.SHAPE,
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
}
RESULT = bench_step.SideResult(tokens=100, seconds=1.0, first_loss=math.log(2), reference=(-90.0, -30.0), peak_memory=2)


@exhaustive
@pytest.mark.slow
@needs_trl
def test_both_sides_do_the_same_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark itself compares tokens, log-probs and first losses, and fails if they differ."""
    monkeypatch.setattr(bench, "SHAPE", TINY)
    file = tmp_path / "results" / "step.json"
    arguments = ["step", "--pairs", "4", "--max-length", "64", "--row-length", "128", "--repeats", "1"]
    assert run_command(bench.main, [*arguments, "--json", str(file)]) == 0
    printed = capfd.readouterr().out
    losses = [float(loss) for loss in re.findall(r"first loss (\S+)", printed)]
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-4)
    result = json.loads(file.read_text())
    (measured,) = result["rounds"]
    ours, theirs = measured["thinkpo_jax"], measured["trl"]
    assert ours["tokens"] == theirs["tokens"] == result["tokens"] > 0
    assert result["speed_ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert result["memory_ratio"] == pytest.approx(ours["peak_memory"] / theirs["peak_memory"])
    assert result["matmul_share"] == pytest.approx(ours["hardware_flops_per_second"] / ours["matmul_flops"])
    assert f"median of 1 round(s): {result['speed_ratio']:.2f} times TRL's useful tokens/s" in printed
    assert result["versions"]["jax"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokens": 99}, "the two sides read 100 and 99"),
        ({"reference": (-90.0, -30.1)}, "log-probs of the sides before training differ"),
        ({"first_loss": 0.7}, "the losses before training are 0.693147 and 0.700000"),
        ({"first_loss": math.nan}, "the losses before training are 0.693147 and nan"),
        ({"reference": (math.nan, -30.0)}, "log-probs of the sides before training differ"),
    ],
)
def test_different_work_is_an_error(change: dict, problem: str):
    bench_step.check_same_work(100, RESULT, RESULT)
    with pytest.raises(RunError, match=re.escape(problem)):
        bench_step.check_same_work(100, RESULT, RESULT._replace(**change))


def test_without_trl_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_command(bench.main, ["step", "--against", "trl"]) == 2
    assert 'torch and trl not installed. Run: pip install -e ".[test]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["step", "--against", "axolotl"],
        ["step", "--pairs", "3"],
        ["step", "--max-length", "4"],
        ["step", "--row-length", "100"],
        ["step", "--repeats", "0"],
        ["load", "--gib", "0"],
        ["growth", "--config", "missing.yaml", "--kind", "v9", "--out", "plot.png"],
        ["device"],
        ["device", "--out", "results", "--minutes", "0"],
        ["device", "--out", "results", "--minutes", "nan"],
        ["device", "--out", "results", "--only", "numerics,speed"],
    ],
)
def test_wrong_arguments_end_with_status_2(arguments: list[str]):
    with pytest.raises(SystemExit) as raised:
        bench.main(arguments)
    assert raised.value.code == 2


def test_a_json_file_that_cannot_be_written_is_refused_before_the_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(bench.main, ["load", "--gib", "0.001", "--json", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert f"--json {tmp_path}: cannot be written: it is a folder" in captured.err
    assert "load / read" not in captured.out
