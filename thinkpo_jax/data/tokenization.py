"""What is trained on, before it has a row in a batch? Rows of sources -> tokenised examples, kept on disk by content.

An example is a tuple of segments that stay together: one for SFT, two (chosen, rejected) for a preference pair.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import operator
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer, RenderedPrompt, contains_thought, has_unclosed_tag
from thinkpo_jax.data.examples import Example, Segment, SourceReport, TokenizedDataset, TokenizedSource
from thinkpo_jax.data.readers import iterate_records, source_fingerprint
from thinkpo_jax.data.record_formats import (
    ColumnConfig,
    PreferenceDataConfig,
    PromptAnswers,
    StageDataConfig,
    infer_columns,
    parse_record,
)
from thinkpo_jax.data.sources import Record, RecordError
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import ProgressReporter, log_warning
from thinkpo_jax.runtime.files import token_cache_folder

CACHE_FORMAT_VERSION = (
    1  # of what is kept on disk; raised whenever the same rows give other ids, or the files another layout
)
RECORDS_PER_CHUNK = 256  # rows that are tokenised at a time
TOKENS, SEGMENTS, REPORT = "tokens.int32", "segments.npy", "report.json"
MAX_NORMALIZATION_SHRINK = 4  # as many characters a tokenizer's normalisation may make one of


def tokenize_sources(
    configs: Sequence[StageDataConfig],
    chat: ChatTokenizer,
    *,
    row_length: int,
    seed: int,
    title: str = "data",
    keep_going: bool = False,
) -> TokenizedDataset:
    """The tokenised examples of several sources; there may be none left.

    Raises `UserError` for a source that cannot be read, and with the place of the first row for which the config says
    that the run stops; with `keep_going` such rows are only counted. What comes from files and data sets is kept below
    `cache_folder()` by content, so that the same rows, tokenizer and settings are prepared once.
    """
    parts: list[TokenizedSource] = []
    for config in configs:
        work = _Work(config, chat, row_length, seed, title, keep_going)
        part = _generated(work) if config.generate is not None else _kept_or_made(work)
        if part.report.stopping_error_by_reason and not keep_going:
            raise UserError(next(iter(part.report.stopping_error_by_reason.values())))
        parts.append(part)
    return TokenizedDataset(parts, [config.weight for config in configs], seed=seed)


@dataclass(frozen=True)
class _Work:
    """The rows of one source, and what to make of them."""

    config: StageDataConfig
    chat: ChatTokenizer
    row_length: int
    seed: int
    title: str
    keep_going: bool

    def key(self) -> str:
        """A digest of everything that determines the prepared tokens and the report."""
        tokenizer = self.chat.tokenizer
        vocabulary = (
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        )
        found = {
            "format": CACHE_FORMAT_VERSION,
            "tokenizers": importlib.metadata.version("tokenizers"),
            "tokenizer": hashlib.sha256(
                repr((vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map)).encode()
            ).hexdigest(),
            "end": self.chat.end_of_turn_id,
            "special": sorted(self.chat.special_token_ids),
            "rows": source_fingerprint(self.config, seed=self.seed),
            "config": self.config.model_dump(mode="json", exclude={"weight"}),
            "row_length": self.row_length,
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:32]


def _generated(work: _Work) -> TokenizedSource:
    buffer = io.BytesIO()
    segments, report = _write(work, buffer)
    return TokenizedSource(np.frombuffer(buffer.getvalue(), np.int32), segments, report)


def _kept_or_made(work: _Work) -> TokenizedSource:
    place = token_cache_folder() / work.key()
    try:
        if (kept := _kept(place)) is not None:
            return kept
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
            entry = Path(folder) / "entry"
            entry.mkdir()
            with (entry / TOKENS).open("wb") as file:
                segments, report = _write(work, file)
            np.save(entry / SEGMENTS, segments)
            part = TokenizedSource(_mapped(entry / TOKENS), segments, report)
            (entry / REPORT).write_text(json.dumps({"digest": part.digest, "report": asdict(report)}), encoding="utf-8")
            if not place.exists():
                with contextlib.suppress(OSError):  # another process was first: its entry is as good
                    entry.rename(place)
            return part
    except OSError as error:
        problem = f"prepared tokens cannot be kept there: {error}"
        raise UserError(f"{place.parent}: {problem}. Set XDG_CACHE_HOME to a folder with room.") from None


def _kept(place: Path) -> TokenizedSource | None:
    """What was prepared before, once it is seen that it is whole."""
    if not place.exists():
        return None
    try:
        record = json.loads((place / REPORT).read_text(encoding="utf-8"))
        segments = np.load(place / SEGMENTS, allow_pickle=False)
        part = TokenizedSource(_mapped(place / TOKENS), segments, SourceReport(**record["report"]))
        if part.digest == record["digest"]:
            return part
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        pass
    log_warning(f"{place}: damaged; the tokens are prepared again.")
    shutil.rmtree(place)
    return None


def _mapped(path: Path) -> np.ndarray:
    """The ids of a file as an array that is read when it is used."""
    return np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)


def _write(work: _Work, file: BinaryIO) -> tuple[np.ndarray, SourceReport]:
    """Tokenises all rows of a source, in their order; ids are written as they come. Segments as in `Part`."""
    config = work.config
    rows = iterate_records(config, seed=work.seed)
    form: ColumnConfig | None = None
    spans: list[list[tuple[int, int, int]]] = []
    dropped, bad, fatal = Counter[str](), dict[str, str](), dict[str, str]()
    read = end = cut = open_thinking = 0
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        contextlib.closing(ProgressReporter(work.title, None, unit="row")) as progress,
    ):
        while chunk := list(itertools.islice(rows, RECORDS_PER_CHUNK)):
            form = form or _form(config, chunk)
            for found in pool.map(functools.partial(_example, work, form or config), chunk):
                read += 1
                if isinstance(found, RecordError):
                    dropped[found.reason] += 1
                    stops = (config.over_length if isinstance(found, _TooLong) else config.on_bad_row) == "raise"
                    if stops and not work.keep_going:
                        raise UserError(str(found))
                    if not isinstance(found, _TooLong):
                        bad.setdefault(found.reason, str(found))
                    if stops:
                        fatal.setdefault(found.reason, str(found))
                    continue
                spans.append([])
                for segment in found.segments:
                    file.write(segment.token_ids.tobytes())
                    spans[-1].append((end, end + segment.answer_start, end + len(segment.token_ids)))
                    end += len(segment.token_ids)
                cut += found.cut
                open_thinking += found.open_thinking
            progress.update(read, {"left out": str(dropped.total())} if dropped else None)
    file.flush()
    answers = 2 if isinstance(config, PreferenceDataConfig) else 1
    report = SourceReport(config.name, read, len(spans), dict(dropped), bad, fatal, cut, open_thinking)
    return np.array(spans, np.int64).reshape(-1, answers, 3), report


def _form(config: StageDataConfig, rows: Iterable[tuple[str, Record | RecordError]]) -> ColumnConfig | None:
    """The config with its columns, as the first row that tells has them."""
    for place, row in rows:
        if not isinstance(row, RecordError):
            try:
                return infer_columns(config, row, place)
            except RecordError:
                continue
    return None


class _TooLong(RecordError):
    """A row that does not fit `row_length`."""


@dataclass(frozen=True)
class _Tokenised:
    segments: Example
    cut: int
    open_thinking: bool


def _example(work: _Work, form: ColumnConfig, placed: tuple[str, Record | RecordError]) -> _Tokenised | RecordError:
    """The segments of a row, or why there are none."""
    place, row = placed
    if isinstance(row, RecordError):
        return row
    try:
        found = parse_record(infer_columns(form, row, place), row, place)
        most = (
            MAX_NORMALIZATION_SHRINK * work.row_length * work.chat.max_token_characters
        )  # characters; more are never tokenised
        characters = sum(len(message["content"].strip()) for message in found.messages)
        if work.config.over_length == "cut":
            found = found._replace(answers=tuple(answer[: most + 1] for answer in found.answers))
        else:
            characters += sum(map(len, found.answers))
        if characters > most:
            raise _too_long(work, place, f"{characters} characters")
        prompt = work.chat.encode_prompt(found.messages)
        prompts, answers = _ids(work, form, found, prompt)
    except RecordError as error:
        return error
    except UserError as error:  # of the tokenizer or its template
        return RecordError("cannot be tokenised", f"{place}: {error}")
    kept = _fit([len(ids) for ids in prompts], [len(ids) for ids in answers], work.row_length)
    whole = [len(ids) for ids in answers]
    if kept is None or (kept != whole and work.config.over_length != "cut"):
        return _too_long(work, place, f"{sum(map(len, prompts)) + sum(whole)} tokens")
    segments = tuple(
        Segment(np.array(prompt + ids[:length], np.int32), len(prompt))
        for prompt, ids, length in zip(prompts, answers, kept, strict=True)
    )
    if len(answers) == 2 and answers[0][: kept[0]] == answers[1][: kept[1]]:
        if kept != whole:
            return _TooLong("identical after the cut", f"{place}: the two answers are the same after they were cut.")
        return RecordError(
            "identical answers", f"{place}: the two answers have the same tokens; a pair needs two answers."
        )
    first = found.answers[0] if kept[0] == whole[0] else work.chat.decode(answers[0][: kept[0]])
    return _Tokenised(segments, sum(map(operator.ne, kept, whole)), has_unclosed_tag(prompt.open_thought_tag + first))


def _too_long(work: _Work, place: str, found: str) -> _TooLong:
    limit = f"row_length {work.row_length}"
    return _TooLong(f"longer than {limit}", f"{place}: {found} do not fit {limit}. Raise it, or drop over-long rows.")


def _ids(
    work: _Work, form: ColumnConfig, found: PromptAnswers, prompt: RenderedPrompt
) -> tuple[list[list[int]], list[list[int]]]:
    """For each answer the ids that are read before it, and its own with the end token."""
    prompts = [prompt.ids] * len(found.answers)
    answers = [work.chat.encode_answer(prompt, answer) for answer in found.answers]
    if (
        isinstance(form, PreferenceDataConfig)
        and form.rejected_thinking == "empty_block"
        and not contains_thought(found.answers[1])
    ):
        prompts[1] = prompt.ids + work.chat.encode_empty_thought(prompt)
    return prompts, answers


def _fit(prompts: Sequence[int], answers: Sequence[int], row_length: int) -> list[int] | None:
    """How many tokens of each answer fit a row beside the prompts, the longer answer cut first; None: not one of each.

    Answers that fit stay whole; otherwise all are cut to the same length, as far as they are longer.
    """
    room = row_length - sum(prompts)
    left = sorted(answers)
    while left and left[0] * len(left) <= room:
        room -= left.pop(0)
    longest = room // len(left) if left else max(answers)
    return [min(length, longest) for length in answers] if longest > 0 else None
