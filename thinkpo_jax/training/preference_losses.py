"""The mathematics of preferences: arrays in, arrays out.

`chosen` and `rejected` are log-ratios of policy to reference, log pi(y|x) - log pi_ref(y|x), summed over an answer
unless a function says otherwise; float32, one per pair. Every function gives the loss of each pair.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

PerPair = jax.Array


def sigmoid_loss(chosen: PerPair, rejected: PerPair, beta: float, label_smoothing: float = 0.0) -> PerPair:
    """DPO: -log sigmoid(beta * (chosen - rejected)), arXiv 2305.18290, equation 7; ln 2 where both ratios are equal.

    With `label_smoothing`, the chance that a label is the wrong way round, it is conservative DPO: the loss of the pair
    as labelled and as exchanged, weighted with both chances (https://ericmitchell.ai/cdpo.pdf, equation 3).
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


def robust_loss(chosen: PerPair, rejected: PerPair, beta: float, label_smoothing: float = 0.0) -> PerPair:
    """Robust DPO: unbiased where `label_smoothing` of the labels are exchanged (arXiv 2403.00409, equation 12)."""
    logits = beta * (chosen - rejected)
    clean, flipped = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(chosen: PerPair, rejected: PerPair, beta: float) -> PerPair:
    """max(0, 1 - beta * (chosen - rejected)): SLiC's loss (arXiv 2305.10425) on DPO's rewards (arXiv 2309.06657)."""
    return jax.nn.relu(1 - beta * (chosen - rejected))


def ipo_loss(chosen: PerPair, rejected: PerPair, beta: float) -> PerPair:
    """IPO: (chosen - rejected - 1 / (2 beta))^2, arXiv 2310.12036, equation 17. The ratios are means over tokens."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def apo_zero_loss(chosen: PerPair, rejected: PerPair, beta: float) -> PerPair:
    """APO-zero: chosen up, rejected down, each by itself (arXiv 2408.06266, equation 7)."""
    return 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down_loss(chosen: PerPair, rejected: PerPair, beta: float) -> PerPair:
    """APO-down: both down, rejected further; for chosen answers worse than the model's (arXiv 2408.06266, eq. 8)."""
    return jax.nn.sigmoid(beta * chosen) + 1 - jax.nn.sigmoid(beta * (chosen - rejected))


class PreferenceLoss(NamedTuple):
    """A loss, whether its ratios are means over an answer's tokens (not sums), and whether labels can be smoothed."""

    function: Callable[..., PerPair]
    is_length_normalized: bool = False
    supports_label_smoothing: bool = False


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid_loss, supports_label_smoothing=True),
    "sigmoid_norm": PreferenceLoss(
        sigmoid_loss, is_length_normalized=True, supports_label_smoothing=True
    ),  # length-normalised: arXiv 2411.15124
    "robust": PreferenceLoss(robust_loss, supports_label_smoothing=True),
    "hinge": PreferenceLoss(hinge_loss),
    "ipo": PreferenceLoss(ipo_loss, is_length_normalized=True),
    "apo_zero": PreferenceLoss(apo_zero_loss),
    "apo_down": PreferenceLoss(apo_down_loss),
}
