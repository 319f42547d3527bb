"""An engine for tests of what is done with completions."""

from collections.abc import Callable, Generator, Sequence

from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig


class ScriptedEngine:
    """Gives the completions of a function. Raises an error after `stop_after` of them. Records the requests."""

    def __init__(
        self,
        script: Callable[[Request], Completion],
        *,
        stop_after: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        self.script, self.stop_after, self.error = script, stop_after, error or KeyboardInterrupt()
        self.requests: list[Request] = []

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, seed: int
    ) -> Generator[tuple[str, Completion], None, None]:
        self.requests += requests
        for number, request in enumerate(requests):
            if number == self.stop_after:
                raise self.error
            yield request.key, self.script(request)
