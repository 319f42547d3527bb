"""Tests one optimizer update.

It must not depend on the mesh, micro-batches, the remat policy or packing.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support import small
from support.selection import cases

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.data.examples import Example
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import flatten_by_name
from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.runtime.mesh import num_data_shards
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import (
    Objective,
    PreferenceConfig,
    make_preference_loss,
    make_thinkpo_objective,
    sft_objective,
)
from thinkpo_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from thinkpo_jax.training.reference_log_probs import check_initial_loss, compute_reference
from thinkpo_jax.training.train_step import TrainState, init_train_state, make_train_step

STEPS = 4
ADAM = OptimizerConfig(learning_rate=3e-3, warmup_ratio=0.25, weight_decay=0.1)
EXAMPLES = {"sft": small.singles(24), "thinkpo": small.pairs(24)}
PREFERENCE = PreferenceConfig(beta=0.5)
COMPARE = make_preference_loss(PREFERENCE, end_of_turn_id=1)
OBJECTIVES: dict[str, Objective] = {
    "sft": sft_objective,
    "thinkpo": make_thinkpo_objective(PREFERENCE, end_of_turn_id=1),
}


def _train(
    kind: str, mesh: Mesh, *, compute: ComputeConfig = small.FLOAT32, **batch: Any
) -> tuple[list[dict[str, float]], TrainState]:
    """Returns the metrics of each update and the final state."""
    with jax.set_mesh(mesh):
        batches = small.batches(EXAMPLES[kind], shards=num_data_shards(mesh), steps=STEPS, size=12, **batch)
        return small.trained(batches, small.model(compute), OBJECTIVES[kind], ADAM, mesh)


@pytest.fixture(scope="module", params=["sft", "thinkpo"])
def one_device_run(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, float]], TrainState]:
    return request.param, *_train(request.param, small.mesh())


MESH_8 = {"data": 2, "fsdp": 2, "tensor": 2}  # test_mesh.py tests the others
VARIANTS = {
    "micro-batches": ({}, "none", {"rows_per_device": 1}),
    "remat projections": ({}, "projections", {}),
    "remat attention": ({}, "attention", {}),
    "remat full": ({}, "full", {}),
    "remat offload": ({}, "offload", {}),
    "mesh, remat attention": (MESH_8, "attention", {}),
    "all": (MESH_8, "full", {"rows_per_device": 1}),
}
# tests/models/test_transformer.py tests all remat policies.
SHORT = {"micro-batches", "remat offload", "all"}


@pytest.mark.parametrize("variant", cases(VARIANTS, short=SHORT.__contains__))
def test_the_trajectory_does_not_depend_on_mesh_micro_batches_or_remat(one_device_run: tuple, variant: str) -> None:
    kind, expected_history, expected_state = one_device_run
    sizes, remat, batch = VARIANTS[variant]
    compute = ComputeConfig.model_validate({"dtype": "float32", "remat": remat})
    history, state = _train(kind, small.mesh(**sizes), compute=compute, **batch)
    for expected, metrics in zip(expected_history, history, strict=True):
        assert expected.keys() == metrics.keys()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name
    difference_by_parameter = [
        np.abs(np.asarray(a) - np.asarray(b)).ravel()
        for a, b in zip(jax.tree.leaves(expected_state.model), jax.tree.leaves(state.model), strict=True)
    ]
    differences = np.concatenate(difference_by_parameter)
    assert differences.max() < 1e-4
    assert differences.mean() < 1e-6


def test_training_lowers_the_loss(one_device_run: tuple) -> None:
    kind, _, state = one_device_run
    batches = small.batches(EXAMPLES[kind], steps=1, size=24)
    batches.reference_log_probs = compute_reference(small.model(), batches, small.mesh())
    rows = jax.tree.map(lambda array: jnp.array(array[0]), batches[0])
    objective = jax.jit(OBJECTIVES[kind])
    before, after = (objective(model, rows) for model in (small.model(), state.model))
    assert after.loss < before.loss


def test_the_first_thinkpo_loss_is_ln_2() -> None:
    history, _ = _train("thinkpo", small.mesh())
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_a_start_model_that_is_not_the_reference_is_an_error() -> None:
    mesh = small.mesh()
    with jax.set_mesh(mesh):
        batches = small.batches(EXAMPLES["thinkpo"])
        batches.reference_log_probs = compute_reference(small.model(seed=1), batches, mesh)
        with pytest.raises(RunError, match=r"instead of 0\.693147"):
            check_initial_loss(PREFERENCE, COMPARE, small.model(), batches[0], mesh)
        batches.reference_log_probs = compute_reference(small.model(), batches, mesh)
        loss = check_initial_loss(PREFERENCE, COMPARE, small.model(), batches[0], mesh)
        assert loss == pytest.approx(math.log(2), abs=1e-6)


def test_the_initial_loss_check_finds_errors_that_cancel_out() -> None:
    mesh = small.mesh()
    with jax.set_mesh(mesh):
        batches = small.batches(EXAMPLES["thinkpo"])
        batches.reference_log_probs = compute_reference(small.model(), batches, mesh)
        batches.reference_log_probs[::2, 0] += 0.05
        batches.reference_log_probs[1::2, 0] -= 0.05
        with pytest.raises(RunError, match="differ from the cached reference"):
            check_initial_loss(PREFERENCE, COMPARE, small.model(), batches[0], mesh)


def test_short_stages_reach_the_full_learning_rate() -> None:
    for steps in (1, 2, 20):
        rate = learning_rate_schedule(OptimizerConfig(learning_rate=1.0), steps)
        assert max(float(np.asarray(rate(index))) for index in range(steps)) == 1.0


def _loss_and_gradient(kind: str, batches: BatchPlan) -> tuple[float, dict[str, float], list[np.ndarray]]:
    """Returns loss, metrics and gradient of one update over all examples."""
    model, objective = small.model(), OBJECTIVES[kind]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(model: Transformer) -> tuple[jax.Array, tuple]:
        rows = jax.tree.map(lambda array: jnp.array(array[0]), batches[0])
        sums = objective(model, rows)
        return sums.loss / sums.weight, (sums.metrics, sums.weight)

    (value, (metrics, weight)), gradient = loss(model)
    means = {name: float(total / weight) for name, total in metrics.items()}
    return float(value), means | {"weight": float(weight)}, [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]


@pytest.mark.parametrize("kind", ["sft", "thinkpo"])
@pytest.mark.parametrize("row_length", cases([48, 80], short=(48).__eq__))
def test_packed_rows_equal_one_example_per_row(kind: str, row_length: int) -> None:
    def one_update(examples: Sequence[Example], **batch: Any) -> BatchPlan:
        batches = small.batches(examples, steps=1, size=len(examples), row_length=row_length, **batch)
        # Each example has a different reference, so that mixed-up pairs change the loss.
        batches.reference_log_probs = (
            np.random.default_rng(1).normal(-30, 5, batches.reference_log_probs.shape).astype(np.float32)
        )
        return batches

    packed, unpacked = one_update(EXAMPLES[kind]), one_update(EXAMPLES[kind], pack=False)
    assert packed.rows < unpacked.rows
    expected, actual = _loss_and_gradient(kind, unpacked), _loss_and_gradient(kind, packed)
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1] == pytest.approx(expected[1], rel=1e-5)
    for a, b in zip(expected[2], actual[2], strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1.0, float(np.abs(a).max())))


def test_batches_are_split_over_the_data_axes() -> None:
    mesh = small.mesh(**MESH_8)
    batch = put_batch(small.batches(EXAMPLES["sft"], shards=4)[0], mesh)
    for array in batch:
        assert array.addressable_shards[0].data.shape[1] == array.shape[1] // 4


def test_a_nonfinite_update_is_not_applied() -> None:
    mesh = small.mesh()
    batches = small.batches(EXAMPLES["thinkpo"], steps=1)
    batches.reference_log_probs = np.full_like(batches.reference_log_probs, np.nan)
    optimizer = make_optimizer(ADAM, 1)
    model = small.model()
    with jax.set_mesh(mesh):
        state = init_train_state(small.model(), optimizer, mesh)
        state, metrics = make_train_step(OBJECTIVES["thinkpo"], optimizer, mesh, state)(
            state, put_batch(batches[0], mesh)
        )
    assert not metrics["finite"]
    assert int(state.step) == 1  # the next update reads the next batch
    for before, after in zip(jax.tree.leaves(model), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_array_equal(before, after)


def test_weight_decay_excludes_norms_and_biases() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_ratio=0.0, weight_decay=0.5)
    model = small.model()
    optimizer = make_optimizer(config, 1)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(model), model)
    is_decayed = {name: bool(jnp.any(value != 0)) for name, value in flatten_by_name(updates).items()}
    excluded = {name for name, value in is_decayed.items() if not value}
    assert excluded == {name for name in is_decayed if "norm" in name or "bias" in name}
    assert len(excluded) == 6
