"""Weights decide how often an epoch reads the examples of each source."""

from collections import Counter
from pathlib import Path

import pytest
from support.tokenized import decode_first_segments, tokenize, write_rows

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import TokenizedDataset
from thinkpo_jax.data.record_formats import SftDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.config import UserError


def write_sources(tmp_path: Path) -> list[Path]:
    """Writes two files of four and of ten rows, with answers "a0", ... and "b0", ..."""
    return [
        write_rows(tmp_path / f"{name}.jsonl", *({"prompt": "q", "response": f"{name}{i}"} for i in range(count)))
        for name, count in (("a", 4), ("b", 10))
    ]


def answers_of(examples: TokenizedDataset, chat: ChatTokenizer) -> list[str]:
    return [answer.removesuffix("<end>") for _, answer in decode_first_segments(examples, chat)]


@pytest.mark.parametrize(("weights", "counts"), [((1, 1), (4, 10)), ((2, 0.5), (8, 5)), ((2.5, 0.1), (10, 1))], ids=str)
def test_a_weight_is_how_often_an_epoch_reads_an_example(
    weights: tuple[float, float], counts: tuple[int, int], tmp_path: Path, chat: ChatTokenizer
):
    configs = [SftDataConfig(path=str(p), weight=w) for p, w in zip(write_sources(tmp_path), weights, strict=True)]
    examples = tokenize_sources(configs, chat, row_length=1000, seed=0)
    answers = answers_of(examples, chat)
    assert [sum(answer[0] == name for answer in answers) for name in "ab"] == list(counts)
    for name, weight in zip("ab", weights, strict=True):
        reads = Counter(answer for answer in answers if answer[0] == name)
        assert all(int(weight) <= count <= int(weight) + 1 for count in reads.values())
    lengths = [[len(segment.token_ids) for segment in example] for example in examples]
    assert examples.prompt_and_answer_lengths().sum(axis=-1).tolist() == lengths
    assert examples.digest() == tokenize_sources(configs, chat, row_length=1000, seed=0).digest()


def test_a_weight_that_selects_no_example_is_an_error(tmp_path: Path, chat: ChatTokenizer):
    config = SftDataConfig(path=str(write_sources(tmp_path)[0]), weight=0.01)
    with pytest.raises(UserError, match=r"a\.jsonl: weight 0\.01 selects none of its 4 examples\. Increase the weight"):
        tokenize(config, chat)


def test_the_examples_that_a_weight_selects_do_not_depend_on_the_order_of_the_sources(
    tmp_path: Path, chat: ChatTokenizer
):
    configs = [SftDataConfig(path=str(path), weight=0.5) for path in write_sources(tmp_path)]
    datasets = [tokenize_sources(order, chat, row_length=1000, seed=0) for order in (configs, configs[::-1])]
    answers, reversed_answers = (set(answers_of(examples, chat)) for examples in datasets)
    assert answers == reversed_answers
    assert datasets[0].describe_sources()[0].endswith("; each read 0.5 times an epoch")


def test_the_examples_that_a_weight_selects_depend_on_the_seed(tmp_path: Path, chat: ChatTokenizer):
    config = SftDataConfig(path=str(write_sources(tmp_path)[1]), weight=0.5)
    selections = [answers_of(tokenize(config, chat, seed=seed), chat) for seed in range(4)]
    assert all(len(set(answers)) == 5 for answers in selections)
    assert len({tuple(answers) for answers in selections}) > 1
