"""The pairs that the benchmarks train: lengths, limits and tokens."""

import numpy as np
import pytest

from thinkpo_jax.bench.updates import MAX_UPDATES, UpdateCase
from thinkpo_jax.bench.workload import (
    END_ID,
    NAMES,
    REAL_PAIRS,
    LengthDistribution,
    count_tokens,
    draw_pairs,
    paper_lengths,
    to_examples,
)


def test_pairs_have_the_lengths_that_were_asked_for() -> None:
    pairs = draw_pairs(REAL_PAIRS, 2000, max_length=2048, vocab_size=1000, seed=0)
    lengths = np.array([[len(pair[name]) for name in NAMES] for pair in pairs])
    assert np.median(lengths, axis=0) == pytest.approx([67, 1626, 428], rel=0.05)  # answers end with the end token
    assert (lengths[:, :1] + lengths[:, 1:]).max() == 2048
    assert all(pair[name][-1] == END_ID and max(pair[name]) < 1000 for pair in pairs for name in NAMES[1:])


@pytest.mark.parametrize("row_length", [384, 8192, 16_384, 32_768])
def test_a_pair_like_the_papers_fits_into_a_row(row_length: int) -> None:
    options = {"max_length": row_length, "vocab_size": 1000, "seed": 0}
    pairs = draw_pairs(paper_lengths(row_length), 500, **options, share_length=True)
    tokens = [count_tokens([pair]) for pair in pairs]
    assert max(tokens) <= row_length
    assert min(tokens) >= 4
    chosen = np.median([len(pair["chosen"]) for pair in pairs])
    expected = {8192: 4350, 16_384: 6600, 32_768: 9100}.get(row_length, 4350 * row_length / 8192)
    assert chosen == pytest.approx(expected, rel=0.1)


def test_a_very_long_prompt_leaves_room_for_both_answers() -> None:
    lengths = LengthDistribution((1000, 1000, 1000), (0, 0, 0), (1000, 1000, 1000))
    (pair,) = draw_pairs(lengths, 1, max_length=100, vocab_size=50, seed=0)
    assert [len(pair[name]) for name in NAMES] == [98, 2, 2]
    with pytest.raises(ValueError, match="do not fit"):
        draw_pairs(lengths, 1, max_length=100, vocab_size=50, seed=0, share_length=True)


def test_examples_hold_the_tokens_of_the_pairs() -> None:
    pairs = draw_pairs(REAL_PAIRS, 3, max_length=2048, vocab_size=1000, seed=0)
    examples = to_examples(pairs)
    assert sum(len(segment.token_ids) for example in examples for segment in example) == count_tokens(pairs)
    assert examples[0][1].answer_ids.tolist() == pairs[0]["rejected"]
    assert [len(example) for example in to_examples(pairs, answers=("chosen",))] == [1, 1, 1]


def test_there_are_pairs_for_every_update() -> None:
    case = UpdateCase("tiny", "thinkpo", 384, 2, "none")
    assert count_tokens(case.draw_pairs()) >= (MAX_UPDATES + 1) * 2 * 384
