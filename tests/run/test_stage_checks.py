"""Tests what `train --check` and the start of training say about data that is probably not what the user wants."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from thinkpo_jax.evaluation.benchmarks import QuestionsByBenchmark
from thinkpo_jax.models.model_folder import ModelConfig
from thinkpo_jax.run.data_preview import preview_run_data
from thinkpo_jax.run.evaluate_run import load_all_questions
from thinkpo_jax.run.resolve import resolve_run
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.run.stage_data import load_stage_inputs
from thinkpo_jax.runtime.config import RunError, UserError

# The byte tokenizer renders a row of these as 2 x 20 tokens and its answers.
PAIRS: list[dict[str, Any]] = [{"prompt": f"{i:02}+2=?", "chosen": "l" * 40, "rejected": "s"} for i in range(20)]
QUESTION = "Ada has four red and nine blue marbles. She gives five of them to Bob. How many has she left?"
NO_QUESTIONS: QuestionsByBenchmark = {}


def configure(folder: Path, model: Path, records: list[dict[str, Any]], **changes: Any) -> RunConfig:
    """Returns a run with one stage on these records. The changes are of the stage, its data or the run."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"path": str(folder / "rows.jsonl")} | changes.pop("data", {})
    stage = {"name": "only", "objective": "thinkpo", "data": data, "epochs": 1, "optimizer": {"learning_rate": 1e-4}}
    stage |= {"batch": {"size": 4, "row_length": 256}}
    run: dict[str, Any] = {"run_dir": str(folder / "run"), "model": {"path": str(model), "weights": "random"}}
    run |= {"evaluation": changes.pop("evaluation")} if "evaluation" in changes else {}
    (folder / "run.yaml").write_text(json.dumps(run | {"stages": [stage | changes]}))
    return load_run_config(folder / "run.yaml")


def _read_warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Returns the warnings that were logged, without the one about the class of the byte tokenizer."""
    warnings = re.findall("^warning: (.*)$", capsys.readouterr().err, re.MULTILINE)
    return [warning for warning in warnings if "the token ids are those of tokenizer.json" not in warning]


def warnings_of(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Returns the warnings of `--check`."""
    capsys.readouterr()
    preview_run_data(config)
    return _read_warnings(capsys)


def warnings_of_training(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Returns the warnings at the start of training."""
    run = resolve_run(config)
    questions = load_all_questions(config, run.tokenizers)
    capsys.readouterr()
    load_stage_inputs(run, config.stages[0], questions)
    return _read_warnings(capsys)


def test_good_data_gives_no_warning(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "#### 8"}))
    benchmarks = [{"name": "gsm8k", "path": str(tmp_path / "gsm8k.jsonl")}]
    evaluation = {"benchmarks": benchmarks, "sampling": {"max_new_tokens": 256}}
    too_long = [{"prompt": f"{i}", "chosen": "l" * 300, "rejected": "s"} for i in range(2)]
    config = configure(tmp_path, model, [*PAIRS[:18], *too_long], data={"weight": 2.0}, evaluation=evaluation)
    assert warnings_of(config, capsys) == []
    assert warnings_of_training(config, capsys) == []
    config = configure(tmp_path, model, PAIRS[:4], epochs=None, steps=3)  # such as the quickstart
    assert warnings_of(config, capsys) == []


def test_a_warning_says_how_many_long_rows_longer_packed_rows_would_keep(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    too_long = [{"prompt": f"{i}", "chosen": "l" * n, "rejected": "s"} for i, n in enumerate((300, 600, 601, 3000))]
    config = configure(tmp_path, model, [*PAIRS, *too_long])
    expected = (
        "stage only: 4 of 24 rows are dropped, because they do not fit batch.row_length 256. Increase it: 512 keeps 1, "
        "768 keeps 3, 3072 keeps 4 of these rows."
    )
    assert warnings_of(config, capsys) == warnings_of_training(config, capsys) == [expected]
    assert warnings_of(config, capsys) == [expected]  # also from the cache


def test_a_warning_counts_rows_with_the_same_tokens(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other_prompt = PAIRS[3] | {"prompt": "else"}
    config = configure(tmp_path, model, [*PAIRS, other_prompt, PAIRS[4], PAIRS[4]], data={"weight": 1.5})
    expected = (
        f"stage only: 2 of 23 used rows repeat an earlier row token by token, such as {tmp_path / 'rows.jsonl'}: 5, 22 "
        "(counted from 1). Remove the copies. To repeat rows on purpose, set `weight`."
    )
    assert warnings_of(config, capsys) == warnings_of_training(config, capsys) == [expected]


@pytest.mark.parametrize(("rate", "is_unusual"), [(9e-9, True), (1e-8, False), (1e-2, False), (0.02, True)])
def test_a_warning_names_a_learning_rate_with_an_unusual_exponent(
    rate: float, is_unusual: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    warnings = warnings_of(configure(tmp_path, model, PAIRS, optimizer={"learning_rate": rate}), capsys)
    assert [f"stage only: optimizer.learning_rate is {rate:g}." in warning for warning in warnings] == [
        True
    ] * is_unusual


@pytest.mark.parametrize("key", ["size", "rows"])
def test_a_warning_says_that_one_batch_holds_the_whole_data_set(
    key: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (warning,) = warnings_of(configure(tmp_path, model, PAIRS, batch={key: 99, "row_length": 256}, epochs=3), capsys)
    assert warning == (
        "stage only: one batch holds all 20 examples, so an epoch is one update. The stage has 3 in total. Decrease "
        f"batch.{key} to have more updates."
    )


def test_a_warning_names_the_benchmark_whose_questions_are_in_the_training_prompts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    questions = [QUESTION, "What is the sum of all even numbers between one and one hundred?"]
    lines = [json.dumps({"question": question, "answer": "#### 8"}) for question in questions]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(lines))
    evaluation = {
        "benchmarks": [{"name": "gsm8k", "path": str(tmp_path / "gsm8k.jsonl")}],
        "sampling": {"max_new_tokens": 9},
    }
    copies = [PAIRS[0] | {"prompt": QUESTION.replace("Bob", name)} for name in ("Bob", "Eve")] * 2
    copies = [pair | {"chosen": f"{i}{pair['chosen']}"} for i, pair in enumerate(copies)]
    batch = {"size": 4, "row_length": 512}
    config = configure(
        tmp_path, model, [*PAIRS, *copies], data={"prompt_suffix": "!"}, batch=batch, evaluation=evaluation
    )
    expected = (
        "stage only: 2 of 22 training prompts share text with 1 of 2 questions of gsm8k, so its accuracy would be too "
        "high. The first: 'Ada has four red and nine blue marbles. She gives five of them to Bob. How ...'. Remove "
        "these rows, such as with `decontaminate` of the command `pairs`."
    )
    assert warnings_of(config, capsys) == warnings_of_training(config, capsys) == [expected]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("pytorch_model.bin", "the weights are pickled"), ("adapter_config.json", "holds only a LoRA adapter")],
)
def test_a_warning_names_a_folder_without_usable_weights(
    name: str, problem: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / name).write_text("{}")
    config = configure(tmp_path, folder, PAIRS)
    assert warnings_of(config, capsys) == []  # the weights are random
    pretrained = config.model_copy(update={"model": ModelConfig(path=str(folder))})
    (warning,) = warnings_of(pretrained, capsys)
    assert warning.startswith(f"{folder}: {problem}")


def test_a_warning_names_lengths_that_the_model_was_not_made_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    evaluation = {"benchmarks": [{"name": "miniature", "questions": 1}], "sampling": {"max_new_tokens": 500}}
    config = configure(tmp_path, model, PAIRS, batch={"size": 4, "row_length": 513}, evaluation=evaluation)
    rows, answers = warnings_of(config, capsys)
    limit = "the model was made for at most 512 tokens."
    assert rows.startswith(f"stages.only.batch.row_length is 513, but {limit}")
    match = re.match(
        rf"evaluation.sampling.max_new_tokens is 500 and prompts have up to (\d+), but {limit} Decrease", answers
    )
    assert match is not None
    assert answers.endswith(f"Decrease it to at most {512 - int(match[1])}.")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": 4}, "20 rows of PATH are dropped: no text. Correct them. The first: PATH, line 1, chosen: "),
        ({"chosen": "s"}, "20 rows of PATH are dropped: identical answers. Correct them. The first: PATH, line 1: "),
        ({"prompt": "q" * 300}, "20 of 20 rows are dropped, because they do not fit batch.row_length 256. Increase"),
    ],
    ids=["number", "identical", "long"],
)  # fmt: skip
def test_where_no_example_is_left_the_error_says_why_and_what_to_do(
    changes: dict[str, Any], reason: str, model: Path, tmp_path: Path
):
    config = configure(tmp_path, model, [pair | changes for pair in PAIRS], data={"on_bad_row": "skip"})
    expected = f"stage only: no example is left. {reason.replace('PATH', str(tmp_path / 'rows.jsonl'))}"
    with pytest.raises(RunError) as preview_error:
        preview_run_data(config)
    with pytest.raises(UserError) as training_error:
        load_stage_inputs(resolve_run(config), config.stages[0], NO_QUESTIONS)
    assert str(preview_error.value) == str(training_error.value)
    assert str(preview_error.value).startswith(expected)


def test_a_number_in_place_of_an_answer_gives_no_advice_about_row_length(model: Path, tmp_path: Path):
    config = configure(tmp_path, model, [PAIRS[0] | {"chosen": 4}])
    with pytest.raises(RunError) as error:
        preview_run_data(config)
    assert str(error.value).count("line 1, chosen: expected a text, found int.") == 1
    assert "row_length" not in str(error.value)
