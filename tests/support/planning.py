"""Run configurations and model shapes for the tests of the planner."""

import json
from pathlib import Path
from typing import Any

from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import parse_config
from thinkpo_jax.training.stage_config import StageConfig

QWEN2_7B = {"vocab_size": 152_064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN2_7B |= {"num_key_value_heads": 4, "intermediate_size": 18_944}
TINY = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "intermediate_size": 256}


def write_run_config(folder: Path, shape: dict[str, int], **batch: Any) -> Path:
    """Writes a configuration with the stages `first` (SFT) and `second` (ThinkPO). Its model has only a config.json."""
    rest = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(shape | rest | {"tie_word_embeddings": False}), encoding="utf-8")
    stage = {"data": {"path": "there/is-none"}, "steps": 10, "optimizer": {"learning_rate": 1e-5}}
    stage |= {"batch": {"rows": 8, "row_length": 512, "rows_per_device": 1} | batch}
    stages = [stage | {"name": "first", "objective": "sft"}, stage | {"name": "second", "objective": "thinkpo"}]
    stages[1]["data"] = stage["data"] | {"chosen": "chosen", "rejected": "rejected"}
    raw = {"run_dir": str(folder / "run"), "model": {"path": str(folder)}, "stages": stages}
    (folder / "run.yaml").write_text(json.dumps(raw), encoding="utf-8")
    return folder / "run.yaml"


def sft_stage(**batch: Any) -> StageConfig:
    """Returns an SFT stage of one update with 8 rows of 48 tokens, one row at a time, unless `batch` says otherwise."""
    raw = {"run_dir": "x", "model": {"path": "x"}}
    stage = {"name": "s", "objective": "sft", "steps": 1, "data": {"path": "x"}, "optimizer": {"learning_rate": 1e-5}}
    batch = {"rows": 8, "row_length": 48, "rows_per_device": 1} | batch
    return parse_config(RunConfig, raw | {"stages": [stage | {"batch": batch}]}, source="test").stages[0]
