"""The weights of a model in the layout of the inference engine.

Letters: D hidden size, N query heads, K key/value heads, G = N / K, H head width, F MLP size, V vocabulary size.
Matrices are [out, in], in the compute dtype, and one array per layer. On CPUs, products of few rows with such matrices
are up to three times as fast as with stacked [in, out] ones. The vocabulary, the heads and the MLP are split over the
mesh axis `tensor`. Nothing is split over `data`, whose groups answer different requests.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.runtime.sharding import partition_spec


class LayerWeights(NamedTuple):
    """One layer. `qkv` holds for each key/value head its G query heads, its key and its value."""

    attention_norm: Array  # [D]
    qkv: Array  # [K, G + 2, H, D]
    qkv_bias: Array | None  # [K, G + 2, H]
    q_norm: Array | None  # [H]
    k_norm: Array | None  # [H]
    o: Array  # [D, N * H]
    mlp_norm: Array  # [D]
    gate_up: Array  # [2, F, D]
    down: Array  # [D, F]


class InferenceWeights(NamedTuple):
    """All weights. A tied head is None."""

    embedding: Array  # [V, D]
    layers: tuple[LayerWeights, ...]
    final_norm: Array  # [D]
    head: Array | None  # [V, D]


# The logical axes of each array of a layer, in order. Norms stay in float32.
_NORM, _HEAD_NORM = ("norm",), ("head_dim",)
LAYER_AXES: tuple[tuple[str | None, ...], ...] = (
    _NORM,
    ("kv_heads", None, "head_dim", None),
    ("kv_heads", None, "head_dim"),
    _HEAD_NORM,
    _HEAD_NORM,
    (None, "heads"),
    _NORM,
    (None, "mlp", None),
    (None, "mlp"),
)
VOCAB_AXES = ("vocab", None)


def convert_weights(model: Transformer, mesh: Mesh) -> InferenceWeights:
    """Returns the weights of a model, cast to its compute dtype and laid out for inference on `mesh`.

    The model may lie on another mesh of the same devices. Its arrays stay valid.
    """
    return _lay_out(model, mesh, lambda convert: convert(model), jax.device_put)


def abstract_weights(arch: Architecture, compute: ComputeConfig, mesh: Mesh) -> InferenceWeights:
    """Returns the shape, dtype and sharding of each array that `convert_weights` gives. The devices need not exist."""
    model = abstract_model(arch, compute)

    def put(array: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return _lay_out(model, mesh, lambda convert: jax.eval_shape(convert, model), put)


def _lay_out(
    model: Transformer,
    mesh: Mesh,
    run: Callable[[Callable[[Transformer], Any]], Any],
    put: Callable[[Any, NamedSharding], Any],
) -> InferenceWeights:
    """Converts each part of a model with `run`, and gives each array its sharding with `put`."""

    def place(arrays: Iterable[Any], axes: Iterable[tuple[str | None, ...]]) -> list[Any]:
        shardings = [NamedSharding(mesh, partition_spec(each)) for each in axes]
        pairs = zip(arrays, shardings, strict=True)
        return [None if array is None else put(array, sharding) for array, sharding in pairs]

    layers = tuple(
        LayerWeights(*place(run(lambda model, layer=layer: _convert_layer(model, layer)), LAYER_AXES))
        for layer in range(model.arch.num_layers)
    )
    embedding, head = place(run(_convert_vocabulary), (VOCAB_AXES, VOCAB_AXES))
    (final_norm,) = place((run(lambda model: model.final_norm[...]),), (_NORM,))
    return InferenceWeights(embedding, layers, final_norm, head)


@jax.jit
def _convert_layer(model: Transformer, layer: int) -> LayerWeights:
    arch, dtype = model.arch, model.compute.dtype
    D, K = arch.hidden_size, arch.num_kv_heads

    def take(name: str) -> Any:
        parameter = getattr(model.blocks, name)
        return None if parameter is None else jax.lax.dynamic_index_in_dim(parameter[...], layer, keepdims=False)

    def join_heads(*names: str) -> Any:
        parts = [take(name) for name in names]  # [D, heads, H], or [heads, H] for a bias
        heads_first = [jnp.moveaxis(part, 0, -1) if part.ndim == 3 else part for part in parts if part is not None]
        by_group = [part.reshape(K, -1, *part.shape[1:]) for part in heads_first]
        return jnp.concatenate(by_group, axis=1).astype(dtype) if by_group else None

    o_NHD, gate_DF, up_DF, down_FD = (take(name) for name in ("o", "gate", "up", "down"))
    return LayerWeights(
        attention_norm=take("attention_norm"),
        qkv=join_heads("q", "k", "v"),
        qkv_bias=join_heads("q_bias", "k_bias", "v_bias"),
        q_norm=take("q_norm"),
        k_norm=take("k_norm"),
        o=o_NHD.reshape(-1, D).T.astype(dtype),
        mlp_norm=take("mlp_norm"),
        gate_up=jnp.stack([gate_DF.T, up_DF.T]).astype(dtype),
        down=down_FD.T.astype(dtype),
    )


@jax.jit
def _convert_vocabulary(model: Transformer) -> tuple[Array, Array | None]:
    """Returns the embedding and the untied head, [V, D]."""
    embedding = model.embedding[...].astype(model.compute.dtype)
    return embedding, None if model.untied_head is None else model.untied_head[...].T.astype(model.compute.dtype)
