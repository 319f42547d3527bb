"""What is minimised? Each objective maps a model and rows to sums, so that any split of the rows gives the same result.

Letters: R rows, T row length, D embed, A slots for trained tokens, P examples per row, S answers per example (2 for a
pair: chosen, rejected), 3 the regions of an answer (`Batch.regions`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import pydantic

from thinkpo_jax.attention import Places
from thinkpo_jax.config import Section
from thinkpo_jax.logprobs import HIDDEN, TOKENS, token_logprobs
from thinkpo_jax.losses import LOSSES
from thinkpo_jax.model import Transformer
from thinkpo_jax.packing import HEAD, REGIONS, DeviceBatch
from thinkpo_jax.sharding import constrain, mesh_axes, per_device, whole_rows

SATURATED = 0.05  # a pair whose gradient is below this share of what a wholly wrong one would have
GAPS = (0, 512, 2048)  # bounds, in tokens of chosen minus rejected, of the buckets that accuracy is told for


class Sums(NamedTuple):
    """What an objective returns. Divided by `weight`, `loss` and `metrics` are means."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


Objective = Callable[[Transformer, DeviceBatch], Sums]
Comparison = Callable[[jax.Array, DeviceBatch], Sums]


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
    """Log-prob of each trained token, 0 in unused slots; float32 [R, A]. No other token reaches the head."""
    numbers_M = 1 + jnp.arange(math.prod(batch.reference.shape[-3:-1]))  # of the segments that a row may have
    lengths_RM = (batch.segments[:, None, :] == numbers_M[None, :, None]).sum(axis=-1)
    hidden_RTD, _ = model(batch.tokens, Places(batch.segments, batch.positions, lengths_RM))
    gather = _at
    if mesh_axes("length"):  # of a row that is split each device gathers all hidden states, for its share of the slots
        gather = per_device(lambda hidden, places: _at(whole_rows(hidden), places), (HIDDEN, TOKENS), HIDDEN)
    logprobs_RA = token_logprobs(gather(hidden_RTD, batch.trained), model.head(), batch.targets)
    return jnp.where(batch.regions > 0, constrain(logprobs_RA, ("batch", None)), 0.0)


def _at(values_RT: jax.Array, places_RA: jax.Array) -> jax.Array:
    """[R, T, ...] at places, 0 at those beyond the row; [R, A, ...]."""

    def of_row(values: jax.Array, places: jax.Array) -> jax.Array:
        found = values.at[places]
        return found.get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)

    return jax.vmap(of_row)(values_RT, places_RA)


def region_sums(values_RA: jax.Array, batch: DeviceBatch) -> jax.Array:
    """Values of trained tokens summed over the regions of every answer; [R, P, S, 3]."""
    examples, answers = batch.reference.shape[-3:-1]
    # Segments 1, 2, ... are the answers of the row, in order; what belongs to none goes to place 0.
    answers_RA = _at(batch.segments, batch.trained) - 1
    places_RA = jnp.where(batch.regions > 0, answers_RA * REGIONS + batch.regions, 0)
    sums = jax.vmap(lambda values, places: jax.ops.segment_sum(values, places, examples * answers * REGIONS + 1))
    return sums(values_RA, places_RA)[:, 1:].reshape(-1, examples, answers, REGIONS)


def region_logprobs(model: Transformer, batch: DeviceBatch) -> jax.Array:
    """Log-prob of each region of each answer, summed over its tokens in float32; [R, P, S, 3]."""
    return region_sums(answer_logprobs(model, batch), batch)


def sft(model: Transformer, batch: DeviceBatch) -> Sums:
    """Cross-entropy of the answer tokens; the weight is their number."""
    loss = -answer_logprobs(model, batch).sum()
    return Sums(loss, (batch.regions > 0).sum().astype(jnp.float32), {})


def thinkpo(config: PreferenceConfig, *, end_id: int, thought_ends: Sequence[Sequence[int]] = ()) -> Objective:
    """DPO on (long, short) pairs: arXiv 2502.13173, section 2.2, with a loss of losses.py; see `comparison`."""
    compare = comparison(config, end_id=end_id, thought_ends=thought_ends)
    return lambda model, batch: compare(answer_logprobs(model, batch), batch)


def comparison(config: PreferenceConfig, *, end_id: int, thought_ends: Sequence[Sequence[int]] = ()) -> Comparison:
    """What the log-probs [R, A] of a batch's trained tokens come to against its reference.

    Log-probs are summed over the answer; the weight is the number of pairs. Metrics carry TRL's names where it has
    them; `readable` makes the others out of sums. `end_id` is the token that ends an answer, `thought_ends` are the
    ids of the tags that end a thought.
    """
    loss = LOSSES[config.loss]
    smoothing = _smoothing(config)
    region_weights = jnp.array([1.0, 1.0, config.ld_alpha])

    def whole(values_RPS3: jax.Array) -> jax.Array:
        """The sum over the regions; no matrix product, which an accelerator would round to bfloat16."""
        return (values_RPS3 * region_weights).sum(axis=-1)

    def compare(logprobs_RA: jax.Array, batch: DeviceBatch) -> Sums:
        regions_RPS3 = region_sums(logprobs_RA, batch)
        lengths_RPS = region_sums((batch.regions > 0).astype(jnp.float32), batch).sum(axis=-1)
        real_RP = batch.examples >= 0
        ratios_RPS3 = regions_RPS3 - batch.reference
        ratios_RPS = whole(ratios_RPS3)
        compared_RPS = ratios_RPS / jnp.maximum(lengths_RPS, 1.0) if loss.per_token else ratios_RPS
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
        if loss.smoothed:  # those made of log sigmoid(beta x difference), whose gradient is sigmoid of the opposite
            compared_RP = config.beta * (compared_RPS[..., 0] - compared_RPS[..., 1])
            metrics["saturated"] = total(jax.nn.sigmoid(-compared_RP) < SATURATED)
        margins_RP3 = config.beta * (ratios_RPS3[..., 0, :] - ratios_RPS3[..., 1, :])
        metrics |= {f"margins/{name}": total(margins_RP3[..., i]) for i, name in enumerate(MARGINS)}
        gaps_RP = lengths_RPS[..., 0] - lengths_RPS[..., 1]
        for name, inside_RP in _buckets(gaps_RP).items():
            metrics |= {f"_right/{name}": total(inside_RP & (margins_RP > 0)), f"_in/{name}": total(inside_RP)}
        gaps_RP = gaps_RP / 1024  # so that squares of thousands do not swallow the rest in float32
        moments = {"m": margins_RP, "g": gaps_RP, "mg": margins_RP * gaps_RP, "mm": margins_RP**2, "gg": gaps_RP**2}
        metrics |= {f"_moment/{name}": total(values_RP) for name, values_RP in moments.items()}
        for name, tags in (("end", [[end_id]]), *([("thought_end", thought_ends)] if thought_ends else [])):
            found = jnp.array([_sums_of_tag(tag, logprobs_RA, batch) for tag in tags]).sum(axis=0)
            metrics |= {f"_{name}/logps": found[0], f"_{name}/count": found[1]}
        return Sums(total(loss_RP), real_RP.sum().astype(jnp.float32), metrics)

    return compare


def _smoothing(config: PreferenceConfig) -> dict[str, float]:
    return {"label_smoothing": config.label_smoothing} if LOSSES[config.loss].smoothed else {}


def start_loss(config: PreferenceConfig, nll: float) -> float:
    """The loss where policy and reference are one model, ln 2 for DPO's; `nll` is the metric `nll/chosen`."""
    same = jnp.zeros(())
    return float(LOSSES[config.loss].function(same, same, config.beta, **_smoothing(config))) + config.nll_weight * nll


def _sums_of_tag(tag: Sequence[int], logprobs_RA: jax.Array, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
    """Over all places where these ids stand in an answer: their summed log-probs, and how many places there are."""
    starts_RA, logps_RA = jnp.ones(batch.targets.shape, bool), jnp.zeros(batch.targets.shape)
    for number, token in enumerate(tag):
        # The slots of an answer are neighbours, and so are their places: a tag never runs over its end.
        ahead = [
            jnp.roll(array, -number, axis=1) for array in (batch.trained, batch.targets, batch.regions, logprobs_RA)
        ]
        starts_RA &= (ahead[0] == batch.trained + number) & (ahead[1] == token) & (ahead[2] > 0)
        logps_RA += ahead[3]
    return jnp.where(starts_RA, logps_RA, 0.0).sum(), starts_RA.sum()


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
