"""Collectives and memory are read correctly from what XLA dumps."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from support import small

from thinkpo_jax.planning.hlo import find_collectives, total_memory

LOOP = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%once (x: bf16[4,8]) -> bf16[4,8] {
  %done = f32[1024]{0:T(1024)} all-reduce(%x), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
}

%steps (x: bf16[16,8]) -> bf16[64,8] {
  %part.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=5, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}

%steps.2 (x: bf16[16,8]) -> bf16[64,8] {
  %part.2 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=5, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %last = s32[]{:T(128)} constant(28), metadata={op_name="x"}
  ROOT %less = pred[] compare(%i, %last), direction=LT
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = bf16[64,8] fusion(%x), kind=kCustom, calls=%steps
  %b = bf16[64,8] fusion(%x), kind=kCustom, calls=%steps.2
  %inner = (s32[]) while(%state), condition=%free, body=%permutes
}

%free (state: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%permutes (state: (s32[])) -> (s32[]) {
  %moved = (f32[10], f32[10], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}
  %alone = f32[10] all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%add
}

%all-reduce-scatter.3.clone (in: f32[40]) -> f32[10] {
  %sum = f32[40] all-reduce(%in), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %part = f32[10] dynamic-slice(%sum, %start), dynamic_slice_sizes={10}
}

%all-sums (state: (s32[])) -> (s32[]) {
  %fused = f32[10] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3.clone
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %sums = (s32[]) while(%state), condition=%free, body=%all-sums, backend_config={"known_trip_count":{"n":"5"}}
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %told = (s32[]) while(%t), condition=%free, body=%once, backend_config={"known_trip_count":{"n":"3"}}
  %both = ((f32[8], f32[4]), (f32[16], f32[8])) all-gather-start(%p, %q), replica_groups=[2,2]<=[2,2]T(1,0)
  %scattered = f32[25] reduce-scatter(%p), replica_groups=[1,4]<=[4], to_apply=%add
}
"""


def test_collectives_in_loops_count_once_per_iteration() -> None:
    listed = find_collectives(LOOP, 4)
    collectives = {(collective.kind, collective.num_executions): collective for collective in listed}
    assert len(listed) == len(collectives)  # two steps on one channel are one collective
    assert {key: collective.bytes_received for key, collective in collectives.items()} == {
        ("all-gather", 28): 64 * 8 * 2 * 3 / 4,
        ("collective-permute", 28): 40,  # in a loop of unknown length
        ("all-reduce", 3): 2 * 4096 * 3 / 4,
        ("all-gather", 1): 24 * 4 / 2,
        ("reduce-scatter", 1): 300,
        ("reduce-scatter", 5): 40 * 4 * 3 / 4,  # fused, on the channel of the all-reduce
    }
    assert collectives[("all-gather", 1)].device_group == (0, 2)
    assert collectives[("all-gather", 28)].device_group == (0, 1, 2, 3)


def test_the_group_of_a_collective_over_one_axis_of_a_mesh() -> None:
    line = "  %x = f32[8] all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add"
    (collective,) = find_collectives("ENTRY %main (p: f32[8]) -> f32[8] {\n" + line + "\n}\n", 8)
    assert collective.device_group == (0, 4)


def test_collectives_of_a_compiled_program() -> None:
    """Weights split over 8 devices are gathered in each of 5 iterations. The results are summed over devices once."""
    mesh = small.mesh(fsdp=8)
    split, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), (None,)))

    def program(x: jax.Array, weights: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, replicated)), None

        x = jax.lax.scan(layer, x, weights)[0]
        return jax.lax.with_sharding_constraint(x.sum(axis=0), replicated)

    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=split)
    text = jax.jit(program).lower(x, weights).compile().as_text()
    assert text is not None
    collectives = {
        each.kind: (each.bytes_received * each.num_executions, each.num_executions, len(each.device_group))
        for each in find_collectives(text, 8)
    }
    assert collectives["all-gather"] == (5 * 64 * 64 * 4 * 7 / 8, 5, 8)
    assert collectives["all-reduce"] == (2 * 64 * 4 * 7 / 8, 1, 8)


def test_the_memory_report_gives_the_memory_of_the_device() -> None:
    vmem = "Memory Space: vmem (color=1)\nTotal bytes: 7\n"
    report = f"{vmem}Memory Space: default (color=0)\nTotal bytes: 17201250304 (16.02GiB)\n...\n{vmem}"
    assert total_memory(report) == 17_201_250_304
    assert total_memory(vmem) is None
    assert total_memory("Total bytes used: 12") is None  # perhaps not all of its digits
