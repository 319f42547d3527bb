"""What does the model read, and on what is it trained?

A prompt is rendered by the model's own chat template and tokenised once; an answer is tokenised by itself and appended
as ids. So the prompt's ids are a prefix of prompt + answer by construction, and no template can rewrite an answer (that
of DeepSeek-R1-Distill deletes the thinking of every finished answer). Where the prompt already ends in `<think>`, an
answer that begins with it does not open its thinking a second time.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from transformers import AutoTokenizer

from thinkpo_jax.runtime.config import UserError

# Llama 3's template writes today's date unless it is told one; this is its own default.
TEMPLATE_DATE = "26 Jul 2024"
_MARK = "ANSWER"
_QUESTION = "QUESTION"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_THINK = "<think>"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # as Qwen3's template writes it
# How thoughts open and close: R1's and Qwen3's, and Sky-T1's and Bespoke-Stratos', which mark the solution too.
THOUGHT_TAGS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
ANSWER_SECTION_TAGS = (*THOUGHT_TAGS, ("<|begin_of_solution|>", "<|end_of_solution|>"))


class RenderedPrompt(NamedTuple):
    """A rendered conversation, and its ids."""

    text: str
    ids: list[int]

    @property
    def open_thought_tag(self) -> str:
        """`<think>` where the prompt ends in it, so that every answer to it begins in a thought."""
        return _THINK if self.text.rstrip().endswith(_THINK) else ""


def has_unclosed_tag(answer: str, tags: Sequence[tuple[str, str]] = THOUGHT_TAGS) -> bool:
    """Whether an answer opens something and does not close it. One that closes only is whole: its prompt opened."""
    return any(answer.rfind(opening) > answer.rfind(closing) for opening, closing in tags)


def contains_thought(answer: str) -> bool:
    """Whether an answer holds a thought, or the end of one."""
    return any(tag in answer for tags in THOUGHT_TAGS for tag in tags)


class Message(TypedDict):
    """One turn: who speaks ("system", "user" or "assistant") and what."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template. `end_id` closes an answer; `stop_ids` end a generation.

    `special_ids` are the tokens that structure a conversation and have no place within a text.
    """

    tokenizer: Any
    end_of_turn_id: int
    stop_token_ids: tuple[int, ...]
    special_token_ids: frozenset[int]

    @classmethod
    def from_folder(cls, folder: Path, *, stop_ids: Sequence[int] = ()) -> "ChatTokenizer":
        """The tokenizer of a Hugging Face folder. Raises `UserError` where it or its chat template is missing."""
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"{folder}: no tokenizer: expected {' or '.join(TOKENIZER_FILES)}.")
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

    def encode_prompt(self, messages: Sequence[Message]) -> RenderedPrompt:
        """The conversation as the template renders it, up to where the assistant's answer begins.

        Raises `UserError` where a turn holds a special token as text, and where the text has no ids that give it back.
        """
        for message in messages:
            if found := [token for token in self.special_tokens if token in message["content"]]:
                raise UserError(
                    f"the {message['role']}'s text holds {', '.join(map(repr, found))}, special to this tokenizer: it "
                    "would end the turn, or begin one. Remove it from the data."
                )
        rendered = _render(self.tokenizer, messages, add_generation_prompt=True)
        return RenderedPrompt(rendered, _ids(self.tokenizer, rendered, "prompt"))

    def encode_answer(self, prompt: RenderedPrompt, answer: str) -> list[int]:
        """Ids of an answer to a prompt with its end token: what is trained.

        Raises `UserError` where the text has no ids that give it back, and where it holds a special token as text: the
        turn would end in its middle.
        """
        ids = _ids(self.tokenizer, _without_opening(answer, prompt), "answer")
        if not ids:
            raise UserError(f"the answer {answer!r:.60} gives no token to train; remove the row from the data.")
        if special := self.special_token_ids.intersection(ids):
            found = ", ".join(repr(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(special)))
            raise UserError(
                f"the answer holds {found}, special to this tokenizer. Remove it from the data: the end token is added "
                "by itself."
            )
        return [*ids, self.end_of_turn_id]

    def encode_empty_thought(self, prompt: RenderedPrompt) -> list[int]:
        """Ids of a thinking block without content, as far as the prompt does not open it already: read, not trained."""
        return _ids(self.tokenizer, _without_opening(EMPTY_THOUGHT, prompt), "empty thinking block")

    def thought_end_token_ids(self) -> list[list[int]]:
        """For each tag that ends a thought the ids that it has wherever a line begins with it.

        A tag that is no token of its own is told by all ids but its last, which can be one with what follows it.
        """
        found = (self.tokenizer.encode(closing, add_special_tokens=False) for _, closing in THOUGHT_TAGS)
        return [ids[:-1] if len(ids) > 1 else ids for ids in found]

    def template_keeps_thoughts(self) -> bool:
        """Whether the template would keep the thinking of an answer that is handed to it as a message."""
        answer = f"<think>\n{_MARK}\n</think>\n\n4"
        messages: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": answer}]
        return _MARK in _render(self.tokenizer, messages, add_generation_prompt=False)

    @functools.cached_property
    def special_tokens(self) -> list[str]:
        """The tokens of `special_ids`."""
        return self.tokenizer.convert_ids_to_tokens(sorted(self.special_token_ids))

    @functools.cached_property
    def max_token_characters(self) -> int:
        """Characters of the longest token: no text of n tokens has more than n times as many."""
        return max(map(len, self.tokenizer.get_vocab()))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, without any that a template adds."""
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _ids(tokenizer: Any, text: str, what: str) -> list[int]:
    """The ids of a text, once it is seen that they give it back."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes BOS where there is one
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    whole = text if normalizer is None else normalizer.normalize_str(text)
    if back != whole:
        same = next((i for i, (a, b) in enumerate(zip(back, whole, strict=False)) if a != b), len(back))
        raise UserError(
            f"the tokenizer cannot write the {what}: {whole[same : same + 20]!r} at character {same + 1} comes back as "
            f"{back[same : same + 20]!r}. Take the tokenizer that belongs to the model, or remove the row."
        )
    return ids


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=TEMPLATE_DATE
        )
    except Exception as error:  # a template is a program
        roles = [message["role"] for message in messages]
        raise UserError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None


def _without_opening(answer: str, prompt: RenderedPrompt) -> str:
    """The answer without the `<think>`, and the gap after it, that the prompt already ends in."""
    if prompt.open_thought_tag and answer.startswith(prompt.open_thought_tag):
        return answer.removeprefix(prompt.open_thought_tag).removeprefix(prompt.text[len(prompt.text.rstrip()) :])
    return answer


def _end_of_turn(tokenizer: Any, folder: Path) -> int:
    """The token that the template writes after an assistant's answer; the tokenizer's EOS where it writes none."""
    messages: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _MARK}]
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    if not (_MARK in whole and _QUESTION in whole):
        raise UserError(
            f"{folder}: the chat template leaves out what the user or the assistant says. Take the "
            "template that belongs to the model."
        )
    after = whole.rpartition(_MARK)[2]
    first = _ids(tokenizer, after, "end of a turn")[:1]
    if first and first[0] in tokenizer.added_tokens_decoder:
        return first[0]
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: neither the chat template nor the tokenizer names a token that ends an answer.")
    return tokenizer.eos_token_id
