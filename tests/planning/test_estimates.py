"""Sizes, FLOPs and bandwidths that the planner computes without a compiler."""

from typing import Any

import jax
import pytest
from support import small
from support.planning import sft_stage

from thinkpo_jax.data.batches import BatchConfig
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.planning.estimates import (
    abstract_mesh,
    abstract_state,
    batch_shape,
    bytes_per_device,
    group_bandwidth,
    max_update_flops,
    parameter_count,
    state_memory,
)
from thinkpo_jax.planning.topology import parse_topology
from thinkpo_jax.runtime.mesh import MeshConfig, num_data_shards
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import sft_objective
from thinkpo_jax.training.optimizer import make_optimizer
from thinkpo_jax.training.train_step import make_train_step


def test_state_memory_equals_the_arguments_of_the_compiled_update() -> None:
    mesh, stage = small.mesh(fsdp=4, tensor=2), sft_stage()
    abstract = abstract_state(small.ARCH, small.FLOAT32, stage, abstract_mesh(MeshConfig(fsdp=4, tensor=2)))
    memory = state_memory(abstract)
    batches = small.batches(small.singles(12), shards=num_data_shards(mesh), steps=1)
    batch, state = put_batch(batches[0], mesh), abstract_state(small.ARCH, small.FLOAT32, stage, mesh)
    with jax.set_mesh(mesh):
        step: Any = make_train_step(sft_objective, make_optimizer(stage.optimizer, 1), mesh, state)
        argument_bytes = step.lower(state, batch).compile().memory_analysis().argument_size_in_bytes
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), batch)
    unused = shapes.example_ids, shapes.reference_log_probs  # which SFT does not read
    assert memory.total == argument_bytes - bytes_per_device(shapes) + bytes_per_device(unused)
    assert memory.optimizer - 12 == 2 * memory.parameters  # two moments, and three counters
    model_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(small.model()))
    assert parameter_count(small.ARCH) * 4 == model_bytes
    assert model_bytes / 8 <= memory.parameters <= model_bytes / 8 * 1.2  # norms and biases are less split


def test_batch_shapes_are_the_largest_that_data_can_need() -> None:
    def shape(shards: int, **batch: Any) -> tuple[int, ...]:
        return tuple(batch_shape(BatchConfig.model_validate({"row_length": 32} | batch), shards))

    assert shape(4, size=48, rows_per_device=1) == (12, 4, 32)
    assert shape(4, size=48) == (1, 48, 32)
    assert shape(16, rows=8) == (1, 16, 32)
    assert shape(3, rows=8, rows_per_device=2) == (2, 6, 32)
    # The batches of examples that each fill a row have the same shape.
    batches = small.batches(small.singles(40), shards=4, steps=4, size=10, pack=False, rows_per_device=1)
    assert shape(4, size=10, rows_per_device=1)[:2] == (batches.num_micro_batches, batches.rows)


def test_gpus_of_a_host_share_its_links_to_other_hosts() -> None:
    two_hosts, host, slice_ = (parse_topology(name) for name in ("h100:16", "h100:8", "v5e:4x4"))
    assert group_bandwidth(tuple(range(8)), host) == host.device.interconnect_bandwidth
    assert group_bandwidth((0, 8), two_hosts) == pytest.approx(50e9)
    assert group_bandwidth(tuple(range(16)), two_hosts) == pytest.approx(400e9)
    assert group_bandwidth((0, 8), slice_) == slice_.device.interconnect_bandwidth


def test_flops_of_full_rows_grow_with_rows_and_with_recomputation() -> None:
    shape = batch_shape(sft_stage(rows=4, row_length=64).batch, 2)
    twice = max_update_flops(
        small.ARCH, ComputeConfig(remat="full"), shape._replace(num_micro_batches=2 * shape.num_micro_batches)
    )
    assert twice.model == 2 * max_update_flops(small.ARCH, ComputeConfig(), shape).model
    assert twice.hardware > twice.model
