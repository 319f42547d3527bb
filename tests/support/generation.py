"""Runs the inference engine on small models with token ids instead of text."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import small

from thinkpo_jax.inference import token_generation
from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.inference_model import InferenceModel, prepare_inference_model
from thinkpo_jax.inference.local_engine import random_key
from thinkpo_jax.inference.programs import Pools, decode_chunk
from thinkpo_jax.inference.scheduler import Answer
from thinkpo_jax.inference.token_generation import StopConditions, generate_tokens
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.runtime.sharding import tree_shardings

VOCAB_SIZE = 61  # of the 64 rows of the embedding
ARCH = replace(small.ARCH, max_positions=4096)  # all tests share it, because each architecture is compiled
GREEDY = SamplingConfig(temperature=0, max_new_tokens=16)
MODEL = functools.cache(lambda arch: small.model(arch=arch))


class Generated(NamedTuple):
    """The tokens of an answer and why it ended."""

    ids: list[int]
    reason: str


@functools.cache
def prepared_model(
    *, data: int = 1, tensor: int = 1, arch: Architecture = ARCH, vocab_size: int = VOCAB_SIZE
) -> InferenceModel:
    """Returns the small model on a mesh of these sizes."""
    mesh = make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), jax.devices()[: data * tensor])
    model = MODEL(arch)
    with jax.set_mesh(mesh):
        model = jax.device_put(model, tree_shardings(model, mesh))
        return prepare_inference_model(model, mesh, vocab_size=vocab_size)


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Returns prompts of these lengths with random tokens."""
    return [np.random.default_rng((seed, i)).integers(0, VOCAB_SIZE, n).tolist() for i, n in enumerate(lengths)]


def make_answer(prompt: Sequence[int], limit: int, *, key: str = "", sample: int = 0, seed: int = 0) -> Answer:
    """Returns an answer that waits, with the random key of the local engine."""
    return Answer(key, list(prompt), random_key(prompt, sample, seed), limit)


def generate(
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig = GREEDY,
    *,
    limits: Sequence[int] | int = 16,
    samples: Sequence[int] | int = 0,
    seed: int = 0,
    slots: int = 8,
    model: InferenceModel | None = None,
    stop: Sequence[int] = (),
) -> list[Generated]:
    """Returns the answer to each prompt, in the order of the prompts."""
    limits, samples = ([x] * len(prompts) if isinstance(x, int) else x for x in (limits, samples))
    answers = [
        make_answer(prompt, limit, key=str(index), sample=sample, seed=seed)
        for index, (prompt, limit, sample) in enumerate(zip(prompts, limits, samples, strict=True))
    ]
    stop_conditions = StopConditions(tuple(stop))
    finished = {
        answer.key: Generated(list(answer.generated), reason)
        for answer, reason in generate_tokens(
            model or prepared_model(), answers, sampling, num_slots=slots, stop=stop_conditions
        )
    }
    return [finished[answer.key] for answer in answers]


@jax.jit
def _all_logits(model: Transformer, tokens_T: jax.Array, length: jax.Array) -> jax.Array:
    indices_T = jnp.arange(tokens_T.size)
    positions = TokenPositions((indices_T < length).astype(jnp.int32)[None], indices_T[None])
    return model(tokens_T[None], positions)[0] @ model.lm_head()


def forward_logits(tokens: Sequence[int], arch: Architecture = ARCH) -> np.ndarray:
    """Returns the logits [T, VOCAB_SIZE] after each token, from a forward pass of the training model."""
    padded = np.zeros(-(-len(tokens) // 128) * 128, np.int32)
    padded[: len(tokens)] = tokens
    logits_TV = _all_logits(MODEL(arch), jnp.array(padded), jnp.array(len(tokens)))
    return np.asarray(logits_TV)[: len(tokens), :VOCAB_SIZE]


class Chunk(NamedTuple):
    """A call of the decoding program."""

    slots: int
    tokens: int  # that all slots got together
    steps: int
    pages: int  # of the cache


def record_chunks(monkeypatch: pytest.MonkeyPatch) -> list[Chunk]:
    """Returns a list to which each call of the decoding program is added."""
    chunks: list[Chunk] = []

    def decode_and_record(weights: Any, pools: Pools, *args: Any, **kwargs: Any) -> tuple[jax.Array, Pools]:
        pages = pools[0][0].shape[1]
        output, pools = decode_chunk(weights, pools, *args, **kwargs)
        is_token_SI = np.asarray(output) >= 0
        chunks.append(Chunk(len(output), int(is_token_SI.sum()), int(is_token_SI.any(axis=0).sum()), pages))
        return output, pools

    monkeypatch.setattr(token_generation, "decode_chunk", decode_and_record)
    return chunks
