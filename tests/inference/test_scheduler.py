"""The scheduler gives each page to one answer, prefers older answers, and finishes all of them."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkpo_jax.inference.scheduler import Answer, Scheduler

PAGE, CHUNK = 4, 6


def _scheduler(**changes: int) -> Scheduler:
    sizes = {"num_groups": 1, "slots_per_group": 4, "page_size": PAGE, "chunk": CHUNK, "num_pages": 64, "max_pages": 64}
    return Scheduler(**(sizes | changes))


def _answer(prompt: int, limit: int, key: str = "") -> Answer:
    return Answer(key, list(range(prompt)), (0, 0), limit)


def _admitted(scheduler: Scheduler, *answers: Answer) -> list[Answer]:
    scheduler.waiting.extend(answers)
    return scheduler.admit()


def _running(scheduler: Scheduler) -> list[Answer]:
    return [answer for answers in scheduler.running for answer in answers]


def _assert_consistent(scheduler: Scheduler) -> None:
    """Each page has one owner. Each running answer has the pages that the next chunk needs."""
    for group, answers in enumerate(scheduler.running):
        held = [page for answer in answers for page in answer.pages]
        assert len(set(held)) == len(held), "no page has two owners"
        assert all(0 < page < scheduler.num_pages for page in held), "page 0 belongs to no answer"
        for answer in answers:
            assert answer.group == group
            # The very last token of an answer is never stored.
            stored = min(len(answer.cached_tokens()) + CHUNK, len(answer.prompt) + answer.limit - 1)
            assert len(answer.pages) == -(-stored // PAGE)
    assert not any(answer.pages for answer in scheduler.waiting)


def test_an_answer_knows_what_the_cache_must_hold() -> None:
    answer = _answer(prompt=3, limit=5)
    assert (answer.num_cached, answer.last_token(), answer.cached_tokens()) == (2, 2, [0, 1])
    answer.generated += [7, 8]
    assert (answer.num_cached, answer.last_token(), answer.cached_tokens()) == (4, 8, [0, 1, 2, 7])


def test_a_group_without_pages_does_not_block_the_queue() -> None:
    """The third answer finds one answer in each group, but one page in the first."""
    scheduler = _scheduler(num_groups=2, num_pages=8, max_pages=8)
    long, *short = _admitted(scheduler, _answer(20, 4), _answer(3, 3), _answer(3, 3))
    assert [answer.group for answer in (long, *short)] == [0, 1, 1]
    _assert_consistent(scheduler)


def test_answers_take_free_slots_in_order_and_the_others_wait() -> None:
    scheduler = _scheduler(slots_per_group=2)
    first, second, third = answers = [_answer(3, 3) for _ in range(3)]
    assert _admitted(scheduler, *answers) == [first, second]
    assert scheduler.admit() == []
    scheduler.release(first)
    assert scheduler.admit() == [third]
    assert _running(scheduler) == [second, third]
    assert first.pages == []


def test_a_scheduler_has_work_until_every_answer_is_released() -> None:
    scheduler, answer = _scheduler(), _answer(3, 3)
    assert not scheduler.has_work()
    scheduler.waiting.append(answer)
    assert scheduler.has_work()
    scheduler.admit()
    assert scheduler.has_work()
    scheduler.release(answer)
    assert not scheduler.has_work()


@pytest.mark.parametrize(
    ("prompt", "limit", "pages"),
    [
        (1, 1, 1),  # the only token of the answer is never stored
        (4, 1, 1),
        (4, 2, 2),
        (1, 4, 1),
        (1, 100, 2),  # no token is in the cache, and the chunk stores 6
        (3, 100, 2),
        (4, 100, 3),
    ],
)
def test_an_answer_gets_the_pages_of_its_next_chunk_but_not_beyond_its_limit(
    prompt: int, limit: int, pages: int
) -> None:
    (answer,) = _admitted(_scheduler(), _answer(prompt, limit))
    assert len(answer.pages) == pages


def test_pages_follow_the_tokens() -> None:
    scheduler = _scheduler()
    (answer,) = _admitted(scheduler, _answer(1, 40))
    for _ in range(5):
        answer.generated += [0] * CHUNK
        scheduler.reserve_pages()
        _assert_consistent(scheduler)
    assert len(answer.pages) == 9  # 30 tokens are in the cache, and 6 more may follow


def test_released_pages_come_back() -> None:
    scheduler = _scheduler(num_pages=4, max_pages=4)
    (answer,) = _admitted(scheduler, _answer(7, 6))
    pages = set(answer.pages)
    assert pages == {1, 2, 3}
    assert _admitted(scheduler, _answer(7, 6)) == []
    scheduler.release(answer)
    (other,) = scheduler.admit()
    assert set(other.pages) == pages


def test_the_pages_double_up_to_the_maximum_before_an_answer_is_evicted() -> None:
    scheduler = _scheduler(num_pages=2, max_pages=12)
    (answer,) = _admitted(scheduler, _answer(1, 44))
    sizes = [scheduler.num_pages]
    while answer in _running(scheduler) and len(answer.generated) < 42:
        answer.generated += [0] * CHUNK
        scheduler.reserve_pages()
        _assert_consistent(scheduler)
        sizes.append(scheduler.num_pages)
    growth = [(old, new) for old, new in itertools.pairwise(sizes) if new != old]
    assert len(growth) >= 2
    assert all(new in (2 * old - 1, 2 * old, 12) and new <= 2 * old for old, new in growth)
    assert scheduler.num_evictions == 0
    assert len(set(answer.pages)) == 11


def test_more_pages_are_the_same_in_each_group() -> None:
    scheduler = _scheduler(num_groups=2, num_pages=2, max_pages=8)
    _admitted(scheduler, _answer(15, 1), _answer(3, 1), _answer(7, 1), _answer(7, 1))
    assert scheduler.num_pages == 8
    _assert_consistent(scheduler)
    assert {page for answer in scheduler.running[1] for page in answer.pages} <= set(range(1, 8))


def test_the_youngest_answers_return_to_the_front_of_the_queue_in_order() -> None:
    scheduler = _scheduler(num_pages=10, max_pages=10)
    answers = _admitted(scheduler, *(_answer(1, 60, key) for key in "abc"))
    assert [answer.key for answer in answers] == ["a", "b", "c"]
    scheduler.waiting.append(_answer(1, 60, "d"))
    for answer in answers:
        answer.generated += [0] * 12
    scheduler.reserve_pages()  # each needs 5 pages, and there are 9
    assert [answer.key for answer in _running(scheduler)] == ["a"]
    assert [answer.key for answer in scheduler.waiting] == ["b", "c", "d"]
    assert scheduler.num_evictions == 2
    assert len(answers[1].generated) == 12, "an evicted answer keeps its tokens"
    _assert_consistent(scheduler)


def test_a_resumed_answer_is_younger_than_the_answers_that_kept_running() -> None:
    scheduler = _scheduler(num_pages=8, max_pages=8, slots_per_group=2)
    first, second = _admitted(scheduler, _answer(1, 40, "a"), _answer(1, 40, "b"))
    first.generated += [0] * 12
    second.generated += [0] * 6
    scheduler.reserve_pages()
    assert _running(scheduler) == [first]
    scheduler.release(first)
    third = _answer(1, 40, "c")
    assert _admitted(scheduler, third) == [second, third]
    assert second.admission < third.admission


def test_admission_leaves_a_free_page_for_each_running_answer() -> None:
    scheduler = _scheduler(num_pages=7, max_pages=7)
    admitted = _admitted(scheduler, *(_answer(1, 40, key) for key in "abc"))
    # The first takes 2 of 6 pages. The second takes 2 and leaves 2. The third would leave none.
    assert [answer.key for answer in admitted] == ["a", "b"]
    scheduler.release(admitted[0])
    assert scheduler.admit()[0].key == "c"


def test_one_answer_may_fill_all_pages() -> None:
    scheduler = _scheduler(num_pages=4, max_pages=4)
    (answer,) = _admitted(scheduler, _answer(8, 5))
    assert len(answer.pages) == 3
    scheduler.reserve_pages()
    assert scheduler.num_evictions == 0


def test_groups_get_answers_in_turn() -> None:
    scheduler = _scheduler(num_groups=3, slots_per_group=4)
    _admitted(scheduler, *(_answer(3, 3) for _ in range(8)))
    assert [len(running) for running in scheduler.running] == [3, 3, 2]
    scheduler.release(scheduler.running[0][0])
    scheduler.release(scheduler.running[0][0])
    _admitted(scheduler, *(_answer(3, 3) for _ in range(2)))
    assert [len(running) for running in scheduler.running] == [3, 3, 2]
    _assert_consistent(scheduler)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_run_finishes_all_answers_and_never_evicts_the_oldest(data: Any) -> None:
    max_pages = data.draw(st.integers(2, 20), label="max_pages")
    slots = data.draw(st.integers(1, 4), label="slots")
    scheduler = _scheduler(
        num_groups=data.draw(st.integers(1, 3), label="groups"),
        slots_per_group=slots,
        num_pages=data.draw(st.integers(2, max_pages), label="num_pages"),
        max_pages=max_pages,
    )
    context = (max_pages - 1) * PAGE
    prompts = data.draw(st.lists(st.integers(1, context - 1), min_size=1, max_size=12), label="prompts")
    answers = [_answer(prompt, data.draw(st.integers(1, context - prompt)), str(i)) for i, prompt in enumerate(prompts)]
    scheduler.waiting.extend(answers)
    finished: list[Answer] = []
    for _ in range(1000):
        if not scheduler.has_work():
            break
        oldest = [min(running, key=lambda answer: answer.admission, default=None) for running in scheduler.running]
        num_pages = scheduler.num_pages
        scheduler.reserve_pages()
        assert all(answer is None or answer in _running(scheduler) for answer in oldest)
        scheduler.admit()
        _assert_consistent(scheduler)
        assert num_pages <= scheduler.num_pages <= max_pages
        assert max(map(len, scheduler.running)) <= slots
        assert _running(scheduler), "there is always progress"
        for answer in _running(scheduler):
            left = answer.limit - len(answer.generated)
            answer.generated += [0] * min(CHUNK, left)
            if left <= CHUNK or data.draw(st.integers(0, 5)) == 0:
                scheduler.release(answer)
                finished.append(answer)
    assert sorted(answer.key for answer in finished) == sorted(answer.key for answer in answers)
    for group in range(len(scheduler.running)):  # every page is free again
        (answer,) = _admitted(scheduler, _answer(context - 1, 2))
        assert answer.group == group
        assert set(answer.pages) == set(range(1, max_pages))
