"""Renders the chat template of a model the same way every day, and finds out how it writes thoughts and answers."""

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any, NotRequired, TypedDict

import jinja2
import pydantic
from transformers import PreTrainedTokenizerBase

from thinkpo_jax.runtime.config import UserError, did_you_mean
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.time_limit import TimeLimitError, call_with_time_limit

TEMPLATE_DATE = date(2024, 7, 26)  # the default date of Llama 3's template, which otherwise writes today's date
# Tags of thoughts: R1 and Qwen3, then Sky-T1 and Bespoke-Stratos. The last two also mark the solution.
THOUGHT_TAGS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
ANSWER_SECTION_TAGS = (*THOUGHT_TAGS, ("<|begin_of_solution|>", "<|end_of_solution|>"))
THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # of a message, in templates and data sets
QUESTION_MARKER, ANSWER_MARKER, THOUGHT_MARKER = "QUESTION", "ANSWER", "THOUGHT"  # to find in a rendered conversation
MAX_RENDER_SECONDS = 3.0  # Real templates take less than a millisecond.
MAX_TEMPLATE_CHARACTERS = 2**18  # Real templates have, and add to the messages, up to some ten thousand.
_DATE_DIRECTIVES = "aAbBcdfgGHIjklmMnpSTuUVwWxXyYzZDeFhR"
_RESERVED_ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}


def _check_tags(tags: tuple[str, str]) -> tuple[str, str]:
    if not all(tag.strip() for tag in tags):
        raise ValueError('expected two tags with their line breaks, such as ["<think>\\n", "\\n</think>\\n\\n"]')
    return tags


def _check_argument(value: Any) -> Any:
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("expected a text, a number, true or false")
    return value


# Variables of a template, such as `enable_thinking`.
TemplateArguments = dict[str, Annotated[Any, pydantic.AfterValidator(_check_argument)]]
ThinkingTags = Annotated[tuple[str, str], pydantic.AfterValidator(_check_tags)]  # texts before and after a thought


class Message(TypedDict):
    """One message of a conversation. The role is "system", "user" or "assistant".

    `thinking` is the thought before the content, if the data has it in a field of its own.
    """

    role: str
    content: str
    thinking: NotRequired[str]


def has_unclosed_tag(answer: str, tags: Sequence[tuple[str, str]] = THOUGHT_TAGS) -> bool:
    """Tells whether an answer opens a section and does not close it. The prompt may open what the answer closes."""
    return any(answer.rfind(opening) > answer.rfind(closing) for opening, closing in tags)


def has_unopened_tag(answer: str, tags: Sequence[tuple[str, str]] = THOUGHT_TAGS) -> bool:
    """Tells whether an answer closes a section before it opens one."""
    return any(closing in answer.partition(opening)[0] for opening, closing in tags)


@dataclass(frozen=True)
class ThinkingFormat:
    """The texts that a model writes before and after a thought. `before` and `after` hold its tags and line breaks."""

    before: str = "<think>\n"
    after: str = "\n</think>\n\n"

    @property
    def tags(self) -> tuple[str, str]:
        """The two tags without line breaks."""
        return self.before.strip(), self.after.strip()

    def join(self, thought: str, answer: str) -> str:
        """Returns the answer with the thought before it, as Qwen3's template joins them."""
        return self.before + thought.strip("\n") + self.after + answer.lstrip("\n")

    def find_tag(self, *texts: str) -> str | None:
        """Returns a tag of a thought that a text holds, of this format or of another known one."""
        tags = [tag for tags in (self.tags, *THOUGHT_TAGS) for tag in tags]
        return next((tag for tag in tags for text in texts if tag in text), None)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with fixed values for its variables.

    `given_tags` are the texts before and after a thought. By default they are what the template writes.
    """

    tokenizer: Any
    arguments: TemplateArguments = field(default_factory=dict)
    given_tags: tuple[str, str] | None = None

    @functools.cached_property
    def text(self) -> str:
        """The template. A macro replaces the function `strftime_now`, so every day gives `TEMPLATE_DATE`."""
        text = self.tokenizer.get_chat_template()
        if "strftime_now" not in text:
            return text
        values = {f"%{sign}{name}": _format_date(f"%{sign}{name}") for name in _DATE_DIRECTIVES for sign in ("-", "")}
        filters = "".join(f"|replace({directive!r}, {value!r})" for directive, value in values.items())
        return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{text}"

    def check_arguments(self, folder: Any) -> None:
        """Raises `UserError` for an argument that the template does not read, or that is not the user's to set.

        Logs a warning if the value of an argument changes nothing, such as the text "false".
        """
        words = re.findall(r"[A-Za-z_]\w*", self.tokenizer.get_chat_template())
        question: list[Message] = [{"role": "user", "content": QUESTION_MARKER}]
        for name, value in self.arguments.items():
            if name in _RESERVED_ARGUMENTS or name in self.tokenizer.special_tokens_map:
                raise UserError(f"template_arguments: {name!r} is set by this package. Remove it.")
            if name not in words:
                problem = f"the chat template of {folder} has no variable {name!r}{did_you_mean(name, words)}"
                raise UserError(f"template_arguments: {problem}. Correct the name or remove it.")
            without = dataclasses.replace(self, arguments={k: v for k, v in self.arguments.items() if k != name})
            prompts = [each.render(question, add_generation_prompt=True) for each in (self, without)]
            if prompts[0] == prompts[1] and not isinstance(value, bool):
                log_warning(f"template_arguments: {name}: {value!r} does not change the prompt. Check its value.")

    def render(self, messages: Sequence[Message], **options: bool) -> str:
        """Renders a conversation. Raises `UserError` if the template refuses it."""
        values = {"date_string": f"{TEMPLATE_DATE:%d %b %Y}", **self.arguments}
        conversation, template = list(map(self._to_hf, messages)), self.text
        render = functools.partial(
            self.tokenizer.apply_chat_template, conversation, chat_template=template, tokenize=False, **values
        )
        roles = [message["role"] for message in messages]
        try:
            _check_template(template)
            text = call_with_time_limit(functools.partial(render, **options), MAX_RENDER_SECONDS)
        except TimeLimitError:
            problem = f"takes more than {MAX_RENDER_SECONDS:g} seconds for a conversation with the roles {roles}"
            raise UserError(f"the chat template {problem}. Use the template of the original model.") from None
        except Exception as error:  # a template is a program and can raise anything
            reason = str(error) or type(error).__name__
            raise UserError(f"the chat template refuses a conversation with the roles {roles}: {reason}") from None
        limit = MAX_TEMPLATE_CHARACTERS + 10 * sum(len(str(value)) for each in conversation for value in each.values())
        if len(text) > limit:
            problem = f"writes {len(text):,} characters for a conversation with the roles {roles}, expected at most"
            raise UserError(f"the chat template {problem} {limit:,}. Use the template of the original model.")
        return text

    @functools.cached_property
    def thinking(self) -> ThinkingFormat:
        """How the model writes a thought that comes in a field of its own.

        It has the given tags, or those that the template writes. Otherwise it is the default format.
        """
        if self.given_tags is not None:
            return ThinkingFormat(*self.given_tags)
        before, _, after = self._answer_with_field.partition(THOUGHT_MARKER)
        between, is_rendered, _ = after.partition(ANSWER_MARKER)
        opening = re.search(r"(<[^<>]*>|\[[^\[\]]*\])\s*\Z", before)
        if not (is_rendered and opening):
            return ThinkingFormat()
        found = ThinkingFormat(opening[0], between)
        first, last = found.tags
        pairs = (f"{first[:1]}/{first[1:]}", first.replace("START", "END"), first.replace("begin", "end"))
        return found if last != first and last in pairs else ThinkingFormat()

    @functools.cached_property
    def _answer_with_field(self) -> str:
        """What the template writes for an answer whose thought is in a field of its own."""
        answer: Any = {"role": "assistant", "content": ANSWER_MARKER, **dict.fromkeys(THINKING_FIELDS, THOUGHT_MARKER)}
        return self.render([{"role": "user", "content": QUESTION_MARKER}, answer])

    def keeps_earlier_thoughts(self) -> bool:
        """Tells whether the template keeps the thought of an answer that another question follows."""
        answer = f"<think>\n{THOUGHT_MARKER}\n</think>\n\n{ANSWER_MARKER}"
        roles, texts = ("user", "assistant", "user"), (QUESTION_MARKER, answer, QUESTION_MARKER)
        return THOUGHT_MARKER in self.render([{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])

    def text_after_answer(self, folder: Any) -> str:
        """Returns what the template writes after an answer. Raises `UserError` if it leaves out a message."""
        messages = [("user", QUESTION_MARKER), ("assistant", ANSWER_MARKER)]
        text = self.render([{"role": role, "content": content} for role, content in messages])
        if not (ANSWER_MARKER in text and QUESTION_MARKER in text):
            advice = "Use the template of the model"
            raise UserError(f"{folder}: the chat template leaves out the text of a message. {advice}.")
        return text.rpartition(ANSWER_MARKER)[2]

    def find_earlier_answers(self, messages: Sequence[Message], rendered: str) -> list[tuple[int, int]]:
        """Returns where the answers of `messages` begin and end in `rendered`, as the template writes them.

        The template may drop their thoughts. It is rendered once more with a marker for each answer. The texts between
        the markers separate the answers. Raises `UserError` if the separators do not occur in this order.
        """
        answers = [self._to_hf(message)["content"].strip() for message in messages if message["role"] == "assistant"]
        marked: list[Message] = [
            {"role": m["role"], "content": "\ue000" if m["role"] == "assistant" else m["content"]} for m in messages
        ]
        first, *separators = self.render(marked, add_generation_prompt=True).split("\ue000")
        spans: list[tuple[int, int]] = []
        start = len(first) if rendered.startswith(first) else -1
        for separator in separators:
            end = rendered.find(separator, start) if start >= 0 else -1
            spans.append((start, end))
            start = end + len(separator) if end >= 0 else -1
        texts = [rendered[start:end].strip() for start, end in spans]
        are_found = start == len(rendered) and len(texts) == len(answers)
        if not are_found or not all(t.endswith(a) or a.endswith(t) for t, a in zip(texts, answers, strict=True)):
            raise UserError("the earlier answers cannot be found in what the chat template writes. Use train_on: last.")
        return spans

    def _to_hf(self, message: Message) -> dict[str, Any]:
        """Returns the message for the template. If it does not read a thought, that goes into the text."""
        if "thinking" not in message or set(THINKING_FIELDS) <= message.keys():
            return dict(message)
        if THOUGHT_MARKER in self._answer_with_field:
            return {**message, **dict.fromkeys(THINKING_FIELDS, message["thinking"])}
        return {"role": message["role"], "content": self.thinking.join(message["thinking"], message["content"])}


@functools.lru_cache
def _check_template(template: str) -> None:
    """Raises `ValueError` if a template is too long, or computes a power. A huge power cannot be interrupted."""
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(
            f"it has {len(template):,} characters, expected at most {MAX_TEMPLATE_CHARACTERS:,}. Use the original one"
        )
    tokens = [token[1:] for token in jinja2.Environment().lex(template) if token[1] != "whitespace"]
    for before, token in itertools.pairwise(tokens):
        is_unpacking = before in (("operator", "("), ("operator", ","))
        if token == ("operator", "**") and not is_unpacking:
            raise ValueError("it uses the operator **, which can take forever. Use the original one")


def _format_date(directive: str) -> str:
    try:
        return TEMPLATE_DATE.strftime(directive)
    except ValueError:  # this platform does not know the directive
        return directive
