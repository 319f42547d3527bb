"""Metrics of preference batches: sums on the device, and the values for the logs.

Names that start with `_` are sums from which `finalize_metrics` computes other metrics.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from thinkpo_jax.data.batches import FIRST_REGION_TOKENS, DeviceBatch

SATURATION_THRESHOLD = 0.05  # of the largest gradient that a pair can have
LENGTH_GAP_BOUNDS = (0, 512, 2048)  # between the buckets, in tokens of chosen minus rejected
REGION_NAMES = (f"first_{FIRST_REGION_TOKENS}", "shared", "tail")


def length_gap_sums(
    total: Callable[[jax.Array], jax.Array], margins_RP: jax.Array, gaps_RP: jax.Array
) -> dict[str, jax.Array]:
    """Returns sums for the accuracy by length gap, and for the correlation of margin and length gap.

    `total` sums an array [R, P] over the real pairs. `gaps_RP` is in tokens.
    """
    sums: dict[str, jax.Array] = {}
    bounds = (-math.inf, *LENGTH_GAP_BOUNDS, math.inf)
    names = (f"gap_below_{LENGTH_GAP_BOUNDS[0]}", *(f"gap_from_{low}" for low in LENGTH_GAP_BOUNDS))
    for name, low, high in zip(names, bounds[:-1], bounds[1:], strict=True):
        is_inside_RP = (gaps_RP >= low) & (gaps_RP < high)
        sums |= {f"_right/{name}": total(is_inside_RP & (margins_RP > 0)), f"_in/{name}": total(is_inside_RP)}
    gaps_RP = gaps_RP / 1024  # keeps squares small, so float32 sums stay exact enough
    moments = {"m": margins_RP, "g": gaps_RP, "mg": margins_RP * gaps_RP, "mm": margins_RP**2, "gg": gaps_RP**2}
    return sums | {f"_moment/{name}": total(values_RP) for name, values_RP in moments.items()}


def tag_sums(
    tags: Mapping[str, Sequence[Sequence[int]]], log_probs_RA: jax.Array, batch: DeviceBatch
) -> dict[str, jax.Array]:
    """Returns the summed log-probs and the number of occurrences of tags in the answers.

    `tags` maps a metric name to the token ids of one or more tags.
    """
    sums: dict[str, jax.Array] = {}
    for name, id_lists in tags.items():
        log_probs, count = jnp.array([_sum_tag(ids, log_probs_RA, batch) for ids in id_lists]).sum(axis=0)
        sums |= {f"_{name}/logps": log_probs, f"_{name}/count": count}
    return sums


def _sum_tag(tag: Sequence[int], log_probs_RA: jax.Array, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
    starts_RA, sums_RA = jnp.ones(batch.target_ids.shape, bool), jnp.zeros(batch.target_ids.shape)
    for offset, token in enumerate(tag):
        # The slots of an answer are adjacent, and so are their positions. So a tag never crosses the end of an answer.
        positions_RA, targets_RA, regions_RA, next_log_probs_RA = (
            jnp.roll(array, -offset, axis=1)
            for array in (batch.loss_positions, batch.target_ids, batch.target_regions, log_probs_RA)
        )
        starts_RA &= (positions_RA == batch.loss_positions + offset) & (targets_RA == token) & (regions_RA > 0)
        sums_RA += next_log_probs_RA
    return jnp.where(starts_RA, sums_RA, 0.0).sum(), starts_RA.sum()


def finalize_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics of an update for the logs. Replaces the sums whose names start with `_`.

    - `accuracies/gap_...`: reward accuracy of the pairs in this bucket of the length gap.
    - `margins/length_corr`: Pearson correlation of margin and length gap.
    - `logps/end`, `logps/thought_end`: mean log-prob of the end token of answers, and of the tag that ends a thought.

    A metric without pairs or without variance is left out.
    """
    final = {name: value for name, value in metrics.items() if not name.startswith("_")}
    for name, count in metrics.items():
        if name.startswith("_in/") and count > 0:
            bucket = name.removeprefix("_in/")
            final[f"accuracies/{bucket}"] = metrics[f"_right/{bucket}"] / count
    for name in ("end", "thought_end"):
        if metrics.get(f"_{name}/count", 0) > 0:
            final[f"logps/{name}"] = metrics[f"_{name}/logps"] / metrics[f"_{name}/count"]
    if "_moment/m" in metrics:
        m, g, mg, mm, gg = (metrics[f"_moment/{name}"] for name in ("m", "g", "mg", "mm", "gg"))
        variances = (mm - m * m) * (gg - g * g)
        if variances > 1e-12:
            final["margins/length_corr"] = max(-1.0, min(1.0, (mg - m * g) / math.sqrt(variances)))
    return final


def headline_metrics(line: Mapping[str, float]) -> dict[str, str]:
    """Returns the loss and, for pairs, the margin and accuracy as text."""
    names = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    return {name: f"{line[metric]:.4f}" for name, metric in names.items() if metric in line}
