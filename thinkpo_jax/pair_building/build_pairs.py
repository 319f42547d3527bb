"""How do preference pairs come to be? A long and a short answer to each question, filtered, selected and counted.

Example: python -m thinkpo_jax.pairs --config configs/pairs_miniature.yaml
"""

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer, Message
from thinkpo_jax.data.record_formats import iterate_responses, require_column, require_text
from thinkpo_jax.data.sources import Record, RecordError
from thinkpo_jax.evaluation.benchmarks import BENCHMARKS, load_questions
from thinkpo_jax.evaluation.decontamination import find_contamination
from thinkpo_jax.evaluation.evaluation_config import BenchmarkConfig
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.pair_building.data_card import (
    CARD,
    CONTAMINATION_FILE,
    PAIRS,
    PLOT,
    data_card,
    pair_lengths_figure,
    summarize_counts,
)
from thinkpo_jax.pair_building.filters import PairCandidate, PreferencePair, apply_control, filter_pairs, select_pairs
from thinkpo_jax.pair_building.pairs_config import PairsConfig
from thinkpo_jax.pair_building.short_answers import ShortAnswer, collect_short_answers
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.console import ProgressReporter, log_info, log_warning
from thinkpo_jax.runtime.figures import figure_to_png
from thinkpo_jax.runtime.files import lock_folder, write_atomically

ANSWERS_PER_CHUNK = 256  # answers whose tokens are counted at a time: their ids take memory


@dataclass(frozen=True)
class _LongAnswer:
    """A row with a long answer."""

    place: str
    prompt: tuple[Message, ...]
    question: str
    answer: str
    reference: str | None


def build_pairs(config: PairsConfig) -> list[PreferencePair]:
    """Builds the pairs and writes them, with a data card, a histogram and a list of what is contaminated.

    Raises `UserError` for bad input and while another process writes to `out`, `RunError` where no pair is left.
    """
    folder = Path(config.out).expanduser()
    with lock_folder(folder, "out"):
        return _build(config, folder)


def _build(config: PairsConfig, folder: Path) -> list[PreferencePair]:
    chat = ChatTokenizer.from_folder(resolve_model_folder(config.tokenizer, weights=False))
    held_out = {
        benchmark.name: [
            _question_text(question.messages, benchmark) for question in load_questions(benchmark, seed=config.seed)
        ]
        for benchmark in config.decontaminate.against
    }
    rows: Counter[str] = Counter()  # what became of the rows with long answers
    longs = _read_long(config, rows)
    longs = _decontaminated(config, longs, held_out, folder, rows)
    asked = [long.question for long in longs]
    answered: Counter[str] = Counter()  # ... of where the short answers come from
    shorts = collect_short_answers(config.short, asked, folder, seed=config.seed, counts=answered)
    rows["no short answer to the question"] = sum(not found for found in shorts)
    counts: Counter[str] = Counter()  # ... and of the candidates: each long answer with each short one
    pairs, left_out = filter_pairs(_candidates(chat, longs, shorts, counts), config.filters, seed=config.seed)
    counts.update(left_out)
    steps: list[Callable[[list[PreferencePair]], tuple[list[PreferencePair], dict[str, int]]]] = [
        lambda found: apply_control(found, config.control),
        lambda found: select_pairs(found, config.select, seed=config.seed),
    ]
    for step in reversed(steps) if config.control == "swapped" else steps:  # selected by the gap before the exchange
        pairs, left_out = step(pairs)
        counts.update(left_out)
    tables = {
        "Rows with a long answer": rows,
        "Short answers": answered,
        "Candidates, a long and a short answer": counts,
    }
    if not pairs:
        raise RunError(f"no pair is left. {summarize_counts(tables)}. Loosen `filters`, or mend the data.")
    write_atomically(folder / PAIRS, _parquet(pairs))
    lengths = np.array([(pair.chosen_tokens, pair.rejected_tokens) for pair in pairs])
    write_atomically(folder / PLOT, figure_to_png(pair_lengths_figure(lengths[:, 0], lengths[:, 1])))
    write_atomically(folder / CARD, data_card(config, pairs, tables).encode())
    log_info(summarize_counts(tables))
    log_info(f"{len(pairs)} pairs: {folder / PAIRS}; data card: {folder / CARD}")
    return pairs


def _question_text(messages: Sequence[Message], benchmark: BenchmarkConfig) -> str:
    return messages[-1]["content"].removeprefix(BENCHMARKS[benchmark.name].prefix)


def _read_long(config: PairsConfig, counts: Counter[str]) -> list[_LongAnswer]:
    found: list[_LongAnswer] = []
    for read in iterate_responses(config.long, seed=config.seed):
        counts["read"] += 1
        try:
            if isinstance(read, RecordError):
                raise read
            place, said, row = read
            reference = None if config.long.reference is None else _reference(row, config.long.reference, place)
        except RecordError as error:
            if config.long.on_bad_row == "raise":
                raise
            counts[f"bad row: {error.reason}"] += 1
            if counts[f"bad row: {error.reason}"] == 1:
                log_warning(f"skipped, as are all such rows: {error}")
            continue
        question = said.last_user_message(config.long.prompt_suffix)
        found.append(_LongAnswer(place, tuple(said.messages), question, said.answers[0], reference))
    return found


def _reference(row: Record, column: str, place: str) -> str:
    value = require_column(row, column, place)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if number else require_text(value, f"{place}, {column}")


def _decontaminated(
    config: PairsConfig,
    longs: Sequence[_LongAnswer],
    held_out: Mapping[str, Sequence[str]],
    folder: Path,
    counts: Counter[str],
) -> list[_LongAnswer]:
    """The rows whose question is none of the evaluation's; what was found is listed in a file."""
    hits = find_contamination([long.question for long in longs], held_out, ngram=config.decontaminate.ngram)
    first = {hit.index: hit.benchmark for hit in reversed(hits)}
    for benchmark in first.values():
        counts[f"a question of {benchmark}"] += 1
    listed = [{"place": longs[hit.index].place, "question": longs[hit.index].question, **asdict(hit)} for hit in hits]
    write_atomically(folder / CONTAMINATION_FILE, "".join(json.dumps(line) + "\n" for line in listed).encode())
    return [long for i, long in enumerate(longs) if i not in first]


def _candidates(
    chat: ChatTokenizer, longs: Sequence[_LongAnswer], shorts: Sequence[Sequence[ShortAnswer]], counts: Counter[str]
) -> list[PairCandidate]:
    both = [(i, short) for i, found in enumerate(shorts) for short in found]
    counts["all"] = len(both)
    refused = [short.error for _, short in both if short.error is not None]
    counts["the question was refused"] = len(refused)
    if refused:
        log_warning(f"{len(refused)} of {len(both)} questions were refused, the first because: {refused[0]}")
    given = [(i, short) for i, short in both if short.error is None]
    tokens = _lengths(chat, [text for i, short in given for text in (longs[i].answer, short.text)])
    return [
        PairCandidate(
            question=longs[i].question,
            prompt=longs[i].prompt,
            reference=longs[i].reference,
            long=longs[i].answer,
            short=short.text,
            long_tokens=long_tokens,
            short_tokens=short_tokens,
            short_finished=short.finished,
            source=longs[i].place,
        )
        for (i, short), long_tokens, short_tokens in zip(given, tokens[::2], tokens[1::2], strict=True)
    ]


def _lengths(chat: ChatTokenizer, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, each text counted once."""
    found: dict[str, int] = {}
    distinct = list(dict.fromkeys(texts))
    with contextlib.closing(ProgressReporter("tokens counted", len(distinct), unit="answer")) as progress:
        for start in range(0, len(distinct), ANSWERS_PER_CHUNK):
            part = distinct[start : start + ANSWERS_PER_CHUNK]
            found.update(zip(part, chat.count_tokens(part), strict=True))
            progress.update(len(found))
    return [found[text] for text in texts]


def _parquet(pairs: Sequence[PreferencePair]) -> bytes:
    """One row per pair. The columns prompt, chosen, rejected are what a ThinkPO stage reads without further keys."""
    import pyarrow
    from pyarrow import parquet

    rows = [asdict(pair) | {"gap": pair.gap} for pair in pairs]
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    kinds = {"prompt": pyarrow.list_(message), "short_answer_is_correct": pyarrow.bool_()}
    kinds |= dict.fromkeys(("chosen_tokens", "rejected_tokens", "gap"), pyarrow.int64())
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in rows[0]])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()
