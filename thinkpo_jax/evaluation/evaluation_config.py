"""Config sections of benchmarks and evaluation."""

from typing import Literal

import pydantic

from thinkpo_jax.inference.sampling import SamplingConfig
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection


class BenchmarkConfig(ConfigSection):
    """One benchmark to run: its row of the table, where its questions are (default: the Hub), and how many."""

    name: Literal["miniature", "gsm8k", "math500", "aime24"]
    path: ConfigPath | None = None
    questions: int | None = pydantic.Field(default=None, ge=1, le=100_000)
    system: str | None = None

    @pydantic.model_validator(mode="after")
    def _no_path(self) -> "BenchmarkConfig":
        if self.name == "miniature" and self.path is not None:
            raise ValueError("the questions of the miniature are generated; leave out `path`")
        return self


class EvaluationConfig(ConfigSection):
    """What every model of the run (the start model and each stage) is asked, and which of them are compared."""

    benchmarks: tuple[BenchmarkConfig, ...] = pydantic.Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    compare: tuple[tuple[str, str], ...] = ()
