"""FLOPs, MFU and tokens per second of an update.

Counted are tokens without padding, keys that a query may attend to (causal, within its segment), and the LM head for
trained tokens. A multiply-add is two operations. The embedding lookup counts zero.

- `mfu`: FLOPs that the model needs, divided by the peak of the device.
- `hfu`: all computed FLOPs, with those that the backward pass recomputes, divided by the peak.
"""

from typing import NamedTuple

import jax

from thinkpo_jax.data.batches import BatchWork
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.runtime.devices import peak_flops


class FlopCount(NamedTuple):
    """FLOPs of an update: what the model needs (backward is twice forward), and what the hardware computes."""

    model: float
    hardware: float


def count_update_flops(arch: Architecture, compute: ComputeConfig, work: BatchWork) -> FlopCount:
    """Counts the FLOPs of one update. Hardware FLOPs add what the backward pass recomputes.

    It always recomputes the logits of the LM head and the attention scores (half of the attention FLOPs). With remat
    `attention` and `full` it recomputes the linear projections, with `offload` those of gate and up, and with `full`
    the attention too.
    """
    D, H = arch.hidden_size, arch.head_dim
    weights = arch.num_layers * (2 * D * arch.num_heads * H + 2 * D * arch.num_kv_heads * H + 3 * D * arch.mlp_size)
    projections = 2.0 * weights * work.tokens
    attention = 4.0 * arch.num_layers * arch.num_heads * H * work.attention_pairs
    head = 2.0 * D * arch.vocab_size * work.loss_tokens
    recomputed = head + attention / 2
    recomputed += projections if compute.remat in ("attention", "full") else 0.0
    recomputed += 4.0 * arch.num_layers * D * arch.mlp_size * work.tokens if compute.remat == "offload" else 0.0
    recomputed += attention if compute.remat == "full" else 0.0
    model = 3 * (projections + attention + head)
    return FlopCount(model, model + recomputed)


def throughput_metrics(
    work: BatchWork, padded_tokens: int, arch: Architecture, compute: ComputeConfig, seconds: float
) -> dict[str, float]:
    """Returns the speed of an update as metrics. `padded_tokens` counts the padding too.

    `mfu` is the model's share of the devices' bfloat16 peak, `hfu` the share of all computed FLOPs. Both are left out
    if the peak is not known, or if the model is not computed in bfloat16.
    """
    flops, devices = count_update_flops(arch, compute, work), jax.devices()
    metrics = {
        "tokens": work.tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(work.tokens / seconds, 1),
        "padded_tokens_per_second": round(padded_tokens / seconds, 1),
        "packing_efficiency": round(work.tokens / padded_tokens, 4),
        "tflops_per_device": float(f"{flops.model / seconds / len(devices) / 1e12:.4g}"),
    }
    peak = peak_flops(devices[0].device_kind)
    if peak is not None and compute.dtype == "bfloat16":
        available = peak * len(devices) * seconds
        metrics |= {"mfu": round(flops.model / available, 4), "hfu": round(flops.hardware / available, 4)}
    return metrics
