"""The soak benchmark measures a training that it starts and stops."""

from pathlib import Path

import pytest
from support.quickstart import QUICKSTART

from thinkpo_jax.bench.soak import Sample, bench_soak, summarize
from thinkpo_jax.runtime.config import RunError, UserError


def test_growth_and_range_leave_the_warm_up_out() -> None:
    resident = [10, 50, 100, 104, 99, 100, 100, 100, 100, 100, 100, 102]
    samples = [Sample(5 * part + 1.0, mb * 10**6, 7 + part, 20 * part) for part, mb in enumerate(resident)]
    result = summarize(samples, 60.0)
    assert result["growth"] == pytest.approx(0.02)
    assert result["range"] == pytest.approx(104 / 99 - 1)
    assert result["saves"] == 11
    assert [row["most_files"] for row in result["rows"]] == list(range(7, 19))


def test_a_training_that_ends_before_the_time_is_over_fails(tmp_path: Path) -> None:
    assignments = [f"run_dir={tmp_path}/run", "model.path=missing"]
    with pytest.raises(RunError, match=r"run\.log: the training ended with exit status 2: .*missing"):
        bench_soak(Path(QUICKSTART), assignments, minutes=5)


def test_a_run_that_has_begun_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        bench_soak(Path(QUICKSTART), [f"run_dir={tmp_path}"], minutes=5)


@pytest.mark.exhaustive
def test_a_training_is_measured_and_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assignments = [f"run_dir={tmp_path}/run", "stages.sft.steps=100000", "stages.sft.checkpoint.every_minutes=0.02"]
    result = bench_soak(Path(QUICKSTART), assignments, minutes=0.6)
    assert result["saves"] > 2
    assert all(row["resident"] > 10**8 for row in result["rows"])
    assert f"{result['saves']} saves" in capsys.readouterr().out
