"""The command `evaluate` needs no configuration, and compares models of any kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.model_folders import edit_json
from support.quickstart import QUICKSTART
from support.server import Reply, fast_retries, said, serving  # noqa: F401

from thinkpo_jax import evaluate
from thinkpo_jax.models.model_folder import ModelSource, resolve_model_folder
from thinkpo_jax.run.evaluated_models import find_model
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.manifest import write_manifest

pytestmark = pytest.mark.usefixtures("fast_retries")
LIMITS = ("--benchmark", "miniature", "--limit", "8", "--max-new-tokens", "24")
FLOAT32 = ("--set", "compute.dtype=float32")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder whose stage `sft` is finished. Its model is the miniature, and `thinkpo` is not trained."""
    folder = tmp_path / "mine"
    model = Path(shutil.copytree(resolve_model_folder("builtin:miniature"), folder / "sft" / "model"))
    write_manifest(model, [path for path in model.iterdir() if path.is_file()])
    shutil.copy(QUICKSTART, folder / "config.yaml")
    return folder


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_two_models_are_compared_without_a_configuration(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    models = ["--model", f"{run_folder}:sft", "--against", "builtin:miniature"]
    arguments = [*models, *LIMITS, "--samples", "2", "--out", str(out), *FLOAT32]
    assert run_command(evaluate.main, arguments) == 0
    report = report_of(out)
    assert list(report["models"]) == ["mine-sft", "builtin-miniature"]
    scores = [by_benchmark["miniature"] for by_benchmark in report["models"].values()]
    assert scores[0] == scores[1]  # the same weights, seed and questions
    assert (scores[0]["num_questions"], scores[0]["num_samples"]) == (8, 16)
    (comparison,) = report["comparisons"]
    assert (comparison["from"], comparison["to"]) == ("builtin-miniature", "mine-sft")
    assert report["settings"]["sampling"].startswith("temperature 0.6, top-p 0.95, at most 24 new tokens, 2 sample(s)")
    saved = {path.relative_to(out): path.read_bytes() for path in (out / "evaluation").rglob("*") if path.is_file()}
    assert run_command(evaluate.main, ["--config", str(out / "config.yaml")]) == 0  # the written configuration
    assert {path: (out / path).read_bytes() for path in saved} == saved


def test_saved_answers_are_graded_again_without_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = shutil.copytree(resolve_model_folder("builtin:miniature"), tmp_path / "model"), tmp_path / "out"
    assert run_command(evaluate.main, ["--model", str(model), *LIMITS, "--out", str(out), *FLOAT32]) == 0
    report, printed = report_of(out), capsys.readouterr().out
    shutil.rmtree(model)
    (out / "report.md").unlink()
    monkeypatch.delattr(ModelSource, "load")
    assert run_command(evaluate.main, ["--rescore", str(out)]) == 0
    assert report_of(out) == report
    assert capsys.readouterr().out == printed
    assert (out / "report.md").exists()


def test_two_models_do_not_share_the_default_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        shutil.copytree(resolve_model_folder("builtin:miniature"), tmp_path / folder / "tiny")
    for folder, status in (("a", 0), ("a", 0), ("b", 2)):
        assert run_command(evaluate.main, ["--model", f"{folder}/tiny", *LIMITS, *FLOAT32]) == status
    assert "evaluations/tiny holds the evaluation of another model. Choose another" in capsys.readouterr().err
    (tmp_path / "evaluations/tiny/evaluation/tiny/miniature.json").unlink()
    assert run_command(evaluate.main, ["--rescore", "evaluations/tiny"]) == 2
    assert "there are no verdicts. Finish the evaluation first." in capsys.readouterr().err


def test_a_server_and_a_folder_are_compared(tmp_path: Path) -> None:
    def answer(_: int, body: dict[str, Any]) -> Reply:
        return said(f"#{sum(map(int, body['messages'][-1]['content'][:6])) % 10}")

    model = shutil.copytree(resolve_model_folder("builtin:miniature"), tmp_path / "model")
    for first, second in (("server", "folder"), ("folder", "server")):
        with serving(answer) as endpoint:
            specs = {"server": f"server:{model}@{endpoint.url}", "folder": "builtin:miniature"}
            out = tmp_path / first
            models = ["--model", specs[first], "--against", specs[second]]
            assert run_command(evaluate.main, [*models, *LIMITS, "--out", str(out), *FLOAT32]) == 0
            assert len(endpoint.bodies) == 8
        scores = report_of(out)["models"]
        assert scores["model"]["miniature"]["accuracy"] == 1 > scores["builtin-miniature"]["miniature"]["accuracy"]


def test_a_benchmark_of_the_user_needs_no_code(tmp_path: Path) -> None:
    path, model = tmp_path / "mine.jsonl", byte_tokenizer(tmp_path / "model")
    shutil.copy(resolve_model_folder("builtin:miniature") / "config.json", model)
    edit_json(model / "config.json", vocab_size=512, max_position_embeddings=4096)
    path.write_text('{"question": "Half?", "answer": "\\\\frac{1}{2}"}\n{"question": "Two?", "answer": 2}\n')
    with serving([said(r"\boxed{0.5}"), said(r"\boxed{0.5}")]) as endpoint:
        options = ["--benchmark", f"mine={path}", "--max-new-tokens", "8", "--out", str(tmp_path / "out")]
        assert run_command(evaluate.main, ["--model", f"server:{model}@{endpoint.url}", *options]) == 0
    score = report_of(tmp_path / "out")["models"]["model"]["mine"]
    assert (score["num_questions"], score["accuracy"]) == (2, 0.5)


def test_the_paper_protocol_gives_all_models_the_same_system_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, out = tmp_path / "prompt.txt", tmp_path / "out"
    prompt.write_text("1234\n", encoding="utf-8")
    model = shutil.copytree(resolve_model_folder("builtin:miniature"), tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    arguments = ["--model", str(model), *LIMITS, "--protocol", "paper", "--out", str(out), *FLOAT32]
    assert run_command(evaluate.main, arguments) == 2
    assert "uses the system prompt of the training pairs. Set evaluation.system_prompt to" in capsys.readouterr().err
    assert run_command(evaluate.main, [*arguments, f"evaluation.system_prompt={prompt}"]) == 0
    assert report_of(out)["settings"]["sampling"].startswith("temperature 0.7, top-p 1.0,")
    first = json.loads((out / "evaluation" / "model" / "miniature.answers.jsonl").read_text().splitlines()[0])
    assert first["system"] == "1234"


def test_a_model_that_cannot_read_the_questions_is_refused_before_any_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"question": "Half?", "answer": 2}\n', encoding="utf-8")
    model = byte_tokenizer(tmp_path / "model")
    shutil.copy(resolve_model_folder("builtin:miniature") / "config.json", model)
    edit_json(model / "config.json", vocab_size=512, max_position_embeddings=4096)
    models = ["--model", f"server:{model}@http://localhost:1/v1", "--against", "builtin:miniature"]
    arguments = [*models, "--benchmark", f"mine={rows}", "--out", str(tmp_path / "out")]
    assert run_command(evaluate.main, arguments) == 2
    assert "model builtin-miniature on mine: the tokenizer cannot write the prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


WRONG = {
    "nothing": ([], "give --model MODEL, --config FILE, --pool RUN RUN ... or --rescore DIR"),
    "no benchmark": (["--model", "builtin:miniature"], "no benchmark is given. Name some with --benchmark"),
    "unknown benchmark": (["--model", "builtin:miniature", "--benchmark", "gsm"], "no benchmark 'gsm'"),
    "limit 0": (["--model", "builtin:miniature", "--benchmark", "gsm8k", "--limit", "0"], "questions: "),
    "no model": (["--benchmark", "gsm8k"], "give --model"),
    "against without model": (["--config", QUICKSTART, "--against", "x"], "--against needs --model"),
    "pool with more": (["--pool", "a", "--limit", "3"], "cannot be combined with other options"),
    "rescore nothing": (["--rescore", "nowhere"], "--rescore nowhere/config.yaml: there is no such file"),
    "no such folder": (["--model", "./nowhere", *LIMITS], "model.path: ./nowhere: there is no such folder"),
    "no such other": (["--model", "builtin:miniature", "--against", "./no", *LIMITS], "evaluation.against.no: model"),
    "bad server": (
        ["--model", "server:tiny@nowhere", *LIMITS],
        "server:tiny@nowhere (server:MODEL@URL): url: expected",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused_before_anything_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    try:
        status = run_command(evaluate.main, arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_folder_gives_its_last_finished_model(run_folder: Path, tmp_path: Path) -> None:
    sft = str(run_folder / "sft" / "model")
    assert [find_model(f"{run_folder}{name}")["path"] for name in ("", ":sft", ":base")] == [
        sft,
        sft,
        "builtin:miniature",
    ]
    assert find_model(sft) == {"path": sft}
    assert find_model("owner/name") == {"path": "owner/name"}
    assert find_model("builtin:miniature") == {"path": "builtin:miniature"}
    with pytest.raises(UserError, match=r"no finished model 'thinkpo'. It has: \['base', 'sft'\]"):
        find_model(f"{run_folder}:thinkpo")
    with pytest.raises(UserError, match=r"is not a run folder, because it has no config\.yaml"):
        find_model(f"{tmp_path}:sft")
    shutil.rmtree(run_folder / "sft")
    with pytest.raises(UserError, match="no stage of the run is finished"):
        find_model(str(run_folder))
