"""Runs the command `pairs` in tests and reads what it writes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from pyarrow import parquet

from thinkpo_jax.pairs import main
from thinkpo_jax.runtime.cli import run_command

Config = dict[str, Any]
UNBOXED = {"boxed": False, "long_agrees": False, "max_wrong_short_fraction": None}
LONG = [
    {"prompt": "What is\n 1+1?", "response": "<think>hm</think>\\boxed{2}", "reference": 2},
    {"prompt": "2+2?", "response": "<think>hm, hm</think>\\boxed{4}", "reference": "4"},
    {"prompt": "2+2?", "response": "<think>wait</think>\\boxed{4}", "reference": "4"},
    {"prompt": "3+3?", "response": "<think>oh</think>\\boxed{6}", "reference": "6"},
]
SHORT = [
    {"prompt": " What is 1+1? ", "response": "\\boxed{2}"},
    {"prompt": "2+2?", "response": "It is \\boxed{4}"},
    {"prompt": "2+2?", "response": "So \\boxed{5}"},
    {"prompt": "9+9?", "response": "\\boxed{18}"},
]


def write_jsonl(path: Path, rows: Sequence[Any]) -> str:
    """Writes one line for each row. A text is written as it is."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def run_pairs(config: Config, *assignments: str) -> int:
    """Runs the command and returns its exit status."""
    path = Path(config["out"]).parent / "pairs.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return run_command(main, ["--config", str(path), *(["--set", *assignments] if assignments else [])])


def built_pairs(config: Config, *assignments: str) -> list[dict[str, Any]]:
    """Runs the command and returns the pairs that it writes. Checks that the counts of the data card add up."""
    assert run_pairs(config, *assignments) == 0
    pairs = read_table(config).to_pylist()
    rows, _, candidates = card_counts(config)
    num_dropped_rows = sum(count for reason, count in rows.items() if reason != "read")
    assert rows["read"] - num_dropped_rows == candidates["all"] or config["short"]["by"] == "join"
    assert candidates["all"] == len(pairs) + sum(count for reason, count in candidates.items() if reason != "all")
    assert all(pair["gap"] == pair["chosen_tokens"] - pair["rejected_tokens"] for pair in pairs)
    return pairs


def read_table(config: Config) -> pyarrow.Table:
    return parquet.read_table(Path(config["out"]) / "pairs.parquet")


def read_card(config: Config) -> str:
    return (Path(config["out"]) / "README.md").read_text(encoding="utf-8")


def card_counts(config: Config) -> list[dict[str, int]]:
    """Returns the three tables of the data card: rows, short answers, candidates."""
    tables = re.findall(r"\|--:\|\n((?:\|.*\n)+)", read_card(config))
    return [{what: int(n.replace(",", "")) for what, n in re.findall(r"\| (.*) \| (.*) \|", t)} for t in tables]


def nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {what: count for what, count in counts.items() if count}


def saved_answers(config: Config) -> list[dict[str, Any]]:
    """Returns the saved answers without the settings in the first line."""
    lines = (Path(config["out"]) / "short_answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]
