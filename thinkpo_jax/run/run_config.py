"""The whole configuration of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from thinkpo_jax.evaluation.benchmarks import FileName
from thinkpo_jax.evaluation.evaluate_model import EvaluationConfig
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelConfig
from thinkpo_jax.run.foreign_keys import FOREIGN_KEYS
from thinkpo_jax.runtime.bucket import check_bucket_url
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, did_you_mean, parse_config
from thinkpo_jax.runtime.config_file import read_config
from thinkpo_jax.runtime.mesh import MeshConfig
from thinkpo_jax.runtime.yaml_text import apply_overrides
from thinkpo_jax.training.stage_config import StageConfig

# Where things are. What they hold is compared instead, because it may lie at another path.
DATA_PATH_KEYS: dict[str, Any] = {"data": {"__all__": {"path"}}}  # of a stage
PATH_KEYS: dict[str, Any] = {
    "model": {"path"},
    "stages": {"__all__": DATA_PATH_KEYS},
    "evaluation": {"benchmarks": {"__all__": {"path"}}, "server": {"url"}, "against": True, "system_prompt": True},
}
RESERVED_NAMES = ("comparisons", "evaluation", "plots", "config.yaml", "report.md", "report.json")


class RunConfig(ConfigSection):
    """One run: a start model, a mesh, an ordered list of stages, and the evaluation at its end.

    `base_name` is the name of the start model in the report.
    """

    run_dir: ConfigPath
    title: str = "ThinkPO run"
    seed: int = pydantic.Field(default=0, ge=0, lt=2**31)
    model: ModelConfig
    base_name: FileName = "base"
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    stages: tuple[Annotated[StageConfig, pydantic.Field(discriminator="objective")], ...] = ()
    evaluation: EvaluationConfig | None = None

    @pydantic.field_validator("run_dir")
    @classmethod
    def _check_is_folder(cls, run_dir: str) -> str:
        return check_bucket_url(run_dir) if "://" in run_dir else run_dir

    @pydantic.model_validator(mode="after")
    def _check_names(self) -> "RunConfig":
        known = [self.base_name]
        for stage in self.stages:
            if stage.name in known or stage.name in RESERVED_NAMES:
                problem = f"the stage name {stage.name!r} is taken."
                raise ValueError(f"{problem} Choose another name, none of {(self.base_name, *RESERVED_NAMES)}")
            if stage.init_from is not None and stage.init_from not in known:
                raise ValueError(f"stage {stage.name}: init_from {stage.init_from!r} is not an earlier model: {known}")
            known.append(stage.name)
        for name in self.evaluation.against if self.evaluation else ():
            if name in known:
                raise ValueError(f"evaluation.against: the name {name!r} is taken. Choose another one, none of {known}")
            known.append(name)
        pairs = self.evaluation.compare if self.evaluation else ()
        if wrong := [pair for pair in pairs if pair[0] == pair[1] or pairs.count(pair) > 1]:
            raise ValueError(f"evaluation.compare: {list(wrong[0])} compares a model with itself, or is listed twice")
        for name in {name for pair in (self.evaluation.compare if self.evaluation else ()) for name in pair}:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"evaluation.compare: no model {name!r}{hint}; there are: {known}")
        return self

    @pydantic.model_validator(mode="after")
    def _check_probes(self) -> "RunConfig":
        if self.evaluation is None and (probed := [stage.name for stage in self.stages if stage.probe is not None]):
            raise ValueError(
                f"stages.{probed[0]}.probe asks questions of the first benchmark of `evaluation`, and there is no such "
                "section. Add it, or remove `probe`"
            )
        return self

    def initial_model_of(self, stage: StageConfig) -> str:
        """Returns the name of the model that a stage starts from."""
        names = [self.base_name, *(stage.name for stage in self.stages)]
        return stage.init_from or names[names.index(stage.name) - 1]


def load_run_config(path: Path, assignments: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file with its bases, and applies `--set`. Raises one `UserError` that lists every problem."""
    values, source = read_config(path)
    return parse_run_config(apply_overrides(values, assignments), assignments, source=source)


def parse_run_config(raw: Mapping[str, Any], assignments: Sequence[str], *, source: str) -> RunConfig:
    """Parses the values of a configuration, which hold the `--set` assignments. The `UserError` names the `source`."""
    options = {"source": source, "assignments": assignments, "foreign_keys": FOREIGN_KEYS}
    return parse_config(RunConfig, raw, **options)
