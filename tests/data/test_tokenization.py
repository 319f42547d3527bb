"""Every row becomes an example, is dropped and counted, or stops the run with its location."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import needs_data
from support.paths import DATA
from support.tokenized import (
    PAIR,
    PROMPT,
    ROW,
    decode,
    error_message,
    only_example,
    record_encoded_answers,
    tokenize,
    write_rows,
)

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.config import UserError

# Rows that are too long.


def test_a_row_that_is_too_long_is_dropped_and_counted_or_stops_the_run(tmp_path: Path, chat: ChatTokenizer):
    row_length = len(f"{PROMPT}{'a' * 20}") + 1
    rows = [{"prompt": "q", "response": "a" * count} for count in (1, 21, 20, 22)]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    examples = tokenize(SftDataConfig(path=str(path)), chat, row_length=row_length)
    assert (examples.reports[0].rows, len(examples)) == (4, 2)
    assert examples.reports[0].dropped == {f"longer than row_length {row_length}": 2}
    assert examples.prompt_and_answer_lengths().sum(axis=(1, 2)).tolist() == [row_length - 19, row_length]
    message = (
        rf"line 2: {row_length + 1} tokens do not fit row_length {row_length}\. Increase batch\.row_length, or set "
        "`over_length` to `drop` or `cut`"
    )
    with pytest.raises(UserError, match=message):
        tokenize(SftDataConfig(path=str(path), over_length="raise"), chat, row_length=row_length)


def test_all_rows_of_a_source_may_be_dropped(tmp_path: Path, chat: ChatTokenizer):
    path = write_rows(tmp_path / "rows.jsonl", ROW, ROW)
    examples = tokenize(SftDataConfig(path=str(path)), chat, row_length=3)
    assert (len(examples), list(examples), examples.prompt_and_answer_lengths().shape) == (0, [], (0, 1, 2))
    assert str(examples.reports[0]) == f"0 of 2 rows of {path}; 2 left out: longer than row_length 3"


def test_a_pair_is_complete_or_dropped(tmp_path: Path, chat: ChatTokenizer):
    """The length of one answer never changes the other."""
    row = {"prompt": "q", "chosen": "a" * 10_000, "rejected": "b" * 300}
    path = write_rows(tmp_path / "rows.jsonl", ROW, row)
    pair_length = sum(len(f"{PROMPT}{row[side]}") + 1 for side in ("chosen", "rejected"))
    for row_length, num_used in ((pair_length, 2), (pair_length - 1, 1)):
        examples = tokenize(PreferenceDataConfig(path=str(path)), chat, row_length=row_length)
        assert len(examples) == num_used
        assert sum(examples.reports[0].dropped.values()) == 2 - num_used
        assert all(segment.answer_start < len(segment.token_ids) for pair in examples for segment in pair)
    chosen, rejected = tokenize(PreferenceDataConfig(path=str(path)), chat, row_length=pair_length)[1]
    assert decode(chosen, chat) == (PROMPT, row["chosen"] + "<end>")
    assert decode(rejected, chat) == (PROMPT, row["rejected"] + "<end>")


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12),
    row_length=st.integers(40, 120),
)
def test_every_row_is_complete_and_in_order_or_counted(
    lengths: list[tuple[int, int]], row_length: int, tmp_path_factory: pytest.TempPathFactory, chat: ChatTokenizer
):
    rows = [
        {"prompt": f"{i}?", "chosen": "a" * long, "rejected": "b" * short} for i, (long, short) in enumerate(lengths)
    ]
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", *rows)
    overhead = len("[user]?[assistant]") + 1
    fitting_rows = [
        row for row in rows
        if len(row["chosen"] + row["rejected"]) + 2 * (overhead + len(row["prompt"]) - 1) <= row_length
    ]  # fmt: skip
    examples = tokenize(PreferenceDataConfig(path=str(path)), chat, row_length=row_length)
    assert examples.reports[0].rows == len(rows) == len(examples) + sum(examples.reports[0].dropped.values())
    answers = [tuple(decode(segment, chat)[1] for segment in pair) for pair in examples]
    assert answers == [(row["chosen"] + "<end>", row["rejected"] + "<end>") for row in fitting_rows]
    assert examples.prompt_and_answer_lengths().sum(axis=(1, 2)).tolist() == [
        sum(len(segment.token_ids) for segment in pair) for pair in examples
    ]


@pytest.mark.parametrize("column", ["response", "prompt"])
def test_a_text_that_cannot_fit_is_not_tokenized(
    column: str, tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    path = write_rows(tmp_path / "rows.jsonl", ROW | {column: "a" * 1_000_000}, ROW)
    encoded_answers = record_encoded_answers(monkeypatch)
    examples = tokenize(SftDataConfig(path=str(path)), chat, row_length=1000)
    assert examples.reports[0].dropped == {"longer than row_length 1000": 1}
    assert [len(text) for text in encoded_answers] == [1]


# Rows that cannot be used.


def test_bad_rows_are_skipped_and_counted_by_reason(tmp_path: Path, chat: ChatTokenizer):
    bad = [b"{\n", {"prompt": "q"}, ROW | {"response": None}, ROW | {"response": 3}, ROW | {"response": "a<end>b"}]
    path = write_rows(tmp_path / "rows.jsonl", *bad, ROW, [1], ROW)
    (report,) = tokenize(SftDataConfig(path=str(path), response="response", on_bad_row="skip"), chat).reports
    expected = {"not JSON": 1, "missing field": 1, "no text": 2, "cannot be tokenized": 1, "not an object": 1}
    assert (report.rows, report.num_used, report.dropped, report.stopping_error_by_reason) == (8, 2, expected, {})
    first_error = f"{path}, line 3, response: expected a text, found null."
    assert report.first_error_by_reason["no text"] == first_error
    assert report.first_error_by_reason.keys() == expected.keys()
    assert str(report).startswith(
        f"2 of 8 rows of {path}; 1 left out: not JSON; 1 left out: missing field; 2 left out:"
    )


def test_keep_going_counts_the_rows_that_would_stop_the_run(tmp_path: Path, chat: ChatTokenizer):
    """`train --check` uses this, and shows the errors that would have stopped the run."""
    path = write_rows(tmp_path / "rows.jsonl", ROW, b"{\n", b"[\n", ROW | {"response": "a" * 2000})
    for config in (SftDataConfig(path=str(path)), SftDataConfig(path=str(path), over_length="raise")):
        (report,) = tokenize_sources([config], chat, row_length=1000, seed=0, keep_going=True).reports
        assert "line 2: not valid JSON" in report.stopping_error_by_reason["not JSON"]
        assert ("longer than row_length 1000" in report.stopping_error_by_reason) == (config.over_length == "raise")
        assert report.dropped == {"not JSON": 2, "longer than row_length 1000": 1}
        assert report.first_error_by_reason.keys() == {"not JSON"}  # a row that is too long is not a bad row
        with pytest.raises(UserError, match="line 2: not valid JSON"):  # also when the source is cached
            tokenize_sources([config], chat, row_length=1000, seed=0)


def test_answers_with_the_same_tokens_are_not_a_pair(tmp_path: Path):
    """A tokenizer that composes characters gives both spellings of é the same tokens."""
    if not (DATA / "tokenizers" / "qwen2_5").is_dir():
        pytest.skip("the real tokenizers are not there")
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "q", "chosen": "caf\u00e9", "rejected": "cafe\u0301"})
    chat = ChatTokenizer.from_folder(DATA / "tokenizers" / "qwen2_5")
    message = error_message(PreferenceDataConfig(path=str(path)), chat)
    problem = "the two answers have the same tokens, but a pair needs different answers"
    assert message == f"{path}, line 1: {problem}. Change one of them or remove the row."


# Cutting.


@pytest.mark.parametrize(
    ("lengths", "room", "cut_lengths"),
    [
        ((30, 5), 37, (31, 6)),  # with their end tokens
        ((30, 5), 36, (30, 6)),
        ((30, 5), 30, (24, 6)),
        ((5, 30), 30, (6, 24)),
        ((30, 20), 30, (15, 15)),
        ((30, 5), 7, (3, 3)),
        ((30, 5), 2, (1, 1)),
    ],
)
def test_a_cut_removes_the_end_of_the_longer_answer_first(
    lengths: tuple[int, int], room: int, cut_lengths: tuple[int, int], tmp_path: Path, chat: ChatTokenizer
):
    """The end token is part of what is removed."""
    row = {"prompt": "q", "chosen": "a" * lengths[0], "rejected": "b" * lengths[1]}
    path = write_rows(tmp_path / "rows.jsonl", row)
    row_length = 2 * len(PROMPT) + room
    examples = tokenize(PreferenceDataConfig(path=str(path), over_length="cut"), chat, row_length=row_length)
    for segment, letter, length, cut_length in zip(only_example(examples), "ab", lengths, cut_lengths, strict=True):
        answer = letter * length + "<end>" if cut_length == length + 1 else letter * cut_length
        assert decode(segment, chat) == (PROMPT, answer)
    is_cut = [cut_length <= length for length, cut_length in zip(lengths, cut_lengths, strict=True)]
    assert examples.reports[0].num_truncated == sum(is_cut)


def test_a_pair_without_room_for_a_token_of_each_answer_is_dropped(tmp_path: Path, chat: ChatTokenizer):
    config = PreferenceDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", PAIR)), over_length="cut")
    for room, num_used in ((1, 0), (2, 1)):
        assert len(tokenize(config, chat, row_length=2 * len(PROMPT) + room)) == num_used


def test_answers_that_a_cut_makes_equal_are_dropped_and_counted(tmp_path: Path, chat: ChatTokenizer):
    row = {"prompt": "q", "chosen": "a" * 40 + "b", "rejected": "a" * 40 + "c"}
    config = PreferenceDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", row, PAIR)), over_length="cut")
    examples = tokenize(config, chat, row_length=2 * len(PROMPT) + 20)
    assert (len(examples), examples.reports[0].dropped) == (1, {"identical after the cut": 1})


def test_a_cut_that_removes_the_end_of_a_thought_is_counted(tmp_path: Path, chat: ChatTokenizer):
    answer = "<think>" + "t" * 50 + "</think>#4"
    rows = [{"prompt": "q", "response": answer}, {"prompt": "q", "response": answer[:20]}]
    config = SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", *rows)), over_length="cut")
    for row_length, num_unclosed in ((1000, 1), (len(PROMPT) + 40, 2)):
        examples = tokenize(config, chat, row_length=row_length)
        assert (len(examples), examples.reports[0].num_unclosed_thoughts) == (2, num_unclosed)


def test_a_cut_does_not_tokenize_much_more_than_could_fit(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    path = write_rows(tmp_path / "rows.jsonl", ROW | {"response": "a" * 1_000_000})
    encoded_answers = record_encoded_answers(monkeypatch)
    examples = tokenize(SftDataConfig(path=str(path), over_length="cut"), chat, row_length=1000)
    assert [len(segment.token_ids) for segment in only_example(examples)] == [1000]
    assert examples.reports[0].num_truncated == 1
    assert [len(text) for text in encoded_answers] < [100_000]


# Real data.


@needs_data
def test_real_pairs_have_complete_answers_to_one_prompt():
    path = DATA / "pairs" / "math500_pairs.jsonl"
    rows: list[Mapping[str, Any]] = [json.loads(row) for row in path.read_bytes().split(b"\n")[:-1]]
    chat = ChatTokenizer.from_folder(DATA / "tokenizers" / "qwen2_5")
    config = PreferenceDataConfig(path=str(path), prompt="question", chosen="long", rejected="short", limit=60)
    examples = tokenize(config, chat, row_length=4096)
    assert (len(rows), examples.reports[0].rows) == (522, 60)
    assert 0 < sum(examples.reports[0].dropped.values()) < 30
    assert len(examples) + sum(examples.reports[0].dropped.values()) == 60
    expected_answers = {(row["long"] + "<|im_end|>", row["short"] + "<|im_end|>") for row in rows[:60]}
    for chosen, rejected in examples:
        (prompt, long), (rejected_prompt, short) = decode(chosen, chat), decode(rejected, chat)
        assert prompt == rejected_prompt
        assert (long, short) in expected_answers
        assert len(chosen.token_ids) + len(rejected.token_ids) <= 4096
    assert max(examples.prompt_and_answer_lengths().sum(axis=(1, 2))) > 3000


@needs_data
def test_real_sft_rows_train_only_the_answer():
    path = DATA / "gsm8k" / "train.jsonl"
    chat = ChatTokenizer.from_folder(DATA / "tokenizers" / "qwen2_5")
    config = SftDataConfig(path=str(path), prompt="question", response="answer", limit=50, over_length="raise")
    examples = tokenize(config, chat, row_length=1024)
    rows = [json.loads(row) for row in path.read_bytes().split(b"\n")[:50]]
    assert (examples.reports[0].rows, len(examples), dict(examples.reports[0].dropped)) == (50, 50, {})
    for row, (segment,) in zip(rows, examples, strict=True):
        prompt, answer = decode(segment, chat)
        assert answer == row["answer"] + "<|im_end|>"
        assert row["question"] in prompt
        assert row["answer"] not in prompt
