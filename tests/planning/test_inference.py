"""The compiled decode step of the engine gathers no weights and copies neither weights nor cache.

The plan of an evaluation prints what the step takes. A compilation for TPUs and GPUs needs its own process, which runs
this file as a program.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from support import small
from support.attention import compile_in_child
from support.planning import QWEN2_7B, TINY, write_run_config
from support.plugins import CUDA, LIBTPU_LIBRARY, needs_cuda, needs_libtpu
from support.selection import exhaustive

from thinkpo_jax.inference.engine import SamplingConfig
from thinkpo_jax.inference.inference_model import abstract_pool, make_program_spec
from thinkpo_jax.inference.programs import ProgramSpec, prefill_layer
from thinkpo_jax.inference.weights import InferenceWeights, abstract_weights, convert_weights
from thinkpo_jax.models.architecture import Architecture, read_architecture
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.attention.paged import PAGE_SIZE
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.plan import main
from thinkpo_jax.planning import plan_evaluation
from thinkpo_jax.planning.estimates import TimeBounds, bytes_per_device
from thinkpo_jax.planning.hlo import Collective, find_collectives, find_loop_collectives
from thinkpo_jax.planning.inference import DecodePlan, DecodeShape, lower_decode_step
from thinkpo_jax.planning.topology import parse_topology
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh, num_data_shards
from thinkpo_jax.runtime.sharding import partition_spec, tree_shardings

SAMPLING = SamplingConfig(top_p=0.9)
WIDTH_64 = {"vocab_size": 151_936, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
WIDTH_64 |= {"intermediate_size": 4864, "num_hidden_layers": 24}  # Qwen2.5-0.5B: too narrow for the TPU kernel
MODELS = {"7B": QWEN2_7B, "0.5B": WIDTH_64}
PROMPT_LENGTH = 1024
WITH_SERVER = ("evaluation.engine=server", "evaluation.server={url: http://x/v1, model: x}")


def _decode_report(weights: InferenceWeights, spec: ProgramSpec, mesh: Mesh, shape: DecodeShape) -> dict[str, Any]:
    """Compiles a decode step. Returns what it takes of each device in bytes, and the sizes to compare it with."""
    program = lower_decode_step(weights, spec, mesh, shape, SAMPLING).compile()
    memory, layer = program.memory_analysis(), weights.layers[0]
    matrices = [layer.qkv, layer.o, layer.gate_up, layer.down]
    return {
        "program": "decode",
        "kernel": spec.decode_kernel,
        "collectives": find_loop_collectives(program.as_text(), mesh.size),
        "all_collectives": find_collectives(program.as_text(), mesh.size),
        "slots": shape.slots,
        "groups": num_data_shards(mesh),
        "tensor": mesh.shape["tensor"],
        "itemsize": jnp.dtype(spec.dtype).itemsize,
        "hidden_size": spec.arch.hidden_size,
        "vocab_size": spec.arch.vocab_size,
        "num_layers": spec.arch.num_layers,
        "smallest_matrix": min(bytes_per_device(matrix) for matrix in matrices),
        "vocabulary_table": bytes_per_device(weights.embedding),
        "weights": bytes_per_device(weights),
        "pool": bytes_per_device(abstract_pool(spec, mesh, shape.pages)),
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


def _check_decode_step(report: dict[str, Any]) -> None:
    """Checks that a step exchanges only activations of its slots, and that it works in place."""
    slots, tensor = report["slots"], report["tensor"]
    small_size = 16 * slots  # tokens and flags of each slot
    received = [(each[0], each[1] * each[2]) for each in report["collectives"]]
    large = [(kind, size) for kind, size in received if size > small_size]
    # After the embedding, and twice in each layer. The logits go from parts of the vocabulary to parts of the slots.
    hidden = 2 * slots * report["hidden_size"] * report["itemsize"] * (tensor - 1) / tensor
    logits = slots * report["vocab_size"] / tensor * 4 * (tensor - 1) / tensor
    expected = [("all-reduce", hidden)] * (2 * report["num_layers"] + 1) + [("all-to-all", logits)]
    assert sorted(large) == sorted(expected)
    assert sum(size for _, size in received) <= sum(size for _, size in expected) + 4 * small_size
    # XLA could also gather weights before the loop. After it, the tokens of all slots are gathered.
    tokens = 64 * slots * report["groups"]
    assert max(size for _, size, *_ in report["all_collectives"]) <= max(hidden, logits, tokens)
    assert hidden < report["smallest_matrix"]
    assert logits < report["vocabulary_table"]
    assert report["aliased"] >= 2 * report["num_layers"] * report["pool"]  # keys and values
    assert report["temporary"] < report["pool"]


def test_a_step_on_eight_devices_gathers_no_weights() -> None:
    mesh = small.mesh(data=4, tensor=2)
    spec = make_program_spec(small.ARCH, small.FLOAT32, mesh, vocab_size=small.ARCH.vocab_size)
    weights = abstract_weights(small.ARCH, small.FLOAT32, mesh)
    _check_decode_step(_decode_report(weights, spec, mesh, DecodeShape(slots=8, pages=512, table_width=8)))


def test_abstract_weights_are_those_of_a_model() -> None:
    mesh = small.mesh(data=2, tensor=2)
    with jax.set_mesh(mesh):
        model = small.model()
        converted = convert_weights(jax.device_put(model, tree_shardings(model, mesh)), mesh)
    abstract = abstract_weights(small.ARCH, small.FLOAT32, mesh)
    assert jax.tree.structure(converted) == jax.tree.structure(abstract)
    for array, expected in zip(jax.tree.leaves(converted), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        assert array.sharding.is_equivalent_to(expected.sharding, array.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "model"),
    [
        pytest.param("v5e:2x4", "7B", marks=[needs_libtpu, exhaustive]),
        pytest.param("v6e:2x2", "7B", marks=[needs_libtpu, exhaustive]),
        pytest.param("h100:4", "7B", marks=needs_cuda),
        pytest.param("v5e:2x2", "0.5B", marks=[needs_libtpu, exhaustive]),
        pytest.param("h100:4", "0.5B", marks=[needs_cuda, exhaustive]),
    ],
)
def test_steps_on_accelerators_gather_no_weights(topology: str, model: str) -> None:
    paths = os.pathsep.join(filter(None, [str(CUDA), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": paths, "TPU_LIBRARY_PATH": str(LIBTPU_LIBRARY)}
    decode, prefill = compile_in_child(__file__, [topology, model], environment)
    assert decode["kernel"] == ("pallas_gpu" if topology == "h100:4" else "pallas_tpu")
    _check_decode_step(decode)
    logits_bytes = 4 * decode["slots"] * decode["vocab_size"]
    assert decode["temporary"] < decode["weights"] / 20 + logits_bytes
    hidden = 2 * PROMPT_LENGTH * decode["hidden_size"] * 2 * (decode["tensor"] - 1) / decode["tensor"]
    assert [(kind, size * count) for kind, size, count, _ in prefill["collectives"]] == [("all-reduce", hidden)] * 2
    assert prefill["aliased"] >= 2 * decode["pool"]
    assert prefill["temporary"] < decode["weights"] / 4  # of activations. Most of them are those of the MLP.


def _compile(topology: str, model: str) -> None:
    """Compiles a step and the prefill of a layer, at the shapes of a real model with two layers."""
    devices = parse_topology(topology).devices()
    mesh = make_mesh(MeshConfig(data=len(devices) // 2, fsdp=1, tensor=2), devices)
    compute, shape = ComputeConfig(), DecodeShape(slots=32, pages=4096, table_width=64)
    arch = replace(_read_architecture(MODELS[model]), num_layers=2)
    spec = make_program_spec(arch, compute, mesh, vocab_size=arch.vocab_size)
    weights = abstract_weights(arch, compute, mesh)
    print(json.dumps(_decode_report(weights, spec, mesh, shape)), flush=True)
    program = _lower_prefill(weights, spec, mesh, shape).compile()
    memory = program.memory_analysis()
    report = {"program": "prefill", "collectives": find_collectives(program.as_text(), mesh.size)}
    report |= {"aliased": memory.alias_size_in_bytes, "temporary": memory.temp_size_in_bytes}
    print(json.dumps(report), flush=True)


def _read_architecture(shape: dict[str, int]) -> Architecture:
    with tempfile.TemporaryDirectory() as folder:
        write_run_config(Path(folder), shape)
        return read_architecture(Path(folder))


def _lower_prefill(weights: InferenceWeights, spec: ProgramSpec, mesh: Mesh, shape: DecodeShape) -> Any:
    """Lowers the prefill of a layer, with one prompt for each group."""

    def array(*sizes: int, dtype: Any = jnp.int32) -> Any:
        sharding = NamedSharding(mesh, partition_spec(("batch", *(None for _ in sizes))))
        return jax.ShapeDtypeStruct((num_data_shards(mesh), *sizes), dtype, sharding=sharding)

    rows = TokenPositions(array(PROMPT_LENGTH), array(PROMPT_LENGTH), array(1))
    x_RTD, pages_RM = array(PROMPT_LENGTH, spec.arch.hidden_size, dtype=spec.dtype), array(PROMPT_LENGTH // PAGE_SIZE)
    pool = abstract_pool(spec, mesh, shape.pages)
    with jax.set_mesh(mesh):
        return prefill_layer.lower(weights.layers[0], x_RTD, rows, (pool, pool), pages_RM, spec=spec, is_last=False)


def _plan(path: Path, *arguments: str) -> int:
    assignments = ["evaluation={benchmarks: [{name: gsm8k}], sampling: {max_new_tokens: 1000}}"]
    if "--set" in arguments:
        assignments += arguments[arguments.index("--set") + 1 :]
        arguments = arguments[: arguments.index("--set")]
    return run_command(main, ["--config", str(path), "--evaluation", *arguments, "--set", *assignments])


def test_a_plan_prints_memory_answers_and_labeled_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gib = 2**30
    plan = DecodePlan(
        kernel="pallas_tpu", groups=2, tensor=2, slots=32, group_tokens=64 * 199, longest=1256, weight_bytes=4 * gib,
        cache_bytes=5 * gib, temporary_bytes=gib, loading_bytes=8 * gib,
        collectives=[Collective("all-reduce", 2e6, 3, (0, 1))],
        bounds=TimeBounds(0.001, 0.004, 0.002), compile_seconds=7.0,
    )  # fmt: skip
    monkeypatch.setattr(plan_evaluation, "plan_decode_step", lambda config, topology: plan)
    assert _plan(write_run_config(tmp_path, TINY), "--topology", "v5e:2x2") == 0
    printed = capsys.readouterr().out
    rows = {line[:36].strip(): line[36:].strip() for line in printed.splitlines()}
    assert rows["groups x devices of a group"] == "2 x 2"
    assert rows["weights"] == "4.00 GiB"
    assert rows["KV cache"] == "5.00 GiB"
    assert rows["total per device"] == "10.00 GiB"
    assert rows["while loading"] == "8.00 GiB"
    assert rows["tokens in the cache of a group"] == "12736"
    assert rows["tokens in the cache of all groups"] == "25472"
    assert rows["answers of 1256 tokens that fit"] == "18"  # 20 pages each
    assert rows["slots"] == "64"
    assert rows["all-reduce per step, received"] == "3 x, 6 MB"
    assert rows["memory time of a step"] == "4 ms"
    assert rows["answers at once, 756 tokens each"] == "32"
    assert rows["tokens/s per device, at most"] == "2000"
    assert "not validated on hardware" in printed
    assert "the evaluation fits: 10.00 GiB of the 15.75 GiB of each v5e (63%)" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temporary_bytes": 12 * 2**30}, "a decode step takes 21.00 GiB of the 15.75 GiB of each v5e (133%)"),
        ({"loading_bytes": 16 * 2**30}, "loading the weights takes 16.00 GiB of the 15.75 GiB of each v5e (102%)"),
        ({"group_tokens": 1024}, "holds 1024 tokens, but an answer may need 1256"),
    ],
)
def test_a_step_that_does_not_fit_has_exit_status_1(
    changes: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    gib = 2**30
    plan = DecodePlan("pallas_tpu", 2, 2, 32, 12_736, 1256, 4 * gib, 5 * gib, gib, gib, [], TimeBounds(1, 1, 1), 7.0)
    monkeypatch.setattr(plan_evaluation, "plan_decode_step", lambda config, topology: replace(plan, **changes))
    assert _plan(write_run_config(tmp_path, TINY), "--topology", "v5e:2x2") == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
@needs_libtpu
def test_a_small_model_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(write_run_config(tmp_path, TINY), "--topology", "v5e:2x2") == 0
    printed = capsys.readouterr().out
    rows = {line[:36].strip(): line[36:].strip() for line in printed.splitlines()}
    assert rows["groups x devices of a group"] == "4 x 1"
    assert rows["decode kernel"] == "pallas_tpu"
    assert rows["KV cache"] == "12.60 GiB"  # 80 % of what the weights leave
    assert "the evaluation fits" in printed


@pytest.mark.slow
@needs_libtpu
def test_weights_that_do_not_fit_have_exit_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run_config(tmp_path, QWEN2_7B | {"num_hidden_layers": 64})
    assert _plan(path, "--topology", "v5e:1x1") == 1
    assert "they exceed the 15.8 GiB of a device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e"], "--evaluation needs a slice"),
        (["--topology", "v5e:2x2", "--stage", "first"], "no --smallest, --search or --stage"),
        (["--topology", "v5e:2x2", "--set", "evaluation=null"], "the configuration has no `evaluation`"),
        (["--topology", "v5e:2x2", "--set", *WITH_SERVER], "evaluation.engine is 'server'"),
    ],
)
def test_errors_of_users_have_exit_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _plan(write_run_config(tmp_path, TINY), *arguments) == 2
    assert message in capsys.readouterr().err


if __name__ == "__main__":
    _compile(*sys.argv[1:])
