"""Which Hugging Face tensor is which parameter? One table, read both ways, strict on both sides."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import safetensors
from jax.sharding import Mesh
from safetensors.numpy import save_file

from thinkpo_jax.config import Section, UserError
from thinkpo_jax.model import Architecture, ComputeConfig, Transformer
from thinkpo_jax.sharding import shardings

_SAMPLED_BYTES = 2**22
BUILTIN = "builtin:"
MODELS = Path(__file__).parent / "models"
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")
MAX_SHARD = "5GB"  # of one safetensors file; larger models are written as several, with an index
NOT_TOKENIZER = ("config.json", "generation_config.json", "model.safetensors.index.json")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class ModelConfig(Section):
    """The start model: a Hugging Face folder, a Hub id or `builtin:NAME`. `random` takes its shape, not its weights."""

    path: str
    weights: Literal["pretrained", "random"] = "pretrained"


@dataclass(frozen=True)
class Entry:
    """One line of the table: a Hugging Face name ({} is the layer), our path, and the two inverse transforms."""

    hf: str
    path: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]

    @property
    def layered(self) -> bool:
        """Whether the parameter has a leading axis of layers, one Hugging Face tensor each."""
        return "{}" in self.hf


def table(arch: Architecture) -> list[Entry]:
    """The correspondence for one architecture; Hugging Face's linear layers are [out, in], ours [in, out]."""
    D, H = arch.embed, arch.head_dim

    def same(array: np.ndarray) -> np.ndarray:
        return array

    def transposed(array: np.ndarray) -> np.ndarray:
        return array.T

    def entry(hf: str, path: str) -> Entry:
        return Entry(hf, path, same, same)

    def linear(hf: str, path: str) -> Entry:
        return Entry(hf, path, transposed, transposed)

    layer = "model.layers.{}."
    entries = [
        entry("model.embed_tokens.weight", "embedding"),
        entry("model.norm.weight", "final_norm"),
        entry(layer + "input_layernorm.weight", "blocks.attention_norm"),
        entry(layer + "post_attention_layernorm.weight", "blocks.mlp_norm"),
        linear(layer + "mlp.gate_proj.weight", "blocks.gate"),
        linear(layer + "mlp.up_proj.weight", "blocks.up"),
        linear(layer + "mlp.down_proj.weight", "blocks.down"),
        Entry(
            layer + "self_attn.o_proj.weight",
            "blocks.o",
            lambda array: array.T.reshape(-1, H, D),
            lambda array: array.reshape(-1, D).T,
        ),
    ]
    for name in ("q", "k", "v"):
        entries.append(
            Entry(
                f"{layer}self_attn.{name}_proj.weight",
                f"blocks.{name}",
                lambda array: array.T.reshape(D, -1, H),
                lambda array: array.reshape(D, -1).T,
            )
        )
        if arch.qkv_bias:
            entries.append(
                Entry(
                    f"{layer}self_attn.{name}_proj.bias",
                    f"blocks.{name}_bias",
                    lambda array: array.reshape(-1, H),
                    lambda array: array.reshape(-1),
                )
            )
    if not arch.tied_head:
        entries.append(linear("lm_head.weight", "untied_head"))
    return entries


def find_model(path: str) -> Path:
    """The folder of a model: `builtin:NAME`, a local folder, or a Hub id (downloaded or from the cache)."""
    if path.startswith(BUILTIN):
        builtins = {f"{BUILTIN}{file.parent.name}": file.parent for file in MODELS.glob("*/config.json")}
        if path not in builtins:
            raise UserError(f"model.path: there is no {path}; there is: {', '.join(sorted(builtins))}.")
        return builtins[path]
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path: {path}: there is no such folder. Give a Hugging Face folder or a Hub id (owner/name)."
        )
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=list(MODEL_FILES)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"model.path: {path} is neither a local folder nor available from the Hub: {error} Check the name; "
            f"where there is no network, download it elsewhere (hf download {path}) and give the folder."
        ) from None


def read_architecture(folder: Path) -> Architecture:
    """What config.json says. Raises one `UserError` with every field that is missing, or is not supported here."""
    raw = _read_json(folder / "config.json")
    problems = list(_unsupported(raw))
    needed = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "rms_norm_eps",
    )
    problems += [f"{key} is missing" for key in needed if key not in raw]
    if problems:
        raise UserError("\n".join(f"{folder / 'config.json'}: {problem}." for problem in problems))
    rope = raw.get("rope_parameters") or {}
    return Architecture(
        vocab_size=raw["vocab_size"],
        embed=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        mlp=raw["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        norm_eps=raw["rms_norm_eps"],
        max_positions=raw.get("max_position_embeddings", 2048),
        qkv_bias=raw["model_type"] == "qwen2",
        tied_head=raw.get("tie_word_embeddings", False),
        init_std=raw.get("initializer_range", 0.02),
    )


def _unsupported(raw: Mapping[str, Any]) -> Iterable[str]:
    """Fields that would change the result and are not built here."""
    if raw.get("model_type") not in ("qwen2", "llama"):
        yield f"model_type {raw.get('model_type')!r} is not supported; supported: qwen2, llama"
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        yield f"RoPE scaling {kind!r} is not supported yet"
    if raw.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {raw['hidden_act']!r} is not supported; supported: silu"
    if raw.get("use_sliding_window"):
        yield "use_sliding_window is on, and sliding windows are not supported"
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key) and raw.get("model_type") == "llama":
            yield f"{key} is on, and is not supported"
    if "quantization_config" in raw:
        yield "the checkpoint is quantised; use the unquantised one"
    if "auto_map" in raw:
        yield "auto_map asks for remote code, which is never run; use a checkpoint of a standard architecture"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file. A model is a folder with config.json and *.safetensors."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(loaded).__name__}.")
    return loaded


def stop_ids(folder: Path) -> list[int]:
    """The ids that generation_config.json (or config.json) says end a generation."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            found = _read_json(folder / name).get("eos_token_id")
            if found is not None:
                return list(found) if isinstance(found, list) else [found]
    return []


def fingerprint(folder: Path) -> str | None:
    """A digest of a model's configuration and weights (of each file its size and both ends); None without a model."""
    digest = hashlib.sha256()
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if not files[0].exists():
        return None
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{path.name} {size} ".encode())
            for start in (0, max(0, size - _SAMPLED_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def abstract_model(arch: Architecture, compute: ComputeConfig) -> Transformer:
    """The model with shapes in place of weights."""
    return jax.eval_shape(lambda: Transformer(arch, compute, jax.random.key(0)))


def named(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree of Params by dotted path: `blocks.q`, `embedding`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in paths}


def random_model(folder: Path, compute: ComputeConfig, mesh: Mesh, *, seed: int) -> Transformer:
    """Fresh float32 weights in the shape that the folder's config.json gives, on the mesh."""
    arch = read_architecture(folder)
    layout = shardings(abstract_model(arch, compute), mesh)
    return jax.jit(lambda key: Transformer(arch, compute, key), out_shardings=layout)(jax.random.key(seed))


def load_model(folder: Path, compute: ComputeConfig, mesh: Mesh) -> Transformer:
    """The folder's weights as float32 parameters on the mesh.

    Raises one `UserError` with every tensor that is missing, unknown or of a wrong shape.
    """
    arch = read_architecture(folder)
    abstract = abstract_model(arch, compute)
    files = check_weights(folder)
    layout = named(shardings(abstract, mesh))
    handles = {file: safetensors.safe_open(file, framework="numpy") for file in set(files.values())}

    def read(entry: Entry) -> jax.Array:
        shape, target = named(abstract)[entry.path].shape, layout[entry.path]
        host = np.empty(shape, np.float32)
        slots = host if entry.layered else host[np.newaxis]
        for layer in range(len(slots)):
            name = entry.hf.format(layer)
            slots[layer] = entry.to_ours(handles[files[name]].get_tensor(name).astype(np.float32))
        return jax.device_put(host, target)

    arrays = {entry.path: read(entry) for entry in table(arch)}
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in named(abstract)])


def check_weights(folder: Path) -> dict[str, Path]:
    """The file of each tensor that the folder's architecture needs, after checking names and shapes of all of them."""
    expected = expected_shapes(read_architecture(folder))
    found = _headers(folder)
    problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - found.keys())]
    ignored = {"lm_head.weight"} if "lm_head.weight" not in expected else set()  # a copy of the tied embedding
    problems += [f"tensor {name} is not known here" for name in sorted(found.keys() - expected.keys() - ignored)]
    for name in sorted(expected.keys() & found.keys()):
        if found[name][1] != expected[name]:
            problems.append(f"tensor {name} has the shape {found[name][1]}, expected {expected[name]} from config.json")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError("\n".join(f"{folder}: {problem}." for problem in shown))
    return {name: found[name][0] for name in expected}


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of an architecture."""
    parameters = named(abstract_model(arch, ComputeConfig()))
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in table(arch):
        shape = parameters[entry.path].shape
        one = np.broadcast_to(np.float32(0), shape[1:] if entry.layered else shape)
        for layer in range(shape[0] if entry.layered else 1):
            shapes[entry.hf.format(layer)] = tuple(entry.to_hf(one).shape)
    return shapes


def _headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """(file, shape) of each tensor in the folder's safetensors files, read from their headers."""
    index = folder / "model.safetensors.index.json"
    weight_map = _read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: expected weight_map, an object from tensor to file name. Download it again.")
    files = [folder / name for name in sorted(set(weight_map.values()))] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder}: no *.safetensors file. Other formats (.bin, .pt, GGUF) are not read: convert it first."
        )
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as handle:
                found |= {name: (file, tuple(handle.get_slice(name).get_shape())) for name in handle.keys()}  # noqa: SIM118 -- not a mapping
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: cannot be read as safetensors: {error}. Download it again.") from None
    lost = [f"{name} in {file}" for name, file in sorted(weight_map.items()) if name not in found]
    if lost:
        raise UserError(f"{index}: names tensors that are not there: {', '.join(lost[:20])}. Download it again.")
    return found


def save_model(
    model: Transformer, folder: Path, *, like: Path, dtype: Literal["float32", "bfloat16"], card: str
) -> None:
    """Writes a Hugging Face folder; config, tokenizer and template come from the folder `like`. Appears all at once."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_weights(model, partial, DTYPES[dtype])
    raw = _read_json(like / "config.json") | {"dtype": dtype, "torch_dtype": dtype}
    (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    for pattern in MODEL_FILES:
        for file in like.glob(pattern):
            if file.suffix != ".safetensors" and file.name not in NOT_TOKENIZER:
                shutil.copyfile(file, partial / file.name)
    generation = _read_json(like / "generation_config.json") if (like / "generation_config.json").exists() else {}
    generation |= {"eos_token_id": stop_ids(like)} if stop_ids(like) else {}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _save_weights(model: Transformer, folder: Path, dtype: np.dtype) -> None:
    entries = {entry.path: entry for entry in table(model.arch)}
    parameters = named(model)
    places = {
        entry.hf.format(layer): (path, layer if entry.layered else None)
        for path, entry in entries.items()
        for layer in range(parameters[path].shape[0] if entry.layered else 1)
    }
    shapes = expected_shapes(model.arch)
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        {name: np.broadcast_to(np.zeros((), dtype), shapes[name]) for name in places},
        get_storage_size=lambda tensor: int(tensor.size) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    for filename, names in plan.filename_to_tensors.items():
        tensors: dict[str, np.ndarray] = {}
        for name in names:
            path, layer = places[name]
            array = parameters[path] if layer is None else parameters[path][layer]
            tensors[name] = np.ascontiguousarray(entries[path].to_hf(np.asarray(jax.device_get(array))).astype(dtype))
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        (folder / filename).chmod(0o644)  # safetensors makes files that only their owner can read
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
