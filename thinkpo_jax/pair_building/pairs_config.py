"""Config sections of the command `pairs`."""

from typing import Annotated

import pydantic

from thinkpo_jax.data.record_formats import ResponseSourceConfig
from thinkpo_jax.evaluation.evaluation_config import BenchmarkConfig
from thinkpo_jax.pair_building.filters import ControlKind, FilterConfig, SelectConfig
from thinkpo_jax.pair_building.short_answers import ShortAnswersConfig
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection


class LongAnswersConfig(ResponseSourceConfig):
    """The rows with the long answers. `reference` is the column with the correct answer, if there is one."""

    reference: str | None = None


class DecontaminationConfig(ConfigSection):
    """Benchmarks whose questions are dropped. Questions match if they share `ngram` tokens in a row."""

    against: tuple[BenchmarkConfig, ...] = ()
    ngram: int = pydantic.Field(default=13, ge=4)

    @pydantic.model_validator(mode="after")
    def _reject_repeated_benchmarks(self) -> "DecontaminationConfig":
        names = [benchmark.name for benchmark in self.against]
        if len(set(names)) < len(names):
            raise ValueError(f"against: a benchmark is named twice: {', '.join(names)}. Name each one once")
        return self


class PairsConfig(ConfigSection):
    """How pairs are built. `out` is the output folder, and `tokenizer` (a model folder or Hub id) counts the tokens."""

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
