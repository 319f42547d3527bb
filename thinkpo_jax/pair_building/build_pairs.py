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

from thinkpo_jax.data.chat_tokenizer import Chat, Message
from thinkpo_jax.data.record_formats import field, read_answered, text
from thinkpo_jax.data.sources import BadRow, Row
from thinkpo_jax.evaluation.benchmarks import TABLE, questions
from thinkpo_jax.evaluation.decontamination import contaminated
from thinkpo_jax.evaluation.evaluation_config import BenchmarkConfig
from thinkpo_jax.models.model_folder import find_model
from thinkpo_jax.pair_building.data_card import CARD, HITS, PAIRS, PLOT, _card, _summary, pair_lengths_figure
from thinkpo_jax.pair_building.filters import Candidate, Pair, apply_control, filter_pairs, select
from thinkpo_jax.pair_building.pairs_config import PairsConfig
from thinkpo_jax.pair_building.short_answers import ShortAnswer, short_answers
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.console import Progress, say, warn
from thinkpo_jax.runtime.figures import png
from thinkpo_jax.runtime.files import write_whole, writing

COUNTED = 256  # answers whose tokens are counted at a time: their ids take memory


@dataclass(frozen=True)
class _Long:
    """A row with a long answer."""

    place: str
    prompt: tuple[Message, ...]
    question: str
    answer: str
    reference: str | None


def build_pairs(config: PairsConfig) -> list[Pair]:
    """Builds the pairs and writes them, with a data card, a histogram and a list of what is contaminated.

    Raises `UserError` for bad input and while another process writes to `out`, `RunError` where no pair is left.
    """
    folder = Path(config.out).expanduser()
    with writing(folder, "out"):
        return _build(config, folder)


def _build(config: PairsConfig, folder: Path) -> list[Pair]:
    chat = Chat.load(find_model(config.tokenizer, weights=False))
    held_out = {
        benchmark.name: [_bare(question.messages, benchmark) for question in questions(benchmark, seed=config.seed)]
        for benchmark in config.decontaminate.against
    }
    rows: Counter[str] = Counter()  # what became of the rows with long answers
    longs = _read_long(config, rows)
    longs = _decontaminated(config, longs, held_out, folder, rows)
    asked = [long.question for long in longs]
    answered: Counter[str] = Counter()  # ... of where the short answers come from
    shorts = short_answers(config.short, asked, folder, seed=config.seed, counts=answered)
    rows["no short answer to the question"] = sum(not found for found in shorts)
    counts: Counter[str] = Counter()  # ... and of the candidates: each long answer with each short one
    pairs, left_out = filter_pairs(_candidates(chat, longs, shorts, counts), config.filters, seed=config.seed)
    counts.update(left_out)
    steps: list[Callable[[list[Pair]], tuple[list[Pair], dict[str, int]]]] = [
        lambda found: apply_control(found, config.control),
        lambda found: select(found, config.select, seed=config.seed),
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
        raise RunError(f"no pair is left. {_summary(tables)}. Loosen `filters`, or mend the data.")
    write_whole(folder / PAIRS, _parquet(pairs))
    lengths = np.array([(pair.chosen_tokens, pair.rejected_tokens) for pair in pairs])
    write_whole(folder / PLOT, png(pair_lengths_figure(lengths[:, 0], lengths[:, 1])))
    write_whole(folder / CARD, _card(config, pairs, tables).encode())
    say(_summary(tables))
    say(f"{len(pairs)} pairs: {folder / PAIRS}; data card: {folder / CARD}")
    return pairs


def _bare(messages: Sequence[Message], benchmark: BenchmarkConfig) -> str:
    return messages[-1]["content"].removeprefix(TABLE[benchmark.name].prefix)


def _read_long(config: PairsConfig, counts: Counter[str]) -> list[_Long]:
    found: list[_Long] = []
    for read in read_answered(config.long, seed=config.seed):
        counts["read"] += 1
        try:
            if isinstance(read, BadRow):
                raise read
            place, said, row = read
            reference = None if config.long.reference is None else _reference(row, config.long.reference, place)
        except BadRow as error:
            if config.long.on_bad_row == "raise":
                raise
            counts[f"bad row: {error.reason}"] += 1
            if counts[f"bad row: {error.reason}"] == 1:
                warn(f"skipped, as are all such rows: {error}")
            continue
        question = said.question(config.long.prompt_suffix)
        found.append(_Long(place, tuple(said.messages), question, said.answers[0], reference))
    return found


def _reference(row: Row, column: str, place: str) -> str:
    value = field(row, column, place)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if number else text(value, f"{place}, {column}")


def _decontaminated(
    config: PairsConfig,
    longs: Sequence[_Long],
    held_out: Mapping[str, Sequence[str]],
    folder: Path,
    counts: Counter[str],
) -> list[_Long]:
    """The rows whose question is none of the evaluation's; what was found is listed in a file."""
    hits = contaminated([long.question for long in longs], held_out, ngram=config.decontaminate.ngram)
    first = {hit.index: hit.benchmark for hit in reversed(hits)}
    for benchmark in first.values():
        counts[f"a question of {benchmark}"] += 1
    listed = [{"place": longs[hit.index].place, "question": longs[hit.index].question, **asdict(hit)} for hit in hits]
    write_whole(folder / HITS, "".join(json.dumps(line) + "\n" for line in listed).encode())
    return [long for i, long in enumerate(longs) if i not in first]


def _candidates(
    chat: Chat, longs: Sequence[_Long], shorts: Sequence[Sequence[ShortAnswer]], counts: Counter[str]
) -> list[Candidate]:
    both = [(i, short) for i, found in enumerate(shorts) for short in found]
    counts["all"] = len(both)
    refused = [short.refused for _, short in both if short.refused is not None]
    counts["the question was refused"] = len(refused)
    if refused:
        warn(f"{len(refused)} of {len(both)} questions were refused, the first because: {refused[0]}")
    given = [(i, short) for i, short in both if short.refused is None]
    tokens = _lengths(chat, [text for i, short in given for text in (longs[i].answer, short.text)])
    return [
        Candidate(
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


def _lengths(chat: Chat, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, each text counted once."""
    found: dict[str, int] = {}
    distinct = list(dict.fromkeys(texts))
    with contextlib.closing(Progress("tokens counted", len(distinct), unit="answer")) as progress:
        for start in range(0, len(distinct), COUNTED):
            part = distinct[start : start + COUNTED]
            found.update(zip(part, chat.lengths(part), strict=True))
            progress.update(len(found))
    return [found[text] for text in texts]


def _parquet(pairs: Sequence[Pair]) -> bytes:
    """One row per pair. The columns prompt, chosen, rejected are what a ThinkPO stage reads without further keys."""
    import pyarrow
    from pyarrow import parquet

    rows = [asdict(pair) | {"gap": pair.gap} for pair in pairs]
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    kinds = {"prompt": pyarrow.list_(message), "agrees": pyarrow.bool_()}
    kinds |= dict.fromkeys(("chosen_tokens", "rejected_tokens", "gap"), pyarrow.int64())
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in rows[0]])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()
