"""`train --check` shows what will be read and trained, touches no device, and says what would make a run pointless."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's shape with the byte tokenizer; it has no weights, which a check does not need."""
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    shape = {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 320, "max_position_embeddings": 512}
    shape |= {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(shape | {"architectures": ["Qwen2ForCausalLM"]}))
    return folder


def config(folder: Path, model: Path, *rows: object, objective: str = "thinkpo", **changes: Any) -> Path:
    """A run of one stage on the rows, 512 tokens a row."""
    data = folder / "rows.jsonl"
    data.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
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


def checked(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    preview_run_data(load_run_config(path))
    return capsys.readouterr().out


def problems(path: Path) -> str:
    with pytest.raises(RunError) as error:
        preview_run_data(load_run_config(path))
    return str(error.value)


def test_no_device_is_touched_and_nothing_is_written(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "thinkpo_jax.train", "--config", QUICKSTART, "--check"]
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments += ["--set", f"run_dir={tmp_path / 'run'}"]
    told = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert told.returncode == 0, told.stderr
    assert "warning" not in told.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache" / "thinkpo_jax").exists()  # generated rows are not even kept
    assert "40 updates of 16 examples on average" in told.stdout
    assert "[[8+6=4;4+5=9;9+2=1;1+3=4;4+0=4;#4<|end|>]]" in told.stdout
    assert "benchmark miniature: 900 questions, prompts of up to 9 tokens" in told.stdout


def test_it_shows_counts_lengths_packing_and_the_first_pair(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    too_long = PAIR | {"chosen": "a" * 600}
    rows = [PAIR, *({**PAIR, "prompt": f"{i}?"} for i in range(7)), too_long, b"{\n", b"[]\n"]
    shown = checked(config(tmp_path, model, *rows, on_bad_row="skip"), capsys)
    path = tmp_path / "rows.jsonl"
    reasons = "1 left out: longer than row_length 512; 1 left out: not JSON; 1 left out: not an object"
    prompt, chosen = len("[user]2+2?[assistant]"), len(LONG) + 1
    for line in (
        f"  8 of 11 rows of {path}; {reasons}\n",
        "  8 examples in an epoch\n",
        f"prompt             {prompt - 2:>8}",  # the mean; seven of eight are shorter by two characters
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
        assert line in shown, line


def test_cut_answers_have_no_end_token_and_it_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [PAIR, PAIR | {"chosen": "a" * 600}, PAIR | {"chosen": "a" * 700}, PAIR]
    shown = checked(config(tmp_path, model, *rows, over_length="cut"), capsys)
    assert "4 of 4 rows of" in shown
    assert "; 2 answers cut\n" in shown
    assert "  chosen answers with an end token: 50.0%\n" in shown
    assert "  rejected answers with an end token: 100.0%\n" in shown


def test_colours_tell_what_is_trained_where_there_is_a_terminal(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path, model, PAIR)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert f"\x1b[2m[user]2+2?[assistant]\x1b[0m\x1b[1;32m{SHORT}<end>\x1b[0m" in checked(path, capsys)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in checked(path, capsys)


def test_a_long_text_is_shown_from_both_ends(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "q", "response": "a" * 5000 + "z"}
    path = config(tmp_path, model, row, objective="sft")
    path.write_text(path.read_text().replace("512", "8192"))
    shown = checked(path, capsys)
    assert "[... 3,206 characters ...]" in shown
    assert "az<end>]]" in shown


def test_bad_rows_are_all_counted_and_then_it_fails(model: Path, tmp_path: Path) -> None:
    rows = [PAIR, b"{\n", PAIR | {"rejected": LONG}, PAIR | {"chosen": None}, b"[\n", PAIR | {"rejected": ""}]
    path = config(tmp_path, model, *rows)
    file = tmp_path / "rows.jsonl"
    assert problems(path).split("\n") == [
        f"stage only: {file}: 2 rows: not JSON. The first: {file}, line 2: not valid JSON: Expecting property name "
        "enclosed in double quotes, at character 3. Expected one object per line.",
        f"stage only: {file}: 1 rows: identical answers. The first: {file}, line 3: chosen and rejected are the same "
        "text; a pair needs two answers.",
        f"stage only: {file}: 2 rows: no text. The first: {file}, line 4, chosen: expected a text, found null.",
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [PAIR | {"chosen": "a" * 600}],
            "stage only: no example is left. Raise batch.row_length, or fix the data.",
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
    ids=["none left", "wrong way round", "never ends"],
)
def test_what_makes_a_run_pointless_is_exit_status_1(
    rows: list[object],
    said: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config(tmp_path, model, *rows)
    assert problems(path) == said
    assert run_command(main, ["--config", str(path), "--check"]) == 1
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


def test_one_pair_more_the_right_way_round_is_no_problem(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = {**PAIR, "chosen": SHORT, "rejected": LONG}
    assert "4 examples in an epoch" in checked(config(tmp_path, model, PAIR, swapped, PAIR, swapped), capsys)


def test_a_source_that_is_not_there_is_a_users_error(model: Path, tmp_path: Path) -> None:
    path = config(tmp_path, model, PAIR)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        preview_run_data(load_run_config(path))


@needs_data
def test_real_pairs_under_a_real_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (DATA / "tokenizers" / "qwen2_5").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shape = json.loads((model / "config.json").read_text()) | {"vocab_size": 152_064}
    (folder / "config.json").write_text(json.dumps(shape))
    path = config(tmp_path, folder, PAIR, prompt="question", chosen="long", rejected="short", limit=100)
    real = str(DATA / "pairs" / "math500_pairs.jsonl")
    path.write_text(path.read_text().replace(str(tmp_path / "rows.jsonl"), real).replace("512", "9472"))
    shown = checked(path, capsys)
    assert f"100 of 100 rows of {real}\n" in shown
    assert "chosen answers that open a thought and never close it: 0 of 100" in shown
    assert "[[<|begin_of_thought|>" in shown
