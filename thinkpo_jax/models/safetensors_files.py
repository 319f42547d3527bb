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

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_*"  # of a LoRA adapter
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}

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
    files = [folder / name for name in sorted(indexed)] or single_file or _glob_weights(folder, "*.safetensors")
    if not files:
        names = join_first(sorted(file.name for file in folder.iterdir()))
        other = f"{folder}: no *.safetensors file (found {names}). Convert the model to safetensors."
        raise UserError(describe_other_weights(folder) or other)
    return files


def _glob_weights(folder: Path, pattern: str) -> list[Path]:
    return sorted(file for file in folder.glob(pattern) if not file.match(ADAPTER_WEIGHTS))


def describe_other_weights(folder: Path) -> str | None:
    """Says what a folder without safetensors weights holds instead: an adapter or pickled weights. Otherwise None."""
    if _glob_weights(folder, "*.safetensors"):
        return None
    pickled = [file.name for pattern in PICKLED_WEIGHTS for file in _glob_weights(folder, pattern)]
    if pickled:
        return (
            f"{folder}: the weights are pickled ({join_first(pickled)}). They can run code, so they are never loaded. "
            "Convert the model with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)."
        )
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return (
            f"{folder}: there is only a LoRA adapter ({ADAPTER_CONFIG_FILE}), not a model. Merge it into its base "
            "model with peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW)."
        )
    return None


def _read_header(file: Path) -> dict[str, TensorLocation]:
    """Locates the tensors of one file. The library checks the header, but does not say where a tensor begins."""
    try:
        with safetensors.safe_open(file, framework="numpy"), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
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
