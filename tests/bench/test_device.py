"""`bench device`: the small form on the CPU, what becomes of time and failures, and the plan of each update."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.plugins import needs_cuda

from thinkpo_jax.bench import __main__ as bench
from thinkpo_jax.bench import device
from thinkpo_jax.bench.device_report import to_markdown
from thinkpo_jax.bench.updates import UpdateCase
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.devices import GIB

CPU = {"platform": "cpu", "device_kind": "cpu", "num_devices": 1, "driver": "unknown", "limit_bytes": None}
CPU |= {"peak_flops": None, "matmul_flops": 1e11, "versions": {"jax": "0.10.2"}}
H100 = CPU | {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "limit_bytes": 71 * GIB, "peak_flops": 989e12}
GENERATION = {"model": "tiny", "tokens_per_answer": 8, "peak_bytes": None}
GENERATION |= {"rows": [{"answers": 4, "tokens_per_second": 1000.0, "seconds": 1.0, "compile_seconds": 2.0}]}
Child = Callable[..., dict[str, Any]]


def _update(case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    shares = dict.fromkeys(("attention", "projections", "feed_forward", "head", "embedding"), 0.15)
    shares |= {"optimizer": 0.1, "other": 0.05, "idle": 0.1}
    result = {**case, "title": UpdateCase(**case).title, "attention": "cudnn", "tokens_per_second": 9000.0, "mfu": 0.5}
    result |= {"peak_bytes": 40 * GIB, "seconds_per_update": 1.5, "compile_seconds": 30.0, "packing_efficiency": 0.9}
    return result | {"profile": {"shares": shares, "operations": []}} | changes


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs the command on a machine and with measurements that are given. Returns status, device.json, device.md."""

    def run(machine: dict[str, Any], child: Child, *arguments: str) -> tuple[int, dict[str, Any], str]:
        def run_in_child(function: Any, request: dict[str, Any], **options: Any) -> dict[str, Any]:
            return machine if function.__name__ == "describe_machine" else child(function.__name__, request, **options)

        monkeypatch.setattr(device, "run_in_child", run_in_child)
        out = tmp_path / "results"
        status = run_command(bench.main, ["device", "--out", str(out), *arguments])
        return status, json.loads((out / "device.json").read_text()), (out / "device.md").read_text()

    return run


@pytest.mark.slow
def test_the_small_form_measures_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    assert run_command(bench.main, ["device", "--out", str(out), "--only", "numerics,step,trl,generate,quality"]) == 0
    report = json.loads((out / "device.json").read_text())
    by_title = {outcome["title"]: outcome for outcome in report["outcomes"]}
    assert report["is_small"]
    assert [outcome["part"] for outcome in report["outcomes"]] == [
        "numerics", "step", "trl", "step", "step", "generate", "quality"]  # fmt: skip
    assert by_title["quality, SmolLM2-135M on GSM8K"]["status"] == "skipped"
    numerics = by_title["numerics"]["result"]
    assert all(row["within"] for row in numerics["rows"])
    update = by_title["ThinkPO, tiny, rows of 384"]["result"]
    assert update["tokens_per_second"] == pytest.approx(
        update["tokens"] / update["num_updates"] / update["seconds_per_update"]
    )
    assert update["compile_seconds"] > 0
    assert update["metrics"]["finite"] == 1
    assert update["compiled_bytes"] > 0
    assert sum(update["profile"]["shares"].values()) == pytest.approx(1)
    assert by_title["reference pass, tiny, rows of 384"]["result"]["tokens_per_second"] > update["tokens_per_second"]
    assert by_title["generation, tiny"]["result"]["rows"][0]["tokens_per_second"] > 0
    text = (out / "device.md").read_text()
    for heading in ("Numerics", "Updates", "Generation"):
        assert f"## {heading}\n" in text
    assert "This is the small form" in text
    assert "JAX finds no accelerator" in capfd.readouterr().err


def test_reports_are_written_after_each_measurement_and_failures_are_named(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def child(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        report = json.loads((tmp_path / "results" / "device.json").read_text())
        seen.append([f"{each['title']}: {each['status']}" for each in report["outcomes"]])
        if name == "measure_numerics":
            raise RunError("ended with signal 11: a crash | in a kernel")
        if name == "measure_updates" and request["case"]["objective"] == "thinkpo":
            raise UserError("a part is missing")
        return _update(request["case"], mfu=None) if name == "measure_updates" else GENERATION

    status, report, text = run(CPU, child, "--only", "numerics,step,generate")
    assert status == 0
    assert seen[:3] == [[], ["numerics: failed"], ["numerics: failed", "ThinkPO, tiny, rows of 384: skipped"]]
    statuses = [outcome["status"] for outcome in report["outcomes"]]
    assert statuses == ["failed", "skipped", "measured", "measured", "measured"]
    assert "| numerics | failed | 0 | ended with signal 11: a crash \\| in a kernel |" in text
    assert "| ThinkPO, tiny, rows of 384 | skipped | 0 | a part is missing |" in text


def test_what_has_no_time_left_is_not_reached(run: Callable[..., Any]) -> None:
    def child(name: str, request: dict[str, Any], seconds: float, **_: Any) -> dict[str, Any]:
        assert 0 < seconds <= 48
        return {"kernel": None, "kernel_problem": "none", "rows": [], "num_skipped": 3}

    status, report, text = run(H100, child, "--minutes", "0.8", "--only", "numerics")
    assert status == 0
    assert "3 comparisons were not reached." in text
    assert [outcome["status"] for outcome in report["outcomes"]] == ["measured"]
    status, report, text = run(H100, child, "--minutes", "0.5", "--only", "numerics,quality")
    assert status == 1  # nothing was measured
    assert {outcome["status"] for outcome in report["outcomes"]} == {"not reached"}
    assert re.search(r"\| numerics \| not reached \| 0 \| \d+ s were left \|", text)


def test_a_remat_policy_that_does_not_fit_leads_to_the_next(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        device, "ACCELERATOR", dataclasses.replace(device.ACCELERATOR, updates=device.ACCELERATOR.updates[:2])
    )
    monkeypatch.setattr(
        device._Kit, "choose_remat", lambda _, case: (dataclasses.replace(case, remat="none"), 30 * GIB)
    )
    tried: list[str] = []

    def child(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        remat = request["case"]["remat"]
        tried.append(remat)
        if request["case"]["model"].endswith("3B"):
            raise RunError("RESOURCE_EXHAUSTED: Out of memory")
        if remat == "none":
            raise RunError("ended with exit status 1: RESOURCE_EXHAUSTED: Out of memory")
        return _update(request["case"])

    _, report, text = run(H100, child, "--only", "step")
    assert tried == ["none", "projections", "none", "projections", "attention", "full"]
    first, second = report["outcomes"]
    assert first["result"]["remat"] == "projections"
    assert first["result"]["planned_bytes"] is None  # the plan was for another policy
    assert second["status"] == "failed"
    assert (
        "| ThinkPO, Qwen2.5-1.5B, rows of 8,192 | cudnn | projections | 9,000 | 50.0% | 50% | 40.00 GiB | - |" in text
    )


def test_trl_runs_without_liger_if_its_kernels_fail(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name)
    measured = {"tokens": 6000, "seconds": 2.0, "peak_memory": 60 * GIB, "versions": {"trl": "1.16.0"}}

    def child(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        if name == "measure_updates":
            return _update(request["case"], tokens_per_second=9000.0)
        if request.get("liger"):
            raise RunError("the kernels do not compile")
        return measured

    _, _, text = run(CPU, child, "--only", "step,trl")
    assert "without Liger: the kernels do not compile" in text
    assert "Ratio: 3.00 (goal: 3)." in text


@needs_cuda
def test_the_planner_chooses_the_fastest_policy_that_fits(tmp_path: Path) -> None:
    kit = device._Kit(tmp_path, 1, tmp_path, None)
    kit.machine = H100
    small, _, _, _, long, _, large = device.ACCELERATOR.updates
    case, planned = kit.choose_remat(small)
    assert case == dataclasses.replace(small, remat="none")
    assert planned is not None
    assert 24 * GIB < planned < 0.92 * 0.9 * 80 * GIB
    assert kit.choose_remat(long)[0].remat != "none"
    with pytest.raises(UserError, match=r"needs \d+ GiB, and a program gets 71 GiB"):
        kit.choose_remat(large)


def test_an_out_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(bench.main, ["device", "--out", str(tmp_path / "file")]) == 2
    assert "Choose another folder" in capsys.readouterr().err
    assert run_command(bench.main, ["device", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_report_without_any_measurement_is_a_report() -> None:
    contents = {"date": "2026-01-01", "is_small": False, "machine": {}, "outcomes": []}
    assert to_markdown(contents).startswith("# Measured on no device yet, 2026-01-01\n")
