"""What is in a batch, and in which row? Whole examples are packed into rows of a fixed length.

The order is a pure function of the seed and the epoch: a run that stopped goes on at any update without replaying what
came before, and neither the number of devices nor of micro-batches changes which examples an update sees.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import grain
import jax
import numpy as np
import pydantic

from thinkpo_jax.data.examples import Example
from thinkpo_jax.data.packing import pack_best_fit
from thinkpo_jax.runtime.config import ConfigSection, UserError
from thinkpo_jax.runtime.context_parallel import MAX_CONTEXT_PARALLELISM

ArrayT = TypeVar("ArrayT")
FIRST_REGION_TOKENS, NUM_REGIONS = 128, 3  # see `Batch.regions`
NO_LIMIT = 2**31 - 1


class BatchConfig(ConfigSection):
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

    Segment ids count from 1 along a row, 0 is padding; a pair's chosen and rejected are neighbours. The tokens that are
    trained, and only they, have one of A slots, in their order: `trained` is the place in the row that predicts it (in
    an unused slot T + the slot, so that places ascend), `targets` is the token. `regions` say where it lies in its
    answer: 0: nowhere, the slot is unused; 1: in its first `HEAD` tokens; 2: in the others up to the length of the
    example's shortest answer; 3: in what only a longer answer has.
    """

    token_ids: ArrayT  # [M, R, T] int32
    positions: ArrayT  # [M, R, T] int32, within the segment
    segment_ids: ArrayT  # [M, R, T] int32
    loss_positions: ArrayT  # [M, R, A] int32
    target_ids: ArrayT  # [M, R, A] int32
    target_regions: ArrayT  # [M, R, A] int32
    example_ids: ArrayT  # [M, R, P] int32: which example; -1: none
    reference_log_probs: (
        ArrayT  # [M, R, P, S, 3] float32: the reference's log-prob of each region of each answer of the example
    )


def micro_batch_shape(rows: int, config: BatchConfig, num_shards: int) -> tuple[int, int]:
    """The number of micro-batches that an update of so many rows takes, and the rows of each, over all shards."""
    at_once = min(rows, (config.rows_per_device or rows) * num_shards)
    at_once = math.ceil(at_once / num_shards) * num_shards
    return math.ceil(rows / at_once), at_once


class BatchWork(NamedTuple):
    """What a batch asks for: tokens, pairs of a query and a key that it sees, tokens that reach the head."""

    tokens: int
    attention_pairs: int
    loss_tokens: int


HostBatch = Batch[np.ndarray]
DeviceBatch = Batch[jax.Array]


class BatchPlan:
    """The updates of a stage, by index. `reference` [n, S, 3], where given, is read into the batches."""

    def __init__(
        self,
        examples: Sequence[Example],
        config: BatchConfig,
        *,
        seed: int,
        num_shards: int,
        num_updates: int | None,
        epochs: float,
        held_out: Sequence[int] | np.ndarray = (),
        local_shards: Sequence[int] | None = None,
    ) -> None:
        """`steps` updates, or those of `epochs` epochs where `steps` is None. Rows are padded to `shards` parts.

        The examples whose indices are `held_out` are in no update. Of several processes each reads the examples of its
        `own` parts alone (default: all); in its batches the tokens of other rows are missing.
        """
        self.examples = examples
        self.config = config
        self.answers_per_example = len(examples[0])
        found = np.array([_example_sizes(example) for example in examples])  # each is read once
        self.sizes, self.attention_pairs = found[:, :3], found[:, 3]  # [n, 3]: tokens, examples, trained tokens
        if self.sizes[:, 0].max() > config.row_length:
            raise UserError(
                f"an example has {self.sizes[:, 0].max()} tokens, more than row_length {config.row_length}."
            )
        self.held_out = np.asarray(held_out, np.int64)
        self.train_indices = np.setdiff1d(np.arange(len(examples)), self.held_out)
        # The number of rows is the same in every epoch: it depends on the sorted lengths alone.
        self.updates_per_epoch = self._updates(len(self._rows(self.train_indices)))
        self.num_updates = num_updates if num_updates is not None else max(1, round(self.updates_per_epoch * epochs))
        count = max(1, math.ceil(self.num_updates / self.updates_per_epoch))
        self.epochs = [self._epoch(np.random.default_rng((seed, epoch))) for epoch in range(count)]
        planned = [self.sizes[row].sum(axis=0) for epoch in self.epochs for update in epoch for row in update]
        _, self.examples_per_row, trained = np.maximum(np.max(planned, axis=0), self.sizes.max(axis=0)).tolist()
        self.loss_tokens_per_row = min(
            -(-trained // MAX_CONTEXT_PARALLELISM) * MAX_CONTEXT_PARALLELISM, config.row_length
        )
        rows = max(len(update) for epoch in self.epochs for update in epoch)
        self.num_micro_batches, self.rows = micro_batch_shape(rows, config, num_shards)
        part = np.arange(self.num_micro_batches * self.rows) % self.rows // (self.rows // num_shards)
        self._is_local_row = np.isin(
            part, range(num_shards) if local_shards is None else local_shards
        )  # of the rows of all micro-batches
        self.reference_log_probs = np.zeros((len(examples), self.answers_per_example, NUM_REGIONS), np.float32)

    def _updates(self, rows: int) -> int:
        """How many updates an epoch of so many rows has."""
        if self.config.size is None:
            assert self.config.rows is not None
            return math.ceil(rows / self.config.rows)
        return min(max(1, round(len(self.train_indices) / self.config.size)), rows)

    def _rows(self, order: np.ndarray, limits: tuple[int, int] = (NO_LIMIT, NO_LIMIT)) -> list[list[int]]:
        """Rows for the examples of `order`; `limits`: the most examples and the most trained tokens of a row."""
        if not self.config.pack:
            return [[index] for index in order.tolist()]
        return pack_best_fit(self.sizes, (self.config.row_length, *limits), order)

    def _epoch(self, rng: np.random.Generator) -> list[list[list[int]]]:
        """The rows of each update of one epoch; the rows are spread evenly over the updates."""
        rows = self._rows(rng.permutation(self.train_indices))
        if self.config.pack:
            rows = [rows[i] for i in rng.permutation(len(rows))]
        bounds = np.linspace(0, len(rows), self.updates_per_epoch + 1).round().astype(int)
        return [rows[start:end] for start, end in itertools.pairwise(bounds)]

    def __len__(self) -> int:
        return self.num_updates

    def __getitem__(self, index: int) -> HostBatch:
        if not 0 <= index < self.num_updates:
            raise IndexError(index)
        epoch, update = divmod(index, self.updates_per_epoch)
        return self._fill(self.epochs[epoch][update])

    def prefetch_from(self, start: int) -> Iterator[HostBatch]:
        """The updates from `start` on; the next ones are filled in the background while a device computes."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(grain.MapDataset.source(self)[start:].to_iter_dataset(options))

    def batches_of(self, indices: Sequence[int] | np.ndarray) -> "LazyBatches":
        """Batches of these examples, each once, in the shape of the updates, so that one program serves both."""
        rows = self._rows(np.asarray(indices, np.int64), (self.examples_per_row, self.loss_tokens_per_row))
        at_once = self.num_micro_batches * self.rows
        return LazyBatches(self._fill, [rows[start : start + at_once] for start in range(0, len(rows), at_once)])

    def count_work(self, batch: HostBatch) -> BatchWork:
        """The work of a batch. A query at position p of its segment sees p + 1 keys."""
        read = batch.example_ids[batch.example_ids >= 0]
        tokens, _, trained = self.sizes[read].sum(axis=0).tolist()
        return BatchWork(tokens, int(self.attention_pairs[read].sum()), trained)

    def tokens_per_update(self) -> int:
        """Places for tokens in an update, padding included."""
        return self.num_micro_batches * self.rows * self.config.row_length

    def packing_efficiency(self) -> float:
        """Share of the first epoch's token slots that hold a token."""
        return float(self.sizes[self.train_indices, 0].sum() / (len(self.epochs[0]) * self.tokens_per_update()))

    def describe(self) -> str:
        """How the examples are laid out, in words."""
        per_update = len(self.train_indices) / self.updates_per_epoch
        apart = f"; {len(self.held_out)} examples held out" if len(self.held_out) else ""
        return (
            f"{len(self)} updates of {per_update:.4g} examples on average; {self.num_micro_batches} micro-batch(es) of "
            f"{self.rows} rows x {self.config.row_length} tokens, {self.packing_efficiency():.1%} of them useful{apart}"
        )

    def _fill(self, update: Sequence[Sequence[int]]) -> HostBatch:
        rows, length, slots = self.num_micro_batches * self.rows, self.config.row_length, self.loss_tokens_per_row
        batch = Batch(
            token_ids=np.zeros((rows, length), np.int32),
            positions=np.zeros((rows, length), np.int32),
            segment_ids=np.zeros((rows, length), np.int32),
            loss_positions=np.tile(np.arange(length, length + slots, dtype=np.int32), (rows, 1)),
            target_ids=np.zeros((rows, slots), np.int32),
            target_regions=np.zeros((rows, slots), np.int32),
            example_ids=np.full((rows, self.examples_per_row), -1, np.int32),
            reference_log_probs=np.zeros(
                (rows, self.examples_per_row, self.answers_per_example, NUM_REGIONS), np.float32
            ),
        )
        for row, indices in enumerate(update):
            batch.example_ids[row, : len(indices)] = indices
            batch.reference_log_probs[row, : len(indices)] = self.reference_log_probs[indices]
            if not self._is_local_row[row]:
                continue
            examples = [self.examples[index] for index in indices]
            placed = [(segment, _shortest_answer(example)) for example in examples for segment in example]
            start = slot = 0
            for number, (segment, shortest) in enumerate(placed, 1):
                end, answer = start + len(segment.token_ids), segment.token_ids[segment.answer_start :]
                batch.token_ids[row, start:end] = segment.token_ids
                batch.positions[row, start:end] = np.arange(end - start)
                batch.segment_ids[row, start:end] = number
                batch.loss_positions[row, slot : slot + len(answer)] = np.arange(end - len(answer) - 1, end - 1)
                batch.target_ids[row, slot : slot + len(answer)] = answer
                regions = batch.target_regions[row, slot : slot + len(answer)]
                regions[:] = 3
                regions[:shortest] = 2
                regions[: min(FIRST_REGION_TOKENS, shortest)] = 1
                start, slot = end, slot + len(answer)
        return Batch(*(array.reshape(self.num_micro_batches, self.rows, *array.shape[1:]) for array in batch))


class LazyBatches:
    """Some batches, each filled when its turn comes; can be gone through again."""

    def __init__(self, fill: Callable[[Sequence[Sequence[int]]], HostBatch], updates: list[list[list[int]]]) -> None:
        self._fill, self._updates = fill, updates

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[HostBatch]:
        return map(self._fill, self._updates)


def _example_sizes(example: Example) -> tuple[int, int, int, int]:
    """What an example takes of a row: tokens, one example, trained tokens; then the pairs of a query and a key."""
    answers = [len(segment.token_ids) - segment.answer_start for segment in example]
    lengths = [len(segment.token_ids) for segment in example]
    return sum(lengths), 1, sum(answers), sum(length * (length + 1) // 2 for length in lengths)


def _shortest_answer(example: Example) -> int:
    """Tokens of the shortest answer of an example."""
    return min(len(segment.token_ids) - segment.answer_start for segment in example)
