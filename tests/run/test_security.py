"""An evaluation with a server writes no key and no password into its output or any of its files."""

import shutil
from pathlib import Path

import pytest
from support.faults import Outcome
from support.quickstart import QUICKSTART
from support.server import Reply, failed, fast_retries, said, serving  # noqa: F401

from thinkpo_jax import evaluate
from thinkpo_jax.models.model_folder import ModelSource, resolve_model_folder
from thinkpo_jax.runtime.cli import run_command

pytestmark = pytest.mark.usefixtures("fast_retries")
KEY = "sk-planted-0123456789"
LIMITS = ("--benchmark", "miniature", "--limit", "4")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder without weights. Loading a model is an error."""
    folder = tmp_path / "served"
    shutil.copytree(resolve_model_folder("builtin:miniature"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.delattr(ModelSource, "load")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return folder


def _arguments(model: Path, out: Path, url: str) -> list[str]:
    keys = ["engine=server", f"server.url={url}", "server.model=tiny", "server.retries=0", "benchmarks.0.questions=4"]
    assignments = [f"evaluation.{key}" for key in (*keys, "sampling.max_new_tokens=64")]
    return ["--config", QUICKSTART, "--model", str(model), "--out", str(out), "--set", *assignments]


def _echo(number: int, _: dict) -> Reply:
    """Repeats the key in every kind of response that does not end an evaluation."""
    return (said("#4"), said(f"#4 {KEY}"), failed(400, f"bad key {KEY}"), said("#4", reasoning_content=KEY))[number % 4]


@pytest.mark.parametrize("last", [None, failed(401, f"Incorrect key {KEY}")])
def test_a_planted_key_is_nowhere_in_the_output(
    last: Reply | None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(_echo if last is None else last) as endpoint:
        status = run_command(evaluate.main, _arguments(model, tmp_path / "out", endpoint.url))
        assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert status == (0 if last is None else 2)
    output = capsys.readouterr()
    assert KEY not in output.out + output.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml"} | ({"report.md", "miniature.answers.jsonl"} if last is None else set()) <= {
        f.name for f in files
    }
    assert [file for file in files if KEY.encode() in file.read_bytes() or KEY in file.name] == []


URLS = ("http://user:hunter2@127.0.0.1:1/v1", "http://127.0.0.1:1/v1?api_key=hunter2", "user:hunter2@127.0.0.1:1/v1")


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("way", ["--set", "--model", "--against"])
@pytest.mark.faults(Outcome.REFUSED)
def test_a_password_in_a_url_is_refused_and_not_repeated(
    way: str, url: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = f"server:tiny@{url}"
    arguments = {
        "--set": _arguments(model, tmp_path / "out", url),
        "--model": ["--model", spec, *LIMITS],
        "--against": ["--model", "builtin:miniature", "--against", spec, *LIMITS],
    }[way]
    assert run_command(evaluate.main, arguments) == 2
    output = capsys.readouterr()
    assert "url: expected a base URL such as http://localhost:8000/v1, without a user name" in output.err
    assert "Put a key into the environment variable that `api_key_variable` names" in output.err
    assert "hunter2" not in output.out + output.err
    assert {path.name for path in tmp_path.iterdir()} == {"served"}
