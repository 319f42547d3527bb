"""Saves small models, and edits the JSON files of model folders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from support import small
from support.weights import like, random_model

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_saving import save_model


def save_small_model(
    model: Transformer,
    folder: Path,
    template_folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    stop_token_ids: Sequence[int] = (1, 2, 3),
) -> None:
    """Saves a model in one file, or in several if a test sets `weight_saving.MAX_SHARD`."""
    save_model(
        model,
        folder,
        template_folder=template_folder,
        dtype=dtype,
        stop_token_ids=stop_token_ids,
        model_card="# A card\n",
    )


def save_random_model(
    tmp_path: Path, arch: Architecture = small.ARCH, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Saves `random_model(arch)` in `tmp_path / "saved"`, with `tmp_path / "like"` as template. Returns the folder."""
    save_small_model(random_model(arch), tmp_path / "saved", like(tmp_path, arch), dtype=dtype)
    return tmp_path / "saved"


def edit_json(file: Path, **changes: Any) -> None:
    """Changes fields of a JSON file. None removes a field."""
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
