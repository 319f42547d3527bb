"""Turns a config into checked parts."""

from pathlib import Path

from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import resolve_attention_kernel
from thinkpo_jax.models.model_folder import check_folder, resolve_model_folder
from thinkpo_jax.models.weight_mapping import abstract_model
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.run.run_folder import Run
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.context_parallel import check_row_divides_context
from thinkpo_jax.runtime.mesh import make_mesh
from thinkpo_jax.runtime.sharding import tree_shardings


def resolve_run(config: RunConfig) -> Run:
    """Checks what can be checked without training: the mesh, the start model, its tokenizer. Raises `UserError`."""
    mesh = make_mesh(config.mesh)
    folder = resolve_model_folder(config.model.path)
    arch, chat = check_folder(folder, weights=config.model.weights == "pretrained")
    tree_shardings(abstract_model(arch, config.compute), mesh)
    for stage in config.stages:
        check_row_divides_context(mesh, stage.batch.row_length, f"stages.{stage.name}.batch.row_length")
    warn_if_rows_exceed_model(config, arch)
    compute = resolve_attention_kernel(config.compute, arch, mesh, [stage.batch.row_length for stage in config.stages])
    return Run(config, Path(config.run_dir).expanduser(), folder, chat, mesh, compute)


def warn_if_rows_exceed_model(config: RunConfig, arch: Architecture) -> None:
    """Says which rows are longer than what the model was made for."""
    for stage in config.stages:
        if stage.batch.row_length > arch.max_positions:
            name = f"stages.{stage.name}.batch.row_length"
            log_warning(
                f"{name} is {stage.batch.row_length}, the model was made for up to {arch.max_positions} tokens."
            )
