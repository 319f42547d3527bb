"""Shares of time by part: from made-up profiles of a GPU and a TPU, and from a real profile on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from thinkpo_jax.bench.time_by_part import operation_parts, profile_updates, time_by_part

PROGRAM = """HloModule jit_step

%fused_computation.1 (param: f32[8]) -> f32[8] {
  %a = f32[8] multiply(f32[8] %param, f32[8] %param), metadata={op_name="jit(step)/jvp(head)/mul"}
  %b = f32[8] add(f32[8] %a, f32[8] %a), metadata={op_name="jit(step)/jvp(head)/add"}
  ROOT %c = f32[8] add(f32[8] %b, f32[8] %a), metadata={op_name="jit(step)/optimizer/add"}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %kernel.1 = f32[8] custom-call(f32[8] %x), metadata={op_name="jit(step)/while/body/projections/attention/custom_call"}
  %dot.2 = f32[8] dot(f32[8] %x, f32[8] %x), metadata={op_name="jit(step)/transpose(jvp(feed_forward))/dot_general"}
  ROOT %tuple.1 = (s32[], f32[8]) tuple(s32[] %i, f32[8] %dot.2)
}

ENTRY %main (input: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while((s32[], f32[8]) %start), condition=%condition, body=%body, \
metadata={op_name="jit(step)/projections/while"}
  %fusion.1 = f32[8] fusion(f32[8] %y), kind=kLoop, calls=%fused_computation.1
  %heading.1 = f32[8] negate(f32[8] %y), metadata={op_name="jit(step)/heading/neg"}
  ROOT %adam = f32[8] add(f32[8] %y, f32[8] %y), metadata={op_name="jit(step)/optimizer/add;jit(step)"}
}
"""


def _profile(plane: str, line: str, events: Sequence[tuple[str, str | None, int, int]]) -> Any:
    """Returns a profile with events (name, HLO operation, start, duration), in microseconds."""
    names = sorted({name for name, *_ in events})
    text = ""
    for name, operation, start, duration in events:
        stat = f'stats {{ metadata_id: 1 str_value: "{operation}" }}' if operation else ""
        times = f"offset_ps: {start * 10**6} duration_ps: {duration * 10**6}"
        text += f"events {{ metadata_id: {1 + names.index(name)} {times} {stat} }}"
    known = "".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in enumerate(names, 1)
    )
    stats = 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }'
    other = 'planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 9000000 } } }'
    proto = f'{other} planes {{ name: "{plane}" lines {{ name: "{line}" {text} }} {known} {stats} }}'
    data = jax.profiler.ProfileData
    return data.from_serialized_xspace(data.text_proto_to_serialized_xspace(proto))


def test_operations_belong_to_the_innermost_scope() -> None:
    parts = operation_parts(PROGRAM)
    assert parts["kernel.1"] == "attention"
    assert parts["dot.2"] == "feed_forward"
    assert parts["fusion.1"] == "head"  # two of three operations that it fuses
    assert parts["adam"] == "optimizer"
    assert parts["heading.1"] == "other"  # only whole names count
    assert parts["while.1"] is None


def test_shares_of_a_gpu_sum_to_one() -> None:
    events = [
        ("cudnn_kernel", "kernel.1", 0, 30),
        ("gemm", "dot.2", 30, 20),
        ("loop_fusion", "fusion.1", 50, 10),
        ("loop_add", "adam", 80, 20),  # after a gap of 20
        ("memcpy", None, 90, 10),  # at the same time as the one before
        ("while", "while.1", 0, 100),  # contains the others
    ]
    result = time_by_part(_profile("/device:GPU:0", "Stream #14(Compute)", events), PROGRAM)
    shares = result["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["idle"] == pytest.approx(0.2)
    assert shares["attention"] == pytest.approx(0.8 * 30 / 90)
    assert shares["feed_forward"] == pytest.approx(0.8 * 20 / 90)
    assert shares["head"] == shares["other"] == pytest.approx(0.8 * 10 / 90)
    assert [each["name"] for each in result["operations"][:2]] == ["kernel.1", "dot.2"]


def test_a_tpu_names_its_events_after_the_instruction() -> None:
    events = [("%kernel.1 = f32[8] custom-call(f32[8] %x)", None, 0, 60), ("%adam = f32[8] add(%y)", None, 60, 40)]
    shares = time_by_part(_profile("/device:TPU:0", "XLA Ops", events), PROGRAM)["shares"]
    assert shares["attention"] == pytest.approx(0.6)
    assert shares["optimizer"] == pytest.approx(0.4)
    assert time_by_part(_profile("/device:TPU:0", "Steps", events), PROGRAM)["problem"]


def test_a_real_profile_on_the_cpu(tmp_path: Path) -> None:
    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        with jax.named_scope("head"):
            x = x @ x
        with jax.named_scope("optimizer"):
            return jnp.sin(x)

    x = jnp.ones((400, 400))
    compiled = function.lower(x).compile()
    result = profile_updates(lambda: jax.block_until_ready(compiled(x)), str(compiled.as_text()), tmp_path)
    assert result["shares"]["head"] > 0
    assert result["shares"]["optimizer"] > 0
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert not list(tmp_path.iterdir())


def test_a_profile_that_fails_costs_nothing_else(tmp_path: Path) -> None:
    def run() -> None:
        raise RuntimeError("no counters here")

    assert profile_updates(run, "", tmp_path) == {"problem": "RuntimeError: no counters here"}
