"""Tokenizes the records of data sources into examples, which are cached on disk."""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from thinkpo_jax.data.chat_template import has_unclosed_tag, has_unopened_tag
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import Example, Segment, SourceReport, TokenizedDataset, TokenizedSource
from thinkpo_jax.data.readers import LocatedRecord, RecordError, iterate_records, source_fingerprint
from thinkpo_jax.data.record_formats import (
    PreferenceDataConfig,
    PromptAnswers,
    SftDataConfig,
    StageDataConfig,
    describe_form,
    infer_columns,
    parse_record,
)
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import ProgressReporter, log_warning
from thinkpo_jax.runtime.files import cache_folder

# The files of a cache entry.
TOKENS_FILE, SEGMENTS_FILE, EARLIER_FILE, REPORT_FILE = "tokens.int32", "segments.npy", "earlier.npy", "report.json"
CACHE_FORMAT_VERSION = 3  # Increase it when the same records give other token ids, or when the cached files change.
RECORDS_PER_CHUNK = 256  # Records that are tokenized in parallel.
MAX_NORMALIZATION_SHRINK = 4  # A tokenizer's normalization may merge up to this many characters into one.
CHARACTERS_PER_TOKEN = 4  # about, to estimate the tokens of a record that is too long to be tokenized


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

    Sources with a `path` are cached in `cache_folder("tokens")`. The key covers all content that affects the result.
    Raises `UserError` if a source cannot be read, or the config says to stop at a record that cannot be used.
    `keep_going` only counts such records.
    """
    sources: list[TokenizedSource] = []
    for config in configs:
        tokenizer = _SourceTokenizer(config, chat, row_length, seed, title, keep_going)
        if config.generate is None:
            source = _load_or_tokenize(tokenizer)
        else:
            buffer = io.BytesIO()
            segments, earlier_answers, report = tokenizer.tokenize(buffer)
            source = TokenizedSource(np.frombuffer(buffer.getvalue(), np.int32), segments, report, earlier_answers)
        if source.report.stopping_error_by_reason and not keep_going:
            raise UserError(next(iter(source.report.stopping_error_by_reason.values())))
        sources.append(source)
    return TokenizedDataset(sources, [config.weight for config in configs], seed=seed)


class _TooLongError(RecordError):
    """A record does not fit in a row, at least not with two different answers. It would need `num_tokens`."""

    def __init__(self, reason: str, message: str, num_tokens: int) -> None:
        super().__init__(reason, message)
        self.num_tokens = num_tokens


@dataclass(frozen=True)
class _TokenizedRecord:
    """An example, the record that it comes from, and what the report counts."""

    example: Example
    parsed: PromptAnswers
    num_truncated: int
    has_unclosed_thought: bool
    has_unopened_thought: bool


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
        template = (self.chat.template.text, self.chat.template.arguments, self.chat.thinking)
        settings = repr((vocab, template, tokenizer.special_tokens_map))
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

    def tokenize(self, file: BinaryIO) -> tuple[np.ndarray, np.ndarray, SourceReport]:
        """Writes the token ids of all records as int32, in order.

        Returns `segments`, `earlier_answers` and `report` of the source.
        """
        config, report = self.config, SourceReport(self.config.name)
        records = iterate_records(config, seed=self.seed)
        columns: StageDataConfig | None = None
        bounds: list[tuple[int, int, int]] = []
        earlier_answers: list[tuple[int, int, int]] = []
        end = 0
        progress = ProgressReporter(self.title, None, unit="row")
        with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.closing(progress):
            while chunk := list(itertools.islice(records, RECORDS_PER_CHUNK)):
                columns = columns or self._infer_columns(chunk)
                for result in pool.map(functools.partial(self._tokenize_record, columns or config), chunk):
                    report.rows += 1
                    if isinstance(result, RecordError):
                        self._count_error(report, result)
                        continue
                    earlier_answers += [(report.num_used, *span) for span in result.example[0].earlier_answers]
                    for segment in result.example:
                        file.write(segment.token_ids.tobytes())
                        start, end = end, end + len(segment.token_ids)
                        bounds.append((start, start + segment.answer_start, end))
                    self._count_used(report, result)
                num_dropped = report.rows - report.num_used
                progress.update(report.rows, {"left out": str(num_dropped)} if num_dropped else None)
        file.flush()
        report.thinking_tag = self.chat.thinking.tags[0]
        report.form = "" if columns is None else describe_form(columns)
        segments_per_example = 2 if isinstance(config, PreferenceDataConfig) else 1
        segments = np.array(bounds, np.int64).reshape(-1, segments_per_example, 3)
        return segments, np.array(earlier_answers, np.int64).reshape(-1, 3), report

    def _count_used(self, report: SourceReport, record: _TokenizedRecord) -> None:
        report.num_used += 1
        report.num_truncated += record.num_truncated
        report.num_unclosed_thoughts += record.has_unclosed_thought
        report.num_unopened_thoughts += record.has_unopened_thought
        report.num_untrained_records += record.parsed.has_earlier_answers() and not self._trains_all
        record.parsed.count_in(report, self.config)

    @property
    def _trains_all(self) -> bool:
        return isinstance(self.config, SftDataConfig) and self.config.train_on == "all"

    def _count_error(self, report: SourceReport, error: RecordError) -> None:
        """Adds a record that cannot be used to the report. Raises `UserError` if the config says to stop at it."""
        is_too_long = isinstance(error, _TooLongError)
        if is_too_long:
            report.too_long_tokens.append(error.num_tokens)
        if (self.config.over_length if is_too_long else self.config.on_bad_row) == "raise":
            if not self.keep_going:
                raise UserError(str(error))
            report.stopping_error_by_reason.setdefault(error.reason, str(error))
        if not is_too_long:
            report.first_error_by_reason.setdefault(error.reason, str(error))
        report.dropped[error.reason] = report.dropped.get(error.reason, 0) + 1

    def _infer_columns(self, records: Iterable[LocatedRecord]) -> StageDataConfig | None:
        """Returns the config with the columns of the first record that has known ones."""
        for location, record in records:
            if not isinstance(record, RecordError):
                with contextlib.suppress(RecordError):
                    return infer_columns(self.config, record, location)
        return None

    def _tokenize_record(self, columns: StageDataConfig, located: LocatedRecord) -> _TokenizedRecord | RecordError:
        location, record = located
        if isinstance(record, RecordError):
            return record
        is_cut = self.config.over_length == "cut"
        # A record with more characters cannot fit in a row, so it is not tokenized at all.
        max_characters = MAX_NORMALIZATION_SHRINK * self.row_length * self.chat.max_token_characters
        try:
            columns = infer_columns(columns, record, location)
            parsed = parse_record(columns, record, location, self.chat.thinking)
            messages, texts = parsed.messages, parsed.answers
            num_characters = sum(len(message["content"].strip()) for message in messages)
            num_characters += 0 if is_cut else sum(map(len, texts))
            if num_characters > max_characters:
                num_tokens = max(self.row_length + 1, num_characters // CHARACTERS_PER_TOKEN)
                return self._too_long(location, f"{num_characters} characters", num_tokens)
            texts = [text[: max_characters + 1] for text in texts]
            prompt = self.chat.encode_prompt(messages)
            prompts = [prompt.ids] * len(texts)
            answers = [self.chat.encode_answer(prompt, text) for text in texts]
            should_train_earlier = self._trains_all and parsed.has_earlier_answers()
            earlier = self.chat.find_earlier_answers(messages, prompt) if should_train_earlier else []
            has_empty_thought = isinstance(columns, PreferenceDataConfig) and columns.rejected_thinking == "empty_block"
            if has_empty_thought and not self.chat.thinking.find_tag(texts[1]):
                prompts[1] = prompt.ids + self.chat.encode_empty_thought(prompt)
        except RecordError as error:
            return error
        except UserError as error:  # from the tokenizer or its chat template
            return RecordError("cannot be tokenized", f"{location}: {error}")
        lengths = [len(answer) for answer in answers]
        num_tokens = sum(map(len, prompts)) + sum(lengths)
        # The longer answer is cut first, and never below an equal share of the room for answers.
        equal_share = (self.row_length - sum(map(len, prompts))) // len(answers)
        max_length = max(equal_share, max(lengths) + self.row_length - num_tokens)
        num_truncated = sum(length > max_length for length in lengths)
        if max_length < 1 or (num_truncated and not is_cut):
            return self._too_long(location, f"{num_tokens} tokens", num_tokens)
        answers = [answer[:max_length] for answer in answers]
        if len(answers) == 2 and answers[0] == answers[1]:
            if num_truncated:
                problem = f"{location}: the cut answers have the same tokens."
                return _TooLongError("identical after the cut", problem, num_tokens)
            problem = "the two answers have the same tokens, but a pair needs different answers"
            return RecordError("identical answers", f"{location}: {problem}. Change one of them or remove the row.")
        pairs = zip(prompts, answers, strict=True)
        example = tuple(Segment(np.array(ids + answer, np.int32), len(ids), tuple(earlier)) for ids, answer in pairs)
        first_text = texts[0] if lengths[0] <= max_length else self.chat.decode(answers[0])
        text, tags = prompt.open_thought_tag + first_text, self.chat.thought_tags
        is_unclosed, is_unopened = has_unclosed_tag(text, tags), has_unopened_tag(text, tags)
        return _TokenizedRecord(example, parsed, num_truncated, is_unclosed, is_unopened)

    def _too_long(self, location: str, size: str, num_tokens: int) -> _TooLongError:
        limit = f"row_length {self.row_length}"
        remedy = "Increase batch.row_length, or set `over_length` to `drop` or `cut`."
        return _TooLongError(f"longer than {limit}", f"{location}: {size} do not fit {limit}. {remedy}", num_tokens)


def _load_or_tokenize(tokenizer: _SourceTokenizer) -> TokenizedSource:
    """Loads or creates the cache entry of a source. Raises `UserError` if the cache cannot be read or written."""
    entry = cache_folder("tokens") / tokenizer.cache_key()
    try:
        if (cached := _load(entry)) is not None:
            return cached
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}.") as folder:
            new_entry = Path(folder) / "entry"
            new_entry.mkdir()
            with (new_entry / TOKENS_FILE).open("wb") as file:
                segments, earlier_answers, report = tokenizer.tokenize(file)
            np.save(new_entry / SEGMENTS_FILE, segments)
            np.save(new_entry / EARLIER_FILE, earlier_answers)
            source = TokenizedSource(_map_tokens(new_entry), segments, report, earlier_answers)
            record = {"digest": source.digest, "report": asdict(report)}
            (new_entry / REPORT_FILE).write_text(json.dumps(record), encoding="utf-8")
            with contextlib.suppress(OSError):  # another process has saved an equal entry in the meantime
                new_entry.rename(entry)
            return source
    except OSError as error:
        problem = f"{entry.parent}: cannot save tokenized data there: {error}"
        raise UserError(f"{problem}. Set XDG_CACHE_HOME to a writable folder with free space.") from None


def _load(entry: Path) -> TokenizedSource | None:
    """Returns the source of a cache entry. Returns None if there is no entry, or after removing a damaged one."""
    if not entry.exists():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError):
        record = json.loads((entry / REPORT_FILE).read_text(encoding="utf-8"))
        segments, earlier_answers = (
            np.load(entry / name, allow_pickle=False) for name in (SEGMENTS_FILE, EARLIER_FILE)
        )
        source = TokenizedSource(_map_tokens(entry), segments, SourceReport(**record["report"]), earlier_answers)
        if source.digest == record["digest"]:
            return source
    log_warning(f"{entry}: the cached tokens are damaged. They are built again.")
    shutil.rmtree(entry)
    return None


def _map_tokens(entry: Path) -> np.ndarray:
    path = entry / TOKENS_FILE
    return np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)
