"""An update is the same over every mesh of eight devices, and each device holds its share of everything and no more."""

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
# Every way to write 8 as a product of four sizes, in order.
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=len(MESH_AXES)) if math.prod(sizes) == DEVICES]
SHORT = {(2, 2, 1, 2), (1, 2, 2, 2), (2, 1, 4, 1), (1, 1, 1, 8)}  # every pair of axes occurs

Trained = tuple[list[dict[str, float]], TrainState]


def _train(kind: str, mesh: Mesh, compute: ComputeConfig = small.FLOAT32) -> Trained:
    """Metrics of each update on packed rows in two micro-batches, and the state after the last."""
    shards = num_data_shards(mesh)
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        if mesh.shape["context"] > 1:
            patch.setattr(attention, "BLOCK_SIZE", 16)  # rows that are split are attended to by blocks
        batches = small.batches(
            EXAMPLES[kind], shards=shards, steps=STEPS, size=None, rows=16, rows_per_device=DEVICES // shards
        )
        assert batches.num_micro_batches == 2
        assert batches.examples_per_row > 1
        return small.trained(batches, small.model(compute, arch=ARCH), OBJECTIVES[kind], ADAM, mesh)


@pytest.fixture(scope="module", params=["sft", "thinkpo"])
def alone(request: pytest.FixtureRequest) -> tuple[str, Trained]:
    return request.param, _train(request.param, small.mesh())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", cases(MESHES, short=SHORT.__contains__), ids=lambda sizes: "x".join(map(str, sizes)))
def test_every_mesh_gives_the_trajectory_of_one_device(alone: tuple[str, Trained], sizes: tuple[int, ...]) -> None:
    kind, expected = alone
    mesh = small.mesh(**dict(zip(MESH_AXES, sizes, strict=True)))
    found = _train(kind, mesh)
    _same(found, expected)
    _every_device_holds_its_share(found[1], mesh)


@pytest.mark.slow
@pytest.mark.parametrize("remat", cases(["attention", "offload"], short="offload".__eq__))
def test_remat_of_rows_that_are_split_gives_it_too(alone: tuple[str, Trained], remat: str) -> None:
    kind, expected = alone
    compute = ComputeConfig.model_validate({"dtype": "float32", "remat": remat})
    _same(_train(kind, small.mesh(fsdp=2, context=2, tensor=2), compute), expected)


def _same(run: Trained, like: Trained) -> None:
    (found, state), (expected, expected_state) = run, like
    for before, after in zip(expected, found, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert before.keys() == after.keys()
        for name, value in before.items():
            if before is expected[0] and ("right" in name or "accuracies" in name):
                continue  # before the first update margins are 0 but for rounding, and their sign says nothing
            assert after[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name
    differences = [
        np.abs(np.asarray(a) - np.asarray(b)).ravel()
        for a, b in zip(jax.tree.leaves(expected_state.model), jax.tree.leaves(state.model), strict=True)
    ]
    assert np.concatenate(differences).max() < 1e-4


def _every_device_holds_its_share(state: TrainState, mesh: Mesh) -> None:
    """Parameters and both of Adam's moments; norms alone are whole everywhere."""
    adam = jax.tree.leaves(state.optimizer, is_leaf=lambda x: isinstance(x, Transformer))
    moments = [part for part in adam if isinstance(part, Transformer)]
    assert len(moments) == 2
    for tree in (state.model, *moments):
        variables = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        for (name, array), variable in zip(flatten_by_name(tree).items(), variables, strict=True):
            axes = set(variable.get_metadata()["axes"])
            parts = mesh.shape["fsdp"] * mesh.shape["context"] if "embed" in axes else 1
            parts *= mesh.shape["tensor"] if {"vocab", "heads", "kv_heads", "mlp"} & axes else 1
            assert array.size // array.addressable_shards[0].data.size == parts, (name, array.sharding)
            assert len({str(shard.index) for shard in array.addressable_shards}) == parts, name
            assert "norm" in axes or "bias" in name or parts == DEVICES // mesh.shape["data"], name


@pytest.mark.parametrize(
    ("sizes", "length", "message"),
    [
        ({"context": 4}, 52, r"batch\.row_length is 52, which context: 4 does not divide.*multiple of 8.* 56"),
        ({"context": 3}, 48, r"context is 3; it must be a power of two"),
    ],
)
def test_a_row_that_the_context_axis_does_not_divide_is_refused(
    sizes: dict[str, int], length: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_row_divides_context(small.mesh(**sizes), length, "stages.sft.batch.row_length")
    check_row_divides_context(small.mesh(context=4), 48, "row_length")
    check_row_divides_context(small.mesh(fsdp=4), 51, "row_length")


def test_a_size_that_the_mesh_does_not_divide_names_the_parameter() -> None:
    with pytest.raises(UserError, match=r"parameter blocks\.k.* has 2 along its axis 'kv_heads'.*\(tensor 8\)"):
        tree_shardings(small.model(), small.mesh(tensor=8))
    odd = small.model(arch=dataclasses.replace(ARCH, hidden_size=36))
    with pytest.raises(UserError, match=r"parameter .* has 36 along its axis 'embed'.*\(fsdp 4 x context 2\)"):
        tree_shardings(odd, small.mesh(fsdp=4, context=2))
