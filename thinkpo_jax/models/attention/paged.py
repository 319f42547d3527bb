"""The paged KV cache of one layer: writes of new tokens and prompts, and decode attention over the pages of each slot.

A pool holds pages of a fixed number of tokens. The page table lists the pages of each slot in the order of its tokens
(arXiv 2309.06180). Attention reads only the pages that a slot holds. Page 0 belongs to no request. Idle slots and
padding write there.

| kernel       | devices                                       | implementation                      |
|--------------|-----------------------------------------------|-------------------------------------|
| `loop`       | CPU                                           | plain XLA, one slot after the other |
| `batched`    | all                                           | plain XLA, all slots at once        |
| `pallas_tpu` | TPU                                           | `paged_attention` of jax (Mosaic)   |
| `pallas_gpu` | NVIDIA GPU, compute capability >= 8, bfloat16 | `paged_attention` of jax (Triton)   |

Letters: S slots, N query heads, K key/value heads, G = N / K, H head width, P pages in the pool, C tokens of a page,
M pages that a slot can hold, R prompts, T tokens of a prompt.
"""

import importlib.util
import re
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from thinkpo_jax.models.attention.blockwise import MASKED_SCORE
from thinkpo_jax.runtime.integers import round_up
from thinkpo_jax.runtime.sharding import shard_map_by_axes

PAGE_SIZE = 64  # tokens. Larger pages waste more of a slot's last page, and prompts are padded to whole pages.
MIN_COMPUTE_CAPABILITY = 8.0  # of NVIDIA GPUs, for bfloat16 in Triton
TPU_LANES = 128  # the head width in the cache must be a multiple of it
TPU_BLOCK_TOKENS = 512  # keys that the TPU kernel loads and computes at once
GPU_BLOCK_TOKENS = 128  # keys that the GPU kernel loads and computes at once
GPU_KERNEL_MODULE = "jax.experimental.pallas.ops.gpu.paged_attention"
MAX_GPU_SPLITS = 16  # parts of a slot's keys that the GPU kernel computes in parallel

QUERY_AXES = ("batch", "activation_heads", None)
KEY_VALUE_AXES = ("batch", "kv_heads", None)
PROMPT_AXES = ("batch", None, "kv_heads", None)
TABLE_AXES = ("batch", None)

PagedKernel = Literal["loop", "batched", "pallas_tpu", "pallas_gpu"]


def select_paged_kernel(device: Any, *, head_dim: int, dtype: Any) -> PagedKernel:
    """Returns the fastest kernel for a device (or its stand-in), and for heads of this width and dtype."""
    if device.platform == "cpu":
        return "loop"
    if device.platform == "tpu":
        return "pallas_tpu"
    capability = str(getattr(device, "compute_capability", "")) if device.platform in ("gpu", "cuda") else ""
    is_new_nvidia = bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= MIN_COMPUTE_CAPABILITY
    is_power_of_two = head_dim >= 16 and head_dim & (head_dim - 1) == 0  # Triton has no other block sizes
    # The kernel sums outputs in the dtype of the queries. In float16 they could overflow.
    is_supported = is_new_nvidia and is_power_of_two and jnp.dtype(dtype) == jnp.bfloat16
    return "pallas_gpu" if is_supported and _has_gpu_kernel() else "batched"


def _has_gpu_kernel() -> bool:
    """Returns whether this jax has the kernel, which is deprecated since jax 0.11."""
    try:
        return importlib.util.find_spec(GPU_KERNEL_MODULE) is not None
    except ModuleNotFoundError:  # a package above it is gone
        return False


def pool_heads(kernel: PagedKernel, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Returns the number and the width of the heads of a pool.

    The TPU kernel only takes widths that are multiples of 128, so narrower heads are padded. The kernels in plain XLA
    join all heads to one.
    """
    if kernel in ("loop", "batched"):
        return 1, num_kv_heads * head_dim
    return num_kv_heads, round_up(head_dim, TPU_LANES) if kernel == "pallas_tpu" else head_dim


def pool_axes(kernel: PagedKernel) -> tuple[str | None, ...]:
    """Returns the logical axes of a pool [K, P, C, H]. Pages are split over the data axes and heads over `tensor`."""
    is_joined = kernel in ("loop", "batched")
    return (None, "batch", None, "kv_heads") if is_joined else ("kv_heads", "batch", None, None)


def pool_dtype(kernel: PagedKernel, dtype: Any) -> Any:
    """Returns the dtype of the pools for a model that computes in `dtype`.

    XLA on CPU would convert whole pools of bfloat16 to float32 in each step. The TPU kernel rounds keys and values to
    bfloat16, as matrix products of float32 arrays do on TPUs by default.
    """
    dtypes: dict[PagedKernel, Any] = {"loop": jnp.float32, "pallas_tpu": jnp.bfloat16}
    return jnp.dtype(dtypes.get(kernel, dtype))


def append_and_attend(
    q_SNH: Array,
    k_SKH: Array,
    v_SKH: Array,
    k_KPCH: Array,
    v_KPCH: Array,
    positions_S: Array,
    pages_SM: Array,
    kernel: PagedKernel,
) -> tuple[Array, Array, Array]:
    """Writes the new token of each slot to the pools, and attends to the slot's tokens up to the new one.

    Returns outputs [S, N, H] and the pools. On a mesh, slots and pages are split over the data axes and heads over the
    tensor axis. Page tables then index the pages of the same shard, and page 0 of each shard belongs to no request.
    """

    def decode_on_device(*arrays: Array) -> tuple[Array, Array, Array]:
        q_SNH, k_SKH, v_SKH, k_KPCH, v_KPCH, positions_S, pages_SM = arrays
        k_KPCH, v_KPCH = append_tokens(k_KPCH, v_KPCH, k_SKH, v_SKH, positions_S, pages_SM)
        return paged_attention(q_SNH, k_KPCH, v_KPCH, positions_S + 1, pages_SM, kernel), k_KPCH, v_KPCH

    pools = (pool_axes(kernel), pool_axes(kernel))
    in_axes = (QUERY_AXES, KEY_VALUE_AXES, KEY_VALUE_AXES, *pools, ("batch",), TABLE_AXES)
    decode = shard_map_by_axes(decode_on_device, in_axes, (QUERY_AXES, *pools))
    return decode(q_SNH, k_SKH, v_SKH, k_KPCH, v_KPCH, positions_S, pages_SM)


def write_prompts(
    k_KPCH: Array, v_KPCH: Array, k_RTKH: Array, v_RTKH: Array, pages_RM: Array, kernel: PagedKernel
) -> tuple[Array, Array]:
    """Writes prompts as whole pages and returns the pools. T must be a multiple of C.

    Token t of row r goes to page `pages_RM[r, t // C]`. Pages of padding have the entry 0. On a mesh, prompts are split
    like the slots of `append_and_attend`.
    """

    def write_on_device(*arrays: Array) -> tuple[Array, Array]:
        k_KPCH, v_KPCH, k_RTKH, v_RTKH, pages_RM = arrays
        (K, _, C, H), T = k_KPCH.shape, k_RTKH.shape[1]
        assert T % C == 0, f"Prompts of {T} tokens do not fill whole pages of {C} tokens."
        pages = pages_RM[:, : T // C].reshape(-1)
        k_KXCH, v_KXCH = (
            jnp.moveaxis(_to_pool_heads(x_RTKH, K, H).reshape(-1, C, K, H).astype(k_KPCH.dtype), 2, 0)
            for x_RTKH in (k_RTKH, v_RTKH)
        )
        return k_KPCH.at[:, pages].set(k_KXCH), v_KPCH.at[:, pages].set(v_KXCH)

    pools = (pool_axes(kernel), pool_axes(kernel))
    write = shard_map_by_axes(write_on_device, (*pools, PROMPT_AXES, PROMPT_AXES, TABLE_AXES), pools)
    return write(k_KPCH, v_KPCH, k_RTKH, v_RTKH, pages_RM)


def append_tokens(
    k_KPCH: Array, v_KPCH: Array, k_SKH: Array, v_SKH: Array, positions_S: Array, pages_SM: Array
) -> tuple[Array, Array]:
    """Writes one token per slot at its position and returns the pools. Called on each device's part of the arrays."""
    K, P, C, H = k_KPCH.shape
    page_S = jnp.take_along_axis(pages_SM, (positions_S // C)[:, None], axis=1)[:, 0]
    row_KS = jnp.arange(K)[:, None] * (P * C) + page_S * C + positions_S % C

    def write_rows(pool_KPCH: Array, x_SKH: Array) -> Array:
        rows_KSH = _to_pool_heads(x_SKH, K, H).swapaxes(0, 1).astype(pool_KPCH.dtype)
        # Rows of one axis, because XLA for TPUs changes the layout of a whole pool to write several heads at once.
        return pool_KPCH.reshape(-1, H).at[row_KS].set(rows_KSH).reshape(pool_KPCH.shape)

    return write_rows(k_KPCH, k_SKH), write_rows(v_KPCH, v_SKH)


def paged_attention(
    q_SNH: Array, k_KPCH: Array, v_KPCH: Array, lengths_S: Array, pages_SM: Array, kernel: PagedKernel
) -> Array:
    """Computes attention of one query per slot to the slot's first `lengths_S` tokens, scaled by H**-0.5.

    Lengths are at least 1. Pools must be finite everywhere, because masked tokens are multiplied by 0. The softmax is
    in float32, and outputs have the dtype of the queries. With `loop`, the bits of a slot's output do not depend on
    other slots, M or the choice of pages. Called on each device's part of the arrays.
    """
    if kernel == "pallas_tpu":
        return _tpu_attention(q_SNH, k_KPCH, v_KPCH, lengths_S, pages_SM)
    if kernel == "pallas_gpu":
        return _gpu_attention(q_SNH, k_KPCH, v_KPCH, lengths_S, pages_SM)

    def attend_slot(slot: tuple[Array, Array, Array]) -> Array:
        return _attend_slot(*slot, k_KPCH[0], v_KPCH[0])

    slots = (q_SNH, lengths_S, pages_SM)
    # All slots at once would gather pages, which is many times slower on CPU than to slice one page after the other.
    return jax.lax.map(attend_slot, slots) if kernel == "loop" else jax.vmap(attend_slot)(slots)


def _attend_slot(q_NH: Array, length: Array, pages_M: Array, k_PCJ: Array, v_PCJ: Array) -> Array:
    """Computes attention of one query page by page, with a running maximum and sum (arXiv 2205.14135).

    J = K x H. Each query head is a row of J numbers that is zero outside its own key/value head. XLA on CPU multiplies
    such a matrix with a page faster than the few query heads of each key/value head.
    """
    (_, C, J), (N, H) = k_PCJ.shape, q_NH.shape
    K = J // H
    is_own_NK1 = (jnp.arange(N)[:, None] // (N // K) == jnp.arange(K))[:, :, None]
    q_NJ = jnp.where(is_own_NK1, q_NH[:, None], 0).reshape(N, J).astype(k_PCJ.dtype)

    def load_page(pool_PCJ: Array, page: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(pool_PCJ, page, keepdims=False)

    def add_page(m: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum_N, total_N, out_NJ = carry
        k_CJ, v_CJ = load_page(k_PCJ, pages_M[m]), load_page(v_PCJ, pages_M[m])
        scores_NC = jnp.einsum("NJ,CJ->NC", q_NJ, k_CJ, preferred_element_type=jnp.float32) * H**-0.5
        scores_NC = jnp.where(m * C + jnp.arange(C) < length, scores_NC, MASKED_SCORE)
        new_maximum_N = jnp.maximum(maximum_N, scores_NC.max(axis=-1))
        weights_NC, rescale_N = jnp.exp(scores_NC - new_maximum_N[:, None]), jnp.exp(maximum_N - new_maximum_N)
        values_NJ = jnp.einsum("NC,CJ->NJ", weights_NC.astype(v_CJ.dtype), v_CJ, preferred_element_type=jnp.float32)
        return new_maximum_N, total_N * rescale_N + weights_NC.sum(axis=-1), out_NJ * rescale_N[:, None] + values_NJ

    zeros_N = jnp.zeros(N, jnp.float32)
    init = (zeros_N + MASKED_SCORE, zeros_N, jnp.zeros((N, J), jnp.float32))
    _, total_N, out_NJ = jax.lax.fori_loop(0, -(-length // C), add_page, init)
    out_NH = jnp.where(is_own_NK1, out_NJ.reshape(N, K, H), 0).sum(axis=1)
    return (out_NH / total_N[:, None]).astype(q_NH.dtype)


def _tpu_attention(q_SNH: Array, k_KPCH: Array, v_KPCH: Array, lengths_S: Array, pages_SM: Array) -> Array:
    """Calls the kernel of jax for TPUs, with queries padded to the head width of the pools."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as attend

    H, M, dtype = q_SNH.shape[-1], pages_SM.shape[1], q_SNH.dtype
    block_pages = min(max(1, TPU_BLOCK_TOKENS // k_KPCH.shape[2]), M)
    # In float32, because the kernel sums outputs in the dtype of the queries.
    q_SNH = _pad_heads(q_SNH.astype(jnp.float32) * H**-0.5, k_KPCH.shape[-1])
    pages_SM = _pad_table(pages_SM, block_pages)
    out_SNH = attend(q_SNH, k_KPCH, v_KPCH, lengths_S, pages_SM, pages_per_compute_block=block_pages)
    return out_SNH[..., :H].astype(dtype)


def _gpu_attention(q_SNH: Array, k_KPCH: Array, v_KPCH: Array, lengths_S: Array, pages_SM: Array) -> Array:
    """Calls the kernel of jax for NVIDIA GPUs. It computes several parts of a slot's pages in parallel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as attend

    H, M = q_SNH.shape[-1], pages_SM.shape[1]
    block_pages = max(1, GPU_BLOCK_TOKENS // k_KPCH.shape[2])
    splits = min(MAX_GPU_SPLITS, -(-M // block_pages))
    q_SNH = (q_SNH.astype(jnp.float32) * H**-0.5).astype(q_SNH.dtype)  # bfloat16 would round the scale
    pages_SM = _pad_table(pages_SM, splits * block_pages)
    blocks = {"k_splits": splits, "pages_per_compute_block": block_pages}
    return attend(q_SNH, k_KPCH, v_KPCH, pages_SM, lengths_S, **blocks)


def _pad_table(pages_SM: Array, multiple: int) -> Array:
    """Pads the page table with page 0 to a multiple of this number of pages per slot."""
    return jnp.pad(pages_SM, ((0, 0), (0, -pages_SM.shape[1] % multiple)))


def _to_pool_heads(x: Array, num_heads: int, head_dim: int) -> Array:
    """Joins or pads the heads [..., K, H] of new keys or values to those of the pool."""
    return _pad_heads(x, head_dim) if x.shape[-2] == num_heads else x.reshape(*x.shape[:-2], num_heads, head_dim)


def _pad_heads(x: Array, head_dim: int) -> Array:
    """Pads the last axis with zeros to the head width of the pools."""
    return jnp.pad(x, (((0, 0),) * (x.ndim - 1) + ((0, head_dim - x.shape[-1]),)))
