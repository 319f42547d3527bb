"""Finds the models that an evaluation compares, and writes the options of the command `evaluate` as a configuration."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkpo_jax.evaluation.evaluate_model import EvaluatedModel
from thinkpo_jax.inference.openai_engine import ServerConfig
from thinkpo_jax.models.model_folder import find_model_damage, resolve_model_source
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.runtime.bucket import MODEL, BucketFolder
from thinkpo_jax.runtime.bucket_files import SCHEME, is_in_bucket
from thinkpo_jax.runtime.config import UserError, did_you_mean, parse_config

SERVER_PREFIX = "server:"
DEFAULT_OUT = "evaluations"
MODEL_HELP = "a run folder, a stage of a run (runs/mine:sft), a Hugging Face folder, a Hub id, or server:MODEL@URL"


def open_against(config: RunConfig) -> tuple[EvaluatedModel, ...]:
    """Returns the models of `evaluation.against`. Raises `UserError` if one of them cannot be opened."""
    models: list[EvaluatedModel] = []
    for name, spec in (config.evaluation.against if config.evaluation else {}).items():
        server = parse_server(spec, config.evaluation.server if config.evaluation else None)
        try:
            model = config.model.model_copy(update={**find_model(spec), "weights": "pretrained"})
            source = resolve_model_source(model, seed=config.seed, require_weights=server is None)
        except UserError as error:
            raise UserError(f"evaluation.against.{name}: {error}") from None
        models.append(EvaluatedModel(name, source, server))
    return tuple(models)


def find_model(spec: str) -> dict[str, Any]:
    """Returns `path` and what else the section `model` must have for a model that `MODEL_HELP` describes.

    A model of a run keeps the chat template's arguments and the thinking tags of that run. A run folder alone means its
    last finished stage. Raises `UserError` if the run has no such model, or it is damaged.
    """
    if server := parse_server(spec):
        return {"path": server.model}
    has_stage = ":" in spec.removeprefix(SCHEME) and not Path(spec).is_dir()
    folder, _, stage = spec.rpartition(":") if has_stage else (spec, "", "")
    if is_in_bucket(folder) and "config.json" in BucketFolder(folder).names():
        return {"path": folder}
    run = RunFolder.open(folder, with_models=False)
    if (run.path / "config.json").exists() or not run.config.is_file():
        if has_stage and not spec.startswith("builtin:"):
            raise UserError(
                f"{spec}: {folder} is not a run folder, because it has no config.yaml. Expected {MODEL_HELP}."
            )
        return {"path": spec}
    config = load_run_config(run.config)
    keys = {"template_arguments": config.model.template_arguments, "thinking_tags": config.model.thinking_tags}
    finished = [each.name for each in config.stages if run.has_model(each.name)]
    if stage == config.base_name or not (stage or config.stages):
        return {"path": config.model.path, **keys}
    if stage and stage not in finished:
        known = [config.base_name, *finished]
        raise UserError(
            f"{spec}: the run has no finished model {stage!r}{did_you_mean(stage, known)}. It has: {known}."
        )
    if not finished:
        raise UserError(f"{spec}: no stage of the run is finished. Train it first, or name {spec}:{config.base_name}.")
    if run.bucket is not None:
        return {"path": f"{run.bucket.url}/{stage or finished[-1]}/{MODEL}", **keys}
    model = run.stage(stage or finished[-1]).model
    if damage := find_model_damage(model):
        raise UserError(
            f"{spec}: {model} is damaged: {damage}. Run the training command of this run again. It exports the model "
            "again from a good checkpoint."
        )
    return {"path": str(model), **keys}


def parse_server(spec: str, defaults: ServerConfig | None = None) -> ServerConfig | None:
    """Returns the server of `server:MODEL@URL`, or None for another kind of model. `defaults` gives its other keys."""
    if not spec.startswith(SERVER_PREFIX):
        return None
    model, url = _split_server(spec)
    raw = (defaults.model_dump() if defaults else {}) | {"model": model, "url": url}
    shown = f"{SERVER_PREFIX}{model}@..." if set(url) & set("@?#") else spec  # It may hold a password.
    return parse_config(ServerConfig, raw, source=f"{shown} (server:MODEL@URL)")


def _split_server(spec: str) -> tuple[str, str]:
    """Returns MODEL and URL of `server:MODEL@URL`. Either may hold an @."""
    model, at, url = spec.removeprefix(SERVER_PREFIX).partition("@http")
    if at:
        return model, f"http{url}"
    model, _, url = model.partition("@")
    return model, url


def config_of_models(
    raw: Mapping[str, Any],
    specs: Sequence[str],
    benchmarks: Sequence[str],
    *,
    limit: int | None,
    protocol: str | None,
    sampling: Mapping[str, Any],
    out: str | None,
) -> dict[str, Any]:
    """Returns the values of a configuration that evaluates models without stages. Compares the first with each other.

    `raw` are the values of a configuration, whose stages are left out. A benchmark is a name, or NAME=PATH. Options
    that are None change nothing. Raises `UserError` if `out` is the folder of a run with stages.
    """
    names = _unique_names(specs)
    run_dir = out or f"{DEFAULT_OUT}/{names[0]}"
    path = RunFolder.open(run_dir, with_models=False).config
    old_config = load_run_config(path) if path.exists() else None
    if old_config is not None and old_config.stages:
        raise UserError(f"--out {run_dir} is the folder of a run with stages. Choose another folder.")
    model = _mapping(raw, "model") | {"weights": "pretrained"} | find_model(specs[0])
    if out is None and old_config is not None and old_config.model.path != model["path"]:
        raise UserError(f"{run_dir} holds the evaluation of another model. Choose another folder with --out.")
    section = _mapping(raw, "evaluation")
    section["against"] = dict(zip(names[1:], specs[1:], strict=True))
    section["compare"] = [[name, names[0]] for name in names[1:]]
    section |= {"protocol": protocol} if protocol is not None else {}
    sections = [_parse_benchmark(text) for text in benchmarks] or section.get("benchmarks", [])
    if not sections:
        raise UserError("no benchmark is given. Name some with --benchmark, such as gsm8k or NAME=FILE.")
    if limit is not None and isinstance(sections, list):
        sections = [{**each, "questions": limit} if isinstance(each, dict) else each for each in sections]
    section["benchmarks"] = sections
    section["sampling"] = _mapping(section, "sampling") | {k: v for k, v in sampling.items() if v is not None}
    if server := parse_server(specs[0]):
        keys = {"model": server.model, "url": server.url}
        section |= {"engine": "server", "server": _mapping(section, "server") | keys}
    title = f"Evaluation of {', '.join(names)}"
    changes = {"run_dir": run_dir, "title": title, "model": model, "base_name": names[0], "evaluation": section}
    return {**raw, **changes, "stages": []}


def _mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns a copy of a section, empty if it is missing or null. Raises `UserError` if it is no mapping."""
    if not isinstance(section := raw.get(key) or {}, Mapping):
        raise UserError(f"{key}: expected a section with keys, found {section!r}.")
    return dict(section)


def _parse_benchmark(text: str) -> dict[str, Any]:
    name, equals, path = text.partition("=")
    return {"name": name, "path": path} if equals else {"name": name}


def _unique_names(specs: Sequence[str]) -> list[str]:
    """Returns a short name of each model for the report and its folder. Equal names get a number."""
    names: list[str] = []
    for spec in specs:
        text = _split_server(spec)[0] if spec.startswith(SERVER_PREFIX) else spec
        parts = [part for part in text.split("/") if part and part != "."]
        in_bucket = is_in_bucket(text) and parts[-1] == MODEL
        if parts[2:] and (in_bucket or RunFolder(Path(text).parent.parent).config.is_file()):  # RUN/STAGE/model
            parts[-1] = "-".join(parts[-3:-1])
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", parts[-1] if parts else "").strip(".-") or "model"
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        names.append(next(each for each in candidates if each not in names))
    return names
