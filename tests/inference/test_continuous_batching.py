"""Free slots are filled at once, the cache follows the tokens, and answers survive a full cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from support import small
from support.generation import (
    ARCH,
    VOCAB_SIZE,
    Generated,
    forward_logits,
    generate,
    prepared_model,
    random_prompts,
    record_chunks,
)

from thinkpo_jax.inference import inference_model, token_generation
from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.inference_model import InferenceModel, page_bytes, prepare_inference_model
from thinkpo_jax.inference.programs import decode_chunk
from thinkpo_jax.inference.scheduler import Scheduler
from thinkpo_jax.models.attention.paged import PAGE_SIZE
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.devices import GIB

NEAR_TIE = 1e-4  # between the two largest logits. A resumed answer is prefilled, which rounds differently.


def test_a_free_slot_is_filled_before_the_other_answers_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = record_chunks(monkeypatch)
    limits = [160] + [4] * 70
    generate(random_prompts([5] * 71), limits=limits)
    # The long answer needs 160 steps. Meanwhile, the short ones run in the other slots.
    assert sum(chunk.steps for chunk in chunks) == 160
    assert sum(chunk.tokens for chunk in chunks) == sum(limits)


def test_a_chunk_ends_early_if_answers_wait_for_the_slots_that_become_free(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = record_chunks(monkeypatch)
    generate(random_prompts([5] * 9), limits=[2, 2, 12, 12, 12, 12, 12, 12, 10])
    assert [chunk.steps for chunk in chunks] == [2, 10]
    chunks.clear()
    generate(random_prompts([5] * 8), limits=[2, 2, 12, 12, 12, 12, 12, 12])
    assert [chunk.steps for chunk in chunks] == [12]


def _stop_after(prompt: Sequence[int], num_tokens: int) -> tuple[list[int], int]:
    """Returns greedy tokens and a stop token that first follows about this many."""
    (answer,) = generate([prompt], limits=100)
    end = next(i for i in range(num_tokens, 100) if answer.ids[i] not in answer.ids[:i])
    return answer.ids[:end], answer.ids[end]


def test_the_cost_does_not_grow_with_the_limit_if_answers_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = random_prompts([20])
    ids, stop = _stop_after(prompt, 3)
    model = prepared_model(arch=replace(ARCH, max_positions=40_000))
    chunks = record_chunks(monkeypatch)
    costs = []
    for limit in (256, 32_768):
        assert generate([prompt], limits=limit, stop=[stop], model=model) == [Generated(ids, "stop")]
        costs.append(list(chunks))
        chunks.clear()
    assert costs[0] == costs[1]
    assert sum(chunk.steps for chunk in costs[0]) == len(ids) + 1


def test_the_cache_follows_the_tokens_and_not_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = record_chunks(monkeypatch)
    (prompt,) = random_prompts([20])
    generate([prompt], limits=1300)
    pages, lengths = [chunk.pages for chunk in chunks], np.cumsum([chunk.tokens for chunk in chunks]) + len(prompt)
    assert pages[0] == 9, "for 20 tokens of the prompt and 256 of the answer"
    assert pages == sorted(pages)
    assert set(pages) == {9, 17, 25}
    needed = 1 + -(-lengths // PAGE_SIZE)  # with page 0
    assert all(needed <= pages)
    assert all(pages <= np.maximum(9, 2 * needed))


def test_many_short_answers_do_not_enlarge_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = record_chunks(monkeypatch)
    generate(random_prompts([20] * 60), limits=30)
    assert len({chunk.pages for chunk in chunks}) == 1
    assert chunks[0].pages <= 32, "8 answers have a page each and one to spare"


def _record_evictions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list to which the key of each answer that returns to the queue is added."""
    keys: list[str] = []
    evict = Scheduler._evict

    def evict_and_record(scheduler: Scheduler, answer: Any) -> None:
        assert answer.generated, "an answer that returns has tokens to resume from"
        keys.append(answer.key)
        evict(scheduler, answer)

    monkeypatch.setattr(Scheduler, "_evict", evict_and_record)
    return keys


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes pages small, so that short answers fill a cache."""
    monkeypatch.setattr(inference_model, "PAGE_SIZE", 8)


def _with_pages(pages: int, **mesh: int) -> InferenceModel:
    return replace(prepared_model(**mesh), max_pages=pages)


def _assert_equal_but_for_ties(
    prompts: Sequence[Sequence[int]], expected: Sequence[Generated], found: Sequence[Generated]
) -> int:
    """Checks that greedy answers differ first at a near tie of the logits. Returns how many are equal."""
    num_equal = 0
    for prompt, old, new in zip(prompts, expected, found, strict=True):
        assert len(old.ids) == len(new.ids)
        if old == new:
            num_equal += 1
            continue
        first = next(i for i, (a, b) in enumerate(zip(old.ids, new.ids, strict=True)) if a != b)
        largest = np.sort(forward_logits([*prompt, *old.ids[:first]])[-1])[-2:]
        assert largest[1] - largest[0] < NEAR_TIE
    return num_equal


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 2}])
def test_greedy_answers_are_the_same_after_they_returned_to_the_queue(
    monkeypatch: pytest.MonkeyPatch, mesh: dict[str, int]
) -> None:
    prompts = random_prompts([5, 12, 16, 1, 9, 15, 7, 3] * 5, seed=4)
    expected = generate(prompts, limits=48)
    evicted = _record_evictions(monkeypatch)
    found = generate(prompts, limits=48, model=_with_pages(12, **mesh))
    assert len(evicted) >= 20
    assert len(set(evicted)) >= 15
    num_equal = _assert_equal_but_for_ties(prompts, expected, found)
    assert num_equal >= len(prompts) - 2, f"{num_equal} of {len(prompts)} are equal after {len(evicted)} evictions"


@pytest.mark.usefixtures("small_pages")
def test_sampled_answers_resume_with_their_own_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, prompts = SamplingConfig(temperature=1.0), random_prompts([5, 12, 16, 1, 9, 15, 7, 3] * 5, seed=6)
    expected = generate(prompts, sampling, limits=48)
    evicted = _record_evictions(monkeypatch)
    found = generate(prompts, sampling, limits=48, model=_with_pages(12))
    assert len(evicted) >= 10
    # Rounding can change a token if its uniform number lies between two tokens.
    assert sum(old == new for old, new in zip(expected, found, strict=True)) >= 38


@pytest.mark.usefixtures("small_pages")
def test_one_answer_may_fill_the_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts([1, 2, 3])
    evicted = _record_evictions(monkeypatch)
    model = _with_pages(9)
    assert model.max_context == 64
    limits = [model.max_context - len(prompt) for prompt in prompts]
    found = generate(prompts, limits=limits, model=model)
    assert evicted
    _assert_equal_but_for_ties(prompts, generate(prompts, limits=limits), found)


def test_a_cache_without_room_for_an_answer_is_an_error() -> None:
    model, mesh = small.model(), small.mesh()
    size = page_bytes(prepared_model().spec, mesh)
    with jax.set_mesh(mesh):
        prepared = prepare_inference_model(model, mesh, vocab_size=VOCAB_SIZE, cache_memory=2 * size / GIB)
        assert prepared.max_pages == 2
        assert prepared.max_context == PAGE_SIZE
        with pytest.raises(UserError, match=r"local\.cache_memory gives .* two pages of"):
            prepare_inference_model(model, mesh, vocab_size=VOCAB_SIZE, cache_memory=1.9 * size / GIB)


def test_pools_take_the_bytes_of_their_pages() -> None:
    for mesh in ({}, {"data": 2, "tensor": 2}):
        model = prepared_model(**mesh)
        first = [
            sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(model.empty_pools(pages)))
            for pages in (1, 3)
        ]
        assert first == [page_bytes(model.spec, model.mesh), 3 * page_bytes(model.spec, model.mesh)]


def test_values_that_change_between_runs_are_not_compiled() -> None:
    prompts = random_prompts([5, 6, 7])
    program: Any = decode_chunk

    def run(limit: int, stop: Sequence[int], seed: int, **options: Any) -> None:
        generate(prompts, SamplingConfig.model_validate(options), limits=limit, stop=stop, seed=seed)

    run(256, range(30), 0, temperature=0.7, top_p=0.9, top_k=10, min_p=0.1)
    size = program._cache_size()
    run(300, range(1, 31), 1, temperature=1.2, top_p=0.8, top_k=3, min_p=0.2)
    run(3000, range(30, 60), 2, temperature=0.1, top_p=0.99, top_k=60, min_p=0.01)
    assert program._cache_size() == size
    run(256, range(30), 0, temperature=0.7, top_p=0.9)
    assert program._cache_size() == size + 1, "filters without effect are left out"


def test_prompts_of_any_lengths_are_prefilled_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    prefill = token_generation.prefill

    def prefill_and_record(weights: Any, pools: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tokens.shape)
        return prefill(weights, pools, tokens, *args, **kwargs)

    monkeypatch.setattr(token_generation, "prefill", prefill_and_record)
    prompts = random_prompts([200] * 5 + [1500, 2, 1, 65, 66, 300, 200], seed=7)
    for prompt, answer in zip(prompts, generate(prompts, limits=3), strict=True):
        logits = forward_logits([*prompt, *answer.ids])
        assert answer.ids == logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
    assert shapes[0] == (4, 256)
    assert all(rows * length <= token_generation.MAX_PREFILL_TOKENS or rows == 1 for rows, length in shapes)
    assert sum(rows for rows, _ in shapes) == 11, "a prompt of one token needs no prefill"
