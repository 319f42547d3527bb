"""Compares the kernels of a device with float32: attention, log-probs without logits, and ten ThinkPO updates.

An error is the norm of the difference divided by the norm of the float32 result, over real tokens. Inputs are rounded
first, so both sides read the same numbers. The limits are about four times what blockwise attention has on a CPU.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thinkpo_jax.bench.workload import END_ID, LengthDistribution, draw_pairs, to_examples, write_model_config
from thinkpo_jax.data.batches import BatchConfig, BatchPlan
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.attention.dispatch import AttentionKernel, packed_attention, select_kernel
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.weight_loading import init_model
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import PreferenceConfig, make_thinkpo_objective
from thinkpo_jax.training.optimizer import OptimizerConfig, make_optimizer
from thinkpo_jax.training.reference_log_probs import compute_reference
from thinkpo_jax.training.token_log_probs import token_log_probs
from thinkpo_jax.training.train_step import init_train_state, make_train_step

HEADS = ((28, 4), (16, 2), (12, 2), (9, 3), (32, 8))  # query and key/value heads
HEAD_WIDTHS = (128, 64)
MAX_SEGMENTS = 16
ATTENTION_LIMITS = {"bfloat16": 1e-2, "float16": 1.5e-3}
LOG_PROB_LIMITS = {"log_probs (nats)": 1e-3, "gradient of hidden states": 1e-2, "gradient of the head": 1e-2}
FIRST_LOSS_LIMIT, UPDATES_LIMIT = 5e-3, 1e-2  # from ln 2, and between the losses of both dtypes
NUM_UPDATES = 10


@dataclass(frozen=True)
class AttentionCase:
    """One comparison of an attention kernel with float32."""

    kernel: AttentionKernel
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    length: int

    @property
    def title(self) -> str:
        """The name of the case in tables."""
        return f"{self.kernel}, heads {self.num_heads}/{self.num_kv_heads} of width {self.head_dim}, {self.dtype}"


def measure_numerics(folder: str, seconds: float, *, is_small: bool = False) -> Iterator[dict[str, Any]]:
    """Yields all comparisons so far as rows: what, error, limit, and whether it is within.

    Attention that is not compared within `seconds` seconds is counted in `num_skipped`. `kernel` names the kernel of
    the device, and `kernel_problem` says why there is none. `folder` gets the config.json of the trained model.
    """
    end = time.monotonic() + seconds
    kernel, problem = device_kernel()
    cases = list(attention_cases(kernel, is_small=is_small))
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(8) as pool:  # XLA compiles several programs at once
        compared = [pool.submit(compare_attention, case) for case in cases]

        def result() -> dict[str, Any]:
            done = [each for each in zip(cases, compared, strict=True) if each[1].done() and not each[1].cancelled()]
            known = {"kernel": kernel, "kernel_problem": problem, "num_skipped": len(cases) - len(done)}
            return known | {"rows": rows + [_attention_row(*each) for each in done]}

        updates = functools.partial(compare_updates, kernel or "blockwise", Path(folder), is_small=is_small)
        for name, compare in (
            ("ThinkPO updates", updates),
            ("log-probs", functools.partial(compare_log_probs, is_small=is_small)),
        ):
            try:
                rows += compare()
            except Exception as error:  # a failure is a result
                rows.append({"what": name, **_problem(error)})
            yield result()
        wait(compared, timeout=max(0.0, end - time.monotonic()))
        yield result()
        pool.shutdown(cancel_futures=True)
    yield result()


def _attention_row(case: AttentionCase, future: Future[dict[str, float]]) -> dict[str, Any]:
    row = {"what": case.title, **asdict(case)}
    if error := future.exception():
        return row | _problem(error)
    errors, limit = future.result(), ATTENTION_LIMITS[case.dtype]
    return row | {"errors": errors, "limit": limit, "within": all(error <= limit for error in errors.values())}


def _problem(error: BaseException) -> dict[str, Any]:
    return {"problem": f"{type(error).__name__}: {error}".splitlines()[0][:300], "within": False}


def device_kernel() -> tuple[AttentionKernel | None, str]:
    """Returns the attention kernel that is made for the first device, or None and the reason."""
    device, options = jax.devices()[0], {"head_dim": 128, "context": 1, "lengths": [1024]}
    kernel = select_kernel("auto", device, dtype="bfloat16", **options)
    return (None, f"there is no special kernel for {device.device_kind}") if kernel == "blockwise" else (kernel, "")


def attention_cases(kernel: AttentionKernel | None, *, is_small: bool) -> Iterator[AttentionCase]:
    """Yields the comparisons in order of value: the device's kernel in bfloat16, then in float16, then blockwise."""
    length, heads = (384, HEADS[3:4]) if is_small else (1024, HEADS)
    dtypes = ("bfloat16",) if kernel == "splash" else ("bfloat16", "float16")  # a TPU computes nothing in float16
    for name, dtype in itertools.product((kernel, "blockwise"), dtypes):
        if name is not None:
            for width, (num_heads, num_kv_heads) in itertools.product(HEAD_WIDTHS, heads):
                yield AttentionCase(name, dtype, num_heads, num_kv_heads, width, length)


def _segment_lengths(length: int) -> np.ndarray:
    """Returns the lengths of the segments of `packed_rows`, [4, MAX_SEGMENTS]."""
    rng = np.random.default_rng(0)
    lengths = np.zeros((4, MAX_SEGMENTS), np.int32)
    lengths[0, 0] = length
    for row, count in ((1, MAX_SEGMENTS), (2, 3)):
        cuts = np.sort(rng.choice(np.arange(1, length - length // 16), count, replace=False))
        lengths[row, :count] = np.diff(cuts, prepend=0)
    return lengths


def packed_rows(length: int) -> TokenPositions:
    """Returns four rows: one segment, sixteen with padding, three with padding, and an empty one."""
    lengths = _segment_lengths(length)
    segment_ids, positions = np.zeros((2, len(lengths), length), np.int32)
    for row, counts in enumerate(lengths):
        start = 0
        for number, count in enumerate(counts, 1):
            segment_ids[row, start : start + count] = number if count else 0
            positions[row, start : start + count] = np.arange(count)
            start += count
    return TokenPositions(*map(jnp.asarray, (segment_ids, positions, lengths)))


@functools.partial(jax.jit, static_argnames="kernel")
def _attend(arrays: tuple[jax.Array, ...], rows: TokenPositions, *, kernel: AttentionKernel) -> tuple[jax.Array, ...]:
    """Returns output, dq, dk and dv, given q, k, v and the gradient of the output."""
    *inputs, dout = arrays
    out, pull = jax.vjp(lambda q, k, v: packed_attention(q, k, v, rows, kernel), *inputs)
    return out, *pull(dout)


def compare_attention(case: AttentionCase) -> dict[str, float]:
    """Returns the errors of output, dq, dk and dv."""
    rows = packed_rows(case.length)
    is_real = rows.segment_ids > 0
    keys = jax.random.split(jax.random.key(case.head_dim + case.num_heads), 4)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    shapes = [(len(is_real), case.length, count, case.head_dim) for count in heads]
    q, k, v, dout = (jax.random.normal(key, shape).astype(case.dtype) for key, shape in zip(keys, shapes, strict=True))
    arrays = (q, k, v, jnp.where(is_real[..., None, None], dout, 0))
    tested = _attend(arrays, rows, kernel=case.kernel)
    with jax.default_matmul_precision("highest"):
        exact = _attend(tuple(array.astype(jnp.float32) for array in arrays), rows, kernel="reference")
    pairs = zip(("output", "dq", "dk", "dv"), tested, exact, strict=True)
    return {name: relative_error(a, b, is_real[..., None, None]) for name, a, b in pairs}


def relative_error(tested: jax.Array, exact: jax.Array, where: jax.Array | bool = True) -> float:
    """Returns the norm of the difference divided by that of `exact`, both where a mask is true.

    If a number of `tested` is not finite, inside the mask or not, returns infinity.
    """
    if not bool(jnp.isfinite(tested).all()):
        return math.inf
    tested, exact = (jnp.where(where, array.astype(jnp.float32), 0) for array in (tested, exact))
    return float(jnp.linalg.norm((tested - exact).ravel()) / jnp.linalg.norm(exact.ravel()))


def compare_log_probs(*, is_small: bool) -> list[dict[str, Any]]:
    """Compares bfloat16 log-probs without logits, and their gradients, with float32 logits of the same inputs."""
    tokens, hidden, vocab = (64, 64, 5_003) if is_small else (2048, 1536, 151_936)
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (1, tokens, hidden)).astype(jnp.bfloat16)
    head = (0.02 * jax.random.normal(keys[1], (hidden, vocab))).astype(jnp.bfloat16)
    targets = jax.random.randint(keys[2], (1, tokens), 0, vocab)
    weights = jax.random.normal(keys[3], (1, tokens))

    def dense(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(jnp.dot(x, head, precision="highest"))
        return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]

    def run(function: Callable[..., jax.Array], x: jax.Array, head: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda x, head: function(x, head, targets), x, head)
        return out, *pull(weights)

    tested = jax.jit(lambda x, head: run(token_log_probs, x, head))(x, head)
    exact = jax.jit(lambda x, head: run(dense, x, head))(x.astype(jnp.float32), head.astype(jnp.float32))
    errors = [float(jnp.abs(tested[0] - exact[0]).max())]
    errors += [relative_error(a, b) for a, b in zip(tested[1:], exact[1:], strict=True)]
    title = f"log-probs, {tokens:,} tokens, vocabulary {vocab:,}, bfloat16"
    return [
        {"what": title, "errors": {name: error}, "limit": limit, "within": error <= limit}
        for (name, limit), error in zip(LOG_PROB_LIMITS.items(), errors, strict=True)
    ]


def compare_updates(kernel: AttentionKernel, folder: Path, *, is_small: bool) -> list[dict[str, Any]]:
    """Compares the losses of ten ThinkPO updates in bfloat16 with float32, and the first one with ln 2."""
    model, length = ("tiny", 320) if is_small else ("small", 2048)
    arch = write_model_config(model, folder)
    tested = _losses(arch, ComputeConfig(dtype="bfloat16", attention=kernel), length)
    with jax.default_matmul_precision("highest"):
        exact = _losses(arch, ComputeConfig(dtype="float32", attention="blockwise"), length)
    first, difference = abs(tested[0] - math.log(2)), max(abs(a - b) for a, b in zip(tested, exact, strict=True))
    rows = (
        ("ThinkPO in bfloat16, first loss against ln 2", first, FIRST_LOSS_LIMIT),
        (f"{NUM_UPDATES} ThinkPO updates, losses in bfloat16 against float32", difference, UPDATES_LIMIT),
    )
    return [
        {"what": what, "errors": {"loss": error}, "limit": limit, "within": error <= limit, "losses": tested}
        for what, error, limit in rows
    ]


def _losses(arch: Architecture, compute: ComputeConfig, length: int) -> list[float]:
    """Returns the losses of ten updates on the same batch. They fall from ln 2 to well below it."""
    lengths = LengthDistribution((10, length / 4, length / 8), (0.3, 0.5, 0.5), (length // 8, length // 2, length // 4))
    pairs = draw_pairs(lengths, 8, max_length=length, vocab_size=arch.vocab_size, seed=0, share_length=True)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    config = BatchConfig(rows=2, row_length=length, rows_per_device=1)
    with jax.set_mesh(mesh):
        model = init_model(arch, compute, mesh, seed=0)
        batches = BatchPlan(to_examples(pairs), config, seed=0, num_shards=1, num_updates=1, epochs=1.0)
        batches.reference_log_probs = compute_reference(model, batches, mesh)
        settings = OptimizerConfig(learning_rate=3e-5, schedule="constant", warmup_ratio=0.0)
        optimizer = make_optimizer(settings, NUM_UPDATES)
        state = init_train_state(model, optimizer, mesh)
        step = make_train_step(make_thinkpo_objective(PreferenceConfig(beta=0.1), end_of_turn_id=END_ID), optimizer,
                               mesh, state)  # fmt: skip
        batch, losses = put_batch(batches[0], mesh), []
        for _ in range(NUM_UPDATES):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses
