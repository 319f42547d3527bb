"""Finds a model folder (local, Hub, builtin) and fingerprints it."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import huggingface_hub

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.models.architecture import Architecture, read_architecture
from thinkpo_jax.models.weight_loading import check_weights
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, UserError, collect_errors
from thinkpo_jax.runtime.files import read_json_object

_SAMPLED_BYTES = 2**22

BUILTIN_PREFIX = "builtin:"
BUILTIN_MODELS_FOLDER = Path(__file__).parent / "builtin"

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")


class ModelConfig(ConfigSection):
    """The start model: a Hugging Face folder, a Hub id or `builtin:NAME`. `random` takes its shape, not its weights."""

    path: ConfigPath
    weights: Literal["pretrained", "random"] = "pretrained"


def resolve_model_folder(path: str, *, weights: bool = True) -> Path:
    """The folder of a model: `builtin:NAME`, a local folder, or a Hub id (downloaded or from the cache).

    Without `weights` no more of a Hub id is downloaded than its shape and tokenizer.
    """
    if path.startswith(BUILTIN_PREFIX):
        builtins = {
            f"{BUILTIN_PREFIX}{file.parent.name}": file.parent for file in BUILTIN_MODELS_FOLDER.glob("*/config.json")
        }
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


def read_stop_token_ids(folder: Path) -> list[int]:
    """The ids that generation_config.json (or config.json) says end a generation."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            found = read_json_object(folder / name).get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                if not all(type(number) is int and number >= 0 for number in ids):
                    raise UserError(
                        f"{folder / name}: eos_token_id is {found!r}, expected a token id or a list of them."
                    )
                return ids
    return []


def quick_fingerprint(folder: Path) -> str | None:
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


def weights_digest(folder: Path) -> str:
    """A digest of a model's configuration and of every byte of its weights."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]

    def of_file(path: Path) -> bytes:
        with path.open("rb") as file:
            return path.name.encode() + hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter
        return hashlib.sha256(b"".join(pool.map(of_file, files))).hexdigest()[:32]


def check_folder(folder: Path, *, weights: bool) -> tuple[Architecture, ChatTokenizer]:
    """What a model's folder says of network and text. Raises one `UserError` with all that is wrong with it."""
    with collect_errors() as attempt:
        arch = attempt(read_architecture, folder)
        if weights:
            attempt(check_weights, folder, arch)
        chat = attempt(lambda: ChatTokenizer.from_folder(folder, stop_ids=read_stop_token_ids(folder)))
        if arch is not None and chat is not None and len(chat.tokenizer) > arch.vocab_size:
            attempt.fail(
                f"{folder}: the tokenizer has {len(chat.tokenizer)} tokens, the embedding only {arch.vocab_size} rows; "
                "take the tokenizer that belongs to the weights."
            )
    assert arch is not None and chat is not None  # noqa: PT018 -- `together` raised otherwise
    return arch, chat
