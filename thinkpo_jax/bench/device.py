"""Measures an accelerator in a few minutes, unattended and without a network: `python -m thinkpo_jax.bench device`.

The measurements run in order of value, each in its own process. After each of them `device.md` and `device.json` are
written again, so an interrupted call leaves results. A measurement whose needs are missing is skipped with the reason.
Without an accelerator everything runs in a small form, which only shows that the kit works.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from thinkpo_jax.bench.child import INTERRUPTED, Child
from thinkpo_jax.bench.device_report import Outcome, write_device_report
from thinkpo_jax.bench.generation import measure_generation
from thinkpo_jax.bench.machine import describe_machine
from thinkpo_jax.bench.numerics import measure_numerics
from thinkpo_jax.bench.quality import measure_quality
from thinkpo_jax.bench.trl import PAIRS_FILE, cache_variables, measure_trl
from thinkpo_jax.bench.update_plans import REMAT_BY_SPEED, plan_updates
from thinkpo_jax.bench.updates import UpdateCase, measure_updates
from thinkpo_jax.bench.workload import write_model_config
from thinkpo_jax.planning.topology import GPU_MEMORY_FRACTION
from thinkpo_jax.runtime.cli import handling
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.files import lock_folder

PARTS = ("numerics", "step", "trl", "generate", "quality")
# Seconds that a measurement of each part may take. The quality part gets what is left.
LIMIT_SECONDS = {"machine": 90, "numerics": 120, "step": 150, "trl": 200, "generate": 150}
MIN_SECONDS = {"quality": 180}  # A measurement starts only with so much time left.
DEFAULT_MIN_SECONDS = 45
MARGIN_SECONDS = 20  # between the time that a measurement is told and the time at which it is ended
PLAN_SECONDS = 60  # that an update waits for its plan
SEED_BYTES, MAX_SEEDS_AT_ONCE = 30 * GIB, 3  # memory of a seed of the quality part, and how many share the device
QUALITY_BYTES = 21 * GIB  # of disk, for models and checkpoints of three seeds
TRL_PAIRS_PER_UPDATE, TRL_UPDATES = 8, 4
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ALLOC_FAILED")  # of XLA, CUDA and cuDNN


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
Measurement = Callable[[], dict[str, Any]]


def bench_device(out: Path, minutes: float, only: Sequence[str], data: Path | None) -> dict[str, Any]:
    """Measures the first device for about `minutes` minutes. Writes `out`/device.md and device.json, and returns them.

    `only` names the parts to run. `data` is a folder that `bench.pack join` has made, for the quality part. Raises
    `UserError` if `out` cannot be written, has results or is in use. Raises `RunError` if nothing was measured.
    """
    with ExitStack() as stack:
        # So that the stack is left, also if a terminal is closed. Under nohup that is ignored.
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signals = (signal.SIGTERM,) if is_nohup else (signal.SIGTERM, signal.SIGHUP)
        stack.enter_context(handling(signal.default_int_handler, *signals))
        if (out / "device.json").exists():
            raise UserError(f"--out {out}: it has results already. Choose another folder.")
        stack.enter_context(lock_folder(out, "--out"))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thinkpo_device_")))
        kit = _Kit(out, minutes, work, data)
        stack.callback(kit.end_planner)
        try:
            kit.start(only)
            for part, title, run in kit.measurements():
                if part in only:
                    kit.measure(part, title, run)
        except KeyboardInterrupt:
            results = out / "device.md"
            raise KeyboardInterrupt(f"Stopped. Results so far: {results}. Another call needs another --out.") from None
        return kit.finish()


class _Kit:
    """The state of one call: what is left of the time, and what was measured."""

    def __init__(self, out: Path, minutes: float, work: Path, data: Path | None) -> None:
        self.out, self.work, self.data = out, work, data
        self.start_time, self.end = time.monotonic(), time.monotonic() + 60 * minutes
        self.outcomes: list[Outcome] = []
        self.machine: dict[str, Any] = {}
        self.scale = ACCELERATOR
        self.planner: Child | None = None
        self.attention = "auto"  # of updates. It becomes blockwise if the kernel of the device fails.
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(GPU_MEMORY_FRACTION), "HF_HUB_OFFLINE": "1"}
        self.environment |= {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": device, "TMPDIR": str(work)}

    def start(self, only: Sequence[str]) -> None:
        """Describes the machine, and starts to plan updates. A wrong `out` fails before any measurement."""
        try:
            self.write()
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written: {error}. Choose another folder.") from None
        try:
            self.machine = self.child("machine", describe_machine, {})
        except RunError as error:
            raise RunError(f"the device cannot be described: {error}") from None
        if self.machine["platform"] == "cpu":
            log_info("JAX finds no accelerator. The small form only shows that the kit works.")
            self.scale = SMALL
        self.write()
        if "step" in only:
            arguments = {"cases": [dataclasses.asdict(case) for case in self.scale.updates]}
            arguments |= {name: self.machine[name] for name in ("device_kind", "limit_bytes")}
            arguments |= {"folder": str(self.work / "plans")}
            environment = self.environment | {"JAX_PLATFORMS": "cpu"}
            options = {"folder": self.work / "planner", "environment": environment}
            self.planner = Child(plan_updates, arguments, **options, niceness=19)  # the measurements come first

    def measurements(self) -> Iterator[tuple[str, str, Measurement]]:
        """Yields part, title and function of each measurement, in order of value."""
        first, *others = self.scale.updates
        yield "numerics", "numerics", self.run_numerics
        yield "step", first.title, partial(self.run_updates, first)
        yield "trl", f"TRL: {first.title}", partial(self.run_trl, first)
        for case in others:
            yield "step", case.title, partial(self.run_updates, case)
        yield "generate", f"generation, {self.scale.generation[0]}", self.run_generation
        yield "quality", "quality, SmolLM2-135M on GSM8K", self.run_quality

    def measure(self, part: str, title: str, run: Measurement) -> None:
        """Runs one measurement, notes what became of it, and writes the report."""
        start, left = time.monotonic(), self.seconds_left()
        outcome = Outcome(part, title)
        self.outcomes.append(outcome)
        try:
            self.check_time(MIN_SECONDS.get(part, DEFAULT_MIN_SECONDS))
            log_info(f"{title}: started, {left:.0f} s left")
            outcome.result = run()
            outcome.status, outcome.reason = "measured", outcome.result.get(INTERRUPTED, "")
        except TimeoutError as error:
            outcome.status, outcome.reason = "not reached", str(error)
        except UserError as error:
            outcome.status, outcome.reason = "skipped", str(error)
        except Exception as error:  # one measurement must not cost the others
            name = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
            outcome.status, outcome.reason = "failed", f"{name}{error}"
        outcome.seconds = time.monotonic() - start
        log_info(f"{title}: {outcome.status}{outcome.reason and ': '}{outcome.reason}")
        self.write()

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def check_time(self, seconds: float) -> None:
        """Raises `TimeoutError` if less is left. The small form needs less than it says."""
        if self.seconds_left() < (seconds if not self.scale.is_small else 1):
            raise TimeoutError(f"{max(0, self.seconds_left()):.0f} s were left")

    def child(
        self, part: str, function: Callable[..., Any], arguments: dict[str, Any], **environment: str
    ) -> dict[str, Any]:
        """Runs a function in its own process, until its limit or the end. Keeps the log if it does not finish."""
        limit = min(LIMIT_SECONDS[part], max(1.0, self.seconds_left()))
        child = Child(function, arguments, folder=self.work / "child", environment=self.environment | environment)
        result: dict[str, Any] = {INTERRUPTED: ""}
        try:
            result = child.wait(limit)
        finally:
            if INTERRUPTED in result:
                with (self.out / "failures.log").open("a", encoding="utf-8") as log:
                    log.write(f"{function.__name__} {arguments}\n{child.log.read_text(errors='replace')}\n")
        return result

    def end_planner(self) -> None:
        """Ends the only process that can still run. The others are waited for."""
        if self.planner is not None:
            self.planner.kill()

    def run_numerics(self) -> dict[str, Any]:
        seconds = min(LIMIT_SECONDS["numerics"], self.seconds_left()) - MARGIN_SECONDS
        arguments = {"folder": str(self.work / "numerics"), "seconds": seconds, "is_small": self.scale.is_small}
        return self.child("numerics", measure_numerics, arguments)

    def run_updates(self, case: UpdateCase) -> dict[str, Any]:
        """Measures a case as planned.

        If a remat policy does not fit, the next one is tried. If the device's attention kernel fails, it is blockwise
        attention.
        """
        case, planned = self.plan_of(case)
        remats, attempt = list(REMAT_BY_SPEED[REMAT_BY_SPEED.index(case.remat) :]), case
        while True:
            self.check_time(DEFAULT_MIN_SECONDS)
            attempt = dataclasses.replace(attempt, remat=remats[0], attention=self.attention)
            arguments = {"case": dataclasses.asdict(attempt), "folder": str(self.work / "update")}
            try:
                result = self.child("step", measure_updates, arguments | {"seconds": self.scale.seconds})
                return result | {"planned_bytes": planned if attempt.remat == case.remat else None}
            except RunError as error:
                is_out_of_memory = any(text in str(error) for text in OUT_OF_MEMORY)
                if is_out_of_memory and len(remats) > 1:
                    log_info(f"{case.title}: remat {remats.pop(0)} does not fit")
                elif not is_out_of_memory and self.attention == "auto" and self.machine["platform"] != "cpu":
                    log_info(f"{case.title}: failed, now with blockwise attention: {error}")
                    self.attention = "blockwise"
                else:
                    raise

    def plan_of(self, case: UpdateCase) -> tuple[UpdateCase, int | None]:
        """Returns the case with its planned remat policy, and the planned bytes. Waits for the plan for a while.

        Without a plan, returns the case as it is and None. Raises `UserError` if the case does not fit.
        """
        end = time.monotonic() + min(PLAN_SECONDS, self.seconds_left() - DEFAULT_MIN_SECONDS)
        plan: dict[str, Any] | None = None
        while self.planner is not None and plan is None:
            is_over = not self.planner.is_running() or time.monotonic() > end
            plan = (self.planner.result() or {}).get(case.title)
            if is_over:
                break
            time.sleep(0.1)
        if plan is not None and "problem" in plan:
            raise UserError(plan["problem"])
        if plan is None or "unknown" in plan:
            return case, None
        return dataclasses.replace(case, remat=plan["remat"]), plan["bytes"]

    def run_trl(self, case: UpdateCase) -> dict[str, Any]:
        """Measures TRL on the first pairs of a case: with Liger's kernels, or without them if they are missing."""
        folder = self.work / "trl"
        write_model_config(case.model, folder)
        pairs = case.draw_pairs()[: TRL_PAIRS_PER_UPDATE * TRL_UPDATES]
        (folder / PAIRS_FILE).write_text(json.dumps(pairs), encoding="utf-8")
        settings = {"folder": str(folder), "pairs_per_update": TRL_PAIRS_PER_UPDATE, "is_on_cpu": self.scale.is_small}
        settings |= {"seconds": 3 * self.scale.seconds}
        caches = cache_variables(folder)
        reason = "liger_kernel is not installed"
        if importlib.util.find_spec("liger_kernel") and not self.scale.is_small:
            try:
                return self.child("trl", measure_trl, settings | {"use_liger": True}, **caches) | {"use_liger": True}
            except RunError as error:
                self.check_time(2 * DEFAULT_MIN_SECONDS)
                reason = str(error)
        return self.child("trl", measure_trl, settings, **caches) | {"use_liger": False, "liger_problem": reason}

    def run_generation(self) -> dict[str, Any]:
        model, answers, tokens = self.scale.generation
        arguments = {"model": model, "answers_at_once": answers, "tokens_per_answer": tokens}
        return self.child("generate", measure_generation, arguments | {"folder": str(self.work / "generation")})

    def run_quality(self) -> dict[str, Any]:
        if self.data is None:
            raise UserError("--data is not given. docs/devices.md says how to make the folder.")
        at_once = min(MAX_SEEDS_AT_ONCE, max(1, (self.machine["limit_bytes"] or 0) // SEED_BYTES))
        free, needed = shutil.disk_usage(self.work).free, 1 if self.scale.is_small else QUALITY_BYTES
        if free < needed:
            raise UserError(
                f"{self.work} has {free / GIB:.0f} GiB free, but models need {needed / GIB:.0f}. Set TMPDIR."
            )
        options = {"seconds": self.seconds_left() - MARGIN_SECONDS, "is_small": self.scale.is_small}
        options |= {"at_once": at_once, "environment": self.environment}
        result = measure_quality(self.data, self.work / "quality", **options)
        if not result["seeds"]:
            raise RunError("\n".join(f"seed {seed}: {reason}" for seed, reason in result["unfinished"].items()))
        return result

    def write(self) -> None:
        """Writes both files of the report."""
        seconds = time.monotonic() - self.start_time
        write_device_report(self.out, self.machine, self.outcomes, seconds=seconds, is_small=self.scale.is_small)

    def finish(self) -> dict[str, Any]:
        """Prints the report and returns it. Raises `RunError` if nothing was measured."""
        print((self.out / "device.md").read_text(encoding="utf-8"), flush=True)
        log_info(f"results: {self.out / 'device.md'}")
        if not any(outcome.status == "measured" for outcome in self.outcomes):
            reasons = "\n".join(f"{each.title}: {each.status}: {each.reason}" for each in self.outcomes)
            raise RunError(f"nothing was measured:\n{reasons}")
        return json.loads((self.out / "device.json").read_text(encoding="utf-8"))
