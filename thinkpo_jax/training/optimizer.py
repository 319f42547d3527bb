"""The optimizer: clipping, AdamW, and the learning rate schedule."""

import math
from typing import Any, Literal

import jax
import optax
import pydantic
from flax import nnx

from thinkpo_jax.runtime.config import ConfigSection


class OptimizerConfig(ConfigSection):
    """AdamW (arXiv 1711.05101) and its learning rate over the updates of a stage.

    `moment_dtype` is the dtype of the first moment. bfloat16 saves two bytes per parameter. The second moment and the
    weights are always float32, because bfloat16 would lose their small changes.
    """

    learning_rate: float = pydantic.Field(gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = pydantic.Field(default=0.1, ge=0, lt=1)
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    b1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    b2: float = pydantic.Field(default=0.999, ge=0, lt=1)
    eps: float = pydantic.Field(default=1e-8, gt=0)
    moment_dtype: Literal["float32", "bfloat16"] = "float32"


def num_warmup_updates(config: OptimizerConfig, num_updates: int) -> int:
    """Returns the number of updates before the learning rate has its peak."""
    return min(math.ceil(config.warmup_ratio * num_updates), num_updates - 1)


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Returns the learning rate by update: linear warm-up over `warmup_ratio` of the updates, then the schedule.

    As in other trainers the first update of a warm-up has rate 0. A stage of one update has no warm-up.
    """
    warmup = num_warmup_updates(config, num_updates)
    rest = max(num_updates - warmup, 1)
    schedule = {
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), schedule], [warmup])


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformation:
    """Returns clipping by global norm, then AdamW. Norms and biases have no weight decay."""
    schedule = learning_rate_schedule(config, num_updates)
    options = config.model_dump(include={"b1", "b2", "eps", "weight_decay"})
    adamw = optax.adamw(schedule, **options, mu_dtype=config.moment_dtype, mask=_weight_decay_mask)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _weight_decay_mask(params: Any) -> Any:
    """Returns True for weights with an embed axis. Norms and biases have none."""

    def has_embed_axis(leaf: Any) -> Any:
        return jax.tree.map(lambda _: "embed" in leaf.get_metadata()["axes"], leaf)

    return jax.tree.map(has_embed_axis, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
