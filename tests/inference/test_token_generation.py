"""Answers equal a forward pass for each token. Slots, other answers and meshes do not change them."""

import functools
from typing import Literal

import numpy as np
import pytest
import scipy.special
from support.chi_square import assert_drawn_from
from support.generation import (
    ARCH,
    GREEDY,
    VOCAB_SIZE,
    Generated,
    forward_logits,
    generate,
    make_answer,
    prepared_model,
    random_prompts,
    record_chunks,
)
from support.selection import cases, exhaustive

from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.programs import CHUNK_STEPS
from thinkpo_jax.inference.token_generation import GenerationSession, StopConditions, generate_tokens

LIMIT = 20  # more than a chunk
PROMPTS = random_prompts((3, 20, 1, 70, 7, 20, 64, 12, 5, 9, 65, 130))  # around the page size of 64
SAMPLED = SamplingConfig(temperature=1.0)
# Enough answers for 150 slots. Slots become free at different steps.
MANY = random_prompts([length for length in (1, 3, 9, 17, 40, 64, 65, 80) for _ in range(20)], seed=1)
MANY_LIMITS = np.random.default_rng(2).integers(1, 40, len(MANY)).tolist()


@functools.cache
def _greedy() -> list[Generated]:
    return generate(PROMPTS, limits=LIMIT)


@functools.cache
def _many() -> list[Generated]:
    return generate(MANY, SAMPLED, limits=MANY_LIMITS, slots=8)


def test_greedy_tokens_are_the_argmax_of_a_forward_pass() -> None:
    for prompt, answer in zip(PROMPTS, _greedy(), strict=True):
        logits = forward_logits([*prompt, *answer.ids])
        assert answer.ids == logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
        assert len(answer.ids) == LIMIT
        assert answer.reason == "length"
    assert len({tuple(answer.ids) for answer in _greedy()}) == len(PROMPTS)


def test_sampled_tokens_are_probable_in_a_forward_pass() -> None:
    # The mean log-probability of tokens from the model's distribution is its negative entropy.
    surprise: list[float] = []
    entropy: list[float] = []
    for prompt, answer in zip(MANY, _many(), strict=True):
        logits = forward_logits([*prompt, *answer.ids])[len(prompt) - 1 : -1].astype(np.float64)
        log_probs = scipy.special.log_softmax(logits, axis=-1)
        surprise += (-log_probs[range(len(answer.ids)), answer.ids]).tolist()
        entropy += (-(np.exp(log_probs) * log_probs).sum(axis=-1)).tolist()
    assert len(surprise) == sum(MANY_LIMITS)
    assert np.mean(surprise) == pytest.approx(np.mean(entropy), abs=0.1)


@pytest.mark.parametrize("slots", cases((12, 16, 64, 150), short=lambda slots: slots in (12, 150)))
def test_an_answer_does_not_depend_on_the_number_of_slots(slots: int) -> None:
    assert generate(MANY, SAMPLED, limits=MANY_LIMITS, slots=slots) == _many()


def test_every_program_on_a_cpu_has_the_same_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number of slots, XLA may round the same row differently, which changes few tokens."""
    expected = _greedy()
    chunks = record_chunks(monkeypatch)
    for slots in (1, 8, 300):
        assert generate(PROMPTS, limits=LIMIT, slots=slots) == expected
    generate(MANY, SAMPLED, limits=[150 if i % 20 == 0 else 4 for i in range(len(MANY))], slots=64)
    assert {chunk.slots for chunk in chunks} == {64}


def test_an_answer_does_not_depend_on_other_answers_or_their_order() -> None:
    order = np.random.default_rng(3).permutation(len(MANY))[:40].tolist()
    subset = generate([MANY[i] for i in order], SAMPLED, limits=[MANY_LIMITS[i] for i in order])
    assert subset == [_many()[i] for i in order]
    alone = generate([MANY[order[0]]], SAMPLED, limits=MANY_LIMITS[order[0]])
    assert alone == subset[:1]


def _keys_and_values(before: int, after: int, *, slots: int) -> list[np.ndarray]:
    """Returns the keys and values of a prompt and its answer, beside so many other answers."""
    answers = [make_answer(prompt, LIMIT) for prompt in (*MANY[:before], PROMPTS[3], *MANY[-after - 1 : -1])]
    session, answer = GenerationSession(prepared_model(), answers, SAMPLED, slots, StopConditions()), answers[before]
    session.run_chunk()
    assert len(answer.generated) == CHUNK_STEPS < LIMIT  # so it still holds its pages
    assert sum(map(len, session.scheduler.running)) == min(slots, len(answers))
    pools = [np.asarray(pool)[:, answer.pages] for pools in session.pools for pool in pools]
    return [pool.reshape(len(pool), -1, pool.shape[-1])[:, : answer.num_cached] for pool in pools]


def test_keys_and_values_have_the_same_bits_in_any_slot_and_beside_any_answers() -> None:
    expected = _keys_and_values(0, 0, slots=8)
    assert all(array.any(axis=(0, 2)).all() for array in expected)
    for before, after, slots in ((7, 20, 8), (63, 0, 64), (40, 23, 300)):
        for array, other in zip(expected, _keys_and_values(before, after, slots=slots), strict=True):
            np.testing.assert_array_equal(array, other)


def test_a_higher_limit_extends_an_answer() -> None:
    longer = generate(MANY[:16], SAMPLED, limits=40)
    for short, long in zip(_many(), longer, strict=False):
        assert long.ids[: len(short.ids)] == short.ids


def test_answers_that_an_interruption_left_out_are_the_same_later() -> None:
    answers = [
        make_answer(prompt, limit, key=str(i)) for i, (prompt, limit) in enumerate(zip(MANY, MANY_LIMITS, strict=True))
    ]
    running = generate_tokens(prepared_model(), answers, SAMPLED, num_slots=8, stop=StopConditions())
    finished = {int(answer.key): answer.generated for answer, _ in (next(running) for _ in range(50))}
    running.close()
    missing = [i for i in range(len(MANY)) if i not in finished]
    assert len(missing) == len(MANY) - 50
    later = generate([MANY[i] for i in missing], SAMPLED, limits=[MANY_LIMITS[i] for i in missing])
    assert [_many()[i] for i in missing] == later
    assert all(_many()[i].ids == ids for i, ids in finished.items())


def test_a_long_tail_on_an_accelerator_runs_with_fewer_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [make_answer(prompt, 150 if i % 20 == 0 else 4, key=str(i)) for i, prompt in enumerate(MANY)]
    session = GenerationSession(prepared_model(), answers, SAMPLED, 64, StopConditions())
    session.is_cpu = False
    chunks = record_chunks(monkeypatch)
    while session.scheduler.has_work():
        session.run_chunk()
    assert {chunk.slots for chunk in chunks} == {64, 16}
    assert [len(answer.generated) for answer in answers] == [answer.limit for answer in answers]


@pytest.mark.parametrize(("data", "tensor"), [pytest.param(8, 1, marks=exhaustive), (4, 2)])
def test_a_mesh_gives_the_same_answers(data: int, tensor: int) -> None:
    model = prepared_model(data=data, tensor=tensor)
    assert generate(MANY[::2], SAMPLED, limits=MANY_LIMITS[::2], slots=64, model=model) == _many()[::2]


def test_samples_differ_by_seed_and_number_and_repeat_with_the_same_seed() -> None:
    first, repeated, other = (
        generate(PROMPTS[:1] * 8, SAMPLED, limits=8, samples=range(8), seed=seed) for seed in (1, 1, 2)
    )
    assert first == repeated
    samples = [tuple(answer.ids) for answer in first + other]
    assert len(set(samples)) == len(samples)
    swapped = generate(PROMPTS[:1] * 2, SAMPLED, limits=8, samples=[5, 3], seed=1)
    assert swapped == [first[5], first[3]]


@functools.cache
def _two_tokens() -> np.ndarray:
    """Samples two tokens 10,000 times after one prompt. Returns [10,000, 2]."""
    answers = generate(PROMPTS[:1] * 10_000, SAMPLED, limits=2, samples=range(10_000), slots=2048)
    return np.array([answer.ids for answer in answers])


def test_samples_follow_the_softmax() -> None:
    counts = np.bincount(_two_tokens()[:, 0], minlength=VOCAB_SIZE)
    assert_drawn_from(scipy.special.softmax(forward_logits(PROMPTS[0])[-1].astype(np.float64)), counts)


def test_the_second_token_is_sampled_independently_of_the_first() -> None:
    tokens = _two_tokens()
    first = int(np.bincount(tokens[:, 0]).argmax())
    counts = np.bincount(tokens[tokens[:, 0] == first, 1], minlength=VOCAB_SIZE)
    assert counts.sum() > 1000
    assert_drawn_from(scipy.special.softmax(forward_logits([*PROMPTS[0], first])[-1].astype(np.float64)), counts)


def test_ids_beyond_the_vocabulary_are_never_sampled() -> None:
    assert max(token for answer in _many() for token in answer.ids) == VOCAB_SIZE - 1
    unlimited = generate(MANY, SAMPLED, limits=MANY_LIMITS, model=prepared_model(vocab_size=ARCH.vocab_size))
    assert max(token for answer in unlimited for token in answer.ids) == ARCH.vocab_size - 1


@pytest.mark.parametrize("position", [0, 4, 15, 16, 19])  # a chunk has 16 steps
def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(position: int) -> None:
    stop = _greedy()[0].ids[position]
    stopped = generate(PROMPTS, limits=LIMIT, stop=[999, stop])
    for greedy, answer in zip(_greedy(), stopped, strict=True):
        end = greedy.ids.index(stop) if stop in greedy.ids else LIMIT
        assert answer == Generated(greedy.ids[:end], "stop" if end < LIMIT else "length")
    assert {answer.reason for answer in stopped} == {"stop", "length"}


def test_any_of_several_stop_tokens_ends_an_answer() -> None:
    stops = [_greedy()[0].ids[4], _greedy()[1].ids[2], _greedy()[2].ids[0]]
    for greedy, answer in zip(_greedy(), generate(PROMPTS, limits=LIMIT, stop=stops), strict=True):
        end = min((greedy.ids.index(stop) for stop in stops if stop in greedy.ids), default=LIMIT)
        assert answer.ids == greedy.ids[:end]


@pytest.mark.parametrize(("limit", "reason"), [(1, "length"), (2, "length"), (3, "stop")])
def test_the_limit_counts_the_stop_token(limit: int, reason: Literal["stop", "length"]) -> None:
    ids = _greedy()[1].ids
    assert ids[2] not in ids[:2]
    assert generate(PROMPTS[1:2], limits=limit, stop=[ids[2]]) == [Generated(ids[:2][:limit], reason)]


def test_a_finished_answer_is_yielded_before_longer_ones() -> None:
    answers = [make_answer(PROMPTS[0], limit, key=str(limit)) for limit in (60, 2, 30)]
    running = generate_tokens(prepared_model(), answers, GREEDY, num_slots=8, stop=StopConditions())
    assert [answer.key for answer, _ in running] == ["2", "30", "60"]


def test_no_prompts_give_no_answers() -> None:
    assert generate([]) == []
