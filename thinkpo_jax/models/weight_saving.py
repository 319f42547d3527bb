"""Writes a Hugging Face folder from sharded parameters."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from thinkpo_jax.models.folder_files import list_copied_files
from thinkpo_jax.models.safetensors_files import WEIGHTS_INDEX_FILE
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import flatten_by_name, mappings_by_hf_name
from thinkpo_jax.runtime.files import read_json_object
from thinkpo_jax.runtime.manifest import sync_to_disk, write_manifest
from thinkpo_jax.runtime.processes import barrier, gather_to_host, is_primary_process

MAX_SHARD = "5GB"  # Largest safetensors file. A larger model is written as several files with an index.


def save_model(
    model: Transformer,
    folder: Path,
    *,
    template_folder: Path,
    dtype: Literal["float32", "bfloat16"],
    stop_token_ids: Sequence[int],
    model_card: str,
) -> None:
    """Writes the model as a Hugging Face folder with a manifest. The folder appears when it is complete.

    Config, tokenizer, chat templates and license come from `template_folder`. Other files are not copied.
    For example, transformers cannot load a model beside an old adapter_config.json. `stop_token_ids`
    (`ChatTokenizer.stop_token_ids`) go into generation_config.json. Then other programs end a generation where our
    sampler does. Raises `OSError` if the folder cannot be written, and leaves nothing then.
    """
    with _partial_folder(folder) as partial:
        _save_weights(model, partial, jnp.dtype(dtype))
        if is_primary_process():
            _copy_other_files(model, partial, template_folder, dtype=dtype, stop_token_ids=stop_token_ids)
            write_manifest(partial, [path for path in partial.rglob("*") if path.is_file()])
            card = partial / "README.md"  # not in the manifest, because users edit it
            card.write_text(model_card, encoding="utf-8")
            sync_to_disk(card)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            sync_to_disk(folder.parent)
    barrier("the model is saved")


@contextlib.contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """Makes a folder beside the final one. Removes it after an error, and what a killed program has left there."""
    partial = folder.with_name(f".{folder.name}.thinkpo_jax-partial")
    if is_primary_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
    except safetensors.SafetensorError as error:
        raise OSError(f"{folder}: {error}") from None
    finally:
        if is_primary_process():
            shutil.rmtree(partial, ignore_errors=True)


def _copy_other_files(
    model: Transformer, folder: Path, template_folder: Path, *, dtype: str, stop_token_ids: Sequence[int]
) -> None:
    """Writes everything but the weights and the model card."""
    for file in list_copied_files(template_folder):
        copy = folder / file.relative_to(template_folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    config = read_json_object(template_folder / "config.json") | {"dtype": dtype, "torch_dtype": dtype}
    config["vocab_size"] = model.arch.vocab_size  # larger than in the template folder if the model was resized
    _write_json(folder / "config.json", config)
    generation = folder / "generation_config.json"
    settings = read_json_object(generation) if generation.exists() else {}
    _write_json(generation, settings | ({"eos_token_id": list(stop_token_ids)} if stop_token_ids else {}))


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save_weights(model: Transformer, folder: Path, dtype: np.dtype) -> None:
    parameters, mappings = flatten_by_name(model), mappings_by_hf_name(model)
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        {name: np.broadcast_to(np.zeros((), dtype), mapping.hf_shape) for name, (mapping, _) in mappings.items()},
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    for filename, names in plan.filename_to_tensors.items():
        tensors: dict[str, np.ndarray] = {}
        for name in names:
            mapping, layer = mappings[name]
            parameter = parameters[mapping.path]
            array = gather_to_host(parameter[layer] if mapping.is_per_layer else parameter)  # All processes take part.
            if is_primary_process():
                tensors[name] = np.ascontiguousarray(mapping.to_hf(array).astype(dtype))
        if is_primary_process():
            save_file(tensors, folder / filename, metadata={"format": "pt"})
            (folder / filename).chmod(0o644)  # safetensors makes files that only their owner can read.
    if plan.is_sharded and is_primary_process():
        _write_json(folder / WEIGHTS_INDEX_FILE, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
