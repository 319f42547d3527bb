"""What does a compiled program say of itself? The exchanges between devices, and the memory of one device.

Both are read from what XLA writes to `xla_dump_to`: the optimised program of one device as text, and the report on its
memory.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# TPUs write a reduce-scatter as a fused computation of this name: an all-reduce, and the part a device keeps.
_FUSED_SCATTER = "all-reduce-scatter"
COLLECTIVE_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_EXCHANGE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVE_KINDS)})(-start)?\(")
_CALLED = re.compile(r"(body|calls|to_apply|true_computation|false_computation|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective operation of a program."""

    kind: str
    bytes_received: float  # bytes that a device receives each time
    num_executions: int  # how often it is done in a run of the program
    device_group: tuple[int, ...]  # the devices of the first of its groups


class _Line(NamedTuple):
    """An instruction that matters: an exchange with its channel, or a call of a computation so many times."""

    exchange: Collective | None = None
    channel: str = ""
    called: str = ""
    times: int = 1


def find_collectives(program: str, devices: int) -> list[Collective]:
    """The collective operations of a program in HLO text, those in loops as often as the loops are gone through.

    A loop whose trips depend on data counts once; of branches each counts. The same operation on one channel in several
    places (the steps of TPUs' fusions) is one exchange; different ones may have one channel.
    """
    computations, entry = _computations(program, devices)
    found: dict[tuple[str, str, float], Collective] = {}

    def visit(name: str, times: int) -> None:
        for number, line in enumerate(computations.get(name, ())):
            if line.exchange is not None:
                place = line.channel or f"{name} {number} {times}"
                key = place, line.exchange.kind, line.exchange.bytes_received
                before = found.get(key)
                times_before = 0 if before is None else before.num_executions
                found[key] = line.exchange._replace(num_executions=max(times, times_before))
            else:
                visit(line.called, times * line.times)

    visit(entry, 1)
    return list(found.values())


def _computations(program: str, devices: int) -> tuple[dict[str, list[_Line]], str]:
    """The lines that matter by computation, and the name of the computation where the program begins."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return {name: [*_lines(name, bodies, devices)] for name in bodies}, entry


def _lines(name: str, bodies: dict[str, list[str]], devices: int) -> Iterator[_Line]:
    for line in bodies[name]:
        if match := _EXCHANGE.search(line):
            group = _group(line, devices)
            if len(group) > 1:
                channel = re.search(r"channel_id=(\d+)", line)
                started = match[3] is not None
                types = match[1].replace("u32[]", "") if started else match[1]  # those keep its state
                kind, size = match[2], _bytes(types)
                if kind == "all-reduce" and name.startswith(_FUSED_SCATTER):
                    kind, size = "reduce-scatter", size / len(group)
                received = _received(kind, size, len(group), started=started)
                yield _Line(Collective(kind, received, 1, group), channel[1] if channel else "")
            continue
        called = dict(_CALLED.findall(line))
        if "body" in called:
            yield _Line(called=called["body"], times=_trips(line, bodies.get(called.get("condition", ""), [])))
            continue
        others = [*called.values()]
        for branches in _BRANCHES.findall(line):
            others += [branch.strip().lstrip("%") for branch in branches.split(",")]
        yield from (_Line(called=other) for other in others)


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop is gone through: as the compiler says, or by the constant that its condition compares with."""
    if known := re.search(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)', line):
        return int(known[1])
    constants = [int(found[1]) for text in condition if (found := re.search(r" constant\((\d+)\)", text))]
    return constants[0] if len(constants) == 1 else 1


def _bytes(types: str) -> int:
    """The bytes of all arrays of a type, which may be a tuple."""
    return sum(
        math.ceil(_bits(kind) * math.prod(int(size) for size in sizes.split(",") if size) / 8)
        for kind, sizes in _ARRAY.findall(types)
    )


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return 8 if digits is None else int(digits[0])


def _received(kind: str, size: float, members: int, *, started: bool) -> float:
    """Bytes that one device receives, by what the operation gives and, where it is `started`, takes."""
    others = members - 1
    if kind == "all-gather":
        return (size * members / (members + 1) if started else size) * others / members
    if kind == "all-reduce":
        return 2 * size * others / members
    if kind == "reduce-scatter":
        return (size / (members + 1) if started else size) * others
    if kind == "collective-permute":
        return size / 2 if started else size
    return size * others / members


def _group(line: str, devices: int) -> tuple[int, ...]:
    """The first group of devices of an operation: {{0,1},{2,3}}, [2,2]<=[4], mesh['x'=2,'y'=2] {'x'}, or pairs."""
    if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return int(pair[1]), int(pair[2])
    if plain := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, plain[1].split(",")))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        order = np.arange(devices).reshape([int(size) for size in counted[3].split(",")])
        order = order.transpose([int(axis) for axis in counted[4].split(",")]) if counted[4] else order
        return tuple(order.reshape(-1, int(counted[2]))[0].tolist())
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'\s*=\s*(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'", named[2])
        whole = np.arange(devices).reshape([*sizes.values()])
        return tuple(whole[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1).tolist())
    return tuple(range(devices))


def total_memory(report: str) -> int | None:
    """Bytes of a device's main memory that a program takes, arguments included, by the report on its memory.

    None where the report is not written that far yet.
    """
    total = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)\s", report) or re.search(
        r"Total bytes used: (\d+)\s", report
    )
    return None if total is None else int(total[1])
