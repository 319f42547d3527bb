"""Preference losses on log-ratios: pure functions of arrays.

`chosen` and `rejected` are log-ratios of policy to reference, log pi(y|x) - log pi_ref(y|x), float32, one per pair.
They are summed over the answer, unless a function says otherwise. Every function returns the loss of each pair.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

PerPair = jax.Array


def sigmoid_loss(chosen: PerPair, rejected: PerPair, beta: float, label_smoothing: float = 0.0) -> PerPair:
    """DPO: -log sigmoid(beta * (chosen - rejected)), arXiv 2305.18290, equation 7. It is ln 2 for equal ratios.

    `label_smoothing` is the probability that a label is swapped. With it, this is conservative DPO: the losses of the
    pair as labeled and of the swapped pair, weighted by their probabilities (https://ericmitchell.ai/cdpo.pdf, eq. 3).
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


def robust_loss(chosen: PerPair, rejected: PerPair, beta: float, label_smoothing: float = 0.0) -> PerPair:
    """Robust DPO: unbiased if a fraction `label_smoothing` of the labels is swapped (arXiv 2403.00409, equation 12)."""
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
    """APO-zero: raises chosen and lowers rejected independently (arXiv 2408.06266, equation 7)."""
    return 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down_loss(chosen: PerPair, rejected: PerPair, beta: float) -> PerPair:
    """APO-down: lowers both, rejected more, for chosen answers worse than the model's (arXiv 2408.06266, eq. 8)."""
    return jax.nn.sigmoid(beta * chosen) + 1 - jax.nn.sigmoid(beta * (chosen - rejected))


class PreferenceLoss(NamedTuple):
    """A loss and its properties. A length-normalized loss takes means over the tokens of an answer, not sums."""

    function: Callable[..., PerPair]
    is_length_normalized: bool = False
    supports_label_smoothing: bool = False


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid_loss, supports_label_smoothing=True),
    # Length-normalized DPO: arXiv 2411.15124.
    "sigmoid_norm": PreferenceLoss(sigmoid_loss, is_length_normalized=True, supports_label_smoothing=True),
    "robust": PreferenceLoss(robust_loss, supports_label_smoothing=True),
    "hinge": PreferenceLoss(hinge_loss),
    "ipo": PreferenceLoss(ipo_loss, is_length_normalized=True),
    "apo_zero": PreferenceLoss(apo_zero_loss),
    "apo_down": PreferenceLoss(apo_down_loss),
}
