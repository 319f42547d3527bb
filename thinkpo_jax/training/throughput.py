"""How many floating-point operations is an update, and how near the device's peak does it come?

Only what a model needs is counted: tokens (no padding), keys that a query may see (causal, within its segment), the
head for trained tokens. A multiplication and an addition are two operations. The look-up in the embedding is none.
"""

from typing import NamedTuple

import jax

from thinkpo_jax.data.batches import BatchWork
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.runtime.devices import peak_flops


class FlopCount(NamedTuple):
    """Of an update: what the model needs (forward, and backward twice that), and what is computed for it."""

    model: float
    hardware: float


def count_update_flops(arch: Architecture, compute: ComputeConfig, work: BatchWork) -> FlopCount:
    """Operations of one update; the hardware's are those of the model and what the backward pass computes again.

    That is the head's logits (logprobs.py) and the scores of attention (attention.py, half of its products), with remat
    `attention` and `full` the layers' products with weights (with `offload` those of gate and up), and with `full`
    those of attention.
    """
    D, H = arch.hidden_size, arch.head_dim
    weights = arch.num_layers * (2 * D * arch.num_heads * H + 2 * D * arch.num_kv_heads * H + 3 * D * arch.mlp_size)
    projections = 2.0 * weights * work.tokens
    attention = 4.0 * arch.num_layers * arch.num_heads * H * work.attention_pairs
    head = 2.0 * D * arch.vocab_size * work.loss_tokens
    again = head + attention / 2
    again += projections if compute.remat in ("attention", "full") else 0.0
    again += 4.0 * arch.num_layers * D * arch.mlp_size * work.tokens if compute.remat == "offload" else 0.0
    again += attention if compute.remat == "full" else 0.0
    model = 3 * (projections + attention + head)
    return FlopCount(model, model + again)


def throughput_metrics(
    work: BatchWork, slots: int, arch: Architecture, compute: ComputeConfig, seconds: float
) -> dict[str, float]:
    """How fast an update was, as metrics: tokens with padding (`slots`) and without, and the use made of the devices.

    `mfu` is the share of the devices' bfloat16 peak that the model's operations are, `hfu` that of all that is
    computed; both are left out where the peak is not known, or where the model is not computed in bfloat16.
    """
    operations, devices = count_update_flops(arch, compute, work), jax.devices()
    metrics = {
        "tokens": work.tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(work.tokens / seconds, 1),
        "padded_tokens_per_second": round(slots / seconds, 1),
        "packing_efficiency": round(work.tokens / slots, 4),
        "tflops_per_device": float(f"{operations.model / seconds / len(devices) / 1e12:.4g}"),
    }
    most = peak_flops(devices[0].device_kind)
    if most is not None and compute.dtype == "bfloat16":
        available = most * len(devices) * seconds
        metrics |= {
            "mfu": round(operations.model / available, 4),
            "hfu": round(operations.hardware / available, 4),
        }
    return metrics
