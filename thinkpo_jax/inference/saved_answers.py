"""Saves answers in a file as they arrive, so that an interrupted run asks only for the missing ones."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pydantic

from thinkpo_jax.inference.engine import Completion, Engine, Request, SamplingConfig
from thinkpo_jax.runtime.config import ConfigSection, UserError
from thinkpo_jax.runtime.console import ProgressReporter, log_info, log_warning
from thinkpo_jax.runtime.files import free_name, write_atomically
from thinkpo_jax.runtime.manifest import digest_text
from thinkpo_jax.runtime.processes import broadcast_from_primary, is_primary_process


class _Line(ConfigSection):
    key: str
    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    digest: str

    @pydantic.model_validator(mode="after")
    def _check_digest(self) -> "_Line":
        if self.digest != _digest(self.model_dump(exclude={"digest"})):
            raise ValueError("its values are not those that were written")
        return self


def _digest(values: Mapping[str, Any]) -> str:
    return digest_text(json.dumps(sorted(values.items())))[:16]


class _DamagedFileError(Exception):
    pass


class SavedAnswers:
    """Completions in a JSONL file. The first line holds the settings, and each further line one completion.

    Errors are not saved, so that they are tried again. Only the primary process reads and writes the file. All
    processes have the same `completions`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, on_mismatch: Literal["refuse", "restart"]) -> None:
        """Reads the file, or starts it. Removes damaged lines with a warning. Their answers are missing then.

        If the file has other settings, or their line is damaged, "restart" starts it anew, and "refuse" raises
        `UserError`.
        """
        self.path, self._settings = path, json.loads(json.dumps(settings))
        self._on_mismatch = on_mismatch
        lines = broadcast_from_primary(b"\n".join(self._read_lines()) if is_primary_process() else b"")
        self.completions = _parse_lines(lines.split(b"\n") if lines else [])

    def complete(
        self, engine: Engine, requests: Sequence[Request], sampling: SamplingConfig, *, seed: int, title: str
    ) -> dict[str, Completion]:
        """Returns the completion of each request by its key. Generates and saves those that are missing."""
        completions = {each.key: self.completions[each.key] for each in requests if each.key in self.completions}
        missing = [request for request in requests if request.key not in completions]
        if not missing:
            return completions
        path = self.path if is_primary_process() else Path(os.devnull)
        num_truncated = sum(completion.finish_reason == "length" for completion in completions.values())
        num_tokens, start = 0, time.monotonic()
        with (
            path.open("a", buffering=1, encoding="utf-8") as file,
            closing(ProgressReporter(title, len(requests), done=len(completions), unit="answer")) as progress,
            closing(engine.generate(missing, sampling, seed=seed)) as arriving,
        ):
            for key, completion in arriving:
                completions[key] = completion
                if completion.error is None:
                    file.write(_to_line(key, completion))
                    self.completions[key] = completion
                num_tokens += completion.num_tokens
                num_truncated += completion.finish_reason == "length"
                speed = num_tokens / max(time.monotonic() - start, 1e-9)
                progress.update(len(completions), {"tok/s": f"{speed:,.0f}", "truncated": f"{num_truncated:,}"})
        return completions

    def sort(self, keys: Sequence[str]) -> None:
        """Writes the file again with the completions in the order of `keys`. Others follow in their old order."""
        order = [key for key in dict.fromkeys([*keys, *self.completions]) if key in self.completions]
        lines = [json.dumps(self._settings) + "\n", *(_to_line(key, self.completions[key]) for key in order)]
        write_atomically(self.path, "".join(lines).encode())

    def _read_lines(self) -> list[bytes]:
        """Returns the lines with completions. Truncates or starts the file, so that lines can be appended."""
        content = self.path.read_bytes() if self.path.exists() else b""
        complete, newline, _ = content.rpartition(b"\n")
        problem = ""
        if complete:
            try:
                first, *lines = complete.split(b"\n")
                if changed := self._changed_settings(first):
                    problem = f"holds answers that were generated with other settings ({', '.join(changed)})"
                else:
                    lines = _good_lines(self.path, lines)
                    if (good := b"".join(line + newline for line in [first, *lines])) != content:
                        write_atomically(self.path, good)
                    return lines
            except _DamagedFileError as error:
                problem = f"damaged: {error}"
        if problem and self._on_mismatch == "refuse":
            advice = "Remove the file to generate the answers again, or choose another folder"
            raise UserError(f"{self.path}: {problem}. {advice}.")
        if problem:
            log_info(
                f"{self.path}: {problem}. The answers are generated again. The old ones are in {self._set_aside()}."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self._settings) + "\n", encoding="utf-8")
        return []

    def _set_aside(self) -> str:
        """Gives the file another name, which no file has, and returns it."""
        return self.path.rename(free_name(self.path.with_name(f"{self.path.name}.old"))).name

    def _changed_settings(self, line: bytes) -> list[str]:
        try:
            saved = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _DamagedFileError(f"line 1 is not JSON: {error}") from None
        if not isinstance(saved, dict):
            raise _DamagedFileError("line 1 does not hold settings")
        settings = self._settings
        return [key for key in {**saved, **settings} if saved.get(key) != settings.get(key)]


def read_saved_answers(path: Path) -> tuple[dict[str, Any], dict[str, Completion]]:
    """Returns the settings and the completions in a file of `SavedAnswers`. Changes nothing.

    Raises `UserError` if the file is missing or damaged.
    """
    try:
        first, *lines = path.read_bytes().rpartition(b"\n")[0].split(b"\n")
        return json.loads(first), _parse_lines(_good_lines(path, lines))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: the saved answers cannot be read: {error}. Evaluate the model again.") from None


def _parse_lines(lines: Sequence[bytes]) -> dict[str, Completion]:
    parsed = map(_Line.model_validate_json, lines)
    return {line.key: Completion(**line.model_dump(exclude={"key", "digest"})) for line in parsed}


def _to_line(key: str, completion: Completion) -> str:
    values = {"key": key} | {name: value for name, value in vars(completion).items() if name in _Line.model_fields}
    return json.dumps({**values, "digest": _digest(values)}) + "\n"


def _good_lines(path: Path, lines: Sequence[bytes]) -> list[bytes]:
    """Returns the lines that hold an answer. Logs a warning if there are others."""
    good: list[bytes] = []
    for line in lines:
        with contextlib.suppress(pydantic.ValidationError):
            _Line.model_validate_json(line, strict=True)
            good.append(line)
    if len(good) < len(lines):
        log_warning(f"{path}: {len(lines) - len(good)} of {len(lines)} answers are damaged. They are left out.")
    return good
