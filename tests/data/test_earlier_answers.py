"""`train_on: all` trains every answer of a conversation, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.real_tokenizers import ASSISTANT_HEADER, END_OF_TURN
from support.tokenized import error_message, only_example, tokenize, turns, write_rows

from thinkpo_jax.data.batches import BatchConfig, BatchPlan
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import Segment, TokenizedDataset
from thinkpo_jax.data.record_formats import SftDataConfig

FIRST, SECOND, LAST = "<think>\ntwo\n</think>\n\nIt is 4.", "  Then 6: ünï\n\n", "<think>\nfour\n</think>\n\nSo 8."
CONVERSATION = turns("What is 2+2?", FIRST, "And 3+3?\n", SECOND, "4+4?", LAST)


def read(path: Path, chat: ChatTokenizer, *rows: Any, **config: Any) -> TokenizedDataset:
    return tokenize(SftDataConfig(path=str(write_rows(path / "rows.jsonl", *rows)), **config), chat)


def trained_parts(segment: Segment, chat: ChatTokenizer) -> list[str]:
    """Returns the text of each run of trained tokens."""
    indices = segment.loss_indices
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    return [chat.tokenizer.decode(segment.token_ids[run]) for run in runs]


@pytest.mark.parametrize("name", END_OF_TURN)
def test_every_answer_is_trained_as_the_template_writes_it(
    name: str, tmp_path: Path, load: Callable[[str], ChatTokenizer]
) -> None:
    chat = load(name)
    all_turns, last = (read(tmp_path, chat, {"messages": CONVERSATION}, train_on=key) for key in ("all", "last"))
    (segment,), (last_segment,) = only_example(all_turns), only_example(last)
    np.testing.assert_array_equal(segment.token_ids, last_segment.token_ids)
    # Qwen3 and R1 drop the thoughts of earlier answers. Llama trims an answer.
    first = {"qwen3": "It is 4.", "r1": "\n\nIt is 4."}.get(name, FIRST)
    second = SECOND.strip() if name == "llama3_2" else SECOND
    open_tag = "<think>\n" if name == "r1" else ""  # the prompt opens it
    expected = [first, second, LAST.removeprefix(open_tag)]
    assert trained_parts(segment, chat) == [text + END_OF_TURN[name] for text in expected]
    assert trained_parts(last_segment, chat) == [expected[-1] + END_OF_TURN[name]]
    for start, _ in segment.earlier_answers:
        assert chat.tokenizer.decode(segment.token_ids[:start]).endswith(ASSISTANT_HEADER[name])


def test_the_thought_of_an_earlier_turn_follows_the_rule_of_the_template(
    tmp_path: Path, load: Callable[[str], ChatTokenizer]
) -> None:
    messages = [{**message} for message in CONVERSATION]
    messages[1] |= {"content": "It is 4.", "reasoning_content": "two"}
    keeps = "{% for m in messages %}[{{ m.role }}]{% if m.thinking %}<t>{{ m.thinking }}</t>{% endif %}{{ m.content }}"
    keeps += "{{ '<end>' if m.role == 'assistant' }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    byte_tokenizer(tmp_path, template=keeps)
    for name in ("qwen2_5", "llama3_2"):  # they keep a thought in the text, so one in a field goes into the text
        (segment,) = only_example(read(tmp_path, load(name), {"messages": messages}, train_on="all"))
        assert trained_parts(segment, load(name))[0] == f"<think>\ntwo\n</think>\n\nIt is 4.{END_OF_TURN[name]}"
    for chat, first in (
        (load("qwen3"), "It is 4.<|im_end|>"),
        (ChatTokenizer.from_folder(tmp_path), "<t>two</t>It is 4.<end>"),
    ):
        (segment,) = only_example(read(tmp_path, chat, {"messages": messages}, train_on="all"))
        assert trained_parts(segment, chat)[0] == first


def test_a_batch_predicts_every_trained_token_from_the_token_before_it(tmp_path: Path, chat: ChatTokenizer) -> None:
    rows = [{"messages": turns("q", "a", "p", "bc")}, {"messages": turns("q", "d")}, {"messages": CONVERSATION}]
    dataset = read(tmp_path, chat, *rows, train_on="all")
    plan = BatchPlan(dataset, BatchConfig(row_length=256, size=3), seed=0, num_shards=1, num_updates=1, epochs=1)
    batch = plan[0]
    is_used = batch.loss_positions < batch.token_ids.shape[-1]
    micro, row, _ = np.nonzero(is_used)
    positions = batch.loss_positions[is_used]
    np.testing.assert_array_equal(batch.token_ids[micro, row, positions + 1], batch.target_ids[is_used])
    segment_ids = batch.segment_ids[micro, row]
    assert (
        segment_ids[np.arange(len(positions)), positions] == segment_ids[np.arange(len(positions)), positions + 1]
    ).all()
    (first,), (second,), (third,) = dataset
    expected = sorted(np.concatenate([segment.token_ids[segment.loss_indices] for segment in (first, second, third)]))
    assert sorted(batch.target_ids[is_used]) == expected
    assert trained_parts(first, chat) == ["a<end>", "bc<end>"]
    assert plan.count_work(batch).loss_tokens == len(expected)


def test_the_report_says_that_earlier_answers_are_not_trained(tmp_path: Path, chat: ChatTokenizer) -> None:
    rows = [{"messages": CONVERSATION}, {"messages": turns("q", "a")}]
    notes = [read(tmp_path, chat, *rows, train_on=key).describe_sources() for key in ("last", "all")]
    texts = [
        [line for line in lines if "earlier answers of 1 rows are not trained (train_on: last)" in line]
        for lines in notes
    ]
    assert list(map(len, texts)) == [1, 0]


def test_the_cache_and_the_digest_hold_the_earlier_answers(tmp_path: Path, chat: ChatTokenizer) -> None:
    rows = [{"messages": CONVERSATION}, {"messages": turns("q", "a")}, {"messages": turns("q", "a", "p", "b")}]
    new, cached = (read(tmp_path, chat, *rows, train_on="all") for _ in range(2))
    last = read(tmp_path, chat, *rows)
    assert [example[0].earlier_answers for example in new] == [example[0].earlier_answers for example in cached]
    assert [len(example[0].earlier_answers) for example in new] == [2, 0, 1]
    assert new.digest() == cached.digest() != last.digest()


@pytest.mark.parametrize(
    "template",
    [
        # The number of answers, and the length of an answer, change the text around it.
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.content|length }}<end>{% endfor %}",
        # Earlier answers are left out.
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}[{{ m.role }}]{{ m.content }}<end>{% endif %}"
        "{% endfor %}[x]",
        # Without end tokens.
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if loop.last %}<end>{% endif %}{% endfor %}",
    ],
)
def test_answers_that_cannot_be_found_make_a_row_bad(template: str, tmp_path: Path) -> None:
    chat = ChatTokenizer.from_folder(byte_tokenizer(tmp_path, template=template))
    path = write_rows(tmp_path / "rows.jsonl", {"messages": turns("q", "abc", "p", "b")})
    message = error_message(SftDataConfig(path=str(path), train_on="all"), chat)
    assert message.startswith((f"{path}, line 1: the earlier answers cannot be found", f"{path}, line 1: an earlier"))
    assert message.endswith("Use train_on: last.")
