"""Generates token ids for many prompts with continuous batching: a finished answer frees its slot for the next prompt.

The host admits answers, prefills their prompts, and starts chunks of decode steps (programs.py). Between two chunks it
takes out finished answers. The only state on the devices is the cache. So the number of slots may change between
chunks, and an answer that lost its pages resumes from its tokens.
"""

import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.inference_model import InferenceModel
from thinkpo_jax.inference.programs import CHUNK_STEPS, SLOT_AXES, Slots, decode_chunk, prefill
from thinkpo_jax.inference.sampling import SamplingFilters, SamplingValues
from thinkpo_jax.inference.scheduler import Answer, Scheduler
from thinkpo_jax.models.attention.dispatch import SPLASH_MULTIPLE
from thinkpo_jax.models.attention.paged import PagedKernel, pool_axes
from thinkpo_jax.runtime.console import log_info
from thinkpo_jax.runtime.integers import ceil_div, round_up
from thinkpo_jax.runtime.sharding import put_on_mesh, shard_map_by_axes

MIN_SLOTS = 8  # of a group
CPU_SLOTS = 64  # of a group in every program on a CPU. With another number, XLA may round differently.
MAX_PREFILL_TOKENS = 1024  # that a group prefills at once. A longer prompt runs alone.
MIN_TAIL_TOKENS = 128  # Fewer slots are compiled only if an answer may still get this many tokens.
MIN_PAGES = 8
EXPECTED_TOKENS = 256  # assumed length of an answer, for the first size of the cache
MIN_TABLE_WIDTH, MIN_LOOP_TABLE_WIDTH = 16, 512  # columns of the page table. Each width is compiled.
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class StopConditions:
    """What ends an answer besides its limit.

    `find_stop` gets the tokens of an answer and how many of them are new. It returns how many tokens the answer needs
    to hold a stop string, or None.
    """

    token_ids: Sequence[int] = ()
    find_stop: Callable[[Sequence[int], int], int | None] | None = None


def generate_tokens(
    model: InferenceModel, answers: Sequence[Answer], sampling: SamplingConfig, *, num_slots: int, stop: StopConditions
) -> Generator[tuple[Answer, FinishReason], None, None]:
    """Yields the answers as they finish. Their tokens are in `generated`, without the stop token.

    A prompt and its limit must fit into `model.max_context`. The tokens depend only on the model, the prompt, the
    random key and the sampling parameters. On CPUs they are bitwise the same for any number of slots, because every
    program has `CPU_SLOTS` of them. An answer that returned to the queue is prefilled with its own tokens, which may
    round differently.
    """
    session = GenerationSession(model, answers, sampling, num_slots, stop)
    while session.scheduler.has_work():
        yield from session.run_chunk()
    if num_evictions := session.scheduler.num_evictions:
        log_info(f"the KV cache was full: answers waited and were prefilled again {num_evictions} time(s).")


class GenerationSession:
    """The cache, the scheduler and the arguments of the programs for one call of `generate_tokens`."""

    def __init__(
        self,
        model: InferenceModel,
        answers: Sequence[Answer],
        sampling: SamplingConfig,
        num_slots: int,
        stop: StopConditions,
    ) -> None:
        self.model, self.stop = model, stop
        self.filters = SamplingFilters.of(sampling)
        groups, self.page_size = model.num_groups, model.page_size
        self.is_cpu = model.mesh.devices.flat[0].platform == "cpu"
        answers_per_group = next_power_of_2(max(MIN_SLOTS, ceil_div(len(answers), groups)))
        self.slots_per_group = min(answers_per_group, count_group_slots(num_slots, groups))
        num_pages = max_pages = model.max_pages
        if self.is_cpu:  # the pool of an accelerator is whole from the start
            self.slots_per_group = min(self.slots_per_group, CPU_SLOTS)
            max_pages = min(self._count_pages(len(each.prompt) + each.limit for each in answers), max_pages)
            expected = (len(each.prompt) + min(each.limit, EXPECTED_TOKENS) for each in answers)
            num_pages = min(self._count_pages(expected), max_pages)
        self.scheduler = Scheduler(
            num_groups=groups,
            slots_per_group=self.slots_per_group,
            page_size=self.page_size,
            chunk=CHUNK_STEPS,
            num_pages=num_pages,
            max_pages=max_pages,
        )
        self.scheduler.waiting.extend(answers)
        self.num_pages = num_pages
        self.pools = model.empty_pools(num_pages)
        longest = max((len(answer.prompt) + answer.limit for answer in answers), default=1)
        self.max_table_width = next_power_of_2(ceil_div(longest, self.page_size))
        self.sampling_values = SamplingValues.of(sampling)
        self.stop_token_ids = np.array(stop.token_ids or (-1,), np.int32)

    def _count_pages(self, lengths: Iterable[int]) -> int:
        """Returns page 0 and the pages that the longest sequences need at once, with one to spare for each.

        The number is rounded up, so that it differs little between limits. Each number is compiled.
        """
        longest = sorted(lengths, reverse=True)[: self.slots_per_group]
        num_pages = sum(ceil_div(length, self.page_size) + 1 for length in longest)
        return 1 + round_up(num_pages, max(MIN_PAGES, next_power_of_2(num_pages) // 4))

    def run_chunk(self) -> list[tuple[Answer, FinishReason]]:
        """Fills free slots, generates a chunk of tokens, and returns the answers that have finished."""
        self.scheduler.reserve_pages()
        admitted = self.scheduler.admit()
        with jax.set_mesh(self.model.mesh):
            if self.scheduler.num_pages > self.num_pages:
                self._grow_pools()
            self._prefill(admitted)
            tokens = self._decode()
        finished: list[tuple[Answer, FinishReason]] = []
        for group, running in enumerate(self.scheduler.running):
            for row, answer in enumerate(tuple(running)):
                new = tokens[group, row]
                if (reason := self._extend(answer, new[new >= 0].tolist())) is not None:
                    self.scheduler.release(answer)
                    finished.append((answer, reason))
        return finished

    def _grow_pools(self) -> None:
        """Gives each layer the pages that the scheduler has added. One layer after the other, to save memory."""
        pools, count = list(self.pools), self.scheduler.num_pages - self.num_pages
        self.pools = ()
        for layer, pool in enumerate(pools):
            pools[layer] = _add_pages(pool, count, self.model.spec.decode_kernel)
            del pool
        self.pools, self.num_pages = tuple(pools), self.scheduler.num_pages

    def _prefill(self, answers: Iterable[Answer]) -> None:
        """Writes all tokens but the last into the cache. Prompts of similar length run together."""
        waiting: dict[int, list[list[Answer]]] = {}
        for answer in answers:
            if answer.num_cached:
                length = self._padded_length(answer.num_cached)
                waiting.setdefault(length, [[] for _ in self.scheduler.running])[answer.group].append(answer)
        for length, groups in waiting.items():
            while most := max(map(len, groups)):
                rows = _power_of_4(min(most, max(1, MAX_PREFILL_TOKENS // length)))
                batch = [[group.pop(0) for _ in range(min(rows, len(group)))] for group in groups]
                tokens = np.zeros((len(groups), rows, length), np.int32)
                pages = np.zeros((len(groups), rows, length // self.page_size), np.int32)
                lengths = np.ones((len(groups), rows), np.int32)
                for group, row, answer in _enumerate_slots(batch):
                    cached = answer.cached_tokens()
                    tokens[group, row, : len(cached)] = cached
                    held = answer.pages[: ceil_div(len(cached), self.page_size)]
                    pages[group, row, : len(held)] = held
                    lengths[group, row] = len(cached)
                arrays = [self._put(array, ("batch", None)) for array in (tokens, pages)]
                lengths_R = self._put(lengths, ("batch",))
                self.pools = prefill(
                    self.model.weights, self.pools, arrays[0], lengths_R, arrays[1], spec=self.model.spec
                )

    def _padded_length(self, num_tokens: int) -> int:
        """Returns one of four lengths per power of two, so that few programs are compiled."""
        is_splash = self.model.spec.prompt_kernel == "splash"
        smallest = max(self.page_size, SPLASH_MULTIPLE if is_splash else 1)
        return round_up(num_tokens, max(smallest, next_power_of_2(num_tokens) // 4))

    def _decode(self) -> np.ndarray:
        """Runs a chunk. Returns its tokens [groups, slots, I], with -1 for no token."""
        running = self.scheduler.running
        num_active = sum(map(len, running))
        shape = (len(running), self._num_rows())
        width = self._table_width(max(len(answer.pages) for answers in running for answer in answers))
        tokens, positions, generated, limits = np.zeros((4, *shape), np.int32)
        pages, keys = np.zeros((*shape, width), np.int32), np.zeros((*shape, 2), np.uint32)
        for group, row, answer in _enumerate_slots(running):
            at = (group, row)
            tokens[at], positions[at] = answer.last_token(), answer.num_cached
            pages[at][: len(answer.pages)] = answer.pages
            keys[at] = answer.random_key
            generated[at], limits[at] = len(answer.generated), answer.limit
        arrays = (tokens, positions, pages, keys, generated, limits)
        slots = Slots(*(self._put(array, axes) for array, axes in zip(arrays, SLOT_AXES, strict=True)))
        # With answers in the queue, a chunk ends when a quarter of the slots is free.
        min_active = num_active - max(1, num_active // 4) if self.scheduler.waiting else 0
        controls = (self.sampling_values, self.stop_token_ids, np.int32(min_active))
        output, self.pools = decode_chunk(
            self.model.weights, self.pools, slots, controls, spec=self.model.spec, filters=self.filters
        )
        return np.asarray(output).reshape(*shape, CHUNK_STEPS)

    def _num_rows(self) -> int:
        """Returns the slots of a group in the next chunk: fewer at the end, if long answers are left.

        Each number is compiled, which takes longer than a few short answers. On a CPU the number never changes, because
        the bits of an answer could depend on it.
        """
        if self.is_cpu:
            return CPU_SLOTS
        rows, running = self.slots_per_group, self.scheduler.running
        most_left = max(answer.limit - len(answer.generated) for answers in running for answer in answers)
        if not self.scheduler.waiting and most_left >= MIN_TAIL_TOKENS:
            while rows // 4 >= max(MIN_SLOTS, *map(len, running)):
                rows //= 4
        return rows

    def _table_width(self, num_pages: int) -> int:
        """Returns the columns of the page table. The kernels of accelerators take longer for wide tables."""
        if self.model.spec.decode_kernel == "loop":
            return max(self.max_table_width, MIN_LOOP_TABLE_WIDTH)
        return table_width(num_pages)

    def _put(self, array: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
        """Puts an array [groups, rows, ...] on the mesh as [groups * rows, ...]."""
        return put_on_mesh(array.reshape(-1, *array.shape[2:]), axes, self.model.mesh)

    def _extend(self, answer: Answer, new: list[int]) -> FinishReason | None:
        """Adds tokens to an answer. Returns why it is finished, or None."""
        has_stop_token = new[-1] in self.stop_token_ids
        answer.generated += new[:-1] if has_stop_token else new
        if self.stop.find_stop is not None:
            kept = self.stop.find_stop(answer.generated, len(new))
            if kept is not None:
                del answer.generated[kept:]
                return "stop"
        if has_stop_token:
            return "stop"
        return "length" if len(answer.generated) == answer.limit else None


def _enumerate_slots(groups: Iterable[Iterable[Answer]]) -> Iterable[tuple[int, int, Answer]]:
    """Yields group, row and answer."""
    return ((group, row, answer) for group, answers in enumerate(groups) for row, answer in enumerate(answers))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _add_pages(pool: tuple[jax.Array, jax.Array], count: int, kernel: PagedKernel) -> tuple[jax.Array, jax.Array]:
    """Returns the pool of a layer with `count` more pages at the end of each group's part."""
    add = shard_map_by_axes(
        lambda pool: jnp.pad(pool, ((0, 0), (0, count), (0, 0), (0, 0))), (pool_axes(kernel),), pool_axes(kernel)
    )
    return add(pool[0]), add(pool[1])


def count_group_slots(num_slots: int, num_groups: int) -> int:
    """Returns the slots of a group if all groups together have `num_slots`."""
    return max(MIN_SLOTS, ceil_div(num_slots, num_groups))


def table_width(num_pages: int) -> int:
    """Returns the columns of a page table on an accelerator, for slots of up to `num_pages` pages."""
    return max(MIN_TABLE_WIDTH, next_power_of_2(num_pages))


def next_power_of_2(value: int) -> int:
    """Returns the smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()


def _power_of_4(value: int) -> int:
    """Returns the largest power of four that is at most `value`."""
    return 4 ** ((value.bit_length() - 1) // 2)
