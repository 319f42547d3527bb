"""The trained ids are the whole answer and one end token, for every tokenizer and every chat template."""

import datetime
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokenizer import byte_tokenizer
from support.paths import DATA
from support.real_tokenizers import ASSISTANT_HEADER, END_OF_TURN, real_tokenizer

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer, Message
from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.runtime.config import UserError

QUESTION: list[Message] = [{"role": "user", "content": "What is 2+2?"}]
CONVERSATION: list[Message] = [
    {"role": "system", "content": "Think first."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\n4"},
    {"role": "user", "content": "And 3+3? "},
]
LONG = "<think>\nThree and three , that 's  six.\n\n  Wait: 3+3=6.\n</think>\n\nThe answer is \\boxed{6}.\n"
SHORT = "\\boxed{6}"
ANSWERS = (
    LONG,
    SHORT,
    "<think></think>6",
    "\n\n6\n",
    "<think>x",
    "x</think>",
    "é ﬁ 六 🙂 \u2028 \u200b\t.",
    " 's . , ?",
)


def example_ids(chat: ChatTokenizer, messages: list[Message], answer: str) -> tuple[list[int], list[int]]:
    """Returns the ids of the prompt, and the ids that are trained."""
    prompt = chat.encode_prompt(messages)
    return prompt.ids, chat.encode_answer(prompt, answer)


def decode(chat: ChatTokenizer, ids: Sequence[int]) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture(params=END_OF_TURN)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("messages", [QUESTION, CONVERSATION], ids=["question", "conversation"])
def test_trained_ids_are_the_answer_and_one_end_of_turn(
    name: str, messages: list[Message], load: Callable[[str], ChatTokenizer]
):
    chat = load(name)
    open_tag = "<think>" if name == "r1" else "\0"  # the prompt of R1 opens the thought: see the next test
    for answer in (answer for answer in ANSWERS if not answer.startswith(open_tag)):
        prompt, trained = example_ids(chat, messages, answer)
        assert prompt == chat.encode_prompt(messages).ids  # the same in training and in evaluation
        assert decode(chat, trained[:-1]) == unicodedata.normalize("NFC", answer)
        assert decode(chat, trained[-1:]) == END_OF_TURN[name]
        assert trained.count(chat.end_of_turn_id) == 1
        assert not set(trained[:-1]) & set(chat.tokenizer.all_special_ids)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>\nsix\n</think>\n\n6", "<think>\nsix\n</think>\n\n6"),
        ("<think>\n\nsix", "<think>\n\nsix"),
        ("<think>six</think>6", "<think>\nsix</think>6"),  # the newline belongs to the prompt
        ("6", "<think>\n6"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_not_opened_twice(
    answer: str, expected: str, load: Callable[[str], ChatTokenizer]
):
    chat = load("r1")
    prompt, trained = example_ids(chat, CONVERSATION, answer)
    assert prompt == chat.encode_prompt(CONVERSATION).ids
    assert decode(chat, prompt + trained).rpartition(ASSISTANT_HEADER["r1"])[2] == expected + END_OF_TURN["r1"]
    assert decode(chat, prompt).endswith(ASSISTANT_HEADER["r1"] + "<think>\n")


def test_no_template_removes_the_thought_of_a_finished_answer(name: str, load: Callable[[str], ChatTokenizer]):
    """DeepSeek's template deletes it from a message. The answer never passes through the template."""
    chat, answer = load(name), "<think>\ncarry the one\n</think>\n\n6"
    prompt, trained = example_ids(chat, QUESTION, answer)
    assert decode(chat, prompt + trained).endswith(ASSISTANT_HEADER[name] + answer + END_OF_TURN[name])
    rendered = chat.tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": answer}], tokenize=False)
    assert ("carry" in rendered) == (name != "r1")  # what the template alone would do


def test_chosen_and_rejected_share_the_prompt_and_differ_in_the_trained_ids(
    name: str, tmp_path: Path, load: Callable[[str], ChatTokenizer]
):
    chat = load(name)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "And 3+3?", "chosen": LONG, "rejected": SHORT}) + "\n", encoding="utf-8")
    ((chosen, rejected),) = tokenize_sources([PreferenceDataConfig(path=str(path))], chat, row_length=1000, seed=0)
    prompt = chat.encode_prompt([{"role": "user", "content": "And 3+3?"}]).ids
    for segment, answer in ((chosen, LONG), (rejected, SHORT)):
        assert segment.token_ids[: segment.answer_start].tolist() == prompt
        assert decode(chat, segment.token_ids.tolist()).endswith(answer + END_OF_TURN[name])
    assert decode(chat, rejected.token_ids[rejected.answer_start :].tolist()) == SHORT + END_OF_TURN[name]
    assert "think" not in decode(chat, rejected.token_ids[rejected.answer_start :].tolist())


# Rejected answers without a thought.

EMPTY_THOUGHTS = {"qwen2_5": "<think>\n\n</think>\n\n", "qwen3": "<think>\n\n</think>\n\n", "r1": "\n</think>\n\n"}


@pytest.mark.parametrize("name", EMPTY_THOUGHTS)
def test_an_empty_thought_belongs_to_the_prompt_and_is_not_trained(
    name: str, tmp_path: Path, load: Callable[[str], ChatTokenizer]
):
    chat = load(name)
    record = {"prompt": "And 3+3?", "chosen": "<think>\n3+3=6\n</think>\n\n6", "rejected": "It is 6."}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(record | {"rejected": "<think>\n?\n</think>\n\n5"}) + "\n")
    prompt = chat.encode_prompt([{"role": "user", "content": record["prompt"]}]).ids
    as_given, empty_block = (
        tokenize_sources(
            [PreferenceDataConfig(path=str(path), rejected_thinking=policy)], chat, row_length=1000, seed=0
        )
        for policy in ("as_given", "empty_block")
    )
    (chosen, rejected), (same_chosen, with_block) = as_given[0], empty_block[0]
    assert chosen.token_ids.tolist() == same_chosen.token_ids.tolist()
    assert rejected.token_ids[: rejected.answer_start].tolist() == prompt
    prompt_text = decode(chat, with_block.token_ids[: with_block.answer_start].tolist())
    assert prompt_text == decode(chat, prompt) + EMPTY_THOUGHTS[name]
    assert with_block.token_ids[: len(prompt)].tolist() == prompt
    for segment in (rejected, with_block):
        assert decode(chat, segment.token_ids[segment.answer_start :].tolist()) == f"It is 6.{END_OF_TURN[name]}"
    # A rejected answer with a thought stays as it is.
    assert [s.token_ids.tolist() for s in as_given[1]] == [s.token_ids.tolist() for s in empty_block[1]]


def test_a_thought_that_the_prompt_opens_must_end_too(tmp_path: Path, load: Callable[[str], ChatTokenizer]):
    """R1's prompt ends in <think>, so an answer without any tag never ends that thought."""
    answers = ["It is 6.", "<think>\n3+3", "3+3=6\n</think>\n\n6", "<think>\n3+3=6\n</think>\n\n6"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "And 3+3?", "response": answer}) + "\n" for answer in answers))
    for name, num_unclosed in (("r1", 2), ("qwen2_5", 1)):
        (report,) = tokenize_sources([SftDataConfig(path=str(path))], load(name), row_length=1000, seed=0).reports
        assert (report.num_used, report.num_unclosed_thoughts) == (4, num_unclosed), name


@pytest.mark.parametrize("name", ["qwen3"])
def test_the_empty_thought_is_what_qwen3_writes_without_thinking(name: str, load: Callable[[str], ChatTokenizer]):
    chat = load(name)
    rendered = chat.tokenizer.apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    prompt = chat.encode_prompt(QUESTION)
    assert rendered == prompt.text + decode(chat, chat.encode_empty_thought(prompt))


@pytest.mark.parametrize(("name", "keeps"), [("qwen2_5", True), ("qwen3", False), ("llama3_2", True), ("r1", False)])
def test_it_is_known_if_a_template_keeps_earlier_thoughts(name: str, keeps: bool, load: Callable[[str], ChatTokenizer]):
    assert load(name).template.keeps_earlier_thoughts() == keeps


def test_real_answers_decode_to_the_same_text(name: str, load: Callable[[str], ChatTokenizer]):
    chat = load(name)
    lines = (DATA / "pairs" / "math500_pairs.jsonl").read_bytes().split(b"\n")[:8]
    for record in map(json.loads, lines):
        for answer in (record["long"], record["short"]):
            prompt, trained = example_ids(chat, [{"role": "user", "content": record["question"]}], answer)
            assert decode(chat, trained[:-1]) == unicodedata.normalize("NFC", answer)
            assert record["question"].strip() in decode(chat, prompt)


@settings(max_examples=60, deadline=None)
@given(answer=st.text(min_size=1, max_size=40).map(lambda text: unicodedata.normalize("NFC", text)))
@pytest.mark.parametrize("tokenizer", ["qwen3", "llama3_2"])
def test_the_trained_ids_of_any_text_decode_to_it(tokenizer: str, answer: str, load: Callable[[str], ChatTokenizer]):
    chat = load(tokenizer)
    _, trained = example_ids(chat, QUESTION, answer)
    assert decode(chat, trained[:-1]) == answer
    assert chat.decode(trained) == answer


def test_a_sequence_begins_with_at_most_one_bos(name: str, load: Callable[[str], ChatTokenizer]):
    chat = load(name)
    bos = chat.tokenizer.bos_token_id
    assert (bos is not None) == (name in ("llama3_2", "r1"))
    if bos is not None:
        prompt, trained = example_ids(chat, CONVERSATION, LONG)
        assert [i for i, token in enumerate(prompt + trained) if token == bos] == [0]


def test_the_end_of_turn_token_of_the_template_stops_a_generation(name: str, load: Callable[[str], ChatTokenizer]):
    chat = load(name)
    assert decode(chat, [chat.end_of_turn_id]) == END_OF_TURN[name]
    assert chat.stop_token_ids == (chat.end_of_turn_id,)
    finished = [*QUESTION, {"role": "assistant", "content": "ANSWER"}]
    rendered = chat.tokenizer.apply_chat_template(finished, tokenize=False)
    assert rendered.partition("ANSWER")[2].startswith(END_OF_TURN[name])


def test_the_end_of_turn_token_is_added_to_the_stop_tokens_of_the_model():
    folder = real_tokenizer("llama3_2")
    assert ChatTokenizer.from_folder(folder, stop_token_ids=[128001, 128009]).stop_token_ids == (128001, 128009)
    assert ChatTokenizer.from_folder(folder, stop_token_ids=[128001]).stop_token_ids == (128001, 128009)


@pytest.mark.parametrize("eos", ["<end>", "<eos>", None])
def test_the_end_of_turn_token_does_not_depend_on_the_eos_token(eos: str | None, tmp_path: Path):
    """The EOS token of a base model is often its padding token, and not the token that ends a turn."""
    chat = ChatTokenizer.from_folder(byte_tokenizer(tmp_path, eos=eos))
    _, trained = example_ids(chat, QUESTION, SHORT)
    assert decode(chat, trained) == SHORT + "<end>"


def test_an_answer_ends_with_the_eos_token_if_the_template_writes_no_end(tmp_path: Path):
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant: "
    chat = ChatTokenizer.from_folder(byte_tokenizer(tmp_path / "a", template=bare))
    _, trained = example_ids(chat, QUESTION, SHORT)
    assert decode(chat, trained) == SHORT + "<eos>"
    with pytest.raises(UserError, match="names a token that ends an answer") as error:
        ChatTokenizer.from_folder(byte_tokenizer(tmp_path / "b", template=bare, eos=None))
    assert str(error.value).startswith(f"{tmp_path / 'b'}: ")


def test_llamas_prompt_does_not_change_from_day_to_day(load: Callable[[str], ChatTokenizer]):
    chat = load("llama3_2")
    prompt = decode(chat, chat.encode_prompt(QUESTION).ids)
    assert "Today Date: 26 Jul 2024\n" in prompt
    assert f"{datetime.datetime.now():%d %b %Y}" not in prompt
    dated = chat.tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert f"{datetime.datetime.now():%Y}" in dated  # what the template does without a date


@pytest.mark.parametrize("position", ["end", "middle"])
def test_an_answer_that_holds_a_special_token_is_an_error(
    name: str, position: str, load: Callable[[str], ChatTokenizer]
):
    answer = SHORT + END_OF_TURN[name] + ("" if position == "end" else " and more")
    with pytest.raises(UserError, match=r"special to this tokenizer\. Remove it from the data") as error:
        example_ids(load(name), QUESTION, answer)
    assert repr(END_OF_TURN[name]) in str(error.value)


def test_an_answer_with_a_special_token_that_ends_no_turn_is_an_error_too(load: Callable[[str], ChatTokenizer]):
    for name, token in (("qwen2_5", "<|im_start|>"), ("qwen3", "<|endoftext|>"), ("llama3_2", "<|begin_of_text|>")):
        with pytest.raises(UserError, match="special to this tokenizer") as error:
            example_ids(load(name), QUESTION, f"a{token}b")
        assert repr(token) in str(error.value)


def test_decoding_removes_special_tokens_and_changes_nothing_else(name: str, load: Callable[[str], ChatTokenizer]):
    chat = load(name)
    _, trained = example_ids(chat, QUESTION, " 's , that .\n")
    assert chat.decode(trained) == " 's , that .\n"


def test_a_tokenizer_without_chat_template_is_an_error_with_its_folder(tmp_path: Path):
    folder = byte_tokenizer(tmp_path, template=None)
    with pytest.raises(UserError, match=r"no chat template to render prompts with\. Add chat_template") as error:
        ChatTokenizer.from_folder(folder)
    assert str(error.value).startswith(f"{folder}: ")


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{", "tokenizer_config.json": "{}"}], ids=["empty", "broken"])
def test_a_folder_without_a_tokenizer_is_an_error_with_its_name(files: dict[str, str], tmp_path: Path):
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"no usable tokenizer|no tokenizer: expected") as error:
        ChatTokenizer.from_folder(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(
    "refusal", ["{{ raise_exception('no system turn, please') }}", "{{ missing.content }}"], ids=["raised", "undefined"]
)
def test_a_conversation_that_the_template_refuses_is_an_error_with_its_roles(refusal: str, tmp_path: Path):
    template = (
        f"{{% for m in messages %}}{{% if m.role == 'system' %}}{refusal}{{% endif %}}{{{{ m.content }}}}{{% endfor %}}"
    )
    chat = ChatTokenizer.from_folder(byte_tokenizer(tmp_path, template=template))
    assert chat.encode_prompt(QUESTION).ids
    with pytest.raises(UserError, match=r"refuses a conversation with the roles \['system', 'user'") as error:
        chat.encode_prompt(CONVERSATION)
    assert ("please" in str(error.value)) == ("please" in refusal)


def test_a_template_with_an_error_in_it_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="the chat template refuses"):
        ChatTokenizer.from_folder(byte_tokenizer(tmp_path, template="{% for m in messages %}{{ m.content }}"))


def test_the_miniature_model_trains_whole_answers():
    chat = ChatTokenizer.from_folder(resolve_model_folder("builtin:miniature"))
    for record in MiniatureData(questions=20).rows(0):
        messages: list[Message] = [{"role": "user", "content": record["question"]}]
        for answer in (record["long"], record["short"]):
            prompt, trained = example_ids(chat, messages, answer)
            assert prompt == chat.encode_prompt(messages).ids
            assert record["question"] in decode(chat, prompt)
            assert decode(chat, trained[:-1]) == answer
            assert trained.count(chat.end_of_turn_id) == 1
            assert trained[-1] == chat.end_of_turn_id


def test_a_text_that_the_tokenizer_cannot_write_is_an_error_and_is_not_shortened():
    chat = ChatTokenizer.from_folder(resolve_model_folder("builtin:miniature"))
    with pytest.raises(UserError, match="cannot write the answer: 'the answer is 1' at character 1 comes back as '1'"):
        example_ids(chat, [{"role": "user", "content": "1?"}], "the answer is 1")
    with pytest.raises(UserError, match="cannot write the prompt: 'abc"):
        chat.encode_prompt([{"role": "user", "content": "abc1?"}])


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_prompt_that_holds_a_special_token_is_an_error(role: str, load: Callable[[str], ChatTokenizer]):
    messages = [{"role": role, "content": "a <|im_end|> b"}, *QUESTION][: 1 if role == "user" else 2]
    with pytest.raises(UserError, match=f"the {role}'s text holds '<.im_end.>', special"):
        load("qwen2_5").encode_prompt(messages)


def test_an_answer_without_tokens_is_an_error():
    chat = ChatTokenizer.from_folder(resolve_model_folder("builtin:miniature"))
    with pytest.raises(UserError, match="the answer '' gives no token to train"):
        example_ids(chat, [{"role": "user", "content": "2+2?"}], "")


def test_the_end_of_a_thought_is_found_in_real_answers(name: str, load: Callable[[str], ChatTokenizer]):
    """Every real long answer ends its thought once, at the start of a line. The ids of the tag occur there."""
    chat, path = load(name), DATA / "pairs" / "math500_pairs.jsonl"
    if not path.exists():
        pytest.skip(f"the real pairs are missing ({path})")
    prompt = chat.encode_prompt([{"role": "user", "content": "1+1?"}])
    for line in path.read_text(encoding="utf-8").split("\n")[:60:3]:
        long, short = json.loads(line)["long"], json.loads(line)["short"]
        open_tag = "" if prompt.open_thought_tag else "<think>\n"
        answers = (long, f"{open_tag}so\n</think>\n\n2", f"{open_tag}so\n\n</think>2", short)
        for answer, expected in zip(answers, (1, 1, 1, 0), strict=True):
            ids = chat.encode_answer(prompt, answer)
            matches = [ids[i : i + len(tag)] == tag for tag in chat.thought_end_token_ids() for i in range(len(ids))]
            assert sum(matches) == expected, answer[-200:]
