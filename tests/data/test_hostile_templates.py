"""A chat template that would run forever, or write without end, is refused in seconds."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.byte_tokenizer import TEMPLATE, byte_tokenizer

from thinkpo_jax.data import chat_template
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.runtime.config import UserError

LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
FOREVER = {
    "loops": LOOP,
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filter": "{{ ([range(100000)|list] * 100000)|map('sum')|list|length }}",
    "function": "{{ lipsum(n=10000000) }}",
}
SLOW = r"the chat template takes more than 0.3 seconds .*'user', 'assistant'\]\. Use the template of the original model"


@pytest.mark.parametrize("case", FOREVER)
def test_a_template_without_an_end_is_stopped(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match=SLOW):
        ChatTokenizer.from_folder(byte_tokenizer(tmp_path, template=FOREVER[case] + TEMPLATE))
    assert time.monotonic() - start < 30


def test_a_template_is_also_stopped_in_the_threads_of_the_tokenization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It only loops for a conversation of the data."""
    template = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + TEMPLATE
    chat = ChatTokenizer.from_folder(byte_tokenizer(tmp_path, template=template))
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.3)
    with ThreadPoolExecutor(1) as pool:
        prompt = pool.submit(chat.encode_prompt, [{"role": "user", "content": "loop"}])
        with pytest.raises(UserError, match=r"the chat template takes more than 0\.3 seconds"):
            prompt.result()


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 9 ** 9 ** 9 }}", "it uses the operator **, which can take forever. Use the original one"),
        ("{{ 'x' * 10000000000000 }}", "refuses a conversation with the roles ['user', 'assistant']: MemoryError"),
        ("{{ 'x' * 1000000 }}", "writes 1,000,0"),
        ("{# " + "x" * 300_000 + " #}", "characters, expected at most 262,144. Use the original one"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_fills_the_memory_is_refused(template: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ChatTokenizer.from_folder(byte_tokenizer(tmp_path, template=template + TEMPLATE))
    assert problem in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_keyword_arguments_and_stars_in_texts_are_no_powers(tmp_path: Path) -> None:
    template = "{% set x = dict(a=1, **{'b': 2}) %}** {{ '2 ** 3' }}" + TEMPLATE
    chat = ChatTokenizer.from_folder(byte_tokenizer(tmp_path, template=template))
    assert chat.encode_prompt([{"role": "user", "content": "a"}]).text.startswith("** 2 ** 3[user]a")
