"""What does the model read, and on what is it trained?

A prompt is rendered by the model's own chat template and tokenised once; an answer is tokenised by itself and appended
as ids. So the prompt's ids are a prefix of prompt + answer by construction, and no template can rewrite an answer (that
of DeepSeek-R1-Distill deletes the thinking of every finished answer). Where the prompt already ends in `<think>`, an
answer that begins with it does not open its thinking a second time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from transformers import AutoTokenizer

from thinkpo_jax.config import UserError

# Llama 3's template writes today's date unless it is told one; this is its own default.
TEMPLATE_DATE = "26 Jul 2024"
_MARK = "ANSWER"
_QUESTION = "?"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_THINK = "<think>"


class Message(TypedDict):
    """One turn: who speaks ("system", "user" or "assistant") and what."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template. `end_id` closes an answer; `stop_ids` end a generation.

    `special_ids` are the tokens that structure a conversation and have no place within a text.
    """

    tokenizer: Any
    end_id: int
    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]

    @classmethod
    def load(cls, folder: Path, *, stop_ids: Sequence[int] = ()) -> "Chat":
        """The tokenizer of a Hugging Face folder. Raises `UserError` where it or its chat template is missing."""
        if not any((folder / name).is_file() for name in TOKENIZERS):
            raise UserError(f"{folder}: no tokenizer: expected {' or '.join(TOKENIZERS)}.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, clean_up_tokenization_spaces=False
            )
        except Exception as error:  # whatever a malformed file makes of the code that reads it
            raise UserError(f"{folder}: no usable tokenizer: {error}") from None
        if tokenizer.chat_template is None:
            raise UserError(
                f"{folder}: the tokenizer has no chat template. Add chat_template.jinja (or the key chat_template in "
                "tokenizer_config.json): prompts are rendered with it in training and evaluation alike."
            )
        end_id = _end_of_turn(tokenizer, folder)
        special_ids = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        return cls(tokenizer, end_id, tuple(sorted({end_id, *stop_ids})), frozenset(special_ids | {end_id}))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered conversation up to where the assistant's answer begins."""
        return _ids(self.tokenizer, _render(self.tokenizer, messages, add_generation_prompt=True))

    def example_ids(self, messages: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt, which is read, and of the answer with its end token, which is trained.

        Raises `UserError` where nothing of the answer has a token, and where the answer holds a special token as text:
        it would end, or begin, in its middle.
        """
        prompt = _render(self.tokenizer, messages, add_generation_prompt=True)
        answer_ids = _ids(self.tokenizer, _without_opening(answer, prompt))
        if not answer_ids:
            raise UserError(f"the answer {answer!r:.60} gives no token to train; remove the row from the data.")
        if special := self.special_ids.intersection(answer_ids):
            found = ", ".join(repr(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(special)))
            raise UserError(
                f"the answer holds {found}, special to this tokenizer. Remove it from the data: the end token is added "
                "by itself."
            )
        return _ids(self.tokenizer, prompt), [*answer_ids, self.end_id]

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
    except Exception as error:  # a template is a program
        roles = [message["role"] for message in messages]
        raise UserError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None


def _without_opening(answer: str, prompt: str) -> str:
    """The answer without the `<think>`, and the gap after it, that the prompt already ends in."""
    open_prompt = prompt.rstrip()
    if open_prompt.endswith(_THINK) and answer.startswith(_THINK):
        return answer.removeprefix(_THINK).removeprefix(prompt[len(open_prompt) :])
    return answer


def _end_of_turn(tokenizer: Any, folder: Path) -> int:
    """The token that the template writes after an assistant's answer; the tokenizer's EOS where it writes none."""
    messages: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _MARK}]
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    if not (_MARK in whole and _QUESTION in whole):
        raise UserError(f"{folder}: the chat template leaves out what the user or the assistant says; mend it.")
    after = whole.rpartition(_MARK)[2]
    first = _ids(tokenizer, after)[:1]
    if first and first[0] in tokenizer.added_tokens_decoder:
        return first[0]
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: neither the chat template nor the tokenizer names a token that ends an answer.")
    return tokenizer.eos_token_id
