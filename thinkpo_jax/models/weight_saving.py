"""Writes a Hugging Face folder from sharded parameters."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import huggingface_hub
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from thinkpo_jax.models.model_folder import MODEL_FILES
from thinkpo_jax.models.safetensors_files import WEIGHTS_INDEX_FILE
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import flatten_by_name, weight_mappings
from thinkpo_jax.runtime.files import read_json_object
from thinkpo_jax.runtime.processes import barrier, gather_to_host, is_primary_process

MAX_SHARD = "5GB"  # of one safetensors file; larger models are written as several, with an index
FILES_NOT_COPIED = ("config.json", "generation_config.json", WEIGHTS_INDEX_FILE)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def temporary_folder(folder: Path) -> Path:
    """Where a model is written before it is whole, beside the folder that it becomes."""
    return folder.with_name(f".{folder.name}.partial")


def save_model(
    model: Transformer,
    folder: Path,
    *,
    template_folder: Path,
    dtype: Literal["float32", "bfloat16"],
    stop_token_ids: Sequence[int],
    model_card: str,
) -> None:
    """Writes a Hugging Face folder; config, tokenizer and template come from the folder `like`. Appears all at once.

    `stops` are the ids that end a generation (`chat.Chat.stop_ids`); others then stop where our sampler does.
    """
    partial = temporary_folder(folder)
    if is_primary_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _save_weights(model, partial, DTYPES[dtype])
    if is_primary_process():
        _save_text(partial, template_folder, dtype, stop_token_ids, model_card)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    barrier("the model is saved")


def _save_text(partial: Path, like: Path, dtype: str, stops: Sequence[int], card: str) -> None:
    raw = read_json_object(like / "config.json") | {"dtype": dtype, "torch_dtype": dtype}
    (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    for pattern in MODEL_FILES:
        for file in like.glob(pattern):
            if file.suffix != ".safetensors" and file.name not in FILES_NOT_COPIED:
                shutil.copyfile(file, partial / file.name)
    generation = read_json_object(like / "generation_config.json") if (like / "generation_config.json").exists() else {}
    generation |= {"eos_token_id": list(stops)} if stops else {}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")


def _save_weights(model: Transformer, folder: Path, dtype: np.dtype) -> None:
    parameters = flatten_by_name(model)
    places = {name: (entry, layer) for entry in weight_mappings(model) for layer, name in enumerate(entry.names)}
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        {name: np.broadcast_to(np.zeros((), dtype), entry.hf_shape) for name, (entry, _) in places.items()},
        get_storage_size=lambda tensor: int(tensor.size) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    for filename, names in plan.filename_to_tensors.items():
        tensors: dict[str, np.ndarray] = {}
        for name in names:
            entry, layer = places[name]
            array = parameters[entry.path][layer] if entry.is_per_layer else parameters[entry.path]
            array = gather_to_host(array)  # all processes take part
            if is_primary_process():
                tensors[name] = np.ascontiguousarray(entry.to_hf(array).astype(dtype))
        if not is_primary_process():
            continue
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        (folder / filename).chmod(0o644)  # safetensors makes files that only their owner can read
    if plan.is_sharded and is_primary_process():
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
