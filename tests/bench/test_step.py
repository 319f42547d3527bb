"""`bench step` trains the same pairs with this package and with TRL. No speed is asserted."""

import importlib.util
import math
import re

import pytest
from support.checkpoints import needs_trl

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


@pytest.mark.slow
@needs_trl
def test_both_sides_do_the_same_work(capfd: pytest.CaptureFixture[str]):
    """The benchmark itself compares tokens, log-probs and first losses, and fails if they differ."""
    bench_step.bench_step(TINY, 4, 64, row_length=128, repeats=1)
    printed = capfd.readouterr().out
    losses = [float(loss) for loss in re.findall(r"first loss (\S+)", printed)]
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-4)
    assert re.search(
        r"median of 1 round\(s\): [\d.]+ times TRL's useful tokens/s, [\d.]+ times its peak memory", printed
    )


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
    ],
)
def test_wrong_arguments_end_with_status_2(arguments: list[str]):
    with pytest.raises(SystemExit) as raised:
        bench.main(arguments)
    assert raised.value.code == 2
