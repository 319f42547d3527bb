"""A ThinkPO update beside TRL's: both do the same work, each in a process of its own. No speed is asserted."""

import math
import re

import pytest
from support.checkpoints import needs_trl
from support.selection import exhaustive

from thinkpo_jax.bench import __main__ as bench
from thinkpo_jax.bench import step as bench_step
from thinkpo_jax.bench import trl as bench_trl
from thinkpo_jax.bench.workload import SHAPE, SideResult
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import RunError

TINY = {
    **SHAPE,
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
}
FOUND = SideResult(
    tokens=100, seconds=1.0, first_loss=math.log(2), mean_loss=0.69, reference=(-90.0, -30.0), loaded=1, peak=2
)


@pytest.mark.slow
@needs_trl
@pytest.mark.parametrize("every", [2, pytest.param(1, marks=exhaustive)])
def test_both_sides_do_the_same_work(every: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Against every variant of TRL. The short form has two pairs at once, and one pair accumulated."""
    monkeypatch.setattr(bench_trl, "VARIANTS", dict(list(bench_trl.VARIANTS.items())[::every]))
    bench_step.bench_step(TINY, pairs=4, max_length=64, row_length=128, repeats=1)
    told = capfd.readouterr().out
    losses = [tuple(map(float, found)) for found in re.findall(r"loss (\S+) before training, (\S+) on average", told)]
    assert len(losses) == 1 + len(bench_trl.VARIANTS)
    for first, mean in losses:
        assert first == pytest.approx(math.log(2), abs=1e-4)
        assert mean == pytest.approx(losses[0][1], abs=1e-3)
    assert re.search(r"median of 1 round\(s\): [\d.]+ times the useful tokens/s, [\d.]+ times the peak memory of", told)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokens": 99}, "the two sides read 100 and 99"),
        ({"reference": (-90.0, -30.1)}, "log-probs before training differ"),
        ({"first_loss": 0.7}, "the loss before training is 0.700000"),
    ],
)
def test_other_work_is_an_error(change: dict, problem: str):
    bench_step.check_same_work(100, FOUND, FOUND)
    with pytest.raises(RunError, match=re.escape(problem)):
        bench_step.check_same_work(100, FOUND, FOUND._replace(**change))


def test_without_trl_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(bench_trl, "missing", lambda: ["torch", "trl"])
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
    ],
)
def test_wrong_arguments_end_with_status_2(arguments: list[str]):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
