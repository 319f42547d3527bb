"""Finds and opens a model folder: local, from the Hugging Face Hub, or built in."""

import fnmatch
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import huggingface_hub
import pydantic
from jax.sharding import Mesh

from thinkpo_jax.data.chat_template import TemplateArguments, ThinkingTags
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.tokenizer_files import TOKENIZER_FILE_PATTERNS, count_token_ids, load_tokenizer
from thinkpo_jax.models.architecture import MAX_CONFIG_BYTES, MAX_SIZES, Architecture, read_architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.folder_files import COPIED_FILES, check_file_kinds, list_copied_files
from thinkpo_jax.models.safetensors_files import WEIGHTS_INDEX_FILE, check_has_config, join_first
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_loading import check_weights, init_model, load_model
from thinkpo_jax.runtime.bucket import BucketFolder
from thinkpo_jax.runtime.bucket_files import is_in_bucket
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, UserError, collect_errors
from thinkpo_jax.runtime.console import log_info, log_warning
from thinkpo_jax.runtime.files import read_json_object
from thinkpo_jax.runtime.integers import round_up
from thinkpo_jax.runtime.manifest import MANIFEST_FILE, digest_files, digest_text, find_file_damage, read_manifest

BUILTIN_MODELS_FOLDER = Path(__file__).parent / "builtin"
WEIGHT_FILES = ("*.safetensors", WEIGHTS_INDEX_FILE)
ROW_MULTIPLE = 128  # of a resized embedding, so that a mesh can split it


class ModelConfig(ConfigSection):
    """The start model. With `weights: random` the folder gives shape and tokenizer, and the run's seed the weights.

    `template_arguments` are variables of the chat template, such as Qwen3's `enable_thinking`. `thinking_tags` are the
    texts before and after a thought (default: those of the template).

    `resize_embeddings` adds rows to the embedding and to an untied head if the tokenizer has more tokens than there are
    rows. The number of rows becomes a multiple of 128. A new row is the mean of the old ones.
    """

    path: ConfigPath  # a Hugging Face folder, a Hub id or `builtin:NAME`
    weights: Literal["pretrained", "random"] = "pretrained"
    template_arguments: TemplateArguments = pydantic.Field(default_factory=dict)
    thinking_tags: ThinkingTags | None = None
    resize_embeddings: bool = False


def resolve_model_folder(path: str, *, weights: bool = True) -> Path:
    """Returns the folder of a model: `builtin:NAME`, a local folder, or a Hub id or gs:// URL (downloaded or cached).

    If `weights` is false, only the configuration and the tokenizer are downloaded. Raises `UserError` if
    there is no such model.
    """
    if path.startswith("builtin:"):
        builtins = {f"builtin:{file.parent.name}": file.parent for file in BUILTIN_MODELS_FOLDER.glob("*/config.json")}
        if path not in builtins:
            raise UserError(f"model.path: there is no {path}. Built-in models: {', '.join(sorted(builtins))}.")
        return builtins[path]
    if is_in_bucket(path):
        bucket = BucketFolder(path)
        if "config.json" not in bucket.names():
            raise UserError(f"model.path: {path}: there is no config.json. Give the folder of a model in the bucket.")
        bucket.download(lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in _needed_files(weights)))
        return bucket.local
    if (folder := Path(path)).is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path: {path}: there is no such folder. Give a Hugging Face folder or a Hub id (owner/name)."
        )
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=_needed_files(weights)))
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:  # RuntimeError: no home
        raise UserError(
            f"model.path: {path} is neither a local folder nor available from the Hub: {error} Check the name. "
            f"Without a network, download it elsewhere (hf download {path}) and give the folder."
        ) from None


def _needed_files(weights: bool) -> list[str]:
    """Returns patterns of the files that are read, without or with the weights."""
    return [*COPIED_FILES, "adapter_config.json", *((*WEIGHT_FILES, MANIFEST_FILE) if weights else ())]


def read_stop_token_ids(folder: Path) -> list[int]:
    """Returns the token ids that end a completion, from generation_config.json or else config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        raw = read_json_object(path, max_bytes=MAX_CONFIG_BYTES) if path.exists() else {}
        if (value := raw.get("eos_token_id")) is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(number) is int and 0 <= number < MAX_SIZES["vocab_size"] for number in ids):
                raise UserError(f"{path}: eos_token_id is {value!r:.80}, expected a token id or a list of token ids.")
            return ids
    return []


def model_files(folder: Path) -> list[Path]:
    """Returns the files that make a model: configurations, weights, tokenizer and chat templates, sorted."""
    patterns = ("config.json", "generation_config.json", *WEIGHT_FILES, *TOKENIZER_FILE_PATTERNS)
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def model_identity(folder: Path) -> str | None:
    """Returns a digest of the names and of every byte of `model_files`, or None without config.json."""
    if not (folder / "config.json").is_file():
        return None
    files = model_files(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    return digest_text(repr(list(zip(names, digest_files(files), strict=True))))


def find_model_damage(folder: Path) -> str:
    """Returns how a model differs from its manifest, as a text. Empty if it does not.

    The manifest must be there. A file that makes the model and is not in the manifest counts as a difference.
    """
    if not folder.is_dir():
        return "the folder is missing"
    known = read_manifest(folder) or {}
    names = [file.relative_to(folder).as_posix() for file in model_files(folder)] if known else []
    return join_first([*find_file_damage(folder), *(f"{name} was added" for name in names if name not in known)])


@dataclass(frozen=True)
class ModelSource:
    """An opened model folder. `random_seed` is None for pretrained weights. Otherwise the seed gives the weights.

    If `architecture` has more rows of the embedding than the folder, `load` adds them.
    """

    folder: Path
    architecture: Architecture
    tokenizer: ChatTokenizer
    random_seed: int | None = None

    def load(self, compute: ComputeConfig, mesh: Mesh, *, dtype: str = "float32") -> Transformer:
        """Loads or initializes the weights, sharded over the mesh. All but the norms get this dtype."""
        if self.random_seed is None:
            return load_model(self.folder, compute, mesh, vocab_size=self.architecture.vocab_size, dtype=dtype)
        return init_model(self.architecture, compute, mesh, seed=self.random_seed, dtype=dtype)

    def identity(self) -> str | None:
        """Returns `model_identity` of the folder. It includes a resized embedding and the seed of random weights."""
        if (identity := model_identity(self.folder)) is None:
            return None
        old_rows, rows = read_json_object(self.folder / "config.json").get("vocab_size"), self.architecture.vocab_size
        resized = "" if old_rows == rows else f", resized to {rows} rows"
        return (
            f"{identity}{resized}{'' if self.random_seed is None else f', random weights of seed {self.random_seed}'}"
        )


def resolve_model_source(config: ModelConfig, *, seed: int, require_weights: bool = True) -> ModelSource:
    """Opens a model folder and checks that architecture, weights and tokenizer fit together.

    Without `require_weights` the weights of a Hub id are not downloaded, and no weights are checked. Raises `UserError`
    if the files differ from the manifest of an export, or else one with all problems of the folder.
    """
    folder = resolve_model_folder(config.path, weights=require_weights)
    if require_weights and (folder / MANIFEST_FILE).is_file() and (damage := find_model_damage(folder)):
        raise UserError(
            f"{folder}: differs from its {MANIFEST_FILE}: {damage}. Export or download the model again. If you changed "
            f"it on purpose, remove {MANIFEST_FILE}."
        )
    check = require_weights and config.weights == "pretrained"
    architecture, tokenizer = check_model_folder(config, folder, weights=check)
    return ModelSource(folder, architecture, tokenizer, seed if config.weights == "random" else None)


def resolve_architecture(config: ModelConfig) -> Architecture:
    """Returns the shape of a model without its weights. Reads the tokenizer only if the embedding may be resized."""
    folder = resolve_model_folder(config.path, weights=False)
    check_has_config(folder)
    architecture = read_architecture(folder)
    return _resize(architecture, count_token_ids(load_tokenizer(folder))) if config.resize_embeddings else architecture


def check_model_folder(config: ModelConfig, folder: Path, *, weights: bool) -> tuple[Architecture, ChatTokenizer]:
    """Reads architecture and tokenizer, and checks weights if asked to. Raises one `UserError` with all problems.

    With `resize_embeddings` the architecture has an embedding row for each token.
    """
    check_has_config(folder)
    check_file_kinds(folder)
    if adapters := sorted(file.name for file in folder.glob("adapter_model*")):
        log_warning(
            f"{folder}: the LoRA adapter in {', '.join(adapters)} is not applied. Merge it, or remove the file."
        )
    with collect_errors() as collector:
        collector(list_copied_files, folder)
        architecture = collector(read_architecture, folder)
        if weights:
            collector(check_weights, folder, architecture)
        tokenizer = collector(
            lambda: ChatTokenizer.from_folder(
                folder,
                stop_token_ids=read_stop_token_ids(folder),
                template_arguments=config.template_arguments,
                thinking_tags=config.thinking_tags,
            )
        )
        if architecture is not None and tokenizer is not None:
            num_tokens, num_rows = count_token_ids(tokenizer.tokenizer), architecture.vocab_size
            problem = f"{folder}: the tokenizer has {num_tokens} tokens, but the embedding has only {num_rows} rows."
            if num_tokens > num_rows and not config.resize_embeddings:
                collector.fail(
                    f"{problem} Use the tokenizer that belongs to the weights. If you added tokens to it, set "
                    "`resize_embeddings: true` in the section `model`."
                )
            elif num_tokens > num_rows:
                architecture = _resize(architecture, num_tokens)
                log_info(f"{problem} It gets {architecture.vocab_size - num_rows} more rows (model.resize_embeddings).")
    assert architecture is not None and tokenizer is not None  # noqa: PT018 -- `collect_errors` raised otherwise
    return architecture, tokenizer


def _resize(architecture: Architecture, num_tokens: int) -> Architecture:
    if num_tokens <= architecture.vocab_size:
        return architecture
    return replace(architecture, vocab_size=round_up(num_tokens, ROW_MULTIPLE))
