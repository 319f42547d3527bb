"""Generation is the model read token by token: the cache, the batch and the mesh leave no trace in an answer."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh
from support import small

from thinkpo_jax.inference import engine as sample
from thinkpo_jax.inference.engine import Completion, generate
from thinkpo_jax.inference.sampling import SamplingConfig
from thinkpo_jax.models.attention.dense import TokenPositions
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.sharding import tree_shardings

MODEL = functools.cache(small.model)
VOCABULARY = 61  # of the 64 rows of the embedding
LIMIT = 12
PROMPTS = [
    np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()
    for seed, length in enumerate((3, 20, 1, 70, 7, 20, 64, 12, 5, 9))  # of one multiple of 64 and of two
]


def _generate(
    prompts: Sequence[Sequence[int]],
    *,
    mesh: Mesh | None = None,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    **settings: float,
) -> list[Completion]:
    mesh = mesh or small.mesh()
    config = SamplingConfig.model_validate({"temperature": 0, "max_new_tokens": LIMIT, "batch_size": 8} | settings)
    model = MODEL()  # on one device, whatever the mesh
    with jax.set_mesh(mesh):
        model = jax.device_put(model, tree_shardings(model, mesh))
        return generate(model, prompts, config, stop_token_ids=stop_ids, vocab_size=vocabulary, seed=seed, mesh=mesh)


@jax.jit
def _logits(model: Transformer, tokens_T: jax.Array, length: jax.Array) -> jax.Array:
    """Logits [V] after the first `length` tokens; the rest is padding."""
    indices_T = jnp.arange(tokens_T.size)
    places = TokenPositions((indices_T < length).astype(jnp.int32)[None], indices_T[None])
    return model(tokens_T[None], places)[0][0, length - 1] @ model.lm_head()


def _next_logits(tokens: Sequence[int]) -> np.ndarray:
    padded = np.zeros(96, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_logits(MODEL(), jnp.array(padded), jnp.array(len(tokens))))[:VOCABULARY]


@functools.cache
def _greedy() -> list[Completion]:
    return _generate(PROMPTS)


def test_greedy_is_the_argmax_of_a_whole_pass() -> None:
    for prompt, generation in zip(PROMPTS, _greedy(), strict=True):
        tokens = list(prompt)
        for found in generation.ids:
            assert found == np.argmax(_next_logits(tokens))
            tokens.append(found)
        assert len(generation.ids) == LIMIT
        assert not generation.finished


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch(temperature: float) -> None:
    together = _generate(PROMPTS, temperature=temperature)
    assert _generate(PROMPTS, temperature=temperature, batch_size=1) == together
    assert len({tuple(generation.ids) for generation in together}) == len(PROMPTS)


def test_a_mesh_of_eight_devices_gives_the_same_answers() -> None:
    assert _generate(PROMPTS, mesh=small.mesh(data=2, fsdp=2, tensor=2)) == _greedy()


def test_the_seed_alone_makes_the_difference() -> None:
    first, again, other = (_generate(PROMPTS[:1] * 4, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    answers = [tuple(generation.ids) for generation in first + other]
    assert len(set(answers)) == len(answers)


def _draws(
    monkeypatch: pytest.MonkeyPatch, *, temperature: float = 1.0, top_p: float = 1.0, vocabulary: int = VOCABULARY
) -> np.ndarray:
    """How often each id is drawn, of 20,000, right after one prompt."""
    monkeypatch.setattr(sample, "PROMPT_MULTIPLE", 4)
    settings = {"max_new_tokens": 1, "batch_size": 5_000, "temperature": temperature, "top_p": top_p}
    drawn = _generate(PROMPTS[:1] * 20_000, vocabulary=vocabulary, **settings)
    return np.bincount([generation.ids[0] for generation in drawn], minlength=small.ARCH.vocab_size)


def _assert_drawn_from(expected: np.ndarray, counts: np.ndarray) -> None:
    likely = expected * counts.sum() >= 5
    assert expected[likely].sum() > 0.95, "the rest is pooled in one cell"
    rest = [counts[~likely].sum()], [expected[~likely].sum() * counts.sum()]
    observed, hoped = (
        np.concatenate([part, more])
        for part, more in zip((counts[likely], expected[likely] * counts.sum()), rest, strict=True)
    )
    kept = hoped > 0
    assert scipy.stats.chisquare(observed[kept], hoped[kept]).pvalue > 0.001


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_draws_follow_the_softmax_at_the_temperature(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    counts = _draws(monkeypatch, temperature=temperature)
    assert counts[VOCABULARY:].sum() == 0
    _assert_drawn_from(
        scipy.special.softmax(_next_logits(PROMPTS[0]).astype(np.float64) / temperature), counts[:VOCABULARY]
    )


def test_the_second_draw_owes_nothing_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "PROMPT_MULTIPLE", 4)
    settings = {"max_new_tokens": 2, "batch_size": 5_000, "temperature": 1.0}
    drawn = [generation.ids for generation in _generate(PROMPTS[:1] * 10_000, **settings)]
    first = int(np.bincount([ids[0] for ids in drawn]).argmax())
    counts = np.bincount([ids[1] for ids in drawn if ids[0] == first], minlength=VOCABULARY)
    _assert_drawn_from(scipy.special.softmax(_next_logits([*PROMPTS[0], first]).astype(np.float64)), counts)


def test_ids_beyond_the_vocabulary_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _draws(monkeypatch, vocabulary=small.ARCH.vocab_size)
    assert whole[VOCABULARY:].sum() > 0, "the model would draw them"
    half = int(np.argmax(whole))
    cut = _draws(monkeypatch, vocabulary=half)
    assert cut[half:].sum() == 0


def test_top_p_draws_the_nucleus_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = scipy.special.softmax(_next_logits(PROMPTS[0]).astype(np.float64))
    order = np.argsort(-probabilities)
    size = int(np.searchsorted(np.cumsum(probabilities[order]), 0.5)) + 1
    assert 2 < size < VOCABULARY / 2
    nucleus = np.zeros(VOCABULARY)
    nucleus[order[:size]] = probabilities[order[:size]]
    counts = _draws(monkeypatch, top_p=0.5)[:VOCABULARY]
    assert set(np.flatnonzero(counts)) == set(order[:size])
    _assert_drawn_from(nucleus / nucleus.sum(), counts)


def test_a_stop_id_ends_an_answer_and_is_not_in_it() -> None:
    stop = _greedy()[0].ids[4]
    stopped = _generate(PROMPTS, stop_ids=[999, stop])
    for whole, found in zip(_greedy(), stopped, strict=True):
        cut = whole.ids.index(stop) if stop in whole.ids else LIMIT
        assert found == Completion(whole.ids[:cut], cut < LIMIT)
    assert {generation.finished for generation in stopped} == {True, False}


@pytest.mark.parametrize(("limit", "finished"), [(1, False), (2, False), (3, True)])
def test_the_limit_counts_the_stop_id(limit: int, finished: bool) -> None:
    ids = _greedy()[1].ids
    assert ids[2] not in ids[:2]
    assert _generate(PROMPTS[1:2], stop_ids=[ids[2]], max_new_tokens=limit) == [Completion(ids[:2][:limit], finished)]


def test_answers_come_in_the_order_of_the_prompts_and_progress_counts_them() -> None:
    mesh, model, counts = small.mesh(), MODEL(), []
    config = SamplingConfig(temperature=0, max_new_tokens=LIMIT, batch_size=4)
    with jax.set_mesh(mesh):
        found = generate(
            model, PROMPTS[::-1], config,
            stop_token_ids=(), vocab_size=VOCABULARY, seed=0, mesh=mesh, on_progress=counts.append,
        )  # fmt: skip
    assert found == _greedy()[::-1]
    assert counts == [4, 8, 10]


def test_no_prompts_no_answers() -> None:
    assert _generate([]) == []
