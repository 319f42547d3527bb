"""Builds the inputs of a small ThinkPO stage, and makes one of its updates not finite."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thinkpo_jax.data.examples import split_held_out
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelConfig, resolve_model_source
from thinkpo_jax.runtime.config import parse_config
from thinkpo_jax.runtime.files import StageFolder, write_json_record
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.training import train_stage
from thinkpo_jax.training.stage_config import ThinkpoStage
from thinkpo_jax.training.train_stage import StageInputs

# Metrics that differ between two runs of the same stage.
TIME_METRICS = {"seconds", "data_seconds", "tokens_per_second", "padded_tokens_per_second", "tflops_per_device"}

STAGE: dict[str, Any] = {
    "name": "thinkpo",
    "objective": "thinkpo",
    "data": {"path": "pairs.jsonl"},
    "batch": {"size": 6, "row_length": 64},
    "steps": 6,
    "beta": 0.1,
    "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
    "checkpoint": {"every": 1},
}
ROWS = [
    {"prompt": f"{a}{b}{a}{b}?", "chosen": f"{a}+{b}={a + b};#{a + b}", "rejected": f"#{b}"}
    for a in range(6)
    for b in range(4)
]
# Pairs of 11 to 55 tokens.
RAGGED_ROWS = [row | {"chosen": f"{row['chosen']};" * (1 + number % 5)} for number, row in enumerate(ROWS)]


def stage_inputs(folder: Path, *, rows: list[dict[str, str]] = ROWS, **stage: Any) -> StageInputs:
    """Returns the inputs of a ThinkPO stage on the built-in model, and writes its data to `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse_config(ThinkpoStage, STAGE | {"data": {"path": str(path)}} | stage, source="test")
    initial_model = resolve_model_source(ModelConfig(path="builtin:miniature"), seed=0)
    dataset = tokenize_sources(config.data, initial_model.tokenizer, row_length=config.batch.row_length, seed=0)
    validation = config.validation
    return StageInputs(
        config=config,
        initial_model=initial_model,
        compute=ComputeConfig(dtype="float32", attention="blockwise"),
        mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)),
        dataset=dataset,
        held_out=np.array([], np.int64) if validation is None else split_held_out(dataset, validation.share, seed=0),
        folder=StageFolder(folder / "stage"),
        seed=0,
    )


def make_update_nonfinite(monkeypatch: pytest.MonkeyPatch, *, update: int) -> None:
    """Makes the loss of one update NaN.

    The reference of one of its examples becomes NaN. The first update does not read that example.
    """
    load_or_compute = train_stage.load_or_compute_reference

    def load_with_nan(model: Any, batches: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        log_probs = load_or_compute(model, batches, *args, **kwargs)
        examples = batches[update - 1].example_ids
        log_probs[examples[examples >= 0][0]] = np.nan
        return log_probs

    monkeypatch.setattr(train_stage, "load_or_compute_reference", load_with_nan)


def edit_record(path: Path, **changes: Any) -> None:
    """Changes values of a JSON record, such as stage.json, and gives it the digest that belongs to them."""
    record = json.loads(path.read_text()) | changes
    del record["digest"]
    write_json_record(path, record)
