"""The objectives of SFT and ThinkPO.

An objective returns sums over rows, not means. So micro-batches and devices can be added up.

Letters: R rows, T row length, D hidden size, A slots for trained tokens, P examples per row, S answers per example (2
for a pair: chosen, rejected), 3 the regions of an answer (`Batch.target_regions`).
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
from thinkpo_jax.training.preference_metrics import REGION_NAMES, SATURATION_THRESHOLD, length_gap_sums, tag_sums
from thinkpo_jax.training.token_log_probs import answer_token_log_probs, sum_by_region


class LossSums(NamedTuple):
    """The result of an objective. `loss` and `metrics` divided by `weight` are means."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


Objective = Callable[[Transformer, DeviceBatch], LossSums]
PreferenceLossFn = Callable[[jax.Array, DeviceBatch], LossSums]


class PreferenceConfig(ConfigSection):
    """How pairs are compared. The default is the paper's (arXiv 2502.13173): DPO's sigmoid loss with a small beta.

    - `loss`: see `preference_losses`.
    - `label_smoothing`: the probability that a pair is swapped (`sigmoid`, `sigmoid_norm`, `robust`).
    - `ld_alpha`: LD-DPO (arXiv 2409.06411), the weight of the tokens that only the longer answer has.
    - `nll_weight`: the weight of the mean negative log-prob of the chosen answer's tokens (arXiv 2404.19733).
    """

    beta: float = pydantic.Field(default=0.01, gt=0)
    loss: Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "apo_zero", "apo_down"] = "sigmoid"
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=0.5)
    ld_alpha: float = pydantic.Field(default=1.0, ge=0, le=1)
    nll_weight: float = pydantic.Field(default=0.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _check_label_smoothing(self) -> "PreferenceConfig":
        if self.label_smoothing > 0 and not PREFERENCE_LOSSES[self.loss].supports_label_smoothing:
            supported = [name for name, loss in PREFERENCE_LOSSES.items() if loss.supports_label_smoothing]
            raise ValueError(
                f"`label_smoothing` has no effect on the loss {self.loss!r}. It has an effect on {', '.join(supported)}"
            )
        return self


def sft_objective(model: Transformer, batch: DeviceBatch) -> LossSums:
    """Returns the cross-entropy of the answer tokens. The weight is their number."""
    loss = -answer_token_log_probs(model, batch).sum()
    return LossSums(loss, (batch.target_regions > 0).sum().astype(jnp.float32), {})


def make_thinkpo_objective(
    config: PreferenceConfig, *, end_of_turn_id: int, thought_end_token_ids: Sequence[Sequence[int]] = ()
) -> Objective:
    """Returns DPO on (long, short) pairs (arXiv 2502.13173, section 2.2), see `make_preference_loss`."""
    loss_fn = make_preference_loss(config, end_of_turn_id=end_of_turn_id, thought_end_token_ids=thought_end_token_ids)
    return lambda model, batch: loss_fn(answer_token_log_probs(model, batch), batch)


def make_preference_loss(
    config: PreferenceConfig, *, end_of_turn_id: int, thought_end_token_ids: Sequence[Sequence[int]] = ()
) -> PreferenceLossFn:
    """Returns the function from the log-probs [R, A] of a batch's trained tokens to its loss against the reference.

    Log-probs are summed over the answer. The weight is the number of pairs. Metrics have TRL's names where TRL has
    them. `end_of_turn_id` is the token that ends an answer. `thought_end_token_ids` are the tags that end a thought.
    """
    loss, region_weights = PREFERENCE_LOSSES[config.loss], jnp.array([1.0, 1.0, config.ld_alpha])
    tags: dict[str, Sequence[Sequence[int]]] = {"end": [[end_of_turn_id]]}
    tags |= {"thought_end": thought_end_token_ids} if thought_end_token_ids else {}

    def sum_regions(values_RPS3: jax.Array) -> jax.Array:
        """Weighted sum over the regions. Not a matrix product, which an accelerator would round to bfloat16."""
        return (values_RPS3 * region_weights).sum(axis=-1)

    def loss_fn(log_probs_RA: jax.Array, batch: DeviceBatch) -> LossSums:
        log_probs_RPS3 = sum_by_region(log_probs_RA, batch)
        lengths_RPS = sum_by_region((batch.target_regions > 0).astype(jnp.float32), batch).sum(axis=-1)
        is_real_RP = batch.example_ids >= 0
        ratios_RPS3 = log_probs_RPS3 - batch.reference_log_probs
        ratios_RPS = sum_regions(ratios_RPS3)
        compared_RPS = ratios_RPS / jnp.maximum(lengths_RPS, 1.0) if loss.is_length_normalized else ratios_RPS
        loss_RP = loss.function(compared_RPS[..., 0], compared_RPS[..., 1], config.beta, **_smoothing(config))
        nll_RP = -log_probs_RPS3[..., 0, :].sum(axis=-1) / jnp.maximum(lengths_RPS[..., 0], 1.0)
        if config.nll_weight > 0:
            loss_RP = loss_RP + config.nll_weight * nll_RP

        def total(values_RP: jax.Array) -> jax.Array:
            return jnp.where(is_real_RP, values_RP.astype(jnp.float32), 0.0).sum()

        rewards_RPS, sums_RPS = config.beta * ratios_RPS, sum_regions(log_probs_RPS3)
        margins_RP = rewards_RPS[..., 0] - rewards_RPS[..., 1]
        metrics = {
            "rewards/chosen": total(rewards_RPS[..., 0]),
            "rewards/rejected": total(rewards_RPS[..., 1]),
            "rewards/margins": total(margins_RP),
            "rewards/accuracies": total(margins_RP > 0),
            "logps/chosen": total(sums_RPS[..., 0]),
            "logps/rejected": total(sums_RPS[..., 1]),
            "nll/chosen": total(nll_RP),
        }
        if loss.supports_label_smoothing:  # these use log sigmoid(logits), with the gradient sigmoid(-logits)
            logits_RP = config.beta * (compared_RPS[..., 0] - compared_RPS[..., 1])
            metrics["saturated"] = total(jax.nn.sigmoid(-logits_RP) < SATURATION_THRESHOLD)
        margins_RP3 = config.beta * (ratios_RPS3[..., 0, :] - ratios_RPS3[..., 1, :])
        metrics |= {f"margins/{name}": total(margins_RP3[..., i]) for i, name in enumerate(REGION_NAMES)}
        metrics |= length_gap_sums(total, margins_RP, lengths_RPS[..., 0] - lengths_RPS[..., 1])
        metrics |= tag_sums(tags, log_probs_RA, batch)
        return LossSums(total(loss_RP), is_real_RP.sum().astype(jnp.float32), metrics)

    return loss_fn


def _smoothing(config: PreferenceConfig) -> dict[str, float]:
    supports = PREFERENCE_LOSSES[config.loss].supports_label_smoothing
    return {"label_smoothing": config.label_smoothing} if supports else {}


def expected_initial_loss(config: PreferenceConfig, nll: float) -> float:
    """Returns the loss if policy and reference are the same model: ln 2 for DPO. `nll` is the metric `nll/chosen`."""
    zero = jnp.zeros(())
    loss = PREFERENCE_LOSSES[config.loss].function(zero, zero, config.beta, **_smoothing(config))
    return float(loss) + config.nll_weight * nll
