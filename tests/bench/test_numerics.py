"""The comparisons with float32 find a kernel that is wrong."""

import math
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinkpo_jax.bench import numerics
from thinkpo_jax.models.attention.dispatch import packed_attention
from thinkpo_jax.training.token_log_probs import token_log_probs

CASE = numerics.AttentionCase("blockwise", "bfloat16", 4, 2, 64, 320)


def test_rows_hold_one_to_sixteen_segments_padding_and_nothing() -> None:
    rows = numerics.packed_rows(1024)
    assert [int(ids.max()) for ids in rows.segment_ids] == [1, 16, 3, 0]
    assert [bool((ids == 0).any()) for ids in rows.segment_ids] == [False, True, True, True]
    assert rows.segment_lengths is not None
    counted = [[int((ids == number).sum()) for number in range(1, 17)] for ids in rows.segment_ids]
    assert np.array_equal(rows.segment_lengths, counted)


def test_a_right_kernel_is_within_its_limit_and_a_wrong_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = numerics.compare_attention(CASE)
    assert max(errors.values()) < numerics.ATTENTION_LIMITS["bfloat16"]

    def wrong(q: Any, k: Any, v: Any, rows: Any, kernel: str) -> jax.Array:
        """Ignores that a row has several segments."""
        if kernel != "reference":
            length = rows.segment_ids.shape[1]
            one = jnp.where(rows.segment_ids > 0, 1, 0)
            rows = rows._replace(segment_ids=one, positions=jnp.broadcast_to(jnp.arange(length), one.shape))
        return packed_attention(q, k, v, rows, "reference")

    monkeypatch.setattr(numerics, "packed_attention", wrong)
    jax.clear_caches()
    assert min(numerics.compare_attention(CASE).values()) > 10 * numerics.ATTENTION_LIMITS["bfloat16"]


def test_a_number_that_is_not_finite_is_an_infinite_error() -> None:
    exact, is_real = jnp.ones((1, 3, 1, 1)), jnp.array([[True, True, False]])[..., None, None]
    assert numerics.relative_error(exact, exact, is_real) == 0
    assert numerics.relative_error(exact.at[0, 2].set(5), exact, is_real) == 0  # padding does not count
    assert numerics.relative_error(exact.at[0, 2].set(jnp.nan), exact, is_real) == math.inf  # but must be finite


def test_log_probs_that_are_rounded_exceed_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(row["within"] for row in numerics.compare_log_probs(is_small=True))

    def rounded(*arguments: Any) -> jax.Array:
        return token_log_probs(*arguments).astype(jnp.bfloat16).astype(jnp.float32)

    monkeypatch.setattr(numerics, "token_log_probs", rounded)
    assert not numerics.compare_log_probs(is_small=True)[0]["within"]


@pytest.mark.slow
def test_updates_with_another_learning_rate_exceed_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = numerics.compare_updates("blockwise", tmp_path, is_small=True)
    assert all(row["within"] for row in rows)
    losses = rows[0]["losses"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0] - 0.1  # the updates do something

    rates = iter((3e-5, 4e-5))
    make_optimizer = numerics.make_optimizer

    def with_other_rate(config: Any, num_updates: int) -> Any:
        return make_optimizer(config.model_copy(update={"learning_rate": next(rates)}), num_updates)

    monkeypatch.setattr(numerics, "make_optimizer", with_other_rate)
    first, updates = numerics.compare_updates("blockwise", tmp_path, is_small=True)
    assert first["within"]
    assert not updates["within"]


def test_a_kernel_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare_attention(case: numerics.AttentionCase) -> dict[str, float]:
        if case.dtype == "float16":
            raise NotImplementedError("no kernel\nfor this")
        return {"output": 1.0, "dq": 0.0, "dk": 0.0, "dv": 0.0}

    monkeypatch.setattr(numerics, "compare_attention", compare_attention)
    monkeypatch.setattr(numerics, "compare_updates", lambda *_, **__: [])
    monkeypatch.setattr(numerics, "compare_log_probs", lambda **_: [])
    *_, result = numerics.measure_numerics(str(tmp_path), 100, is_small=True)
    assert [row["within"] for row in result["rows"]] == [False] * 4
    assert result["rows"][2]["problem"] == "NotImplementedError: no kernel"
    assert result["num_skipped"] == 0


def test_comparisons_that_take_too_long_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def compare_attention(case: numerics.AttentionCase) -> dict[str, float]:
        if case.dtype == "float16":
            release.wait(1)
        return dict.fromkeys(("output", "dq", "dk", "dv"), 0.0)

    monkeypatch.setattr(numerics, "compare_attention", compare_attention)
    monkeypatch.setattr(numerics, "compare_updates", lambda *_, **__: [])
    monkeypatch.setattr(numerics, "compare_log_probs", lambda **_: [])
    *_, at_the_limit, last = numerics.measure_numerics(str(tmp_path), 0.2, is_small=True)
    assert at_the_limit["num_skipped"] == 2
    assert [row["within"] for row in at_the_limit["rows"]] == [True, True]
    assert last["num_skipped"] == 0  # those that had started have ended since


def test_a_failing_comparison_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    zeros = dict.fromkeys(("output", "dq", "dk", "dv"), 0.0)
    monkeypatch.setattr(numerics, "compare_attention", lambda case: zeros)
    monkeypatch.setattr(numerics, "compare_updates", fail)
    monkeypatch.setattr(numerics, "compare_log_probs", fail)
    *_, result = numerics.measure_numerics(str(tmp_path), 100, is_small=True)
    assert [row["within"] for row in result["rows"]] == [False, False, True, True, True, True]
    assert result["rows"][0]["problem"] == "RuntimeError: out of memory"
