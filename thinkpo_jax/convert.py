"""Which Hugging Face tensor is which parameter? One table, read both ways, strict on both sides."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from thinkpo_jax.architecture import Architecture, read_architecture
from thinkpo_jax.config import UserError, read_json, together
from thinkpo_jax.folder import INDEX, MODEL_FILES, Tensor, read_headers, some
from thinkpo_jax.hosts import first, wait, whole
from thinkpo_jax.log import warn
from thinkpo_jax.model import ComputeConfig, Transformer
from thinkpo_jax.sharding import shardings

_AHEAD = 8  # tensors that are read before they are used
MAX_SHARD = "5GB"  # of one safetensors file; larger models are written as several, with an index
NOT_TOKENIZER = ("config.json", "generation_config.json", INDEX)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# Hugging Face's tensor ({}: one per layer), our parameter, and Hugging Face's axes in the names of ours.
LAYER = "model.layers.{}."
TABLE = (
    ("model.embed_tokens.weight", "embedding", "vocab embed"),
    (LAYER + "input_layernorm.weight", "blocks.attention_norm", "norm"),
    (LAYER + "self_attn.q_proj.weight", "blocks.q", "heads*head_dim embed"),
    (LAYER + "self_attn.q_proj.bias", "blocks.q_bias", "heads*head_dim"),
    (LAYER + "self_attn.q_norm.weight", "blocks.q_norm", "head_dim"),
    (LAYER + "self_attn.k_proj.weight", "blocks.k", "kv_heads*head_dim embed"),
    (LAYER + "self_attn.k_proj.bias", "blocks.k_bias", "kv_heads*head_dim"),
    (LAYER + "self_attn.k_norm.weight", "blocks.k_norm", "head_dim"),
    (LAYER + "self_attn.v_proj.weight", "blocks.v", "kv_heads*head_dim embed"),
    (LAYER + "self_attn.v_proj.bias", "blocks.v_bias", "kv_heads*head_dim"),
    (LAYER + "self_attn.o_proj.weight", "blocks.o", "embed heads*head_dim"),
    (LAYER + "post_attention_layernorm.weight", "blocks.mlp_norm", "norm"),
    (LAYER + "mlp.gate_proj.weight", "blocks.gate", "mlp embed"),
    (LAYER + "mlp.up_proj.weight", "blocks.up", "mlp embed"),
    (LAYER + "mlp.down_proj.weight", "blocks.down", "embed mlp"),
    ("model.norm.weight", "final_norm", "norm"),
    ("lm_head.weight", "untied_head", "vocab embed"),
)


@dataclass(frozen=True)
class Entry:
    """A line of the table for one architecture: a parameter, and the Hugging Face tensors that fill it."""

    path: str
    names: tuple[str, ...]  # one per layer, in order
    axes: tuple[str, ...]  # of the parameter, the axis of layers left out
    sizes: dict[str, int]
    groups: tuple[tuple[str, ...], ...]  # for each axis of the Hugging Face tensor the axes of ours that it holds
    layered: bool

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each of the Hugging Face tensors."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self.groups)

    def to_ours(self, array: Any) -> Any:
        """The parameter (of one layer) from a Hugging Face tensor, a NumPy or JAX array."""
        split = [axis for group in self.groups for axis in group]
        return array.reshape([self.sizes[axis] for axis in split]).transpose([split.index(axis) for axis in self.axes])

    def to_hf(self, array: Any) -> Any:
        """The inverse of `to_ours`."""
        split = [axis for group in self.groups for axis in group]
        return array.transpose([self.axes.index(axis) for axis in split]).reshape(self.hf_shape)


def entries(abstract: Transformer) -> list[Entry]:
    """The lines of the table that a model has, in the table's order."""
    parameters = dict(_parameters(abstract))
    found: list[Entry] = []
    for name, path, theirs in TABLE:
        if path in parameters:
            axes, shape = parameters[path].get_metadata()["axes"], parameters[path].get_value().shape
            layers, layered = (shape[0], True) if "{}" in name else (1, False)
            axes, shape = (axes[1:], shape[1:]) if layered else (axes, shape)
            names = tuple(name.format(layer) for layer in range(layers))
            groups = tuple(tuple(group.split("*")) for group in theirs.split())
            found.append(Entry(path, names, axes, dict(zip(axes, shape, strict=True)), groups, layered))
    return found


def abstract_model(arch: Architecture, compute: ComputeConfig) -> Transformer:
    """The model with shapes in place of weights."""
    return jax.eval_shape(lambda: Transformer(arch, compute, jax.random.key(0)))


def named(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree of Params by dotted path: `blocks.q`, `embedding`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in paths}


def _parameters(model: Transformer) -> list[tuple[str, nnx.Variable]]:
    paths, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]


def random_model(folder: Path, compute: ComputeConfig, mesh: Mesh, *, seed: int) -> Transformer:
    """Fresh float32 weights in the shape that the folder's config.json gives, on the mesh."""
    arch = read_architecture(folder)
    layout = shardings(abstract_model(arch, compute), mesh)
    return jax.jit(lambda key: Transformer(arch, compute, key), out_shardings=layout)(jax.random.key(seed))


def load_model(folder: Path, compute: ComputeConfig, mesh: Mesh) -> Transformer:
    """The folder's weights as float32 parameters on the mesh, one Hugging Face tensor at a time, in the files' order.

    Each process reads the slices that its devices hold; parameters are filled in place, so that beside them one tensor
    is in memory. Raises one `UserError` with all that is wrong with the folder; warns of weights that are not finite.
    """
    arch, tensors = check_model(folder)
    abstract = abstract_model(arch, compute)
    layout, shapes = named(shardings(abstract, mesh)), named(abstract)
    parts = {name: (entry, layer) for entry in entries(abstract) for layer, name in enumerate(entry.names)}
    order = sorted(parts, key=lambda name: (tensors[name].file, tensors[name].begin))
    largest = max(tensors[name].nbytes for name in order)
    loaded: dict[str, jax.Array] = {}
    zeros: dict[str, jax.Array] = {}  # 0 for each tensor that is finite; ready when its copy on the device is done with
    before = None
    for name in _read_ahead(order, tensors):
        entry, layer = parts[name]
        whole = layout[entry.path]
        part = NamedSharding(mesh, PartitionSpec(*whole.spec[1:])) if entry.layered else whole
        if entry.layered and entry.path not in loaded:
            loaded[entry.path] = _zeros(shapes[entry.path].shape, whole)
        if before is not None and tensors[before].nbytes + tensors[name].nbytes > largest:
            zeros[before].block_until_ready()
        view = entry.to_ours(tensors[name].mapped())  # transposed on the way to the device, which is fast
        tensor = jax.make_array_from_callback(view.shape, part, view.__getitem__)
        if before is not None:
            zeros[before].block_until_ready()
        loaded[entry.path], zeros[name] = _fill(loaded.get(entry.path), tensor, np.int32(layer), layout=whole)
        del tensor
        before = name
    if broken := [name for name, zero in zeros.items() if not np.isfinite(zero)]:
        warn(f"{folder}: NaN or infinite weights in {len(broken)} tensor(s): {some(broken, ', ')}.")
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in shapes])


def _read_ahead(order: Sequence[str], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The names in their order, while a thread reads a few tensors ahead; several processes read a part each."""
    if jax.process_count() > 1:
        yield from order
        return
    pool = ThreadPoolExecutor(1)
    try:
        ahead = [pool.submit(tensors[name].touch) for name in order[:_AHEAD]]
        for index, name in enumerate(order):
            ahead.pop(0).result()
            if index + _AHEAD < len(order):
                ahead.append(pool.submit(tensors[order[index + _AHEAD]].touch))
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


def check_model(folder: Path) -> tuple[Architecture, dict[str, Tensor]]:
    """What config.json says, and where each tensor that it asks for lies. Raises one `UserError` with all problems."""
    with together() as attempt:
        arch = attempt(read_architecture, folder)
        tensors = attempt(check_weights, folder, arch)
    assert arch is not None and tensors is not None  # noqa: PT018 -- `together` raised otherwise
    return arch, tensors


def check_weights(folder: Path, arch: Architecture | None) -> dict[str, Tensor]:
    """Where each tensor lies. Raises one `UserError` with all problems of the files, and of the names and shapes.

    Without an architecture (its config.json has problems of its own) the files alone are checked.
    """
    tensors = read_headers(folder)
    if arch is not None:
        _check_tensors(folder, expected_shapes(arch), tensors)
    return tensors


def _check_tensors(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, Tensor]) -> None:
    problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - found.keys())]
    ignored = {"lm_head.weight"} if "lm_head.weight" not in expected else set()  # a copy of the tied embedding
    problems += [f"tensor {name} is not known here" for name in sorted(found.keys() - expected.keys() - ignored)]
    embedding = found.get("model.embed_tokens.weight")
    for name in ignored & found.keys():
        if embedding is not None and not np.array_equal(found[name].mapped(), embedding.mapped(), equal_nan=False):
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
        raise UserError(some([f"{folder}: {problem}." for problem in problems], "\n"))


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of an architecture."""
    return {name: entry.hf_shape for entry in entries(abstract_model(arch, ComputeConfig())) for name in entry.names}


def partial_folder(folder: Path) -> Path:
    """Where a model is written before it is whole, beside the folder that it becomes."""
    return folder.with_name(f".{folder.name}.partial")


def save_model(
    model: Transformer,
    folder: Path,
    *,
    like: Path,
    dtype: Literal["float32", "bfloat16"],
    stops: Sequence[int],
    card: str,
) -> None:
    """Writes a Hugging Face folder; config, tokenizer and template come from the folder `like`. Appears all at once.

    `stops` are the ids that end a generation (`chat.Chat.stop_ids`); others then stop where our sampler does.
    """
    partial = partial_folder(folder)
    if first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _save_weights(model, partial, DTYPES[dtype])
    if first():
        _save_text(partial, like, dtype, stops, card)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    wait("the model is saved")


def _save_text(partial: Path, like: Path, dtype: str, stops: Sequence[int], card: str) -> None:
    raw = read_json(like / "config.json") | {"dtype": dtype, "torch_dtype": dtype}
    (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    for pattern in MODEL_FILES:
        for file in like.glob(pattern):
            if file.suffix != ".safetensors" and file.name not in NOT_TOKENIZER:
                shutil.copyfile(file, partial / file.name)
    generation = read_json(like / "generation_config.json") if (like / "generation_config.json").exists() else {}
    generation |= {"eos_token_id": list(stops)} if stops else {}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")


def _save_weights(model: Transformer, folder: Path, dtype: np.dtype) -> None:
    parameters = named(model)
    places = {name: (entry, layer) for entry in entries(model) for layer, name in enumerate(entry.names)}
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        {name: np.broadcast_to(np.zeros((), dtype), entry.hf_shape) for name, (entry, _) in places.items()},
        get_storage_size=lambda tensor: int(tensor.size) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    for filename, names in plan.filename_to_tensors.items():
        tensors: dict[str, np.ndarray] = {}
        for name in names:
            entry, layer = places[name]
            array = parameters[entry.path][layer] if entry.layered else parameters[entry.path]
            array = whole(array)  # all processes take part
            if first():
                tensors[name] = np.ascontiguousarray(entry.to_hf(array).astype(dtype))
        if not first():
            continue
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        (folder / filename).chmod(0o644)  # safetensors makes files that only their owner can read
    if plan.is_sharded and first():
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
