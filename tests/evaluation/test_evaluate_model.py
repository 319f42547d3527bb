"""Saved answers are reused only for the same settings. Failed answers are counted and generated again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import small
from support.engines import ScriptedEngine

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.evaluation.benchmarks import load_questions
from thinkpo_jax.evaluation.evaluate_model import (
    EvaluatedModel,
    EvaluationConfig,
    evaluate_model,
    read_answers,
    regrade_answers,
)
from thinkpo_jax.evaluation.grading import Reference
from thinkpo_jax.evaluation.results import AnswerCounts, GradedSample, QuestionResult, count_answers
from thinkpo_jax.inference.engine import Completion, Request
from thinkpo_jax.inference.local_engine import LocalEngine, LocalEngineConfig
from thinkpo_jax.models.model_folder import ModelConfig, ModelSource, resolve_model_folder, resolve_model_source
from thinkpo_jax.runtime.config import UserError, parse_config

SERVER = {"engine": "server", "server": {"url": "http://localhost:8000/v1", "model": "tiny"}}
Evaluate = Callable[..., list[QuestionResult]]


def _config(questions: int = 6, **changes: Any) -> EvaluationConfig:
    raw = {"benchmarks": [{"name": "miniature", "questions": questions}], "sampling": {"max_new_tokens": 40}} | changes
    return parse_config(EvaluationConfig, raw, source="test")


def _evaluate(folder: Path, engine: Any, config: EvaluationConfig, **changes: Any) -> list[QuestionResult]:
    source = resolve_model_source(changes.pop("model", ModelConfig(path="builtin:miniature")), seed=0)
    options = {"dtype": "float32", "seed": 0, "folder": folder} | changes
    questions = {(name := config.benchmarks[0].name): load_questions(config.benchmarks[0], seed=0)}
    model = EvaluatedModel("base", source, config.server)
    return evaluate_model(model, engine, config, questions, **options)[name]


def _answer(request: Request) -> Completion:
    """Is right for questions that begin with an even digit. Depends on the sample."""
    digits = [int(digit) for digit in request.messages[-1]["content"][:6]]
    right = sum(digits) % 10
    return Completion(f"{request.sample};#{right if digits[0] % 2 == 0 else (right + 1) % 10}", num_tokens=7)


def test_answers_are_generated_again_for_other_template_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(resolve_model_folder("builtin:miniature"), tmp_path / "model"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt and first %}{{ first }}{% endif %}")
    config = _config(2, sampling={"max_new_tokens": 4}, local={"slots": 2})
    loads: list[ModelSource] = []
    load = ModelSource.load
    monkeypatch.setattr(
        ModelSource, "load", lambda self, *options, **keys: loads.append(self) or load(self, *options, **keys)
    )

    def evaluate(**arguments: str) -> list[QuestionResult]:
        model = ModelConfig(path=str(folder), template_arguments=arguments)
        engine = LocalEngine(resolve_model_source(model, seed=0), small.FLOAT32, LocalEngineConfig(slots=2))
        return _evaluate(tmp_path / "answers", engine, config, model=model)

    answers = evaluate()
    assert evaluate() == answers
    assert len(loads) == 1
    evaluate(first="#")
    assert len(loads) == 2


def test_each_sample_of_a_question_is_graded(tmp_path: Path) -> None:
    config = _config(samples := 6, sampling={"samples": 3, "max_new_tokens": 40})
    results = _evaluate(tmp_path, ScriptedEngine(_answer), config)
    assert len(results) == samples
    for question, result in zip(load_questions(config.benchmarks[0], seed=0), results, strict=True):
        correct = int(question.messages[-1]["content"][0]) % 2 == 0
        assert result.question_id == question.id
        assert [sample.response[:2] for sample in result.samples] == ["0;", "1;", "2;"]
        assert [sample.correct for sample in result.samples] == [correct] * 3
    assert read_answers(tmp_path / "miniature.json") == results


def test_an_interrupted_evaluation_resumes_and_gives_the_same_file(tmp_path: Path) -> None:
    config = _config(sampling={"samples": 2, "max_new_tokens": 40})
    _evaluate(tmp_path / "whole", ScriptedEngine(_answer), config)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(tmp_path / "cut", ScriptedEngine(_answer, stop_after=5), config)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["miniature.answers.jsonl"]
    engine = ScriptedEngine(_answer)
    _evaluate(tmp_path / "cut", engine, config)
    assert len(engine.requests) == 12 - 5
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert files[0].keys() == {"miniature.json", "miniature.answers.jsonl"}
    _evaluate(tmp_path / "cut", engine, config)
    assert len(engine.requests) == 12 - 5


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "seed": ({}, {"seed": 1}),
    "sampling": ({"sampling": {"max_new_tokens": 40, "temperature": 0.2}}, {}),
    "stop": ({"sampling": {"max_new_tokens": 40, "stop": ["#"]}}, {}),
    "engine": (SERVER, {}),
    "model of the server": ({**SERVER, "server": {**SERVER["server"], "model": "other"}}, {}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_answers_with_other_settings_start_anew(case: str, tmp_path: Path) -> None:
    keys, options = CHANGES[case]
    before = _config(**(SERVER if case == "model of the server" else {}))
    for finished in (False, True):
        folder = tmp_path / str(finished)
        try:
            _evaluate(folder, ScriptedEngine(_answer, stop_after=None if finished else 3), before)
        except KeyboardInterrupt:
            assert not finished
        engine = ScriptedEngine(_answer)
        _evaluate(folder, engine, _config(**keys), **options)
        assert len(engine.requests) == 6


def test_where_the_server_is_and_how_many_slots_there_are_change_no_answer(tmp_path: Path) -> None:
    pairs = [
        (_config(), _config(local={"slots": 2})),
        (_config(**SERVER), _config(engine="server", server={"url": "https://a", "model": "tiny", "concurrency": 2})),
    ]
    for index, (first, second) in enumerate(pairs):
        with pytest.raises(KeyboardInterrupt):
            _evaluate(tmp_path / str(index), ScriptedEngine(_answer, stop_after=3), first)
        engine = ScriptedEngine(_answer)
        _evaluate(tmp_path / str(index), engine, second)
        assert len(engine.requests) == 3


def test_failed_answers_are_wrong_counted_by_reason_and_generated_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, whole = _config(9), tmp_path / "whole"
    ids = [question.id for question in load_questions(config.benchmarks[0], seed=0)]
    failures = {f"{ids[1]}/0": "too long: 120 tokens", f"{ids[4]}/0": "no", f"{ids[6]}/0": "too long: 99 tokens"}

    def fail(request: Request) -> Completion:
        return Completion(error=failures[request.key]) if request.key in failures else _answer(request)

    results = _evaluate(tmp_path / "failed", ScriptedEngine(fail), config)
    assert results[1].samples == (GradedSample("", 0, False, False, error="too long: 120 tokens"),)
    assert count_answers(results) == AnswerCounts(9, 0, 0, 0, {"too long: 120 tokens": 2, "no": 1})
    message = (
        "warning: base on miniature: of 9 answers: 3 failed (count as wrong). 2 failed because: too long: 120 "
        "tokens. 1 failed because: no. Run the evaluation again to ask for failed answers."
    )
    assert message in capsys.readouterr().err
    assert json.loads((tmp_path / "failed" / "miniature.json").read_text())["failed"] == 3
    assert read_answers(tmp_path / "failed" / "miniature.json") == results
    engine = ScriptedEngine(_answer)
    assert _evaluate(tmp_path / "failed", engine, config) == _evaluate(whole, ScriptedEngine(_answer), config)
    assert {request.key for request in engine.requests} == failures.keys()
    assert "warning" not in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "failed").iterdir()} == {
        name: (whole / name).read_bytes() for name in ("miniature.json", "miniature.answers.jsonl")
    }


def test_empty_and_truncated_answers_and_those_cut_by_the_context_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [
        Completion("", 0), Completion(" \n", 1), Completion("1", 40, "length"), Completion("12", 39, "length"),
        Completion("1", 12, "length"), Completion("#3", 2),
    ]  # fmt: skip
    for keys, cut in (({}, 2), (SERVER, 1)):  # the tokens of a server's answer are counted from its text
        script = iter(answers)
        results = _evaluate(tmp_path / str(cut), ScriptedEngine(lambda _, script=script: next(script)), _config(**keys))
        assert count_answers(results) == AnswerCounts(6, 3, cut, 2, {})
        message = f"base on miniature: of 6 answers: 2 empty, {cut} cut by the context of the model."
        assert message in capsys.readouterr().err


def test_more_questions_and_samples_reuse_the_saved_answers_and_the_file_is_sorted(tmp_path: Path) -> None:
    _evaluate(tmp_path, ScriptedEngine(_answer), _config(3))
    engine, config = ScriptedEngine(_answer), _config(5, sampling={"max_new_tokens": 40, "samples": 2})
    results = _evaluate(tmp_path, engine, config)
    assert len(engine.requests) == 5 * 2 - 3
    keys = [f"{question.id}/{sample}" for question in load_questions(config.benchmarks[0], seed=0) for sample in (0, 1)]
    lines = (tmp_path / "miniature.answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines[1:]] == keys
    assert results == _evaluate(tmp_path / "new", ScriptedEngine(_answer), config)
    fewer = _evaluate(tmp_path, engine, _config(3))
    assert fewer == [replace(result, samples=result.samples[:1]) for result in results[:3]]
    assert len(engine.requests) == 5 * 2 - 3


@pytest.mark.parametrize("prompt_opens_thought", [False, True])
def test_nothing_in_a_thought_that_never_ends_is_an_answer(
    prompt_opens_thought: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opening = tmp_path / "rows.jsonl", "" if prompt_opens_thought else "<think>"
    path.write_text('{"question": "1?", "answer": 2}\n{"question": "2?", "answer": 2}\n')
    texts = [r"so \boxed{2} or", r"so \boxed{3}</think> thus \boxed{2}"]
    config = _config(benchmarks=[{"name": "mine", "path": str(path)}])
    encode_prompt = ChatTokenizer.encode_prompt
    if prompt_opens_thought:
        monkeypatch.setattr(
            ChatTokenizer,
            "encode_prompt",
            lambda *arguments: encode_prompt(*arguments)._replace(open_thought_tag="<think>"),
        )
    answers = iter([opening + text for text in texts])
    results = _evaluate(tmp_path / "answers", ScriptedEngine(lambda _: Completion(next(answers), 3)), config)
    samples = [result.samples[0] for result in results]
    assert [(each.correct, each.extracted, each.unfinished_thought) for each in samples] == [
        (False, None, True),
        (True, "2", False),
    ]
    assert [sample.response for sample in samples] == [opening + text for text in texts]


@pytest.mark.parametrize("edited", ["miniature.json", "miniature.answers.jsonl"])
def test_an_edited_file_is_written_again(edited: str, tmp_path: Path) -> None:
    config, engine = _config(), ScriptedEngine(_answer)
    results = _evaluate(tmp_path, engine, config)
    path = tmp_path / edited
    text = path.read_text()
    if edited == "miniature.json":
        path.write_text(text.replace('"correct": true', '"correct": false'))
        with pytest.raises(UserError, match="damaged"):
            regrade_answers("", load_questions(config.benchmarks[0], seed=0), path)
        assert _evaluate(tmp_path, engine, config) == results
        assert path.read_text() == text
    else:
        path.write_text(text.replace("#", "#x"))
        assert _evaluate(tmp_path, engine, config) == results
    assert len(engine.requests) == (6 if edited == "miniature.json" else 12)


def test_saved_answers_are_graded_again_without_the_engine(tmp_path: Path) -> None:
    config, path = _config(9), tmp_path / "miniature.json"
    results = _evaluate(tmp_path, ScriptedEngine(lambda r: _answer(r) if r.sample else Completion(error="no")), config)
    results = _evaluate(tmp_path, ScriptedEngine(_answer), config)
    questions = load_questions(config.benchmarks[0], seed=0)
    content = path.read_bytes()
    assert regrade_answers("base on miniature", questions, path) == results == read_answers(path)
    assert path.read_bytes() == content
    others = [replace(question, reference=Reference(("x",))) for question in questions]
    assert not any(sample.correct for result in regrade_answers("", others, path) for sample in result.samples)
    with pytest.raises(UserError, match="the answers are to other questions"):
        regrade_answers("", questions[1:], path)
