"""Measures an accelerator in a few minutes, unattended and without a network: `python -m thinkpo_jax.bench device`.

The measurements run in order of value, each in its own process. After each of them `device.md` and `device.json` are
written again, so an interrupted call leaves results. A measurement whose needs are missing is skipped with the reason.
Without an accelerator everything runs in a small form, which only shows that the kit works.
"""

import dataclasses
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from thinkpo_jax.bench.child import run_in_child
from thinkpo_jax.bench.device_report import Outcome, write_device_report
from thinkpo_jax.bench.generation import measure_generation
from thinkpo_jax.bench.machine import describe_machine
from thinkpo_jax.bench.numerics import measure_numerics
from thinkpo_jax.bench.quality import measure_quality
from thinkpo_jax.bench.trl import PAIRS_FILE, measure_trl
from thinkpo_jax.bench.updates import UpdateCase, measure_updates
from thinkpo_jax.bench.workload import write_model_config
from thinkpo_jax.planning.compile import REFERENCE, UPDATE, compile_stage_program
from thinkpo_jax.planning.topology import GPU_MEMORY_FRACTION, list_slices
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.devices import GIB, find_device_spec

PARTS = ("numerics", "step", "trl", "generate", "quality")
REMAT_BY_SPEED = ("none", "projections", "attention", "full")
PLANNED_MEMORY_SHARE = 0.92  # of what a program may use. The rest is for what the planner does not see.
START_SECONDS = 45  # a process that starts later has no time to compile and measure
MARGIN_SECONDS = 20  # between the time that a measurement is told and the time at which it is ended
TRL_PAIRS_PER_UPDATE, TRL_UPDATES = 8, 4


@dataclass(frozen=True)
class Scale:
    """How large the measurements are."""

    updates: tuple[UpdateCase, ...]  # the first is also trained with TRL
    generation: tuple[str, tuple[int, ...], int]  # model, answers at once, tokens per answer
    seconds: float  # that updates are timed
    is_small: bool = False


_QWEN_1B, _QWEN_3B, _QWEN_7B = "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B"
# 65,536 token slots per update. The remat policy is the one without a plan.
ACCELERATOR = Scale(
    (
        UpdateCase(_QWEN_1B, "thinkpo", 8192, 8, "projections"),
        UpdateCase(_QWEN_3B, "thinkpo", 8192, 8, "attention"),
        UpdateCase(_QWEN_1B, "reference", 8192, 8, "none"),
        UpdateCase(_QWEN_1B, "thinkpo", 16_384, 4, "projections"),
        UpdateCase(_QWEN_1B, "thinkpo", 32_768, 2, "attention"),
        UpdateCase(_QWEN_1B, "sft", 8192, 8, "projections"),
        UpdateCase(_QWEN_7B, "thinkpo", 8192, 1, "attention", moment_dtype="bfloat16"),
    ),
    (_QWEN_1B, (1, 16, 64, 256), 256),
    seconds=8,
)
SMALL = Scale(
    tuple(UpdateCase("tiny", name, 384, 2, "none") for name in ("thinkpo", "reference", "sft")),
    ("tiny", (1, 4), 8),
    seconds=0.5,
    is_small=True,
)


def bench_device(out: Path, minutes: float, only: Sequence[str], data: Path | None) -> dict[str, Any]:
    """Measures the first device for about `minutes` minutes. Writes `out`/device.md and device.json, and returns them.

    `only` names the parts to run. `data` is a folder that `bench.pack join` has made, for the quality part. Raises
    `UserError` if `out` cannot be written, and `RunError` if no measurement of `only` succeeded.
    """
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thinkpo_device_")))
        kit = _Kit(out, minutes, work, data)
        kit.start()
        stack.callback(kit.planner.shutdown, wait=False, cancel_futures=True)
        kit.plan(only)
        for part, title, run in kit.measurements():
            if part in only:
                kit.measure(part, title, run)
        return kit.finish(only)


class _Kit:
    """The state of one call: what is left of the time, and what was measured."""

    def __init__(self, out: Path, minutes: float, work: Path, data: Path | None) -> None:
        self.out, self.work, self.data = out, work, data
        self.start_time, self.end = time.monotonic(), time.monotonic() + 60 * minutes
        self.outcomes: list[Outcome] = []
        self.machine: dict[str, Any] = {}
        self.scale = ACCELERATOR
        self.planner = ThreadPoolExecutor(1)
        self.plans: dict[UpdateCase, Future[tuple[UpdateCase, int | None]]] = {}
        self.environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(GPU_MEMORY_FRACTION), "HF_HUB_OFFLINE": "1"}
        self.environment |= {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "0", "JAX_TRACEBACK_FILTERING": "off"}

    def start(self) -> None:
        """Describes the machine and writes the first report, so that a wrong `out` fails before any measurement."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.write()
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written: {error}. Choose another folder.") from None
        self.machine = self.child(describe_machine, {})
        if self.machine["platform"] == "cpu":
            log_info("JAX finds no accelerator. The small form only shows that the kit works.")
            self.scale = SMALL
        self.write()

    def plan(self, only: Sequence[str]) -> None:
        """Starts to plan the memory of all updates in the background, on the CPU."""
        if "step" in only:
            self.plans = {case: self.planner.submit(self.choose_remat, case) for case in self.scale.updates}

    def measurements(self) -> Iterator[tuple[str, str, Any]]:
        """Yields part, title and function of each measurement, in order of value."""
        first, *others = self.scale.updates
        yield "numerics", "numerics", self.run_numerics
        yield "step", first.title, partial(self.run_updates, first)
        yield "trl", f"TRL: {first.title}", partial(self.run_trl, first)
        for case in others:
            yield "step", case.title, partial(self.run_updates, case)
        yield "generate", f"generation, {self.scale.generation[0]}", self.run_generation
        yield "quality", "quality, SmolLM2-135M on GSM8K", self.run_quality

    def measure(self, part: str, title: str, run: Any) -> None:
        """Runs one measurement, notes what became of it, and writes the report."""
        start, left = time.monotonic(), self.seconds_left()
        outcome = Outcome(part, title)
        if left < START_SECONDS and not self.scale.is_small:
            outcome.status, outcome.reason = "not reached", f"{max(0, left):.0f} s were left"
        else:
            log_info(f"{title}: started, {left:.0f} s left")
            try:
                outcome.result = run()
                outcome.status = "measured"
            except UserError as error:
                outcome.status, outcome.reason = "skipped", str(error)
            except RunError as error:
                outcome.status, outcome.reason = "failed", str(error)
        outcome.seconds = time.monotonic() - start
        log_info(f"{title}: {outcome.status}{outcome.reason and ': '}{outcome.reason}")
        self.outcomes.append(outcome)
        self.write()

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def child(self, function: Any, arguments: dict[str, Any], **environment: str) -> dict[str, Any]:
        """Runs a function in its own process until the time is over."""
        options = {"folder": self.work / "child", "environment": self.environment | environment}
        return run_in_child(function, arguments, **options, seconds=max(1.0, self.seconds_left()))

    def run_numerics(self) -> dict[str, Any]:
        seconds = min(90.0, self.seconds_left() - MARGIN_SECONDS)
        return self.child(measure_numerics, {"folder": str(self.work / "numerics"), "seconds": seconds,
                                             "small": self.scale.is_small})  # fmt: skip

    def run_updates(self, case: UpdateCase) -> dict[str, Any]:
        """Measures a case with the fastest remat policy that fits. A policy that does not fit leads to the next."""
        case, planned = self.plans[case].result()
        for remat in REMAT_BY_SPEED[REMAT_BY_SPEED.index(case.remat) :]:
            tried = dataclasses.replace(case, remat=remat)
            arguments = {"case": dataclasses.asdict(tried), "folder": str(self.work / "update")}
            try:
                result = self.child(measure_updates, arguments | {"seconds": self.scale.seconds})
            except RunError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or remat == REMAT_BY_SPEED[-1]:
                    raise
                log_info(f"{case.title}: remat {remat} does not fit")
                continue
            return result | {"planned_bytes": planned if remat == case.remat else None}
        raise AssertionError("the last policy returns or raises")

    def run_trl(self, case: UpdateCase) -> dict[str, Any]:
        """Measures TRL on the pairs of a case: with Liger's kernels, or without them if they are missing or fail."""
        folder = self.work / "trl"
        write_model_config(case.model, folder)
        pairs = case.draw_pairs()[: TRL_PAIRS_PER_UPDATE * TRL_UPDATES]
        (folder / PAIRS_FILE).write_text(json.dumps(pairs), encoding="utf-8")
        settings = {"folder": str(folder), "pairs_per_update": TRL_PAIRS_PER_UPDATE, "on_cpu": self.scale.is_small}
        settings |= {"seconds": 3 * self.scale.seconds}
        caches = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
        reason = "liger_kernel is not installed"
        if importlib.util.find_spec("liger_kernel"):
            try:
                return self.child(measure_trl, settings | {"liger": True}, **caches) | {"liger": True}
            except (UserError, RunError) as error:
                reason = str(error)
        return self.child(measure_trl, settings, **caches) | {"liger": False, "liger_problem": reason}

    def run_generation(self) -> dict[str, Any]:
        model, answers, tokens = self.scale.generation
        arguments = {"model": model, "answers_at_once": answers, "tokens_per_answer": tokens}
        arguments |= {"folder": str(self.work / "generation"), "seconds": self.seconds_left() - 2 * MARGIN_SECONDS}
        return self.child(measure_generation, arguments)

    def run_quality(self) -> dict[str, Any]:
        if self.data is None:
            raise UserError("--data is not given. docs/devices.md says how to make the folder.")
        work, seconds = self.work / "quality", self.seconds_left() - MARGIN_SECONDS
        return measure_quality(self.data, work, seconds=seconds, small=self.scale.is_small)

    def choose_remat(self, case: UpdateCase) -> tuple[UpdateCase, int | None]:
        """Returns the case with the fastest remat policy that the planner finds to fit, and the planned bytes.

        Without a compiler for this kind of device, returns the case as it is and None. Raises `UserError` if no policy
        fits.
        """
        spec = find_device_spec(self.machine["device_kind"])
        topology = next((each for each in list_slices(spec.name) if each.size == 1), None) if spec else None
        if topology is None:
            return case, None
        folder = self.work / "plan"
        write_model_config(case.model, folder)
        program, planned = REFERENCE if case.objective == "reference" else UPDATE, 0
        for remat in REMAT_BY_SPEED:
            tried = dataclasses.replace(case, remat=remat)
            config = tried.run_config(folder)
            try:
                planned = compile_stage_program(config, config.stages[0], program, topology).memory.total
            except UserError as error:
                log_info(f"{case.title}: no plan: {error}")
                return case, None
            if planned <= PLANNED_MEMORY_SHARE * topology.memory:
                return tried, planned
        raise UserError(f"needs {planned / GIB:.0f} GiB, and a program gets {topology.memory / GIB:.0f} GiB")

    def write(self) -> None:
        """Writes both files of the report."""
        seconds = time.monotonic() - self.start_time
        write_device_report(self.out, self.machine, self.outcomes, seconds=seconds, is_small=self.scale.is_small)

    def finish(self, only: Sequence[str]) -> dict[str, Any]:
        """Returns the report. Raises `RunError` if nothing was measured."""
        log_info(f"results: {self.out / 'device.md'}")
        if not any(outcome.status == "measured" for outcome in self.outcomes):
            reasons = "\n".join(f"{each.title}: {each.status}: {each.reason}" for each in self.outcomes)
            raise RunError(f"nothing was measured ({', '.join(only)}):\n{reasons}")
        return json.loads((self.out / "device.json").read_text(encoding="utf-8"))
