"""Loads weights from a Hugging Face folder onto the mesh."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from thinkpo_jax.models.architecture import Architecture, read_architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.safetensors_files import TensorLocation, join_first, read_tensor_index
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import abstract_model, cast_matrices, flatten_by_name, mappings_by_hf_name
from thinkpo_jax.runtime.config import UserError, collect_errors
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.sharding import abstract_with_shardings, tree_shardings

PREFETCH_TENSORS = 8  # Tensors that are read before they are used.
COMPUTED_TENSOR = "rotary_emb.inv_freq"  # Old checkpoints hold it. config.json gives the same frequencies.


def load_model(
    folder: Path, compute: ComputeConfig, mesh: Mesh, *, vocab_size: int | None = None, dtype: str = "float32"
) -> Transformer:
    """Loads the folder's weights as parameters of this dtype on the mesh. Norms are always float32.

    The loader reads one Hugging Face tensor at a time, in the order of the files. Each process reads only the slices
    that its devices hold. Parameters are filled in place, so memory holds about one tensor beside them. A warning names
    the tensors with NaN or infinite weights. If `vocab_size` is larger than that of config.json, embedding and untied
    head get more rows: the mean of the others. Raises one `UserError` with all problems of config.json and the weights.
    """
    with collect_errors() as collector:
        arch = collector(read_architecture, folder)
        tensors = collector(check_weights, folder, arch)
    assert arch is not None and tensors is not None  # noqa: PT018 -- `collect_errors` raised otherwise
    mappings = mappings_by_hf_name(abstract_model(arch, compute))
    abstract = abstract_model(replace(arch, vocab_size=vocab_size or arch.vocab_size), compute, dtype)
    targets = flatten_by_name(abstract_with_shardings(abstract, mesh))
    order = sorted(mappings, key=lambda name: (tensors[name].file, tensors[name].begin))
    max_bytes = max(tensors[name].nbytes for name in order)
    parameters: dict[str, Array] = {}
    nan_checks: dict[str, Array] = {}  # 0 for a finite tensor, else NaN.
    check, previous_bytes = None, 0  # The check is ready when the device has used its copy of the previous tensor.
    # Several processes prefetch nothing, because each of them needs only a part of every tensor.
    for name in order if jax.process_count() > 1 else _prefetch_tensors(order, tensors):
        mapping, layer = mappings[name]
        target = targets[mapping.path]
        spec = target.sharding.spec[1:] if mapping.is_per_layer else target.sharding.spec
        if mapping.is_per_layer and mapping.path not in parameters:
            create = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=target.sharding)
            parameters[mapping.path] = create(target.shape, target.dtype)
        if previous_bytes + tensors[name].nbytes > max_bytes:
            jax.block_until_ready(check)
        view = mapping.from_hf(tensors[name].memory_map())  # Transposed on the way to the device, which is fast.
        shape = target.shape[1:] if mapping.is_per_layer else target.shape
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        tensor = jax.make_array_from_callback(shape, sharding, _slice_reader(view, shape))
        jax.block_until_ready(check)
        parameters[mapping.path], check = _fill(
            parameters.get(mapping.path), tensor, layer, dtype=target.dtype, sharding=target.sharding
        )
        nan_checks[name], previous_bytes = check, tensors[name].nbytes
        del tensor
    if broken := [name for name, check in nan_checks.items() if np.isnan(check)]:
        log_warning(f"{folder}: NaN or infinite weights in {len(broken)} tensor(s): {join_first(broken)}.")
    return jax.tree.unflatten(jax.tree.structure(abstract), [parameters[path] for path in targets])


def _slice_reader(view: np.ndarray, shape: tuple[int, ...]) -> Callable[[Any], np.ndarray]:
    """Returns a function that reads a slice of the view. If `shape` has more rows, they are the mean of the view's."""
    if view.shape == shape:
        return view.__getitem__
    axis = next(axis for axis, size in enumerate(shape) if size != view.shape[axis])
    num_rows = view.shape[axis]
    mean = view.mean(axis=axis, dtype=np.float64, keepdims=True).astype(view.dtype)

    def read(index: Any) -> np.ndarray:
        start, stop, _ = index[axis].indices(shape[axis])
        old = view[*index[:axis], slice(start, min(stop, num_rows)), *index[axis + 1 :]]
        new = mean[*index[:axis], :, *index[axis + 1 :]]
        num_new = max(stop - max(start, num_rows), 0)
        return np.concatenate([old, np.repeat(new, num_new, axis)], axis)

    return read


def init_model(
    arch: Architecture, compute: ComputeConfig, mesh: Mesh, *, seed: int, dtype: str = "float32"
) -> Transformer:
    """Returns a model with random weights on the mesh. The seed gives the weights, on any mesh.

    Matrices and biases are cast to `dtype`. Norms are always float32.
    """
    shardings = tree_shardings(abstract_model(arch, compute), mesh)
    build = jax.jit(lambda key: cast_matrices(Transformer(arch, compute, key), dtype), out_shardings=shardings)
    return build(jax.random.key(seed))


def _prefetch_tensors(order: Sequence[str], tensors: Mapping[str, TensorLocation]) -> Iterator[str]:
    """Yields the names in their order, while a thread reads the next tensors into the page cache."""
    pool = ThreadPoolExecutor(1)
    try:
        reads = [pool.submit(tensors[name].prefetch) for name in order[:PREFETCH_TENSORS]]
        for index, name in enumerate(order):
            reads[index].result()
            reads += [pool.submit(tensors[upcoming].prefetch) for upcoming in order[len(reads) : len(reads) + 1]]
            yield name
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@partial(jax.jit, donate_argnums=0, static_argnames=("dtype", "sharding"))
def _fill(
    parameter: Array | None, tensor: Array, layer: int, *, dtype: Any, sharding: NamedSharding
) -> tuple[Array, Array]:
    """Returns the parameter with the tensor as its layer, and 0 if all numbers of the tensor are finite, else NaN."""
    value = jnp.copy(tensor.astype(dtype))  # The tensor itself may be a view of the file.
    if parameter is not None:
        value = jax.lax.dynamic_update_index_in_dim(parameter, value, layer, 0)
    return jax.lax.with_sharding_constraint(value, sharding), jnp.sum(tensor.astype(jnp.float32) * 0)


def check_weights(folder: Path, arch: Architecture | None) -> dict[str, TensorLocation]:
    """Locates each tensor. Checks names and shapes unless `arch` is None. Raises one `UserError` with all problems."""
    tensors = read_tensor_index(folder)
    if arch is None:
        return tensors
    mappings = mappings_by_hf_name(abstract_model(arch, ComputeConfig()))
    problems = [f"tensor {name} is missing." for name in sorted(mappings.keys() - tensors.keys())]
    if "lm_head.weight" not in mappings:  # A tied model may hold a copy of its embedding.
        head, embedding = tensors.pop("lm_head.weight", None), tensors.get("model.embed_tokens.weight")
        if head and embedding and not np.array_equal(head.memory_map(), embedding.memory_map()):
            problems.append("lm_head.weight differs from the tied embedding. Remove it, or untie them in config.json.")
    for name in sorted(tensors):
        if name not in mappings:
            if not name.endswith(COMPUTED_TENSOR):
                problems.append(
                    f"tensor {name} is unknown for this architecture. Remove it if it is no part of the model."
                )
        elif tensors[name].shape != (expected := mappings[name][0].hf_shape):
            problems.append(f"tensor {name} has shape {tensors[name].shape}, but config.json asks for {expected}.")
    if problems:
        summary = f"{folder}: the weights do not match config.json. Use both from the same model."
        raise UserError(join_first([summary, *problems], "\n  "))
    return tensors
