"""Metrics of preference batches and how they are finalized for logs."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from thinkpo_jax.data.batches import FIRST_REGION_TOKENS, DeviceBatch

SATURATION_THRESHOLD = 0.05  # a pair whose gradient is below this share of what a wholly wrong one would have
LENGTH_GAP_BOUNDS = (
    0,
    512,
    2048,
)  # bounds, in tokens of chosen minus rejected, of the buckets that accuracy is told for


def sum_tag_log_probs(tag: Sequence[int], logprobs_RA: jax.Array, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
    """Over all places where these ids stand in an answer: their summed log-probs, and how many places there are."""
    starts_RA, logps_RA = jnp.ones(batch.target_ids.shape, bool), jnp.zeros(batch.target_ids.shape)
    for number, token in enumerate(tag):
        # The slots of an answer are neighbours, and so are their places: a tag never runs over its end.
        ahead = [
            jnp.roll(array, -number, axis=1)
            for array in (batch.loss_positions, batch.target_ids, batch.target_regions, logprobs_RA)
        ]
        starts_RA &= (ahead[0] == batch.loss_positions + number) & (ahead[1] == token) & (ahead[2] > 0)
        logps_RA += ahead[3]
    return jnp.where(starts_RA, logps_RA, 0.0).sum(), starts_RA.sum()


REGION_NAMES = (f"first_{FIRST_REGION_TOKENS}", "shared", "tail")  # the rewards' margin by region


def length_gap_buckets(gaps_RP: jax.Array) -> dict[str, jax.Array]:
    """Which pairs lie in which bucket of the length gap."""
    bounds = (-math.inf, *LENGTH_GAP_BOUNDS, math.inf)
    names = [f"gap_below_{LENGTH_GAP_BOUNDS[0]}", *(f"gap_from_{low}" for low in LENGTH_GAP_BOUNDS)]
    return {
        name: (gaps_RP >= low) & (gaps_RP < high)
        for name, low, high in zip(names, bounds[:-1], bounds[1:], strict=True)
    }


def finalize_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an update as people read them: what `_...` sums are made for in their place.

    `accuracies/gap_...`: reward accuracy of the pairs whose chosen answer is so many tokens longer.
    `margins/length_corr`: Pearson correlation of margin and length gap. `logps/end`: log-prob of an answer's end token;
    `logps/thought_end`: of the tag that ends a thought. What has no pairs, or no spread, is left out.
    """
    found = {name: value for name, value in metrics.items() if not name.startswith("_")}
    for name, count in metrics.items():
        if name.startswith("_in/") and count > 0:
            bucket = name.removeprefix("_in/")
            found[f"accuracies/{bucket}"] = metrics[f"_right/{bucket}"] / count
    for name in ("end", "thought_end"):
        if metrics.get(f"_{name}/count", 0) > 0:
            found[f"logps/{name}"] = metrics[f"_{name}/logps"] / metrics[f"_{name}/count"]
    if "_moment/m" in metrics:
        m, g, mg, mm, gg = (metrics[f"_moment/{name}"] for name in ("m", "g", "mg", "mm", "gg"))
        spread = (mm - m * m) * (gg - g * g)
        if spread > 1e-12:
            found["margins/length_corr"] = max(-1.0, min(1.0, (mg - m * g) / math.sqrt(spread)))
    return found


def headline_metrics(line: dict[str, float]) -> dict[str, str]:
    """The loss and, where there are pairs, margin and accuracy, as a person is told them."""
    names = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    return {name: f"{line[metric]:.4f}" for name, metric in names.items() if metric in line}
