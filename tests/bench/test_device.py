"""`bench device`: the small form on the CPU, what becomes of time and failures, and the plan of each update."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.plugins import needs_cuda
from support.selection import exhaustive

from thinkpo_jax.bench import __main__ as bench
from thinkpo_jax.bench import device
from thinkpo_jax.bench.device_report import Outcome, to_markdown, write_device_report
from thinkpo_jax.bench.update_plans import plan_updates
from thinkpo_jax.bench.updates import UpdateCase
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.files import lock_folder

CPU = {"platform": "cpu", "device_kind": "cpu", "driver": "one\ntwo", "limit_bytes": None}
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


class FakeChild:
    """Stands for the process of a measurement on a GPU, which is not at hand."""

    machine: dict[str, Any]
    measure: Child
    plans: dict[str, Any] | None = None
    killed: list[str]

    def __init__(self, function: Any, arguments: dict[str, Any], *, folder: Path, **_: Any) -> None:
        self.name, self.arguments, self.log = function.__name__, arguments, folder / "log"
        folder.mkdir(parents=True, exist_ok=True)
        self.log.write_text(f"the log of {self.name}")

    def wait(self, seconds: float) -> dict[str, Any]:
        if self.name == "describe_machine":
            return self.machine
        return type(self).measure(self.name, self.arguments, seconds=seconds)

    def result(self) -> dict[str, Any] | None:
        return self.plans

    def is_running(self) -> bool:
        return False

    def kill(self) -> None:
        self.killed.append(self.name)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs the command on a machine and with measurements that are given. Returns status, device.json, device.md."""
    numbers = itertools.count()

    def run(
        machine: dict[str, Any], measure: Child, *arguments: str, plans: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any], str]:
        fields = {"machine": machine, "measure": staticmethod(measure), "plans": plans, "killed": []}
        monkeypatch.setattr(device, "Child", type("Child", (FakeChild,), fields))
        monkeypatch.setattr(bench, "MIN_MINUTES", 0)
        out = tmp_path / f"results{next(numbers)}"
        status = run_command(bench.main, ["device", "--out", str(out), *arguments])
        return status, json.loads((out / "device.json").read_text()), (out / "device.md").read_text()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("with_numerics", [False, pytest.param(True, marks=exhaustive)])
def test_the_small_form_measures_on_the_cpu(
    with_numerics: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The numerics take long, and have tests of their own."""
    out, numerics = tmp_path / "results", ["numerics"] if with_numerics else []
    parts = ",".join([*numerics, "step", "generate", "quality"])
    assert run_command(bench.main, ["device", "--out", str(out), "--only", parts]) == 0
    report = json.loads((out / "device.json").read_text())
    by_title = {outcome["title"]: outcome for outcome in report["outcomes"]}
    assert report["is_small"]
    found = [outcome["part"] for outcome in report["outcomes"]]
    assert found == [*numerics, "step", "step", "step", "generate", "quality"]
    assert by_title["quality, SmolLM2-135M on GSM8K"]["status"] == "skipped"
    if with_numerics:
        assert all(row["within"] for row in by_title["numerics"]["result"]["rows"])
    update = by_title["ThinkPO, tiny, rows of 384"]["result"]
    assert update["compile_seconds"] > 0
    assert update["planned_bytes"] is None
    assert sum(update["profile"]["shares"].values()) == pytest.approx(1)
    assert by_title["reference pass, tiny, rows of 384"]["result"]["tokens_per_second"] > update["tokens_per_second"]
    assert by_title["generation, tiny"]["result"]["rows"][1]["tokens_per_second"] > 0
    text = (out / "device.md").read_text()
    for heading in (*(name.capitalize() for name in numerics), "Updates", "Generation"):
        assert f"## {heading}\n" in text
    assert "This is the small form" in text
    captured = capfd.readouterr()
    assert "JAX finds no accelerator" in captured.err
    assert captured.out.strip() == text.strip()


def test_reports_are_written_after_each_measurement_and_failures_are_named(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def child(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        report = json.loads((tmp_path / "results0" / "device.json").read_text())
        seen.append([f"{each['title']}: {each['status']}" for each in report["outcomes"]])
        if name == "measure_generation":
            raise KeyError("an error that nobody expected")
        if name == "measure_numerics":
            raise RunError("ended with signal 11: a crash | in a kernel")
        if name == "measure_updates" and request["case"]["objective"] == "thinkpo":
            raise UserError("a part is missing")
        return _update(request["case"], mfu=None)

    status, report, text = run(CPU, child, "--only", "numerics,step,generate")
    assert status == 0
    assert seen[:3] == [[], ["numerics: failed"], ["numerics: failed", "ThinkPO, tiny, rows of 384: skipped"]]
    statuses = [outcome["status"] for outcome in report["outcomes"]]
    assert statuses == ["failed", "skipped", "measured", "measured", "failed"]
    assert report["outcomes"][-1]["reason"] == "KeyError: 'an error that nobody expected'"
    assert "the log of measure_numerics" in (tmp_path / "results0" / "failures.log").read_text()
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
    updates = device.ACCELERATOR.updates[:2]
    monkeypatch.setattr(device, "ACCELERATOR", dataclasses.replace(device.ACCELERATOR, updates=updates))
    tried: list[str] = []

    def child(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        remat = request["case"]["remat"]
        tried.append(remat)
        if request["case"]["model"].endswith("3B"):
            raise RunError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
        if remat == "none":
            raise RunError("ended with exit status 1: RESOURCE_EXHAUSTED: Out of memory")
        return _update(request["case"])

    plans = {case.title: {"remat": "none", "bytes": 30 * GIB} for case in updates}
    _, report, text = run(H100, child, "--only", "step", plans=plans)
    assert tried == ["none", "projections", "none", "projections", "attention", "full"]
    first, second = report["outcomes"]
    assert first["result"]["remat"] == "projections"
    assert first["result"]["planned_bytes"] is None  # the plan was for another policy
    assert second["status"] == "failed"
    assert (
        "| ThinkPO, Qwen2.5-1.5B, rows of 8,192 | cudnn | projections | 9,000 | 50.0% | 50% | 40.00 GiB | - |" in text
    )


def test_a_plan_gives_policy_and_memory_or_skips_what_does_not_fit(run: Callable[..., Any]) -> None:
    first, second, third, *_ = device.ACCELERATOR.updates
    plans = {first.title: {"remat": "none", "bytes": 50 * GIB}, second.title: {"problem": "needs 90 GiB"}}
    plans |= {third.title: {"unknown": "there is no compiler"}}
    _, report, text = run(H100, lambda _, request, **__: _update(request["case"]), "--only", "step", plans=plans)
    assert [each["status"] for each in report["outcomes"][:3]] == ["measured", "skipped", "measured"]
    assert report["outcomes"][0]["result"]["remat"] == "none"
    assert "| 40.00 GiB | 50.00 GiB |" in text
    assert report["outcomes"][1]["reason"] == "needs 90 GiB"
    assert report["outcomes"][2]["result"]["remat"] == third.remat


def test_updates_use_blockwise_attention_once_the_kernel_of_the_device_fails(run: Callable[..., Any]) -> None:
    tried: list[str] = []

    def child(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        tried.append(request["case"]["attention"])
        if tried[-1] == "auto":
            raise RunError("ended with signal 11: a crash in the kernel")
        return _update(request["case"])

    _, report, _ = run(H100, child, "--only", "step")
    assert tried == ["auto", *["blockwise"] * 7]
    assert {each["status"] for each in report["outcomes"]} == {"measured"}


def test_trl_is_compared_with_the_update_on_its_pairs(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name)
    measured = {"tokens": 6000, "seconds": 2.0, "peak_memory": 60 * GIB, "versions": {"trl": "1.16.0"}}
    fails = [True]

    def child(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        if name == "measure_updates":
            if fails[0] and request["case"] == dataclasses.asdict(device.ACCELERATOR.updates[0]):
                raise UserError("a part is missing")
            return _update(request["case"], tokens_per_second=9000.0)
        if request.get("use_liger"):
            raise RunError("the kernels do not compile")
        return measured

    _, _, text = run(H100, child, "--only", "step,trl")
    assert "without Liger: the kernels do not compile" in text
    assert "Ratio" not in text  # the other updates train other pairs
    fails[0] = False
    assert "Ratio: 3.00 (goal: 3)." in run(H100, child, "--only", "step,trl")[2]
    assert "Ratio: 3.00.\n" in run(H100 | {"device_kind": "NVIDIA B200"}, child, "--only", "step,trl")[2]


def test_quality_without_a_finished_seed_is_a_failure(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def measure(data: Path, work: Path, **options: Any) -> dict[str, Any]:
        calls.append(options)
        return {"seeds": {}, "pooled": [], "unfinished": {"0": "stopped by the time limit"}}

    monkeypatch.setattr(device, "measure_quality", measure)
    monkeypatch.setattr(device, "QUALITY_BYTES", 1)
    (tmp_path / "data").mkdir()
    status, report, _ = run(H100, GENERATION, "--only", "quality", "--data", str(tmp_path / "data"))
    assert status == 1
    assert report["outcomes"][0]["reason"] == "seed 0: stopped by the time limit"
    assert calls[0]["at_once"] == 2  # of 71 GiB
    assert calls[0]["environment"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    assert run(H100, GENERATION, "--minutes", "3", "--only", "quality")[1]["outcomes"][0]["status"] == "not reached"
    monkeypatch.setattr(device, "QUALITY_BYTES", 2**60)
    (outcome,) = run(H100, GENERATION, "--only", "quality", "--data", str(tmp_path / "data"))[1]["outcomes"]
    assert outcome["status"] == "skipped"
    assert "models need" in outcome["reason"]
    assert len(calls) == 1


def test_an_interrupted_result_is_kept_with_its_reason(run: Callable[..., Any]) -> None:
    _, report, text = run(
        H100, lambda *_, **__: GENERATION | {"interrupted": "stopped after 150 s"}, "--only", "generate"
    )
    assert report["outcomes"][0]["status"] == "measured"
    assert "| generation, Qwen2.5-1.5B | measured | 0 | stopped after 150 s |" in text
    assert "| 4 | 1,000 |" in text


@exhaustive
@needs_cuda
def test_the_planner_chooses_the_fastest_policy_that_fits(tmp_path: Path) -> None:
    small, *_, large = (dataclasses.asdict(case) for case in device.ACCELERATOR.updates)
    *_, plans = plan_updates([small], H100["device_kind"], 71 * GIB, str(tmp_path))
    (plan,) = plans.values()
    assert plan["remat"] == "none"
    assert 24 * GIB < plan["bytes"] < 0.92 * 71 * GIB
    *_, plans = plan_updates([small, large], H100["device_kind"], 50 * GIB, str(tmp_path))
    first, second = plans.values()
    assert first["remat"] == "projections"
    assert re.fullmatch(r"needs \d+ GiB, and a program gets 50 GiB", second["problem"])


def test_an_unknown_device_has_no_plans(tmp_path: Path) -> None:
    case = dataclasses.asdict(device.ACCELERATOR.updates[0])
    assert list(plan_updates([case], "cpu", None, str(tmp_path))) == [{}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=exhaustive),
        pytest.param(signal.SIGINT, marks=exhaustive),
        pytest.param(signal.SIGHUP, marks=exhaustive),
    ],
)
def test_a_signal_leaves_the_report_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    out, marker = tmp_path / "results", f"marker_{number.name}"
    command = [sys.executable, "-m", "thinkpo_jax.bench", "device", "--out", str(out), "--only", "numerics"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path), "KIT_MARKER": marker}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("numerics: started"):
            break
    time.sleep(1)
    assert _processes_with(marker) > {process.pid}
    process.send_signal(number)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    deadline = time.monotonic() + 20
    while _processes_with(marker) and number == signal.SIGKILL and time.monotonic() < deadline:
        time.sleep(0.1)  # the children look for their parent once a second
    assert not _processes_with(marker)
    assert json.loads((out / "device.json").read_text())["machine"]["platform"] == "cpu"
    if number != signal.SIGKILL:
        assert f"Stopped. Results so far: {out / 'device.md'}" in printed
        assert not list(tmp_path.glob("thinkpo_device_*"))


def _processes_with(marker: str) -> set[int]:
    """Returns the processes that inherited a variable with this value."""
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found


def test_an_out_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(bench.main, ["device", "--out", str(tmp_path / "file")]) == 2
    assert "Set --out to a folder that can be made" in capsys.readouterr().err
    assert run_command(bench.main, ["device", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "device.json").write_text("{}")
    assert run_command(bench.main, ["device", "--out", str(tmp_path / "old")]) == 2
    assert "it has results already" in capsys.readouterr().err
    assert (tmp_path / "old" / "device.json").read_text() == "{}"
    with lock_folder(tmp_path / "used", "--out"):
        assert run_command(bench.main, ["device", "--out", str(tmp_path / "used")]) == 2
    assert "another process writes to" in capsys.readouterr().err


def test_a_report_without_any_measurement_is_a_report() -> None:
    contents = {"date": "2026-01-01", "is_small": False, "machine": {}, "outcomes": []}
    assert to_markdown(contents).startswith("# Measured on no device yet, 2026-01-01\n")


def test_errors_that_are_not_finite_leave_the_files_readable(tmp_path: Path) -> None:
    rows = [{"what": "a", "errors": {"loss": math.inf}, "limit": 0.1, "within": False}]
    result = {"kernel": "cudnn", "kernel_problem": "", "rows": rows, "num_skipped": 0}
    outcome = Outcome("numerics", "numerics", "measured", result=result)
    write_device_report(tmp_path, H100, [outcome], seconds=1, is_small=False)
    assert "| a: loss | not finite | 1.0e-01 | **no** |" in (tmp_path / "device.md").read_text()
    assert "Infinity" not in (tmp_path / "device.json").read_text()
    assert "| driver, memory, clock | one two |" in (tmp_path / "device.md").read_text()


def test_a_result_that_cannot_be_shown_is_still_in_the_json_file(tmp_path: Path) -> None:
    outcome = Outcome("generate", "generation", "measured", result={"unexpected": 1})
    write_device_report(tmp_path, H100, [outcome], seconds=1, is_small=False)
    assert "device.md cannot be written: KeyError" in (tmp_path / "device.md").read_text()
    assert json.loads((tmp_path / "device.json").read_text())["outcomes"][0]["result"] == {"unexpected": 1}
