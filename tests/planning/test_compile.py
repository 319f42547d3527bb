"""Programs at the width of Qwen2.5-7B, compiled for absent TPUs, have no [tokens, vocabulary] array.

libtpu compiles on any Linux machine. This file, run as a program, compiles one of them in its own process.
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
    num_layers=2,  # Layers are scanned, so more of them compile to the same program.
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
ANSWERS = {"sft": (4000,), "thinkpo": (3300, 600)}  # tokens of the answers of an example. A row holds one example.

pytestmark = [pytest.mark.slow, needs_libtpu]

ENVIRONMENT = compiled.ENVIRONMENT | {"TPU_LIBRARY_PATH": str(LIBTPU_LIBRARY)}


@pytest.mark.parametrize("chip", cases(CHIPS, short="v5e".__eq__))
def test_log_probs_need_memory_for_one_block_of_logits(chip: str) -> None:
    command = [sys.executable, __file__, "head", chip]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    memory = json.loads(process.stdout.splitlines()[-1])
    assert memory["ours"] <= memory["plain"] / 4
    # One block of logits, and the gradient of the hidden states, in float32.
    assert memory["ours"] <= MAX_BLOCK_LOGITS * 4 + TOKENS * D * 4


@pytest.mark.parametrize(
    ("kind", "chip"), combinations(ANSWERS, CHIPS, short=lambda kind, chip: (kind == "sft") == (chip == "v5e"))
)
def test_an_update_has_no_array_of_tokens_times_vocabulary(kind: str, chip: str, tmp_path: Path) -> None:
    program, memory = _compiled_update(tmp_path, chip, kind)
    shapes = set(re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program))
    arrays = {shape: math.prod(int(size) for size in shape.split(",")) for shape in shapes}
    loss_tokens, columns = _batch(kind, num_shards=1).target_ids.shape[-1], V // MESHES[chip].get("tensor", 1)
    assert loss_tokens > D  # Otherwise the logits of a row would be no larger than the embedding table.
    assert f"{V},{D}" in arrays
    assert [shape for shape, size in arrays.items() if size > V * D] == []
    logits = {tokens * columns for tokens in (loss_tokens, ROW)}
    assert [shape for shape, size in arrays.items() if size and any(size % row == 0 for row in logits)] == []
    # Micro-batches accumulate only each device's shard of the head's gradient.
    assert f"bf16[{D},{columns}]" in program
    assert f"f32[{D},{columns}]" not in program
    assert memory < HBM[chip]


def _compiled_update(folder: Path, chip: str, kind: str) -> tuple[str, int]:
    """Returns the optimized program of an update, and the bytes that it takes of a device's memory.

    Both are read from what the compiler dumps. Then it is ended: machine code takes minutes and changes neither.
    (An executable's `as_text()` fails if a v6e copies several arrays at once.)
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
    """Returns the bytes of temporary memory of both passes on one device, for our log-probs and for plain ones."""
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

    def temporary(log_probs: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> int:
        def loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
            return (log_probs(x, head, targets) * weights).sum()

        passes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        memory: Any = passes.lower(x, head, targets, weights).compile().memory_analysis()
        return memory.temp_size_in_bytes

    return {"ours": temporary(token_log_probs), "plain": temporary(plain)}


def _compile_update(chip: str, kind: str, folder: Path) -> None:
    """Compiles an update. The compiler dumps the program to the folder."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
    mesh = make_mesh(MeshConfig(**MESHES[chip]), topology.devices)
    host_batch = _batch(kind, num_data_shards(mesh))

    def rows(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, partition_spec(BATCH_AXES)))

    objective = {"sft": sft_objective, "thinkpo": make_thinkpo_objective(PreferenceConfig(), end_of_turn_id=1)}[kind]
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5), 100)
    compute = ComputeConfig(dtype="bfloat16", remat="full", attention="splash")
    with jax.set_mesh(mesh):
        state = abstract_train_state(abstract_model(QWEN2_7B, compute), optimizer, mesh)
        step: Any = make_train_step(objective, optimizer, mesh, state)
        options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
        step.lower(state, jax.tree.map(rows, host_batch)).compile(compiler_options=options)


def _batch(kind: str, num_shards: int) -> HostBatch:
    """Returns two micro-batches with one row of one example on each device."""
    rng = np.random.default_rng(0)
    examples = [tuple(small.segment(rng, 48, answer) for answer in ANSWERS[kind]) for _ in range(2 * num_shards)]
    config = BatchConfig.model_validate({"size": 2 * num_shards, "row_length": ROW, "rows_per_device": 1})
    return BatchPlan(examples, config, seed=0, num_shards=num_shards, num_updates=1, epochs=1.0)[0]


if __name__ == "__main__":
    if sys.argv[1] == "head":
        print(json.dumps(_memory_of_head(sys.argv[2])))
    else:
        _compile_update(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
