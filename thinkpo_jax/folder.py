"""What lies in a Hugging Face folder, and where does a model come from? Nothing here knows the network."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import huggingface_hub
import ml_dtypes
import numpy as np
import safetensors

from thinkpo_jax.config import PathText, Section, UserError, read_json, together

_SAMPLED_BYTES = 2**22
_TOUCH_BYTES = 2**20
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
BUILTIN = "builtin:"
MODELS = Path(__file__).parent / "models"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


class ModelConfig(Section):
    """The start model: a Hugging Face folder, a Hub id or `builtin:NAME`. `random` takes its shape, not its weights."""

    path: PathText
    weights: Literal["pretrained", "random"] = "pretrained"


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file: its place, its safetensors dtype and its shape."""

    file: Path
    begin: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file, in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def mapped(self) -> np.ndarray:
        """The tensor as a view of the file: what is read of it is read when it is used."""
        return np.memmap(self.file, DTYPES[self.dtype], mode="r", offset=self.begin, shape=self.shape)

    def touch(self) -> None:
        """Reads the tensor from end to end and forgets it, so that the system has it at hand when it is used."""
        buffer = memoryview(bytearray(_TOUCH_BYTES))
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(self.begin)
            left = self.nbytes
            while left > 0 and (count := opened.readinto(buffer[: min(left, _TOUCH_BYTES)])):
                left -= count


def find_model(path: str, *, weights: bool = True) -> Path:
    """The folder of a model: `builtin:NAME`, a local folder, or a Hub id (downloaded or from the cache).

    Without `weights` no more of a Hub id is downloaded than its shape and tokenizer.
    """
    if path.startswith(BUILTIN):
        builtins = {f"{BUILTIN}{file.parent.name}": file.parent for file in MODELS.glob("*/config.json")}
        if path not in builtins:
            raise UserError(f"model.path: there is no {path}; there is: {', '.join(sorted(builtins))}.")
        return builtins[path]
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path: {path}: there is no such folder. Give a Hugging Face folder or a Hub id (owner/name)."
        )
    try:
        files = [name for name in MODEL_FILES if weights or not name.endswith(".safetensors")]
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=files))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"model.path: {path} is neither a local folder nor available from the Hub: {error} Check the name; "
            f"where there is no network, download it elsewhere (hf download {path}) and give the folder."
        ) from None


def stop_ids(folder: Path) -> list[int]:
    """The ids that generation_config.json (or config.json) says end a generation."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            found = read_json(folder / name).get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                if not all(type(number) is int and number >= 0 for number in ids):
                    raise UserError(
                        f"{folder / name}: eos_token_id is {found!r}, expected a token id or a list of them."
                    )
                return ids
    return []


def fingerprint(folder: Path) -> str | None:
    """A digest of a model's configuration and weights (of each file its size and both ends); None without a model."""
    digest = hashlib.sha256()
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if not files[0].exists():
        return None
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{path.name} {size} ".encode())
            for start in (0, max(0, size - _SAMPLED_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def content_digest(folder: Path) -> str:
    """A digest of a model's configuration and of every byte of its weights."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]

    def of_file(path: Path) -> bytes:
        with path.open("rb") as file:
            return path.name.encode() + hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter
        return hashlib.sha256(b"".join(pool.map(of_file, files))).hexdigest()[:32]


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's weights, from the headers of its files. Raises one `UserError` with all problems."""
    weight_map = _weight_map(folder / INDEX) if (folder / INDEX).exists() else {}
    found: dict[str, Tensor] = {}
    with together() as attempt:
        for file in attempt(_weight_files, folder, set(weight_map.values())) or ():
            for name, tensor in (attempt(_read_header, file) or {}).items():
                if name in found:
                    attempt.fail(f"{folder}: tensor {name} is in {found[name].file.name} and in {file.name}.")
                elif weight_map.get(name, file.name) != file.name:
                    attempt.fail(f"{folder}: {INDEX} has {name} in {weight_map[name]}, it is in {file.name}.")
                found[name] = tensor
    lost = [f"{name} in {file}" for name, file in sorted(weight_map.items()) if name not in found]
    if lost:
        raise UserError(f"{folder / INDEX}: names tensors that are not there: {some(lost, ', ')}. Download it again.")
    return found


def some(items: Iterable[str], separator: str, limit: int = 20) -> str:
    """The first of many, joined, and how many more there are."""
    items = list(items)
    return separator.join(items[:limit] + ([f"and {len(items) - limit} more"] if len(items) > limit else []))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise UserError(f"{index}: expected weight_map, an object from tensor to file name. Download it again.")
    outside = sorted({name for name in weight_map.values() if len(PurePosixPath(name).parts) != 1 or name == ".."})
    if outside:
        raise UserError(f"{index}: names files outside of its folder: {some(outside, ', ')}. Do not trust it.")
    return weight_map


def _weight_files(folder: Path, indexed: set[str]) -> list[Path]:
    """The files of the weights: those that the index names, or model.safetensors, or all *.safetensors."""
    if indexed and (folder / WEIGHTS).exists() and WEIGHTS not in indexed:
        raise UserError(f"{folder}: has both {WEIGHTS} and {INDEX} with other files. Remove the one that is stale.")
    if absent := sorted(name for name in indexed if not (folder / name).is_file()):
        raise UserError(f"{folder}: lacks {some(absent, ', ')}, which {INDEX} names. Download what is missing.")
    single = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in sorted(indexed)] or single
    if not files:
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        raise UserError(
            f"{folder}: has only pickled weights ({some(pickled, ', ', 3)}), which can run code and are never loaded. "
            "Convert them to safetensors, or take a checkpoint that has them."
            if pickled
            else f"{folder}: no *.safetensors file. Other formats (GGUF, MLX, ...) are not read: convert it first."
        )
    return files


def _read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file. safetensors itself checks the header against the file; we add where each tensor is."""
    try:
        with safetensors.safe_open(file, framework="numpy"), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}. Download it again.") from None
    header.pop("__metadata__", None)
    tensors = {
        name: Tensor(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }
    wrong = sorted(f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in DTYPES)
    if wrong:
        raise UserError(f"{file}: {some(wrong, ', ')}; expected {', '.join(DTYPES)}. Take the unquantised checkpoint.")
    return tensors
