"""A measurement in a process of its own: results, errors, crashes and time limits."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thinkpo_jax.bench.child import INTERRUPTED, run_in_child
from thinkpo_jax.runtime.config import RunError, UserError


def double(number: int) -> dict[str, Any]:
    return {"number": 2 * number, "process": os.getpid(), "variable": os.environ.get("VARIABLE")}


def refuse() -> None:
    raise UserError("a part is missing\nInstall it.")


def fail() -> None:
    raise RunError("the sides differ")


def raise_error() -> None:
    raise ValueError("not a number\nsecond line")


def count(steps: int, ending: str) -> Iterator[dict[str, int]]:
    for step in range(1, steps + 1):
        yield {"step": step}
    if ending == "crash":
        crash()


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def sleep(file: str) -> Iterator[dict[str, str]]:
    """Yields, then starts a process of its own that touches a file again and again, and never ends."""
    yield {"file": file}
    os.fork()
    while True:
        Path(file).touch()
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process imports this file by its name."""
    folder = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", "")))))
    for function in (double, refuse, fail, raise_error, count, crash, sleep):
        monkeypatch.setattr(function, "__module__", Path(__file__).stem)


def test_the_result_comes_from_another_process(tmp_path: Path) -> None:
    result = run_in_child(double, {"number": 21}, folder=tmp_path, environment={"VARIABLE": "value"})
    assert result["number"] == 42
    assert result["process"] != os.getpid()
    assert result["variable"] == "value"


def test_its_errors_are_raised_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^a part is missing\nInstall it\.$"):
        run_in_child(refuse, {}, folder=tmp_path)
    with pytest.raises(RunError, match=r"^the sides differ$"):
        run_in_child(fail, {}, folder=tmp_path)
    with pytest.raises(RunError, match=r"ended with exit status 1: ValueError: not a number\nsecond line"):
        run_in_child(raise_error, {}, folder=tmp_path)
    with pytest.raises(RunError, match=re.escape(f"ended with signal {signal.SIGSEGV.value}")):
        run_in_child(crash, {}, folder=tmp_path)


def test_a_process_that_takes_too_long_is_ended_with_its_children_and_its_result_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    result = run_in_child(sleep, {"file": str(file)}, folder=tmp_path, seconds=10)
    assert result == {"file": str(file), INTERRUPTED: "stopped after 10 s, the time that it had"}
    file.unlink()  # It exists only if the process got that far.
    time.sleep(0.5)
    assert not file.exists()


def test_what_was_yielded_before_a_crash_is_kept(tmp_path: Path) -> None:
    assert run_in_child(count, {"steps": 3, "ending": ""}, folder=tmp_path) == {"step": 3}
    crashed = run_in_child(count, {"steps": 2, "ending": "crash"}, folder=tmp_path)
    assert crashed == {"step": 2, INTERRUPTED: crashed[INTERRUPTED]}
    assert f"signal {signal.SIGSEGV.value}" in crashed[INTERRUPTED]


def test_an_old_result_is_never_returned(tmp_path: Path) -> None:
    run_in_child(double, {"number": 1}, folder=tmp_path)
    with pytest.raises(RunError):
        run_in_child(double, {"wrong": 1}, folder=tmp_path)
    assert not (tmp_path / "double.result.json").exists()
