"""What is one update? One jitted function for every objective."""

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
    """What an update reads and replaces: float32 master weights, the optimizer's moments, updates done so far."""

    model: Transformer
    optimizer: optax.OptState
    step: jax.Array


Metrics = dict[str, jax.Array]
TrainStepFn = Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]


def init_train_state(model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first update; the moments lie on the mesh like their parameters.

    The model becomes part of the state, which is no second copy: it cannot be used on its own afterwards.
    """
    build = functools.partial(_state, optimizer)
    layout = tree_shardings(jax.eval_shape(build, model), mesh)
    return jax.jit(build, donate_argnums=0, out_shardings=layout)(model)


def abstract_train_state(model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """What `initial_state` gives, with shapes and layouts in place of arrays; the model may be abstract too.

    `make_step`'s function can be lowered with it. Raises `UserError` where a size does not divide.
    """
    return abstract_with_shardings(jax.eval_shape(functools.partial(_state, optimizer), model), mesh)


def _state(optimizer: optax.GradientTransformation, model: Transformer) -> TrainState:
    return TrainState(model, optimizer.init(model), jnp.zeros((), jnp.int32))  # pyright: ignore[reportArgumentType] -- a Module is a pytree


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, state: TrainState
) -> TrainStepFn:
    """One update on a batch [M, R, ...]: gradients of M micro-batches are summed, then divided once by the weight.

    An update whose loss or gradient is not finite leaves weights and moments as they were and only counts as a step;
    its metrics say so (`finite` is 0). Metrics are means over the weight, with `loss`, `grad_norm` (before clipping),
    `weight` and `finite`.
    """

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        gradients, sums = _accumulate(objective, state.model, batch)
        weight = jnp.maximum(sums.weight, 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
        norm = optax.tree.norm(gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.model)  # pyright: ignore[reportArgumentType] -- a Module is a pytree
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
        new = (optax.apply_updates(state.model, updates), moments)  # pyright: ignore[reportArgumentType] -- a Module is a pytree
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, (state.model, state.optimizer))
        state = TrainState(kept[0], kept[1], state.step + 1)
        metrics = {name: value / weight for name, value in sums.metrics.items()}
        metrics |= {"loss": sums.loss / weight, "grad_norm": norm, "weight": sums.weight, "finite": finite}
        return state, metrics

    layout = (tree_shardings(state, mesh), None)
    return jax.jit(step, donate_argnums=0, out_shardings=layout, compiler_options=compiler_options(mesh))


def _accumulate(objective: Objective, model: Transformer, batch: DeviceBatch) -> tuple[Any, LossSums]:
    """Summed gradients and sums over the micro-batches of a batch."""

    def loss(model: Transformer, rows: DeviceBatch) -> tuple[jax.Array, LossSums]:
        sums = objective(model, rows)
        return sums.loss, sums

    gradient = jax.grad(loss, has_aux=True)

    def body(total: Any, rows: DeviceBatch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(model, rows)), None

    first = jax.tree.map(lambda array: array[0], batch)
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(gradient, model, first))
    return jax.lax.scan(body, zeros, batch)[0]


def make_eval_step(objective: Objective, mesh: Mesh) -> Callable[[Transformer, DeviceBatch], LossSums]:
    """The sums of an objective over a batch [M, R, ...], of the shape that the updates have; nothing is trained."""

    def evaluate(model: Transformer, batch: DeviceBatch) -> LossSums:
        return jax.tree.map(lambda sums: sums.sum(axis=0), jax.lax.map(lambda rows: objective(model, rows), batch))

    return jax.jit(evaluate, compiler_options=compiler_options(mesh))
