"""What `measure_updates` reports: speeds that fit each other, MFU by the formula, and the shape that was asked for."""

import dataclasses
from pathlib import Path

import jax
import pytest
from support.selection import cases

from thinkpo_jax.bench import updates
from thinkpo_jax.bench.time_by_part import SCOPES
from thinkpo_jax.bench.updates import UpdateCase, measure_updates
from thinkpo_jax.bench.workload import NAMES, to_examples, write_model_config
from thinkpo_jax.data.batches import BatchConfig, BatchPlan, BatchWork
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.training.objectives import LossSums, sft_objective
from thinkpo_jax.training.throughput import count_update_flops

WORK = [BatchWork(1000, 200_000, 700), BatchWork(500, 50_000, 300)]


def test_mfu_is_the_share_of_the_peak_and_a_reference_pass_is_a_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, compute = write_model_config("tiny", tmp_path), ComputeConfig(remat="full")
    flops = count_update_flops(arch, compute, BatchWork(1500, 250_000, 1000))
    monkeypatch.setattr(updates, "peak_flops", lambda kind: 1e12 if kind == jax.devices()[0].device_kind else None)
    update = updates.speed("thinkpo", arch, compute, WORK, seconds=2.0)
    assert update["tokens"] == 1500
    assert update["tokens_per_second"] == 750
    assert update["mfu"] == pytest.approx(flops.model / 2 / 1e12)
    assert update["hfu"] == pytest.approx(flops.hardware / 2 / 1e12)
    reference = updates.speed("reference", arch, compute, WORK, seconds=2.0)
    assert reference["mfu"] == reference["hfu"] == pytest.approx(flops.model / 6 / 1e12)
    in_float32 = ComputeConfig(dtype="float32")
    assert updates.speed("thinkpo", arch, in_float32, WORK, seconds=2.0)["mfu"] is None


@pytest.mark.parametrize("objective", cases(("thinkpo", "sft", "reference"), short=lambda name: name == "reference"))
def test_a_measured_update_is_consistent(tmp_path: Path, objective: str) -> None:
    case = UpdateCase("tiny", objective, 384, 2, "full")  # pyright: ignore[reportArgumentType]
    early, result = measure_updates(dataclasses.asdict(case), str(tmp_path), 0.01)
    assert early.keys() == result.keys()  # nothing but the profile is lost if the process ends in the profiler
    assert early["profile"]["problem"]
    assert result["mfu"] is None  # a CPU has no known peak
    assert result["num_updates"] >= updates.PROFILED_UPDATES
    elapsed = result["num_updates"] * result["seconds_per_update"]
    assert result["tokens"] / elapsed == pytest.approx(result["tokens_per_second"])
    assert result["tokens"] == _tokens_of_updates(case, result["num_updates"])
    assert result["tokens"] / (result["num_updates"] * 2 * 384) == pytest.approx(result["packing_efficiency"])
    assert 0.5 < result["packing_efficiency"] <= 1
    assert result["compile_seconds"] > 0
    assert result["compiled_bytes"] > 0
    shares = result["profile"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert (shares["optimizer"] == 0) == (objective == "reference")
    assert min(shares[scope] for scope in SCOPES if scope not in ("optimizer", "embedding")) > 0.01
    assert shares["other"] < 0.6


def _tokens_of_updates(case: UpdateCase, num_updates: int) -> int:
    """Returns the tokens of updates 1, 2, ..., counted in their batches."""
    answers = NAMES[1:2] if case.objective == "sft" else NAMES[1:]
    config = BatchConfig(rows=case.rows, row_length=case.row_length, rows_per_device=1)
    examples = to_examples(case.draw_pairs(), answers=answers)
    options = {"seed": updates.SEED, "num_shards": 1, "num_updates": updates.MAX_UPDATES + 1, "epochs": 1.0}
    batches = BatchPlan(examples, config, **options)
    return sum(int((batches[index].segment_ids > 0).sum()) for index in range(1, 1 + num_updates))


def test_an_update_that_is_not_finite_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "sft_objective", lambda model, batch: _infinite(sft_objective(model, batch)))
    case = UpdateCase("tiny", "sft", 384, 1, "full")
    with pytest.raises(RunError, match="not finite"):
        list(measure_updates(dataclasses.asdict(case), str(tmp_path), 0.01))


def _infinite(sums: LossSums) -> LossSums:
    return sums._replace(loss=sums.loss / 0)
