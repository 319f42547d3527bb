"""Packing keeps every example exactly once and complete. The order depends only on the seed and the epoch."""

from collections.abc import Iterable

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from support import small

from thinkpo_jax.data.batches import BatchConfig, BatchPlan, HostBatch, pack_best_fit
from thinkpo_jax.data.examples import Segment, split_held_out
from thinkpo_jax.runtime.config import UserError


@hypothesis.settings(max_examples=2000, deadline=None)
@hypothesis.given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80), seed=st.integers(0, 2**16))
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths: list[int], seed: int) -> None:
    sizes = np.array(lengths)
    rows = pack_best_fit(sizes[:, None], (64,), np.random.default_rng(seed).permutation(len(sizes)))
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sizes[row].sum() <= 64 for row in rows)
    # Best fit leaves no two rows that would fit in one.
    free = sorted(64 - sizes[row].sum() for row in rows)
    assert len(rows) < 2 or free[-1] + free[-2] < 64 or min(len(row) for row in rows) > 0


@pytest.mark.parametrize(
    ("max_length", "median", "sigma", "mean", "min_efficiency"),
    [(8192, 4350, 0.55, 4700, 0.985), (16384, 6600, 0.6, 7600, 0.99), (32768, 9100, 0.7, 11200, 0.99)],
)
def test_rows_are_nearly_full_with_the_length_distributions_of_the_paper(
    max_length: int, median: int, sigma: float, mean: int, min_efficiency: float
) -> None:
    """Rows are 1.5 times as long as the longest chosen segment, or as short as possible, which packs less well."""
    rng = np.random.default_rng(0)
    prompt = np.exp(rng.normal(np.log(120), 0.4, 10_080)).astype(int)
    chosen = np.minimum(np.exp(rng.normal(np.log(median), sigma, 10_080)), max_length - prompt).astype(int)
    rejected = np.minimum(np.exp(rng.normal(np.log(650), 0.5, 10_080)), 1024).astype(int)
    assert abs(chosen.mean() / mean - 1) < 0.02
    assert 600 < rejected.mean() < 750
    lengths = chosen + rejected + 2 * prompt
    shortest_row, min_shortest_row_efficiency = max_length + 1280, 0.95 if max_length == 8192 else 0.98
    for row_length, threshold in (
        (max_length * 3 // 2, min_efficiency),
        (shortest_row, min_shortest_row_efficiency),
    ):
        rows = pack_best_fit(lengths[:, None], (row_length,), rng.permutation(10_080))
        assert lengths.sum() / (len(rows) * row_length) >= threshold


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_reads_every_example_once(pack: bool) -> None:
    plan = small.batches(small.pairs(53), steps=27, size=6, pack=pack)
    assert plan.updates_per_epoch == 9
    for epoch in range(3):
        assert _example_ids([plan[9 * epoch + i] for i in range(9)]) == list(range(53))


def test_a_batch_has_the_tokens_positions_and_targets_of_its_examples() -> None:
    examples = small.pairs(20)
    plan = small.batches(examples, steps=3, size=7, rows_per_device=2)
    for update in range(3):
        arrays = [array.reshape(-1, *array.shape[2:]) for array in plan[update]]
        for row in zip(*arrays, strict=True):
            token_ids, positions, segment_ids, loss_positions, target_ids, target_regions, example_ids, _ = row
            segments = [segment for index in example_ids[example_ids >= 0] for segment in examples[index]]
            assert segment_ids.max() == len(segments)
            is_used = target_regions > 0
            segment_of_slot = segment_ids[loss_positions[is_used]]
            for number, segment in enumerate(segments, 1):
                is_token, is_target = segment_ids == number, segment_of_slot == number
                np.testing.assert_array_equal(token_ids[is_token], segment.token_ids)
                np.testing.assert_array_equal(positions[is_token], np.arange(len(segment.token_ids)))
                # The targets are all answer tokens and no others. Each is predicted from the position before it.
                np.testing.assert_array_equal(target_ids[is_used][is_target], segment.answer_ids)
                expected_positions = np.flatnonzero(is_token)[segment.answer_start - 1 : -1]
                np.testing.assert_array_equal(loss_positions[is_used][is_target], expected_positions)
            assert is_used.sum() == sum(len(segment.answer_ids) for segment in segments)
            assert (loss_positions[~is_used] >= len(token_ids)).all()
            assert (np.diff(loss_positions) > 0).all()


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 40)), min_size=1, max_size=40),
    limits=st.tuples(st.integers(40, 90), st.integers(1, 5), st.integers(40, 60)),
)
def test_rows_exceed_none_of_several_limits(sizes: list[tuple[int, int]], limits: tuple[int, int, int]) -> None:
    table = np.array([(length, 1, min(num_targets, length)) for length, num_targets in sizes])
    rows = pack_best_fit(table, limits, np.arange(len(table)))
    assert sorted(index for row in rows for index in row) == list(range(len(table)))
    assert all((table[row].sum(axis=0) <= limits).all() for row in rows)


def test_batches_of_selected_examples_have_the_shapes_of_updates() -> None:
    examples = small.pairs(40)
    plan = small.batches(examples, steps=3, size=7, rows_per_device=2)
    for indices in ([3], [*range(0, 40, 3)], [*range(40)]):
        batches = plan.batches_of(indices)
        for batch in batches:
            assert [array.shape for array in batch] == [array.shape for array in plan[0]]
        assert _example_ids(batches) == indices
        num_targets = sum(len(segment.answer_ids) for index in indices for segment in examples[index])
        assert sum((batch.target_regions > 0).sum() for batch in batches) == num_targets


def test_held_out_examples_are_in_no_update_and_share_no_prompt_with_one() -> None:
    # Each prompt has three examples: the pair itself, and two with reversed answers.
    pairs = small.pairs(60)[:20]
    reversed_pairs = [tuple(_with_reversed_answer(segment) for segment in pair) for pair in pairs]
    examples = [*pairs, *reversed_pairs, *reversed_pairs]
    for seed in range(5):
        held_out = split_held_out(examples, 0.2, seed=seed)
        assert 9 <= len(held_out) <= 15
        held_out_prompts = {int(index) % 20 for index in held_out}
        trained_prompts = {index % 20 for index in set(range(60)) - set(held_out.tolist())}
        assert held_out_prompts.isdisjoint(trained_prompts)
        assert len(held_out) == 3 * len(held_out_prompts)
        config = BatchConfig(size=8, row_length=48)
        plan = BatchPlan(examples, config, seed=0, num_shards=1, num_updates=None, epochs=1.0, held_out=held_out)
        assert _example_ids([plan[i] for i in range(len(plan))]) == sorted(set(range(60)) - set(held_out.tolist()))
        assert "held out" in plan.describe()
    assert set(split_held_out(examples, 0.2, seed=0)) != set(split_held_out(examples, 0.2, seed=1))


def test_a_prompt_with_most_examples_is_never_held_out_and_at_least_one_prompt_is() -> None:
    examples = small.pairs(3)
    uneven = [*[examples[0]] * 38, examples[1], examples[2]]
    for seed in range(8):
        assert set(split_held_out(uneven, 0.05, seed=seed)) <= {38, 39}
        assert split_held_out(uneven, 0.001, seed=seed).tolist() == [38]


def test_examples_with_a_single_prompt_cannot_be_split() -> None:
    with pytest.raises(UserError, match="all examples have the same prompt"):
        split_held_out(small.pairs(1) * 4, 0.5, seed=0)


def test_an_update_reads_the_same_examples_with_any_number_of_devices_and_micro_batches() -> None:
    examples = small.pairs(40)
    plan = small.batches(examples)
    for other in (small.batches(examples, shards=8), small.batches(examples, rows_per_device=1)):
        for update in range(4):
            assert _example_ids([plan[update]]) == _example_ids([other[update]])


def test_the_order_differs_between_epochs() -> None:
    plan = small.batches(small.pairs(12), steps=4, size=6, pack=False)
    first, second = ([plan[i].example_ids.ravel().tolist() for i in epoch] for epoch in ((0, 1), (2, 3)))
    assert first != second


def test_an_example_that_is_longer_than_a_row_is_an_error() -> None:
    message = r"batch\.row_length is 8, but the longest example has 28 tokens\. Set row_length to at least 28, or use"
    with pytest.raises(UserError, match=message):
        small.batches(small.pairs(3), row_length=8)


def test_an_epoch_has_no_more_updates_than_rows() -> None:
    plan = small.batches(small.pairs(12), steps=9, size=1, row_length=400)
    for index, batch in enumerate(plan.prefetch_from(0)):
        assert (batch.example_ids >= 0).any(), index
    assert sum(1 for _ in plan.prefetch_from(4)) == 5


def test_prefetching_gives_the_batches_from_any_update_on() -> None:
    plan = small.batches(small.pairs(20), steps=6)
    for start in (0, 3, 6):
        batches = list(plan.prefetch_from(start))
        assert len(batches) == 6 - start
        for index, batch in enumerate(batches, start):
            for prefetched, expected in zip(batch, plan[index], strict=True):
                np.testing.assert_array_equal(prefetched, expected)


def test_an_update_may_have_a_fixed_number_of_rows() -> None:
    """No update has more rows, all are as full as they can be, and no example is lost."""
    examples = small.pairs(200)
    plan = small.batches(examples, size=None, rows=8, steps=100, shards=8)
    num_rows = [int((plan[i].segment_ids > 0).any(axis=-1).sum()) for i in range(plan.updates_per_epoch)]
    assert max(num_rows) == plan.rows == 8
    assert max(num_rows) - min(num_rows) <= 1
    assert plan.num_micro_batches == 1
    assert _example_ids([plan[i] for i in range(plan.updates_per_epoch)]) == list(range(200))
    assert plan.packing_efficiency() > 0.9
    size = round(200 * 9 / sum(num_rows))  # about nine rows per update, on eight devices
    plan_by_size = small.batches(examples, size=size, steps=100, shards=8)
    assert plan.packing_efficiency() > 1.5 * plan_by_size.packing_efficiency()


@pytest.mark.parametrize("options", [{"size": 4, "rows": 4}, {}])
def test_an_update_needs_either_a_size_or_rows(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give either `size` or `rows`"):
        BatchConfig.model_validate({"row_length": 48, **options})


def _example_ids(batches: Iterable[HostBatch]) -> list[int]:
    """Returns the sorted indices of the examples in the batches. An example that is read twice is there twice."""
    example_ids = np.concatenate([batch.example_ids.ravel() for batch in batches])
    return sorted(example_ids[example_ids >= 0].tolist())


def _with_reversed_answer(segment: Segment) -> Segment:
    prompt_ids = segment.token_ids[: segment.answer_start]
    return Segment(np.concatenate([prompt_ids, segment.answer_ids[::-1]]), segment.answer_start)
