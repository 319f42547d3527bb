"""Splits the time of a compiled program by the parts of the model, from a profile of the device.

A part is a `jax.named_scope` in the model or the train step. The profile names the operations of the program, and the
program says to which scope each of them belongs.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from thinkpo_jax.planning.hlo import split_computations

SCOPES = ("attention", "projections", "feed_forward", "head", "embedding", "optimizer")
OTHER, IDLE = "other", "idle"
NUM_TOP_OPERATIONS = 12
_SCOPE = re.compile(rf"(?<!\w)({'|'.join(SCOPES)})(?!\w)")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.-]+) = (.*)")
_OPCODE = re.compile(r"(?:^|[\s})\]])([a-z][\w-]*)\(")
_CONTROL_FLOW = ("while", "conditional", "call", "async-start", "async-done")  # they contain operations
_DEVICE_PLANE = "/device:"


def profile_updates(run: Callable[[], object], program: str, folder: Path) -> dict[str, Any]:
    """Profiles a function that runs a program, and returns the shares of time by part.

    `program` is its optimized HLO text. Returns `{"problem": reason}` if the profile cannot be made or read.
    """
    trace = folder / "trace"
    shutil.rmtree(trace, ignore_errors=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    try:
        with jax.profiler.trace(trace, profiler_options=options):
            run()
        files = sorted(trace.rglob("*.xplane.pb"))
        if not files:
            return {"problem": "the profiler wrote no file"}
        return time_by_part(jax.profiler.ProfileData.from_file(str(files[-1])), program)
    except Exception as error:  # a profile is extra: its failure must not cost the measurement
        return {"problem": f"{type(error).__name__}: {error}"[:300]}
    finally:
        shutil.rmtree(trace, ignore_errors=True)


def time_by_part(profile: Any, program: str) -> dict[str, Any]:
    """Returns `shares` of the profiled time by part, with `other` and `idle`, and the longest operations.

    Idle is the time between the first and the last operation in which none runs. Other is the time of operations
    outside of all scopes: slices of layer weights, saved activations and the sum of gradients. Shares of parallel
    operations are scaled so that all shares sum to 1.
    """
    parts = operation_parts(program)
    seconds: dict[str, float] = dict.fromkeys((*SCOPES, OTHER), 0.0)
    operations: dict[tuple[str, str], float] = {}
    intervals: list[tuple[float, float]] = []
    for name, start, duration in _device_events(profile):
        part = parts.get(name, OTHER)
        if part is None:
            continue
        seconds[part] += duration / 1e9
        operations[name, part] = operations.get((name, part), 0.0) + duration / 1e9
        intervals.append((start, start + duration))
    if not intervals:
        return {"problem": "the profile has no operation of the device"}
    busy, span = _covered(intervals), max(end for _, end in intervals) - min(start for start, _ in intervals)
    total, busy_share = sum(seconds.values()), busy / span if span else 1.0
    shares = {part: seconds[part] / total * busy_share for part in (*SCOPES, OTHER)} | {IDLE: 1 - busy_share}
    top = sorted(operations.items(), key=lambda item: -item[1])[:NUM_TOP_OPERATIONS]
    return {
        "shares": shares,
        "operations": [{"name": name, "part": part, "share": time / total} for (name, part), time in top],
    }


def _device_events(profile: Any) -> Iterator[tuple[str, float, float]]:
    """Yields name, start and duration in nanoseconds of the operations that the device ran.

    GPUs and CPUs name the operation in a statistic. Kernels without it keep their own name. TPUs name the event.
    """
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith(_DEVICE_PLANE)]
    if not devices and jax.default_backend() != "cpu":
        return  # events of the host are no events of the device
    for plane in devices[:1] or planes:
        for line in plane.lines:
            if devices and not re.match(r"Stream|XLA Ops", line.name):
                continue
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is None and not devices:
                    continue  # other events of the host
                instruction = _INSTRUCTION.match(event.name)
                name = operation or (instruction[1] if instruction else event.name)
                yield str(name), event.start_ns, event.duration_ns


def operation_parts(program: str) -> dict[str, str | None]:
    """Returns the part of each operation of a program by its name. It is None for loops and calls.

    A fusion without a scope of its own gets the most frequent part of what it fuses.
    """
    bodies, _ = split_computations(program)
    parts: dict[str, str | None] = {}
    for lines in bodies.values():
        for line in lines:
            if (match := _INSTRUCTION.match(line.strip())) is None:
                continue
            name, rest = match.groups()
            opcode = _OPCODE.search(rest)
            if opcode and opcode[1] in _CONTROL_FLOW:
                parts[name] = None
                continue
            callee = re.search(r"calls=%?([\w.-]+)", rest)
            parts[name] = _scope(rest) or _most_frequent(map(_scope, bodies.get(callee[1], ()) if callee else ()))
    return parts


def _scope(line: str) -> str | None:
    """Returns the innermost part in the metadata of an instruction, or None."""
    name = re.search(r'op_name="([^"]*)"', line)
    scopes = _SCOPE.findall(name[1]) if name else []
    return scopes[-1] if scopes else None


def _most_frequent(parts: Iterable[str | None]) -> str:
    counted = Counter(part for part in parts if part is not None)
    return counted.most_common(1)[0][0] if counted else OTHER


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
