"""The configuration of the engine that generates completions."""

from typing import Literal

import pydantic

from thinkpo_jax.inference.local_engine import LocalEngineConfig
from thinkpo_jax.inference.openai_engine import ServerConfig
from thinkpo_jax.runtime.config import ConfigSection


class EngineConfig(ConfigSection):
    """Whether the local engine or a server generates the answers, and the keys of each engine."""

    engine: Literal["local", "server"] = "local"
    local: LocalEngineConfig = LocalEngineConfig()
    server: ServerConfig | None = None

    @pydantic.model_validator(mode="after")
    def _check_engine(self) -> "EngineConfig":
        if self.engine == "server" and self.server is None:
            raise ValueError("`engine: server` needs the section `server` with `url` and `model`. Add it")
        if self.engine == "server" and self.local != LocalEngineConfig():
            raise ValueError("`local` has no effect with `engine: server`. Remove it, or set `engine: local`")
        if self.engine == "local" and self.server is not None:
            raise ValueError("`server` has no effect with `engine: local`. Add `engine: server`, or remove `server`")
        return self
