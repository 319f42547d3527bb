"""A run is identified by what its data holds, not by where it lies."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.stages import ROWS, STAGE

from thinkpo_jax.models.model_folder import ModelConfig, resolve_model_folder
from thinkpo_jax.run.resolve import ResolvedRun, has_changed_files, is_stage_finished, resolve_run
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.run.run_folder import VERSIONS_HEADER, StageRecord
from thinkpo_jax.run.stage_data import load_stage_inputs
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.runtime.files import write_atomically, write_json_record
from thinkpo_jax.runtime.yaml_text import dump_yaml


def resolve(folder: Path, data: object, **stage: object) -> ResolvedRun:
    raw = {
        "run_dir": str(folder / "run"),
        "model": {"path": "builtin:miniature"},
        "compute": {"dtype": "float32"},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "stages": [{key: value for key, value in (STAGE | {"data": data} | stage).items() if value is not None}],
    }
    return resolve_run(parse_config(RunConfig, raw, source="test"))


def begin(run: ResolvedRun) -> None:
    stage = run.config.stages[0]
    inputs = load_stage_inputs(run, stage, {})
    write_atomically(run.folder.config, VERSIONS_HEADER.encode())
    run.folder.write_stage_record(stage.name, StageRecord(run.settings_of(stage), inputs.dataset.digest()))


def resume(run: ResolvedRun) -> None:
    """Does what a resumed run does before it trains."""
    stage = run.config.stages[0]
    assert not is_stage_finished(run, stage)
    load_stage_inputs(run, stage, {})


def test_a_begun_stage_resumes_with_the_same_data_at_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    begin(resolve(tmp_path, {"path": str(path)}))
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "pairs.jsonl").write_text(path.read_text())
    (moved / "link.jsonl").symlink_to(path)
    monkeypatch.chdir(moved)
    monkeypatch.setenv("MOVED", str(moved))
    for new in ("pairs.jsonl", "../pairs.jsonl", "link.jsonl", "$MOVED/pairs.jsonl"):
        resume(resolve(tmp_path, {"path": new}))
    with pytest.raises(UserError, match=r"stage\.data\.0\.limit was None, is 3"):
        resume(resolve(tmp_path, {"path": "pairs.jsonl", "limit": 3}))
    (moved / "pairs.jsonl").write_text(path.read_text().replace("?", "!"))
    with pytest.raises(UserError, match="was begun with other data"):
        resume(resolve(tmp_path, {"path": "pairs.jsonl"}))


def test_a_record_of_an_older_version_has_the_defaults_of_new_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"], "response": row["chosen"]}) + "\n" for row in ROWS))
    run = resolve(tmp_path, {"path": str(path)}, objective="sft", beta=None)
    begin(run)
    record_path = tmp_path / "run" / STAGE["name"] / "stage.json"
    record = json.loads(record_path.read_text())
    assert record["settings"]["stage"]["data"][0].pop("train_on") == "last"
    del record["digest"]
    write_json_record(record_path, record)
    resume(run)
    with pytest.raises(UserError, match=r"stage\.data\.0\.train_on was 'last', is 'all'"):
        resume(resolve(tmp_path, {"path": str(path), "train_on": "all"}, objective="sft", beta=None))


def test_a_finished_stage_is_checked_again_only_if_its_files_changed(tmp_path: Path) -> None:
    path, other = tmp_path / "pairs.jsonl", tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    other.write_text(path.read_text())
    begin(resolve(tmp_path, {"path": str(path)}))

    def has_changed(name: Path) -> bool:
        run = resolve(tmp_path, {"path": str(name)})
        return has_changed_files(run, run.config.stages[0])

    assert not has_changed(path)
    assert has_changed(other)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("?", "!"))
    os.utime(path, ns=times)  # as `cp --preserve` does
    assert has_changed(path)


def test_the_resolved_configuration_is_read_back_without_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    run = resolve(tmp_path, {"path": "$SCRATCH/a.jsonl"}, steps=None, epochs=1.0)
    config = run.config.model_copy(update={"title": "010"})
    monkeypatch.delenv("SCRATCH")
    (tmp_path / "config.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    assert load_run_config(tmp_path / "config.yaml") == config
    assert config.stages[0].data[0].path == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"weights": "random"}, "start.identity was"),
        ({"thinking_tags": ["<a>", "</a>"]}, "tokenizer.thinking_tags was None, is ['<a>', '</a>']"),
    ],
    ids=str,
)
def test_a_stage_of_another_start_model_or_template_is_refused(
    change: dict[str, object], difference: str, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = resolve(tmp_path, {"path": str(path)})
    begin(run)
    model = parse_config(ModelConfig, {"path": "builtin:miniature", **change}, source="test")
    with pytest.raises(UserError) as error:
        resume(resolve_run(run.config.model_copy(update={"model": model})))
    assert difference in str(error.value)


def test_a_stage_of_an_edited_template_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve_model_folder("builtin:miniature"), tmp_path / "model"))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = resolve(tmp_path, {"path": str(path)}).config.model_copy(update={"model": ModelConfig(path=str(folder))})
    begin(resolve_run(config))
    resume(resolve_run(config))
    with (folder / "chat_template.jinja").open("a") as file:
        file.write("{# edited #}")
    with pytest.raises(UserError, match=r"start\.identity was"):
        resume(resolve_run(config))
