"""Resolves a run: turns its configuration into checked parts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig, resolve_attention_kernel
from thinkpo_jax.models.model_folder import ModelSource, resolve_model_source
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.run.run_config import BASE_MODEL_NAME, DATA_PATH_KEYS, RunConfig
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.context_parallel import check_row_divides_context
from thinkpo_jax.runtime.mesh import make_mesh
from thinkpo_jax.runtime.processes import broadcast_from_primary
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

    def source_of(self, name: str) -> ModelSource:
        """Returns a model of the run. That of a stage can be loaded once the stage is finished."""
        if name == BASE_MODEL_NAME:
            return self.model_source
        return replace(self.model_source, folder=self.folder.stage(name).model, random_seed=None)

    def initial_source_of(self, stage: StageConfig) -> ModelSource:
        """Returns the model that a stage starts from."""
        return self.source_of(self.config.initial_model_of(stage))

    def settings_of(self, stage: StageConfig) -> dict[str, Any]:
        """Returns everything but the data that determines the weights of a stage. Its data has a digest."""
        # How rows are laid out over devices and micro-batches does not change the result.
        # Nor does it matter what happens to updates that are not applied: users change it after one stopped the run.
        excluded: dict[str, Any] = dict.fromkeys(("checkpoint", "init_from", "on_nonfinite", "max_skipped"), True)
        excluded |= {"batch": {"rows_per_device"}, "validation": {"every"}, **DATA_PATH_KEYS}
        fingerprint = self.initial_source_of(stage).quick_fingerprint()
        return {
            "stage": stage.model_dump(mode="json", exclude=excluded),
            "seed": self.config.seed,
            "dtype": self.config.compute.dtype,
            "start": {"model": self.config.initial_model_of(stage), "fingerprint": fingerprint},
        }


def resolve_run(config: RunConfig) -> ResolvedRun:
    """Checks the mesh, the start model, its tokenizer and the row lengths. Raises `UserError` if a check failed."""
    mesh = make_mesh(config.mesh)
    source = resolve_model_source(config.model, seed=config.seed)
    tree_shardings(abstract_model(source.architecture, config.compute), mesh)
    for stage in config.stages:
        check_row_divides_context(mesh, stage.batch.row_length, f"stages.{stage.name}.batch.row_length")
    warn_if_rows_exceed_model(config, source.architecture)
    row_lengths = [stage.batch.row_length for stage in config.stages]
    compute = resolve_attention_kernel(config.compute, source.architecture, mesh, row_lengths)
    return ResolvedRun(config, source, compute, mesh, RunFolder(Path(config.run_dir)))


def warn_if_rows_exceed_model(config: RunConfig, architecture: Architecture) -> None:
    """Warns about rows that are longer than the model supports."""
    for stage in config.stages:
        if stage.batch.row_length > architecture.max_positions:
            log_warning(
                f"stages.{stage.name}.batch.row_length is {stage.batch.row_length}, but the model was made for at most "
                f"{architecture.max_positions} tokens."
            )


def is_stage_finished(run: ResolvedRun, stage: StageConfig) -> bool:
    """Returns whether a stage is finished. Process 0 decides for all processes.

    Raises `UserError` if the folder holds the stage with other settings, or the model that it was trained from is gone.
    """
    record, folder = run.folder.read_stage_record(stage.name), run.folder.stage(stage.name)
    initial = run.initial_source_of(stage)
    if record is not None and initial.quick_fingerprint() is None:
        raise UserError(
            f"{initial.folder}: there is no model, but stage {stage.name!r} was trained from it. Put the model back, "
            f"or remove {folder.path} to train both stages again."
        )
    if changes := record and _differences(record.settings, json.loads(json.dumps(run.settings_of(stage)))):
        raise UserError(
            f"{folder.path} holds stage {stage.name!r}, which was trained with other settings: {'; '.join(changes)}. "
            "Choose another run_dir (--set run_dir=...), or remove that folder to train the stage again."
        )
    is_finished = record is not None and record.summary is not None and folder.model.is_dir()
    return broadcast_from_primary(is_finished)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = {**old, **new}
        keys.pop("path", None)  # of data. Older records hold it
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [f"{path.lstrip('.')} was {old!r}, is {new!r}"]
