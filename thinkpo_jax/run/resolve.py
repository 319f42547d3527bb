"""Resolves a run: turns its configuration into checked parts."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.readers import source_state
from thinkpo_jax.evaluation.evaluate_model import EvaluatedModel
from thinkpo_jax.evaluation.protocols import DEFAULT_MAX_NEW_TOKENS
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig, resolve_attention_kernel
from thinkpo_jax.models.model_folder import ModelSource, find_model_damage, model_identity, resolve_model_source
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.run.agreement import check_same_run, find_differences
from thinkpo_jax.run.evaluated_models import open_against, parse_server
from thinkpo_jax.run.run_config import RESERVED_NAMES, RunConfig
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.context_parallel import check_row_divides_context
from thinkpo_jax.runtime.mesh import make_mesh
from thinkpo_jax.runtime.processes import any_process, broadcast_from_primary, is_distributed, is_primary_process
from thinkpo_jax.runtime.sharding import tree_shardings
from thinkpo_jax.training.stage_config import StageConfig


@dataclass(frozen=True)
class ResolvedRun:
    """The checked parts of a run. Nothing is written yet."""

    config: RunConfig
    model_source: ModelSource
    compute: ComputeConfig  # with the attention kernel of the devices
    mesh: Mesh
    folder: RunFolder
    against: tuple[EvaluatedModel, ...] = ()  # other models to evaluate

    @property
    def tokenizers(self) -> dict[str, ChatTokenizer]:
        """The tokenizer of the start model and of each other model to evaluate, by the name of the model."""
        others = {model.name: model.source.tokenizer for model in self.against}
        return {self.config.base_name: self.model_source.tokenizer, **others}

    def identities(self) -> list[str | None]:
        """Returns the identities of the start model and of the other models to evaluate."""
        return [source.identity() for source in (self.model_source, *(each.source for each in self.against))]

    def identity_of(self, name: str) -> str | None:
        """Returns the identity of the start model, or of what a stage exported. None if the stage is not finished."""
        if name == self.config.base_name:
            return self.model_source.identity()
        record = self.folder.read_stage_record(name)
        return record.summary["model"] if record is not None and record.summary is not None else None

    def source_of(self, name: str) -> ModelSource:
        """Returns a model of the run. That of a stage can be loaded once the stage is finished."""
        if name == self.config.base_name:
            return self.model_source
        return replace(self.model_source, folder=self.folder.stage(name).model, random_seed=None)

    def initial_source_of(self, stage: StageConfig) -> ModelSource:
        """Returns the model that a stage starts from."""
        return self.source_of(self.config.initial_model_of(stage))

    def settings_of(self, stage: StageConfig) -> dict[str, Any]:
        """Returns everything but the data that determines the weights of a stage. Its data has a digest.

        Paths and `data_state` are not compared. They tell whether the digest of a finished stage must be checked again.
        """
        start = self.config.initial_model_of(stage)
        return {
            "stage": _stage_settings(stage),
            "tokenizer": self.config.model.model_dump(mode="json", include={"template_arguments", "thinking_tags"}),
            "data_state": [source_state(source) for source in stage.data],
            "seed": self.config.seed,
            "dtype": self.config.compute.dtype,
            "start": {"model": start, "identity": self.identity_of(start)},
        }


def resolve_run(config: RunConfig, *, with_models: bool = True) -> ResolvedRun:
    """Checks the run folder, the mesh, the start model, its tokenizer and the row lengths.

    Raises `UserError` if a check failed.

    All processes must have the same configuration and versions. If a server answers for the model, its weights are not
    needed. Without `with_models`, the models of a run in a bucket are not copied here.
    """
    check_same_run(config)
    check_evaluation_engine(config)
    folder = RunFolder.open(config.run_dir, with_models=with_models)
    if is_distributed():  # process 0 may have files that a killed run had not uploaded yet
        folder.share()
    folder.check_owned([*RESERVED_NAMES, *(stage.name for stage in config.stages)])
    mesh = make_mesh(config.mesh)
    is_served = config.evaluation is not None and config.evaluation.engine == "server"
    source = resolve_model_source(config.model, seed=config.seed, require_weights=not is_served)
    tree_shardings(abstract_model(source.architecture, config.compute), mesh)
    for stage in config.stages:
        check_row_divides_context(mesh, stage.batch.row_length, f"stages.{stage.name}.batch.row_length")
    for warning in find_length_warnings(config, source.architecture):
        log_warning(warning)
    row_lengths = [stage.batch.row_length for stage in config.stages]
    compute = resolve_attention_kernel(config.compute, source.architecture, mesh, row_lengths)
    return ResolvedRun(config, source, compute, mesh, folder, open_against(config))


def check_evaluation_engine(config: RunConfig) -> None:
    """Raises `UserError` if a server should answer for several models, or several processes should ask it."""
    if config.evaluation is None:
        return
    is_served = config.evaluation.engine == "server"
    if is_served and config.stages:
        raise UserError(
            f"evaluation.engine is `server`, but a server answers for one model, and this run has {len(config.stages)} "
            "stages. Train with `engine: local` or `--set evaluation=null`. Then serve a model of the run, such as "
            f"{config.run_dir}/{config.stages[-1].name}/model. Give this folder to `python -m thinkpo_jax.evaluate` "
            "with --model, --out and --set evaluation.engine=server."
        )
    if is_distributed() and (is_served or any(map(parse_server, config.evaluation.against.values()))):
        raise UserError("one process asks a server, and several are running. Start this command as one process.")


def find_length_warnings(config: RunConfig, architecture: Architecture, *, longest_prompt: int = 0) -> list[str]:
    """Returns a warning for each length that is more than the model supports. Prompts are of the evaluation."""
    limit, warnings = architecture.max_positions, list[str]()
    for stage in config.stages:
        if stage.batch.row_length > limit:
            key = f"stages.{stage.name}.batch.row_length"
            warnings.append(
                f"{key} is {stage.batch.row_length}, but the model was made for at most {limit} tokens. Decrease it, "
                "unless all examples are shorter."
            )
    new = config.evaluation.sampling.max_new_tokens if config.evaluation is not None else 0
    if new != DEFAULT_MAX_NEW_TOKENS and longest_prompt + new > limit:
        prompts = f" and prompts have up to {longest_prompt}" if longest_prompt else ""
        warnings.append(
            f"evaluation.sampling.max_new_tokens is {new}{prompts}, but the model was made for at most {limit} tokens. "
            f"Decrease it to at most {max(1, limit - longest_prompt)}."
        )
    return warnings


def is_stage_finished(run: ResolvedRun, stage: StageConfig) -> bool:
    """Returns whether a stage is finished, and its model is what it exported. Process 0 decides for all processes.

    Training exports a missing or damaged model again, see `begin_stage`. Raises `UserError` if the folder holds the
    stage with other settings.
    """
    record, folder = run.folder.read_stage_record(stage.name), run.folder.stage(stage.name)
    settings = json.loads(json.dumps(run.settings_of(stage)))
    if record is not None and settings["start"]["identity"] is None:
        initial = run.config.initial_model_of(stage)
        if run.folder.read_stage_record(initial) is None:
            raise UserError(
                f"{run.folder.stage(initial).record} is missing, but stage {stage.name!r} was trained from it. Put the "
                f"folder back, or remove {folder.path} too, to train both stages again."
            )
        # That stage is finished before this one. Then this function is called again.
        settings["start"]["identity"] = record.settings["start"]["identity"]
    if differences := record and find_differences(_with_defaults(record.settings, stage), settings):
        changes = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in differences)
        raise UserError(
            f"{folder.path} holds stage {stage.name!r}, which was trained with other settings: {changes}. "
            "Choose another run_dir (--set run_dir=...), or remove that folder to train the stage again."
        )
    is_finished = record is not None and record.summary is not None
    return broadcast_from_primary(is_finished and is_primary_process() and not find_stage_damage(run, stage))


def find_stage_damage(run: ResolvedRun, stage: StageConfig) -> str:
    """Returns how the model of a finished stage differs from what the stage exported. Empty if it does not.

    Empty for a stage that is not finished.
    """
    exported, folder = run.identity_of(stage.name), run.folder.stage(stage.name).model
    if exported is None:
        return ""
    differs = "it is not the model that the stage exported"
    return find_model_damage(folder) or ("" if model_identity(folder) == exported else differs)


def finished_stages(run: ResolvedRun) -> list[str]:
    """Returns the names of the finished stages.

    Raises `UserError` if a stage has other settings, or the model of a finished stage is missing or damaged.
    """
    names = [stage.name for stage in run.config.stages if is_stage_finished(run, stage)]
    for stage in run.config.stages:
        damage = find_stage_damage(run, stage) if is_primary_process() else ""
        if damage := broadcast_from_primary(damage.encode()).decode():
            raise UserError(
                f"{run.folder.stage(stage.name).model}: damaged: {damage}. Run the training command of this run again. "
                "It exports the model again from a good checkpoint."
            )
    return names


def has_changed_files(run: ResolvedRun, stage: StageConfig) -> bool:
    """Returns whether the data files of a begun stage moved or were written again, in any process."""
    record = run.folder.read_stage_record(stage.name)
    states = [source_state(source) for source in stage.data]
    return any_process(record is not None and record.settings.get("data_state") != states)


def _stage_settings(stage: StageConfig) -> dict[str, Any]:
    # How rows are laid out over devices and micro-batches does not change the result.
    # Nor does it matter what happens to updates that are not applied, or if training diverges: users change it after
    # the run stopped. A probe only reads the weights.
    keys = ("checkpoint", "init_from", "on_nonfinite", "max_skipped", "on_divergence", "probe")
    excluded: dict[str, Any] = dict.fromkeys(keys, True)
    excluded |= {"batch": {"rows_per_device"}, "validation": {"every"}}
    return stage.model_dump(mode="json", exclude=excluded)


def _with_defaults(settings: Mapping[str, Any], stage: StageConfig) -> Mapping[str, Any]:
    """Returns the settings of a record with the defaults of stage keys that an older version did not know."""
    with contextlib.suppress(UserError, KeyError):
        return {**settings, "stage": _stage_settings(parse_config(type(stage), settings["stage"], source="record"))}
    return settings
