"""Writes what `bench device` measured: `device.json` for programs and `device.md` for people."""

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkpo_jax.bench.quality import quality_table
from thinkpo_jax.bench.time_by_part import IDLE, OTHER, SCOPES
from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.files import write_atomically

# The goals on an H100 or H200: MFU by objective and row length, and the ratio to TRL's useful tokens per second.
MFU_GOALS = {("thinkpo", 8192): 0.5, ("thinkpo", 16_384): 0.45, ("thinkpo", 32_768): 0.4}
MFU_GOALS |= {("sft", 8192): 0.5, ("reference", 8192): 0.55}
TRL_GOAL = 3.0


@dataclass
class Outcome:
    """What became of one measurement."""

    part: str
    title: str
    status: str = "not reached"  # or: measured, skipped, failed
    reason: str = ""
    seconds: float = 0.0
    result: dict[str, Any] | None = None


def write_device_report(
    out: Path, machine: Mapping[str, Any], outcomes: Sequence[Outcome], *, seconds: float, is_small: bool
) -> None:
    """Writes `device.json` and `device.md` into `out`, each atomically."""
    contents = {"date": datetime.date.today().isoformat(), "seconds": seconds, "is_small": is_small}
    contents |= {"machine": dict(machine), "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]}
    contents = _without_infinities(contents)
    write_atomically(out / "device.json", (json.dumps(contents, indent=1, allow_nan=False) + "\n").encode())
    try:
        text = to_markdown(contents)
    except Exception as error:  # the figures are safe in device.json
        text = f"device.md cannot be written: {type(error).__name__}: {error}. See device.json.\n"
    write_atomically(out / "device.md", text.encode())


def _without_infinities(value: Any) -> Any:
    """Returns JSON data in which numbers that are not finite are None."""
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_markdown(contents: Mapping[str, Any]) -> str:
    """Returns the report as Markdown: the machine, what became of each measurement, and a section per part."""
    machine, outcomes = contents["machine"], contents["outcomes"]
    title = machine.get("device_kind", "no device yet")
    lines = [f"# Measured on {title}, {contents['date']}", ""]
    if contents["is_small"]:
        lines += ["There is no accelerator. This is the small form, which only shows that the kit works.", ""]
    lines += _machine_lines(machine) if machine else []
    rows = [(each["title"], each["status"], f"{each['seconds']:.0f}", _one_line(each["reason"])) for each in outcomes]
    lines += ["", *_table(("measurement", "status", "seconds", "reason"), rows)]
    sections: tuple[tuple[str, str, Callable[[list[Any], Mapping[str, Any]], list[str]]], ...] = (
        ("numerics", "Numerics", _numerics),
        ("step", "Updates", _updates),
        ("trl", "Compared with TRL", _trl),
        ("generate", "Generation", _generation),
        ("quality", "Quality", lambda results, _: [quality_table(results[0])]),
    )
    for part, heading, render in sections:
        results = [each["result"] for each in outcomes if each["part"] == part and each["result"] is not None]
        if results:
            lines += ["", f"## {heading}", "", *render(results, contents)]
    return "\n".join(lines) + "\n"


def _machine_lines(machine: Mapping[str, Any]) -> list[str]:
    limit, peak, matmul = (machine[key] for key in ("limit_bytes", "peak_flops", "matmul_flops"))
    rows = [("device", machine["device_kind"]), ("driver, memory, clock", _one_line(machine["driver"]))]
    rows += [("memory for programs", _gib(limit)), ("peak", f"{peak / 1e12:.0f} TFLOP/s" if peak else "-")]
    rows += [("plain matrix products", f"{matmul / 1e12:.3g} TFLOP/s")]
    rows += [(name, version) for name, version in machine["versions"].items() if name != "devices"]
    return _table(("what", "value"), rows)


def _numerics(results: list[Any], _: Mapping[str, Any]) -> list[str]:
    result = results[0]
    names = ("output", "dq", "dk", "dv")
    attention, others = [], []
    for row in result["rows"]:
        within = "yes" if row["within"] else "**no**"
        if "problem" in row:
            is_attention = "kernel" in row
            cells = [row["what"], *("-",) * (5 if is_attention else 2), f"{within}: {_one_line(row['problem'])}"]
            (attention if is_attention else others).append(cells)
        elif "output" in row["errors"]:
            cells = [_error(row["errors"][name]) for name in names]
            attention.append((row["what"], *cells, f"{row['limit']:.1e}", within))
        else:
            ((name, error),) = row["errors"].items()
            others.append((f"{row['what']}: {name}", _error(error), f"{row['limit']:.1e}", within))
    kernel = result["kernel"] or f"none, {result['kernel_problem']}"
    lines = [f"Attention kernel of the device: {kernel}. Errors are relative to float32 unless a unit is given.", ""]
    lines += _table(("comparison", "error", "limit", "within"), others)
    lines += ["", *_table(("attention", *names, "limit", "within"), attention)]
    return lines + ([f"\n{result['num_skipped']} comparisons were not reached."] if result["num_skipped"] else [])


def _updates(results: list[Any], contents: Mapping[str, Any]) -> list[str]:
    rows = []
    for each in results:
        goal = MFU_GOALS.get((each["objective"], each["row_length"])) if _has_goals(contents) else None
        mfu = "-" if each["mfu"] is None else f"{each['mfu']:.1%}"
        rows.append((
            each["title"], each["attention"], each["remat"], f"{each['tokens_per_second']:,.0f}", mfu,
            f"{goal:.0%}" if goal else "-", _gib(each["peak_bytes"]), _gib(each["planned_bytes"]),
            f"{each['seconds_per_update']:.3g}", f"{each['compile_seconds']:.0f}", f"{each['packing_efficiency']:.1%}",
        ))  # fmt: skip
    header = ("update", "attention", "remat", "useful tokens/s", "MFU", "goal", "peak memory", "planned memory")
    lines = _table((*header, "seconds", "compile, s", "packing"), rows)
    names = (*SCOPES, OTHER, IDLE)
    shares = [
        (each["title"], *(f"{each['profile']['shares'][name]:.1%}" for name in names))
        if "shares" in each["profile"]
        else (each["title"], _one_line(each["profile"]["problem"]), *("-",) * (len(names) - 1))
        for each in results
    ]
    lines += ["", "Share of time by part:", "", *_table(("update", *names), shares)]
    lines += ["", "MFU counts causal attention within segments and no padding. Planned memory is for full rows."]
    lines += ["Other is outside of all scopes: slices of layer weights, saved activations and the sum of gradients."]
    lines += ["A profile can run without CUDA graphs, so idle can be larger than in training."]
    longest = [
        (each["title"], operation["name"], operation["part"], f"{operation['share']:.1%}")
        for each in results
        for operation in each["profile"].get("operations", ())[:5]
    ]
    return [*lines, "", "The longest operations:", "", *_table(("update", "operation", "part", "share"), longest)]


def _trl(results: list[Any], contents: Mapping[str, Any]) -> list[str]:
    theirs = results[0]
    speed = theirs["tokens"] / theirs["seconds"]
    outcomes = {each["title"]: each for each in contents["outcomes"]}
    title = next(title for title, each in outcomes.items() if each["part"] == "trl")
    ours = outcomes.get(title.removeprefix("TRL: "), {}).get("result")
    kernels = "with Liger's kernels" if theirs["use_liger"] else f"without Liger: {_one_line(theirs['liger_problem'])}"
    rows = [("TRL", f"{speed:,.0f}", _gib(theirs["peak_memory"]))]
    versions = ", ".join(f"{name} {version}" for name, version in theirs["versions"].items())
    lines = [f"TRL's DPOTrainer on the first of the same pairs, {kernels}. Versions: {versions}."]
    lines += ["On a GPU: bfloat16 autocast over float32 weights, gradient checkpointing, SDPA attention.", ""]
    if ours is not None:
        rows.append(("thinkpo_jax", f"{ours['tokens_per_second']:,.0f}", _gib(ours["peak_bytes"])))
    lines += _table(("side", "useful tokens/s", "peak memory"), rows)
    if ours is not None:
        goal = f" (goal: {TRL_GOAL:g})" if _has_goals(contents) else ""
        lines += ["", f"Ratio: {ours['tokens_per_second'] / speed:.2f}{goal}."]
    return lines


def _generation(results: list[Any], _: Mapping[str, Any]) -> list[str]:
    result = results[0]
    rows = [
        tuple(f"{row[name]:,.4g}" for name in ("answers", "tokens_per_second", "seconds", "compile_seconds"))
        for row in result["rows"]
    ]
    peak = _gib(result["peak_bytes"])
    lines = [f"{result['model']}, {result['tokens_per_answer']} tokens per answer, peak memory {peak}.", ""]
    lines += _table(("answers at once", "tokens/s", "seconds", "compile, s"), rows)
    if mixed := result.get("mixed"):
        counts = f"{mixed['answers']} answers of {mixed['mean_tokens']:.0f} tokens on average in {mixed['slots']} slots"
        lines += ["", f"{counts}: continuous batching is {mixed['ratio']:.2f} times as fast as static batches."]
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _has_goals(contents: Mapping[str, Any]) -> bool:
    """Whether the goals are for this device."""
    return any(name in contents["machine"].get("device_kind", "") for name in ("H100", "H200"))


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f} GiB"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
