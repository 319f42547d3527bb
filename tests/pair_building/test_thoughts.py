"""Thoughts in fields of their own are joined in long and short answers, and pairs with them are read back."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.pairs import UNBOXED, Config, built_pairs, run_pairs, write_jsonl
from support.server import said, serving

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.record_formats import PreferenceDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources

QUESTION = "What is 1+1?"
LONG: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi", "reasoning": "a greeting", "name": "bot"},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
]
TAGS = ["<reason>", "</reason> "]


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> Config:
    """A long answer with thoughts in fields, and a short answer of another file."""
    return {
        "out": str(tmp_path / "out"),
        "tokenizer": tokenizer,
        "thinking_tags": TAGS,
        "long": {"path": write_jsonl(tmp_path / "long.jsonl", [{"messages": LONG, "id": 3, "answer": "2"}])},
        "short": {"by": "join", "path": write_jsonl(tmp_path / "short.jsonl", [{"prompt": QUESTION, "response": "3"}])},
        "filters": UNBOXED,
    }


def test_thoughts_of_long_answers_are_joined_and_read_back(
    config: Config, tokenizer: str, capsys: pytest.CaptureFixture[str]
):
    config["long"]["reference"] = "answer"
    (pair,) = built_pairs(config)
    assert (pair["chosen"], pair["rejected"]) == ("<reason>one and one</reason> 2", "3")
    assert pair["prompt"][1] == {"role": "assistant", "content": "Hi", "thinking": "a greeting"}
    log, path = capsys.readouterr().err, config["long"]["path"]
    for note in ("form of the rows: messages (messages)", "columns that are not read: id (1 rows)"):
        assert f"{path}: {note}\n" in log
    assert f"{path}: thoughts in a field of their own are joined, with <reason>, in 1 rows\n" in log
    assert f"{path}: fields of messages that are not read: name (1 rows)\n" in log
    chat = ChatTokenizer.from_folder(Path(tokenizer), thinking_tags=(TAGS[0], TAGS[1]))
    source = PreferenceDataConfig(path=str(Path(config["out"]) / "pairs.parquet"))
    ((chosen, _),) = tokenize_sources([source], chat, row_length=1000, seed=0)
    # The template of the tokenizer does not read the field, so the thought of the first answer goes into the text.
    expected = f"[user]Hello[assistant]<reason>a greeting</reason> Hi<end>[user]{QUESTION}[assistant]"
    assert chat.tokenizer.decode(chosen.token_ids) == f"{expected}<reason>one and one</reason> 2<end>"


def test_the_filter_complete_knows_the_tags(config: Config, capsys: pytest.CaptureFixture[str]):
    row = {"prompt": QUESTION, "response": "<reason>never ends"}
    config["long"] = {"path": write_jsonl(Path(config["long"]["path"]), [row])}
    config["filters"] = {**UNBOXED, "complete": True}
    assert run_pairs(config) == 1
    assert "1 the long answer leaves a thought or solution open" in capsys.readouterr().err


def test_a_server_gets_the_arguments_and_its_thoughts_are_joined_once(config: Config, tmp_path: Path):
    with serving(said("3", reasoning_content="quick")) as endpoint:
        server = {"url": endpoint.url, "model": "m", "template_arguments": {"enable_thinking": True}}
        config["short"] = {"by": "sample", "engine": "server", "server": server, "system": None}
        (pair,) = built_pairs(config)
        assert pair["rejected"] == "<reason>quick</reason> 3"
        assert endpoint.bodies[0]["chat_template_kwargs"] == {"enable_thinking": True}
        saved = [json.loads(line) for line in (tmp_path / "out" / "short_answers.jsonl").read_text().splitlines()]
        assert saved[0]["thinking_tags"] == TAGS
        assert saved[1]["text"] == pair["rejected"]
        config["thinking_tags"] = None
        assert run_pairs(config) == 2  # the saved answers have other tags
        assert len(endpoint.bodies) == 1
