"""A model that is ready for inference: its mesh, its weights in the layout of the engine, and the size of its cache."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from thinkpo_jax.inference.programs import Pools, ProgramSpec
from thinkpo_jax.inference.weights import InferenceWeights, convert_weights
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.attention.paged import PAGE_SIZE, pool_axes, pool_dtype, pool_heads, select_paged_kernel
from thinkpo_jax.models.compute_config import ComputeConfig, resolve_attention_kernel
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.devices import GIB, find_device_spec
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh, num_data_shards
from thinkpo_jax.runtime.processes import broadcast_from_primary
from thinkpo_jax.runtime.sharding import partition_spec

MAX_WEIGHT_SHARE = 0.5  # of the memory of a device, because loading holds the weights twice
CACHE_SHARE_OF_FREE_MEMORY = 0.8  # of what the weights leave on an accelerator. Prefill and the compiler need the rest.
CACHE_SHARE_OF_CPU_MEMORY = 0.25
CGROUP_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class InferenceModel:
    """Weights on the mesh of the engine, the programs that run them, and the pages that a data group may have."""

    weights: InferenceWeights
    mesh: Mesh
    spec: ProgramSpec
    max_pages: int

    @property
    def page_size(self) -> int:
        """The number of tokens of a page."""
        return PAGE_SIZE

    @property
    def max_context(self) -> int:
        """The number of tokens that a prompt and its answer may have together."""
        return min(self.spec.arch.max_positions, (self.max_pages - 1) * self.page_size)

    @property
    def num_groups(self) -> int:
        """The number of data groups. Each holds all weights and answers its own requests."""
        return num_data_shards(self.mesh)

    def empty_pools(self, num_pages: int) -> Pools:
        """Returns the cache with so many pages in each group."""
        pool = abstract_pool(self.spec, self.mesh, num_pages)
        create = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=pool.sharding)
        shape, dtype = pool.shape, pool.dtype
        return tuple((create(shape, dtype), create(shape, dtype)) for _ in range(self.spec.arch.num_layers))


def load_inference_model(
    source: ModelSource, compute: ComputeConfig, *, devices: Sequence[Any], cache_memory: float | None
) -> InferenceModel:
    """Loads the weights of a folder for inference on these devices. See `prepare_inference_model`."""
    mesh = inference_mesh(source.architecture, compute, devices)
    with jax.set_mesh(mesh):
        model = source.load(compute, mesh, dtype=compute.dtype)  # in float32 it may not fit
        spec = make_program_spec(source.architecture, compute, mesh, vocab_size=source.tokenizer.vocab_size)
        weights = jax.block_until_ready(convert_weights(model, mesh))
        del model  # so that the cache can have its memory
        return _add_cache(weights, spec, mesh, cache_memory)


def prepare_inference_model(
    model: Transformer, mesh: Mesh, *, vocab_size: int, cache_memory: float | None = None
) -> InferenceModel:
    """Converts the weights of a model for inference on a mesh of `inference_mesh`, in the model's compute dtype.

    The model stays in memory. Token ids of `vocab_size` and more are never drawn. The cache may take `cache_memory` GiB
    of each device. Raises `UserError` if that is too little for one page of a group.
    """
    spec = make_program_spec(model.arch, model.compute, mesh, vocab_size=vocab_size)
    return _add_cache(jax.block_until_ready(convert_weights(model, mesh)), spec, mesh, cache_memory)


def _add_cache(weights: InferenceWeights, spec: ProgramSpec, mesh: Mesh, cache_memory: float | None) -> InferenceModel:
    available = _cache_bytes(mesh) if cache_memory is None else int(cache_memory * GIB)
    return InferenceModel(weights, mesh, spec, broadcast_from_primary(count_pages(available, spec, mesh)))


def make_program_spec(arch: Architecture, compute: ComputeConfig, mesh: Mesh, *, vocab_size: int) -> ProgramSpec:
    """Returns what the programs for this mesh are compiled from. Its devices need not exist."""
    compute = resolve_attention_kernel(compute, arch, mesh, ())
    kernel = select_paged_kernel(mesh.devices.flat[0], head_dim=arch.head_dim, dtype=compute.dtype)
    return ProgramSpec(arch, compute.dtype, vocab_size, compute.attention, kernel)


def inference_mesh(
    arch: Architecture, compute: ComputeConfig, devices: Sequence[Any], memory: float | None = None
) -> Mesh:
    """Returns the mesh of the engine: tensor parallelism in the smallest groups of devices that hold the model.

    The groups answer different requests. `memory` is the bytes that each device has for the engine (default: all of its
    memory). Raises `UserError` if no group that the key/value heads allow is large enough.
    """
    bytes_per_device = weight_bytes(arch, compute)
    if memory is None:
        local_devices = [device for device in devices if device.process_index == jax.process_index()]
        memory = device_memory_limit(local_devices[0])  # other processes cannot ask this device
    sizes = [size for size in range(1, len(devices) + 1) if len(devices) % size == 0 and _divides(arch, size)]
    fitting = [size for size in sizes if bytes_per_device / size <= MAX_WEIGHT_SHARE * memory]
    tensor = broadcast_from_primary(fitting[0] if fitting else sizes[-1])
    if not fitting:
        raise UserError(
            f"the weights take {bytes_per_device / GIB:.1f} GiB, and loading holds them twice. Split over {tensor} of "
            f"{len(devices)} device(s), they exceed the {memory / GIB:.1f} GiB of a device. A split must divide the "
            f"{arch.num_kv_heads} key/value heads, the vocabulary of {arch.vocab_size} and the MLP. Use more devices, "
            "or larger ones."
        )
    return make_mesh(MeshConfig(data=len(devices) // tensor, fsdp=1, tensor=tensor), devices)


def _divides(arch: Architecture, size: int) -> bool:
    return all(number % size == 0 for number in (arch.num_kv_heads, arch.mlp_size, arch.vocab_size))


def weight_bytes(arch: Architecture, compute: ComputeConfig) -> int:
    """Returns the bytes of all weights in the compute dtype."""
    leaves = jax.tree.leaves(abstract_model(arch, compute))
    return sum(math.prod(leaf.shape) for leaf in leaves) * jnp.dtype(compute.dtype).itemsize


def page_bytes(spec: ProgramSpec, mesh: Mesh) -> int:
    """Returns the bytes of one page of all layers on one device."""
    arch, kernel = spec.arch, spec.decode_kernel
    num_elements = arch.num_layers * PAGE_SIZE * math.prod(pool_heads(kernel, arch.num_kv_heads, arch.head_dim))
    return 2 * num_elements * pool_dtype(kernel, spec.dtype).itemsize // mesh.shape["tensor"]


def count_pages(available: int, spec: ProgramSpec, mesh: Mesh) -> int:
    """Returns the pages of a group in `available` bytes of each device. Raises `UserError` if there are too few."""
    num_pages = available // page_bytes(spec, mesh)
    if num_pages < 2:
        raise UserError(
            f"local.cache_memory gives the KV cache {available / GIB:.2g} GiB on each device. It needs at least two "
            f"pages of {page_bytes(spec, mesh) / GIB:.2g} GiB, one of them for free slots. Increase "
            "local.cache_memory, or use more devices."
        )
    return num_pages


def abstract_pool(spec: ProgramSpec, mesh: Mesh, num_pages: int) -> jax.ShapeDtypeStruct:
    """Returns the keys of one layer, or its values, with so many pages in each group."""
    kernel = spec.decode_kernel
    heads, head_dim = pool_heads(kernel, spec.arch.num_kv_heads, spec.arch.head_dim)
    shape = (heads, num_data_shards(mesh) * num_pages, PAGE_SIZE, head_dim)
    sharding = NamedSharding(mesh, partition_spec(pool_axes(kernel)))
    return jax.ShapeDtypeStruct(shape, pool_dtype(kernel, spec.dtype), sharding=sharding)


def device_memory_limit(device: Any) -> float:
    """Returns the bytes that programs may use on a device. The devices of a CPU share its memory without a limit."""
    if device.platform == "cpu":
        return math.inf
    stats = device.memory_stats() or {}
    spec = find_device_spec(device.device_kind)
    return stats.get("bytes_limit") or (spec.memory if spec else math.inf)


def free_device_memory(device: Any) -> float:
    """Returns the bytes of `device_memory_limit` that no array takes now."""
    return device_memory_limit(device) - (device.memory_stats() or {}).get("bytes_in_use", 0)


def _cache_bytes(mesh: Mesh) -> int:
    """Returns the bytes of each device that the cache may take by default, after the weights are loaded."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return int(CACHE_SHARE_OF_CPU_MEMORY * _cpu_memory() / len(mesh.local_devices))
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise UserError(f"the memory of {device.device_kind} is not known. Set cache_memory, in GiB for each device.")
    return accelerator_cache_bytes(stats["bytes_limit"], stats.get("bytes_in_use", 0))


def accelerator_cache_bytes(memory: float, in_use: float) -> int:
    """Returns the bytes of the cache on an accelerator whose weights take `in_use` of its memory."""
    return int(CACHE_SHARE_OF_FREE_MEMORY * (memory - in_use))


def _cpu_memory() -> int:
    """Returns the bytes of memory of this machine, or of the container in which the process runs."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_MEMORY_LIMIT.read_text().strip() if CGROUP_MEMORY_LIMIT.exists() else ""
    return min(memory, int(limit)) if limit.isdecimal() else memory  # "max" is no limit
