"""Decides on the host which answers are generated at the same time, and which pages of the cache they hold.

The devices form data groups. Each group has its own slots and its own pages. Page 0 of a group is never given away:
free slots write to it. An answer stays in its group until it finishes or returns to the queue.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field

from thinkpo_jax.runtime.integers import ceil_div


@dataclass(eq=False)
class Answer:
    """An answer that is being generated. `limit` counts its tokens, with the stop token."""

    key: str
    prompt: list[int]
    random_key: tuple[int, int]
    limit: int
    generated: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    group: int = 0
    admission: int = 0  # the youngest answer has the largest number

    @property
    def num_cached(self) -> int:
        """The number of tokens before the last one. At the start of a chunk these are in the cache."""
        return len(self.prompt) + len(self.generated) - 1

    def last_token(self) -> int:
        """Returns the last token of the answer so far, or of the prompt."""
        return self.generated[-1] if self.generated else self.prompt[-1]

    def cached_tokens(self) -> list[int]:
        """Returns the tokens that must be in the cache before the next chunk."""
        return (self.prompt + self.generated)[:-1]


class Scheduler:
    """A queue, the slots and the pages of all groups. There are `num_pages` in a group and at most `max_pages`."""

    def __init__(
        self, *, num_groups: int, slots_per_group: int, page_size: int, chunk: int, num_pages: int, max_pages: int
    ) -> None:
        self.waiting: deque[Answer] = deque()
        self.running: list[list[Answer]] = [[] for _ in range(num_groups)]
        self.num_evictions = 0
        self.num_pages, self._max_pages = num_pages, max_pages
        self._slots_per_group, self._page_size, self._chunk = slots_per_group, page_size, chunk
        # Heaps, because neighboring pages are read faster.
        self._free_pages = [list(range(1, num_pages)) for _ in range(num_groups)]
        self._num_admitted = 0

    def has_work(self) -> bool:
        """Returns whether an answer is running or waiting."""
        return bool(self.waiting) or any(self.running)

    def admit(self) -> list[Answer]:
        """Moves answers from the queue into free slots, as long as there are pages for them. Returns these answers.

        One page for each running answer stays free, so that new answers do not push out older ones at once.
        """
        admitted: list[Answer] = []
        while self.waiting:
            answer = self.waiting[0]
            group = self._find_group(self._missing_pages(answer))
            if group is None:
                break
            running = self.running[group]
            self.waiting.popleft()
            answer.group, answer.admission = group, self._num_admitted
            self._num_admitted += 1
            self._allocate_pages(answer)
            running.append(answer)
            admitted.append(answer)
        return admitted

    def reserve_pages(self) -> None:
        """Gives each running answer the pages for the next chunk. The oldest answers come first.

        If there are too few, the youngest answers of the group return to the front of the queue.
        """
        for running in self.running:
            for answer in sorted(running, key=lambda answer: answer.admission):
                while answer in running and not self._ensure_free_pages(answer.group, self._missing_pages(answer)):
                    self._evict(max(running, key=lambda answer: answer.admission))
                if answer in running:
                    self._allocate_pages(answer)

    def release(self, answer: Answer) -> None:
        """Takes slot and pages from an answer."""
        self.running[answer.group].remove(answer)
        for page in answer.pages:
            heapq.heappush(self._free_pages[answer.group], page)
        answer.pages.clear()

    def _find_group(self, num_pages: int) -> int | None:
        """Returns the group with the fewest answers that has a free slot and so many pages, or None."""
        for group in sorted(range(len(self.running)), key=lambda group: len(self.running[group])):
            num_running = len(self.running[group])
            if num_running < self._slots_per_group and self._ensure_free_pages(group, num_pages + num_running):
                return group
        return None

    def _evict(self, answer: Answer) -> None:
        self.release(answer)
        self.waiting.appendleft(answer)
        self.num_evictions += 1

    def _missing_pages(self, answer: Answer) -> int:
        """Returns how many more pages the answer needs in the next chunk. Its very last token is never stored."""
        num_tokens = min(answer.num_cached + self._chunk, len(answer.prompt) + answer.limit - 1)
        return ceil_div(num_tokens, self._page_size) - len(answer.pages)

    def _allocate_pages(self, answer: Answer) -> None:
        free = self._free_pages[answer.group]
        answer.pages += [heapq.heappop(free) for _ in range(self._missing_pages(answer))]

    def _ensure_free_pages(self, group: int, count: int) -> bool:
        """Returns whether the group has so many free pages. Doubles the pages beside page 0 if that is allowed."""
        while len(self._free_pages[group]) < count and self.num_pages < self._max_pages:
            old, self.num_pages = self.num_pages, min(2 * self.num_pages - 1, self._max_pages)
            for free in self._free_pages:
                free.extend(range(old, self.num_pages))  # larger than all others, so the list remains a heap
        return len(self._free_pages[group]) >= count
