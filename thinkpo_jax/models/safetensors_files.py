"""What lies in a Hugging Face folder, and where does a model come from? Nothing here knows the network."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np
import safetensors

from thinkpo_jax.runtime.config import UserError, collect_errors
from thinkpo_jax.runtime.files import read_json_object

_TOUCH_BYTES = 2**20
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


@dataclass(frozen=True)
class TensorLocation:
    """A tensor in a safetensors file: its place, its safetensors dtype and its shape."""

    file: Path
    begin: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file, in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def memory_map(self) -> np.ndarray:
        """The tensor as a view of the file: what is read of it is read when it is used."""
        return np.memmap(self.file, DTYPES[self.dtype], mode="r", offset=self.begin, shape=self.shape)

    def prefetch(self) -> None:
        """Reads the tensor from end to end and forgets it, so that the system has it at hand when it is used."""
        buffer = memoryview(bytearray(_TOUCH_BYTES))
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(self.begin)
            left = self.nbytes
            while left > 0 and (count := opened.readinto(buffer[: min(left, _TOUCH_BYTES)])):
                left -= count


def read_tensor_index(folder: Path) -> dict[str, TensorLocation]:
    """Every tensor of the folder's weights, from the headers of its files. Raises one `UserError` with all problems."""
    weight_map = _weight_map(folder / WEIGHTS_INDEX_FILE) if (folder / WEIGHTS_INDEX_FILE).exists() else {}
    found: dict[str, TensorLocation] = {}
    with collect_errors() as attempt:
        for file in attempt(_weight_files, folder, set(weight_map.values())) or ():
            for name, tensor in (attempt(_read_header, file) or {}).items():
                if name in found:
                    attempt.fail(f"{folder}: tensor {name} is in {found[name].file.name} and in {file.name}.")
                elif weight_map.get(name, file.name) != file.name:
                    attempt.fail(
                        f"{folder}: {WEIGHTS_INDEX_FILE} has {name} in {weight_map[name]}, it is in {file.name}."
                    )
                found[name] = tensor
    lost = [f"{name} in {file}" for name, file in sorted(weight_map.items()) if name not in found]
    if lost:
        raise UserError(
            f"{folder / WEIGHTS_INDEX_FILE}: names tensors that are not there: {join_first(lost, ', ')}. Download it again."
        )
    return found


def join_first(items: Iterable[str], separator: str, limit: int = 20) -> str:
    """The first of many, joined, and how many more there are."""
    items = list(items)
    return separator.join(items[:limit] + ([f"and {len(items) - limit} more"] if len(items) > limit else []))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise UserError(f"{index}: expected weight_map, an object from tensor to file name. Download it again.")
    outside = sorted({name for name in weight_map.values() if len(PurePosixPath(name).parts) != 1 or name == ".."})
    if outside:
        raise UserError(f"{index}: names files outside of its folder: {join_first(outside, ', ')}. Do not trust it.")
    return weight_map


def _weight_files(folder: Path, indexed: set[str]) -> list[Path]:
    """The files of the weights: those that the index names, or model.safetensors, or all *.safetensors."""
    if indexed and (folder / WEIGHTS_FILE).exists() and WEIGHTS_FILE not in indexed:
        raise UserError(
            f"{folder}: has both {WEIGHTS_FILE} and {WEIGHTS_INDEX_FILE} with other files. Remove the one that is stale."
        )
    if absent := sorted(name for name in indexed if not (folder / name).is_file()):
        raise UserError(
            f"{folder}: lacks {join_first(absent, ', ')}, which {WEIGHTS_INDEX_FILE} names. Download what is missing."
        )
    single = [folder / WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in sorted(indexed)] or single
    if not files:
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        raise UserError(
            f"{folder}: has only pickled weights ({join_first(pickled, ', ', 3)}), which can run code and are never loaded. "
            "Convert them to safetensors, or take a checkpoint that has them."
            if pickled
            else f"{folder}: no *.safetensors file. Other formats (GGUF, MLX, ...) are not read: convert it first."
        )
    return files


def _read_header(file: Path) -> dict[str, TensorLocation]:
    """The tensors of one file. safetensors itself checks the header against the file; we add where each tensor is."""
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
    wrong = sorted(f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in DTYPES)
    if wrong:
        raise UserError(
            f"{file}: {join_first(wrong, ', ')}; expected {', '.join(DTYPES)}. Take the unquantised checkpoint."
        )
    return tensors
