"""Inputs for tests of attention kernels, and helpers that count and compile the kernels."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.planning.compile import ENVIRONMENT

HEAD_DIM = 8
Inputs = tuple[jax.Array, jax.Array, jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def packed_positions(lengths: Sequence[Sequence[int]], row_length: int) -> TokenPositions:
    """Returns rows of segments 1, 2, ... with the given lengths and padding at the end."""
    segments, positions = np.zeros((2, len(lengths), row_length), np.int32)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for segment, length in enumerate(row_lengths, 1):
            segments[row, start : start + length] = segment
            positions[row, start : start + length] = np.arange(length)
            start += length
    return TokenPositions(jnp.array(segments), jnp.array(positions))


def random_inputs(
    rows: int, queries: int, keys: int, *, heads: int = 4, kv_heads: int = 2, dtype: str = "float32"
) -> Inputs:
    """Returns random queries, keys and values."""
    rng = np.random.default_rng(0)
    shapes = ((rows, queries, heads, HEAD_DIM), (rows, keys, kv_heads, HEAD_DIM), (rows, keys, kv_heads, HEAD_DIM))
    q, k, v = (jnp.array(rng.normal(size=shape), dtype) for shape in shapes)
    return q, k, v


def iterate_equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations of a program, also those of inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from iterate_equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from iterate_equations(inner.jaxpr)


def attention_kernel_calls(attend: Attend, saved_names: tuple[str, ...]) -> list[str]:
    """Returns the kernels that both passes call if remat saves the values with these names."""
    inputs = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sin(attend(jnp.tanh(q), k, v).astype(jnp.float32)).sum()

    policy = jax.checkpoint_policies.save_only_these_names(*saved_names)
    program = jax.make_jaxpr(jax.grad(jax.checkpoint(total, policy=policy), argnums=(0, 1, 2)))(*inputs)
    names = [str(equation.params.get("name", equation.primitive)) for equation in iterate_equations(program.jaxpr)]
    return [name for name in names if name.startswith(("splash_mha", "dot_product_attention"))]


def compile_in_child(file: str, arguments: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    """Runs a test file as a program with the environment of a planned compilation. Returns the JSON lines it prints."""
    result = subprocess.run(
        [sys.executable, file, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT | environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def compile_attention(
    device: Any, attend: Callable[..., jax.Array], arrays: dict[str, tuple[tuple[int, ...], Any]]
) -> Any:
    """Compiles both passes of attention. The first three arrays (shape, dtype) are queries, keys and values."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arrays.values()]

    def total(weights: jax.Array, *inputs: jax.Array) -> jax.Array:
        return (attend(*inputs) * weights).astype(jnp.float32).sum()

    return jax.jit(jax.grad(total, argnums=(1, 2, 3))).lower(shapes[0], *shapes).compile()
