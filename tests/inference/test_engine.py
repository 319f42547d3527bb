"""Generation equals a forward pass for each token. The KV cache, the batch and the mesh do not change a completion."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh
from support import small

from thinkpo_jax.inference import engine
from thinkpo_jax.inference.engine import Completion, SamplingConfig, generate
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.sharding import tree_shardings

MODEL = functools.cache(small.model)
VOCAB_SIZE = 61  # of the 64 rows of the embedding
LIMIT = 12
PROMPTS = [
    np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist()
    for seed, length in enumerate((3, 20, 1, 70, 7, 20, 64, 12, 5, 9))  # one needs two multiples of 64
]


def _generate(
    prompts: Sequence[Sequence[int]],
    *,
    mesh: Mesh | None = None,
    stop_token_ids: Sequence[int] = (),
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    **settings: float,
) -> list[Completion]:
    mesh = mesh or small.mesh()
    config = SamplingConfig.model_validate({"temperature": 0, "max_new_tokens": LIMIT, "batch_size": 8} | settings)
    model = MODEL()  # on one device, whatever the mesh
    with jax.set_mesh(mesh):
        model = jax.device_put(model, tree_shardings(model, mesh))
        return generate(
            model, prompts, config, stop_token_ids=stop_token_ids, vocab_size=vocab_size, seed=seed, mesh=mesh
        )


@jax.jit
def _logits(model: Transformer, tokens_T: jax.Array, length: jax.Array) -> jax.Array:
    """Logits [V] after the first `length` tokens; the rest is padding."""
    indices_T = jnp.arange(tokens_T.size)
    positions = TokenPositions((indices_T < length).astype(jnp.int32)[None], indices_T[None])
    return model(tokens_T[None], positions)[0][0, length - 1] @ model.lm_head()


def _next_logits(tokens: Sequence[int]) -> np.ndarray:
    padded = np.zeros(96, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_logits(MODEL(), jnp.array(padded), jnp.array(len(tokens))))[:VOCAB_SIZE]


@functools.cache
def _greedy() -> list[Completion]:
    return _generate(PROMPTS)


def test_greedy_tokens_are_the_argmax_of_a_forward_pass() -> None:
    for prompt, completion in zip(PROMPTS, _greedy(), strict=True):
        tokens = list(prompt)
        for token_id in completion.token_ids:
            assert token_id == np.argmax(_next_logits(tokens))
            tokens.append(token_id)
        assert len(completion.token_ids) == LIMIT
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_does_not_depend_on_its_batch(temperature: float) -> None:
    batched = _generate(PROMPTS, temperature=temperature)
    assert _generate(PROMPTS, temperature=temperature, batch_size=1) == batched
    assert len({tuple(completion.token_ids) for completion in batched}) == len(PROMPTS)


def test_a_mesh_of_eight_devices_gives_the_same_completions() -> None:
    assert _generate(PROMPTS, mesh=small.mesh(data=2, fsdp=2, tensor=2)) == _greedy()


def test_samples_differ_by_seed_and_index_and_repeat_with_the_same_seed() -> None:
    first, repeated, other = (_generate(PROMPTS[:1] * 4, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == repeated
    samples = [tuple(completion.token_ids) for completion in first + other]
    assert len(set(samples)) == len(samples)


def _draws(
    monkeypatch: pytest.MonkeyPatch, *, temperature: float = 1.0, top_p: float = 1.0, vocab_size: int = VOCAB_SIZE
) -> np.ndarray:
    """Samples the first token after one prompt 20,000 times. Returns the count of each id."""
    monkeypatch.setattr(engine, "PROMPT_MULTIPLE", 4)
    settings = {"max_new_tokens": 1, "batch_size": 5_000, "temperature": temperature, "top_p": top_p}
    completions = _generate(PROMPTS[:1] * 20_000, vocab_size=vocab_size, **settings)
    return np.bincount([completion.token_ids[0] for completion in completions], minlength=small.ARCH.vocab_size)


def _assert_drawn_from(expected: np.ndarray, counts: np.ndarray) -> None:
    """Tests the counts against the probabilities with chi-square. Rare ids share one cell."""
    expected_counts = expected * counts.sum()
    is_common = expected_counts >= 5
    assert expected[is_common].sum() > 0.95
    observed = np.append(counts[is_common], counts[~is_common].sum())
    predicted = np.append(expected_counts[is_common], expected[~is_common].sum() * counts.sum())
    cells = predicted > 0
    assert scipy.stats.chisquare(observed[cells], predicted[cells]).pvalue > 0.001


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_samples_follow_the_softmax_at_the_temperature(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    counts = _draws(monkeypatch, temperature=temperature)
    assert counts[VOCAB_SIZE:].sum() == 0
    _assert_drawn_from(
        scipy.special.softmax(_next_logits(PROMPTS[0]).astype(np.float64) / temperature), counts[:VOCAB_SIZE]
    )


def test_the_second_token_is_sampled_independently_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PROMPT_MULTIPLE", 4)
    settings = {"max_new_tokens": 2, "batch_size": 5_000, "temperature": 1.0}
    samples = [completion.token_ids for completion in _generate(PROMPTS[:1] * 10_000, **settings)]
    first = int(np.bincount([ids[0] for ids in samples]).argmax())
    counts = np.bincount([ids[1] for ids in samples if ids[0] == first], minlength=VOCAB_SIZE)
    _assert_drawn_from(scipy.special.softmax(_next_logits([*PROMPTS[0], first]).astype(np.float64)), counts)


def test_ids_beyond_the_vocabulary_are_never_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = _draws(monkeypatch, vocab_size=small.ARCH.vocab_size)
    assert unlimited[VOCAB_SIZE:].sum() > 0, "without the limit, the model samples them"
    most_frequent = int(np.argmax(unlimited))
    limited = _draws(monkeypatch, vocab_size=most_frequent)
    assert limited[most_frequent:].sum() == 0


def test_top_p_samples_only_from_the_nucleus(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = scipy.special.softmax(_next_logits(PROMPTS[0]).astype(np.float64))
    order = np.argsort(-probabilities)
    size = int(np.searchsorted(np.cumsum(probabilities[order]), 0.5)) + 1
    assert 2 < size < VOCAB_SIZE / 2
    nucleus = np.zeros(VOCAB_SIZE)
    nucleus[order[:size]] = probabilities[order[:size]]
    counts = _draws(monkeypatch, top_p=0.5)[:VOCAB_SIZE]
    assert set(np.flatnonzero(counts)) == set(order[:size])
    _assert_drawn_from(nucleus / nucleus.sum(), counts)


def test_a_stop_token_ends_a_completion_and_is_not_part_of_it() -> None:
    stop = _greedy()[0].token_ids[4]
    stopped = _generate(PROMPTS, stop_token_ids=[999, stop])
    for greedy, completion in zip(_greedy(), stopped, strict=True):
        end = greedy.token_ids.index(stop) if stop in greedy.token_ids else LIMIT
        reason = "stop" if end < LIMIT else "length"
        assert completion == Completion(greedy.token_ids[:end], finish_reason=reason)
    assert {completion.finish_reason for completion in stopped} == {"stop", "length"}


@pytest.mark.parametrize(("limit", "reason"), [(1, "length"), (2, "length"), (3, "stop")])
def test_the_limit_counts_the_stop_token(limit: int, reason: Literal["stop", "length"]) -> None:
    ids = _greedy()[1].token_ids
    assert ids[2] not in ids[:2]
    expected = Completion(ids[:2][:limit], finish_reason=reason)
    assert _generate(PROMPTS[1:2], stop_token_ids=[ids[2]], max_new_tokens=limit) == [expected]


def test_completions_have_the_order_of_the_prompts_and_progress_counts_them() -> None:
    mesh, model, counts = small.mesh(), MODEL(), []
    config = SamplingConfig(temperature=0, max_new_tokens=LIMIT, batch_size=4)
    with jax.set_mesh(mesh):
        completions = generate(
            model, PROMPTS[::-1], config,
            stop_token_ids=(), vocab_size=VOCAB_SIZE, seed=0, mesh=mesh, on_progress=counts.append,
        )  # fmt: skip
    assert completions == _greedy()[::-1]
    assert counts == [4, 8, 10]


def test_no_prompts_give_no_completions() -> None:
    assert _generate([]) == []
