"""Which Hugging Face tensor is which parameter? One table, read both ways, strict on both sides."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from thinkpo_jax.models.architecture import Architecture, read_architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.safetensors_files import TensorLocation, join_first, read_tensor_index
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import abstract_model, expected_tensor_shapes, flatten_by_name, weight_mappings
from thinkpo_jax.runtime.config import UserError, collect_errors
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.sharding import tree_shardings

PREFETCH_TENSORS = 8  # tensors that are read before they are used


def init_random_model(folder: Path, compute: ComputeConfig, mesh: Mesh, *, seed: int) -> Transformer:
    """Fresh float32 weights in the shape that the folder's config.json gives, on the mesh."""
    arch = read_architecture(folder)
    layout = tree_shardings(abstract_model(arch, compute), mesh)
    return jax.jit(lambda key: Transformer(arch, compute, key), out_shardings=layout)(jax.random.key(seed))


def load_model(folder: Path, compute: ComputeConfig, mesh: Mesh) -> Transformer:
    """The folder's weights as float32 parameters on the mesh, one Hugging Face tensor at a time, in the files' order.

    Each process reads the slices that its devices hold; parameters are filled in place, so that beside them one tensor
    is in memory. Raises one `UserError` with all that is wrong with the folder; warns of weights that are not finite.
    """
    arch, tensors = check_model(folder)
    abstract = abstract_model(arch, compute)
    layout, shapes = flatten_by_name(tree_shardings(abstract, mesh)), flatten_by_name(abstract)
    parts = {name: (entry, layer) for entry in weight_mappings(abstract) for layer, name in enumerate(entry.names)}
    order = sorted(parts, key=lambda name: (tensors[name].file, tensors[name].begin))
    largest = max(tensors[name].nbytes for name in order)
    loaded: dict[str, jax.Array] = {}
    zeros: dict[str, jax.Array] = {}  # 0 for each tensor that is finite; ready when its copy on the device is done with
    before = None
    for name in _read_ahead(order, tensors):
        entry, layer = parts[name]
        whole = layout[entry.path]
        part = NamedSharding(mesh, PartitionSpec(*whole.spec[1:])) if entry.is_per_layer else whole
        if entry.is_per_layer and entry.path not in loaded:
            loaded[entry.path] = _zeros(shapes[entry.path].shape, whole)
        if before is not None and tensors[before].nbytes + tensors[name].nbytes > largest:
            zeros[before].block_until_ready()
        view = entry.from_hf(tensors[name].memory_map())  # transposed on the way to the device, which is fast
        tensor = jax.make_array_from_callback(view.shape, part, view.__getitem__)
        if before is not None:
            zeros[before].block_until_ready()
        loaded[entry.path], zeros[name] = _fill(loaded.get(entry.path), tensor, np.int32(layer), layout=whole)
        del tensor
        before = name
    if broken := [name for name, zero in zeros.items() if not np.isfinite(zero)]:
        log_warning(f"{folder}: NaN or infinite weights in {len(broken)} tensor(s): {join_first(broken, ', ')}.")
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in shapes])


def _read_ahead(order: Sequence[str], tensors: Mapping[str, TensorLocation]) -> Iterator[str]:
    """The names in their order, while a thread reads a few tensors ahead; several processes read a part each."""
    if jax.process_count() > 1:
        yield from order
        return
    pool = ThreadPoolExecutor(1)
    try:
        ahead = [pool.submit(tensors[name].prefetch) for name in order[:PREFETCH_TENSORS]]
        for index, name in enumerate(order):
            ahead.pop(0).result()
            if index + PREFETCH_TENSORS < len(order):
                ahead.append(pool.submit(tensors[order[index + PREFETCH_TENSORS]].prefetch))
            yield name
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@partial(jax.jit, static_argnames=("shape", "layout"))
def _zeros(shape: tuple[int, ...], layout: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, jnp.float32), layout)


@partial(jax.jit, donate_argnums=0, static_argnames="layout")
def _fill(
    parameter: jax.Array | None, tensor: jax.Array, layer: jax.Array, *, layout: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    """The parameter with the tensor as its layer (without a parameter: the tensor itself), and 0 or, if broken, NaN."""
    value = jnp.copy(tensor.astype(jnp.float32))
    if parameter is not None:
        value = jax.lax.dynamic_update_index_in_dim(parameter, value, layer, 0)
    zero = jnp.sum(tensor.astype(jnp.float32) * 0)  # NaN where one number is NaN or infinite
    return jax.lax.with_sharding_constraint(value, layout), zero


def check_model(folder: Path) -> tuple[Architecture, dict[str, TensorLocation]]:
    """What config.json says, and where each tensor that it asks for lies. Raises one `UserError` with all problems."""
    with collect_errors() as attempt:
        arch = attempt(read_architecture, folder)
        tensors = attempt(check_weights, folder, arch)
    assert arch is not None and tensors is not None  # noqa: PT018 -- `together` raised otherwise
    return arch, tensors


def check_weights(folder: Path, arch: Architecture | None) -> dict[str, TensorLocation]:
    """Where each tensor lies. Raises one `UserError` with all problems of the files, and of the names and shapes.

    Without an architecture (its config.json has problems of its own) the files alone are checked.
    """
    tensors = read_tensor_index(folder)
    if arch is not None:
        _check_tensors(folder, expected_tensor_shapes(arch), tensors)
    return tensors


def _check_tensors(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, TensorLocation]) -> None:
    problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - found.keys())]
    ignored = {"lm_head.weight"} if "lm_head.weight" not in expected else set()  # a copy of the tied embedding
    problems += [f"tensor {name} is not known here" for name in sorted(found.keys() - expected.keys() - ignored)]
    embedding = found.get("model.embed_tokens.weight")
    for name in ignored & found.keys():
        if embedding is not None and not np.array_equal(
            found[name].memory_map(), embedding.memory_map(), equal_nan=False
        ):
            problems.append(
                f"tensor {name} differs from the embedding, to which config.json ties it; set tie_word_embeddings to "
                "false there, or remove the tensor"
            )
    for name in sorted(expected.keys() & found.keys()):
        if found[name].shape != expected[name]:
            problems.append(
                f"tensor {name} has the shape {found[name].shape}, expected {expected[name]} from config.json"
            )
    if problems:
        raise UserError(join_first([f"{folder}: {problem}." for problem in problems], "\n"))
