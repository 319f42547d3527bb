"""Locates each tensor in the safetensors files of a model folder."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from thinkpo_jax.runtime.config import UserError, collect_errors
from thinkpo_jax.runtime.files import read_json_object
from thinkpo_jax.runtime.limited_files import check_file

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
ADAPTER_PREFIX = "adapter_"  # of the names of peft's files: adapter_config.json and adapter_model.safetensors
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}

MAX_HEADER_BYTES = 2**24  # A header has about 100 bytes per tensor.

_PREFETCH_BYTES = 2**20


@dataclass(frozen=True)
class TensorLocation:
    """A tensor in a safetensors file: its first byte, its safetensors dtype and its shape."""

    file: Path
    begin: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file, in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def memory_map(self) -> np.ndarray:
        """Returns the tensor as a view of the file. The system reads a page of it when it is first used."""
        return np.memmap(self.file, DTYPES[self.dtype], mode="r", offset=self.begin, shape=self.shape)

    def prefetch(self) -> None:
        """Reads the tensor into the page cache. `posix_fadvise` would read only the disk's read-ahead size per call."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.begin)
            for remaining in range(self.nbytes, 0, -_PREFETCH_BYTES):
                file.read(min(remaining, _PREFETCH_BYTES))


def read_tensor_index(folder: Path) -> dict[str, TensorLocation]:
    """Locates every tensor of the model folder. Raises one `UserError` with all problems of its safetensors files."""
    index = folder / WEIGHTS_INDEX_FILE
    weight_map = _read_weight_map(index) if index.exists() else {}
    tensors: dict[str, TensorLocation] = {}
    with collect_errors() as collector:
        for file in _list_weight_files(folder, set(weight_map.values())):
            for name, tensor in (collector(_read_header, file) or {}).items():
                expected = weight_map.get(name, tensors.get(name, tensor).file.name)
                if file.name != expected:
                    collector.fail(
                        f"{folder}: expected tensor {name} only in {expected}, found it in {file.name}. Download the "
                        "model again, or remove the file that does not belong to it."
                    )
                tensors[name] = tensor
    if missing := [f"{name} in {file}" for name, file in sorted(weight_map.items()) if name not in tensors]:
        raise UserError(f"{index}: lists tensors that are missing: {join_first(missing)}. Download them.")
    return tensors


def join_first(items: Sequence[str], separator: str = ", ") -> str:
    """Joins the first 20 items and says how many more there are."""
    return separator.join([*items[:20], *([f"and {len(items) - 20} more"] if len(items) > 20 else [])])


def _read_weight_map(index: Path) -> dict[str, str]:
    """Returns the file name of each tensor. All files must lie beside the index."""
    weight_map: Any = read_json_object(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    wrong = {repr(n) for n in names if not isinstance(n, str) or n in ("", "..") or PurePosixPath(n).name != n}
    if wrong or not names:
        raise UserError(
            f"{index}: expected weight_map to name a file in this folder for each tensor, found "
            f"{join_first(sorted(wrong)) or 'none'}. Download the model again from a source that you trust."
        )
    return weight_map


def _list_weight_files(folder: Path, indexed: set[str]) -> list[Path]:
    """Lists the files that the index names, or else model.safetensors, or else all *.safetensors."""
    single_file = [folder / WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else []
    if indexed and single_file and WEIGHTS_FILE not in indexed:
        raise UserError(f"{folder}: {WEIGHTS_INDEX_FILE} does not list {WEIGHTS_FILE}. Remove the stale one.")
    if missing := join_first(sorted(name for name in indexed if not (folder / name).is_file())):
        raise UserError(f"{folder}: {WEIGHTS_INDEX_FILE} lists missing files: {missing}. Download them.")
    files = [folder / name for name in sorted(indexed)] or single_file or _model_files(folder, "*.safetensors")
    if files:
        return files
    _check_is_no_adapter(folder)
    if pickled := [file.name for file in _model_files(folder, "pytorch_model*.bin")]:
        raise UserError(
            f"{folder}: the weights are pickled ({join_first(pickled)}). Pickled weights can run code, so they are "
            "never loaded. Convert a model that you trust with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT, safe_serialization=True). Copy the "
            "tokenizer files too, and give OUT."
        )
    names = join_first(sorted(file.name for file in folder.iterdir())) or "nothing"
    raise UserError(
        f"{folder}: no *.safetensors file (found {names}). Other formats are not read. Download the model again, or "
        "convert it to safetensors."
    )


def _model_files(folder: Path, pattern: str) -> list[Path]:
    """Lists the weight files of a model. Those of an adapter are not among them."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith(ADAPTER_PREFIX))


def find_weight_problems(folder: Path) -> list[str]:
    """Returns what is wrong with the weight files of a model folder. Reads their names and an index, but no weights.

    The folder of a Hub id whose weights are not downloaded has no problem.
    """
    is_hub_snapshot = folder.absolute().parent.name == "snapshots"
    if is_hub_snapshot and not any(folder.glob("*.safetensors")):
        return []
    index = folder / WEIGHTS_INDEX_FILE
    try:
        _list_weight_files(folder, set(_read_weight_map(index).values()) if index.exists() else set())
    except UserError as error:
        return [str(error)]
    return []


def check_has_config(folder: Path) -> None:
    """Raises `UserError` if the folder holds a LoRA adapter and no config.json, so it is no model."""
    if not (folder / "config.json").exists():
        _check_is_no_adapter(folder)


def _check_is_no_adapter(folder: Path) -> None:
    if names := sorted(file.name for file in folder.glob(f"{ADAPTER_PREFIX}*")):
        raise UserError(
            f"{folder}: holds only a LoRA adapter ({join_first(names)}), without the model that it belongs to. Merge "
            "them with peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OUT). "
            "Copy the tokenizer files too, and give OUT."
        )


def _read_header(file: Path) -> dict[str, TensorLocation]:
    """Locates the tensors of one file. The library checks the header, but does not say where a tensor begins."""
    try:
        check_file(file)
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
            with safetensors.safe_open(file, framework="numpy"):  # checks the header
                header = json.loads(opened.read(length))
    except UserError:
        raise
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}. Download it again.") from None
    header.pop("__metadata__", None)
    tensors = {
        name: TensorLocation(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }
    if wrong := join_first(sorted(f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in DTYPES)):
        raise UserError(f"{file}: {wrong}. Expected {', '.join(DTYPES)}. Use the unquantized checkpoint.")
    return tensors
