"""A small version of the quickstart run for tests of the commands."""

from pathlib import Path

from support.paths import ROOT

from thinkpo_jax import train
from thinkpo_jax.runtime.cli import run_command

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
# Assignments that make the run short.
SMALL = [
    "stages.sft.steps=6",
    "stages.thinkpo.steps=4",
    "stages.control.steps=2",
    "stages.sft.checkpoint={every: 2, keep: 3}",
    "evaluation.benchmarks=[{name: miniature, questions: 24}]",
    "evaluation.sampling={temperature: 0.7, max_new_tokens: 40}",
    "evaluation.local.slots=24",
    "mesh={data: 2, fsdp: 2, tensor: 2}",
]


def quickstart_arguments(folder: Path | str, *assignments: str) -> list[str]:
    """Returns the command line arguments of a small quickstart run in `folder`."""
    return ["--config", QUICKSTART, "--set", *SMALL, f"run_dir={folder}", *assignments]


def train_quickstart(folder: Path | str, *assignments: str) -> int:
    """Trains a small quickstart run in `folder`, and returns the exit status."""
    return run_command(train.main, quickstart_arguments(folder, *assignments))
