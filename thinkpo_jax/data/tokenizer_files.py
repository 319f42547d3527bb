"""Loads the tokenizer of a model folder, with the token ids of its tokenizer.json.

transformers builds a tokenizer by the class that tokenizer_config.json names. Many classes take only the vocabulary
from tokenizer.json, and bring their own normalizer and pre-tokenizer. If a folder names another class than the file
was made for, texts get other token ids than in the training of the model.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.files import read_json_object
from thinkpo_jax.runtime.limited_files import check_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILE_PATTERNS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
# The largest known to us: a tokenizer.json of 35 MB, settings of 1 MB, 262,144 tokens and 6,500 added tokens.
MAX_TOKENIZER_FILE_BYTES, MAX_SETTINGS_BYTES, MAX_TOKENS, MAX_ADDED_TOKENS = 2**26, 2**21, 2**20, 2**16
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # slow to read per byte
_OPTIONS: dict[str, Any] = {"trust_remote_code": False, "clean_up_tokenization_spaces": False}
_PARTS = ("normalizer", "pre_tokenizer", "model", "decoder")
# Offsets are not used here, and a byte-level decoder does not read its options.
_WITHOUT_EFFECT = re.compile(rb'"trim_offsets":\w+')
_BYTE_LEVEL_OPTIONS = re.compile(rb'(?<={"type":"ByteLevel")[^}]*')


def load_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a Hugging Face folder.

    If the folder has a tokenizer.json, that file decides the token ids. A warning names a class that would change them.
    Raises `UserError` if the folder has no tokenizer, or none that can be read.
    """
    for file in (file for pattern in TOKENIZER_FILE_PATTERNS for file in folder.glob(pattern) if file.exists()):
        check_file(file, max_bytes=MAX_SETTINGS_BYTES if file.name in SETTINGS_FILES else MAX_TOKENIZER_FILE_BYTES)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder}: no tokenizer: expected {' or '.join(TOKENIZER_FILES)}.")
    path = folder / TOKENIZER_FILES[0]
    try:
        if path.is_file():
            return _load_as_file_says(folder, _read_tokenizer_file(path))
        return AutoTokenizer.from_pretrained(folder, config=_harmless_config(folder), **_OPTIONS)
    except Exception as error:  # a malformed file can raise anything
        advice = "" if path.is_file() else (
            " Convert it where sentencepiece and tiktoken are installed, with "
            "`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`, which writes tokenizer.json."
        )  # fmt: skip
        raise UserError(f"{folder}: no usable tokenizer: {error}{advice}") from None


def count_token_ids(tokenizer: Any) -> int:
    """Returns the largest token id plus one, which is the number of embedding rows that the tokenizer needs."""
    return max(tokenizer.get_vocab().values()) + 1


def _read_tokenizer_file(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    num_tokens, num_added = tokenizer.get_vocab_size(), len(tokenizer.get_added_tokens_decoder())
    if num_tokens > MAX_TOKENS or num_added > MAX_ADDED_TOKENS:
        limits = f"expected at most {MAX_TOKENS:,} tokens, of them {MAX_ADDED_TOKENS:,} added ones"
        raise UserError(f"{path.name}: {limits}, found {num_tokens:,} and {num_added:,}. Use the original tokenizer.")
    return tokenizer


def _load_as_file_says(folder: Path, file: Tokenizer) -> Any:
    """Returns the tokenizer that transformers loads, or one with the parts of `file` if they differ."""
    loaded, problem = None, ""
    try:
        loaded = AutoTokenizer.from_pretrained(folder, config=_harmless_config(folder), **_OPTIONS)
        if not _find_differences(loaded.backend_tokenizer, file):
            return loaded
    except Exception as error:  # a class that does not fit the file can raise anything
        problem = f"transformers cannot load it with the settings of tokenizer_config.json ({error})"
    # This class takes all parts from the file. It adds the tokens that only tokenizer_config.json names.
    special_tokens = {} if loaded is None else loaded.special_tokens_map
    known = {name: token for name, token in special_tokens.items() if _is_known(file, token)}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **_OPTIONS, **known)
    backend = tokenizer.backend_tokenizer
    backend.add_tokens(list(file.get_added_tokens_decoder().values()))  # restores the settings that the file gives them
    if not problem and loaded is not None and (changed := _find_differences(loaded.backend_tokenizer, backend)):
        problem = f"the class {type(loaded).__name__}, which transformers would use, changes its {', '.join(changed)}"
    if problem:
        log_warning(f"{folder}: the token ids are those of tokenizer.json, although {problem}.")
    return tokenizer


def _harmless_config(folder: Path) -> PreTrainedConfig:
    """Returns what `AutoTokenizer` reads of config.json to choose a class.

    It would read all of the file otherwise, and huge sizes in it become huge lists.
    """
    path = folder / "config.json"
    raw: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # Whoever needs the rest of the file reports it.
        raw = read_json_object(path)
    model_type = str(raw.get("model_type"))
    config = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else PreTrainedConfig()
    config.name_or_path = str(folder)
    if isinstance(tokenizer_class := raw.get("tokenizer_class"), str):
        config.tokenizer_class = tokenizer_class
    return config


def _is_known(file: Tokenizer, token: Any) -> bool:
    return isinstance(token, str) and file.token_to_id(token) is not None


def _find_differences(first: Tokenizer, second: Tokenizer) -> list[str]:
    """Returns the names of the parts in which two tokenizers differ. Post-processors do not matter here."""
    parts = [name for name in _PARTS if _part_state(first, name) != _part_state(second, name)]
    return parts + (["added tokens"] if _added_tokens(first) != _added_tokens(second) else [])


def _added_tokens(backend: Tokenizer) -> dict[int, Any]:
    return {token_id: token.__getstate__() for token_id, token in backend.get_added_tokens_decoder().items()}


def _part_state(backend: Tokenizer, name: str) -> bytes | None:
    part = getattr(backend, name)
    if part is None:
        return None
    state: bytes = _WITHOUT_EFFECT.sub(b"", part.__getstate__())
    return _BYTE_LEVEL_OPTIONS.sub(b"", state) if name == "decoder" else state
