"""Short answers of a model or a server are generated once. A rerun generates only the missing ones."""

import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.faults import Outcome
from support.interrupt import run_interrupted
from support.pairs import UNBOXED, Config, built_pairs, card_counts, nonzero, run_pairs, saved_answers, write_jsonl
from support.server import Reply, failed, said, serving

from thinkpo_jax.inference.openai_engine import MAX_FAILURES_IN_A_ROW
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.pair_building.build_pairs import PairsConfig
from thinkpo_jax.pair_building.short_answers import GeneratedAnswersConfig
from thinkpo_jax.runtime.config import parse_config

pytestmark = pytest.mark.usefixtures("fast_retries", "cached_grading")
PAPER_SYSTEM = "You are a helpful and harmless assistant. Please reason step by step."


def served(joined: Config, url: str, **changes: Any) -> Config:
    """Replaces the file of short answers by a server."""
    server = {"url": url, "model": "tiny", "retries": 1, "concurrency": 1}
    short = {"by": "sample", "engine": "server", "server": server}
    return joined | {"short": short, "filters": UNBOXED} | changes


def test_the_defaults_are_those_of_the_paper_also_if_one_value_is_set(joined: Config):
    server = {"url": "http://localhost:8000/v1", "model": "tiny"}
    for changes in ({}, {"sampling": {"top_k": 8}}):
        raw = joined | {"short": {"by": "sample", "engine": "server", "server": server, **changes}}
        short = parse_config(PairsConfig, raw, source="x").short
        assert isinstance(short, GeneratedAnswersConfig)
        sampling = short.sampling
        assert (short.system, sampling.temperature, sampling.top_p) == (PAPER_SYSTEM, 0.7, 0.9)
        assert (sampling.max_new_tokens, sampling.samples) == (1024, 1)


@pytest.mark.parametrize("samples", [0, 2])
def test_a_question_has_one_generated_answer(samples: int, miniature: Config, capsys: pytest.CaptureFixture[str]):
    assert run_pairs(miniature, f"short.sampling.samples={samples}") == 2
    assert "short.sampling.samples: " in capsys.readouterr().err


def test_a_model_answers_each_question(miniature: Config):
    pairs = built_pairs(miniature)
    assert all(re.fullmatch(r"[0-9]{6}[?!.]", pair["question"]) for pair in pairs)
    assert all(re.fullmatch(r"[0-9+=;#]+", pair["rejected"]) for pair in pairs)
    keys = [answer["key"] for answer in saved_answers(miniature)]
    assert len(set(keys)) == len(keys) == card_counts(miniature)[-1]["all"] == 40


@pytest.mark.parametrize(
    "sent_signal",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)],
    ids=["kill -9", "ctrl-c"],
)
@pytest.mark.faults(Outcome.SAME)
def test_an_interrupted_run_resumes_and_gives_the_same_pairs(
    sent_signal: signal.Signals, miniature: Config, tmp_path: Path
):
    miniature["short"]["sampling"] |= {"temperature": 0.7, "top_p": 0.9}
    uninterrupted = built_pairs(miniature | {"out": str(tmp_path / "uninterrupted")})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(miniature), encoding="utf-8")
    run_interrupted("thinkpo_jax.pairs", ["--config", str(path)], sent_signal, after=random.randrange(1, 40))
    answers = tmp_path / "out/short_answers.jsonl"
    before = answers.read_bytes()
    assert before.endswith(b"\n")
    assert 1 < before.count(b"\n") < 41
    answers.write_bytes(before + b'{"key": "0123')  # as after a power failure within a line
    assert built_pairs(miniature) == uninterrupted
    assert answers.read_bytes().startswith(before)
    keys = [answer["key"] for answer in saved_answers(miniature)]
    assert len(set(keys)) == len(keys) == 40


def test_saved_answers_with_other_settings_are_an_error(miniature: Config, capsys: pytest.CaptureFixture[str]):
    miniature["long"]["generate"]["questions"] = 2
    assert run_pairs(miniature) == 0
    path = Path(miniature["out"]) / "short_answers.jsonl"
    before = path.read_bytes()
    for changed in ("seed=1", "short.sampling.temperature=0.6", "short.system=Be brief."):
        assert run_pairs(miniature, changed) == 2
        message = capsys.readouterr().err
        assert f"{path}: holds answers that were generated with other" in message
        assert changed.split("=")[0].split(".")[:2][-1] in message
    assert path.read_bytes() == before
    assert run_pairs(miniature, "select.gap=long", "short.local.slots=8") == 0  # these change no answer
    assert path.read_bytes() == before
    builtin = resolve_model_folder("builtin:miniature")
    assert run_pairs(miniature, f"short.model.path={builtin}") == 0  # the same model at another path
    assert path.read_bytes() == before


@pytest.mark.faults(Outcome.REFUSED)
def test_a_damaged_file_of_saved_answers_is_an_error(miniature: Config, capsys: pytest.CaptureFixture[str]):
    path = Path(miniature["out"]) / "short_answers.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"[1]\n")
    assert run_pairs(miniature) == 2
    assert f"error: {path}: damaged: line 1 does not hold settings" in capsys.readouterr().err
    assert path.read_bytes() == b"[1]\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "request"}, "short: `by: request` has a new form. Write `by: sample` and `engine: server`"),
        ({"by": "model"}, "short.by: expected one of 'join', 'sample'"),
        ({"model": {"path": "builtin:miniature"}}, "`model` and `compute` have no effect with `engine: server`"),
        ({"compute": {"dtype": "float32"}}, "`model` and `compute` have no effect with `engine: server`"),
        ({"engine": "local"}, "`server` has no effect with `engine: local`"),
        ({"engine": "local", "server": None}, "`engine: local` needs the section `model`"),
        ({"mesh": {}}, "unknown key short.mesh"),
    ],
)
def test_keys_of_the_other_engine_and_old_keys_are_rejected(
    changes: Config, message: str, joined: Config, capsys: pytest.CaptureFixture[str]
):
    config = served(joined, "http://localhost:8000/v1")
    assert run_pairs(config | {"short": config["short"] | changes}) == 2
    assert message in capsys.readouterr().err


def test_a_question_that_the_template_refuses_is_counted(
    miniature: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"prompt": text, "response": "#1"} for text in ("123456?", "1<|end|>2?", "what?")]
    miniature["long"] = {"path": write_jsonl(tmp_path / "long.jsonl", rows)}
    assert [row["question"] for row in built_pairs(miniature)] == ["123456?"]
    assert card_counts(miniature)[-1]["the question was refused"] == 2
    assert "2 of 3 questions were refused, the first because: the user's text holds '<|end|>'" in (
        capsys.readouterr().err
    )


def test_a_model_with_random_weights_is_rejected(miniature: Config, capsys: pytest.CaptureFixture[str]):
    assert run_pairs(miniature, "short.model.weights=random") == 2
    assert "model.weights: a model with random weights has no answers" in capsys.readouterr().err


def test_the_request_to_a_server_is_that_of_the_paper(joined: Config):
    with serving(said("\\boxed{4}")) as endpoint:
        pairs = built_pairs(served(joined, endpoint.url))
    assert [pair["rejected"] for pair in pairs] == ["\\boxed{4}"] * 4
    assert len(endpoint.bodies) == 3  # one question occurs twice
    first = endpoint.bodies[0]
    messages = [{"role": "system", "content": PAPER_SYSTEM}, {"role": "user", "content": "What is\n 1+1?"}]
    assert first["messages"] == messages
    assert (first["model"], first["temperature"], first["top_p"], first["max_tokens"]) == ("tiny", 0.7, 0.9, 1024)


def test_after_a_server_failure_a_rerun_sends_only_the_missing_questions(
    joined: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"prompt": f"{i}?", "response": "so it is " + str(i)} for i in range(8)]
    joined["long"] = {"path": write_jsonl(tmp_path / "long.jsonl", rows)}

    def answer(_: int, body: dict[str, Any]) -> Reply:
        return said(body["messages"][-1]["content"][:-1])

    with serving(answer) as endpoint:
        uninterrupted = built_pairs(served(joined, endpoint.url, out=str(tmp_path / "uninterrupted")))
    with serving(lambda number, body: answer(number, body) if number < 3 else failed(500)) as endpoint:
        config = served(joined, endpoint.url)
        assert run_pairs(config) == 1
        assert len(endpoint.bodies) == 3 + 2 * MAX_FAILURES_IN_A_ROW
        error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {endpoint.url}: HTTP 500 (out of order), in up to 2 tries.")
    assert [line["text"] for line in saved_answers(config)] == ["0", "1", "2"]
    with serving(answer) as endpoint:
        assert built_pairs(served(joined, endpoint.url)) == uninterrupted
    assert [body["messages"][-1]["content"] for body in endpoint.bodies] == [f"{i}?" for i in range(3, 8)]
    with serving(failed(500)) as endpoint:
        assert built_pairs(served(joined, endpoint.url)) == uninterrupted
        assert endpoint.bodies == []


def test_a_refused_question_is_counted_and_sent_again_on_a_rerun(joined: Config, capsys: pytest.CaptureFixture[str]):
    def script(_: int, body: dict[str, Any]) -> Reply:
        return failed(400, "too long") if body["messages"][-1]["content"] == "2+2?" else said("7")

    with serving(script) as endpoint:
        assert [row["question"] for row in built_pairs(served(joined, endpoint.url))] == ["What is\n 1+1?", "3+3?"]
    assert nonzero(card_counts(joined)[-1]) == {"all": 4, "the question was refused": 2}
    assert "2 of 4 questions were refused, the first because: too long" in capsys.readouterr().err
    with serving(said("7")) as endpoint:
        assert len(built_pairs(served(joined, endpoint.url))) == 4
        assert len(endpoint.bodies) == 1


def test_a_truncated_answer_is_dropped(joined: Config):
    def script(_: int, body: dict[str, Any]) -> Reply:
        return said("7", "length" if body["messages"][-1]["content"] == "2+2?" else "stop")

    with serving(script) as endpoint:
        assert [row["question"] for row in built_pairs(served(joined, endpoint.url))] == ["What is\n 1+1?", "3+3?"]
        assert card_counts(joined)[-1]["the short answer was cut"] == 2
    assert len(endpoint.bodies) == 3
    assert [answer["finish_reason"] for answer in saved_answers(joined)] == ["stop", "length", "stop"]
    assert [answer["num_tokens"] for answer in saved_answers(joined)] == [1, 1, 1]
    with serving(failed(500)) as endpoint:
        assert len(built_pairs(served(joined, endpoint.url))) == 2
        assert card_counts(joined)[-1]["the short answer was cut"] == 2
