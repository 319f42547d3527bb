"""Tokenized sources are cached by content. Damage and concurrent writers are handled."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizer import TEMPLATE, byte_tokenizer
from support.tokenized import ROW, decode_first_segments, error_message, record_encoded_answers, tokenize, write_rows

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer, RenderedPrompt
from thinkpo_jax.data.examples import TokenizedDataset
from thinkpo_jax.data.record_formats import SftDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.files import cache_folder


@pytest.fixture
def encoded_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The answers that were tokenized since the test began."""
    return record_encoded_answers(monkeypatch)


def segments_of(examples: TokenizedDataset) -> list[list[tuple[list[int], int]]]:
    """Returns copies of the token ids, which may be mapped from files that change later."""
    return [[(segment.token_ids.tolist(), segment.answer_start) for segment in example] for example in examples]


def is_same(first: TokenizedDataset, second: TokenizedDataset) -> bool:
    return first.reports == second.reports and segments_of(first) == segments_of(second)


def test_a_second_run_tokenizes_nothing(tmp_path: Path, chat: ChatTokenizer, encoded_answers: list[str]):
    path = write_rows(tmp_path / "rows.jsonl", ROW, ROW | {"response": "b" * 999}, ROW | {"response": "c"})
    first = tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=0)
    assert len(encoded_answers) == 3
    encoded_answers.clear()
    assert is_same(first, tokenize(SftDataConfig(path=str(path)), chat, row_length=500, seed=1))
    weighted = tokenize_sources([SftDataConfig(path=str(path), weight=2)], chat, row_length=500, seed=0)
    assert is_same(first, TokenizedDataset(weighted.sources, [1], seed=0))
    assert encoded_answers == []


@pytest.mark.parametrize(
    "change",
    [
        {"content": ROW | {"response": "5"}},
        {"row_length": 499},
        {"config": {"prompt_suffix": "!"}},
        {"config": {"on_bad_row": "skip"}},
        {"config": {"limit": 1}},
        {"tokenizer": {"eos": "<other>"}},
        {"tokenizer": {"template": TEMPLATE + " "}},
        {"tokenizer": {"eos": "<end>"}},
    ],
    ids=str,
)
def test_a_change_that_affects_the_tokens_is_a_new_cache_entry(
    change: dict[str, Any], tmp_path: Path, chat: ChatTokenizer, encoded_answers: list[str]
):
    path = write_rows(tmp_path / "rows.jsonl", ROW)
    tokenize(SftDataConfig(path=str(path)), chat, row_length=500)
    encoded_answers.clear()
    write_rows(path, change.get("content", ROW))
    tokenizer = change.get("tokenizer")
    other = ChatTokenizer.from_folder(byte_tokenizer(tmp_path / "other", **tokenizer)) if tokenizer else chat
    config = SftDataConfig(path=str(path), **change.get("config", {}))
    tokenize(config, other, row_length=change.get("row_length", 500))
    assert len(encoded_answers) == 1


def test_another_bos_token_is_a_new_cache_entry(tmp_path: Path, encoded_answers: list[str]):
    """The template may write it, but only tokenizer_config.json contains it."""
    path = write_rows(tmp_path / "rows.jsonl", ROW)
    folder = byte_tokenizer(tmp_path / "model", template="{{ bos_token }}" + TEMPLATE)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    prompts: list[str] = []
    for bos in ("<eos>", "<end>"):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": bos}))
        chat = ChatTokenizer.from_folder(folder)
        ((prompt, _),) = decode_first_segments(tokenize(SftDataConfig(path=str(path)), chat, row_length=500), chat)
        prompts.append(prompt)
    assert prompts == ["<eos>[user]2+2?[assistant]", "<end>[user]2+2?[assistant]"]
    assert len(encoded_answers) == 2


@pytest.mark.parametrize("name", ["tokens.int32", "segments.npy", "report.json"])
@pytest.mark.parametrize("damage", ["removed", "flipped", "shortened", "emptied"])
def test_a_damaged_entry_is_detected_and_built_again(
    name: str,
    damage: str,
    tmp_path: Path,
    chat: ChatTokenizer,
    capsys: pytest.CaptureFixture[str],
    encoded_answers: list[str],
):
    path = write_rows(tmp_path / "rows.jsonl", ROW, ROW | {"response": "7"})
    segments = segments_of(tokenize(SftDataConfig(path=str(path)), chat, row_length=500))
    (file,) = cache_folder("tokens").glob(f"*/{name}")
    content = bytearray(file.read_bytes())
    content[-3 if name != "report.json" else content.index(b"digest") + 12] ^= 1
    file.unlink()
    if damage != "removed":
        file.write_bytes({"flipped": bytes(content), "shortened": bytes(content[:-4]), "emptied": b""}[damage])
    encoded_answers.clear()
    assert segments_of(tokenize(SftDataConfig(path=str(path)), chat, row_length=500)) == segments
    assert sorted(encoded_answers) == ["4", "7"]
    assert "the cached tokens are damaged. They are built again." in capsys.readouterr().err
    encoded_answers.clear()
    tokenize(SftDataConfig(path=str(path)), chat, row_length=500)
    assert encoded_answers == []


def test_two_processes_may_build_the_same_entry_at_the_same_time(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    """The process that finishes second finds the entry of the first one."""
    path = write_rows(tmp_path / "rows.jsonl", ROW, ROW)
    encode_answer = ChatTokenizer.encode_answer
    has_started, datasets = [], []

    def encode_after_another_process(self: ChatTokenizer, prompt: RenderedPrompt, text: str) -> list[int]:
        if not has_started:
            has_started.append(True)
            datasets.append(tokenize(SftDataConfig(path=str(path)), chat, row_length=500))
        return encode_answer(self, prompt, text)

    monkeypatch.setattr(ChatTokenizer, "encode_answer", encode_after_another_process)
    assert is_same(tokenize(SftDataConfig(path=str(path)), chat, row_length=500), datasets[0])
    assert len([entry for entry in cache_folder("tokens").iterdir() if not entry.name.startswith(".")]) == 1


def test_tokenization_that_stops_leaves_no_entry(tmp_path: Path, chat: ChatTokenizer):
    path = write_rows(tmp_path / "rows.jsonl", ROW, b"{\n")
    assert "line 2" in error_message(SftDataConfig(path=str(path)), chat)
    assert list(cache_folder("tokens").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = error_message(SftDataConfig(path=str(write_rows(tmp_path / "rows.jsonl", ROW))), chat)
    assert message.startswith(f"{tmp_path / 'file' / 'thinkpo_jax' / 'tokens'}: cannot save tokenized data there")
    assert "Set XDG_CACHE_HOME" in message
