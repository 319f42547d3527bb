"""Holds tokenized examples, reports what happened to the records of their sources, and splits off validation data."""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pydantic

from thinkpo_jax.runtime.config import ConfigSection, UserError

MAX_LISTED_NAMES = 20  # of fields or columns in a note


@dataclass(frozen=True)
class Segment:
    """A prompt followed by its answer. The loss covers the answer and the `earlier_answers` inside the prompt.

    Each earlier answer is given by the indices of its first token and after its last token.
    """

    token_ids: np.ndarray
    answer_start: int
    earlier_answers: tuple[tuple[int, int], ...] = ()

    @property
    def answer_ids(self) -> np.ndarray:
        """The token ids of the answer."""
        return self.token_ids[self.answer_start :]

    @property
    def loss_spans(self) -> tuple[tuple[int, int], ...]:
        """Where the parts that enter the loss begin and end, in ascending order."""
        return (*self.earlier_answers, (self.answer_start, len(self.token_ids)))

    @property
    def loss_indices(self) -> np.ndarray:
        """The indices of the tokens that enter the loss, in ascending order."""
        return np.concatenate([np.arange(start, end) for start, end in self.loss_spans])


Example = tuple[Segment, ...]  # one segment for SFT, (chosen, rejected) for a preference pair


@dataclass
class SourceReport:
    """Counts what happened to the records of a source. `rows` equals `num_used` plus the sum of `dropped`."""

    name: str
    rows: int = 0
    num_used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # Number of records by reason.
    first_error_by_reason: dict[str, str] = field(default_factory=dict)  # First message, except for long records.
    stopping_error_by_reason: dict[str, str] = field(default_factory=dict)  # First message, if the config says `raise`.
    too_long_tokens: list[int] = field(default_factory=list)  # Tokens that each record dropped for length needs.
    num_truncated: int = 0  # Answers that were cut to fit a row.
    num_unclosed_thoughts: int = 0  # Used records whose first answer, as trained, opens a thought and never closes it.
    num_unopened_thoughts: int = 0  # Used records whose first answer closes a thought that nothing opens.
    form: str = ""  # The form of the records and the columns that are read.
    thinking_tag: str = ""  # The tag before a thought that came in a field of its own.
    num_joined_thoughts: int | None = None  # Used records with such a thought. None if none is expected.
    num_untrained_records: int = 0  # Used records with earlier answers, which are not trained.
    ignored_fields: dict[str, int] = field(default_factory=dict)  # Used records by field of a message that is not read.
    unread_columns: dict[str, int] = field(default_factory=dict)  # Used records by column that is not read.

    def notes(self) -> list[str]:
        """Returns a line about each thing that a user may not expect of the records."""
        thoughts = [name for name in self.unread_columns if re.search("think|thought|reason", name.lower())]
        hint = f". To join a thought to its answer, set `thinking_column: {thoughts[0]}`" if thoughts else ""
        joined, untrained, unopened = self.num_joined_thoughts, self.num_untrained_records, self.num_unopened_thoughts
        notes = (
            (self.form, f"form of the rows: {self.form}"),
            (
                joined is not None,
                f"thoughts in a field of their own are joined, with {self.thinking_tag}, in {joined} rows",
            ),
            (untrained, f"earlier answers of {untrained} rows are not trained (train_on: last)"),
            (unopened, f"{unopened} answers close a thought that nothing opens"),
            (self.ignored_fields, f"fields of messages that are not read: {_list_counts(self.ignored_fields)}"),
            (self.unread_columns, f"columns that are not read: {_list_counts(self.unread_columns)}{hint}"),
        )
        return [f"{self.name}: {note}" for applies, note in notes if applies]

    def __str__(self) -> str:
        left_out = "".join(f"; {count} left out: {reason}" for reason, count in self.dropped.items())
        cut = f"; {self.num_truncated} answers cut" if self.num_truncated else ""
        return f"{self.num_used} of {self.rows} rows of {self.name}{left_out}{cut}"


def _list_counts(rows_by_name: Mapping[str, int]) -> str:
    """Lists the most frequent names with their numbers of rows."""
    first = sorted(rows_by_name.items(), key=lambda item: (-item[1], item[0]))[:MAX_LISTED_NAMES]
    names = [f"{name} ({count} rows)" for name, count in first]
    num_others = len(rows_by_name) - len(names)
    return ", ".join([*names, *([f"and {num_others} more"] if num_others else [])])


@dataclass(frozen=True)
class TokenizedSource:
    """The examples of one source. All segments share one array of token ids.

    `earlier_answers` has a row for each trained answer inside a prompt, in the order of the examples.
    """

    tokens: np.ndarray  # int32 [total], may be memory-mapped.
    segments: np.ndarray  # int64 [examples, segments, 3]: start, start of the answer and end in `tokens`.
    report: SourceReport
    earlier_answers: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))  # example, start and end.

    def __getitem__(self, index: int) -> Example:
        bounds = self.segments[index].tolist()
        first, last = np.searchsorted(self.earlier_answers[:, 0], (index, index + 1))
        earlier = tuple((start, end) for _, start, end in self.earlier_answers[first:last].tolist())
        return tuple(Segment(self.tokens[start:end], answer - start, earlier) for start, answer, end in bounds)

    @functools.cached_property
    def digest(self) -> str:
        """A digest of all token ids, of the bounds of segments and of earlier answers."""
        digest = hashlib.sha256(self.segments.tobytes() + self.earlier_answers.tobytes())
        digest.update(self.tokens.data)
        return digest.hexdigest()[:16]


class TokenizedDataset(Sequence[Example]):
    """The examples that a stage reads in one epoch, source by source and in the order of their records.

    The weight of a source says how often an epoch reads each of its examples. 1.5: every example once, plus a random
    half. The half depends on `seed` and on the examples of the source. Raises `UserError` if a weight selects none.
    """

    def __init__(self, sources: Sequence[TokenizedSource], weights: Sequence[float], *, seed: int) -> None:
        self.sources, self.weights = tuple(sources), tuple(weights)
        self.reports = tuple(source.report for source in sources)
        selections: list[np.ndarray] = []
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            count, (repeats, fraction) = len(source.segments), divmod(weight, 1)
            rng = np.random.default_rng((seed, int(source.digest, 16)))
            subset = np.sort(rng.choice(count, round(fraction * count), replace=False))
            indices = np.concatenate([np.tile(np.arange(count), int(repeats)), subset])
            if count and not len(indices):
                problem = f"weight {weight:g} selects none of its {count} examples"
                raise UserError(f"{source.report.name}: {problem}. Increase the weight or remove the source.")
            selections.append(np.stack([np.full(len(indices), number), indices], axis=-1))
        self.source_and_index = np.concatenate(selections)  # int64 [examples, 2]: source, example of that source

    def __len__(self) -> int:
        return len(self.source_and_index)

    def __getitem__(self, index: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride] -- no slices
        source, example = self.source_and_index[index].tolist()
        return self.sources[source][example]

    def describe_sources(self) -> list[str]:
        """Returns lines about each source: what happened to its records, its weight, and `SourceReport.notes`."""
        return [
            line
            for report, weight in zip(self.reports, self.weights, strict=True)
            for line in (
                str(report) + (f"; each read {weight:g} times an epoch" if weight != 1 else ""),
                *report.notes(),
            )
        ]

    def describe_examples(self, indices: Sequence[int]) -> str:
        """Returns where examples come from, such as "a.jsonl: 3, 7". Numbers count the used records from 1."""
        numbers_by_source: dict[str, list[int]] = {}
        for source, example in self.source_and_index[sorted(indices)].tolist():
            numbers_by_source.setdefault(self.sources[source].report.name, []).append(example + 1)
        return "; ".join(f"{name}: {', '.join(map(str, numbers))}" for name, numbers in numbers_by_source.items())

    def digest(self) -> str:
        """Returns a digest of all token ids and segment bounds. A resumed stage compares it to detect changed data."""
        digests = " ".join(source.digest for source in self.sources)
        return hashlib.sha256(digests.encode() + self.source_and_index.tobytes()).hexdigest()[:16]

    def prompt_and_answer_lengths(self) -> np.ndarray:
        """Returns the number of prompt tokens and of answer tokens by segment, int64 [examples, segments, 2]."""
        lengths = [np.diff(source.segments, axis=-1) for source in self.sources]
        offsets = np.cumsum([0, *map(len, lengths)])[:-1]
        return np.concatenate(lengths)[offsets[self.source_and_index[:, 0]] + self.source_and_index[:, 1]]


class ValidationConfig(ConfigSection):
    """Examples that are held out to compute loss and metrics on unseen data.

    `share` is the fraction of examples that is held out. Examples with the same prompt are held out together.
    They are evaluated before the first update, after every `every` updates, and after the last update.
    """

    share: float = pydantic.Field(gt=0, le=0.5)
    every: int = pydantic.Field(default=50, ge=1)


def split_held_out(examples: Sequence[Example], fraction: float, *, seed: int) -> np.ndarray:
    """Returns sorted indices of the validation examples, about `fraction` of all.

    Examples with the same prompt are held out together, so no prompt is in both training and validation. Prompts are
    drawn at random. A prompt that would overshoot the target by more than half its examples is skipped. If every prompt
    is skipped, the prompt with the fewest examples is held out. Raises `UserError` if there is only one prompt.
    """
    indices_by_prompt: dict[bytes, list[int]] = {}
    for index, (segment, *_) in enumerate(examples):
        indices_by_prompt.setdefault(segment.token_ids[: segment.answer_start].tobytes(), []).append(index)
    groups = list(indices_by_prompt.values())
    if len(groups) < 2:
        raise UserError("validation: all examples have the same prompt. Remove `validation`, or add other prompts.")
    held_out: list[int] = []
    for number in np.random.default_rng((seed, len(examples))).permutation(len(groups)).tolist():
        if len(held_out) + len(groups[number]) / 2 <= fraction * len(examples):
            held_out += groups[number]
    return np.sort(np.array(held_out or min(groups, key=len)))
