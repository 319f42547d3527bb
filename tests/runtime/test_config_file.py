"""A configuration that extends another one is read as if its values stood in one file, and errors name the files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkpo_jax import evaluate, pairs, plan, train
from thinkpo_jax.run.run_config import load_run_config
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.config_file import _merge, read_config

BASE = """\
run_dir: runs/base
seed: 3
model: {path: m, template_arguments: {a: 1, b: 2}}
stages:
  - name: sft
    objective: sft
    data: {path: a.jsonl, response: long}
    batch: {size: 2, row_length: 16}
    steps: 3
    optimizer: {learning_rate: 1e-5, schedule: linear}
  - name: thinkpo
    objective: thinkpo
    data: [{path: b.jsonl}, {path: c.jsonl}]
    batch: {size: 4, row_length: 32}
    epochs: 1
    optimizer: {learning_rate: 1e-6}
evaluation:
  benchmarks: [{name: gsm8k, questions: 10}, {name: math500}]
  compare: [[base, thinkpo], [sft, thinkpo]]
"""


def write(folder: Path, **texts: str) -> Path:
    """Writes NAME.yaml for each text. Returns the path of the first one."""
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(texts))}.yaml"


def extended(folder: Path, text: str) -> dict[str, Any]:
    return read_config(write(folder, mine=f"extends: base.yaml\n{text}", base=BASE)).values


def error(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read_config(path)
    return str(raised.value)


def test_a_file_that_only_extends_has_the_values_of_its_base(tmp_path: Path) -> None:
    values = extended(tmp_path, "")
    assert values == read_config(tmp_path / "base.yaml").values
    assert "extends" not in values


def test_mappings_merge_key_by_key_at_any_depth(tmp_path: Path) -> None:
    values = extended(tmp_path, "run_dir: runs/mine\nmodel: {template_arguments: {b: 5, c: 6}}\nmesh: {fsdp: 2}\n")
    assert (values["run_dir"], values["seed"], values["mesh"]) == ("runs/mine", 3, {"fsdp": 2})
    assert values["model"] == {"path": "m", "template_arguments": {"a": 1, "b": 5, "c": 6}}


def test_stages_merge_by_name_in_the_order_of_the_base(tmp_path: Path) -> None:
    changes = "[{name: control, steps: 7}, {name: thinkpo, batch: {size: 8}}, {name: sft, optimizer: {b1: 0.5}}]"
    sft, thinkpo, control = extended(tmp_path, f"stages: {changes}\n")["stages"]
    assert sft["optimizer"] == {"learning_rate": 1e-5, "schedule": "linear", "b1": 0.5}
    assert thinkpo["batch"] == {"size": 8, "row_length": 32}
    assert (sft["steps"], thinkpo["epochs"]) == (3, 1)
    assert control == {"name": "control", "steps": 7}


def test_a_stage_of_the_base_can_be_removed(tmp_path: Path) -> None:
    (thinkpo,) = extended(tmp_path, "stages: [{name: sft, remove: true}]\n")["stages"]
    assert thinkpo["name"] == "thinkpo"


def test_other_lists_and_values_of_another_type_replace(tmp_path: Path) -> None:
    text = "evaluation: {benchmarks: [{name: gsm8k}], compare: [[base, sft]]}\n"
    text += "stages: [{name: thinkpo, data: {path: d.jsonl}}, {name: sft, optimizer: null}]\nmodel: other\n"
    values = extended(tmp_path, text)
    assert values["evaluation"] == {"benchmarks": [{"name": "gsm8k"}], "compare": [["base", "sft"]]}
    assert values["stages"][1]["data"] == {"path": "d.jsonl"}
    assert values["stages"][0]["optimizer"] is None
    assert values["model"] == "other"


def test_set_applies_to_the_merged_values(tmp_path: Path) -> None:
    path = write(tmp_path, mine="extends: base.yaml\nseed: 4\n", base=BASE)
    config = load_run_config(path, ["seed=5", "stages.thinkpo.batch.size=9"])
    assert (config.seed, config.stages[1].batch.size, config.stages[1].batch.row_length) == (5, 9, 32)


def test_a_chain_of_files_has_paths_relative_to_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "family").mkdir()
    write(tmp_path, base=BASE)
    write(tmp_path / "family", middle="extends: ../base.yaml\nseed: 4\nrun_dir: runs/middle\n")
    monkeypatch.setenv("FAMILY", "family")
    path = write(tmp_path, mine="extends: ${FAMILY}/middle.yaml\nseed: 5\n")
    values, source = read_config(path)
    assert (values["seed"], values["run_dir"], values["model"]["path"]) == (5, "runs/middle", "m")
    family = tmp_path / "family"
    assert source == f"{path} (extends {family / 'middle.yaml'}, {family / '../base.yaml'})"


# `a` and `b` hold plain values, `c` and `d` hold mappings.
VALUES = st.integers() | st.none() | st.lists(st.integers(), max_size=2)
MAPPINGS = st.deferred(
    lambda: st.fixed_dictionaries({}, optional={"a": VALUES, "b": VALUES, "c": MAPPINGS, "d": MAPPINGS})
)


@given(MAPPINGS, MAPPINGS, MAPPINGS)
def test_a_chain_of_mappings_may_be_merged_in_any_grouping(first: Any, second: Any, third: Any) -> None:
    assert _merge(first, first) == first
    assert _merge(first, {}) == _merge({}, first) == first
    assert _merge(_merge(first, second), third) == _merge(first, _merge(second, third))


# Errors.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone.yaml", "extends is 'gone.yaml', but there is no file {folder}/gone.yaml. Give a path relative to the"),
        ("other", "extends is 'other', but there is no file {folder}/other."),
        ("[a.yaml, b.yaml]", "extends: expected the path of one YAML file (found ['a.yaml', 'b.yaml'])."),
        ("3", "extends: expected the path of one YAML file (found 3)."),
        ("", "extends: expected the path of one YAML file (found None)."),
        ("''", "extends: expected a path or a name, found an empty text."),
        ("$UNSET_NAME/a.yaml", "extends: the environment variable UNSET_NAME is not set."),
        ("mine.yaml", "{folder}/mine.yaml extends {folder}/mine.yaml, which is a cycle."),
    ],
)
def test_a_base_that_cannot_be_read_is_an_error_of_the_file_that_names_it(
    value: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    path = write(tmp_path, mine=f"extends: {value}\n")
    assert error(path).startswith(f"{path}: {message.format(folder=tmp_path)}")


def test_a_cycle_is_an_error_that_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    path, c = write(tmp_path, a="extends: b.yaml\n", b="extends: more/c.yaml\n"), tmp_path / "more" / "c.yaml"
    c.write_text("extends: ../b.yaml\n", encoding="utf-8")
    files = f"{path} extends {tmp_path / 'b.yaml'} extends {c} extends {tmp_path / 'more' / '../b.yaml'}"
    assert error(path).startswith(f"{c}: {files}, which is a cycle.")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{name: stf, remove: true}]", "no stage 'stf' to remove (did you mean sft?). The stages of its base are: ['"),
        ("[{name: sft, steps: 2}, {name: sft, seed: 3}]", "the name 'sft' is given twice."),
        ("[{name: new}, {name: new}]", "the name 'new' is given twice."),
    ],
)
def test_stages_that_cannot_be_merged_are_an_error(stages: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, mine=f"extends: base.yaml\nstages: {stages}\n", base=BASE)
    text = error(path)
    assert text.startswith(f"{path}: stages: ")
    assert message in text


def test_malformed_yaml_in_a_base_is_an_error_of_the_base(tmp_path: Path) -> None:
    path = write(tmp_path, mine="extends: base.yaml\n", base="a: [b\n")
    assert error(path).startswith(f"{tmp_path / 'base.yaml'}: not valid YAML: ")


def test_an_invalid_value_is_reported_with_the_chain_of_files(tmp_path: Path) -> None:
    changes = "extends: base.yaml\nstages: [{name: sft, steps: many, remove: true}, {steps: 3}]\n"
    path = write(tmp_path, mine=changes, base=BASE)
    with pytest.raises(UserError) as raised:
        load_run_config(path, ["stages.thinkpo.batch.size=no"])
    source = f"{path} (extends {tmp_path / 'base.yaml'})"
    lines = str(raised.value).split("\n")
    assert f"{source}: stages.sft.steps: Input should be a valid integer (found 'many')." in lines
    assert f"{source}: stages.2.objective is required and not given." in lines
    assert any(line.startswith(f"{source}: unknown key stages.sft.remove") for line in lines)
    override = f"{source} with --set stages.thinkpo.batch.size=no: "
    assert any(line.startswith(f"{override}stages.thinkpo.batch.size: Input should be") for line in lines)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(train.main, []), (evaluate.main, []), (plan.main, ["--topology", "v5e:2x2"]), (pairs.main, [])],
    ids=["train", "evaluate", "plan", "pairs"],
)
def test_every_command_reads_a_configuration_that_extends(
    command: Callable[[Sequence[str]], None],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, mine="extends: base.yaml\nsead: 1\n", base=BASE)
    assert run_command(command, ["--config", str(path), *arguments]) == 2
    message = capsys.readouterr().err
    assert f"{path} (extends {tmp_path / 'base.yaml'}): unknown key sead (did you mean seed?)." in message
