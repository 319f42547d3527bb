"""Turns a config into checked parts."""

from pathlib import Path

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import with_kernel
from thinkpo_jax.models.model_folder import check_folder, find_model
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.run.run_folder import Run
from thinkpo_jax.runtime.console import warn
from thinkpo_jax.runtime.context_parallel import check_row_length
from thinkpo_jax.runtime.mesh import make_mesh
from thinkpo_jax.runtime.sharding import shardings


def open_run(config: RunConfig) -> Run:
    """Checks what can be checked without training: the mesh, the start model, its tokenizer. Raises `UserError`."""
    mesh = make_mesh(config.mesh)
    folder = find_model(config.model.path)
    arch, chat = check_folder(folder, weights=config.model.weights == "pretrained")
    shardings(abstract_model(arch, config.compute), mesh)
    for stage in config.stages:
        check_row_length(mesh, stage.batch.row_length, f"stages.{stage.name}.batch.row_length")
    warn_of_lengths(config, arch)
    compute = with_kernel(config.compute, arch, mesh, [stage.batch.row_length for stage in config.stages])
    return Run(config, Path(config.run_dir).expanduser(), folder, chat, mesh, compute)


def warn_of_lengths(config: RunConfig, arch: Architecture) -> None:
    """Says which rows are longer than what the model was made for."""
    for stage in config.stages:
        if stage.batch.row_length > arch.max_positions:
            name = f"stages.{stage.name}.batch.row_length"
            warn(f"{name} is {stage.batch.row_length}, the model was made for up to {arch.max_positions} tokens.")
