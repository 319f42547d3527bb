"""One optimizer update: one jitted function for every objective."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from thinkpo_jax.data.batches import DeviceBatch
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.devices import compiler_options
from thinkpo_jax.runtime.sharding import abstract_with_shardings, tree_shardings
from thinkpo_jax.training.objectives import LossSums, Objective


class TrainState(NamedTuple):
    """What an update reads and replaces: float32 master weights, optimizer state, and the number of updates so far."""

    model: Transformer
    optimizer: optax.OptState
    step: jax.Array


Metrics = dict[str, jax.Array]
TrainStepFn = Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]


def init_train_state(model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state before the first update. The moments are sharded like their parameters.

    The state takes over the memory of the model, so the model cannot be used afterwards.
    """
    build = functools.partial(_build_state, optimizer)
    layout = tree_shardings(jax.eval_shape(build, model), mesh)
    return jax.jit(build, donate_argnums=0, out_shardings=layout)(model)


def abstract_train_state(model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the result of `init_train_state` as shapes with shardings. The model may be abstract too.

    Raises `UserError` if a mesh axis does not divide a size of the model.
    """
    return abstract_with_shardings(jax.eval_shape(functools.partial(_build_state, optimizer), model), mesh)


def _build_state(optimizer: optax.GradientTransformation, model: Transformer) -> TrainState:
    return TrainState(model, optimizer.init(model), jnp.zeros((), jnp.int32))  # pyright: ignore[reportArgumentType] -- a Module is a pytree


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, state: TrainState
) -> TrainStepFn:
    """Returns one jitted update on a batch [M, R, ...].

    The gradients of the M micro-batches are summed, then divided once by the weight. If the loss or the gradient is not
    finite, weights and optimizer state stay unchanged, and the step still counts. Metrics are means over the weight,
    with `loss`, `grad_norm` (before clipping), `weight` and `finite`.
    """

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        gradients, sums = _accumulate(objective, state.model, batch)
        weight = jnp.maximum(sums.weight, 1.0)
        with jax.named_scope("optimizer"):
            gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
            norm = optax.tree.norm(gradients)
            updates, moments = optimizer.update(gradients, state.optimizer, state.model)  # pyright: ignore[reportArgumentType] -- a Module is a pytree
            is_finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
            updated = (optax.apply_updates(state.model, updates), moments)  # pyright: ignore[reportArgumentType] -- a Module is a pytree
            unchanged = (state.model, state.optimizer)
            model, moments = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, unchanged)
        metrics = {name: value / weight for name, value in sums.metrics.items()}
        metrics |= {"loss": sums.loss / weight, "grad_norm": norm, "weight": sums.weight, "finite": is_finite}
        return TrainState(model, moments, state.step + 1), metrics

    layout = (tree_shardings(state, mesh), None)
    return jax.jit(step, donate_argnums=0, out_shardings=layout, compiler_options=compiler_options(mesh))


def _accumulate(objective: Objective, model: Transformer, batch: DeviceBatch) -> tuple[Any, LossSums]:
    """Returns gradients and sums, summed over the micro-batches of a batch."""

    def loss(model: Transformer, rows: DeviceBatch) -> tuple[jax.Array, LossSums]:
        sums = objective(model, rows)
        return sums.loss, sums

    gradient = jax.grad(loss, has_aux=True)

    def add(total: Any, rows: DeviceBatch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(model, rows)), None

    first = jax.tree.map(lambda array: array[0], batch)
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(gradient, model, first))
    return jax.lax.scan(add, zeros, batch)[0]


def make_eval_step(objective: Objective, mesh: Mesh) -> Callable[[Transformer, DeviceBatch], LossSums]:
    """Returns the jitted sums of an objective over a batch [M, R, ...] of the shape that updates have."""

    def evaluate(model: Transformer, batch: DeviceBatch) -> LossSums:
        return jax.tree.map(lambda sums: sums.sum(axis=0), jax.lax.map(lambda rows: objective(model, rows), batch))

    return jax.jit(evaluate, compiler_options=compiler_options(mesh))
