"""What is minimised? Each objective maps a model and rows to sums, so that any split of the rows gives the same result.

Letters: R rows, T row length, D embed, A slots for trained tokens, P examples per row, S answers per example (2 for a
pair: chosen, rejected), 3 the regions of an answer (`Batch.regions`).
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import pydantic

from thinkpo_jax.data.batches import DeviceBatch
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import ConfigSection
from thinkpo_jax.training.preference_losses import PREFERENCE_LOSSES
from thinkpo_jax.training.preference_metrics import (
    REGION_NAMES,
    SATURATION_THRESHOLD,
    length_gap_buckets,
    sum_tag_log_probs,
)
from thinkpo_jax.training.token_log_probs import answer_token_log_probs, sum_by_region


class LossSums(NamedTuple):
    """What an objective returns. Divided by `weight`, `loss` and `metrics` are means."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


Objective = Callable[[Transformer, DeviceBatch], LossSums]
PreferenceLossFn = Callable[[jax.Array, DeviceBatch], LossSums]


class PreferenceConfig(ConfigSection):
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
        if self.label_smoothing > 0 and not PREFERENCE_LOSSES[self.loss].supports_label_smoothing:
            smoothed = [name for name, loss in PREFERENCE_LOSSES.items() if loss.supports_label_smoothing]
            raise ValueError(
                f"`label_smoothing` has no effect on the loss {self.loss!r}; it has on {', '.join(smoothed)}"
            )
        return self


def sft_objective(model: Transformer, batch: DeviceBatch) -> LossSums:
    """Cross-entropy of the answer tokens; the weight is their number."""
    loss = -answer_token_log_probs(model, batch).sum()
    return LossSums(loss, (batch.target_regions > 0).sum().astype(jnp.float32), {})


def make_thinkpo_objective(
    config: PreferenceConfig, *, end_of_turn_id: int, thought_end_token_ids: Sequence[Sequence[int]] = ()
) -> Objective:
    """DPO on (long, short) pairs: arXiv 2502.13173, section 2.2, with a loss of losses.py; see `comparison`."""
    compare = make_preference_loss(config, end_of_turn_id=end_of_turn_id, thought_end_token_ids=thought_end_token_ids)
    return lambda model, batch: compare(answer_token_log_probs(model, batch), batch)


def make_preference_loss(
    config: PreferenceConfig, *, end_of_turn_id: int, thought_end_token_ids: Sequence[Sequence[int]] = ()
) -> PreferenceLossFn:
    """What the log-probs [R, A] of a batch's trained tokens come to against its reference.

    Log-probs are summed over the answer; the weight is the number of pairs. Metrics carry TRL's names where it has
    them; `readable` makes the others out of sums. `end_id` is the token that ends an answer, `thought_ends` are the
    ids of the tags that end a thought.
    """
    loss = PREFERENCE_LOSSES[config.loss]
    smoothing = _smoothing(config)
    region_weights = jnp.array([1.0, 1.0, config.ld_alpha])

    def whole(values_RPS3: jax.Array) -> jax.Array:
        """The sum over the regions; no matrix product, which an accelerator would round to bfloat16."""
        return (values_RPS3 * region_weights).sum(axis=-1)

    def compare(logprobs_RA: jax.Array, batch: DeviceBatch) -> LossSums:
        regions_RPS3 = sum_by_region(logprobs_RA, batch)
        lengths_RPS = sum_by_region((batch.target_regions > 0).astype(jnp.float32), batch).sum(axis=-1)
        real_RP = batch.example_ids >= 0
        ratios_RPS3 = regions_RPS3 - batch.reference_log_probs
        ratios_RPS = whole(ratios_RPS3)
        compared_RPS = ratios_RPS / jnp.maximum(lengths_RPS, 1.0) if loss.is_length_normalized else ratios_RPS
        loss_RP = loss.function(compared_RPS[..., 0], compared_RPS[..., 1], config.beta, **smoothing)
        nll_RP = -regions_RPS3[..., 0, :].sum(axis=-1) / jnp.maximum(lengths_RPS[..., 0], 1.0)
        if config.nll_weight > 0:
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
            "nll/chosen": total(nll_RP),
        }
        if (
            loss.supports_label_smoothing
        ):  # those made of log sigmoid(beta x difference), whose gradient is sigmoid of the opposite
            compared_RP = config.beta * (compared_RPS[..., 0] - compared_RPS[..., 1])
            metrics["saturated"] = total(jax.nn.sigmoid(-compared_RP) < SATURATION_THRESHOLD)
        margins_RP3 = config.beta * (ratios_RPS3[..., 0, :] - ratios_RPS3[..., 1, :])
        metrics |= {f"margins/{name}": total(margins_RP3[..., i]) for i, name in enumerate(REGION_NAMES)}
        gaps_RP = lengths_RPS[..., 0] - lengths_RPS[..., 1]
        for name, inside_RP in length_gap_buckets(gaps_RP).items():
            metrics |= {f"_right/{name}": total(inside_RP & (margins_RP > 0)), f"_in/{name}": total(inside_RP)}
        gaps_RP = gaps_RP / 1024  # so that squares of thousands do not swallow the rest in float32
        moments = {"m": margins_RP, "g": gaps_RP, "mg": margins_RP * gaps_RP, "mm": margins_RP**2, "gg": gaps_RP**2}
        metrics |= {f"_moment/{name}": total(values_RP) for name, values_RP in moments.items()}
        for name, tags in (
            ("end", [[end_of_turn_id]]),
            *([("thought_end", thought_end_token_ids)] if thought_end_token_ids else []),
        ):
            found = jnp.array([sum_tag_log_probs(tag, logprobs_RA, batch) for tag in tags]).sum(axis=0)
            metrics |= {f"_{name}/logps": found[0], f"_{name}/count": found[1]}
        return LossSums(total(loss_RP), real_RP.sum().astype(jnp.float32), metrics)

    return compare


def _smoothing(config: PreferenceConfig) -> dict[str, float]:
    return (
        {"label_smoothing": config.label_smoothing} if PREFERENCE_LOSSES[config.loss].supports_label_smoothing else {}
    )


def expected_initial_loss(config: PreferenceConfig, nll: float) -> float:
    """The loss where policy and reference are one model, ln 2 for DPO's; `nll` is the metric `nll/chosen`."""
    same = jnp.zeros(())
    return (
        float(PREFERENCE_LOSSES[config.loss].function(same, same, config.beta, **_smoothing(config)))
        + config.nll_weight * nll
    )
