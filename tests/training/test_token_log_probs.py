"""Log-probs without logits are those of a float64 softmax, whatever the vocabulary, its blocks and the mesh."""

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
from thinkpo_jax.training import token_log_probs as logprobs
from thinkpo_jax.training.token_log_probs import token_log_probs, vocab_block_width

R, D = 8, 16  # rows, width of a hidden state


class Case(NamedTuple):
    """Hidden states [R, A, D], head [D, V], targets [R, A], and the weight [R, A] of each token in the loss."""

    x: np.ndarray
    head: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


AXES = (("batch", "length", None), ("embed", "vocab"), ("batch", "length"), ("batch", "length"))


def _case(vocabulary: int, tokens: int, borders: list[int], dtype: str = "float32") -> Case:
    """Random numbers of that dtype; every one of `borders` is a target."""
    rng = np.random.default_rng(0)
    x, head = rng.normal(size=(R, tokens, D)), rng.normal(size=(D, vocabulary))
    targets = rng.integers(0, vocabulary, R * tokens)
    targets[: len(borders)] = borders
    x, head = (np.asarray(jnp.array(array, dtype)) for array in (x, head))
    return Case(x, head, targets.reshape(R, tokens), rng.normal(size=(R, tokens)).astype(np.float32))


def _loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    values = token_log_probs(x, head, targets)
    return (values * weights).sum(), values


def _both_passes(case: Case) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Log-probs, and the gradients of their weighted sum in x and in the head."""
    (_, values), gradients = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)(*map(jnp.asarray, case))
    return values, gradients


def _float64(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same in float64, but for the logits' gradient, which has the dtype of x."""
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


def _assert_equal(found: Any, expected: np.ndarray) -> None:
    """To the precision of float32; gradients that are bfloat16 to one unit in their last place."""
    rtol = 2**-7 if found.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol, atol=5e-5)


# (vocabulary, width of a block; None: the module's own choice). 4224 and 2048 leave a last block that is moved back.
VOCABULARIES = [(4224, 2048), (4224, 4224), (4225, 2048), (100, None), (257, 256)]
VOCABULARIES += [(151_936, None), (152_064, None), (128_256, None), (151_936, 8192)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("vocabulary", "width"), VOCABULARIES)
def test_values_and_gradients_equal_float64(
    vocabulary: int, width: int | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if width is not None:
        monkeypatch.setattr(logprobs, "vocab_block_width", lambda tokens, vocabulary: width)
    width = width or vocab_block_width(R * 3, vocabulary)
    # The borders of blocks, where a column is easily counted twice or not at all.
    starts = [*range(0, vocabulary - width, width), vocabulary - width]
    borders = [0, vocabulary - 1, width - 1, *starts[-2:], max(starts[-1] - 1, 0), min(starts[-1] + 1, vocabulary - 1)]
    case = _case(vocabulary, 3, borders, dtype)
    values, (x_gradient, head_gradient) = _both_passes(case)
    assert (values.dtype, x_gradient.dtype, head_gradient.dtype) == (jnp.float32, dtype, dtype)
    for found, expected in zip((values, x_gradient, head_gradient), _float64(case), strict=True):
        _assert_equal(found, expected)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 8}])
@pytest.mark.parametrize("vocabulary", [4224, 5000])
def test_zero_hidden_states_give_minus_ln_of_the_vocabulary(
    vocabulary: int, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "vocab_block_width", lambda tokens, vocabulary: min(2048, vocabulary - 1))
    with jax.set_mesh(small.mesh(**sizes)):
        targets = jnp.array([[0, 5, vocabulary - 1]])
        found = jax.jit(token_log_probs)(jnp.zeros((1, 3, D)), jnp.ones((D, vocabulary)), targets)
    np.testing.assert_allclose(found, -np.log(vocabulary), rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 8192, 20_000, 32_768, 300_000])
@pytest.mark.parametrize("vocabulary", [151_936, 152_064, 128_256, 152_064 // 8, 128_256 // 4])
def test_blocks_are_as_few_and_as_even_as_memory_allows(tokens: int, vocabulary: int) -> None:
    width = vocab_block_width(tokens, vocabulary)
    count = math.ceil(vocabulary / width)
    assert width % 128 == 0
    assert width <= 8192
    assert tokens * (width - 127) <= max(2**26, tokens * 2048)
    assert count <= math.ceil(vocabulary / min(max(2**26 // tokens, 2048), 8192))
    assert count * width - vocabulary < count * 128  # what the last block reads twice


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


def _on(mesh: Mesh, case: Case, axes: tuple[tuple[str | None, ...], ...] = AXES) -> Case:
    return Case(
        *(jax.device_put(a, NamedSharding(mesh, partition_spec(axis))) for a, axis in zip(case, axes, strict=True))
    )


@functools.cache
def _on_one_device(dtype: str) -> tuple[Case, jax.Array, tuple[jax.Array, jax.Array]]:
    """A case with targets on both sides of every border between devices, and what it comes to without a mesh."""
    case = _case(4224, 3, [*range(0, 4224, 528), *range(527, 4224, 528)], dtype)
    return case, *_both_passes(case)


@pytest.mark.parametrize(("sizes", "dtype"), [*((sizes, "float32") for sizes in MESHES), (MESHES[-1], "bfloat16")])
def test_a_mesh_changes_nothing(sizes: dict[str, int], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 4224 / 8 = 528: on every mesh the last block of each device is moved back.
    monkeypatch.setattr(logprobs, "vocab_block_width", lambda tokens, vocabulary: 256)
    case, expected, (expected_x, expected_head) = _on_one_device(dtype)
    mesh = small.mesh(**sizes)
    with jax.set_mesh(mesh):
        values, (x_gradient, head_gradient) = jax.jit(_both_passes)(_on(mesh, case))
    assert head_gradient.sharding.is_equivalent_to(NamedSharding(mesh, partition_spec(("embed", "vocab"))), 2)
    assert x_gradient.sharding.is_equivalent_to(NamedSharding(mesh, partition_spec(("batch", "length", None))), 3)
    _assert_equal(values, np.asarray(expected))
    _assert_equal(x_gradient, np.asarray(expected_x, np.float64))
    # Every sum of parts that are bfloat16 rounds.
    atol = 5e-5 if dtype == "float32" else 8 * 2**-8 * float(jnp.abs(expected_head).max())
    np.testing.assert_allclose(np.asarray(head_gradient, np.float64), np.asarray(expected_head, np.float64), atol=atol)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_micro_batches_and_a_tied_head(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a tied head, summed by a scan over micro-batches, is that of all rows at once."""
    monkeypatch.setattr(logprobs, "vocab_block_width", lambda tokens, vocabulary: 256)
    case = _case(4224, 6, [0, 4223])
    expected, (expected_x, expected_head) = _both_passes(case)
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
        summed, values, dx, mapped = jax.jit(total)(*_on(mesh, halves, axes))
    _assert_equal(summed, np.asarray(expected_head).T)
    for found in (values, mapped):
        _assert_equal(found, np.asarray(expected).reshape(R, 2, 3).swapaxes(0, 1))
    _assert_equal(dx, np.asarray(expected_x).reshape(R, 2, 3, D).swapaxes(0, 1))


class Collective(NamedTuple):
    """An exchange between devices in a compiled program: its kind, elements of each result, whether in a loop."""

    kind: str
    elements: list[int]
    in_loop: bool


def _collectives(function: Callable[..., Any], *arguments: Any) -> list[Collective]:
    program = jax.jit(function).lower(*arguments).compile().as_text()
    assert program is not None
    bodies = set(re.findall(r"body=%?([\w.-]+)", program))
    found, computation = [], ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
        if match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            elements = [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
            found.append(Collective(match[2], elements, computation in bodies))
    return found


def test_three_numbers_per_token_cross_the_vocabulary_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "vocab_block_width", lambda tokens, vocabulary: 256)
    case = _case(4224, 50, [])
    mesh = small.mesh(data=2, fsdp=2, tensor=2)
    tokens, part_of_head = R * 50 // 4, D * 4224 // 2  # on one device, its embed axis gathered
    with jax.set_mesh(mesh):
        x, head, targets, _ = _on(mesh, case)
        forward = _collectives(token_log_probs, x, head, targets)
        both = _collectives(_both_passes, _on(mesh, case))
    assert not any(collective.in_loop for collective in forward + both)
    assert [found.elements for found in forward if found.kind == "all-gather"] == [[part_of_head]]
    reduced = [size for found in forward if found.kind == "all-reduce" for size in found.elements]
    assert reduced == [tokens] * 3  # the maximum, the total, the target's logit
    assert {found.kind for found in forward} == {"all-gather", "all-reduce"}
    # The backward pass adds the gradients; nothing is near tokens x vocabulary, 25 times the head here.
    assert max(size for found in both for size in found.elements) == part_of_head
