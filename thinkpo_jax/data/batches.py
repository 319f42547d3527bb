"""Packs examples into rows and builds the batches of a stage from them.

The order of the examples depends only on the seed and the epoch. So a resumed run can start at any update without
replaying earlier ones. The number of devices or micro-batches does not change which examples an update reads.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import grain
import jax
import numpy as np
import pydantic

from thinkpo_jax.data.examples import Example
from thinkpo_jax.runtime.config import ConfigSection, UserError, exactly_one_of
from thinkpo_jax.runtime.context_parallel import MAX_CONTEXT_PARALLELISM

ArrayT = TypeVar("ArrayT")
Rows = Sequence[Sequence[int]]  # the example indices of each row
MAX_ROW_LENGTH = 2**20  # in tokens
FIRST_REGION_TOKENS, NUM_REGIONS = 128, 3  # see `Batch.target_regions`


class BatchConfig(ConfigSection):
    """How many examples or packed rows an update reads. Give either `size` or `rows`.

    - `size`: examples (SFT answers or ThinkPO pairs) per update, on average. An epoch of n examples has round(n / size)
      updates, but at most one per row. Its rows are spread evenly over them.
    - `rows`: the maximum rows per update. A multiple of the number of devices keeps all devices busy.
    - `rows_per_device`: the maximum rows that a device computes at a time (null: all). The others become further
      micro-batches of the same update.
    """

    size: int | None = pydantic.Field(default=None, ge=1)
    rows: int | None = pydantic.Field(default=None, ge=1)
    row_length: int = pydantic.Field(ge=2, le=MAX_ROW_LENGTH)
    pack: bool = True
    rows_per_device: int | None = pydantic.Field(default=None, ge=1)

    _one_size = exactly_one_of("size", "rows")


class Batch(NamedTuple, Generic[ArrayT]):
    """The rows of one update, as M micro-batches of R rows.

    A row has T tokens, A target slots and P examples with S answers each. The segments of an example are neighbors.
    Each answer token is a target and has one slot, in the order of the row. Loss positions ascend, because unused slot
    i has position T + i. The regions of a target are:

    - 0: the slot is unused.
    - 1: the target is among the first `FIRST_REGION_TOKENS` tokens of its answer.
    - 2: the target is a later token.
    - 3: the target is beyond the length of the example's shortest answer. This takes precedence over 1 and 2.
    """

    token_ids: ArrayT  # int32 [M, R, T].
    positions: ArrayT  # int32 [M, R, T]. They restart at 0 in each segment.
    segment_ids: ArrayT  # int32 [M, R, T]. They count from 1 in each row. Padding has 0.
    loss_positions: ArrayT  # int32 [M, R, A]. Index of the hidden state that predicts the target.
    target_ids: ArrayT  # int32 [M, R, A].
    target_regions: ArrayT  # int32 [M, R, A].
    example_ids: ArrayT  # int32 [M, R, P]. Unused entries have -1.
    reference_log_probs: ArrayT  # float32 [M, R, P, S, NUM_REGIONS]. Summed over the tokens of a region.


HostBatch = Batch[np.ndarray]
DeviceBatch = Batch[jax.Array]


class BatchWork(NamedTuple):
    """The amounts that the FLOPs of a batch depend on."""

    tokens: int
    attention_pairs: int  # Pairs of a query and a key that it attends to.
    loss_tokens: int  # Answer tokens. No other token reaches the LM head.


def micro_batch_shape(rows: int, config: BatchConfig, num_shards: int) -> tuple[int, int]:
    """Returns how many micro-batches an update of `rows` rows has, and how many rows each has over all shards."""
    rows_at_once = min(rows, (config.rows_per_device or rows) * num_shards)
    rows_at_once = math.ceil(rows_at_once / num_shards) * num_shards
    return math.ceil(rows / rows_at_once), rows_at_once


class BatchPlan:
    """Plans the updates of a stage and builds the batch of any of them."""

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
        """Plans `num_updates` updates, or those of `epochs` epochs if it is None.

        No update reads the examples with indices `held_out`. The rows of a micro-batch are padded to a multiple of
        `num_shards`. A process reads only the examples of its `local_shards` (None: all). The tokens of other rows are
        missing in its batches. Batches contain `reference_log_probs` [examples, S, NUM_REGIONS], which are zero until
        the caller assigns them. Raises `UserError` if an example is longer than a row.
        """
        self.examples, self.config = examples, config
        self.answers_per_example = len(examples[0])
        lengths = np.array([[(len(s.token_ids), len(s.loss_indices)) for s in example] for example in examples])
        self.sizes = np.insert(lengths.sum(axis=1), 1, 1, axis=1)  # taken of a row: tokens, examples, answer tokens
        self.attention_pairs = (lengths[..., 0] * (lengths[..., 0] + 1) // 2).sum(axis=1)
        if (longest := self.sizes[:, 0].max()) > config.row_length:
            raise UserError(
                f"batch.row_length is {config.row_length}, but the longest example has {longest} tokens. "
                f"Set row_length to at least {longest}, or use `over_length: drop` to leave such examples out."
            )
        self.held_out = np.asarray(held_out, np.int64)
        self.train_indices = np.setdiff1d(np.arange(len(examples)), self.held_out)
        # Every epoch has the same number of rows, because it depends only on the sorted lengths.
        num_rows = len(self._pack(self.train_indices))
        if config.size is not None:
            self.updates_per_epoch = min(max(1, round(len(self.train_indices) / config.size)), num_rows)
        else:
            assert config.rows is not None
            self.updates_per_epoch = math.ceil(num_rows / config.rows)
        self.num_updates = num_updates if num_updates is not None else max(1, round(self.updates_per_epoch * epochs))
        num_epochs = max(1, math.ceil(self.num_updates / self.updates_per_epoch))
        rngs = [np.random.default_rng((seed, epoch)) for epoch in range(num_epochs)]
        self._updates = [rows for rng in rngs for rows in self._plan_epoch(rng)]
        row_sizes = [self.sizes[row].sum(axis=0) for rows in self._updates for row in rows]
        # A held-out example must fit too, because `batches_of` uses the same shapes.
        row_limits = np.max([*row_sizes, self.sizes.max(axis=0)], axis=0).tolist()
        self.examples_per_row = row_limits[1]
        slots = math.ceil(row_limits[2] / MAX_CONTEXT_PARALLELISM) * MAX_CONTEXT_PARALLELISM
        self.loss_tokens_per_row = min(slots, config.row_length)
        self.num_micro_batches, self.rows = micro_batch_shape(max(map(len, self._updates)), config, num_shards)
        shard_of_row = np.arange(self.rows) // (self.rows // num_shards)
        is_local = np.isin(shard_of_row, range(num_shards) if local_shards is None else local_shards)
        self._is_local_row = np.tile(is_local, self.num_micro_batches)
        self.reference_log_probs = np.zeros((len(examples), self.answers_per_example, NUM_REGIONS), np.float32)

    def _pack(self, order: np.ndarray, limits: tuple[int, ...] = ()) -> list[list[int]]:
        """Returns rows with the examples of `order`. `limits` may bound the examples and answer tokens of a row."""
        if not self.config.pack:
            return [[index] for index in order.tolist()]
        return pack_best_fit(self.sizes[:, : 1 + len(limits)], (self.config.row_length, *limits), order)

    def _plan_epoch(self, rng: np.random.Generator) -> list[Rows]:
        """Returns the rows of each update of one epoch."""
        rows = self._pack(rng.permutation(self.train_indices))
        if self.config.pack:
            rows = [rows[i] for i in rng.permutation(len(rows))]
        bounds = np.linspace(0, len(rows), self.updates_per_epoch + 1).round().astype(int)
        return [rows[start:end] for start, end in itertools.pairwise(bounds)]

    def __len__(self) -> int:
        return self.num_updates

    def __getitem__(self, index: int) -> HostBatch:
        if not 0 <= index < self.num_updates:
            raise IndexError(index)
        return self._build_batch(self._updates[index])

    def prefetch_from(self, start: int) -> Iterator[HostBatch]:
        """Iterates over the batches from update `start`. A thread builds the next ones while the devices compute."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(grain.MapDataset.source(self)[start:].to_iter_dataset(options))

    def batches_of(self, indices: Sequence[int] | np.ndarray) -> "LazyBatches":
        """Returns batches with each of these examples once. Same shapes as training batches, so no new compilation."""
        rows = self._pack(np.asarray(indices, np.int64), (self.examples_per_row, self.loss_tokens_per_row))
        size = self.num_micro_batches * self.rows
        return LazyBatches(self._build_batch, [rows[start : start + size] for start in range(0, len(rows), size)])

    def count_work(self, batch: HostBatch) -> BatchWork:
        """Counts the work of a batch over all shards. A query at position p of its segment attends to p + 1 keys."""
        indices = batch.example_ids[batch.example_ids >= 0]
        tokens, _, loss_tokens = self.sizes[indices].sum(axis=0).tolist()
        return BatchWork(tokens, int(self.attention_pairs[indices].sum()), loss_tokens)

    def tokens_per_update(self) -> int:
        """Returns the number of token slots of an update, padding included."""
        return self.num_micro_batches * self.rows * self.config.row_length

    def packing_efficiency(self) -> float:
        """Returns the fraction of the first epoch's token slots that hold a token."""
        return float(self.sizes[self.train_indices, 0].sum() / (self.updates_per_epoch * self.tokens_per_update()))

    def describe(self) -> str:
        """Describes the updates and their shape in one line."""
        per_update = len(self.train_indices) / self.updates_per_epoch
        rows = f"{self.num_micro_batches} micro-batch(es) of {self.rows} rows x {self.config.row_length} tokens"
        efficiency = f"packing efficiency {self.packing_efficiency():.1%}"
        held_out = f", {len(self.held_out)} examples held out" if len(self.held_out) else ""
        return f"{len(self)} updates of {per_update:.4g} examples on average, {rows}, {efficiency}{held_out}"

    def _build_batch(self, rows: Rows) -> HostBatch:
        R, T, A = self.num_micro_batches * self.rows, self.config.row_length, self.loss_tokens_per_row
        token_ids, positions, segment_ids = np.zeros((3, R, T), np.int32)
        loss_positions = np.tile(np.arange(T, T + A, dtype=np.int32), (R, 1))
        target_ids, target_regions = np.zeros((2, R, A), np.int32)
        example_ids = np.full((R, self.examples_per_row), -1, np.int32)
        log_probs = np.zeros((R, self.examples_per_row, self.answers_per_example, NUM_REGIONS), np.float32)
        for row, indices in enumerate(rows):
            example_ids[row, : len(indices)] = indices
            log_probs[row, : len(indices)] = self.reference_log_probs[indices]
            if not self._is_local_row[row]:
                continue
            start = slot = segment_id = 0
            for example in (self.examples[index] for index in indices):
                shortest = min(len(segment.answer_ids) for segment in example)
                for segment in example:
                    segment_id += 1
                    loss_indices = segment.loss_indices
                    end, offsets = start + len(segment.token_ids), np.arange(len(loss_indices))
                    slots = slice(slot, slot + len(offsets))
                    token_ids[row, start:end] = segment.token_ids
                    positions[row, start:end] = np.arange(end - start)
                    segment_ids[row, start:end] = segment_id
                    loss_positions[row, slots] = start + loss_indices - 1
                    target_ids[row, slots] = segment.token_ids[loss_indices]
                    is_late, is_beyond_shortest = offsets >= min(FIRST_REGION_TOKENS, shortest), offsets >= shortest
                    target_regions[row, slots] = 1 + is_late + is_beyond_shortest
                    start, slot = end, slots.stop
        arrays = (token_ids, positions, segment_ids, loss_positions, target_ids, target_regions, example_ids, log_probs)
        return Batch(*(array.reshape(self.num_micro_batches, self.rows, *array.shape[1:]) for array in arrays))


@dataclass(frozen=True)
class LazyBatches:
    """Batches that are built while they are iterated over. Each iteration builds them again."""

    build_batch: Callable[[Rows], HostBatch]
    rows_by_batch: Sequence[Rows]

    def __len__(self) -> int:
        return len(self.rows_by_batch)

    def __iter__(self) -> Iterator[HostBatch]:
        return map(self.build_batch, self.rows_by_batch)


def pack_best_fit(sizes: np.ndarray, limits: Sequence[int], order: np.ndarray) -> list[list[int]]:
    """Packs the examples of `order` into rows by best fit, longest first. Returns the example indices of each row.

    `sizes` [n, k] says how much of k resources each example needs. The first one is its length, which decides the fit.
    `limits` [k] says how much of each resource a row has. An example that exceeds a limit gets a row of its own.
    Examples of equal length are packed in the order of `order`.
    """
    rows: list[list[int]] = []
    remaining: list[np.ndarray] = []  # by row: what is left of `limits`
    free_tokens: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(order.tolist(), key=lambda i: -sizes[i, 0]):
        for position in range(bisect.bisect_left(free_tokens, (int(sizes[index, 0]), -1)), len(free_tokens)):
            row = free_tokens[position][1]
            if (remaining[row] >= sizes[index]).all():
                del free_tokens[position]
                break
        else:
            row = len(rows)
            rows.append([])
            remaining.append(np.array(limits, np.int64))
        rows[row].append(index)
        remaining[row] = remaining[row] - sizes[index]
        bisect.insort(free_tokens, (int(remaining[row][0]), row))
    return rows
