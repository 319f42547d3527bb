"""Compares blockwise token log-probs and their gradients with a float64 softmax.

The results must not depend on the vocabulary size, the block width or the mesh.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from support import small

from thinkpo_jax.runtime.sharding import partition_spec
from thinkpo_jax.training import token_log_probs as log_probs_module
from thinkpo_jax.training.token_log_probs import token_log_probs, vocab_block_width

R, D = 8, 16  # rows, hidden size


class Case(NamedTuple):
    """Hidden states [R, A, D], head [D, V], targets [R, A], and the loss weight [R, A] of each token."""

    x: np.ndarray
    head: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


AXES = (("batch", "length", None), ("embed", "vocab"), ("batch", "length"), ("batch", "length"))


def _case(vocabulary: int, tokens: int, edge_targets: list[int], dtype: str = "float32") -> Case:
    """Random numbers of that dtype. Each of `edge_targets` occurs as a target."""
    rng = np.random.default_rng(0)
    x, head = rng.normal(size=(R, tokens, D)), rng.normal(size=(D, vocabulary))
    targets = rng.integers(0, vocabulary, R * tokens)
    targets[: len(edge_targets)] = edge_targets
    x, head = (np.asarray(jnp.array(array, dtype)) for array in (x, head))
    return Case(x, head, targets.reshape(R, tokens), rng.normal(size=(R, tokens)).astype(np.float32))


def _loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    values = token_log_probs(x, head, targets)
    return (values * weights).sum(), values


def _values_and_gradients(case: Case) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the log-probs and the gradients of their weighted sum with respect to x and the head."""
    (_, values), gradients = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)(*map(jnp.asarray, case))
    return values, gradients


def _float64_reference(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the same in float64. Only the gradient of the logits is rounded to the dtype of x."""
    x, head = case.x.astype(np.float64).reshape(-1, D), case.head.astype(np.float64)
    targets, weights = case.targets.ravel(), case.weights.ravel()
    logits = x @ head
    logits -= logits.max(axis=-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    tokens = np.arange(len(targets))
    gradient = -probabilities * weights[:, None]
    gradient[tokens, targets] += weights
    gradient = gradient.astype(case.x.dtype).astype(np.float64)
    values = np.log(probabilities[tokens, targets])
    return values.reshape(case.targets.shape), (gradient @ head.T).reshape(case.x.shape), x.T @ gradient


def _assert_close(actual: Any, expected: np.ndarray) -> None:
    """Compares to the precision of float32, or to one unit in the last place of bfloat16."""
    rtol = 2**-7 if actual.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=5e-5)


# (vocabulary, block width). None lets the package choose. 4224 is no multiple of 2048, so the last block is moved back
# and overlaps the one before it.
VOCABULARIES = [(4224, 2048), (4224, 4224), (4225, 2048), (100, None), (257, 256)]
VOCABULARIES += [(151_936, None), (152_064, None), (128_256, None), (151_936, 8192)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("vocabulary", "width"), VOCABULARIES)
def test_values_and_gradients_equal_float64(
    vocabulary: int, width: int | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if width is not None:
        monkeypatch.setattr(log_probs_module, "vocab_block_width", lambda tokens, vocabulary: width)
    width = width or vocab_block_width(R * 3, vocabulary)
    # At block edges, a mistake would count a column twice or not at all.
    starts = [*range(0, vocabulary - width, width), vocabulary - width]
    edge_targets = [
        0,
        vocabulary - 1,
        width - 1,
        *starts[-2:],
        max(starts[-1] - 1, 0),
        min(starts[-1] + 1, vocabulary - 1),
    ]
    case = _case(vocabulary, 3, edge_targets, dtype)
    values, (x_gradient, head_gradient) = _values_and_gradients(case)
    assert (values.dtype, x_gradient.dtype, head_gradient.dtype) == (jnp.float32, dtype, dtype)
    for actual, expected in zip((values, x_gradient, head_gradient), _float64_reference(case), strict=True):
        _assert_close(actual, expected)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 8}])
@pytest.mark.parametrize("vocabulary", [4224, 5000])
def test_zero_hidden_states_give_minus_log_vocabulary_size(
    vocabulary: int, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs_module, "vocab_block_width", lambda tokens, vocabulary: min(2048, vocabulary - 1))
    with jax.set_mesh(small.mesh(**sizes)):
        targets = jnp.array([[0, 5, vocabulary - 1]])
        log_probs = jax.jit(token_log_probs)(jnp.zeros((1, 3, D)), jnp.ones((D, vocabulary)), targets)
    np.testing.assert_allclose(log_probs, -np.log(vocabulary), rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 8192, 20_000, 32_768, 300_000])
@pytest.mark.parametrize("vocabulary", [151_936, 152_064, 128_256, 152_064 // 8, 128_256 // 4])
def test_blocks_are_as_few_and_as_even_as_the_memory_limit_allows(tokens: int, vocabulary: int) -> None:
    width = vocab_block_width(tokens, vocabulary)
    num_blocks = math.ceil(vocabulary / width)
    assert width % 128 == 0
    assert width <= 8192
    assert tokens * (width - 127) <= max(2**26, tokens * 2048)
    assert num_blocks <= math.ceil(vocabulary / min(max(2**26 // tokens, 2048), 8192))
    assert num_blocks * width - vocabulary < num_blocks * 128  # columns that the last block reads twice


def test_a_small_vocabulary_is_one_block() -> None:
    assert vocab_block_width(10, 64) == 64


MESHES: list[dict[str, int]] = [
    {"tensor": 2},
    {"tensor": 4},
    {"tensor": 8},
    {"fsdp": 8},
    {"data": 8},
    {"data": 2, "tensor": 4},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


def _put_on_mesh(mesh: Mesh, case: Case, axes: tuple[tuple[str | None, ...], ...] = AXES) -> Case:
    return Case(
        *(jax.device_put(a, NamedSharding(mesh, partition_spec(axis))) for a, axis in zip(case, axes, strict=True))
    )


@functools.cache
def _one_device_result(dtype: str) -> tuple[Case, jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns a case with targets on both sides of every edge between devices, and its results on one device."""
    case = _case(4224, 3, [*range(0, 4224, 528), *range(527, 4224, 528)], dtype)
    return case, *_values_and_gradients(case)


@pytest.mark.parametrize(("sizes", "dtype"), [*((sizes, "float32") for sizes in MESHES), (MESHES[-1], "bfloat16")])
def test_every_mesh_gives_the_values_and_gradients_of_one_device(
    sizes: dict[str, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each device has at least 4224 / 8 = 528 columns. No share is a multiple of 256, so each last block is moved back.
    monkeypatch.setattr(log_probs_module, "vocab_block_width", lambda tokens, vocabulary: 256)
    case, expected, (expected_x, expected_head) = _one_device_result(dtype)
    mesh = small.mesh(**sizes)
    with jax.set_mesh(mesh):
        values, (x_gradient, head_gradient) = jax.jit(_values_and_gradients)(_put_on_mesh(mesh, case))
    assert head_gradient.sharding.is_equivalent_to(NamedSharding(mesh, partition_spec(("embed", "vocab"))), 2)
    assert x_gradient.sharding.is_equivalent_to(NamedSharding(mesh, partition_spec(("batch", "length", None))), 3)
    _assert_close(values, np.asarray(expected))
    _assert_close(x_gradient, np.asarray(expected_x, np.float64))
    # Each sum of bfloat16 partial gradients rounds.
    atol = 5e-5 if dtype == "float32" else 8 * 2**-8 * float(jnp.abs(expected_head).max())
    np.testing.assert_allclose(np.asarray(head_gradient, np.float64), np.asarray(expected_head, np.float64), atol=atol)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_micro_batches_with_a_tied_head_equal_one_batch(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan over micro-batches sums the gradient of a tied head. The sum equals the gradient of all rows at once."""
    monkeypatch.setattr(log_probs_module, "vocab_block_width", lambda tokens, vocabulary: 256)
    case = _case(4224, 6, [0, 4223])
    expected, (expected_x, expected_head) = _values_and_gradients(case)
    mesh = small.mesh(**sizes)
    x, targets, weights = (
        array.reshape(R, 2, 3, *array.shape[2:]).swapaxes(0, 1) for array in (case.x, case.targets, case.weights)
    )
    halves = Case(x, case.head.T, targets, weights)
    x_axes, _, token_axes, _ = (("micro_batch", *axes) for axes in AXES)
    axes = (x_axes, ("vocab", "embed"), token_axes, token_axes)

    def loss(x: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
        return _loss(x, embedding.T, targets, weights)

    def total(x: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
        def body(total: jax.Array, rows: tuple) -> tuple:
            x, targets, weights = rows
            gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (_, values), (dx, d_embedding) = gradient(x, embedding, targets, weights)
            return total + d_embedding, (values, dx)

        summed, (values, dx) = jax.lax.scan(body, jnp.zeros_like(embedding), (x, targets, weights))
        mapped = jax.lax.map(lambda rows: loss(rows[0], embedding, *rows[1:])[1], (x, targets, weights))
        return summed, values, dx, mapped

    with jax.set_mesh(mesh):
        summed, values, dx, mapped = jax.jit(total)(*_put_on_mesh(mesh, halves, axes))
    _assert_close(summed, np.asarray(expected_head).T)
    for log_probs in (values, mapped):
        _assert_close(log_probs, np.asarray(expected).reshape(R, 2, 3).swapaxes(0, 1))
    _assert_close(dx, np.asarray(expected_x).reshape(R, 2, 3, D).swapaxes(0, 1))


class Collective(NamedTuple):
    """A collective in a compiled program, with the number of elements of each result."""

    kind: str
    elements: list[int]
    in_loop: bool


def _collectives(function: Callable[..., Any], *arguments: Any) -> list[Collective]:
    program = jax.jit(function).lower(*arguments).compile().as_text()
    assert program is not None
    bodies = set(re.findall(r"body=%?([\w.-]+)", program))
    collectives, computation = [], ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
        if match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            elements = [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
            collectives.append(Collective(match[2], elements, computation in bodies))
    return collectives


def test_the_forward_pass_reduces_three_numbers_per_token_over_the_tensor_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs_module, "vocab_block_width", lambda tokens, vocabulary: 256)
    case = _case(4224, 50, [])
    mesh = small.mesh(data=2, fsdp=2, tensor=2)
    tokens, head_shard = R * 50 // 4, D * 4224 // 2  # sizes on one device, with the embed axis of the head gathered
    with jax.set_mesh(mesh):
        x, head, targets, _ = _put_on_mesh(mesh, case)
        forward = _collectives(token_log_probs, x, head, targets)
        both = _collectives(_values_and_gradients, _put_on_mesh(mesh, case))
    assert not any(collective.in_loop for collective in forward + both)
    assert [collective.elements for collective in forward if collective.kind == "all-gather"] == [[head_shard]]
    reduced = [size for collective in forward if collective.kind == "all-reduce" for size in collective.elements]
    assert reduced == [tokens] * 3  # the maximum, the sum of exponentials and the logit of the target
    assert {collective.kind for collective in forward} == {"all-gather", "all-reduce"}
    # The backward pass also exchanges gradients. An array of tokens x vocabulary would be 25 times the head.
    assert max(size for collective in both for size in collective.elements) == head_shard
