"""A model, examples and meshes that are small enough to compare complete training runs."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from thinkpo_jax.data.batches import BatchConfig, BatchPlan
from thinkpo_jax.data.examples import Example, Segment
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.rope import build_rope
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.runtime.sharding import put_batch, tree_shardings
from thinkpo_jax.training.objectives import Objective
from thinkpo_jax.training.optimizer import OptimizerConfig, make_optimizer
from thinkpo_jax.training.reference_log_probs import compute_reference
from thinkpo_jax.training.train_step import TrainState, init_train_state, make_train_step

THETA = 10_000.0
ARCH = Architecture(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=48,
    rope=build_rope({"rope_theta": THETA}, 8),
    norm_eps=1e-6,
    max_positions=128,
    qkv_bias=True,
    qk_norm=False,
    tied_head=False,
    init_std=0.2,
)
FLOAT32 = ComputeConfig(dtype="float32")


def mesh(**sizes: int) -> Mesh:
    """Returns a mesh of exactly these sizes over the first devices. Sizes that are not given are 1."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes
    return make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])


def model(compute: ComputeConfig = FLOAT32, seed: int = 0, arch: Architecture = ARCH) -> Transformer:
    """Returns a model with random weights, biases and norms, so that every parameter matters."""
    leaves, structure = jax.tree.flatten(Transformer(arch, compute, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def trained(
    batches: BatchPlan, model: Transformer, objective: Objective, config: OptimizerConfig, mesh: Mesh
) -> tuple[list[dict[str, float]], TrainState]:
    """Trains on the batches and returns the metrics of each update and the last state. The model is the reference."""
    model = jax.device_put(model, tree_shardings(model, mesh))
    if batches.answers_per_example > 1:
        batches.reference_log_probs = compute_reference(model, batches, mesh)
    optimizer = make_optimizer(config, len(batches))
    state = init_train_state(model, optimizer, mesh)
    step = make_train_step(objective, optimizer, mesh, state)
    history: list[dict[str, float]] = []
    for index in range(len(batches)):
        state, metrics = step(state, put_batch(batches[index], mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    return history, state


def segment(rng: np.random.Generator, prompt: int, answer: int) -> Segment:
    """Returns a prompt and an answer of random tokens."""
    return Segment(rng.integers(0, ARCH.vocab_size, prompt + answer).astype(np.int32), prompt)


def pairs(count: int, seed: int = 0) -> list[Example]:
    """Returns (long, short) pairs of various lengths."""
    rng = np.random.default_rng(seed)
    examples: list[Example] = []
    for _ in range(count):
        prompt = int(rng.integers(2, 6))
        long, short = segment(rng, prompt, int(rng.integers(6, 20))), segment(rng, prompt, int(rng.integers(1, 5)))
        short.token_ids[:prompt] = long.token_ids[:prompt]
        examples.append((long, short))
    return examples


def singles(count: int, seed: int = 0) -> list[Example]:
    """Returns SFT examples of various lengths."""
    return [(long,) for long, _ in pairs(count, seed)]


def batches(
    examples: Sequence[Example],
    *,
    shards: int = 1,
    own: Sequence[int] | None = None,
    steps: int = 4,
    size: int | None = 6,
    **batch: object,
) -> BatchPlan:
    """Returns `steps` updates of about `size` examples in rows of 48 tokens. `batch` overrides the batch section."""
    config = BatchConfig.model_validate({"size": size, "row_length": 48} | batch)
    return BatchPlan(examples, config, seed=0, num_shards=shards, local_shards=own, num_updates=steps, epochs=1.0)
