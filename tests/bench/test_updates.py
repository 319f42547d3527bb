"""What `measure_updates` reports: speeds that fit each other, MFU by the formula, and the shape that was asked for."""

import dataclasses
from pathlib import Path

import jax
import pytest

from thinkpo_jax.bench import updates
from thinkpo_jax.bench.updates import UpdateCase, measure_updates
from thinkpo_jax.bench.workload import write_model_config
from thinkpo_jax.data.batches import BatchWork
from thinkpo_jax.models.compute_config import ComputeConfig
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


@pytest.mark.parametrize("objective", ["thinkpo", "sft", "reference"])
def test_a_measured_update_is_consistent(tmp_path: Path, objective: str) -> None:
    case = UpdateCase("tiny", objective, 384, 2, "full", dtype="float32")  # pyright: ignore[reportArgumentType]
    result = measure_updates(dataclasses.asdict(case), str(tmp_path), 0.01)
    assert result["mfu"] is None  # only bfloat16 has a peak
    assert result["num_updates"] >= updates.PROFILED_UPDATES
    elapsed = result["num_updates"] * result["seconds_per_update"]
    assert result["tokens"] / elapsed == pytest.approx(result["tokens_per_second"])
    assert result["tokens"] / (result["num_updates"] * 2 * 384) == pytest.approx(result["packing_efficiency"])
    assert 0.5 < result["packing_efficiency"] <= 1
    assert result["compile_seconds"] > 0
    assert result["compiled_bytes"] > 0
    assert sum(result["profile"]["shares"].values()) == pytest.approx(1)
    if objective == "reference":
        assert result["metrics"] == {}
        assert result["profile"]["shares"]["optimizer"] == 0
    else:
        assert result["metrics"]["finite"] == 1
        assert result["metrics"]["grad_norm"] > 0
    if objective == "sft":
        assert result["metrics"]["loss"] == pytest.approx(6.3, abs=0.3)  # ln 512
