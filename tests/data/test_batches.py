"""Nothing is lost, doubled or cut by packing, and the order depends on the seed and the epoch alone."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from support import small

from thinkpo_jax.data.batches import BatchConfig, BatchPlan
from thinkpo_jax.data.examples import Segment
from thinkpo_jax.data.packing import pack_best_fit, split_held_out
from thinkpo_jax.runtime.config import UserError


@hypothesis.settings(max_examples=2000, deadline=None)
@hypothesis.given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80), seed=st.integers(0, 2**16))
def test_every_example_lies_in_one_row_and_no_row_is_too_long(lengths: list[int], seed: int) -> None:
    sizes = np.array(lengths)
    rows = pack_best_fit(sizes[:, None], (64,), np.random.default_rng(seed).permutation(len(sizes)))
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sizes[row].sum() <= 64 for row in rows)
    # Best fit leaves no two rows that could be one.
    free = sorted(64 - sizes[row].sum() for row in rows)
    assert len(rows) < 2 or free[-1] + free[-2] < 64 or min(len(row) for row in rows) > 0


@pytest.mark.parametrize(
    ("cap", "median", "sigma", "mean", "at_least"),
    [(8192, 4350, 0.55, 4700, 0.985), (16384, 6600, 0.6, 7600, 0.99), (32768, 9100, 0.7, 11200, 0.99)],
)
def test_rows_are_nearly_full_at_the_lengths_of_the_paper(
    cap: int, median: int, sigma: float, mean: int, at_least: float
) -> None:
    """Rows of one and a half times the cap; the shortest possible are less full under the cap of 8k."""
    rng = np.random.default_rng(0)
    prompt = np.exp(rng.normal(np.log(120), 0.4, 10_080)).astype(int)
    chosen = np.minimum(np.exp(rng.normal(np.log(median), sigma, 10_080)), cap - prompt).astype(int)
    rejected = np.minimum(np.exp(rng.normal(np.log(650), 0.5, 10_080)), 1024).astype(int)
    assert abs(chosen.mean() / mean - 1) < 0.02
    assert 600 < rejected.mean() < 750
    lengths = chosen + rejected + 2 * prompt
    for row_length, least in ((cap * 3 // 2, at_least), (cap + 1280, 0.95 if cap == 8192 else 0.98)):
        rows = pack_best_fit(lengths[:, None], (row_length,), rng.permutation(10_080))
        assert lengths.sum() / (len(rows) * row_length) >= least


@pytest.mark.parametrize("pack_rows", [True, False])
def test_an_epoch_reads_every_example_once(pack_rows: bool) -> None:
    examples = small.pairs(53)
    batches = small.batches(examples, steps=27, size=6, pack=pack_rows)
    assert batches.updates_per_epoch == 9
    for epoch in range(3):
        seen = np.concatenate([batches[9 * epoch + i].example_ids.ravel() for i in range(9)])
        assert sorted(seen[seen >= 0].tolist()) == list(range(53))


def test_a_batch_holds_the_examples_as_they_are() -> None:
    examples = small.pairs(20)
    batches = small.batches(examples, steps=3, size=7, rows_per_device=2)
    for step in range(3):
        batch = batches[step]
        flat = [array.reshape(-1, *array.shape[2:]) for array in batch]
        for tokens, positions, segments, trained, targets, regions, indices, _ in zip(*flat, strict=True):
            held = [segment for index in indices[indices >= 0] for segment in examples[index]]
            assert segments.max() == len(held)
            used = regions > 0
            answers = segments[trained[used]]  # of each slot in use, the segment that its place lies in
            for number, segment in enumerate(held, 1):
                where = segments == number
                np.testing.assert_array_equal(tokens[where], segment.token_ids)
                np.testing.assert_array_equal(positions[where], np.arange(len(segment.token_ids)))
                # What is trained is the answer, all of it, and nothing else, each token from the place before it.
                np.testing.assert_array_equal(
                    targets[used][answers == number], segment.token_ids[segment.answer_start :]
                )
                places = np.flatnonzero(where)[segment.answer_start - 1 : -1]
                np.testing.assert_array_equal(trained[used][answers == number], places)
            assert used.sum() == sum(len(s.token_ids) - s.answer_start for s in held)
            assert (trained[~used] >= len(tokens)).all()
            assert (np.diff(trained) > 0).all()


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 40)), min_size=1, max_size=40),
    limits=st.tuples(st.integers(40, 90), st.integers(1, 5), st.integers(40, 60)),
)
def test_rows_keep_every_limit(sizes: list[tuple[int, int]], limits: tuple[int, int, int]) -> None:
    table = np.array([(length, 1, min(trained, length)) for length, trained in sizes])
    rows = pack_best_fit(table, limits, np.arange(len(table)))
    assert sorted(index for row in rows for index in row) == list(range(len(table)))
    assert all((table[row].sum(axis=0) <= limits).all() for row in rows)


def test_batches_over_some_examples_have_the_shape_of_the_updates() -> None:
    examples = small.pairs(40)
    batches = small.batches(examples, steps=3, size=7, rows_per_device=2)
    for indices in ([3], [*range(0, 40, 3)], [*range(40)]):
        found = batches.batches_of(indices)
        for batch in found:
            assert [array.shape for array in batch] == [array.shape for array in batches[0]]
        seen = np.concatenate([batch.example_ids.ravel() for batch in found])
        assert sorted(seen[seen >= 0].tolist()) == indices
        assert sum((batch.target_regions > 0).sum() for batch in found) == sum(
            len(segment.token_ids) - segment.answer_start for index in indices for segment in examples[index]
        )


def test_held_out_examples_are_in_no_update_and_share_no_prompt_with_one() -> None:
    examples = small.pairs(60)
    # Every prompt stands three times.
    examples = [
        tuple(Segment(np.concatenate([s.token_ids[: s.answer_start], s.token_ids[s.answer_start :][::-1]]), s.answer_start)
              for s in examples[index % 20]) if index >= 20 else examples[index]
        for index in range(60)
    ]  # fmt: skip
    for seed in range(5):
        apart = split_held_out(examples, 0.2, seed=seed)
        assert 9 <= len(apart) <= 15
        assert {index % 20 for index in apart}.isdisjoint({i % 20 for i in range(60)} - {int(i) % 20 for i in apart})
        assert len(apart) == 3 * len({index % 20 for index in apart})
        config = BatchConfig(size=8, row_length=48)
        batches = BatchPlan(examples, config, seed=0, num_shards=1, num_updates=None, epochs=1.0, held_out=apart)
        seen = np.concatenate([batches[i].example_ids.ravel() for i in range(len(batches))])
        assert sorted(seen[seen >= 0].tolist()) == sorted(set(range(60)) - set(apart.tolist()))
        assert "held out" in batches.describe()
    assert set(split_held_out(examples, 0.2, seed=0)) != set(split_held_out(examples, 0.2, seed=1))
    # A prompt of most examples is never held out, and there is always one that is.
    uneven = [*[examples[0]] * 38, examples[1], examples[2]]
    for seed in range(8):
        assert set(split_held_out(uneven, 0.05, seed=seed)) <= {38, 39}
        assert split_held_out(uneven, 0.001, seed=seed).tolist() == [38]
    with pytest.raises(UserError, match="all examples have the same prompt"):
        split_held_out([examples[0]] * 4, 0.5, seed=0)


def test_neither_devices_nor_micro_batches_change_what_an_update_reads() -> None:
    examples = small.pairs(40)
    one = small.batches(examples)
    for other in (small.batches(examples, shards=8), small.batches(examples, rows_per_device=1)):
        for step in range(4):
            expected, found = (sorted(b[step].example_ids[b[step].example_ids >= 0].tolist()) for b in (one, other))
            assert expected == found


def test_the_order_differs_between_epochs() -> None:
    batches = small.batches(small.pairs(12), steps=4, size=6, pack=False)
    first, second = ([batches[i].example_ids.ravel().tolist() for i in steps] for steps in ((0, 1), (2, 3)))
    assert first != second


def test_an_example_longer_than_the_row_is_refused() -> None:
    with pytest.raises(UserError, match="row_length 8"):
        small.batches(small.pairs(3), row_length=8)


def test_an_epoch_has_no_more_updates_than_rows() -> None:
    batches = small.batches(small.pairs(12), steps=9, size=1, row_length=400)
    for index, batch in enumerate(batches.prefetch_from(0)):
        assert (batch.example_ids >= 0).any(), index
    assert sum(1 for _ in batches.prefetch_from(4)) == 5


def test_the_stream_is_the_batches_from_any_update_on() -> None:
    batches = small.batches(small.pairs(20), steps=6)
    for start in (0, 3, 6):
        found = list(batches.prefetch_from(start))
        assert len(found) == 6 - start
        for index, batch in enumerate(found, start):
            for ours, theirs in zip(batch, batches[index], strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_rows_per_update_can_be_given_in_place_of_examples() -> None:
    """No update has more rows, all are as full as they can be, and nothing is lost."""
    examples = small.pairs(200)
    batches = small.batches(examples, size=None, rows=8, steps=100, shards=8)
    rows = [int((batches[i].segment_ids > 0).any(axis=-1).sum()) for i in range(batches.updates_per_epoch)]
    assert max(rows) == batches.rows == 8
    assert max(rows) - min(rows) <= 1
    assert batches.num_micro_batches == 1
    seen = np.concatenate([batches[i].example_ids.ravel() for i in range(batches.updates_per_epoch)])
    assert sorted(seen[seen >= 0].tolist()) == list(range(200))
    assert batches.packing_efficiency() > 0.9
    total = sum(rows)
    by_size = small.batches(examples, size=round(200 * 9 / total), steps=100, shards=8)  # nine rows on eight devices
    assert batches.packing_efficiency() > 1.5 * by_size.packing_efficiency()


@pytest.mark.parametrize("given", [{"size": 4, "rows": 4}, {}])
def test_an_update_is_given_in_examples_or_in_rows(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"give either `size` .* or `rows`"):
        BatchConfig.model_validate({"row_length": 48, **given})
