"""Saved answers are reused, and a damaged file never gives a wrong answer."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from support.engines import ScriptedEngine

from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig
from thinkpo_jax.inference.saved_answers import SavedAnswers
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.manifest import digest_text

SETTINGS = {"seed": 1, "sampling": {"stop": ()}}
REQUESTS = [Request(f"q{i}", [{"role": "user", "content": f"{i}?"}]) for i in range(5)]
FIRST_LINE = json.dumps(SETTINGS).encode() + b"\n"


def answer(request: Request) -> Completion:
    return Completion(f"é{request.key}\n", int(request.key[1:]), "length" if request.key == "q1" else "stop")


def line(request: Request) -> bytes:
    values = answer(request)
    fields = {"text": values.text, "num_tokens": values.num_tokens, "finish_reason": values.finish_reason}
    record = {"key": request.key, **fields}
    digest = digest_text(json.dumps(sorted(record.items())))[:16]
    return json.dumps({**record, "digest": digest}).encode() + b"\n"


EXPECTED = {request.key: answer(request) for request in REQUESTS}
LINES = [line(request) for request in REQUESTS]


def complete(path: Path, engine: ScriptedEngine, settings: Any = SETTINGS, **options: Any) -> dict[str, Completion]:
    on_mismatch: Literal["refuse", "restart"] = options.get("on_mismatch", "refuse")
    saved = SavedAnswers(path, settings, on_mismatch=on_mismatch)
    return saved.complete(engine, REQUESTS, SamplingConfig(), seed=0, title="answers")


def test_the_file_holds_the_settings_and_one_line_for_each_answer(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    assert complete(path, ScriptedEngine(answer)) == EXPECTED
    assert path.read_bytes() == FIRST_LINE + b"".join(LINES)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the server died")], ids=["ctrl-c", "error"])
def test_answers_are_saved_as_they_arrive_and_only_missing_ones_are_generated(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(type(error)):
        complete(path, ScriptedEngine(answer, stop_after=2, error=error))
    assert path.read_bytes() == FIRST_LINE + LINES[0] + LINES[1]
    engine = ScriptedEngine(answer)
    assert complete(path, engine) == EXPECTED
    assert engine.requests == REQUESTS[2:]
    assert complete(path, engine) == EXPECTED
    assert engine.requests == REQUESTS[2:]


def test_errors_are_returned_but_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    engine = ScriptedEngine(lambda request: Completion(error="too long") if request.key == "q3" else answer(request))
    assert complete(path, engine) == {**EXPECTED, "q3": Completion(error="too long")}
    engine = ScriptedEngine(answer)
    assert complete(path, engine) == EXPECTED
    assert engine.requests == [REQUESTS[3]]


@pytest.mark.parametrize(
    "end",
    [b"", b'{"key": "q', LINES[4][:-1], b"\x00" * 40, b"\x00\n", b"7\n", b"[" * 100_000 + b"\n", b'{"key": "q4"}\n',
     b'{"key": "q4", "text": 5, "num_tokens": 1, "finish_reason": "stop"}\n', b"\xff\xfe\n"],
)  # fmt: skip
def test_a_last_line_that_is_incomplete_or_damaged_is_removed(end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(FIRST_LINE + b"".join(LINES[:4]) + end)
    engine = ScriptedEngine(answer)
    assert complete(path, engine) == EXPECTED
    assert engine.requests == [REQUESTS[4]]
    assert path.read_bytes() == FIRST_LINE + b"".join(LINES)


@pytest.mark.parametrize(
    "damaged", [b"7", LINES[2][:-9], LINES[2].replace(b"q2", b"Q2", 1), LINES[2].replace(b'": 2', b'": 6')]
)
def test_a_damaged_line_is_left_out_with_a_warning_and_its_answer_is_generated_again(
    damaged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(FIRST_LINE + b"".join(LINES[:2]) + damaged.rstrip(b"\n") + b"\n" + b"".join(LINES[3:]))
    engine = ScriptedEngine(answer)
    assert complete(path, engine) == EXPECTED
    assert engine.requests == [REQUESTS[2]]
    assert f"{path}: 1 of 5 answers are damaged. They are left out." in capsys.readouterr().err
    assert sorted(path.read_bytes().split(b"\n")) == sorted((FIRST_LINE + b"".join(LINES)).split(b"\n"))


@pytest.mark.parametrize("content", [b"", b"\n", b'{"see', FIRST_LINE[:-1]])
def test_a_file_that_was_not_begun_is_started(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    assert complete(path, ScriptedEngine(answer)) == EXPECTED
    assert path.read_bytes() == FIRST_LINE + b"".join(LINES)


MISMATCHES = {
    "no settings": (b"[1]\n", "damaged: line 1 does not hold settings"),
    "no JSON": (b"{\n", "damaged: line 1 is not JSON"),
    "binary": (b"\xff\n", "damaged: line 1 is not JSON"),
    "deep": (b"[" * 100_000 + b"\n", "damaged: line 1 is not JSON"),
    "other settings": (
        b'{"seed": 2, "sampling": {"stop": []}, "more": 1}\n' + LINES[0],
        "holds answers that were generated with other settings (seed, more)",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_file_with_other_settings_or_damage_is_refused_or_started_anew(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = MISMATCHES[case]
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        complete(path, ScriptedEngine(answer))
    assert f"{path}: {message}" in str(caught.value)
    assert "Remove the file to generate the answers again, or choose another folder." in str(caught.value)
    assert path.read_bytes() == content
    assert complete(path, ScriptedEngine(answer), on_mismatch="restart") == EXPECTED
    assert f"{path}: {message}" in capsys.readouterr().err
    assert path.read_bytes() == FIRST_LINE + b"".join(LINES)
