"""The table of Hugging Face tensor names, our parameters and their axes. Loading and saving read the same table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.transformer import Transformer

# Hugging Face's tensor ({} is the layer), our parameter, and the axes of the tensor. `a*b` joins two of our axes.
LAYER = "model.layers.{}."
HF_PARAMETER_TABLE = (
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
class WeightMapping:
    """A line of the table for one architecture: a parameter and the Hugging Face tensors that fill it."""

    path: str
    names: tuple[str, ...]  # One per layer, in order.
    sizes: dict[str, int]  # Of the parameter's axes, in order, without the axis of layers.
    hf_axes: tuple[tuple[str, ...], ...]  # For each axis of the Hugging Face tensor, the parameter axes that it joins.
    is_per_layer: bool

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each of the Hugging Face tensors."""
        return tuple(math.prod(self.sizes[axis] for axis in joined) for joined in self.hf_axes)

    def from_hf(self, array: Any) -> Any:
        """Converts a Hugging Face tensor to the parameter (of one layer). Takes a NumPy or JAX array."""
        split = sum(self.hf_axes, ())
        return array.reshape([self.sizes[axis] for axis in split]).transpose([split.index(axis) for axis in self.sizes])

    def to_hf(self, array: Any) -> Any:
        """Converts the parameter (of one layer) to a Hugging Face tensor, the inverse of `from_hf`."""
        return array.transpose([list(self.sizes).index(axis) for axis in sum(self.hf_axes, ())]).reshape(self.hf_shape)


def weight_mappings(model: Transformer) -> list[WeightMapping]:
    """Returns the lines of the table that the model has, in the table's order. The model may be abstract."""
    parameters = flatten_by_name(model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    mappings: list[WeightMapping] = []
    for name, path, hf_axes in HF_PARAMETER_TABLE:
        if path in parameters:
            sizes = dict(zip(parameters[path].get_metadata()["axes"], parameters[path].get_value().shape, strict=True))
            names = tuple(name.format(layer) for layer in range(sizes.pop("layers", 1)))
            joined = tuple(tuple(axis.split("*")) for axis in hf_axes.split())
            mappings.append(WeightMapping(path, names, sizes, joined, is_per_layer="{}" in name))
    return mappings


def mappings_by_hf_name(model: Transformer) -> dict[str, tuple[WeightMapping, int]]:
    """Returns the mapping and the layer of each Hugging Face tensor of the model."""
    return {name: (mapping, layer) for mapping in weight_mappings(model) for layer, name in enumerate(mapping.names)}


def abstract_model(arch: Architecture, compute: ComputeConfig, dtype: str = "float32") -> Transformer:
    """Returns the model with shapes in place of weights. All but the norms have this dtype."""
    return jax.eval_shape(lambda: cast_matrices(Transformer(arch, compute, jax.random.key(0)), dtype))


def cast_matrices(model: Transformer, dtype: str) -> Transformer:
    """Returns the model with matrices and biases in this dtype. Norms stay in float32."""

    def cast(path: tuple[Any, ...], array: Any) -> Any:
        return array if "norm" in jax.tree_util.keystr(path) else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, model)


def expected_tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every Hugging Face tensor of an architecture by name."""
    mappings = mappings_by_hf_name(abstract_model(arch, ComputeConfig()))
    return {name: mapping.hf_shape for name, (mapping, _) in mappings.items()}


def flatten_by_name(tree: Any, separator: str = ".", is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a pytree of Params by path, in the order of the pytree: `embedding`, `blocks.q`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    names = [jax.tree_util.keystr(path, simple=True, separator=separator) for path, _ in leaves]
    return {name.removesuffix(f"{separator}value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}
