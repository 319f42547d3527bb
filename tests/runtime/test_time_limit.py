"""A call ends at its limit in every thread, and no exception arrives after it."""

import contextlib
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from thinkpo_jax.runtime import time_limit
from thinkpo_jax.runtime.time_limit import TimeLimitError, call_with_time_limit


@pytest.fixture(autouse=True)
def _short_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "TICK_SECONDS", 0.005)


def _never_end() -> None:
    while True:
        pass


def _is_stopped() -> bool:
    with pytest.raises(TimeLimitError):
        call_with_time_limit(_never_end, 0.02)
    return True


def test_a_call_ends_at_its_limit_in_the_main_thread_and_in_others() -> None:
    assert _is_stopped()
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: _is_stopped(), range(4)))


def test_results_and_errors_of_a_call_are_passed_on() -> None:
    assert call_with_time_limit(lambda: 3, 1.0) == 3
    with pytest.raises(ZeroDivisionError):
        call_with_time_limit(lambda: 1 // 0, 1.0)
    assert threading.get_ident() not in time_limit._ticks_left


def test_no_exception_arrives_after_a_call_that_ends_near_its_limit() -> None:
    for number in range(60):
        with contextlib.suppress(TimeLimitError):
            call_with_time_limit(functools.partial(time.sleep, 0.003 + number % 5 * 0.001), 0.005)
        for _ in range(1000):
            pass
    time.sleep(0.02)
    assert time_limit._ticks_left == {}
