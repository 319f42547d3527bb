"""A template writes the same text every day, gets its arguments, and says how the model writes a thought."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizer import TEMPLATE, byte_tokenizer
from support.real_tokenizers import END_OF_TURN

from thinkpo_jax.data.chat_template import ChatTemplate, Message, ThinkingFormat
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.models.model_folder import ModelConfig
from thinkpo_jax.runtime.config import UserError, parse_config

QUESTION: list[Message] = [{"role": "user", "content": "What is 2+2?"}]
THOUGHT_FIELD = "{% if m.reasoning_content %}BEFORE{{ m.reasoning_content }}AFTER{% endif %}{{ m.content }}"


def with_template(folder: Path, template: str, **options: Any) -> ChatTokenizer:
    return ChatTokenizer.from_folder(byte_tokenizer(folder, template=template), **options)


def test_every_way_to_ask_for_the_date_gives_the_same_day(tmp_path: Path) -> None:
    formats = ["%d %b %Y", "%Y-%m-%d %H:%M:%S", "%A, %B %-d, %Y", "%D|%F|%j"]
    calls = "".join("{{ strftime_now('" + text + "') }};" for text in formats)
    chat = with_template(tmp_path, f"\n{calls}{{{{ date_string }}}}\n" + TEMPLATE)
    prompt = chat.encode_prompt(QUESTION).text
    dates = "26 Jul 2024;2024-07-26 00:00:00;Friday, July 26, 2024;07/26/24|2024-07-26|208;26 Jul 2024"
    assert prompt == f"\n{dates}\n[user]What is 2+2?[assistant]"


def test_the_date_of_a_template_can_be_given(load: Callable[..., ChatTokenizer]) -> None:
    chat = load("llama3_2", template_arguments={"date_string": "1 May 2025"})
    assert "Today Date: 1 May 2025\n" in chat.encode_prompt(QUESTION).text


def test_qwen3_without_thinking_gets_its_empty_thought_from_the_template(load: Callable[..., ChatTokenizer]) -> None:
    chat, default = load("qwen3", template_arguments={"enable_thinking": False}), load("qwen3")
    prompt = chat.encode_prompt(QUESTION)
    assert prompt.text == default.encode_prompt(QUESTION).text + "<think>\n\n</think>\n\n"
    assert chat.encode_empty_thought(prompt) == []  # the prompt holds it already
    assert chat.encode_answer(prompt, "4") == default.encode_answer(default.encode_prompt(QUESTION), "4")
    with pytest.raises(
        UserError, match=r"ends in an empty thought, but the answer begins with a thought. Change `temp"
    ):
        chat.encode_answer(prompt, "<think>\n2+2\n</think>\n\n4")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "enable_thinkng",
            "has no variable 'enable_thinkng' (did you mean enable_thinking?). Correct",
        ),
        ("add_generation_prompt", "'add_generation_prompt' is set by this package. Remove it."),
        ("messages", "'messages' is set by this package"),
    ],
)
def test_an_argument_without_effect_is_an_error(name: str, problem: str, load: Callable[..., ChatTokenizer]) -> None:
    with pytest.raises(UserError, match=r"^template_arguments: ") as error:
        load("qwen3", template_arguments={name: False})
    assert problem in str(error.value)


@pytest.mark.parametrize(("value", "warns"), [("false", True), (0, True), (True, False), (False, False)])
def test_a_value_that_changes_nothing_gives_a_warning(
    value: Any, warns: bool, load: Callable[..., ChatTokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    load("qwen3", template_arguments={"enable_thinking": value})
    warning = f"warning: template_arguments: enable_thinking: {value!r} does not change the prompt. Check its value."
    assert (warning in capsys.readouterr().err) == warns


@pytest.mark.parametrize(
    ("role", "template"),
    [
        ("system", "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"),
        ("user", "{% for m in messages[-2:] %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"),
    ],
)
def test_a_template_that_leaves_out_a_message_is_an_error(role: str, template: str, tmp_path: Path) -> None:
    chat = with_template(tmp_path, template)
    roles = ("system", "user", "assistant", "user") if role == "system" else ("user", "assistant", "user")
    with pytest.raises(UserError, match=f"the chat template leaves out the {role}'s text"):
        chat.encode_prompt([{"role": each, "content": f"{each} {i}"} for i, each in enumerate(roles)])


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"a": [1]}, "template_arguments.a: expected a text, a number, true or false"),
        ({"a": {"b": 1}}, "template_arguments.a: expected a text, a number, true or false"),
        ("x", "template_arguments: "),
    ],
)
def test_an_argument_is_a_plain_value(value: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse_config(ModelConfig, {"path": "x", "template_arguments": value}, source="model")


@pytest.mark.parametrize("tags", [["<t>"], ["<t>", " "], "<t>"])
def test_thinking_tags_are_two_texts(tags: Any) -> None:
    with pytest.raises(UserError, match="thinking_tags"):
        parse_config(ModelConfig, {"path": "x", "thinking_tags": tags}, source="model")


@pytest.mark.parametrize("name", END_OF_TURN)
def test_real_templates_write_a_thought_in_the_default_format(name: str, load: Callable[..., ChatTokenizer]) -> None:
    assert load(name).thinking == ThinkingFormat("<think>\n", "\n</think>\n\n")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("<think>", "</think>", ("<think>", "</think>")),
        ("<reason>\n\n", "\n</reason>\n", ("<reason>\n\n", "\n</reason>\n")),
        ("<|begin_of_thought|>\n", "<|end_of_thought|>", ("<|begin_of_thought|>\n", "<|end_of_thought|>")),
        ("[THINK]", "[/THINK]", ("[THINK]", "[/THINK]")),
        ("<|START_THINKING|>", "<|END_THINKING|>", ("<|START_THINKING|>", "<|END_THINKING|>")),
        ("", "</think>", ("<think>\n", "\n</think>\n\n")),  # the header of the answer is no tag
        ("so: ", " thus ", ("<think>\n", "\n</think>\n\n")),
    ],
)
def test_the_format_of_a_thought_is_read_from_the_template(
    before: str, after: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    name = "reasoning" if before.startswith("[") else "reasoning_content"  # templates read one of these
    fields = THOUGHT_FIELD.replace("reasoning_content", name).replace("BEFORE", before).replace("AFTER", after)
    template = "{% for m in messages %}<|{{ m.role }}|>" + fields + "<end>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert with_template(tmp_path, template).thinking == ThinkingFormat(*expected)


def test_given_tags_win(load: Callable[..., ChatTokenizer]) -> None:
    chat = load("qwen3", thinking_tags=("<t>\n", "</t>\n"))
    assert chat.thinking.join("\nwhy\n", "\n4") == "<t>\nwhy</t>\n4"
    assert ("<t>", "</t>") in chat.thought_tags


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<|begin_of_thought|>"])
def test_a_tag_that_is_a_special_token_may_be_in_an_answer(tag: str, tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    plain = ChatTokenizer.from_folder(tmp_path)
    plain.tokenizer.add_special_tokens({"additional_special_tokens": [tag, "<|other|>"]})
    plain.tokenizer.save_pretrained(tmp_path)
    chat = ChatTokenizer.from_folder(tmp_path)
    assert tag in chat.tokenizer.all_special_tokens
    prompt = chat.encode_prompt([{"role": "user", "content": f"What does {tag} mean?"}])
    ids = chat.encode_answer(prompt, f"{tag}a")
    assert chat.tokenizer.convert_ids_to_tokens(ids[:1]) == [tag]
    assert chat.decode(ids) == f"{tag}a"  # a generated thought keeps its tags
    with pytest.raises(UserError, match=r"'<.other.>', special to this tokenizer"):
        chat.encode_answer(prompt, "<|other|>a")


@pytest.mark.parametrize("space", ["", " ", "\n", "\r\n\t "])
def test_an_answer_that_repeats_the_open_tag_after_whitespace_opens_one_thought(
    space: str, load: Callable[..., ChatTokenizer]
) -> None:
    chat = load("r1")
    prompt = chat.encode_prompt(QUESTION)
    text = prompt.text + chat.decode(chat.encode_answer(prompt, f"{space}<think>\ntwo\n</think>\n\n4"))
    assert text.endswith("<think>\ntwo\n</think>\n\n4")
    assert text.count("<think>") == 1


def test_a_template_with_names_uses_the_default_one(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    tokenizer = ChatTokenizer.from_folder(tmp_path).tokenizer
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ raise_exception('no') }}"}
    assert ChatTemplate(tokenizer).render(QUESTION) == "[user]What is 2+2?"
