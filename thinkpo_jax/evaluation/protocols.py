"""The two protocols of an evaluation: sampling parameters, and the system prompt of the paper's training pairs."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from thinkpo_jax.data.chat_template import ThinkingFormat
from thinkpo_jax.data.readers import RecordError, iterate_records, iterate_valid_records
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig, infer_columns, parse_record
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.paths import describe_missing

ProtocolName = Literal["modern", "paper"]
DEFAULT_MAX_NEW_TOKENS = 32_768
# The paper's is that of arXiv 2502.13173: one sample, and the system prompt of the training pairs.
SAMPLING_BY_PROTOCOL: dict[str, dict[str, Any]] = {
    "modern": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "samples": 1},
    "paper": {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "samples": 1},
}
TEXT_SUFFIXES = (".txt", ".md")
MAX_RECORDS = 100  # that must agree on the system prompt


def with_protocol_defaults(raw: Any) -> Any:
    """Returns the raw section `evaluation` with the sampling parameters of its protocol that it does not set.

    A greedy evaluation gets no `top_p`, which would have no effect. A value that is no mapping is returned as it is.
    """
    if not isinstance(raw, Mapping) or not isinstance(sampling := raw.get("sampling", {}), Mapping):
        return raw
    defaults = SAMPLING_BY_PROTOCOL.get(str(raw.get("protocol", "modern")), {})
    if sampling.get("temperature") in (0, 0.0):
        defaults = {key: value for key, value in defaults.items() if key != "top_p"}
    return {**raw, "sampling": {**defaults, **sampling}}


def read_system_prompt(path: str, *, seed: int) -> str:
    """Returns the system prompt in a text file (.txt or .md), or that of the first rows of a data set.

    Raises `UserError` if the file is missing or empty, or for the reasons of `system_prompt_of_data`.
    """
    if not path.lower().endswith(TEXT_SUFFIXES):
        record = next(iterate_valid_records(SftDataConfig(path=path, limit=1), seed=seed))[1]
        kind = PreferenceDataConfig if "chosen" in record else SftDataConfig
        return system_prompt_of_data([kind(path=path)], seed=seed)
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise UserError(f"evaluation.system_prompt: {path}: {describe_missing(path)}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"evaluation.system_prompt: {path}: cannot be read as text: {error}") from None
    if not text:
        raise UserError(f"evaluation.system_prompt: {path}: the file is empty. Write the system prompt into it.")
    return text


def system_prompt_of_data(sources: Sequence[SftDataConfig | PreferenceDataConfig], *, seed: int) -> str:
    """Returns the system prompt that the first rows of training data have in common.

    Raises `UserError` if they have none, or different ones.
    """
    advice = "Write the prompt into a text file, and name it under evaluation.system_prompt"
    first_by_prompt: dict[str, str] = {}
    for source in sources:
        for location, record in itertools.islice(iterate_records(source, seed=seed), MAX_RECORDS):
            with contextlib.suppress(RecordError):  # the training reports bad rows
                if isinstance(record, RecordError):
                    raise record
                parsed = parse_record(infer_columns(source, record, location), record, location, ThinkingFormat())
                first = parsed.messages[0]
                system = first["content"] if first["role"] == "system" else ""
                first_by_prompt.setdefault(system, location)
    if not first_by_prompt:
        raise UserError(f"{sources[0].name}: no row among the first {MAX_RECORDS} can be read. {advice}.")
    if "" in first_by_prompt:
        raise UserError(f"{first_by_prompt['']}: the row has no system prompt. {advice}, or use `protocol: modern`.")
    if len(first_by_prompt) > 1:
        first, second, *_ = first_by_prompt.values()
        raise UserError(f"{first} and {second} have different system prompts. {advice}.")
    return next(iter(first_by_prompt))
