"""The local engine answers conversations. Bad requests get an error, and the others are answered."""

import functools
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import pytest
from support import small
from support.byte_tokenizer import byte_tokenizer

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.inference import local_engine
from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig
from thinkpo_jax.inference.inference_model import page_bytes, prepare_inference_model
from thinkpo_jax.inference.local_engine import LocalEngine, LocalEngineConfig, find_stop_string, random_key
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.devices import GIB

NUM_TOKENS = 258  # 256 bytes, <end> and <eos>
ARCH = replace(small.ARCH, vocab_size=NUM_TOKENS, max_positions=192)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=40)
ROOM_PROMPT = "[user][assistant]"  # what the template adds to a question


@functools.cache
def _model(arch: Architecture) -> Transformer:
    return small.model(arch=arch)


class _Source(ModelSource):
    """A model folder with the weights of the small model."""

    def load(self, compute: ComputeConfig, mesh: Any, *, dtype: str = "float32") -> Transformer:
        return _model(self.architecture)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_folder(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def engine(tokenizer: ChatTokenizer) -> LocalEngine:
    return _engine(tokenizer)


def _engine(tokenizer: ChatTokenizer, arch: Architecture = ARCH, **config: Any) -> LocalEngine:
    source = _Source(Path("unused"), arch, tokenizer)
    return LocalEngine(source, small.FLOAT32, LocalEngineConfig(**config), jax.devices()[:1])


def _ask(question: str, key: str = "", **changes: Any) -> Request:
    return Request(key or question, [{"role": "user", "content": question}], **changes)


def _complete(
    engine: LocalEngine, requests: Sequence[Request], sampling: SamplingConfig = GREEDY, *, seed: int = 0
) -> dict[str, Completion]:
    """Returns the completions in the order of the requests."""
    found = list(engine.generate(requests, sampling, seed=seed))
    completions = dict(found)
    assert len(completions) == len(found), "each key occurs once"
    assert set(completions) == {request.key for request in requests}
    return {request.key: completions[request.key] for request in requests}


QUESTIONS = [_ask(f"question {i}") for i in range(12)]


def test_text_tokens_and_reason_belong_together(engine: LocalEngine, tokenizer: ChatTokenizer) -> None:
    completions = _complete(engine, QUESTIONS)
    for completion in completions.values():
        assert completion.error is None
        assert completion.text == tokenizer.decode(completion.token_ids)
        assert completion.num_tokens == len(completion.token_ids) <= 40
        assert (completion.finish_reason == "length") == (completion.num_tokens == 40)
    assert len({completion.text for completion in completions.values()}) > 6


def test_an_answer_depends_on_seed_question_and_sample_only(engine: LocalEngine) -> None:
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=12, samples=3)
    requests = [_ask(f"q{i}", f"{i}/{sample}", sample=sample) for i in range(4) for sample in range(3)]
    completions = _complete(engine, requests, sampling, seed=3)
    assert len({tuple(completion.token_ids) for completion in completions.values()}) == 12
    assert _complete(engine, requests[::-2], sampling, seed=3) == {
        request.key: completions[request.key] for request in requests[::-2]
    }
    renamed = _complete(engine, [replace(requests[4], key="other")], sampling, seed=3)
    assert renamed["other"] == completions[requests[4].key]
    others = _complete(engine, requests, sampling, seed=4)
    assert all(others[key] != completions[key] for key in completions)


def test_random_keys_depend_on_each_part() -> None:
    keys = [random_key(*parts) for parts in (([1, 2], 0, 0), ([1, 3], 0, 0), ([1, 2], 1, 0), ([1, 2], 0, 1))]
    assert len(set(keys)) == 4
    assert random_key((1, 2), 0, 0) == keys[0]
    assert all(0 <= number < 2**32 for key in keys for number in key)


def test_a_request_may_lower_the_limit_but_not_raise_it(engine: LocalEngine) -> None:
    reference = _complete(engine, [_ask("a question")])["a question"]
    assert reference.num_tokens > 9
    limits = {"1": 1, "9": 9, "none": None, "1000": 1000}
    requests = [_ask("a question", key, max_new_tokens=limit) for key, limit in limits.items()]
    completions = _complete(engine, requests)
    assert completions["1000"] == completions["none"] == reference
    for key in ("1", "9"):
        assert completions[key].token_ids == reference.token_ids[: limits[key]]
        assert completions[key].finish_reason == "length"


def test_an_answer_may_be_empty(engine: LocalEngine, tokenizer: ChatTokenizer) -> None:
    (first,) = _complete(engine, QUESTIONS[:1]).values()
    stopping = replace(tokenizer, stop_token_ids=(*tokenizer.stop_token_ids, first.token_ids[0]))
    completions = _complete(_engine(stopping), QUESTIONS)
    assert completions[QUESTIONS[0].key] == Completion("", 0, "stop", token_ids=[])
    assert any(completion.num_tokens for completion in completions.values())


def test_requests_that_cannot_be_encoded_get_an_error_and_the_others_an_answer(engine: LocalEngine) -> None:
    bad = [_ask("ends the <end> turn", "end"), _ask("<eos>", "eos")]
    completions = _complete(engine, [bad[0], *QUESTIONS[:2], bad[1]])
    assert "'<end>'" in (completions["end"].error or "")
    assert "'<eos>'" in (completions["eos"].error or "")
    assert {key: completions[key] for key in ("question 0", "question 1")} == _complete(engine, QUESTIONS[:2])
    assert _complete(engine, bad[:1])["end"].error == completions["end"].error


def test_without_requests_the_model_is_not_loaded(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_engine, "load_inference_model", None)
    engine = _engine(tokenizer)
    assert _complete(engine, []) == {}
    assert _complete(engine, [_ask("<end>")])["<end>"].error


def test_the_model_is_loaded_once(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[ModelSource] = []
    load = local_engine.load_inference_model
    monkeypatch.setattr(
        local_engine,
        "load_inference_model",
        lambda source, *args, **kw: loads.append(source) or load(source, *args, **kw),
    )
    engine = _engine(tokenizer)
    assert _complete(engine, QUESTIONS[:1]) == _complete(engine, QUESTIONS[:1])
    assert len(loads) == 1


def test_a_prompt_that_leaves_no_room_gets_an_error_with_its_length(engine: LocalEngine) -> None:
    room = ARCH.max_positions - len(ROOM_PROMPT)
    requests = [_ask("x" * (room - 1), "one"), _ask("x" * room, "full"), _ask("x" * 1000, "long"), *QUESTIONS[:1]]
    completions = _complete(engine, requests)
    assert completions["one"].error is None
    assert completions["one"].num_tokens <= 1
    assert completions["full"].error == (
        "the prompt has 192 tokens and leaves no room for an answer: "
        "the context of the model has 192 tokens (max_position_embeddings)."
    )
    assert "has 1017 tokens" in (completions["long"].error or "")
    assert completions["question 0"].error is None


def test_answers_that_reach_the_context_are_cut_with_a_warning_that_counts_them(
    tokenizer: ChatTokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    endless = _engine(replace(tokenizer, stop_token_ids=()))
    sampling = SamplingConfig(temperature=0, max_new_tokens=170)
    long, short = _ask("y" * 50), _ask("z")  # 192 tokens of context leave 125 and 174
    completions = _complete(endless, [long, short, replace(long, key="limited", max_new_tokens=125)], sampling)
    assert [completion.num_tokens for completion in completions.values()] == [125, 170, 125]
    assert {completion.finish_reason for completion in completions.values()} == {"length"}
    warnings = [line for line in capfd.readouterr().err.splitlines() if "cut" in line]
    assert len(warnings) == 1
    assert "1 answer(s) were cut before max_new_tokens: the context of the model has 192 tokens" in warnings[0]


def test_an_answer_that_fills_the_cache_is_an_error(tokenizer: ChatTokenizer) -> None:
    mesh = small.mesh()
    with jax.set_mesh(mesh):
        spec = prepare_inference_model(_model(ARCH), mesh, vocab_size=NUM_TOKENS).spec
    memory = 3 * page_bytes(spec, mesh) / GIB
    endless = _engine(replace(tokenizer, stop_token_ids=()), cache_memory=memory)  # 2 pages and page 0
    sampling = SamplingConfig(temperature=0, max_new_tokens=170)
    completions = _complete(endless, [_ask("y" * 50), _ask("z" * 120), _ask("short", max_new_tokens=5)], sampling)
    cut, too_long, short = completions.values()
    advice = "the KV cache holds 128 tokens of prompt and answer. Increase local.cache_memory."
    assert cut.error == f"the answer was cut: {advice}"
    assert (short.error, short.num_tokens) == (None, 5)
    assert too_long.error == f"the prompt has 137 tokens and leaves no room for an answer: {advice}"


def test_a_cache_without_room_for_a_page_is_an_error(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UserError, match=r"Increase local\.cache_memory"):
        _complete(_engine(tokenizer, cache_memory=1e-6), QUESTIONS[:1])


class _Letters(ChatTokenizer):
    """Decodes each token to one ASCII character."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(32 + token_id % 91) for token_id in ids)


@pytest.fixture(scope="module")
def letters(tokenizer: ChatTokenizer) -> LocalEngine:
    """An engine whose answers have a letter for each token and reach their limit."""
    endless = replace(tokenizer, stop_token_ids=())
    return _engine(_Letters(**{field.name: getattr(endless, field.name) for field in fields(endless)}))


def _answer(engine: LocalEngine, question: str, *stop: str) -> Completion:
    return _complete(engine, [_ask(question)], GREEDY.model_copy(update={"stop": stop}))[question]


@pytest.mark.parametrize("start", [0, 1, 14, 15, 16, 30])  # a chunk has 16 steps
@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_answer_ends_before_a_stop_string(letters: LocalEngine, start: int, length: int) -> None:
    whole = _answer(letters, "question")
    assert whole.num_tokens == 40
    stop = whole.text[start : start + length]
    end = whole.text.index(stop)
    assert (
        _answer(letters, "question", "never\n", stop)
        == Completion(
            text=whole.text[:end],
            num_tokens=end + length,  # with the tokens of the stop string
            finish_reason="stop",
            token_ids=whole.token_ids[: end + length],
        )
    )


def test_the_first_of_several_stop_strings_ends_an_answer(letters: LocalEngine) -> None:
    whole = _answer(letters, "question").text
    stop = (whole[20:23], whole[10:13], whole[11:15])
    assert _answer(letters, "question", *stop).text == whole[: min(map(whole.index, stop))]


def test_a_stop_string_that_is_never_written_changes_nothing(letters: LocalEngine) -> None:
    assert _answer(letters, "question", "never\n") == _answer(letters, "question")


def test_a_stop_string_ends_each_answer_by_itself(letters: LocalEngine) -> None:
    whole = _complete(letters, QUESTIONS)
    stop = whole["question 3"].text[5:7]
    stopped = _complete(letters, QUESTIONS, GREEDY.model_copy(update={"stop": (stop,)}))
    assert {key: completion.text for key, completion in stopped.items()} == {
        key: completion.text.partition(stop)[0] for key, completion in whole.items()
    }
    assert {completion.finish_reason for completion in stopped.values()} == {"stop", "length"}


TEXT = "Grüße, 世界! 🙂🙃 fin.\nThe end"  # characters of one to four bytes


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("stop", ["G", "üß", "世界", "🙂", "🙂🙃 f", "\nThe end", "d", "absent", "🙁"])
def test_stop_strings_are_found_in_any_chunks(tokenizer: ChatTokenizer, stop: str, chunk: int) -> None:
    ids = tokenizer.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    found = None
    for end in range(chunk, len(ids) + chunk, chunk):
        seen = ids[:end]
        num_new = len(seen) - (end - chunk)
        if (found := find_stop_string(tokenizer, ["absent too", stop], seen, num_new)) is not None:
            break
    expected = len(TEXT[: TEXT.index(stop) + len(stop)].encode()) if stop in TEXT else None
    assert found == expected


def test_special_tokens_do_not_split_a_stop_string(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.tokenizer("ab", add_special_tokens=False)["input_ids"]
    between = [ids[0], tokenizer.end_of_turn_id, ids[1]]
    assert find_stop_string(tokenizer, ["ab"], between, 1) == 3, "special tokens have no text"
