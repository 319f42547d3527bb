"""Token ids of examples and what became of each record."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from thinkpo_jax.runtime.config import UserError


@dataclass(frozen=True)
class Segment:
    """Token ids of a prompt and its answer; the answer, which alone is trained, starts at `answer_start`."""

    token_ids: np.ndarray
    answer_start: int


Example = tuple[Segment, ...]


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of a source: `rows` = `kept` + the sum of `dropped`, which counts by reason.

    `bad` holds, for each reason of `dropped` that is a fault of the row, the message of the first one, and `fatal`
    those for which the config says that the run stops. `cut` answers were cut to fit. `open_thinking` counts kept rows
    whose (chosen) answer, as it is trained, begins to think and does not end that.
    """

    name: str
    rows: int
    num_used: int
    dropped: dict[str, int]
    first_error_by_reason: dict[str, str]
    stopping_error_by_reason: dict[str, str]
    num_truncated: int
    num_unclosed_thoughts: int

    def __str__(self) -> str:
        left_out = "".join(f"; {count} left out: {reason}" for reason, count in self.dropped.items())
        cut = f"; {self.num_truncated} answers cut" if self.num_truncated else ""
        return f"{self.num_used} of {self.rows} rows of {self.name}{left_out}{cut}"


@dataclass(frozen=True)
class TokenizedSource:
    """The examples of one source: all ids in a row, and where the segments lie in them."""

    tokens: np.ndarray  # int32 [total], perhaps on the disk
    segments: np.ndarray  # int64 [examples, segments, 3]: start, start of the answer, end
    report: SourceReport

    def __getitem__(self, index: int) -> Example:
        return tuple(
            Segment(self.tokens[start:end], answer - start) for start, answer, end in self.segments[index].tolist()
        )

    @functools.cached_property
    def digest(self) -> str:
        """A digest of all ids and of where answers begin."""
        found = hashlib.sha256(self.segments.tobytes())
        found.update(self.tokens.data)
        return found.hexdigest()[:16]


class TokenizedDataset(Sequence[Example]):
    """The examples of a stage: those of each source in their order, each as often as the source's weight says."""

    def __init__(self, parts: Sequence[TokenizedSource], weights: Sequence[float], *, seed: int) -> None:
        self.parts, self.weights = tuple(parts), tuple(weights)
        places: list[np.ndarray] = []
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            rows = _weighted(len(part.segments), weight, seed=(seed, int(part.digest, 16)))
            if len(part.segments) and not len(rows):
                few = f"a weight of {weight:g} reads none of its {len(part.segments)} rows"
                raise UserError(f"{part.report.name}: {few}. Raise it, or leave the source out.")
            places.append(np.stack([np.full(len(rows), number), rows], axis=-1))
        self.source_and_index = np.concatenate(places)  # int64 [examples, 2]: part, example of it

    def __len__(self) -> int:
        return len(self.source_and_index)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, row = self.source_and_index[index].tolist()
        return self.parts[part][row]

    @property
    def reports(self) -> tuple[SourceReport, ...]:
        """What became of the rows of each source."""
        return tuple(part.report for part in self.parts)

    def describe_sources(self) -> list[str]:
        """For each source, what became of its rows and how often an epoch reads them."""
        return [
            str(part.report) + (f"; each read {weight:g} times an epoch" if weight != 1 else "")
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]

    def describe_examples(self, indices: Sequence[int]) -> str:
        """Examples as a person can find them: which of the kept rows of which source."""
        found: dict[str, list[int]] = {}
        for part, row in self.source_and_index[sorted(indices)].tolist():
            found.setdefault(self.parts[part].report.name, []).append(row + 1)
        return "; ".join(f"{name}: {', '.join(map(str, rows))}" for name, rows in found.items())

    def digest(self) -> str:
        """A digest of all ids and answer spans: whether a resumed stage still reads the same data."""
        parts = " ".join(part.digest for part in self.parts)
        return hashlib.sha256(parts.encode() + self.source_and_index.tobytes()).hexdigest()[:16]

    def prompt_and_answer_lengths(self) -> np.ndarray:
        """Tokens of the prompt and of the answer of each segment: int64 [examples, segments, 2]."""
        found = [np.diff(part.segments, axis=-1) for part in self.parts]
        starts = np.cumsum([0, *map(len, found)])[:-1]
        return np.concatenate(found)[starts[self.source_and_index[:, 0]] + self.source_and_index[:, 1]]


def _weighted(count: int, weight: float, *, seed: tuple[int, int]) -> np.ndarray:
    """Indices below `count`: all of them as often as the weight's whole part says, and a draw for the rest of it."""
    whole, rest = divmod(weight, 1)
    drawn = np.random.default_rng(seed).choice(count, round(rest * count), replace=False)
    return np.concatenate([np.tile(np.arange(count), int(whole)), np.sort(drawn)]).astype(np.int64)
