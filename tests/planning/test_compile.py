"""Compiled for TPUs that are not there, at the width of Qwen2.5-7B: no [tokens, vocabulary] array, little memory.

libtpu compiles on any Linux machine. Each compilation is a process of its own: this file, run as a program.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from support import small
from support.plugins import LIBTPU_LIBRARY, needs_libtpu
from support.selection import cases, combinations

from thinkpo_jax.data.batches import BatchConfig, BatchPlan, HostBatch
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.rope import build_rope
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.planning import compile as compiled
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh, num_data_shards
from thinkpo_jax.runtime.sharding import BATCH_AXES, partition_spec
from thinkpo_jax.training.objectives import PreferenceConfig, make_thinkpo_objective, sft_objective
from thinkpo_jax.training.optimizer import OptimizerConfig, make_optimizer
from thinkpo_jax.training.token_log_probs import MAX_BLOCK_LOGITS, token_log_probs
from thinkpo_jax.training.train_step import abstract_train_state, make_train_step

V, D = 152_064, 3584
QWEN2_7B = Architecture(
    vocab_size=V,
    hidden_size=D,
    num_layers=2,  # they are scanned: more of them are compiled in the same way
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    mlp_size=18_944,
    rope=build_rope({"rope_theta": 1e6}, 128),
    norm_eps=1e-6,
    max_positions=32_768,
    qkv_bias=True,
    qk_norm=False,
    tied_head=False,
)
ROW, TOKENS = 4096, 8192
CHIPS = ("v5e", "v6e")
HBM = {"v5e": 16 * 2**30, "v6e": 32 * 2**30}
MESHES = {"v5e": {"fsdp": 2, "tensor": 2}, "v6e": {"fsdp": 4}}
ANSWERS = {"sft": (4000,), "thinkpo": (3300, 600)}  # tokens of the answers of an example; a row holds one example

pytestmark = [pytest.mark.slow, needs_libtpu]

ENVIRONMENT = compiled.ENVIRONMENT | {"TPU_LIBRARY_PATH": str(LIBTPU_LIBRARY)}


@pytest.mark.parametrize("chip", cases(CHIPS, short="v5e".__eq__))
def test_logprobs_take_one_block_of_logits(chip: str) -> None:
    command = [sys.executable, __file__, "head", chip]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    memory = json.loads(found.stdout.splitlines()[-1])
    assert memory["ours"] <= memory["plain"] / 4
    assert (
        memory["ours"] <= MAX_BLOCK_LOGITS * 4 + TOKENS * D * 4
    )  # a block, and the gradient of hidden states, in float32


@pytest.mark.parametrize(
    ("kind", "chip"), combinations(ANSWERS, CHIPS, short=lambda kind, chip: (kind == "sft") == (chip == "v5e"))
)
def test_an_update_has_no_array_of_tokens_times_vocabulary(kind: str, chip: str, tmp_path: Path) -> None:
    program, memory = _update(tmp_path, chip, kind)
    found = set(re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program))
    arrays = {shape: math.prod(int(size) for size in shape.split(",")) for shape in found}
    trained, columns = _batch(kind, shards=1).target_ids.shape[-1], V // MESHES[chip].get("tensor", 1)
    assert trained > D  # else a row's logits are no larger than the table of embeddings
    assert f"{V},{D}" in arrays
    assert [shape for shape, size in arrays.items() if size > V * D] == []
    logits = {tokens * columns for tokens in (trained, ROW)}
    assert [shape for shape, size in arrays.items() if size and any(size % whole == 0 for whole in logits)] == []
    # Micro-batches add up each device's part of the head's gradient, not the whole.
    assert f"bf16[{D},{columns}]" in program
    assert f"f32[{D},{columns}]" not in program
    assert memory < HBM[chip]


def _update(folder: Path, chip: str, kind: str) -> tuple[str, int]:
    """The program of an update, optimised and scheduled, and the bytes that it takes of a device's memory.

    Both are read from what the compiler writes, which then is ended: machine code takes minutes and changes neither.
    (An executable's `as_text()` fails where a v6e copies several arrays at once.)
    """
    with (folder / "errors").open("w+") as errors:
        command = [sys.executable, __file__, "update", chip, kind, str(folder)]
        with subprocess.Popen(command, stdout=errors, stderr=errors, env=os.environ | ENVIRONMENT) as process:
            while process.poll() is None and not list(folder.glob("*after_buffer_assignment.txt")):  # the last of them
                time.sleep(0.2)
            process.kill()
        reports = list(folder.glob("*memory-usage-report.txt"))
        errors.seek(0)
        assert reports, errors.read()[-4000:]
    total = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", reports[0].read_text(encoding="utf-8"))
    assert total is not None
    (program,) = folder.glob("*after_optimizations.txt")
    return program.read_text(encoding="utf-8"), int(total[1])


def _memory_of_head(chip: str) -> dict[str, int]:
    """Bytes of temporary memory of both passes on one device: of ours, and of plain log-probs."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:1x1", chips_per_host_bounds=(1, 1, 1)
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    x = jax.ShapeDtypeStruct((1, TOKENS, D), jnp.bfloat16, sharding=sharding)
    head = jax.ShapeDtypeStruct((D, V), jnp.bfloat16, sharding=sharding)
    targets = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32, sharding=sharding)
    weights = jax.ShapeDtypeStruct((1, TOKENS), jnp.float32, sharding=sharding)

    def plain(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    def temporary(logprobs: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> int:
        def loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
            return (logprobs(x, head, targets) * weights).sum()

        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        memory: Any = both.lower(x, head, targets, weights).compile().memory_analysis()
        return memory.temp_size_in_bytes

    return {"ours": temporary(token_log_probs), "plain": temporary(plain)}


def _compile_update(chip: str, kind: str, folder: Path) -> None:
    """Compiles a whole update; the compiler writes what it makes of it to the folder."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
    mesh = make_mesh(MeshConfig(**MESHES[chip]), topology.devices)
    host = _batch(kind, num_data_shards(mesh))

    def rows(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, partition_spec(BATCH_AXES)))

    objective = {"sft": sft_objective, "thinkpo": make_thinkpo_objective(PreferenceConfig(), end_of_turn_id=1)}[kind]
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5), 100)
    compute = ComputeConfig(dtype="bfloat16", remat="full", attention="splash")
    with jax.set_mesh(mesh):
        state = abstract_train_state(abstract_model(QWEN2_7B, compute), optimizer, mesh)
        step: Any = make_train_step(objective, optimizer, mesh, state)
        written = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
        step.lower(state, jax.tree.map(rows, host)).compile(compiler_options=written)


def _batch(kind: str, shards: int) -> HostBatch:
    """Two micro-batches, one row of one example on each device."""
    rng = np.random.default_rng(0)
    examples = [tuple(small.segment(rng, 48, answer) for answer in ANSWERS[kind]) for _ in range(2 * shards)]
    config = BatchConfig.model_validate({"size": 2 * shards, "row_length": ROW, "rows_per_device": 1})
    return BatchPlan(examples, config, seed=0, num_shards=shards, num_updates=1, epochs=1.0)[0]


if __name__ == "__main__":
    if sys.argv[1] == "head":
        print(json.dumps(_memory_of_head(sys.argv[2])))
    else:
        _compile_update(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
