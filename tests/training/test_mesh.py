"""Compares training on every mesh of eight devices with training on one device.

The updates are the same, and each device holds only its shard of the parameters and of Adam's moments.
"""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from support import small
from support.selection import cases

from thinkpo_jax.models.attention import blockwise as attention
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import flatten_by_name
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.context_parallel import check_row_divides_context
from thinkpo_jax.runtime.mesh import MESH_AXES, num_data_shards
from thinkpo_jax.runtime.sharding import tree_shardings
from thinkpo_jax.training.objectives import Objective, PreferenceConfig, make_thinkpo_objective, sft_objective
from thinkpo_jax.training.optimizer import OptimizerConfig
from thinkpo_jax.training.train_step import TrainState

DEVICES, STEPS = 8, 5
ARCH = dataclasses.replace(small.ARCH, num_heads=16, num_kv_heads=8)
ADAM = OptimizerConfig(learning_rate=3e-3, warmup_ratio=0.0, weight_decay=0.1)
EXAMPLES = {"sft": small.singles(200), "thinkpo": small.pairs(200)}
OBJECTIVES: dict[str, Objective] = {
    "sft": sft_objective,
    "thinkpo": make_thinkpo_objective(PreferenceConfig(beta=0.5), end_of_turn_id=1),
}
# All ordered factorizations of 8 into four axis sizes.
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=len(MESH_AXES)) if math.prod(sizes) == DEVICES]
SHORT = {(1, 2, 2, 2), (2, 1, 4, 1)}  # With the mesh of test_train_step.py, each pair of axes is split together.

TrainedRun = tuple[list[dict[str, float]], TrainState]


def _train(kind: str, mesh: Mesh, compute: ComputeConfig = small.FLOAT32) -> TrainedRun:
    """Trains on packed rows in two micro-batches. Returns the metrics of each update and the final state."""
    shards = num_data_shards(mesh)
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        if mesh.shape["context"] > 1:
            patch.setattr(attention, "BLOCK_SIZE", 16)  # blockwise attention handles rows that are split over devices
        batches = small.batches(
            EXAMPLES[kind], shards=shards, steps=STEPS, size=None, rows=16, rows_per_device=DEVICES // shards
        )
        assert batches.num_micro_batches == 2
        assert batches.examples_per_row > 1
        return small.trained(batches, small.model(compute, arch=ARCH), OBJECTIVES[kind], ADAM, mesh)


@pytest.fixture(scope="module", params=["sft", "thinkpo"])
def one_device_run(request: pytest.FixtureRequest) -> tuple[str, TrainedRun]:
    return request.param, _train(request.param, small.mesh())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", cases(MESHES, short=SHORT.__contains__), ids=lambda sizes: "x".join(map(str, sizes)))
def test_every_mesh_gives_the_trajectory_of_one_device(
    one_device_run: tuple[str, TrainedRun], sizes: tuple[int, ...]
) -> None:
    kind, expected = one_device_run
    mesh = small.mesh(**dict(zip(MESH_AXES, sizes, strict=True)))
    mesh_run = _train(kind, mesh)
    _assert_same_run(mesh_run, expected)
    _assert_each_device_holds_its_shard(mesh_run[1], mesh)


@pytest.mark.slow
@pytest.mark.parametrize("remat", cases(["attention", "offload"], short="offload".__eq__))
def test_remat_on_a_context_mesh_gives_the_trajectory_of_one_device(
    one_device_run: tuple[str, TrainedRun], remat: str
) -> None:
    kind, expected = one_device_run
    compute = ComputeConfig.model_validate({"dtype": "float32", "remat": remat})
    _assert_same_run(_train(kind, small.mesh(fsdp=2, context=2, tensor=2), compute), expected)


def _assert_same_run(run: TrainedRun, expected_run: TrainedRun) -> None:
    (history, state), (expected_history, expected_state) = run, expected_run
    for expected, metrics in zip(expected_history, history, strict=True):
        assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert expected.keys() == metrics.keys()
        for name, value in expected.items():
            if expected is expected_history[0] and ("right" in name or "accuracies" in name):
                continue  # margins are 0 before the first update, so their sign is only rounding noise
            assert metrics[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name
    differences = [
        np.abs(np.asarray(a) - np.asarray(b)).ravel()
        for a, b in zip(jax.tree.leaves(expected_state.model), jax.tree.leaves(state.model), strict=True)
    ]
    assert np.concatenate(differences).max() < 1e-4


def _assert_each_device_holds_its_shard(state: TrainState, mesh: Mesh) -> None:
    """Checks the parameters and both of Adam's moments. Only norms are replicated on all devices."""
    adam = jax.tree.leaves(state.optimizer, is_leaf=lambda x: isinstance(x, Transformer))
    moments = [node for node in adam if isinstance(node, Transformer)]
    assert len(moments) == 2
    for tree in (state.model, *moments):
        variables = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        for (name, array), variable in zip(flatten_by_name(tree).items(), variables, strict=True):
            axes = set(variable.get_metadata()["axes"])
            num_shards = mesh.shape["fsdp"] * mesh.shape["context"] if "embed" in axes else 1
            num_shards *= mesh.shape["tensor"] if {"vocab", "heads", "kv_heads", "mlp"} & axes else 1
            assert array.size // array.addressable_shards[0].data.size == num_shards, (name, array.sharding)
            assert len({str(shard.index) for shard in array.addressable_shards}) == num_shards, name
            assert "norm" in axes or "bias" in name or num_shards == DEVICES // mesh.shape["data"], name


@pytest.mark.parametrize(
    ("sizes", "length", "message"),
    [
        ({"context": 4}, 52, r"batch\.row_length is 52, which context: 4 does not divide.*multiple of 8.* 56"),
        ({"context": 3}, 48, r"context is 3; it must be a power of two"),
    ],
)
def test_a_row_length_that_the_context_axis_does_not_divide_is_an_error(
    sizes: dict[str, int], length: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_row_divides_context(small.mesh(**sizes), length, "stages.sft.batch.row_length")
    check_row_divides_context(small.mesh(context=4), 48, "row_length")
    check_row_divides_context(small.mesh(fsdp=4), 51, "row_length")


def test_a_parameter_that_the_mesh_does_not_divide_is_named_in_the_error() -> None:
    with pytest.raises(UserError, match=r"parameter blocks\.k.* has 2 along its axis 'kv_heads'.*\(tensor 8\)"):
        tree_shardings(small.model(), small.mesh(tensor=8))
    model_with_odd_width = small.model(arch=dataclasses.replace(ARCH, hidden_size=36))
    with pytest.raises(UserError, match=r"parameter .* has 36 along its axis 'embed'.*\(fsdp 4 x context 2\)"):
        tree_shardings(model_with_odd_width, small.mesh(fsdp=4, context=2))
