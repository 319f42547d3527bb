"""The table of Hugging Face names, our parameters and their axes."""

import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.transformer import Transformer

# Hugging Face's tensor ({}: one per layer), our parameter, and Hugging Face's axes in the names of ours.
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
    """A line of the table for one architecture: a parameter, and the Hugging Face tensors that fill it."""

    path: str
    names: tuple[str, ...]  # one per layer, in order
    axes: tuple[str, ...]  # of the parameter, the axis of layers left out
    sizes: dict[str, int]
    groups: tuple[tuple[str, ...], ...]  # for each axis of the Hugging Face tensor the axes of ours that it holds
    is_per_layer: bool

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each of the Hugging Face tensors."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self.groups)

    def from_hf(self, array: Any) -> Any:
        """The parameter (of one layer) from a Hugging Face tensor, a NumPy or JAX array."""
        split = [axis for group in self.groups for axis in group]
        return array.reshape([self.sizes[axis] for axis in split]).transpose([split.index(axis) for axis in self.axes])

    def to_hf(self, array: Any) -> Any:
        """The inverse of `to_ours`."""
        split = [axis for group in self.groups for axis in group]
        return array.transpose([self.axes.index(axis) for axis in split]).reshape(self.hf_shape)


def weight_mappings(abstract: Transformer) -> list[WeightMapping]:
    """The lines of the table that a model has, in the table's order."""
    parameters = dict(_parameters(abstract))
    found: list[WeightMapping] = []
    for name, path, theirs in HF_PARAMETER_TABLE:
        if path in parameters:
            axes, shape = parameters[path].get_metadata()["axes"], parameters[path].get_value().shape
            layers, layered = (shape[0], True) if "{}" in name else (1, False)
            axes, shape = (axes[1:], shape[1:]) if layered else (axes, shape)
            names = tuple(name.format(layer) for layer in range(layers))
            groups = tuple(tuple(group.split("*")) for group in theirs.split())
            found.append(WeightMapping(path, names, axes, dict(zip(axes, shape, strict=True)), groups, layered))
    return found


def abstract_model(arch: Architecture, compute: ComputeConfig) -> Transformer:
    """The model with shapes in place of weights."""
    return jax.eval_shape(lambda: Transformer(arch, compute, jax.random.key(0)))


def flatten_by_name(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree of Params by dotted path: `blocks.q`, `embedding`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in paths}


def _parameters(model: Transformer) -> list[tuple[str, nnx.Variable]]:
    paths, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]


def expected_tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of an architecture."""
    return {
        name: entry.hf_shape for entry in weight_mappings(abstract_model(arch, ComputeConfig())) for name in entry.names
    }
