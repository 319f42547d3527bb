"""Renders prompts with the chat template of a model, and encodes prompts and answers.

The template renders a prompt, which is encoded once. An answer is encoded by itself, and its ids are appended. So the
ids of the prompt are a prefix of prompt + answer, and no template can rewrite an answer. For example, the template of
DeepSeek-R1-Distill deletes the thought of a finished answer. If the prompt already ends in `<think>`, an answer that
begins with it does not open a second thought.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from thinkpo_jax.data.text_encoding import encode_tag, encode_text
from thinkpo_jax.data.tokenizer_files import load_tokenizer
from thinkpo_jax.runtime.config import UserError

TEMPLATE_DATE = "26 Jul 2024"  # the default date of Llama 3's template, which otherwise writes today's date
# Tags of thoughts: R1 and Qwen3, then Sky-T1 and Bespoke-Stratos. The last two also mark the solution.
THOUGHT_TAGS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
ANSWER_SECTION_TAGS = (*THOUGHT_TAGS, ("<|begin_of_solution|>", "<|end_of_solution|>"))
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # as Qwen3's template writes it
_THINK = "<think>"
_QUESTION, _ANSWER = "QUESTION", "ANSWER"  # markers to find in a rendered conversation


class Message(TypedDict):
    """One message of a conversation. The role is "system", "user" or "assistant"."""

    role: str
    content: str


class RenderedPrompt(NamedTuple):
    """A prompt as the chat template renders it, and its token ids."""

    text: str
    ids: list[int]

    @property
    def open_thought_tag(self) -> str:
        """`<think>` if the prompt ends in it, so that every answer begins inside a thought. Otherwise empty."""
        return _THINK if self.text.rstrip().endswith(_THINK) else ""

    def without_open_tag(self, answer: str) -> str:
        """Removes `<think>` and the whitespace after it from the start of an answer, if the prompt ends in them."""
        if self.open_thought_tag and answer.startswith(_THINK):
            return answer.removeprefix(_THINK).removeprefix(self.text[len(self.text.rstrip()) :])
        return answer


def has_unclosed_tag(answer: str, tags: Sequence[tuple[str, str]] = THOUGHT_TAGS) -> bool:
    """Tells whether an answer opens a section and does not close it. The prompt may open what the answer closes."""
    return any(answer.rfind(opening) > answer.rfind(closing) for opening, closing in tags)


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template. `end_of_turn_id` ends an answer, and `stop_token_ids` end a generation.

    `special_token_ids` structure a conversation and must not occur inside a text.
    """

    tokenizer: Any
    end_of_turn_id: int
    stop_token_ids: tuple[int, ...]
    special_token_ids: frozenset[int]

    @classmethod
    def from_folder(cls, folder: Path, *, stop_token_ids: Sequence[int] = ()) -> "ChatTokenizer":
        """Loads the tokenizer of a Hugging Face folder. Raises `UserError` if it or its chat template is missing."""
        tokenizer = load_tokenizer(folder)
        if tokenizer.chat_template is None:
            advice = "Add chat_template.jinja, or the key chat_template in tokenizer_config.json"
            raise UserError(f"{folder}: the tokenizer has no chat template to render prompts with. {advice}.")
        end_id = _end_of_turn_id(tokenizer, folder)
        special_ids = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        return cls(tokenizer, end_id, tuple(sorted({end_id, *stop_token_ids})), frozenset(special_ids | {end_id}))

    def encode_prompt(self, messages: Sequence[Message]) -> RenderedPrompt:
        """Renders a conversation up to where the answer of the assistant begins, and encodes it.

        Raises `UserError` for a special token in a message, and for a text that the tokenizer cannot represent.
        """
        special_tokens = self.tokenizer.convert_ids_to_tokens(sorted(self.special_token_ids))
        for message in messages:
            if special := [token for token in special_tokens if token in message["content"]]:
                raise _special_token_error(f"the {message['role']}'s text", special)
        text = _render(self.tokenizer, messages, add_generation_prompt=True)
        return RenderedPrompt(text, _encode(self.tokenizer, text, "prompt"))

    def encode_answer(self, prompt: RenderedPrompt, answer: str) -> list[int]:
        """Encodes an answer and its end token. Raises `UserError` as `encode_prompt` does, or if there is no token."""
        ids = _encode(self.tokenizer, prompt.without_open_tag(answer), "answer", prompt=prompt.text)
        if not ids:
            raise UserError(f"the answer {answer!r:.60} gives no token to train. Remove the row from the data.")
        if special_ids := self.special_token_ids.intersection(ids):
            raise _special_token_error("the answer", self.tokenizer.convert_ids_to_tokens(sorted(special_ids)))
        return [*ids, self.end_of_turn_id]

    def encode_empty_thought(self, prompt: RenderedPrompt) -> list[int]:
        """Encodes a thought without content. A tag that the prompt already opens is left out. It is not trained."""
        thought = prompt.without_open_tag(EMPTY_THOUGHT)
        return _encode(self.tokenizer, thought, "empty thought", prompt=prompt.text)

    def thought_end_token_ids(self) -> list[list[int]]:
        """Returns for each tag that ends a thought its ids at the start of a line."""
        tags = (encode_tag(self.tokenizer, closing) for _, closing in THOUGHT_TAGS)
        return [ids[:-1] or ids for ids in tags]  # the last of several ids may merge with the text after the tag

    def template_keeps_thoughts(self) -> bool:
        """Tells whether the template keeps the thought of an answer that is passed to it as a message."""
        answer = f"<think>\n{_ANSWER}\n</think>\n\n4"
        messages: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": answer}]
        return _ANSWER in _render(self.tokenizer, messages)

    @functools.cached_property
    def max_token_characters(self) -> int:
        """The length of the longest token. A text of n tokens has at most n times as many characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Returns the number of tokens of each text, without those that a template adds."""
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of generated ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _special_token_error(owner: str, tokens: Sequence[str]) -> UserError:
    advice = "Remove it from the data. Only the chat template may begin and end turns"
    return UserError(f"{owner} holds {', '.join(map(repr, tokens))}, special to this tokenizer. {advice}.")


def _encode(tokenizer: Any, text: str, description: str, *, prompt: str = "") -> list[int]:
    """Encodes a text. Raises `UserError` if decoding the ids does not give back the (normalized) text."""
    return encode_text(tokenizer, text, description, prompt=prompt)


def _render(tokenizer: Any, messages: Sequence[Message], **options: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, date_string=TEMPLATE_DATE, **options)
    except Exception as error:  # a template is a program and can raise anything
        roles = [message["role"] for message in messages]
        raise UserError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None


def _end_of_turn_id(tokenizer: Any, folder: Path) -> int:
    """Returns the token that the template writes after an answer, or the EOS token if it writes none."""
    text = _render(tokenizer, [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}])
    if not (_ANSWER in text and _QUESTION in text):
        raise UserError(f"{folder}: the chat template leaves out the text of a message. Use the template of the model.")
    first_ids = _encode(tokenizer, text.rpartition(_ANSWER)[2], "end of a turn")[:1]
    if first_ids and first_ids[0] in tokenizer.added_tokens_decoder:
        return first_ids[0]
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: neither the chat template nor the tokenizer names a token that ends an answer.")
    return tokenizer.eos_token_id
