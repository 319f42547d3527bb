"""Every row and every candidate is a pair or is counted as left out; what was generated once is not generated again."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import pyarrow
import pytest
import yaml
from pyarrow import parquet
from support.byte_tokenizer import byte_tokenizer
from support.checkpoints import needs_data
from support.paths import DATA
from support.server import Reply, failed, fast_retries, said, serving  # noqa: F401

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.record_formats import PreferenceDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.evaluation.grading import grade_boxed
from thinkpo_jax.pair_building import build_pairs as pairs
from thinkpo_jax.pair_building import filters as curation
from thinkpo_jax.pair_building.pairs_config import PairsConfig
from thinkpo_jax.pair_building.short_answers import (
    DatasetAnswersConfig,
    ServerAnswersConfig,
    ShortAnswer,
    collect_short_answers,
)
from thinkpo_jax.pairs import main
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.config import parse_config

pytestmark = pytest.mark.usefixtures("fast_retries")
PAPER_SYSTEM = "You are a helpful and harmless assistant. Please reason step by step."
UNBOXED = {"boxed": False, "long_agrees": False, "disagreeing_share": None}
LONG = [
    {"prompt": "What is\n 1+1?", "response": "<think>hm</think>\\boxed{2}", "reference": 2},
    {"prompt": "2+2?", "response": "<think>hm, hm</think>\\boxed{4}", "reference": "4"},
    {"prompt": "2+2?", "response": "<think>wait</think>\\boxed{4}", "reference": "4"},
    {"prompt": "3+3?", "response": "<think>oh</think>\\boxed{6}", "reference": "6"},
]
SHORT = [
    {"prompt": " What is 1+1? ", "response": "\\boxed{2}"},
    {"prompt": "2+2?", "response": "It is \\boxed{4}"},
    {"prompt": "2+2?", "response": "So \\boxed{5}"},
    {"prompt": "9+9?", "response": "\\boxed{18}"},
]
Config = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], bool]:
    """What math-verify said of (response, reference): it takes seconds, and is asked once for each."""
    return {}


@pytest.fixture(autouse=True)
def _asked_once(verdicts: dict[tuple[str, str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def remembered(responses: Sequence[str], references: Sequence[str]) -> list[bool]:
        asked = list(zip(responses, references, strict=True))
        new = [pair for pair in dict.fromkeys(asked) if pair not in verdicts]
        found = grade_boxed([response for response, _ in new], [reference for _, reference in new])
        verdicts.update(zip(new, found, strict=True))
        return [verdicts[pair] for pair in asked]

    monkeypatch.setattr(curation, "grade_boxed", remembered)


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def joined(tmp_path: Path, tokenizer: str) -> Config:
    """Five candidates, of which two disagree."""
    return {
        "out": str(tmp_path / "out"),
        "tokenizer": tokenizer,
        "long": {"path": write(tmp_path / "long.jsonl", LONG), "reference": "reference"},
        "short": {"by": "join", "path": write(tmp_path / "short.jsonl", SHORT)},
        "filters": {"disagreeing_share": 0.4},
    }


@pytest.fixture
def miniature(tmp_path: Path) -> Config:
    """Short answers of the model that ships, in twenty batches."""
    return {
        "out": str(tmp_path / "out"),
        "tokenizer": "builtin:miniature",
        "long": {"generate": {"questions": 40}, "prompt": "question", "response": "long"},
        "short": {"by": "sample", "model": {"path": "builtin:miniature"}, "system": None,
                  "sampling": {"max_new_tokens": 64, "batch_size": 2}},
        "filters": UNBOXED,
    }  # fmt: skip


def served(joined: Config, url: str, **changes: Any) -> Config:
    server = {"url": url, "model": "tiny", "retries": 1, "concurrency": 1}
    return joined | {"short": {"by": "request", "server": server}, "filters": UNBOXED} | changes


def build(config: Config, *assignments: str) -> int:
    """The exit status of the command."""
    path = Path(config["out"]).parent / "pairs.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return run_command(main, ["--config", str(path), *(["--set", *assignments] if assignments else [])])


def built(config: Config, *assignments: str) -> list[dict[str, Any]]:
    """The rows that the command writes, once it is seen that the counts of the card add up."""
    assert build(config, *assignments) == 0
    found = table(config).to_pylist()
    rows, _, candidates = counts(config)
    left_out = sum(count for reason, count in rows.items() if reason != "read")
    assert rows["read"] - left_out == candidates["all"] or config["short"]["by"] == "join"
    assert candidates["all"] == len(found) + sum(count for what, count in candidates.items() if what != "all")
    assert all(row["gap"] == row["chosen_tokens"] - row["rejected_tokens"] for row in found)
    return found


def table(config: Config) -> pyarrow.Table:
    return parquet.read_table(Path(config["out"]) / "pairs.parquet")


def counts(config: Config) -> list[dict[str, int]]:
    """The tables of the data card."""
    card = (Path(config["out"]) / "README.md").read_text(encoding="utf-8")
    parts = re.findall(r"\|--:\|\n((?:\|.*\n)+)", card)
    return [{what: int(count.replace(",", "")) for what, count in re.findall(r"\| (.*) \| (.*) \|", p)} for p in parts]


def kept(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config["out"]) / "short_answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]


# Answers of another data set.


def test_each_long_answer_is_paired_with_each_short_one_to_its_question(joined: Config, tmp_path: Path):
    found = built(joined)
    assert found[0] == {
        "question": "What is\n 1+1?", "prompt": [{"role": "user", "content": "What is\n 1+1?"}], "reference": "2",
        "chosen": "<think>hm</think>\\boxed{2}", "rejected": "\\boxed{2}", "chosen_tokens": 26, "rejected_tokens": 9,
        "short_answer_is_correct": True, "source": f"{tmp_path}/long.jsonl, line 1", "gap": 17,
    }  # fmt: skip
    texts = [(row["chosen"], row["rejected"], row["short_answer_is_correct"]) for row in found[1:]]
    short = [(SHORT[1]["response"], True), (SHORT[2]["response"], False)]
    assert texts == [(LONG[i]["response"], *answer) for i in (1, 2) for answer in short]
    rows, answered, candidates = counts(joined)
    assert rows == {"read": 4, "no short answer to the question": 1}
    assert answered == {"read": len(SHORT), "to other questions": 1}
    assert {what: count for what, count in candidates.items() if count} == {"all": 5}


def test_columns_have_these_types_whatever_the_rows(joined: Config):
    types = {"question": "string", "prompt": "list<element: struct<role: string, content: string>>",
             "reference": "string", "chosen": "string", "rejected": "string", "chosen_tokens": "int64",
             "rejected_tokens": "int64", "short_answer_is_correct": "bool", "source": "string", "gap": "int64"}  # fmt: skip
    assert build(joined) == 0
    assert {field.name: str(field.type) for field in table(joined).schema} == types
    del joined["long"]["reference"]
    joined["filters"] = UNBOXED
    assert {row["reference"] for row in built(joined)} == {None}
    assert {field.name: str(field.type) for field in table(joined).schema} == types


def test_the_settings_of_the_card_are_those_that_made_the_pairs(joined: Config):
    """Null too, where it is not the default."""
    joined["filters"] = UNBOXED
    assert build(joined) == 0
    card = (Path(joined["out"]) / "README.md").read_text(encoding="utf-8")
    told = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert parse_config(PairsConfig, told, source="card") == parse_config(PairsConfig, joined, source="given")
    assert parse_config(PairsConfig, told, source="card").filters.disagreeing_share is None


@pytest.mark.parametrize("name", ["pairs.parquet", ""], ids=["file", "folder"])
def test_a_thinkpo_stage_reads_the_pairs_without_further_keys(name: str, joined: Config, tokenizer: str):
    joined["long"]["system"] = "Think."
    found, chat = built(joined), ChatTokenizer.from_folder(Path(tokenizer))
    examples = tokenize_sources(
        [PreferenceDataConfig(path=str(Path(joined["out"]) / name))], chat, row_length=200, seed=0
    )
    read = [[chat.tokenizer.decode(segment.token_ids) for segment in example] for example in examples]
    prompts = [f"[system]Think.[user]{row['question']}[assistant]" for row in found]
    assert read == [
        [f"{prompt}{row[side]}<end>" for side in ("chosen", "rejected")]
        for prompt, row in zip(prompts, found, strict=True)
    ]
    assert len(read) == 5


def test_a_suffix_is_no_part_of_the_question(joined: Config):
    joined["long"]["prompt_suffix"] = " Box it."
    assert [row["prompt"][0]["content"] for row in built(joined)[:2]] == ["What is\n 1+1? Box it.", "2+2? Box it."]


def test_a_rerun_writes_the_same_files(joined: Config):
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(joined["out"]).iterdir()}

    assert build(joined) == 0
    before = content()
    assert build(joined) == 0
    assert content() == before
    assert set(before) == {"pairs.parquet", "README.md", "lengths.png", "contaminated.jsonl", ".lock"}
    assert before["lengths.png"].startswith(b"\x89PNG\r\n\x1a\n")


BAD = {
    "not JSON": "{",
    "no text": {**LONG[0], "response": None},
    "missing field": {"prompt": "q", "reference": "2"},
    "no conversation": {**LONG[0], "prompt": ["q"]},
}
BAD_REFERENCES = [None, "", float("nan"), True, ["2"]]


@pytest.mark.parametrize(
    ("reason", "row"), [*BAD.items(), *(("no text", {**LONG[0], "reference": value}) for value in BAD_REFERENCES)]
)
def test_a_bad_row_stops_or_is_skipped_and_counted(
    reason: str, row: Any, joined: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    joined["long"] |= {"path": write(tmp_path / "bad.jsonl", [LONG[0], row, *LONG[1:]]), "response": "response"}
    assert build(joined) == 2
    assert f"error: {tmp_path}/bad.jsonl, line 2" in capsys.readouterr().err
    joined["long"]["on_bad_row"] = "skip"
    assert len(built(joined)) == 5
    assert counts(joined)[0] == {"read": 5, f"bad row: {reason}": 1, "no short answer to the question": 1}
    assert f"{tmp_path}/bad.jsonl, line 2" in capsys.readouterr().err


def test_a_bad_short_row_stops_or_is_skipped_and_told(
    joined: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    joined["short"]["path"] = write(tmp_path / "bad.jsonl", [*SHORT, "{"])
    assert build(joined) == 2
    joined["short"]["on_bad_row"] = "skip"
    assert len(built(joined)) == 5
    assert capsys.readouterr().err.count("bad.jsonl, line 5: not valid JSON") == 2
    assert counts(joined)[1]["bad row: not JSON"] == 1


def test_data_of_which_nothing_joins_is_an_error_with_an_example_of_both(
    joined: Config, capsys: pytest.CaptureFixture[str]
):
    joined["short"]["prompt_suffix"] = "x"  # is removed where it is there: no difference
    assert build(joined) == 0
    asked = [{**row, "prompt": "Solve: " + row["prompt"]} for row in SHORT]
    joined["short"]["path"] = write(Path(joined["out"]).parent / "other.jsonl", asked)
    assert build(joined) == 2
    assert "none of the 3 questions. It asks such as 'Solve: 2+2?', and the long answers are to such as '2+2?'" in (
        capsys.readouterr().err
    )


def test_no_pair_left_is_a_failed_run_with_the_counts(joined: Config, capsys: pytest.CaptureFixture[str]):
    joined["short"]["path"] = joined["long"]["path"]  # careless: the same file twice
    joined["long"]["limit"] = 1
    assert build(joined) == 1
    assert "no pair is left. Rows with a long answer: 1 read; " in (message := capsys.readouterr().err)
    assert "1 all, 1 both answers are the same. Loosen" in message


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("tokeniser=x", "unknown key tokeniser (did you mean tokenizer?)"),
        ("short.respons=x", "unknown key short.respons (did you mean response?)"),
        ("short.by=vllm", "short.by: expected one of 'join', 'sample', 'request' (found 'vllm')"),
        ("out={file}", "out: {file} cannot be made"),
        ("out={file}/x", "out: {file}/x cannot be made"),
        ("tokenizer=/nowhere", "/nowhere: there is no such folder"),
        ("long.path=/nowhere.jsonl", "/nowhere.jsonl: there is no such file"),
        ("short.path=/nowhere.jsonl", "/nowhere.jsonl: there is no such file"),
        ("decontaminate.ngram=3", "decontaminate.ngram: "),
        ("decontaminate.against=[{name: miniature}, {name: miniature}]", "against: a benchmark is named twice"),
        ("filters.disagreeing_share=2", "filters.disagreeing_share: "),
        ("filters.boxed=false", "without `boxed` nothing can agree"),
        ("select.pairs=-1", "select.pairs: "),
        ("control=swap", "control: "),
        ("seed=-1", "seed: "),
    ],
)
def test_a_users_error_is_one_line_that_names_it(
    assignment: str, said: str, joined: Config, capsys: pytest.CaptureFixture[str]
):
    file = joined["long"]["path"]
    assert build(joined, assignment.replace("{file}", file)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said.replace("{file}", file) in line


def test_another_process_that_writes_to_the_folder_is_an_error(joined: Config, capsys: pytest.CaptureFixture[str]):
    Path(joined["out"]).mkdir()
    with filelock.FileLock(Path(joined["out"]) / ".lock"):
        assert build(joined) == 2
    assert f"out: another process writes to {joined['out']}." in capsys.readouterr().err
    assert build(joined) == 0


def test_a_join_of_many_rows_takes_seconds(tmp_path: Path):
    rows = [{"prompt": f"What is {i}+{i}?", "response": str(2 * i)} for i in range(30_000)]
    config = DatasetAnswersConfig(by="join", path=write(tmp_path / "short.jsonl", rows))
    start = time.process_time()
    found = collect_short_answers(config, [row["prompt"] for row in reversed(rows)], tmp_path, seed=0, counts=Counter())
    assert time.process_time() - start < 10  # a step for each pair of rows takes half a minute
    assert found == [[ShortAnswer(row["response"])] for row in reversed(rows)]


def test_tokens_are_those_of_each_answer_however_many(joined: Config, monkeypatch: pytest.MonkeyPatch):
    whole = built(joined)
    monkeypatch.setattr(pairs, "ANSWERS_PER_CHUNK", 2)
    assert built(joined) == whole
    assert all(row["chosen_tokens"] == len(row["chosen"]) for row in whole)


# Controls and selection.


def test_swapped_exchanges_the_pairs_that_the_same_selection_gives(joined: Config):
    plain = built(joined, "select.gap=long", "select.pairs=2")
    swapped = built(joined, "select.gap=long", "select.pairs=2", "control=swapped")
    assert [(row["chosen"], row["rejected"], row["gap"]) for row in swapped] == [
        (row["rejected"], row["chosen"], -row["gap"]) for row in plain
    ]
    assert min(row["gap"] for row in plain) >= max(row["gap"] for row in built(joined, "select.gap=short"))


def test_length_matched_and_correct_only_keep_what_they_say(joined: Config, tmp_path: Path):
    even = {"prompt": "2+2?", "response": "So it is, so it is \\boxed{5}"}
    joined["short"]["path"] = write(tmp_path / "even.jsonl", [*SHORT, even])
    plain = built(joined, "filters.disagreeing_share=null")
    matched = [row for row in plain if row["rejected"] == even["response"]]
    assert len(plain) == 7
    assert len(matched) == 2
    assert built(joined, "filters.disagreeing_share=null", "control=length_matched") == matched
    assert built(joined, "control=correct_only") == [row for row in plain if row["short_answer_is_correct"]]


def real(tokenizer: str, out: Path, **changes: Any) -> Config:
    """MATH500, unfiltered: one row of each file lacks the reference."""
    columns = {"prompt": "question", "response": "response", "on_bad_row": "skip"}
    return {
        "out": str(out / "out"),
        "tokenizer": tokenizer,
        "long": columns | {"path": str(DATA / "raw/math500_long.jsonl"), "reference": "reference"},
        "short": columns | {"by": "join", "path": str(DATA / "raw/math500_short.jsonl")},
    } | changes


@needs_data
def test_real_answers_and_each_control_and_third(tokenizer: str, tmp_path: Path):
    config = real(tokenizer, tmp_path)
    plain = built(config)
    assert Counter(row["short_answer_is_correct"] for row in plain) == {True: 150, False: 37}
    assert counts(config)[0] == {"read": 500, "bad row: no text": 1, "no short answer to the question": 0}
    thirds = [built(config, f"select.gap={gap}") for gap in ("short", "middle", "long")]
    assert list(map(len, thirds)) == [62, 62, 63]
    ends = [[row["gap"] for row in third] for third in thirds]
    assert max(ends[0]) <= min(ends[1])
    assert max(ends[1]) <= min(ends[2])
    assert sorted(row["source"] for third in thirds for row in third) == sorted(row["source"] for row in plain)
    swapped = built(config, "select.gap=long", "control=swapped")
    assert [(row["chosen"], row["rejected"]) for row in swapped] == [(r["rejected"], r["chosen"]) for r in thirds[2]]
    assert built(config, "control=correct_only") == [row for row in plain if row["short_answer_is_correct"]]
    assert min(row["gap"] / row["chosen_tokens"] for row in plain) > 0.2
    assert build(config, "control=length_matched") == 1  # real long answers are longer by far


@needs_data
def test_questions_of_an_evaluation_are_left_out_and_listed(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = {"path": str(DATA / "pairs/math500_pairs.jsonl"), "prompt": "question"}
    config = real(tokenizer, tmp_path, long=source | {"response": "long"}, filters=UNBOXED | {"complete": False})
    config["short"] = source | {"by": "join", "response": "short"}
    tests = {name: {"name": name, "path": str(DATA / name / "test.jsonl")} for name in ("math500", "gsm8k", "aime24")}
    config["decontaminate"] = {"against": [tests["math500"]]}
    assert build(config) == 1
    assert "no pair is left. Rows with a long answer: 522 read, 522 a question of math500;" in capsys.readouterr().err
    hits = [json.loads(line) for line in (tmp_path / "out/contaminated.jsonl").read_text().splitlines()]
    assert len({hit["question"] for hit in hits}) == 174
    assert {hit["place"] for hit in hits} == {f"{source['path']}, line {i}" for i in range(1, 523)}
    config["decontaminate"] = {"against": [tests["gsm8k"], tests["aime24"]]}
    assert len({row["question"] for row in built(config)}) == 174
    assert counts(config)[0] == {"read": 522, "no short answer to the question": 0}
    assert (tmp_path / "out/contaminated.jsonl").read_bytes() == b""
    assert "Questions of gsm8k, aime24 are left out" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


# Answers of a model.


def test_the_defaults_are_the_papers_whatever_else_is_given(joined: Config):
    server = {"url": "http://localhost:8000/v1", "model": "tiny"}
    for given in ({}, {"sampling": {"batch_size": 8}}):
        raw = joined | {"short": {"by": "request", "server": server, **given}}
        short = parse_config(PairsConfig, raw, source="x").short
        assert isinstance(short, ServerAnswersConfig)
        sampling = short.sampling
        assert (short.system, sampling.temperature, sampling.top_p) == (PAPER_SYSTEM, 0.7, 0.9)
        assert (sampling.max_new_tokens, sampling.samples) == (1024, 1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The pairs of runs that nothing interrupted, by configuration."""
    return {}


def test_a_model_answers_each_question(miniature: Config, straight: dict[str, bytes]):
    found = built(miniature)
    assert found[0]["question"] == "865230?"
    assert all(re.fullmatch(r"[0-9+=;#]+", row["rejected"]) for row in found)
    assert len({line["key"] for line in kept(miniature)}) == len(kept(miniature)) == counts(miniature)[-1]["all"] == 40
    straight["miniature"] = (Path(miniature["out"]) / "pairs.parquet").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_an_interrupted_run_goes_on_to_the_same_pairs(
    number: signal.Signals, miniature: Config, straight: dict[str, bytes], tmp_path: Path
):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(miniature), encoding="utf-8")
    answers, lines = tmp_path / "out/short_answers.jsonl", random.randrange(2, 30)
    arguments = [sys.executable, "-m", "thinkpo_jax.pairs", "--config", str(path)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 600
        while not answers.exists() or answers.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(number)
        told = process.communicate(timeout=600)[1]
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert "Traceback" not in told
    before = answers.read_bytes().rpartition(b"\n")[0] + b"\n"
    assert before.count(b"\n") < 41
    answers.write_bytes(before + b'{"key": "0123')  # as where the power fails within a line
    assert len(built(miniature)) > 30
    assert answers.read_bytes().startswith(before)
    assert len({line["key"] for line in kept(miniature)}) == len(kept(miniature)) == 40
    if "miniature" in straight:
        assert (tmp_path / "out/pairs.parquet").read_bytes() == straight["miniature"]


def test_other_settings_of_the_same_answers_are_an_error(miniature: Config, capsys: pytest.CaptureFixture[str]):
    miniature["long"]["generate"]["questions"] = 2
    assert build(miniature) == 0
    before = (Path(miniature["out"]) / "short_answers.jsonl").read_bytes()
    for changed in ("seed=1", "short.sampling.temperature=0.6", "short.system=Be brief."):
        assert build(miniature, changed) == 2
        told = capsys.readouterr().err
        assert f"{miniature['out']}/short_answers.jsonl: holds answers that were generated with other" in told
        assert changed.split("=")[0].split(".")[:2][-1] in told
    assert (Path(miniature["out"]) / "short_answers.jsonl").read_bytes() == before
    assert build(miniature, "select.gap=long", "short.sampling.batch_size=64") == 0  # changes no answer that is there
    assert (Path(miniature["out"]) / "short_answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"[1]\n", b"null\n", b"\xff\n", b"{\n", b"\n\n", b"[" * 100_000 + b"\n", b'{}\n{"key": "a"}\n',
                b'{}\n{"key": "a", "text": 5, "finished": true}\n', b'{}\n7\n'],
)  # fmt: skip
def test_a_damaged_file_of_answers_is_an_error(content: bytes, miniature: Config, capsys: pytest.CaptureFixture[str]):
    path = Path(miniature["out"]) / "short_answers.jsonl"
    path.parent.mkdir()
    path.write_bytes(content)
    assert build(miniature) == 2
    assert f"error: {path}: damaged: " in capsys.readouterr().err
    assert path.read_bytes() == content


def test_a_question_that_the_template_cannot_ask_is_refused(
    miniature: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"prompt": text, "response": "#1"} for text in ("123456?", "1<|end|>2?", "what?")]
    miniature["long"] = {"path": write(tmp_path / "long.jsonl", rows)}
    assert [row["question"] for row in built(miniature)] == ["123456?"]
    assert counts(miniature)[-1]["the question was refused"] == 2
    assert "2 of 3 questions were refused, the first because: the user's text holds '<|end|>'" in (
        capsys.readouterr().err
    )


def test_random_weights_answer_nothing(miniature: Config, capsys: pytest.CaptureFixture[str]):
    assert build(miniature, "short.model.weights=random") == 2
    assert "model.weights: a model with random weights has no answers" in capsys.readouterr().err


# Answers of a server.


def test_a_server_is_asked_as_in_the_paper(joined: Config, tmp_path: Path):
    with serving(said("\\boxed{4}")) as endpoint:
        found = built(served(joined, endpoint.url))
    assert [row["rejected"] for row in found] == ["\\boxed{4}"] * 4
    assert len(endpoint.bodies) == 3  # one question stands twice
    first = endpoint.bodies[0]
    messages = [{"role": "system", "content": PAPER_SYSTEM}, {"role": "user", "content": "What is\n 1+1?"}]
    assert first["messages"] == messages
    assert (first["model"], first["temperature"], first["top_p"], first["max_tokens"]) == ("tiny", 0.7, 0.9, 1024)


def test_a_server_that_fails_is_named_and_a_rerun_asks_only_the_rest(
    joined: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"prompt": f"{i}?", "response": "so it is " + str(i)} for i in range(8)]
    joined["long"] = {"path": write(tmp_path / "long.jsonl", rows)}

    def answer(_: int, body: dict[str, Any]) -> Reply:
        return said(body["messages"][-1]["content"][:-1])

    with serving(answer) as endpoint:
        straight = built(served(joined, endpoint.url, out=str(tmp_path / "straight")))
    with serving(lambda number, body: answer(number, body) if number < 3 else failed(500)) as endpoint:
        config = served(joined, endpoint.url)
        assert build(config) == 1
        assert len(endpoint.bodies) == 3 + 2
        error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {endpoint.url}: HTTP 500 (out of order), in up to 2 tries.")
    assert [line["text"] for line in kept(config)] == ["0", "1", "2"]
    with serving(answer) as endpoint:
        assert built(served(joined, endpoint.url)) == straight
    assert [body["messages"][-1]["content"] for body in endpoint.bodies] == [f"{i}?" for i in range(3, 8)]
    with serving(failed(500)) as endpoint:
        assert built(served(joined, endpoint.url)) == straight
        assert endpoint.bodies == []


def test_a_refused_question_is_counted_and_asked_again_on_a_rerun(joined: Config, capsys: pytest.CaptureFixture[str]):
    def script(_: int, body: dict[str, Any]) -> Reply:
        return failed(400, "too long") if body["messages"][-1]["content"] == "2+2?" else said("7")

    with serving(script) as endpoint:
        assert [row["question"] for row in built(served(joined, endpoint.url))] == ["What is\n 1+1?", "3+3?"]
    assert {what: n for what, n in counts(joined)[-1].items() if n} == {"all": 4, "the question was refused": 2}
    assert "2 of 4 questions were refused, the first because: too long" in capsys.readouterr().err
    with serving(said("7")) as endpoint:
        assert len(built(served(joined, endpoint.url))) == 4
        assert len(endpoint.bodies) == 1


def test_an_answer_that_the_limit_cut_is_left_out(joined: Config):
    def script(_: int, body: dict[str, Any]) -> Reply:
        return said("7", "length" if body["messages"][-1]["content"] == "2+2?" else "stop")

    with serving(script) as endpoint:
        assert [row["question"] for row in built(served(joined, endpoint.url))] == ["What is\n 1+1?", "3+3?"]
        assert counts(joined)[-1]["the short answer was cut"] == 2
    assert len(endpoint.bodies) == 3
