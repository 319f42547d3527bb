"""A configuration is read exactly as written. Nothing is guessed or dropped, and every error names its key."""

import re
from pathlib import Path

import pydantic
import pytest

from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.yaml_text import apply_overrides
from thinkpo_jax.training.stage_config import SftStage, ThinkpoStage

TEXT = """\
run_dir: runs/x
model: {path: m}
stages:
  - name: sft
    objective: sft
    data: {path: a.jsonl}
    batch: {size: 2, row_length: 16}
    steps: 3
    optimizer: {learning_rate: 1e-5}
  - name: thinkpo
    objective: thinkpo
    data: {path: b.jsonl}
    batch: {size: 4, row_length: 32}
    epochs: 1
    optimizer: {learning_rate: 1e-6}
evaluation:
  benchmarks: [{name: gsm8k}]
  compare: [[base, thinkpo]]
"""


def load(tmp_path: Path, text: str = TEXT, *assignments: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run_config(path, assignments)


def problems(tmp_path: Path, text: str = TEXT, *assignments: str) -> list[str]:
    """Returns the lines of the error. Each must start with the path of the file and the override, which are removed."""
    with pytest.raises(UserError) as error:
        load(tmp_path, text, *assignments)
    lines = str(error.value).split("\n")
    source = f"{tmp_path / 'run.yaml'}" + (f" with --set {assignments[0]}" if assignments else "") + ": "
    assert all(line.startswith(source) for line in lines)
    return [line.removeprefix(source) for line in lines]


def edited(old: str, new: str, *, count: int = 1) -> str:
    assert TEXT.count(old) == count
    return TEXT.replace(old, new)


def test_a_file_becomes_typed_sections(tmp_path: Path):
    config = load(tmp_path)
    sft, thinkpo = config.stages
    assert isinstance(sft, SftStage)
    assert isinstance(thinkpo, ThinkpoStage)
    assert (sft.steps, sft.epochs, thinkpo.steps, thinkpo.epochs) == (3, None, None, 1.0)
    assert thinkpo.batch.row_length == 32
    assert config.evaluation is not None
    assert config.evaluation.compare == (("base", "thinkpo"),)


# Unknown keys.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("run_dir", "rundir", "unknown key rundir (did you mean run_dir?)."),
        ("run_dir: runs/x", "run_dir: runs/x\nsteps: 3", "unknown key steps. The key is stages.NAME.steps."),
        ("model: {path", "model: {weight: random, path", "unknown key model.weight (did you mean weights?)."),
        ("{size: 2", "{sise: 2", "unknown key stages.sft.batch.sise (did you mean size?)."),
        ("{size: 4", "{sise: 4", "unknown key stages.thinkpo.batch.sise (did you mean size?)."),
        (
            "{path: a.jsonl}",
            "{generate: {question: 3}}",
            "unknown key stages.sft.data.generate.question (did you mean questions?).",
        ),
        ("[{name", "[{nam", "unknown key evaluation.benchmarks.0.nam (did you mean name?)."),
        ("    epochs: 1\n", "    epochs: 1\n    betta: 1\n", "unknown key stages.thinkpo.betta (did you mean beta?)."),
    ],
)
def test_unknown_key_at_any_depth_names_its_dotted_path_and_the_nearest_key(
    old: str, new: str, message: str, tmp_path: Path
):
    assert message in problems(tmp_path, edited(old, new))


@pytest.mark.parametrize(
    ("old", "new", "path", "other_key"),
    [
        ("{path: a.jsonl}", "{path: a.jsonl, chosen: long}", "stages.sft.data.chosen", "rejected"),
        ("    steps: 3\n", "    steps: 3\n    beta: 0.1\n", "stages.sft.beta", "beta"),
    ],
)
def test_an_unknown_key_of_a_stage_is_answered_with_the_keys_of_its_objective(
    old: str, new: str, path: str, other_key: str, tmp_path: Path
):
    (problem,) = problems(tmp_path, edited(old, new))
    unknown, _, keys = problem.partition(". Keys here: ")
    assert unknown == f"unknown key {path}"
    offered = keys.removesuffix(".").split(", ")
    assert {"path", "response"} <= set(offered) or {"batch", "objective"} <= set(offered)
    assert other_key not in offered


def test_all_problems_of_a_file_are_reported_together(tmp_path: Path):
    text = edited("{size: 2", "{sise: 2").replace("run_dir", "rundir").replace("steps: 3", "steps: many") + "extra: 1\n"
    assert sorted(problems(tmp_path, text)) == [
        "run_dir is required and not given.",
        "stages.sft.steps: Input should be a valid integer (found 'many').",
        "unknown key extra. Keys here: base_name, compute, evaluation, mesh, model, run_dir, seed, stages, title.",
        "unknown key rundir (did you mean run_dir?).",
        "unknown key stages.sft.batch.sise (did you mean size?).",
    ]


def test_a_list_with_invalid_elements_is_not_also_reported_as_too_short(tmp_path: Path):
    assert sorted(problems(tmp_path, edited("[{name", "[{nam"))) == [
        "evaluation.benchmarks.0.name is required and not given.",
        "unknown key evaluation.benchmarks.0.nam (did you mean name?).",
    ]
    (problem,) = problems(tmp_path, edited("[{name: gsm8k}]", "[]"))
    assert problem.startswith("evaluation.benchmarks: ")
    assert "at least 1 item" in problem


# Values.


NUMBERS = {"1e-5": 1e-5, "1E-5": 1e-5, "1.5e-5": 1.5e-5, "1.e3": 1e3, ".5e3": 500.0, "2e+1": 20.0, "1e5": 1e5, "3": 3.0}


@pytest.mark.parametrize(("written", "number"), NUMBERS.items())
def test_a_number_may_be_written_without_a_decimal_point(written: str, number: float, tmp_path: Path):
    text = edited("learning_rate: 1e-5", f"learning_rate: {written}")
    assert load(tmp_path, text).stages[0].optimizer.learning_rate == number
    assigned = load(tmp_path, TEXT, f"stages.sft.optimizer.learning_rate={written}")
    assert assigned.stages[0].optimizer.learning_rate == number


@pytest.mark.parametrize("text", ["e5", "1e", "e-5", "1e-5x", "v1e-5"])
def test_text_that_only_looks_like_a_number_stays_text(text: str, tmp_path: Path):
    assert load(tmp_path, edited("{path: m}", f"{{path: {text}}}")).model.path == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 3", "steps: '3'", "stages.sft.steps: Input should be a valid integer (found '3')."),
        ("steps: 3", "steps: 3.5", "stages.sft.steps: Input should be a valid integer (found 3.5)."),
        ("steps: 3", "steps: yes", "stages.sft.steps: Input should be a valid integer (found True)."),
        ("epochs: 1", "epochs: .nan", "stages.thinkpo.epochs: Input should be a finite number (found nan)."),
        ("learning_rate: 1e-5", "learning_rate: fast", "valid number (found 'fast')."),
        ("{path: m}", "{path: 3}", "model.path: expected a text (found 3). Put the text in quotes."),
        ("{path: m}", "m", "model: expected keys (found 'm')."),
        ("{path: m}", "{path: m, weights: none}", "'pretrained' or 'random' (found 'none')."),
        ("[{name: gsm8k}]", "gsm8k", "evaluation.benchmarks: expected a list (found 'gsm8k')."),
        ("[[base, thinkpo]]", "[[base]]", "evaluation.compare.0.1 is required and not given."),
        ("objective: sft", "objective: dpo", "stages.sft.objective: expected one of 'sft', 'thinkpo' (found 'dpo')."),
        ("    objective: sft\n", "", "stages.sft.objective is required and not given."),
        ("{path: a.jsonl}", "3", "stages.sft.data: expected one source (keys) or a list of sources (found 3)."),
    ],
)
def test_a_value_of_another_type_is_an_error_with_path_and_value(old: str, new: str, message: str, tmp_path: Path):
    (problem,) = problems(tmp_path, edited(old, new))
    assert problem.endswith(message)


def test_a_configuration_is_frozen_at_every_depth(tmp_path: Path):
    config = load(tmp_path)
    for section, key in ((config, "seed"), (config.stages[0], "steps"), (config.stages[0].batch, "size")):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(section, key, 7)
    assert isinstance(config.stages, tuple)


# Rules about several keys.


@pytest.mark.parametrize(
    ("old", "new"), [("    steps: 3\n", "    steps: 3\n    epochs: 2\n"), ("    steps: 3\n", "")], ids=["both", "none"]
)
def test_a_stage_needs_either_steps_or_epochs(old: str, new: str, tmp_path: Path):
    (problem,) = problems(tmp_path, edited(old, new))
    assert problem.startswith("stages.sft: give either `steps` or `epochs`")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("- name: thinkpo\n", "- name: thinkpo\n    start: nope\n", "'nope' is not an earlier model"),
        ("- name: sft\n", "- name: sft\n    start: thinkpo\n", "'thinkpo' is not an earlier model"),
        ("- name: sft\n", "- name: sft\n    start: sft\n", "'sft' is not an earlier model"),
        ("- name: sft\n", "- name: base\n", "stage name 'base' is taken"),
        ("- name: sft\n", "- name: evaluation\n", "stage name 'evaluation' is taken"),
        ("- name: sft\n", "- name: thinkpo\n", "stage name 'thinkpo' is taken"),
        ("[[base, thinkpo]]", "[[base, thinkpoo]]", "no model 'thinkpoo' (did you mean thinkpo?)"),
    ],
)
def test_names_of_models_are_unique_and_known(old: str, new: str, message: str, tmp_path: Path):
    (problem,) = problems(tmp_path, edited(old, new))
    assert message in problem


@pytest.mark.parametrize("start", ["base", "sft"])
def test_a_stage_may_start_from_any_model_before_it(start: str, tmp_path: Path):
    config = load(tmp_path, edited("- name: thinkpo\n", f"- name: thinkpo\n    start: {start}\n"))
    assert config.stages[1].init_from == start


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{path: a.jsonl, generate: {questions: 3}}", "give either `path` or `generate`"),
        ("{}", "give either `path` or `generate`"),
        ("{path: a.jsonl, system: S, system_column: s}", "give either `system` or `system_column`, not both"),
        ("{path: a.jsonl, messages: m, response: r}", "give either `messages` or `response`, not both"),
        ("{path: a.jsonl, split: test}", "a file has none"),
        ("{path: a.parquet, subset: main}", "a file has none"),
        ("{generate: {questions: 3}, split: test}", "a file has none"),
    ],
)
def test_a_data_key_that_would_have_no_effect_is_an_error(data: str, message: str, tmp_path: Path):
    (problem,) = problems(tmp_path, edited("{path: a.jsonl}", data))
    assert problem.startswith("stages.sft.data: ")
    assert re.search(message, problem)


def test_a_hub_data_set_may_have_a_split_and_a_subset(tmp_path: Path):
    config = load(tmp_path, edited("{path: a.jsonl}", "{path: owner/name, split: test, subset: main}"))
    assert (config.stages[0].data[0].split, config.stages[0].data[0].subset) == ("test", "main")


# The file itself.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [b\n", "not valid YAML: "),
        (TEXT + "run_dir: other\n", "not valid YAML: the key 'run_dir' is given twice"),
        (edited("{size: 2,", "{size: 2, size: 3,"), "not valid YAML: the key 'size' is given twice"),
        ("? [a, b]\n: 3\n", "not valid YAML: "),
        ("", "expected `key: value` lines at the top, found an empty file."),
        ("# nothing\n", "expected `key: value` lines at the top, found an empty file."),
        ("- a\n- b\n", "expected `key: value` lines at the top, found a list."),
        ("just words\n", "expected `key: value` lines at the top, found a str."),
    ],
    ids=["malformed", "twice", "twice below", "list as key", "empty", "comment", "list", "text"],
)
def test_a_file_that_is_not_a_mapping_is_an_error(text: str, message: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_run_config(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_repeated_key_is_reported_with_its_line(tmp_path: Path):
    with pytest.raises(UserError, match=f"line {TEXT.count(chr(10)) + 1}, column 1"):
        load(tmp_path, TEXT + "run_dir: other\n")


def test_keys_of_a_merged_mapping_can_be_overridden(tmp_path: Path):
    text = edited("batch: {size: 2, row_length: 16}", "batch: &batch {size: 2, row_length: 16}")
    text = text.replace("batch: {size: 4, row_length: 32}", "batch: {<<: *batch, size: 4}")
    batch = load(tmp_path, text).stages[1].batch
    assert (batch.size, batch.row_length) == (4, 16)


def test_a_file_that_cannot_be_read_is_an_error_with_its_path(tmp_path: Path):
    with pytest.raises(UserError, match=r"absent\.yaml: there is no such file\. Give an existing YAML file"):
        load_run_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        load_run_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"title: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml: cannot be read as UTF-8 text"):
        load_run_config(tmp_path / "latin.yaml")


# --set


def test_set_selects_a_stage_by_its_name_or_its_index(tmp_path: Path):
    by_name = load(tmp_path, TEXT, "stages.thinkpo.batch.size=8", "seed=5")
    by_index = load(tmp_path, TEXT, "stages.1.batch.size=8", "seed=5")
    assert by_name == by_index
    assert (by_name.seed, by_name.stages[1].batch.size, by_name.stages[0].batch.size) == (5, 8, 2)


def test_set_reads_values_as_yaml_and_adds_sections_that_the_file_lacks(tmp_path: Path):
    length = ("stages.thinkpo.steps=2", "stages.thinkpo.epochs=null")
    config = load(tmp_path, TEXT, "mesh.fsdp=4", *length, "title=a=b", "stages.0.data={path: c.jsonl}")
    assert (config.mesh.fsdp, config.title) == (4, "a=b")
    assert (config.stages[1].steps, config.stages[1].epochs) == (2, None)
    assert config.stages[0].data[0].path == "c.jsonl"


def test_later_overrides_win_and_the_input_is_not_changed():
    raw = {"a": {"b": 1}, "list": [{"name": "x", "c": 1}]}
    assert apply_overrides(raw, ["a.b=2", "a.b=3", "list.x.c=9"]) == {"a": {"b": 3}, "list": [{"name": "x", "c": 9}]}
    assert raw == {"a": {"b": 1}, "list": [{"name": "x", "c": 1}]}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.sft.steps", "--set stages.sft.steps: expected the form dotted.key=value."),
        ("=4", "--set =4: expected the form dotted.key=value."),
        (
            "stages.thinkp.steps=4",
            "no element 'thinkp' (did you mean thinkpo?). There are: ['sft', 'thinkpo'].",
        ),
        ("stages.2.steps=4", "no element '2'. There are: ['sft', 'thinkpo']."),
        ("stages.-1.steps=4", "no element '-1'. There are: ['sft', 'thinkpo']."),
        ("stages.².steps=4", "no element '²'. There are: ['sft', 'thinkpo']."),
        ("run_dir.x=4", "--set run_dir.x=4: 'x' is below 'runs/x', which has no keys."),
        ("seed=[", "--set seed=[: not valid YAML: "),
    ],
)
def test_an_impossible_override_is_an_error_that_repeats_it(assignment: str, message: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        load(tmp_path, TEXT, assignment)
    assert str(error.value).startswith(f"--set {assignment}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.sft.steps=abc", "stages.sft.steps: Input should be a valid integer (found 'abc')."),
        ("stages.sft.steps=0", "stages.sft.steps: Input should be greater than or equal to 1 (found 0)."),
        ("stages.sft.batch.sise=4", "unknown key stages.sft.batch.sise (did you mean size?)."),
        ("sead=1", "unknown key sead (did you mean seed?)."),
        ("stages=", "stages: expected a list (found None)."),
    ],
)
def test_an_override_is_validated_like_a_value_in_the_file(assignment: str, message: str, tmp_path: Path):
    assert problems(tmp_path, TEXT, assignment) == [message]
