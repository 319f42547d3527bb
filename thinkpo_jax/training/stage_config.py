"""Config sections of SFT and ThinkPO stages."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic

from thinkpo_jax.data.batches import BatchConfig
from thinkpo_jax.data.examples import ValidationConfig
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig
from thinkpo_jax.runtime.config import ConfigSection, exactly_one_of, matching
from thinkpo_jax.training.checkpoints import CheckpointConfig
from thinkpo_jax.training.objectives import PreferenceConfig
from thinkpo_jax.training.optimizer import OptimizerConfig

DataT = TypeVar("DataT")
STAGE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # it names a folder
STAGE_NAME_RULE = "a name of letters a to z, digits, `_`, `-` and `.`, which starts with a letter or a digit"


def _as_tuple(value: Any) -> Any:
    if not isinstance(value, Mapping | tuple | ConfigSection):
        raise ValueError("expected one source (keys) or a list of sources")
    return value if isinstance(value, tuple) else (value,)


# One source, or a list of them.
Sources = Annotated[tuple[DataT, ...], pydantic.BeforeValidator(_as_tuple), pydantic.Field(min_length=1)]


class ProbeConfig(ConfigSection):
    """Questions that the model answers greedily during training: the first ones of the run's first benchmark.

    They are asked before the first update, after every `every` updates, and after the last update. An answer has at
    most `max_new_tokens` (default: as in the evaluation).
    """

    every: int = pydantic.Field(default=50, ge=1)
    questions: int = pydantic.Field(default=16, ge=1)
    max_new_tokens: int | None = pydantic.Field(default=None, ge=1)


class _StageConfig(ConfigSection):
    """The keys of every stage.

    The stage starts from the model that `init_from` names, an earlier stage or `base`. The default is the stage before
    it. An update whose loss or gradient is not finite stops the run. With `on_nonfinite: skip` it is skipped, at most
    `max_skipped` times. Training that diverges stops the run too. With `on_divergence: warn` it goes on.
    """

    name: Annotated[str, matching(STAGE_NAME, STAGE_NAME_RULE)]
    # `start` is the old name of this key.
    init_from: str | None = pydantic.Field(default=None, validation_alias=pydantic.AliasChoices("init_from", "start"))
    steps: int | None = pydantic.Field(default=None, ge=1)
    epochs: float | None = pydantic.Field(default=None, gt=0, le=1000)
    batch: BatchConfig
    optimizer: OptimizerConfig
    validation: ValidationConfig | None = None
    probe: ProbeConfig | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = pydantic.Field(default=10, ge=1)
    on_divergence: Literal["stop", "warn"] = "stop"
    checkpoint: CheckpointConfig = CheckpointConfig()

    _one_length = exactly_one_of("steps", "epochs")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _check_old_name(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and {"start", "init_from"} <= raw.keys():
            raise ValueError("`start` is the old name of `init_from`. Give `init_from` only")
        return raw

    @pydantic.model_validator(mode="after")
    def _check_keys(self) -> "_StageConfig":
        if self.on_nonfinite == "stop" and self.max_skipped != 10:
            raise ValueError("`max_skipped` has no effect without `on_nonfinite: skip`")
        if self.checkpoint.keep_best is not None and self.validation is None:
            raise ValueError("`checkpoint.keep_best` needs `validation`")
        return self


class SftStage(_StageConfig):
    """A stage of supervised fine-tuning on answers."""

    objective: Literal["sft"]
    data: Sources[SftDataConfig]


class ThinkpoStage(_StageConfig, PreferenceConfig):
    """A stage of ThinkPO on (long, short) pairs. Its reference is the model that the stage starts from."""

    objective: Literal["thinkpo"]
    data: Sources[PreferenceDataConfig]


StageConfig = SftStage | ThinkpoStage
