"""What is in a batch, and in which row? Whole examples are packed into rows of a fixed length.

The order is a pure function of the seed and the epoch: a run that stopped goes on at any update without replaying what
came before, and neither the number of devices nor of micro-batches changes which examples an update sees.
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import grain
import jax
import numpy as np
import pydantic

from thinkpo_jax.config import Section, UserError
from thinkpo_jax.data import Example

ArrayT = TypeVar("ArrayT")
HEAD, REGIONS = 128, 3  # see `Batch.regions`


class BatchConfig(Section):
    """What one update reads.

    `size` is the number of examples (SFT answers, ThinkPO pairs) per update, on average: an epoch has round(n / size)
    updates (never more than there are rows), over which its rows are spread evenly. Or `rows` is the number of packed
    rows per update, at most: a multiple of the devices leaves none of them idle. `rows_per_device` bounds how many rows
    a device computes at a time (null: all of them); the rest follow as further micro-batches of the same update.
    """

    size: int | None = pydantic.Field(default=None, ge=1)
    rows: int | None = pydantic.Field(default=None, ge=1)
    row_length: int = pydantic.Field(ge=2, le=2**20)
    pack: bool = True
    rows_per_device: int | None = pydantic.Field(default=None, ge=1)

    @pydantic.model_validator(mode="after")
    def _one_size(self) -> "BatchConfig":
        if (self.size is None) == (self.rows is None):
            raise ValueError("give either `size` (examples per update) or `rows` (packed rows per update)")
        return self


class Batch(NamedTuple, Generic[ArrayT]):
    """Rows of one update. Leading axes [micro-batch M, row R]; T is the row length, P examples per row.

    Segment ids count from 1 along a row, 0 is padding; a pair's chosen and rejected are neighbours. `targets` are the
    tokens moved one to the left. `regions` say which target is trained, and where it lies in its answer: 0: it belongs
    to no answer; 1: to its first `HEAD` tokens; 2: to the others up to the length of the example's shortest answer;
    3: to what only a longer answer has.
    """

    tokens: ArrayT  # [M, R, T] int32
    targets: ArrayT  # [M, R, T] int32
    regions: ArrayT  # [M, R, T] int32
    positions: ArrayT  # [M, R, T] int32, within the segment
    segments: ArrayT  # [M, R, T] int32
    examples: ArrayT  # [M, R, P] int32: which example; -1: none
    reference: ArrayT  # [M, R, P, S, 3] float32: the reference's log-prob of each region of each answer of the example


def _shortest(example: Example) -> int:
    """Tokens of the shortest answer of an example."""
    return min(len(segment.tokens) - segment.answer_start for segment in example)


def pack(lengths: np.ndarray, row_length: int, order: np.ndarray) -> list[list[int]]:
    """Rows of example indices: best fit, longest first; among equal lengths the given order decides.

    Every index of `order` stands in exactly one row, and no row is longer than `row_length`.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(order.tolist(), key=lambda i: -lengths[i]):
        length = int(lengths[index])
        place = bisect.bisect_left(room, (length, -1))
        free, row = room.pop(place) if place < len(room) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (free - length, row))
    return rows


HostBatch = Batch[np.ndarray]
DeviceBatch = Batch[jax.Array]


class Batches:
    """The updates of a stage, by index. `reference` [n, S], where given, is read into the batches."""

    def __init__(
        self,
        examples: Sequence[Example],
        config: BatchConfig,
        *,
        seed: int,
        shards: int,
        steps: int | None,
        epochs: float,
    ) -> None:
        """`steps` updates, or those of `epochs` epochs where `steps` is None. Rows are padded to `shards` parts."""
        self.examples = examples
        self.config = config
        self.lengths = np.array([sum(len(segment.tokens) for segment in example) for example in examples])
        if self.lengths.max() > config.row_length:
            raise UserError(f"an example has {self.lengths.max()} tokens, more than row_length {config.row_length}.")
        # The number of rows is the same in every epoch: it depends on the sorted lengths alone.
        rows = len(pack(self.lengths, config.row_length, np.arange(len(examples)))) if config.pack else len(examples)
        self.steps_per_epoch = self._updates(rows)
        self.steps = steps if steps is not None else max(1, round(self.steps_per_epoch * epochs))
        count = max(1, math.ceil(self.steps / self.steps_per_epoch))
        self.epochs = [self._epoch(np.random.default_rng((seed, epoch))) for epoch in range(count)]
        self.answers = len(examples[0])
        self.examples_per_row = max(len(row) for epoch in self.epochs for update in epoch for row in update)
        rows = max(len(update) for epoch in self.epochs for update in epoch)
        at_once = min(rows, (config.rows_per_device or rows) * shards)
        self.rows = math.ceil(at_once / shards) * shards
        self.micro_batches = math.ceil(rows / self.rows)
        self.reference = np.zeros((len(examples), self.answers, REGIONS), np.float32)

    def _updates(self, rows: int) -> int:
        """How many updates an epoch of so many rows has."""
        if self.config.size is None:
            assert self.config.rows is not None
            return math.ceil(rows / self.config.rows)
        return min(max(1, round(len(self.examples) / self.config.size)), rows)

    def _epoch(self, rng: np.random.Generator) -> list[list[list[int]]]:
        """The rows of each update of one epoch; the rows are spread evenly over the updates."""
        order = rng.permutation(len(self.examples))
        rows = pack(self.lengths, self.config.row_length, order) if self.config.pack else [[i] for i in order.tolist()]
        if self.config.pack:
            rows = [rows[i] for i in rng.permutation(len(rows))]
        bounds = np.linspace(0, len(rows), self.steps_per_epoch + 1).round().astype(int)
        return [rows[start:end] for start, end in itertools.pairwise(bounds)]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> HostBatch:
        if not 0 <= index < self.steps:
            raise IndexError(index)
        epoch, update = divmod(index, self.steps_per_epoch)
        return self._fill(self.epochs[epoch][update])

    def stream(self, start: int) -> Iterator[HostBatch]:
        """The updates from `start` on; the next ones are filled in the background while a device computes."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(grain.MapDataset.source(self)[start:].to_iter_dataset(options))

    def first_epoch(self) -> "Batches":
        """The same batches, but exactly one epoch of them: every example once."""
        once = object.__new__(Batches)
        once.__dict__.update(self.__dict__ | {"steps": len(self.epochs[0])})
        return once

    def efficiency(self) -> float:
        """Share of the first epoch's token slots that hold a token."""
        updates = len(self.epochs[0])
        return float(self.lengths.sum() / (updates * self.micro_batches * self.rows * self.config.row_length))

    def describe(self) -> str:
        """How the examples are laid out, in words."""
        per_update = len(self.examples) / self.steps_per_epoch
        return (
            f"{len(self)} updates of {per_update:.4g} examples on average; {self.micro_batches} micro-batch(es) of "
            f"{self.rows} rows x {self.config.row_length} tokens, {self.efficiency():.1%} of them useful"
        )

    def _fill(self, update: list[list[int]]) -> HostBatch:
        rows, length = self.micro_batches * self.rows, self.config.row_length
        batch = Batch(
            tokens=np.zeros((rows, length), np.int32),
            targets=np.zeros((rows, length), np.int32),
            regions=np.zeros((rows, length), np.int32),
            positions=np.zeros((rows, length), np.int32),
            segments=np.zeros((rows, length), np.int32),
            examples=np.full((rows, self.examples_per_row), -1, np.int32),
            reference=np.zeros((rows, self.examples_per_row, self.answers, REGIONS), np.float32),
        )
        for row, indices in enumerate(update):
            batch.examples[row, : len(indices)] = indices
            batch.reference[row, : len(indices)] = self.reference[indices]
            examples = [self.examples[index] for index in indices]
            placed = [(segment, _shortest(example)) for example in examples for segment in example]
            start = 0
            for number, (segment, shortest) in enumerate(placed, 1):
                end = start + len(segment.tokens)
                batch.tokens[row, start:end] = segment.tokens
                batch.targets[row, start : end - 1] = segment.tokens[1:]
                answer = batch.regions[row, start + segment.answer_start - 1 : end - 1]
                answer[:] = 3
                answer[:shortest] = 2
                answer[: min(HEAD, shortest)] = 1
                batch.positions[row, start:end] = np.arange(end - start)
                batch.segments[row, start:end] = number
                start = end
        return Batch(*(array.reshape(self.micro_batches, self.rows, *array.shape[1:]) for array in batch))
