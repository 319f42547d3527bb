"""Reads the collectives and the memory use of a compiled program from the files that XLA dumps.

With `xla_dump_to`, XLA writes the optimized program of one device as HLO text, and a memory usage report.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# TPUs fuse a reduce-scatter into a computation of this name: an all-reduce, then a slice for each device.
_FUSED_REDUCE_SCATTER = "all-reduce-scatter"
COLLECTIVE_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVE_KINDS)})(-start)?\(")
_CALLEE = re.compile(r"(body|calls|to_apply|true_computation|false_computation|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")  # the bits of an element, the shape


class Collective(NamedTuple):
    """A collective operation of a program."""

    kind: str
    bytes_received: float  # that one device receives in each execution
    num_executions: int  # in one run of the program
    device_group: tuple[int, ...]  # the first of its replica groups


def find_collectives(program: str, num_devices: int) -> list[Collective]:
    """Returns the collectives of a program in HLO text. Those in a loop count once per iteration.

    A loop counts as one iteration if its length depends on data. Every branch of a conditional counts.
    TPU fusions repeat one collective on one channel, which counts once. Different collectives may share a channel.
    """
    bodies, entry = split_computations(program)
    return _collect(bodies, (entry,), num_devices)


def find_loop_collectives(program: str, num_devices: int) -> list[Collective]:
    """Returns the collectives of one iteration of the program's longest outer loop, with those of its condition."""
    bodies, entry = split_computations(program)
    loops: list[dict[str, str]] = []

    def visit(computation: str) -> None:
        for line in bodies.get(computation, ()):
            callees = dict(_CALLEE.findall(line))
            if "body" in callees:
                loops.append(callees)
            else:
                for callee, _ in _parse_calls(line, bodies):
                    visit(callee)

    visit(entry)
    longest = max(loops, key=lambda loop: len(bodies[loop["body"]]))
    return _collect(bodies, (longest["body"], longest["condition"]), num_devices)


def _collect(bodies: dict[str, list[str]], roots: Sequence[str], num_devices: int) -> list[Collective]:
    """Returns the collectives of the computations `roots` and of all that they call."""
    collectives: dict[tuple[str, str, float], Collective] = {}

    def visit(computation: str, num_executions: int) -> None:
        for number, line in enumerate(bodies.get(computation, ())):
            if match := _COLLECTIVE.search(line):
                collective = _parse_collective(line, match, computation, num_devices)
                channel = re.search(r"channel_id=(\d+)", line)
                channel_id = channel[1] if channel else f"{computation} {number} {num_executions}"
                key = channel_id, collective.kind, collective.bytes_received
                known = collectives.get(key, collective).num_executions
                collectives[key] = collective._replace(num_executions=max(num_executions, known))
            else:
                for callee, num_calls in _parse_calls(line, bodies):
                    visit(callee, num_executions * num_calls)

    for root in roots:
        visit(root, 1)
    return [collective for collective in collectives.values() if len(collective.device_group) > 1]


def split_computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _parse_collective(line: str, match: re.Match[str], computation: str, num_devices: int) -> Collective:
    group = _device_group(line, num_devices)
    types, kind, is_async = match[1], match[2], match[3] is not None
    if is_async:  # Its result includes its inputs, which `_bytes_received` knows, and its state.
        types = types.replace("u32[]", "")
    size = _num_bytes(types)
    if kind == "all-reduce" and computation.startswith(_FUSED_REDUCE_SCATTER):
        kind, size = "reduce-scatter", size / len(group)
    return Collective(kind, _bytes_received(kind, size, len(group), is_async=is_async), 1, group)


def _parse_calls(line: str, bodies: dict[str, list[str]]) -> list[tuple[str, int]]:
    """Returns the computations that an instruction calls, each with its number of calls."""
    callees = dict(_CALLEE.findall(line))
    if "body" in callees:
        return [(callees["body"], _trip_count(line, bodies.get(callees.get("condition", ""), [])))]
    branches = [branch.strip().lstrip("%") for names in _BRANCHES.findall(line) for branch in names.split(",")]
    return [(callee, 1) for callee in [*callees.values(), *branches]]


def _trip_count(line: str, condition: list[str]) -> int:
    """Returns the trip count that the compiler states, or else the only constant that the loop condition compares."""
    if stated := re.search(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)', line):
        return int(stated[1])
    constants = [int(number) for text in condition for number in re.findall(r" constant\((\d+)\)", text)[:1]]
    return constants[0] if len(constants) == 1 else 1


def _num_bytes(types: str) -> int:
    """Returns the bytes of all arrays of an HLO type, which may be a tuple."""
    return sum(
        math.ceil(int(bits or 8) * math.prod(int(size) for size in shape.split(",") if size) / 8)
        for bits, shape in _ARRAY.findall(types)
    )


def _bytes_received(kind: str, size: float, members: int, *, is_async: bool) -> float:
    """Returns the bytes that one device receives.

    `size` is the bytes of the result. If `is_async`, it includes the inputs.
    """
    others = members - 1
    if kind == "all-gather":
        return (size * members / (members + 1) if is_async else size) * others / members
    if kind == "all-reduce":
        return 2 * size * others / members
    if kind == "reduce-scatter":
        return (size / (members + 1) if is_async else size) * others
    if kind == "collective-permute":
        return size / 2 if is_async else size
    return (size / 2 if is_async else size) * others / members  # all-to-all


def _device_group(line: str, num_devices: int) -> tuple[int, ...]:
    """Returns the first replica group: {{0,1},{2,3}}, [2,2]<=[4], mesh['x'=2,'y'=2] {'x'}, or a pair of a permute."""
    if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return int(pair[1]), int(pair[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, listed[1].split(",")))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        devices = np.arange(num_devices).reshape([int(size) for size in iota[3].split(",")])
        devices = devices.transpose([int(axis) for axis in iota[4].split(",")]) if iota[4] else devices
        return tuple(devices.reshape(-1, int(iota[2]))[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'\s*=\s*(\d+)", mesh[1])}
        axes = re.findall(r"'([^']+)'", mesh[2])
        devices = np.arange(num_devices).reshape([*sizes.values()])
        return tuple(devices[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1).tolist())
    return tuple(range(num_devices))


def total_memory(report: str) -> int | None:
    """Returns the bytes of device memory that a program takes, arguments included, from its memory usage report.

    Returns None if the report is not complete yet.
    """
    total = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)\s", report) or re.search(
        r"Total bytes used: (\d+)\s", report
    )
    return None if total is None else int(total[1])
