"""The command `evaluate` works with a server, and resumes after a stop of the server or of itself."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.faults import Outcome
from support.interrupt import run_interrupted
from support.quickstart import QUICKSTART
from support.server import Reply, failed, fast_retries, said, serving  # noqa: F401

from thinkpo_jax import evaluate, train
from thinkpo_jax.models.model_folder import ModelSource, resolve_model_folder
from thinkpo_jax.runtime.cli import run_command

pytestmark = pytest.mark.usefixtures("fast_retries")
QUESTIONS = 8
STAGES = "a server answers for one model, and this run has 3 stages"


@pytest.fixture
def served_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder without weights. Loading a model is an error."""
    folder = tmp_path / "served"
    shutil.copytree(resolve_model_folder("builtin:miniature"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.delattr(ModelSource, "load")
    return folder


def arguments(out: Path, model: Path, url: str, *assignments: str) -> list[str]:
    """Returns the command line that evaluates a served model of the quickstart."""
    server = ["engine=server", f"server.url={url}", "server.model=tiny", "server.retries=1", "server.concurrency=1"]
    limits = ["benchmarks.0.questions=8", "sampling.max_new_tokens=64"]
    keys = [f"evaluation.{assignment}" for assignment in (*server, *limits)]
    return ["--config", QUICKSTART, "--model", str(model), "--out", str(out), "--set", *keys, *assignments]


def answer(_: int, body: dict[str, Any]) -> Reply:
    """Answers questions right, with a thought in a field of its own."""
    digits = body["messages"][-1]["content"][:6]
    return said(f"#{sum(map(int, digits)) % 10}", reasoning_content=digits)


def saved_files(out: Path) -> dict[str, bytes]:
    """Returns the files of the only model."""
    (folder,) = (out / "evaluation").iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_server_answers_for_a_folder_without_weights(served_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(answer) as endpoint:
        assert run_command(evaluate.main, arguments(out, served_folder, endpoint.url, "title=Served")) == 0
        assert len(endpoint.bodies) == QUESTIONS
        assert run_command(evaluate.main, arguments(out, served_folder, endpoint.url)) == 0
        assert len(endpoint.bodies) == QUESTIONS
    report = json.loads((out / "report.json").read_text())
    assert report["models"]["served"]["miniature"]["accuracy"] == 1
    assert report["settings"]["engine"] == "server, model tiny"
    saved = json.loads(saved_files(out)["miniature.answers.jsonl"].splitlines()[1])
    assert saved["text"].startswith("<think>\n")
    assert saved["num_tokens"] > 6
    body = endpoint.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.7, 64)
    assert "chat_template_kwargs" not in body


@pytest.mark.faults(Outcome.SAME)
def test_an_evaluation_resumes_after_the_server_died(
    served_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(answer) as endpoint:
        assert run_command(evaluate.main, arguments(tmp_path / "whole", served_folder, endpoint.url)) == 0
    with serving(lambda number, body: answer(number, body) if number < 3 else failed(500)) as endpoint:
        assert run_command(evaluate.main, arguments(tmp_path / "cut", served_folder, endpoint.url)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {endpoint.url}: HTTP 500 (out of order), in up to 2 tries.")
    assert "Run the same command again to resume." in error
    assert saved_files(tmp_path / "cut").keys() == {"miniature.answers.jsonl"}
    with serving(answer) as endpoint:  # at another address
        assert run_command(evaluate.main, arguments(tmp_path / "cut", served_folder, endpoint.url)) == 0
        assert len(endpoint.bodies) == QUESTIONS - 3
    assert saved_files(tmp_path / "cut") == saved_files(tmp_path / "whole")


def test_long_prompts_empty_and_cut_answers_of_a_server_are_counted(
    served_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = [failed(400, "the prompt has 9 tokens, more than 4"), failed(400, "the prompt has 8 tokens, more than 4"),
               said(""), said("1", "length"), said("1" * 64, "length"), *[said("#1")] * 3]  # fmt: skip
    with serving(replies) as endpoint:
        assert run_command(evaluate.main, arguments(tmp_path / "out", served_folder, endpoint.url)) == 0
    message = (
        "warning: served on miniature: of 8 answers: 2 failed (count as wrong), 1 empty, 1 cut by the context of the "
        "model. 2 failed because: the prompt has 9 tokens, more than 4. Run the"
    )
    assert message in capsys.readouterr().err
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| miniature | served | 8 | 2 | 1 | 0 | 1 | 50.0 | 2 |" in report
    assert "- miniature, served: 2 failed and count as wrong: the prompt has 9 tokens, more than 4" in report
    with serving(answer) as endpoint:
        assert run_command(evaluate.main, arguments(tmp_path / "out", served_folder, endpoint.url)) == 0
        assert len(endpoint.bodies) == 2


def test_a_run_without_stages_is_evaluated_with_a_server_and_sends_template_arguments(
    served_folder: Path, tmp_path: Path
) -> None:
    template = served_folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt and enable %}!{% endif %}")
    with serving(answer) as endpoint:
        config = {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(served_folder), "template_arguments": {"enable": True}},
            "evaluation": {
                "benchmarks": [{"name": "miniature", "questions": 2}],
                "engine": "server",
                "server": {"url": endpoint.url, "model": "tiny"},
            },
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        for command in (evaluate, train):
            assert run_command(command.main, ["--config", str(path)]) == 0
    assert [body["chat_template_kwargs"] for body in endpoint.bodies] == [{"enable": True}] * 2


@pytest.mark.parametrize("options", [[], ["--check"]], ids=["train", "check"])
def test_a_run_with_stages_is_refused_before_it_trains(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["evaluation.engine=server", "evaluation.server={url: 'http://localhost:1/v1', model: tiny}"]
    run_dir = f"run_dir={tmp_path / 'run'}"
    for command, more in ((train, options), (evaluate, [])):
        assert run_command(command.main, ["--config", QUICKSTART, *more, "--set", *keys, run_dir]) == 2
        error = capsys.readouterr().err
        assert STAGES in error
        assert f"Then serve a model of the run, such as {tmp_path / 'run'}/control/model." in error
    assert not (tmp_path / "run").exists()


def test_several_processes_cannot_ask_a_server(
    served_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("thinkpo_jax.run.resolve.is_distributed", lambda: True)
    assert run_command(evaluate.main, arguments(tmp_path / "out", served_folder, "http://localhost:1/v1")) == 2
    assert "one process asks a server, and several are running." in capsys.readouterr().err


@pytest.mark.parametrize(
    "sent", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)], ids=["kill -9", "ctrl-c"]
)
@pytest.mark.faults(Outcome.SAME)
def test_an_evaluation_with_the_local_engine_resumes_after_a_stop(sent: signal.Signals, tmp_path: Path) -> None:
    keys = ["stages=[]", "evaluation.compare=[]", "evaluation.sampling={temperature: 0.7, max_new_tokens: 40}"]
    keys += ["evaluation.benchmarks=[{name: miniature, questions: 40}]", "evaluation.local.slots=4"]
    command = ["--config", QUICKSTART, "--set", *keys]
    assert run_command(evaluate.main, [*command, f"run_dir={tmp_path / 'whole'}"]) == 0
    arguments = [*command, f"run_dir={tmp_path / 'cut'}"]
    run_interrupted("thinkpo_jax.evaluate", arguments, sent, after=17)
    (name,) = saved_files(tmp_path / "cut")
    lines = saved_files(tmp_path / "cut")[name].splitlines()
    assert (name, len(lines)) == ("miniature.answers.jsonl", 1 + 17)
    assert run_command(evaluate.main, arguments) == 0
    assert saved_files(tmp_path / "cut") == saved_files(tmp_path / "whole")


def test_answers_that_a_served_run_saved_are_not_those_of_the_local_engine(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with serving(answer) as endpoint:
        model = resolve_model_folder("builtin:miniature")
        assert run_command(evaluate.main, arguments(folder, model, endpoint.url)) == 0
    before = saved_files(folder)
    local = ["evaluation.benchmarks.0.questions=8", "evaluation.sampling.max_new_tokens=64"]
    command = ["--config", QUICKSTART, "--model", str(model), "--out", str(folder), "--set", *local]
    assert run_command(evaluate.main, command) == 0
    assert saved_files(folder) != before
