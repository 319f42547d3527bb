"""What is minimised? Each objective maps a model and rows to sums, so that any split of the rows gives the same result.

Letters: R rows, T row length, P examples per row, S answers per example (2 for a pair: chosen, rejected), 3 the regions
of an answer (`Batch.regions`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import pydantic

from thinkpo_jax.attention import Places
from thinkpo_jax.config import Section
from thinkpo_jax.logprobs import token_logprobs
from thinkpo_jax.losses import LOSSES
from thinkpo_jax.model import Transformer
from thinkpo_jax.packing import HEAD, REGIONS, DeviceBatch

SATURATED = 0.05  # a pair whose gradient is below this share of what a wholly wrong one would have
GAPS = (0, 512, 2048)  # bounds, in tokens of chosen minus rejected, of the buckets that accuracy is told for


class Sums(NamedTuple):
    """What an objective returns. Divided by `weight`, `loss` and `metrics` are means."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


Objective = Callable[[Transformer, DeviceBatch], Sums]


class PreferenceConfig(Section):
    """How pairs are compared; the default is the paper's (arXiv 2502.13173): DPO's sigmoid loss with a small beta.

    `loss`: see losses.py. `label_smoothing`: the chance that a pair is the wrong way round (sigmoid, sigmoid_norm,
    robust). `ld_alpha`: LD-DPO (arXiv 2409.06411), the weight of what only the longer answer has. `nll_weight`: of the
    chosen answer's mean negative log-prob per token, added to the loss (arXiv 2404.19733).
    """

    beta: float = pydantic.Field(default=0.01, gt=0)
    loss: Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "apo_zero", "apo_down"] = "sigmoid"
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=0.5)
    ld_alpha: float = pydantic.Field(default=1.0, ge=0, le=1)
    nll_weight: float = pydantic.Field(default=0.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _smoothing_has_an_effect(self) -> "PreferenceConfig":
        if self.label_smoothing > 0 and not LOSSES[self.loss].smoothed:
            smoothed = [name for name, loss in LOSSES.items() if loss.smoothed]
            raise ValueError(
                f"`label_smoothing` has no effect on the loss {self.loss!r}; it has on {', '.join(smoothed)}"
            )
        return self


def answer_logprobs(model: Transformer, batch: DeviceBatch) -> jax.Array:
    """Log-prob of each target token that belongs to an answer, 0 elsewhere; float32 [R, T]."""
    hidden_RTD, _ = model(batch.tokens, Places(batch.segments, batch.positions))
    logprobs = token_logprobs(hidden_RTD.reshape(-1, hidden_RTD.shape[-1]), model.head(), batch.targets.reshape(-1))
    return jnp.where(batch.regions > 0, logprobs.reshape(batch.targets.shape), 0.0)


def region_sums(values_RT: jax.Array, batch: DeviceBatch) -> jax.Array:
    """Values of target tokens summed over the regions of every answer; [R, P, S, 3]."""
    examples, answers = batch.reference.shape[-3:-1]
    # Segments 1, 2, ... are the answers of the row, in order; what belongs to none goes to place 0.
    places_RT = jnp.where(batch.regions > 0, (batch.segments - 1) * REGIONS + batch.regions, 0)
    sums = jax.vmap(lambda values, places: jax.ops.segment_sum(values, places, examples * answers * REGIONS + 1))
    return sums(values_RT, places_RT)[:, 1:].reshape(-1, examples, answers, REGIONS)


def region_logprobs(model: Transformer, batch: DeviceBatch) -> jax.Array:
    """Log-prob of each region of each answer, summed over its tokens in float32; [R, P, S, 3]."""
    return region_sums(answer_logprobs(model, batch), batch)


def sft(model: Transformer, batch: DeviceBatch) -> Sums:
    """Cross-entropy of the answer tokens; the weight is their number."""
    loss = -answer_logprobs(model, batch).sum()
    return Sums(loss, (batch.regions > 0).sum().astype(jnp.float32), {})


def thinkpo(config: PreferenceConfig, *, end_id: int) -> Objective:
    """DPO on (long, short) pairs: arXiv 2502.13173, section 2.2, with a loss of losses.py.

    Log-probs are summed over the answer; the weight is the number of pairs. Metrics carry TRL's names where it has
    them; `readable` makes the others out of sums. `end_id` is the token that ends an answer.
    """
    loss = LOSSES[config.loss]
    smoothing = {"label_smoothing": config.label_smoothing} if loss.smoothed else {}
    region_weights = jnp.array([1.0, 1.0, config.ld_alpha])

    def whole(values_RPS3: jax.Array) -> jax.Array:
        """The sum over the regions; no matrix product, which an accelerator would round to bfloat16."""
        return (values_RPS3 * region_weights).sum(axis=-1)

    def objective(model: Transformer, batch: DeviceBatch) -> Sums:
        logprobs_RT = answer_logprobs(model, batch)
        regions_RPS3 = region_sums(logprobs_RT, batch)
        lengths_RPS = region_sums((batch.regions > 0).astype(jnp.float32), batch).sum(axis=-1)
        real_RP = batch.examples >= 0
        ratios_RPS3 = regions_RPS3 - batch.reference
        ratios_RPS = whole(ratios_RPS3)
        compared_RPS = ratios_RPS / jnp.maximum(lengths_RPS, 1.0) if loss.per_token else ratios_RPS
        loss_RP = loss.function(compared_RPS[..., 0], compared_RPS[..., 1], config.beta, **smoothing)
        if config.nll_weight > 0:
            nll_RP = -regions_RPS3[..., 0, :].sum(axis=-1) / jnp.maximum(lengths_RPS[..., 0], 1.0)
            loss_RP = loss_RP + config.nll_weight * nll_RP

        def total(values_RP: jax.Array) -> jax.Array:
            return jnp.where(real_RP, values_RP.astype(jnp.float32), 0.0).sum()

        rewards_RPS, logps_RPS = config.beta * ratios_RPS, whole(regions_RPS3)
        margins_RP = rewards_RPS[..., 0] - rewards_RPS[..., 1]
        metrics = {
            "rewards/chosen": total(rewards_RPS[..., 0]),
            "rewards/rejected": total(rewards_RPS[..., 1]),
            "rewards/margins": total(margins_RP),
            "rewards/accuracies": total(margins_RP > 0),
            "logps/chosen": total(logps_RPS[..., 0]),
            "logps/rejected": total(logps_RPS[..., 1]),
            "saturated": total(jax.nn.sigmoid(-margins_RP) < SATURATED),
        }
        margins_RP3 = config.beta * (ratios_RPS3[..., 0, :] - ratios_RPS3[..., 1, :])
        metrics |= {f"margins/{name}": total(margins_RP3[..., i]) for i, name in enumerate(MARGINS)}
        gaps_RP = lengths_RPS[..., 0] - lengths_RPS[..., 1]
        for name, inside_RP in _buckets(gaps_RP).items():
            metrics |= {f"_right/{name}": total(inside_RP & (margins_RP > 0)), f"_in/{name}": total(inside_RP)}
        gaps_RP = gaps_RP / 1024  # so that squares of thousands do not swallow the rest in float32
        moments = {"m": margins_RP, "g": gaps_RP, "mg": margins_RP * gaps_RP, "mm": margins_RP**2, "gg": gaps_RP**2}
        metrics |= {f"_moment/{name}": total(values_RP) for name, values_RP in moments.items()}
        ends_RT = (batch.regions > 0) & (batch.targets == end_id)
        metrics |= {"_end/logps": jnp.where(ends_RT, logprobs_RT, 0.0).sum(), "_end/count": ends_RT.sum()}
        return Sums(total(loss_RP), real_RP.sum().astype(jnp.float32), metrics)

    return objective


MARGINS = (f"first_{HEAD}", "shared", "tail")  # the rewards' margin by region


def _buckets(gaps_RP: jax.Array) -> dict[str, jax.Array]:
    """Which pairs lie in which bucket of the length gap."""
    bounds = (-math.inf, *GAPS, math.inf)
    names = [f"gap_below_{GAPS[0]}", *(f"gap_from_{low}" for low in GAPS)]
    return {
        name: (gaps_RP >= low) & (gaps_RP < high)
        for name, low, high in zip(names, bounds[:-1], bounds[1:], strict=True)
    }


def readable(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an update as people read them: what `_...` sums are made for in their place.

    `accuracies/gap_...`: reward accuracy of the pairs whose chosen answer is so many tokens longer.
    `margins/length_corr`: Pearson correlation of margin and length gap. `logps/end`: log-prob of an answer's end token.
    What has no pairs, or no spread, is left out.
    """
    found = {name: value for name, value in metrics.items() if not name.startswith("_")}
    for name, count in metrics.items():
        if name.startswith("_in/") and count > 0:
            bucket = name.removeprefix("_in/")
            found[f"accuracies/{bucket}"] = metrics[f"_right/{bucket}"] / count
    if metrics.get("_end/count", 0) > 0:
        found["logps/end"] = metrics["_end/logps"] / metrics["_end/count"]
    if "_moment/m" in metrics:
        m, g, mg, mm, gg = (metrics[f"_moment/{name}"] for name in ("m", "g", "mg", "mm", "gg"))
        spread = (mm - m * m) * (gg - g * g)
        if spread > 1e-12:
            found["margins/length_corr"] = max(-1.0, min(1.0, (mg - m * g) / math.sqrt(spread)))
    return found
