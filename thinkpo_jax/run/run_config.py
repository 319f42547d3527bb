"""The whole configuration of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from thinkpo_jax.evaluation.evaluate_model import EvaluationConfig
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelConfig
from thinkpo_jax.run.foreign_keys import FOREIGN_KEYS
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, did_you_mean, parse_config
from thinkpo_jax.runtime.mesh import MeshConfig
from thinkpo_jax.runtime.yaml_text import apply_overrides, read_yaml
from thinkpo_jax.training.stage_config import StageConfig

BASE_MODEL_NAME = "base"  # the start model
# Where things are. What they hold is compared instead, because it may lie at another path.
DATA_PATH_KEYS: dict[str, Any] = {"data": {"__all__": {"path"}}}  # of a stage
PATH_KEYS: dict[str, Any] = {
    "model": {"path"},
    "stages": {"__all__": DATA_PATH_KEYS},
    "evaluation": {"benchmarks": {"__all__": {"path"}}, "server": {"url"}},
}
RESERVED_NAMES = (BASE_MODEL_NAME, "evaluation", "plots", "config.yaml", "report.md", "report.json")


class RunConfig(ConfigSection):
    """One run: a start model, a mesh, an ordered list of stages, and the evaluation at its end."""

    run_dir: ConfigPath
    title: str = "ThinkPO run"
    seed: int = pydantic.Field(default=0, ge=0, lt=2**31)
    model: ModelConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    stages: tuple[Annotated[StageConfig, pydantic.Field(discriminator="objective")], ...] = ()
    evaluation: EvaluationConfig | None = None

    @pydantic.model_validator(mode="after")
    def _check_names(self) -> "RunConfig":
        known = [BASE_MODEL_NAME]
        for stage in self.stages:
            if stage.name in known or stage.name in RESERVED_NAMES:
                problem = f"the stage name {stage.name!r} is taken."
                raise ValueError(f"{problem} Choose another name, none of {RESERVED_NAMES}")
            if stage.init_from is not None and stage.init_from not in known:
                raise ValueError(f"stage {stage.name}: init_from {stage.init_from!r} is not an earlier model: {known}")
            known.append(stage.name)
        for name in {name for pair in (self.evaluation.compare if self.evaluation else ()) for name in pair}:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"evaluation.compare: no model {name!r}{hint}; there are: {known}")
        return self

    def initial_model_of(self, stage: StageConfig) -> str:
        """Returns the name of the model that a stage starts from."""
        names = [BASE_MODEL_NAME, *(stage.name for stage in self.stages)]
        return stage.init_from or names[names.index(stage.name) - 1]


def load_run_config(path: Path, assignments: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `--set` assignments. Raises one `UserError` that lists every problem."""
    raw = apply_overrides(read_yaml(path), assignments)
    options = {"source": str(path), "assignments": assignments, "foreign_keys": FOREIGN_KEYS}
    return parse_config(RunConfig, raw, **options)
