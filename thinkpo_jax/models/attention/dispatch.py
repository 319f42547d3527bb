"""Selects the attention kernel and calls it."""

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from thinkpo_jax.models.attention import blockwise
from thinkpo_jax.models.attention.blockwise import _blockwise_part
from thinkpo_jax.models.attention.cudnn import cudnn, refusal, unsupported_jax
from thinkpo_jax.models.attention.dense import ATTENDED, Places, attend_whole
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import say, warn
from thinkpo_jax.runtime.context_parallel import balanced, chunk_starts, whole_rows
from thinkpo_jax.runtime.sharding import per_device

SPLASH_MULTIPLE = 128  # of tokens: what its blocks divide
HOPPER = 9.0  # the compute capability that cuDNN's packed rows need

ROWS = ("batch", None)
KEYS = ("batch", None, "activation_heads", None)
HEADS = ("batch", "length", "activation_heads", None)


Form = Literal["auto", "reference", "blockwise", "splash", "cudnn"]


def choose(asked: Form, device: Any, *, dtype: str, head_dim: int, context: int, lengths: Sequence[int]) -> Form:
    """The form for a device, for heads of this width and rows of these lengths; `auto` takes the device's own kernel.

    Raises `UserError` where the one that is asked for cannot be had.
    """
    kernels: dict[str, Form] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
    wanted: Form = kernels.get(device.platform, "blockwise") if asked == "auto" else asked
    refused = None
    if wanted == "splash":
        refused = _not_splash(device, context, lengths)
    elif wanted == "cudnn":
        refused = _not_cudnn(device, dtype, head_dim, context)
    if refused is None:
        return wanted
    if asked == "auto":
        tell = warn if refused == unsupported_jax() else say  # the user can change jax, but not the GPU
        tell(f"compute.attention: `auto` uses `blockwise` instead of `{wanted}`: {refused}")
        return "blockwise"
    raise UserError(f"compute.attention: {asked}: {refused} `auto` takes what there is.")


def splash_multiple(context: int) -> int:
    """Returns the number that must divide row lengths for splash attention. A device has two chunks of a split row."""
    return SPLASH_MULTIPLE * (2 * context if context > 1 else 1)


def _not_splash(device: Any, context: int, lengths: Sequence[int]) -> str | None:
    if device.platform != "tpu":
        return f"it runs on TPUs, and this is {device.device_kind}."
    whole = splash_multiple(context)
    wrong = [length for length in lengths if length % whole]
    return f"it needs a row_length that {whole} divides, not {wrong[0]}." if wrong else None


def _not_cudnn(device: Any, dtype: str, head_dim: int, context: int) -> str | None:
    if device.platform not in ("gpu", "cuda"):
        return f"it runs on NVIDIA GPUs, and this is {device.device_kind}."
    capability = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < HOPPER:
        return f"it needs a GPU of compute capability {HOPPER} (Hopper) or more, and this is {device.device_kind}."
    if context > 1:
        return f"it takes whole rows, and mesh.context is {context}."
    return refusal(jnp.dtype(dtype), head_dim)


def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rows: Places, form: Form = "auto") -> jax.Array:
    """Causal attention within the segments of packed rows, scaled by H**-0.5; [B, T, N, H] in the dtype of the queries.

    A query sees the keys of its own segment at positions up to its own. Segments must be contiguous, padding behind
    them; what padding attends to is not defined, but finite. `rows` are in their order, queries, keys and values in
    that of `sharding.balanced`, which differs where a mesh splits rows. The form is one that `choose` gives; `auto` is
    blockwise, and so is that in plain XLA for rows of up to `BLOCK` tokens at once.
    """
    if form == "cudnn":
        assert rows.lengths is not None
        part = per_device(functools.partial(cudnn, name=ATTENDED), (HEADS, HEADS, HEADS, ROWS), HEADS)
        return part(q_BTNH, k_BTKH, v_BTKH, rows.lengths)
    if form == "reference" or (form != "splash" and rows.segments.shape[1] <= blockwise.BLOCK):
        gather = per_device(whole_rows, (HEADS,), KEYS)
        queries = Places(balanced(rows.segments), balanced(rows.positions))
        return attend_whole(q_BTNH, gather(k_BTKH), gather(v_BTKH), queries, rows)
    part = per_device(_splash_part if form == "splash" else _blockwise_part, (HEADS, HEADS, HEADS, ROWS, ROWS), HEADS)
    return part(q_BTNH, k_BTKH, v_BTKH, rows.segments, rows.positions)


def _splash_part(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BS: jax.Array, _positions_BS: jax.Array
) -> jax.Array:
    """What one TPU computes: all keys of its rows for the queries that it holds."""
    from thinkpo_jax.models.attention.splash import splash

    T, starts = q_BTNH.shape[1], chunk_starts(segments_BS.shape[1])
    order_T = (starts[:, None] + jnp.arange(T // len(starts))).reshape(-1)
    segments_BT = segments_BS[:, order_T]
    return splash(q_BTNH, whole_rows(k_BTKH), whole_rows(v_BTKH), segments_BT, segments_BS, order_T, name=ATTENDED)
