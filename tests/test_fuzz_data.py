"""Whatever is done to a file: each of its rows is trained on or counted, or the run stops and names the file.

The mutations are drawn from seeds, so that a failure comes back. What a file holds is found out here a second time, by
plain means: its lines are counted and parsed without the package.
"""

import gzip
import json
import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from byte_tokenizer import byte_tokenizer

from thinkpo_jax.chat import Chat
from thinkpo_jax.config import UserError
from thinkpo_jax.data import Examples, prepare
from thinkpo_jax.forms import PairData, SftData
from thinkpo_jax.rows import BadRow, Source, read_rows

ROW_LENGTH = 400  # every row that is left as it was fits
NO_LINE = re.compile(rb"[ \t\r\x0b\x0c]*")
MARKS = re.compile(r"\[(?:user|assistant|system)\]|<end>")
LINE_BREAKS = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\r", "\n", "\r\n")
VALUES: tuple[Any, ...] = (
    *(None, 0, -1.5, 10**30, math.nan, math.inf, True, False, "", " \t\n", [], {}, [[]], [None], {"a": {"b": []}}),
    *(
        "\ud83d",
        "ok\udc00",
        "nul\0byte",
        "a<end>b",
        "<end>",
        "<eos>",
        "é" * 90,
        "long" * 200,
        "x" * 20_000,
        "\ufeffbom",
    ),
    *(*LINE_BREAKS, "a\u2028b", "\ufffd", "\U0001f600", "<think>open", "{{ bos }}", "4" * 5000, "\x7f\x1b[31m"),
    *([{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}], [{"role": "user"}], ["text"]),
)


class Line(NamedTuple):
    """The bytes of one row, or of what was one; `whole` where nothing was done to it."""

    content: bytes
    whole: bool


class File(NamedTuple):
    lines: list[Line]
    config: dict[str, Any]
    pair: bool


def words(draw: random.Random, most: int) -> str:
    letters = string.ascii_letters + string.digits + '  .,é√\u2028\t\n"\\'
    return "".join(draw.choices(letters, k=draw.randint(1, most))) + draw.choice(string.ascii_letters)


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


FORMS: dict[str, Callable[[random.Random, str], dict[str, Any]]] = {
    "response": lambda draw, mark: {"prompt": f"{mark}{words(draw, 30)}", "response": words(draw, 30) + mark},
    "messages": lambda draw, mark: {"messages": turns(words(draw, 30), "so", words(draw, 9), mark + words(draw, 30))},
    "conversations": lambda draw, mark: {
        "conversations": [
            {"from": "human", "value": words(draw, 30)}, {"from": "gpt", "value": mark + words(draw, 30)}
        ],
        "system": draw.choice(["", "Be brief.", None]),
    },
    "pair": lambda draw, mark: {"prompt": mark, "chosen": f"c{words(draw, 40)}{mark}", "rejected": f"r{mark}"},
    "pair of lists": lambda draw, mark: {
        "chosen": turns(mark, f"c{words(draw, 40)}{mark}"), "rejected": turns(mark, f"r{mark}")
    },
}  # fmt: skip


# Mutations of a row, of its line and of a file.


def slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything within a value."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from slots(inner)


def mutated_row(draw: random.Random, row: dict[str, Any]) -> object:
    """The row with something else in it, or nothing."""
    container, key = draw.choice(list(slots(row)))
    value = container[key]
    kind = draw.randrange(10)
    if kind < 5:
        container[key] = draw.choice(VALUES)
    elif kind == 5:
        del container[key]
    elif kind == 6 and isinstance(container, dict):
        new = draw.choice([f"{key} ", str(key).upper(), str(key)[:-1], "", "role", "completion", "\ud83d", "a\nb"])
        container[new] = container.pop(key)
    elif kind == 6:
        container.append(value)
    elif kind == 7 and isinstance(value, list):
        draw.shuffle(value)
    elif kind == 7:
        container[key] = value + draw.choice(LINE_BREAKS) + value if isinstance(value, str) else [value]
    elif kind == 8:
        for _ in range(draw.choice([1, 3, 50])):
            container[key] = {"content": container[key]} if draw.random() < 0.5 else [container[key]]
    else:
        return draw.choice([row[key] if key in row else [row], *VALUES])
    return row


def mutated_line(draw: random.Random, row: dict[str, Any], line: bytes) -> bytes:
    """The line of a row, changed; it may come to be several lines, or blank."""
    at, kind = draw.randrange(len(line)), draw.randrange(18)
    some = bytes(draw.choices(range(256), k=draw.randint(1, 5)))
    if kind < 7:
        return json.dumps(mutated_row(draw, row), ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
    if kind == 7:
        return line[:at] + bytes([line[at] ^ 1 << draw.randrange(8)]) + line[at + 1 :]
    if kind == 8:
        return line[:at] + line[at + len(some) :]
    if kind == 9:
        return line[:at] + some + line[at:]
    if kind == 10:
        return line[:at]
    if kind == 11:
        return line + draw.choice([b"", b" ", b","]) + line
    if kind == 12:  # a key given twice
        return line[:1] + b'"%s": "twice", ' % draw.choice(list(row)).encode() + line[1:]
    if kind == 13:
        return draw.choice([b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000, b"-", b"nul", b"\0", b"NaN", b"\xef\xbb\xbf"])
    if kind == 14:
        return line.decode().encode(draw.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"]))
    if kind == 15:
        return line.replace(b"e", draw.choice([b"\xe9", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5", b"\\u0000"]))
    if kind == 16:
        return line.replace(b'"', draw.choice([b"'", b"", b'\\"']))
    return draw.choice([b"", b"  ", b"\t\r", b"\x0c"])


def fuzzed(draw: random.Random) -> File:
    """Rows of one form, of which some are not what they were."""
    form = draw.choice(list(FORMS))
    rows = [FORMS[form](draw, f"<{i}>{draw.randrange(10**6)}") for i in range(draw.randint(1, 7))]
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5).encode() for row in rows]
    named = {"response": "response"} if form == "response" else {"messages": form}
    pair = form.startswith("pair")
    config = {} if pair or (known := draw.random() < 0.5) else named
    sound = 0 if pair or config else 1  # where no column is named, the first row must be able to tell
    found = [
        Line(line, True) if i < sound or draw.random() < 0.5 else Line(mutated_line(draw, row, line), False)
        for i, (row, line) in enumerate(zip(rows, lines, strict=True))
    ]
    for _ in range(draw.choice([0, 0, 1, 3])):
        found.insert(draw.randint(0, len(found)), draw.choice([*found, Line(draw.choice([b"", b" \t"]), False)]))
    if draw.random() < 0.1:
        found[0] = Line(b"\xef\xbb\xbf" + found[0].content, found[0].whole)
    if draw.random() < 0.2:
        found = [Line(line.content + b"\r", line.whole) for line in found]
    config |= {"over_length": draw.choice(["drop", "drop", "cut", "raise"]), "prompt_suffix": draw.choice(["", "?"])}
    return File(found, config, pair)
