"""Loads the configurations in configs/."""

from pathlib import Path

from support.paths import ROOT

from thinkpo_jax.pair_building.build_pairs import PairsConfig
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.config import parse_config
from thinkpo_jax.runtime.config_file import read_config
from thinkpo_jax.runtime.yaml_text import apply_overrides

CONFIGS, PAIRS = (
    sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.stem.startswith("pairs_") == pairs)
    for pairs in (False, True)
)


def run_config(name: str, *assignments: str) -> RunConfig:
    """Loads the configuration of a run, such as "quickstart" or "paper/qwen2_5_3b"."""
    return load_run_config(ROOT / "configs" / f"{name}.yaml", assignments)


def pairs_config(path: Path | str, *assignments: str) -> PairsConfig:
    """Loads the configuration of pairs from a path, or by its name in configs/."""
    file = path if isinstance(path, Path) else ROOT / "configs" / f"{path}.yaml"
    values, source = read_config(file)
    return parse_config(PairsConfig, apply_overrides(values, assignments), source=source)
