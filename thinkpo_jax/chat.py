"""What does the model read, and on what is it trained?

A prompt is rendered by the model's own chat template and tokenised once; an answer is tokenised by itself and appended
as ids. So the prompt's ids are a prefix of prompt + answer by construction, and no template can rewrite an answer (that
of DeepSeek-R1-Distill deletes the thinking of every finished answer).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import jinja2
from transformers import AutoTokenizer

from thinkpo_jax.config import UserError

# Llama 3's template writes today's date unless it is told one; this is its own default.
TEMPLATE_DATE = "26 Jul 2024"
_MARK = "ANSWER"


class Message(TypedDict):
    """One turn: who speaks ("system", "user" or "assistant") and what."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template. `end_id` closes an answer; `stop_ids` end a generation."""

    tokenizer: Any
    end_id: int
    stop_ids: tuple[int, ...]

    @classmethod
    def load(cls, folder: Path, *, stop_ids: Sequence[int] = ()) -> "Chat":
        """The tokenizer of a Hugging Face folder. Raises `UserError` where it or its chat template is missing."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: no usable tokenizer: {error}") from None
        if tokenizer.chat_template is None:
            raise UserError(
                f"{folder}: the tokenizer has no chat template. Add chat_template.jinja (or the key chat_template in "
                "tokenizer_config.json): prompts are rendered with it in training and evaluation alike."
            )
        end_id = _end_of_turn(tokenizer, folder)
        return cls(tokenizer, end_id, tuple(sorted({end_id, *stop_ids})))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered conversation up to where the assistant's answer begins."""
        return _ids(self.tokenizer, _render(self.tokenizer, messages, add_generation_prompt=True))

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer with the end token: what is trained."""
        return [*_ids(self.tokenizer, answer), self.end_id]

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes BOS where there is one


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=TEMPLATE_DATE
        )
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise UserError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None


def _end_of_turn(tokenizer: Any, folder: Path) -> int:
    """The token that the template writes after an assistant's answer; the tokenizer's EOS where it writes none."""
    messages: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    after = _render(tokenizer, messages, add_generation_prompt=False).rpartition(_MARK)[2]
    first = _ids(tokenizer, after)[:1]
    if first and first[0] in tokenizer.added_tokens_decoder:
        return first[0]
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: neither the chat template nor the tokenizer names a token that ends an answer.")
    return tokenizer.eos_token_id
