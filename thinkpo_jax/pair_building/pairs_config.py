"""Config sections of `pairs`."""

from typing import Annotated

import pydantic

from thinkpo_jax.data.record_formats import ResponseSourceConfig
from thinkpo_jax.evaluation.evaluation_config import BenchmarkConfig
from thinkpo_jax.pair_building.filters import ControlKind, FilterConfig, SelectConfig
from thinkpo_jax.pair_building.short_answers import ShortAnswersConfig
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection


class LongAnswersConfig(ResponseSourceConfig):
    """The rows with the long answers; `reference`: the column of the right answer, where there is one."""

    reference: str | None = None


class DecontaminationConfig(ConfigSection):
    """Which evaluation questions may not be trained on; `ngram`: tokens in a row that make two questions one."""

    against: tuple[BenchmarkConfig, ...] = ()
    ngram: int = pydantic.Field(default=13, ge=4)

    @pydantic.model_validator(mode="after")
    def _once(self) -> "DecontaminationConfig":
        names = [benchmark.name for benchmark in self.against]
        if len(set(names)) < len(names):
            raise ValueError(f"against: a benchmark is named twice: {names}")
        return self


class PairsConfig(ConfigSection):
    """How pairs are built. `tokenizer`, a model's folder or Hub id, counts tokens; `out` is the folder they go to."""

    out: ConfigPath
    title: str = "ThinkPO pairs"
    seed: int = pydantic.Field(default=0, ge=0, lt=2**31)
    tokenizer: ConfigPath
    long: LongAnswersConfig
    short: Annotated[ShortAnswersConfig, pydantic.Field(discriminator="by")]
    filters: FilterConfig = FilterConfig()
    control: ControlKind = "none"
    select: SelectConfig = SelectConfig()
    decontaminate: DecontaminationConfig = DecontaminationConfig()
