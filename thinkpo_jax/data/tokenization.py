"""Tokenizes the records of data sources into examples.

An example is a tuple of segments that stay in one row: one for SFT, two (chosen, rejected) for a preference pair.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer, contains_thought, has_unclosed_tag
from thinkpo_jax.data.examples import Example, Segment, SourceReport, TokenizedDataset, TokenizedSource
from thinkpo_jax.data.readers import iterate_records, source_fingerprint
from thinkpo_jax.data.record_formats import (
    ColumnConfig,
    PreferenceDataConfig,
    StageDataConfig,
    infer_columns,
    parse_record,
)
from thinkpo_jax.data.sources import Record, RecordError
from thinkpo_jax.data.token_cache import load_or_build
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import ProgressReporter

CACHE_FORMAT_VERSION = 2  # Increase it when the same records give other token ids, or when the cached files change.
RECORDS_PER_CHUNK = 256  # Records that are tokenized in parallel.
MAX_NORMALIZATION_SHRINK = 4  # A tokenizer's normalization may merge up to this many characters into one.


def tokenize_sources(
    configs: Sequence[StageDataConfig],
    chat: ChatTokenizer,
    *,
    row_length: int,
    seed: int,
    title: str = "data",
    keep_going: bool = False,
) -> TokenizedDataset:
    """Tokenizes several sources. The dataset is empty if no record can be used.

    Sources with a `path` are cached in `token_cache_folder()`. The key covers all content that affects the result.
    Raises `UserError` if a source cannot be read, or the config says to stop at a record that cannot be used.
    `keep_going` only counts such records.
    """
    sources: list[TokenizedSource] = []
    for config in configs:
        tokenizer = _SourceTokenizer(config, chat, row_length, seed, title, keep_going)
        if config.generate is None:
            source = load_or_build(tokenizer.cache_key(), tokenizer.tokenize)
        else:
            buffer = io.BytesIO()
            segments, report = tokenizer.tokenize(buffer)
            source = TokenizedSource(np.frombuffer(buffer.getvalue(), np.int32), segments, report)
        if source.report.stopping_error_by_reason and not keep_going:
            raise UserError(next(iter(source.report.stopping_error_by_reason.values())))
        sources.append(source)
    return TokenizedDataset(sources, [config.weight for config in configs], seed=seed)


class _TooLongError(RecordError):
    """A record does not fit in a row, at least not with two different answers."""


@dataclass(frozen=True)
class _SourceTokenizer:
    """Tokenizes the records of one source."""

    config: StageDataConfig
    chat: ChatTokenizer
    row_length: int
    seed: int
    title: str
    keep_going: bool

    def cache_key(self) -> str:
        """Returns a digest of everything that determines the token ids and the report."""
        tokenizer = self.chat.tokenizer
        vocab = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        settings = repr((vocab, tokenizer.chat_template, tokenizer.special_tokens_map))
        identity = {
            "format": CACHE_FORMAT_VERSION,
            "tokenizers": importlib.metadata.version("tokenizers"),
            "tokenizer": hashlib.sha256(settings.encode()).hexdigest(),
            "end": self.chat.end_of_turn_id,
            "special": sorted(self.chat.special_token_ids),
            "rows": source_fingerprint(self.config, seed=self.seed),
            "config": self.config.model_dump(mode="json", exclude={"weight"}),
            "row_length": self.row_length,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    def tokenize(self, file: BinaryIO) -> tuple[np.ndarray, SourceReport]:
        """Writes the token ids of all records to `file`, in order. Returns `segments` and `report` of the source."""
        config, report = self.config, SourceReport(self.config.name)
        records = iterate_records(config, seed=self.seed)
        columns: ColumnConfig | None = None
        bounds: list[tuple[int, int, int]] = []
        end = 0
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            contextlib.closing(ProgressReporter(self.title, None, unit="row")) as progress,
        ):
            while chunk := list(itertools.islice(records, RECORDS_PER_CHUNK)):
                columns = columns or self._infer_columns(chunk)
                for result in pool.map(functools.partial(self._tokenize_record, columns or config), chunk):
                    report.rows += 1
                    if isinstance(result, RecordError):
                        self._count_error(report, result)
                        continue
                    example, num_truncated, has_unclosed_thought = result
                    for segment in example:
                        file.write(segment.token_ids.tobytes())
                        start, end = end, end + len(segment.token_ids)
                        bounds.append((start, start + segment.answer_start, end))
                    report.num_used += 1
                    report.num_truncated += num_truncated
                    report.num_unclosed_thoughts += has_unclosed_thought
                num_dropped = report.rows - report.num_used
                progress.update(report.rows, {"left out": str(num_dropped)} if num_dropped else None)
        file.flush()
        segments_per_example = 2 if isinstance(config, PreferenceDataConfig) else 1
        return np.array(bounds, np.int64).reshape(-1, segments_per_example, 3), report

    def _count_error(self, report: SourceReport, error: RecordError) -> None:
        """Adds a record that cannot be used to the report. Raises `UserError` if the config says to stop at it."""
        is_too_long = isinstance(error, _TooLongError)
        if (self.config.over_length if is_too_long else self.config.on_bad_row) == "raise":
            if not self.keep_going:
                raise UserError(str(error))
            report.stopping_error_by_reason.setdefault(error.reason, str(error))
        if not is_too_long:
            report.first_error_by_reason.setdefault(error.reason, str(error))
        report.dropped[error.reason] = report.dropped.get(error.reason, 0) + 1

    def _infer_columns(self, records: Iterable[tuple[str, Record | RecordError]]) -> ColumnConfig | None:
        """Returns the config with the columns of the first record that has known ones."""
        for location, record in records:
            if not isinstance(record, RecordError):
                with contextlib.suppress(RecordError):
                    return infer_columns(self.config, record, location)
        return None

    def _tokenize_record(
        self, columns: ColumnConfig, located_record: tuple[str, Record | RecordError]
    ) -> tuple[Example, int, bool] | RecordError:
        """Returns (example, number of cut answers, whether the first answer has an unclosed thought), or the error."""
        location, record = located_record
        if isinstance(record, RecordError):
            return record
        is_cut = self.config.over_length == "cut"
        # A record with more characters cannot fit in a row, so it is not tokenized at all.
        max_characters = MAX_NORMALIZATION_SHRINK * self.row_length * self.chat.max_token_characters
        try:
            messages, texts = parse_record(infer_columns(columns, record, location), record, location)
            num_characters = sum(len(message["content"].strip()) for message in messages)
            num_characters += 0 if is_cut else sum(map(len, texts))
            if num_characters > max_characters:
                return self._too_long(location, f"{num_characters} characters")
            texts = [text[: max_characters + 1] for text in texts]
            prompt = self.chat.encode_prompt(messages)
            prompts = [prompt.ids] * len(texts)
            answers = [self.chat.encode_answer(prompt, text) for text in texts]
            has_empty_thought = isinstance(columns, PreferenceDataConfig) and columns.rejected_thinking == "empty_block"
            if has_empty_thought and not contains_thought(texts[1]):
                prompts[1] = prompt.ids + self.chat.encode_empty_thought(prompt)
        except RecordError as error:
            return error
        except UserError as error:  # from the tokenizer or its chat template
            return RecordError("cannot be tokenised", f"{location}: {error}")
        lengths = [len(answer) for answer in answers]
        num_tokens = sum(map(len, prompts)) + sum(lengths)
        # The longer answer is cut first, and never below an equal share of the room for answers.
        equal_share = (self.row_length - sum(map(len, prompts))) // len(answers)
        max_length = max(equal_share, max(lengths) + self.row_length - num_tokens)
        num_truncated = sum(length > max_length for length in lengths)
        if max_length < 1 or (num_truncated and not is_cut):
            return self._too_long(location, f"{num_tokens} tokens")
        answers = [answer[:max_length] for answer in answers]
        if len(answers) == 2 and answers[0] == answers[1]:
            if num_truncated:
                return _TooLongError("identical after the cut", f"{location}: the cut answers have the same tokens.")
            problem = "the two answers have the same tokens, but a pair needs different answers"
            return RecordError("identical answers", f"{location}: {problem}. Change one of them or remove the row.")
        example = tuple(
            Segment(np.array(prompt_ids + answer, np.int32), len(prompt_ids))
            for prompt_ids, answer in zip(prompts, answers, strict=True)
        )
        first_text = texts[0] if lengths[0] <= max_length else self.chat.decode(answers[0])
        return example, num_truncated, has_unclosed_tag(prompt.open_thought_tag + first_text)

    def _too_long(self, location: str, size: str) -> _TooLongError:
        limit = f"row_length {self.row_length}"
        remedy = "Increase batch.row_length, or set `over_length` to `drop` or `cut`."
        return _TooLongError(f"longer than {limit}", f"{location}: {size} do not fit {limit}. {remedy}")
