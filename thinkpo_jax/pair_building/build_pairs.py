"""Builds preference pairs: reads long answers, collects short ones, filters and selects pairs, and counts drops."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import pydantic

from thinkpo_jax.data.chat_template import ThinkingFormat, ThinkingTags
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.messages import require_column, require_text
from thinkpo_jax.data.readers import Record, RecordError
from thinkpo_jax.data.record_formats import ResponseSourceConfig, iterate_responses
from thinkpo_jax.evaluation.benchmarks import Benchmarks, load_questions, question_texts
from thinkpo_jax.evaluation.decontamination import CONTAMINATION_NGRAM, ContaminationMatch, find_contamination
from thinkpo_jax.inference.engine import Completion
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.pair_building import filters as pair_filters
from thinkpo_jax.pair_building.data_card import CONTAMINATION_FILE, summarize_counts, write_pair_set
from thinkpo_jax.pair_building.filters import ControlKind, FilterConfig, Pairs, PreferencePair, SelectConfig
from thinkpo_jax.pair_building.short_answers import ShortAnswersConfig, collect_short_answers, count_skipped_row
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, RunError
from thinkpo_jax.runtime.console import ProgressReporter, log_info, log_warning
from thinkpo_jax.runtime.files import lock_folder, write_atomically

ANSWERS_PER_CHUNK = 256  # answers to tokenize at a time, because their token ids need memory


class LongAnswersConfig(ResponseSourceConfig):
    """The rows with the long answers. `reference` is the column with the correct answer, if there is one."""

    reference: str | None = None

    @property
    def other_columns(self) -> tuple[str, ...]:
        """The column of the reference."""
        return () if self.reference is None else (self.reference,)


class DecontaminationConfig(ConfigSection):
    """Benchmarks whose questions are dropped. Questions match if they share `ngram` tokens in a row."""

    against: Benchmarks = ()
    ngram: int = pydantic.Field(default=CONTAMINATION_NGRAM, ge=4)


class PairsConfig(ConfigSection):
    """How pairs are built. `out` is the output folder, and `tokenizer` (a model folder or Hub id) counts the tokens.

    A thought in a field of its own is joined to its answer with `thinking_tags` (default: those of its template).
    """

    out: ConfigPath
    title: str = "ThinkPO pairs"
    seed: int = pydantic.Field(default=0, ge=0, lt=2**31)
    tokenizer: ConfigPath
    thinking_tags: ThinkingTags | None = None
    long: LongAnswersConfig
    short: Annotated[ShortAnswersConfig, pydantic.Field(discriminator="by")]
    filters: FilterConfig = FilterConfig()
    control: ControlKind = "none"
    select: SelectConfig = SelectConfig()
    decontaminate: DecontaminationConfig = DecontaminationConfig()

    @pydantic.field_validator("short", mode="before")
    @classmethod
    def _reject_old_form(cls, short: Any) -> Any:
        if isinstance(short, Mapping) and short.get("by") == "request":
            raise ValueError("`by: request` has a new form. Write `by: sample` and `engine: server`, and keep `server`")
        return short


def build_pairs(config: PairsConfig) -> Pairs:
    """Builds the pairs and writes them, with a data card, a plot and a list of contaminated questions.

    Raises `UserError` if the input is wrong, or another process writes to `out`. Raises `RunError` if no pair is left.
    """
    folder = Path(config.out)
    rows, answers, candidates = Counter[str](), Counter[str](), Counter[str]()
    tables = {"Rows with a long answer": rows, "Short answers": answers, "Candidate pairs": candidates}
    with lock_folder(folder, "out"):
        tokenizer_folder = resolve_model_folder(config.tokenizer, weights=False)
        tokenizer = ChatTokenizer.from_folder(tokenizer_folder, thinking_tags=config.thinking_tags)
        thinking = tokenizer.thinking
        held_out = {
            b.name: question_texts(b.name, load_questions(b, seed=config.seed)) for b in config.decontaminate.against
        }
        longs = _read_long_answers(config.long, config.seed, thinking, rows)
        matches = find_contamination([long.question for long in longs], held_out, ngram=config.decontaminate.ngram)
        longs = _drop_contaminated(longs, matches, folder / CONTAMINATION_FILE, rows)
        questions = [long.question for long in longs]
        options = {"seed": config.seed, "tokenizer": tokenizer, "counts": answers}
        shorts = collect_short_answers(config.short, questions, folder, **options)
        rows["no short answer to the question"] = sum(not completions for completions in shorts)
        pairs = _add_short_answers(tokenizer, longs, shorts, candidates)
        options = {"thought_tags": tokenizer.thought_tags, "seed": config.seed, "counts": candidates}
        pairs = pair_filters.filter_pairs(pairs, config.filters, **options)
        pairs = pair_filters.filter_for_control(pairs, config.control, candidates)
        pairs = pair_filters.select_pairs(pairs, config.select, seed=config.seed, counts=candidates)
        if config.control == "swapped":  # after the selection, which compares the gaps of the original pairs
            pairs = [pair.swapped() for pair in pairs]
        summary = summarize_counts(tables)
        if not pairs:
            raise RunError(f"no pair is left. {summary}. Loosen `filters`, or correct the data.")
        write_pair_set(folder, config.model_dump(mode="json"), pairs, tables)
        log_info(summary)
    return pairs


def _read_long_answers(config: LongAnswersConfig, seed: int, thinking: ThinkingFormat, counts: Counter[str]) -> Pairs:
    """Returns pairs without a short answer."""
    pairs: Pairs = []
    for response in iterate_responses(config, seed=seed, thinking=thinking):
        counts["read"] += 1
        try:
            if isinstance(response, RecordError):
                raise response
            location, conversation, row = response
            reference = None if config.reference is None else _read_reference(row, config.reference, location)
            question, prompt = conversation.last_user_message(config.prompt_suffix), tuple(conversation.messages)
            pairs.append(PreferencePair(question, prompt, reference, conversation.answers[0], location))
        except RecordError as error:
            if config.on_bad_row == "raise":
                raise
            count_skipped_row(error, counts)
    return pairs


def _read_reference(row: Record, column: str, location: str) -> str:
    value = require_column(row, column, location)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else require_text(value, f"{location}, {column}")


def _drop_contaminated(longs: Pairs, matches: list[ContaminationMatch], path: Path, counts: Counter[str]) -> Pairs:
    """Drops the pairs whose question occurs in a benchmark, and lists the matches in a file."""
    first_benchmark = {match.index: match.benchmark for match in reversed(matches)}
    counts.update(f"a question of {benchmark}" for benchmark in first_benchmark.values())
    described = [(longs[match.index], match) for match in matches]
    records = [{"place": long.source, "question": long.question, **asdict(match)} for long, match in described]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    return [long for i, long in enumerate(longs) if i not in first_benchmark]


def _add_short_answers(
    tokenizer: ChatTokenizer, longs: Pairs, shorts: list[list[Completion]], counts: Counter[str]
) -> Pairs:
    """Pairs each long answer with each short answer to its question."""
    both = [(long, short) for long, completions in zip(longs, shorts, strict=True) for short in completions]
    errors = [short.error for _, short in both if short.error is not None]
    counts["all"], counts["the question was refused"] = len(both), len(errors)
    if errors:
        log_warning(f"{len(errors)} of {len(both)} questions were refused, the first because: {errors[0]}")
    answered = [(long, short) for long, short in both if short.error is None]
    texts = list(dict.fromkeys(text for long, short in answered for text in (long.chosen, short.text)))
    num_tokens: dict[str, int] = {}
    with closing(ProgressReporter("tokens counted", len(texts), unit="answer")) as progress:
        for start in range(0, len(texts), ANSWERS_PER_CHUNK):
            chunk = texts[start : start + ANSWERS_PER_CHUNK]
            num_tokens.update(zip(chunk, tokenizer.count_tokens(chunk), strict=True))
            progress.update(len(num_tokens))
    return [
        replace(
            long,
            rejected=short.text,
            chosen_tokens=num_tokens[long.chosen],
            rejected_tokens=num_tokens[short.text],
            short_is_truncated=short.finish_reason == "length",
        )
        for long, short in answered
    ]
