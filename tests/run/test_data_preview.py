"""Tests `train --check`: its preview of the data, and the problems that it finds before training."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import needs_data
from support.paths import DATA, ROOT

from thinkpo_jax.run.data_preview import preview_run_data
from thinkpo_jax.run.run_config import load_run_config
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.train import main

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
LONG, SHORT = "<think>\n" + "t" * 60 + "\n</think>\n\n4", "4"
PAIR = {"prompt": "2+2?", "chosen": LONG, "rejected": SHORT}


def write_config(folder: Path, model: Path, *records: object, objective: str = "thinkpo", **changes: Any) -> Path:
    """Writes the configuration of a run with one stage on these records, and returns its path. row_length is 512."""
    data = folder / "rows.jsonl"
    data.write_bytes(
        b"".join(record if isinstance(record, bytes) else json.dumps(record).encode() + b"\n" for record in records)
    )
    stage = {
        "name": "only",
        "objective": objective,
        "data": {"path": str(data)} | changes,
        "batch": {"size": 4, "row_length": 512},
        "epochs": 1,
        "optimizer": {"learning_rate": 1e-4},
    }
    run = {"run_dir": str(folder / "run"), "model": {"path": str(model)}, "stages": [stage]}
    (folder / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    return folder / "run.yaml"


def preview(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    preview_run_data(load_run_config(path))
    return capsys.readouterr().out


def preview_error(path: Path) -> str:
    with pytest.raises(RunError) as error:
        preview_run_data(load_run_config(path))
    return str(error.value)


def test_the_check_uses_no_device_and_writes_nothing(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "thinkpo_jax.train", "--config", QUICKSTART, "--check"]
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments += ["--set", f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache" / "thinkpo_jax").exists()  # generated records are not cached either
    assert "40 updates of 16 examples on average" in result.stdout
    assert "[[8+6=4;4+5=9;9+2=1;1+3=4;4+0=4;#4<|end|>]]" in result.stdout
    assert "benchmark miniature: 900 questions, prompts of up to 9 tokens" in result.stdout


def test_the_preview_shows_counts_lengths_packing_and_the_first_pair(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    too_long = PAIR | {"chosen": "a" * 600}
    records = [PAIR, *({**PAIR, "prompt": f"{i}?"} for i in range(7)), too_long, b"{\n", b"[]\n"]
    output = preview(write_config(tmp_path, model, *records, on_bad_row="skip"), capsys)
    path = tmp_path / "rows.jsonl"
    reasons = "1 left out: longer than row_length 512; 1 left out: not JSON; 1 left out: not an object"
    prompt, chosen = len("[user]2+2?[assistant]"), len(LONG) + 1
    for line in (
        f"  8 of 11 rows of {path}; {reasons}\n",
        "  8 examples in an epoch\n",
        f"prompt             {prompt - 2:>8}",  # the mean, because seven of eight prompts are shorter by two characters
        f"chosen             {chosen:>8} {chosen:>8}",
        f"rejected           {2:>8} {2:>8}",
        "  chosen answers with an end token: 100.0%\n",
        "  rejected answers with an end token: 100.0%\n",
        "  chosen answers that open a thought and never close it: 0 of 8\n",
        "  on one device: 2 updates of 4 examples on average",
        "packing: ",
        f"[user]2+2?[assistant][[{LONG.split(chr(10))[0]}\n",
        f"[user]2+2?[assistant][[{SHORT}<end>]]\n",
        "chat template: keeps the thinking",
        "row_length: 512",
    ):
        assert line in output, line


def test_the_preview_counts_cut_answers_without_an_end_token(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [PAIR, PAIR | {"chosen": "a" * 600}, PAIR | {"chosen": "a" * 700}, PAIR]
    output = preview(write_config(tmp_path, model, *records, over_length="cut"), capsys)
    assert "4 of 4 rows of" in output
    assert "; 2 answers cut\n" in output
    assert "  chosen answers with an end token: 50.0%\n" in output
    assert "  rejected answers with an end token: 100.0%\n" in output


def test_colors_mark_the_trained_tokens_on_a_terminal(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, model, PAIR)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert f"\x1b[2m[user]2+2?[assistant]\x1b[0m\x1b[1;32m{SHORT}<end>\x1b[0m" in preview(path, capsys)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in preview(path, capsys)


def test_the_preview_shows_both_ends_of_a_long_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"prompt": "q", "response": "a" * 5000 + "z"}
    path = write_config(tmp_path, model, record, objective="sft")
    path.write_text(path.read_text().replace("512", "8192"))
    output = preview(path, capsys)
    assert "[... 3,206 characters ...]" in output
    assert "az<end>]]" in output


def test_the_check_counts_all_bad_rows_before_it_fails(model: Path, tmp_path: Path) -> None:
    records = [PAIR, b"{\n", PAIR | {"rejected": LONG}, PAIR | {"chosen": None}, b"[\n", PAIR | {"rejected": ""}]
    path = write_config(tmp_path, model, *records)
    file = tmp_path / "rows.jsonl"
    assert preview_error(path).split("\n") == [
        f"stage only: {file}: 2 rows: not JSON. The first: {file}, line 2: not valid JSON: Expecting property name "
        "enclosed in double quotes, at character 3. Expected one object per line.",
        f"stage only: {file}: 1 rows: identical answers. The first: {file}, line 3: chosen and rejected are the same "
        "text, but a pair needs two answers. Change one of them or remove the row.",
        f"stage only: {file}: 2 rows: no text. The first: {file}, line 4, chosen: expected a text, found null.",
    ]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [PAIR | {"chosen": "a" * 600}],
            "stage only: no example is left. 1 of 1 rows are dropped, because they do not fit batch.row_length 512. "
            "Increase it: 768 keeps 1 of these rows.",
        ),
        (
            [{**PAIR, "chosen": SHORT, "rejected": LONG}] * 2 + [PAIR],
            "stage only: chosen is shorter than rejected in 2 of 3 pairs, but ThinkPO prefers the long "
            "answer. Swap `chosen` and `rejected`, unless this is the control with swapped pairs.",
        ),
        (
            [PAIR | {"chosen": LONG[:30]}] * 2 + [PAIR],
            "stage only: 2 of 3 chosen answers open a thought and never close it. The model would learn not to stop. "
            "Remove answers that were cut off.",
        ),
    ],
    ids=["no examples", "swapped pairs", "unclosed thoughts"],
)
def test_useless_training_data_is_an_error_with_exit_status_1(
    records: list[object],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path, model, *records)
    assert preview_error(path) == message
    assert run_command(main, ["--config", str(path), "--check"]) == 1
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_half_of_the_pairs_may_be_swapped(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = {**PAIR, "chosen": SHORT, "rejected": LONG}
    assert "4 examples in an epoch" in preview(write_config(tmp_path, model, PAIR, swapped, PAIR, swapped), capsys)


def test_a_missing_data_file_is_a_user_error(model: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, model, PAIR)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        preview_run_data(load_run_config(path))


@needs_data
def test_the_preview_of_real_pairs_with_a_real_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (DATA / "tokenizers" / "qwen2_5").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shape = json.loads((model / "config.json").read_text()) | {"vocab_size": 152_064}
    (folder / "config.json").write_text(json.dumps(shape))
    path = write_config(tmp_path, folder, PAIR, prompt="question", chosen="long", rejected="short", limit=100)
    pairs_path = str(DATA / "pairs" / "math500_pairs.jsonl")
    path.write_text(path.read_text().replace(str(tmp_path / "rows.jsonl"), pairs_path).replace("512", "9472"))
    output = preview(path, capsys)
    assert f"100 of 100 rows of {pairs_path}\n" in output
    assert "chosen answers that open a thought and never close it: 0 of 100" in output
    assert "[[<|begin_of_thought|>" in output
