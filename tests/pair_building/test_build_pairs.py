"""Every row and every candidate becomes a pair or is counted as dropped. The pairs and the data card say the same."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import filelock
import pytest
import yaml
from support.checkpoints import needs_data
from support.pairs import (
    LONG,
    SHORT,
    UNBOXED,
    Config,
    built_pairs,
    card_counts,
    nonzero,
    read_card,
    read_table,
    run_pairs,
    write_jsonl,
)
from support.paths import DATA

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.record_formats import PreferenceDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.inference.engine import Completion
from thinkpo_jax.pair_building import build_pairs
from thinkpo_jax.pair_building.build_pairs import PairsConfig
from thinkpo_jax.pair_building.short_answers import DatasetAnswersConfig, collect_short_answers
from thinkpo_jax.runtime.config import parse_config

pytestmark = pytest.mark.usefixtures("cached_grading")


def test_each_long_answer_is_paired_with_each_short_one_to_its_question(joined: Config, tmp_path: Path):
    pairs = built_pairs(joined)
    assert pairs[0] == {
        "question": "What is\n 1+1?", "prompt": [{"role": "user", "content": "What is\n 1+1?"}], "reference": "2",
        "chosen": "<think>hm</think>\\boxed{2}", "rejected": "\\boxed{2}", "chosen_tokens": 26, "rejected_tokens": 9,
        "short_answer_is_correct": True, "source": f"{tmp_path}/long.jsonl, line 1", "gap": 17,
    }  # fmt: skip
    texts = [(row["chosen"], row["rejected"], row["short_answer_is_correct"]) for row in pairs[1:]]
    short = [(SHORT[1]["response"], True), (SHORT[2]["response"], False)]
    assert texts == [(LONG[i]["response"], *answer) for i in (1, 2) for answer in short]
    rows, answered, candidates = card_counts(joined)
    assert rows == {"read": 4, "no short answer to the question": 1}
    assert answered == {"read": len(SHORT), "to other questions": 1}
    assert nonzero(candidates) == {"all": 5}


def test_the_column_types_do_not_depend_on_the_rows(joined: Config):
    types = {"question": "string", "prompt": "list<element: struct<role: string, content: string>>",
             "reference": "string", "chosen": "string", "rejected": "string", "chosen_tokens": "int64",
             "rejected_tokens": "int64", "short_answer_is_correct": "bool", "source": "string",
             "gap": "int64"}  # fmt: skip
    assert run_pairs(joined) == 0
    assert {field.name: str(field.type) for field in read_table(joined).schema} == types
    del joined["long"]["reference"]
    joined["filters"] = UNBOXED
    assert {row["reference"] for row in built_pairs(joined)} == {None}
    assert {field.name: str(field.type) for field in read_table(joined).schema} == types


def test_the_settings_on_the_card_are_those_that_made_the_pairs(joined: Config):
    """A null that is not the default stays null."""
    joined["filters"] = UNBOXED
    assert run_pairs(joined) == 0
    settings = yaml.safe_load(read_card(joined).partition("```yaml\n")[2].partition("```")[0])
    config = parse_config(PairsConfig, settings, source="card")
    assert config == parse_config(PairsConfig, joined, source="pairs.yaml")
    assert config.filters.max_wrong_short_fraction is None


@pytest.mark.parametrize("name", ["pairs.parquet", ""], ids=["file", "folder"])
def test_a_thinkpo_stage_reads_the_pairs_with_default_columns(name: str, joined: Config, tokenizer: str):
    joined["long"]["system"] = "Think."
    pairs, chat = built_pairs(joined), ChatTokenizer.from_folder(Path(tokenizer))
    source = PreferenceDataConfig(path=str(Path(joined["out"]) / name))
    examples = tokenize_sources([source], chat, row_length=200, seed=0)
    texts = [[chat.tokenizer.decode(segment.token_ids) for segment in example] for example in examples]
    prompts = [f"[system]Think.[user]{pair['question']}[assistant]" for pair in pairs]
    assert texts == [
        [f"{prompt}{pair[side]}<end>" for side in ("chosen", "rejected")]
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    assert len(texts) == 5


def test_a_prompt_suffix_is_not_part_of_the_question(joined: Config):
    joined["long"]["prompt_suffix"] = " Box it."
    prompts = [pair["prompt"][0]["content"] for pair in built_pairs(joined)[:2]]
    assert prompts == ["What is\n 1+1? Box it.", "2+2? Box it."]


def test_a_rerun_writes_the_same_files(joined: Config):
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(joined["out"]).iterdir()}

    assert run_pairs(joined) == 0
    before = content()
    assert run_pairs(joined) == 0
    assert content() == before
    assert set(before) == {"pairs.parquet", "README.md", "lengths.png", "contaminated.jsonl", ".lock"}
    assert before["lengths.png"].startswith(b"\x89PNG\r\n\x1a\n")


BAD = {
    "not JSON": "{",
    "no text": {**LONG[0], "response": None},
    "missing field": {"prompt": "q", "reference": "2"},
    "no conversation": {**LONG[0], "prompt": ["q", "r"]},
}
BAD_REFERENCES = [None, "", float("nan"), True, ["2"]]


@pytest.mark.parametrize(
    ("reason", "row"), [*BAD.items(), *(("no text", {**LONG[0], "reference": value}) for value in BAD_REFERENCES)]
)
def test_a_bad_row_stops_the_command_or_is_skipped_and_counted(
    reason: str, row: Any, joined: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    joined["long"] |= {"path": write_jsonl(tmp_path / "bad.jsonl", [LONG[0], row, *LONG[1:]]), "response": "response"}
    assert run_pairs(joined) == 2
    assert f"error: {tmp_path}/bad.jsonl, line 2" in capsys.readouterr().err
    joined["long"]["on_bad_row"] = "skip"
    assert len(built_pairs(joined)) == 5
    assert card_counts(joined)[0] == {"read": 5, f"bad row: {reason}": 1, "no short answer to the question": 1}
    assert f"{tmp_path}/bad.jsonl, line 2" in capsys.readouterr().err


def test_a_bad_short_row_stops_the_command_or_is_skipped_and_logged(
    joined: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    joined["short"]["path"] = write_jsonl(tmp_path / "bad.jsonl", [*SHORT, "{"])
    assert run_pairs(joined) == 2
    joined["short"]["on_bad_row"] = "skip"
    assert len(built_pairs(joined)) == 5
    assert capsys.readouterr().err.count("bad.jsonl, line 5: not valid JSON") == 2
    assert card_counts(joined)[1]["bad row: not JSON"] == 1


def test_data_sets_without_a_common_question_are_an_error_with_an_example_of_both(
    joined: Config, capsys: pytest.CaptureFixture[str]
):
    joined["short"]["prompt_suffix"] = "x"  # no question ends with it
    assert run_pairs(joined) == 0
    other_questions = [{**row, "prompt": "Solve: " + row["prompt"]} for row in SHORT]
    joined["short"]["path"] = write_jsonl(Path(joined["out"]).parent / "other.jsonl", other_questions)
    assert run_pairs(joined) == 2
    message = "none of the 3 questions. One of its questions is 'Solve: 2+2?', and one with a long answer is '2+2?'."
    assert message in capsys.readouterr().err


def test_a_run_without_pairs_fails_and_lists_the_counts(joined: Config, capsys: pytest.CaptureFixture[str]):
    joined["short"]["path"] = joined["long"]["path"]  # the same file, by mistake
    joined["long"]["limit"] = 1
    assert run_pairs(joined) == 1
    assert "no pair is left. Rows with a long answer: 1 read; " in (message := capsys.readouterr().err)
    assert "1 all, 1 both answers are the same. Loosen" in message


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("tokeniser=x", "unknown key tokeniser (did you mean tokenizer?)"),
        ("short.respons=x", "unknown key short.respons (did you mean response?)"),
        ("short.by=vllm", "short.by: expected one of 'join', 'sample' (found 'vllm')"),
        ("out={file}", "out: {file} cannot be made"),
        ("out={file}/x", "out: {file}/x cannot be made"),
        ("tokenizer=/nowhere", "/nowhere: there is no such folder"),
        ("long.path=/nowhere.jsonl", "/nowhere.jsonl: there is no such file"),
        ("short.path=/nowhere.jsonl", "/nowhere.jsonl: there is no such file"),
        ("decontaminate.ngram=3", "decontaminate.ngram: "),
        ("decontaminate.against=[{name: miniature}, {name: miniature}]", "against: a benchmark is named twice"),
        ("filters.max_wrong_short_fraction=2", "filters.max_wrong_short_fraction: "),
        ("filters.max_wrong_short=2", "max_wrong_short (did you mean max_wrong_short_fraction?)"),
        ("filters.boxed=false", "without `boxed` nothing is compared"),
        ("select.pairs=-1", "select.pairs: "),
        ("control=swap", "control: "),
        ("seed=-1", "seed: "),
    ],
)
def test_a_configuration_error_is_one_line_that_names_the_key(
    assignment: str, message: str, joined: Config, capsys: pytest.CaptureFixture[str]
):
    file = joined["long"]["path"]
    assert run_pairs(joined, assignment.replace("{file}", file)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message.replace("{file}", file) in line


def test_the_old_name_of_max_wrong_short_fraction_still_works(joined: Config, capsys: pytest.CaptureFixture[str]):
    joined["filters"] = {}
    renamed = built_pairs(joined, "filters.max_wrong_short_fraction=0.1")
    assert built_pairs(joined, "filters.disagreeing_share=0.1") == renamed
    assert "max_wrong_short_fraction: 0.1" in read_card(joined)
    assert "disagreeing_share" not in read_card(joined)
    assert run_pairs(joined, "filters.disagreeing_share=2") == 2
    assert "filters.disagreeing_share: " in capsys.readouterr().err
    assert run_pairs(joined, "filters.disagreeing_share=0.1", "filters.max_wrong_short_fraction=0.1") == 2
    assert "filters.disagreeing_share" in capsys.readouterr().err


def test_two_processes_cannot_write_to_the_same_folder(joined: Config, capsys: pytest.CaptureFixture[str]):
    Path(joined["out"]).mkdir()
    with filelock.FileLock(Path(joined["out"]) / ".lock"):
        assert run_pairs(joined) == 2
    assert f"out: another process writes to {joined['out']}." in capsys.readouterr().err
    assert run_pairs(joined) == 0


def test_a_join_of_many_rows_takes_seconds(tmp_path: Path, tokenizer: str):
    rows = [{"prompt": f"What is {i}+{i}?", "response": str(2 * i)} for i in range(30_000)]
    config = DatasetAnswersConfig(by="join", path=write_jsonl(tmp_path / "short.jsonl", rows))
    options = {"seed": 0, "tokenizer": ChatTokenizer.from_folder(Path(tokenizer)), "counts": Counter()}
    start = time.process_time()
    questions = [row["prompt"] for row in reversed(rows)]
    answers = collect_short_answers(config, questions, tmp_path, **options)
    assert time.process_time() - start < 10  # comparing every two rows takes half a minute
    assert answers == [[Completion(text=row["response"])] for row in reversed(rows)]


def test_token_counts_do_not_depend_on_the_chunk_size(joined: Config, monkeypatch: pytest.MonkeyPatch):
    pairs = built_pairs(joined)
    monkeypatch.setattr(build_pairs, "ANSWERS_PER_CHUNK", 2)
    assert built_pairs(joined) == pairs
    assert all(pair["chosen_tokens"] == len(pair["chosen"]) for pair in pairs)


def test_swapped_swaps_the_answers_of_the_same_selection(joined: Config):
    plain = built_pairs(joined, "select.gap=long", "select.pairs=2")
    swapped = built_pairs(joined, "select.gap=long", "select.pairs=2", "control=swapped")
    assert [(row["chosen"], row["rejected"], row["gap"]) for row in swapped] == [
        (row["rejected"], row["chosen"], -row["gap"]) for row in plain
    ]
    assert min(row["gap"] for row in plain) >= max(row["gap"] for row in built_pairs(joined, "select.gap=short"))


def test_length_matched_and_correct_only_drop_the_other_pairs(joined: Config, tmp_path: Path):
    even = {"prompt": "2+2?", "response": "So it is, so it is \\boxed{5}"}
    joined["short"]["path"] = write_jsonl(tmp_path / "even.jsonl", [*SHORT, even])
    plain = built_pairs(joined, "filters.max_wrong_short_fraction=null")
    matched = [row for row in plain if row["rejected"] == even["response"]]
    assert len(plain) == 7
    assert len(matched) == 2
    assert built_pairs(joined, "filters.max_wrong_short_fraction=null", "control=length_matched") == matched
    assert built_pairs(joined, "control=correct_only") == [row for row in plain if row["short_answer_is_correct"]]


def math500(tokenizer: str, folder: Path, **changes: Any) -> Config:
    """Unfiltered answers to MATH500. One row of each file has no reference."""
    columns = {"prompt": "question", "response": "response", "on_bad_row": "skip"}
    return {
        "out": str(folder / "out"),
        "tokenizer": tokenizer,
        "long": columns | {"path": str(DATA / "raw/math500_long.jsonl"), "reference": "reference"},
        "short": columns | {"by": "join", "path": str(DATA / "raw/math500_short.jsonl")},
    } | changes


@needs_data
def test_controls_and_thirds_of_real_answers(tokenizer: str, tmp_path: Path):
    config = math500(tokenizer, tmp_path)
    plain = built_pairs(config)
    assert Counter(row["short_answer_is_correct"] for row in plain) == {True: 153, False: 37}
    assert card_counts(config)[0] == {"read": 500, "bad row: no text": 1, "no short answer to the question": 0}
    thirds = [built_pairs(config, f"select.gap={gap}") for gap in ("short", "middle", "long")]
    assert list(map(len, thirds)) == [63, 63, 64]
    gaps = [[row["gap"] for row in third] for third in thirds]
    assert max(gaps[0]) <= min(gaps[1])
    assert max(gaps[1]) <= min(gaps[2])
    assert sorted(row["source"] for third in thirds for row in third) == sorted(row["source"] for row in plain)
    swapped = built_pairs(config, "select.gap=long", "control=swapped")
    assert [(row["chosen"], row["rejected"]) for row in swapped] == [(r["rejected"], r["chosen"]) for r in thirds[2]]
    assert built_pairs(config, "control=correct_only") == [row for row in plain if row["short_answer_is_correct"]]
    assert min(row["gap"] / row["chosen_tokens"] for row in plain) > 0.2
    assert run_pairs(config, "control=length_matched") == 1  # real long answers are much longer


@needs_data
def test_benchmark_questions_are_dropped_and_listed(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = {"path": str(DATA / "pairs/math500_pairs.jsonl"), "prompt": "question"}
    config = math500(tokenizer, tmp_path, long=source | {"response": "long"}, filters=UNBOXED | {"complete": False})
    config["short"] = source | {"by": "join", "response": "short"}
    tests = {name: {"name": name, "path": str(DATA / name / "test.jsonl")} for name in ("math500", "gsm8k", "aime24")}
    config["decontaminate"] = {"against": [tests["math500"]]}
    assert run_pairs(config) == 1
    assert "no pair is left. Rows with a long answer: 522 read, 522 a question of math500;" in capsys.readouterr().err
    matches = [json.loads(line) for line in (tmp_path / "out/contaminated.jsonl").read_text().splitlines()]
    assert len({match["question"] for match in matches}) == 174
    assert {match["place"] for match in matches} == {f"{source['path']}, line {i}" for i in range(1, 523)}
    config["decontaminate"] = {"against": [tests["gsm8k"], tests["aime24"]]}
    assert len({row["question"] for row in built_pairs(config)}) == 174
    assert card_counts(config)[0] == {"read": 522, "no short answer to the question": 0}
    assert (tmp_path / "out/contaminated.jsonl").read_bytes() == b""
    assert "Questions of gsm8k, aime24 are left out" in read_card(config)
