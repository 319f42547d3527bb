"""Renders prompts with the chat template of a model, and encodes prompts and answers.

The template renders a prompt, which is encoded once. An answer is encoded by itself, and its ids are appended. So the
ids of the prompt are a prefix of prompt + answer, and no template can rewrite an answer. For example, the template of
DeepSeek-R1-Distill deletes the thought of a finished answer. If the prompt already ends in `<think>`, an answer that
begins with it does not open a second thought.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from thinkpo_jax.data.chat_template import (
    ANSWER_SECTION_TAGS,
    THOUGHT_TAGS,
    ChatTemplate,
    Message,
    TemplateArguments,
    ThinkingFormat,
)
from thinkpo_jax.data.text_encoding import encode_tag, encode_text
from thinkpo_jax.data.tokenizer_files import count_token_ids, load_tokenizer
from thinkpo_jax.runtime.config import UserError


class RenderedPrompt(NamedTuple):
    """A prompt as the chat template renders it, and its token ids.

    `open_thought_tag` is `<think>` if the prompt ends in it, so that every answer begins inside a thought. Otherwise it
    is empty.
    """

    text: str
    ids: list[int]
    open_thought_tag: str = ""

    def without_open_tag(self, answer: str) -> str:
        """Removes the tag from the start of an answer, and the whitespace around it, if the prompt ends in the tag."""
        tag, text = self.open_thought_tag, answer.lstrip()
        if tag and text.startswith(tag):
            return text.removeprefix(tag).removeprefix(self.text[len(self.text.rstrip()) :])
        return answer


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template. `end_of_turn_id` ends an answer, and `stop_token_ids` end a generation.

    `special_token_ids` structure a conversation and must not occur inside a text. Tags of thoughts are not among them.
    """

    tokenizer: Any
    template: ChatTemplate
    end_of_turn_id: int
    stop_token_ids: tuple[int, ...]
    special_token_ids: frozenset[int]

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        stop_token_ids: Sequence[int] = (),
        template_arguments: TemplateArguments | None = None,
        thinking_tags: tuple[str, str] | None = None,
    ) -> "ChatTokenizer":
        """Loads the tokenizer of a Hugging Face folder.

        `template_arguments` are variables of its chat template. `thinking_tags` are the texts before and after a
        thought. By default they are what the template writes. Raises `UserError` if the tokenizer or its template is
        missing, or if the template has no such variable.
        """
        tokenizer = load_tokenizer(folder)
        if tokenizer.chat_template is None:
            advice = "Add chat_template.jinja, or the key chat_template in tokenizer_config.json"
            raise UserError(f"{folder}: the tokenizer has no chat template to render prompts with. {advice}.")
        template = ChatTemplate(tokenizer, template_arguments or {}, thinking_tags)
        template.check_arguments(folder)
        end_id = _end_of_turn_id(template, folder)
        special_ids = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        tags = [tag for tags in (template.thinking.tags, *ANSWER_SECTION_TAGS) for tag in tags]
        special_ids -= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if str(token) in tags}
        stop_ids = tuple(sorted({end_id, *stop_token_ids}))
        return cls(tokenizer, template, end_id, stop_ids, frozenset(special_ids | {end_id}))

    @property
    def thinking(self) -> ThinkingFormat:
        """How a thought that comes in a field of its own is joined to its answer."""
        return self.template.thinking

    def encode_prompt(self, messages: Sequence[Message]) -> RenderedPrompt:
        """Renders a conversation up to where the answer of the assistant begins, and encodes it.

        Raises `UserError` for a special token in a message, for a text that the tokenizer cannot represent, and if the
        template leaves out the text of the system or of a user.
        """
        special_tokens = self.tokenizer.convert_ids_to_tokens(sorted(self.special_token_ids))
        for message in messages:
            text = message["content"] + message.get("thinking", "")
            if special := [token for token in special_tokens if token in text]:
                raise _special_token_error(f"the {message['role']}'s text", special)
        text = self.template.render(messages, add_generation_prompt=True)
        for message in messages:
            if message["role"] != "assistant" and message["content"].strip() not in text:
                raise UserError(f"the chat template leaves out the {message['role']}'s text. Use another template.")
        open_tags = [opening for opening, _ in self.thought_tags if text.rstrip().endswith(opening)]
        return RenderedPrompt(text, encode_text(self.tokenizer, text, "prompt"), *open_tags[:1])

    def find_earlier_answers(self, messages: Sequence[Message], prompt: RenderedPrompt) -> list[tuple[int, int]]:
        """Returns where the ids of earlier answers begin and end in `prompt.ids`, each with its end token.

        The thoughts of earlier answers are in the prompt if the template keeps them. Raises `UserError` if the template
        does not write the answers one after the other, or the tokenizer does not know where a token comes from.
        """
        if not self.tokenizer.is_fast:
            raise UserError("train_on: all needs a fast tokenizer (tokenizer.json), because only it gives offsets.")
        offsets = self.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        starts, ends = zip(*offsets, strict=True)
        spans: list[tuple[int, int]] = []
        for start, end in self.template.find_earlier_answers(messages, prompt.text):
            first, last = bisect.bisect_left(starts, start), bisect.bisect_left(starts, end)
            if ends[first - 1] > start or last == len(starts) or prompt.ids[last] != self.end_of_turn_id:
                problem = "an earlier answer does not begin with a token of its own, or no end token follows it"
                raise UserError(f"{problem}. Use train_on: last.")
            spans.append((first, last + 1))
        return spans

    def encode_answer(self, prompt: RenderedPrompt, answer: str) -> list[int]:
        """Encodes an answer and its end token.

        Raises `UserError` as `encode_prompt` does, if there is no token, or if the answer begins with a thought and the
        prompt already holds one.
        """
        text = prompt.without_open_tag(answer)
        if self._ends_in_thought(prompt) and text.lstrip().startswith(tuple(tag for tag, _ in self.thought_tags)):
            advice = "Change `template_arguments` (such as enable_thinking), or remove the thoughts from the data"
            raise UserError(f"the prompt ends in an empty thought, but the answer begins with a thought. {advice}.")
        ids = encode_text(self.tokenizer, text, "answer", prompt=prompt.text)
        if not ids:
            raise UserError(f"the answer {answer!r:.60} gives no token to train. Remove the row from the data.")
        if special_ids := self.special_token_ids.intersection(ids):
            raise _special_token_error("the answer", self.tokenizer.convert_ids_to_tokens(sorted(special_ids)))
        return [*ids, self.end_of_turn_id]

    def encode_empty_thought(self, prompt: RenderedPrompt) -> list[int]:
        """Encodes a thought without content. What the prompt already holds of it is left out. It is not trained."""
        if self._ends_in_thought(prompt):
            return []
        thought = prompt.without_open_tag(self.thinking.join("", ""))
        return encode_text(self.tokenizer, thought, "empty thought", prompt=prompt.text)

    def _ends_in_thought(self, prompt: RenderedPrompt) -> bool:
        return prompt.text.rstrip().endswith(tuple(tag for _, tag in self.thought_tags))

    @functools.cached_property
    def thought_tags(self) -> tuple[tuple[str, str], ...]:
        """The tags of thoughts: those of this model, and other known ones."""
        return tuple(dict.fromkeys((self.thinking.tags, *THOUGHT_TAGS)))

    def thought_end_token_ids(self) -> list[list[int]]:
        """Returns for each tag that ends a thought its ids at the start of a line."""
        tags = (encode_tag(self.tokenizer, closing) for _, closing in self.thought_tags)
        return [ids[:-1] or ids for ids in tags]  # the last of several ids may merge with the text after the tag

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest token id plus one. Rows of the embedding after it belong to no token."""
        return count_token_ids(self.tokenizer)

    @functools.cached_property
    def max_token_characters(self) -> int:
        """The length of the longest token. A text of n tokens has at most n times as many characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Returns the number of tokens of each text, without those that a template adds."""
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of generated ids, without special tokens. Tags of thoughts stay."""
        ids = [token_id for token_id in ids if token_id not in self.special_token_ids]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _special_token_error(owner: str, tokens: Sequence[str]) -> UserError:
    advice = "Remove it from the data. Only the chat template may begin and end turns"
    return UserError(f"{owner} holds {', '.join(map(repr, tokens))}, special to this tokenizer. {advice}.")


def _end_of_turn_id(template: ChatTemplate, folder: Path) -> int:
    """Returns the token that the template writes after an answer, or the EOS token if it writes none."""
    tokenizer = template.tokenizer
    first_ids = encode_text(tokenizer, template.text_after_answer(folder), "end of a turn")[:1]
    if first_ids and first_ids[0] in tokenizer.added_tokens_decoder:
        return first_ids[0]
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: neither the chat template nor the tokenizer names a token that ends an answer.")
    return tokenizer.eos_token_id
