"""Encodes texts without loss, also with tokenizers that write a space before a text.

Tokenizers made with sentencepiece (Llama 2, Mistral, TinyLlama) encode "Hi" as "▁Hi". They put this dummy prefix before
every text, or before every text between special tokens. Decoding removes it. A part of a text gets no dummy prefix
inside a whole text, so `encode_text` cuts it off where a prompt ends in whitespace or in a token without one:

| end of the prompt                     | answer "Hi"                                                 |
|---------------------------------------|-------------------------------------------------------------|
| whitespace, such as `assistant\\n`     | `Hi`, as in the whole text                                  |
| a special token                       | as in the whole text: `▁Hi` or `Hi`, by the tokenizer       |
| other text, such as `[/INST]`         | `▁Hi`: the templates of these models write a space there    |
"""

import itertools
from collections.abc import Sequence
from typing import Any

from thinkpo_jax.runtime.config import UserError

_SPACE_MARKS = ("▁", "Ġ")  # how sentencepiece and byte-level tokenizers write a space
_ANCHORS = ("\n", ".", "a")  # texts that rarely merge with the text after them
_KEPT_MARK = "\ue000"  # stands for a "▁" of the text itself, which is no space


def encode_text(tokenizer: Any, text: str, description: str, *, prompt: str = "") -> list[int]:
    """Encodes a text by itself, or as it continues a prompt.

    The template writes the BOS token, if there is one, so none is added. Raises `UserError` if decoding the ids does
    not give back the text as the tokenizer normalizes it.
    """
    has_prefix = _has_dummy_prefix(tokenizer)
    anchor, num_anchor, ids = _encode_after(tokenizer, prompt if has_prefix else "", text)
    if loss := _find_loss(tokenizer, anchor + text, ids, has_prefix=has_prefix):
        position, before, after = loss
        reason = "" if tokenizer.unk_token_id not in ids else " The vocabulary has no token for it."
        reason = " The tokenizer writes a space as this character." if before.startswith("▁") else reason
        raise UserError(
            f"the tokenizer cannot write the {description}: {before!r} at character {position + 1 - len(anchor)} "
            f"comes back as {after!r}.{reason} Use the tokenizer of the model, or remove the row."
        )
    return ids[num_anchor:]


def encode_tag(tokenizer: Any, tag: str) -> list[int]:
    """Returns the ids of a tag at the start of a line. The tokenizer may have no tokens for it."""
    _, num_anchor, ids = _encode_after(tokenizer, "\n" if _has_dummy_prefix(tokenizer) else "", tag)
    return ids[num_anchor:]


def _encode_after(tokenizer: Any, prompt: str, text: str) -> tuple[str, int, list[int]]:
    """Encodes an anchor and a text. Returns the anchor, the number of its ids, and the ids of both together."""
    for anchor in _anchors(tokenizer, prompt):
        head, ids = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
        if ids[: len(head)] == head:  # else the anchor and the text share a token
            return anchor, len(head), ids
    return "", 0, _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _has_dummy_prefix(tokenizer: Any) -> bool:
    return "".join(tokenizer.convert_ids_to_tokens(_ids(tokenizer, "a"))).startswith(_SPACE_MARKS)


def _anchors(tokenizer: Any, prompt: str) -> Sequence[str]:
    """Returns texts that stand for the end of the prompt. There is none if the dummy prefix belongs there."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if prompt.endswith(token.content)]
    return special or (_ANCHORS if prompt[-1:].isspace() else ())


def _find_loss(tokenizer: Any, text: str, ids: list[int], *, has_prefix: bool) -> tuple[int, str, str] | None:
    """Returns where decoding the ids gives another text, and the start of both texts there. None if it does not."""
    decoded, expected = _decode(tokenizer, ids), _normalize(tokenizer, text)
    if has_prefix:
        expected = _normalize(tokenizer, text.replace("▁", _KEPT_MARK)).replace("▁", " ").replace(_KEPT_MARK, "▁")
        accepted = (expected, expected.removeprefix(" "), f" {expected}")
        if decoded in accepted or _decode_segments(tokenizer, ids) in accepted:
            return None
        expected = expected if decoded.startswith(" ") else expected.removeprefix(" ")
    if decoded == expected:
        return None
    start = next((i for i, (a, b) in enumerate(zip(decoded, expected, strict=False)) if a != b), len(decoded))
    return start, expected[start : start + 20], decoded[start : start + 20]


def _normalize(tokenizer: Any, text: str) -> str:
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    return text if normalizer is None else normalizer.normalize_str(text)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _decode_segments(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decodes the texts between special tokens one by one, because each may have its own dummy prefix."""
    added = tokenizer.added_tokens_decoder
    segments = itertools.groupby(ids, key=lambda token_id: token_id in added)
    return "".join(
        "".join(added[token_id].content for token_id in segment) if is_added else _decode(tokenizer, list(segment))
        for is_added, segment in segments
    )
