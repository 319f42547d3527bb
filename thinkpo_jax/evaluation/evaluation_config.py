"""Config sections of benchmarks and of the evaluation."""

from typing import Annotated, Literal

import pydantic

from thinkpo_jax.inference.sampling import SamplingConfig
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection


class BenchmarkConfig(ConfigSection):
    """One benchmark: its name, where its questions are (default: the Hub) and how many to use (default: all)."""

    name: Literal["miniature", "gsm8k", "math500", "aime24"]
    path: ConfigPath | None = None
    questions: int | None = pydantic.Field(default=None, ge=1, le=100_000)
    system: str | None = None

    @pydantic.model_validator(mode="after")
    def _check_path(self) -> "BenchmarkConfig":
        if self.name == "miniature" and self.path is not None:
            raise ValueError("the questions of miniature are generated, not read from a file. Remove `path`")
        return self


def _check_names_differ(benchmarks: tuple[BenchmarkConfig, ...]) -> tuple[BenchmarkConfig, ...]:
    names = [benchmark.name for benchmark in benchmarks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"a benchmark is named twice: {', '.join(repeated)}. List each benchmark once")
    return benchmarks


Benchmarks = Annotated[tuple[BenchmarkConfig, ...], pydantic.AfterValidator(_check_names_differ)]


class EvaluationConfig(ConfigSection):
    """Benchmarks and sampling for every model of a run (the start model and each stage), and the pairs to compare."""

    benchmarks: Benchmarks = pydantic.Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    compare: tuple[tuple[str, str], ...] = ()
