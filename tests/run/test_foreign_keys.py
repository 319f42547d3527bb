"""Unknown keys of a run are answered with our key, and errors name the stage and the override that caused them."""

import re
from pathlib import Path

import pytest

from thinkpo_jax.run.foreign_keys import FOREIGN_KEYS
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.config import UserError, _known_keys
from thinkpo_jax.training.stage_config import SftStage, ThinkpoStage

TEXT = """\
run_dir: runs/x
model: {path: m}
stages:
  - name: sft
    objective: sft
    data: {path: a}
    batch: {size: 2, row_length: 16}
    steps: 3
    optimizer: {learning_rate: 1}
"""


def problem(tmp_path: Path, *assignments: str) -> str:
    """Returns the error of a configuration, without the path of the file."""
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    with pytest.raises(UserError) as error:
        load_run_config(path, assignments)
    return str(error.value).removeprefix(str(path))


def exists(dotted: str) -> bool:
    keys = dotted.split(".")
    if keys[:2] == ["stages", "NAME"]:
        found = [_known_keys(stage, tuple(keys[2:-1])) for stage in (SftStage, ThinkpoStage)]
        return keys[-1] in set().union(*found)
    return keys[-1] in _known_keys(RunConfig, tuple(keys[:-1]))


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_the_answer_to_a_foreign_key_names_keys_that_exist(key: str) -> None:
    answer = FOREIGN_KEYS[key]
    dotted = re.findall(r"`((?:stages\.NAME|[a-z_]+)(?:\.[a-z_0-9]+)*)`", answer)
    assert all(exists(each) for each in dotted if each not in ("share", "every", "fsdp")), dotted
    assert dotted or "Leave it out" in answer
    assert not exists(key)
    assert "." in key or not exists(f"stages.NAME.{key}")


def test_every_key_of_the_table_is_checked_for_what_it_names() -> None:
    assert exists("stages.NAME.batch.size")
    assert not exists("stages.NAME.batch.sizes")
    assert not exists("rundir")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.sft.max_steps=3", "Use `stages.sft.steps`, the updates of the stage."),
        ("max_steps=3", "Use `stages.NAME.steps`, the updates of the stage."),
        ("stages.sft.batch.gradient_accumulation_steps=3", "`stages.sft.batch.rows_per_device` to compute them in"),
        ("report_to=wandb", "Nothing is sent to a service."),
        ("learning_rate=1", "The key is stages.NAME.optimizer.learning_rate."),
        ("stages.sft.learning_rate=1", "The key is stages.sft.optimizer.learning_rate."),
        ("stages.sft.weight_decay=1", "The key is stages.sft.optimizer.weight_decay."),
        ("stages.sft.seed=1", "The key is seed."),
        ("gradient_checkpoints=1", "Keys here: base_name, compute, evaluation, "),
    ],
)
def test_an_unknown_key_is_answered_with_the_key_to_use(assignment: str, message: str, tmp_path: Path) -> None:
    key = assignment.partition("=")[0]
    text = problem(tmp_path, assignment)
    assert text.startswith(f" with --set {assignment}: unknown key {key}. ")
    assert message in text


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["seed=1", "stages.0.steps=x"], " with --set stages.0.steps=x: stages.sft.steps: "),
        (["stages.sft.steps=x", "stages.sft.steps=y"], " with --set stages.sft.steps=y: stages.sft.steps: "),
        (["seed=1", "stages.sft.epochs=2"], " with --set stages.sft.epochs=2: stages.sft: give either `steps` or "),
        (["stages.sft.batch={size: 2}"], " with --set stages.sft.batch={size: 2}: stages.sft.batch.row_length is req"),
        (
            ["seed=1", "run_dir=null"],
            " with --set run_dir=null: run_dir: expected a text (found None). YAML reads `~` and",
        ),
        (["title=no"], " with --set title=no: title: expected a text (found False). YAML reads no, off and false so."),
        (["title=[a]"], " with --set title=[a]: title: expected a text. Put the text in quotes."),
        (["title=1_000"], " with --set title=1_000: title: expected a text (found 1000). Put the text in quotes."),
        (
            ["stages.sft.name=my stage"],
            ": stages.my stage.name: expected a name of letters a to z, digits, "
            "`_`, `-` and `.`, which starts with a letter or a digit (found 'my stage').",
        ),
        (
            ["stages.sft.data={generate: {questions: 3, marks: '?x'}}"],
            " with --set stages.sft.data={generate: {questions: 3, marks: '?x'}}: stages.sft.data.generate.marks: "
            "expected one or more of the marks `?`, `!` and `.` (found '?x').",
        ),
        (
            ["stages.sft.start=base", "stages.sft.init_from=base"],
            " with --set stages.sft.start=base stages.sft.init_from=base: stages.sft: `start` is the old name of "
            "`init_from`. Give `init_from` only.",
        ),
    ],
)
def test_an_error_names_the_stage_and_the_override(assignments: list[str], expected: str, tmp_path: Path) -> None:
    assert problem(tmp_path, "title=t", *assignments).startswith(expected)


def test_an_error_of_the_file_names_no_override(tmp_path: Path) -> None:
    text = problem(tmp_path, "stages.sft.steps=x", "sead=1")
    assert text.count("--set") == 2
    (tmp_path / "run.yaml").write_text(TEXT.replace("size: 2", "size: 0"))
    with pytest.raises(UserError, match=r"run\.yaml: stages\.sft\.batch\.size: "):
        load_run_config(tmp_path / "run.yaml", ["seed=1"])


def test_an_old_key_is_answered_with_the_new_one(tmp_path: Path) -> None:
    text = problem(tmp_path, "evaluation.benchmarks=[{name: miniature}]", "evaluation.sampling.batch_size=8")
    assert text == (
        " with --set evaluation.sampling.batch_size=8: unknown key evaluation.sampling.batch_size. Use "
        "`evaluation.local.slots`, the answers that are generated at the same time."
    )
