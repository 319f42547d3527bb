"""Whatever is done to a file, each of its rows is trained on or counted, or an error names the file.

The mutations are drawn from seeds, so a failure can be repeated. The tests work out what a file contains without the
package: they count and parse its lines.
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

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import TokenizedDataset
from thinkpo_jax.data.readers import DataSourceConfig, iterate_records
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.config import UserError

ROW_LENGTH = 400  # every intact row fits
BLANK_LINE = re.compile(rb"[ \t\r\x0b\x0c]*")
TURN_TAGS = re.compile(r"\[(?:user|assistant|system)\]|<end>")
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
    """The bytes of one line. An intact line was not mutated."""

    content: bytes
    is_intact: bool


class File(NamedTuple):
    lines: list[Line]
    config: dict[str, Any]
    has_pairs: bool


def words(draw: random.Random, max_characters: int) -> str:
    letters = string.ascii_letters + string.digits + '  .,é√\u2028\t\n"\\'
    return "".join(draw.choices(letters, k=draw.randint(1, max_characters))) + draw.choice(string.ascii_letters)


def turns(*contents: str) -> list[dict[str, str]]:
    """Returns messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# `mark` makes the texts of a row unique.
ROW_MAKERS: dict[str, Callable[[random.Random, str], dict[str, Any]]] = {
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


def iterate_slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key) of everything inside a value."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from iterate_slots(item)


def mutate_row(draw: random.Random, row: dict[str, Any]) -> object:
    """Changes, adds or removes something in a row, or returns another value instead of it."""
    container, key = draw.choice(list(iterate_slots(row)))
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
        return draw.choice([row.get(key, [row]), *VALUES])
    return row


def mutate_line(draw: random.Random, row: dict[str, Any], line: bytes) -> bytes:
    """Changes the line of a row. The result may be several lines, or blank."""
    at, kind = draw.randrange(len(line)), draw.randrange(18)
    new_bytes = bytes(draw.choices(range(256), k=draw.randint(1, 5)))
    if kind < 7:
        return json.dumps(mutate_row(draw, row), ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
    if kind == 7:
        return line[:at] + bytes([line[at] ^ 1 << draw.randrange(8)]) + line[at + 1 :]
    if kind == 8:
        return line[:at] + line[at + len(new_bytes) :]
    if kind == 9:
        return line[:at] + new_bytes + line[at:]
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


def draw_file(draw: random.Random) -> File:
    """Draws rows of one format and mutates some of them."""
    row_format = draw.choice(list(ROW_MAKERS))
    rows = [ROW_MAKERS[row_format](draw, f"<{i}>{draw.randrange(10**6)}") for i in range(draw.randint(1, 7))]
    contents = [json.dumps(row, ensure_ascii=draw.random() < 0.5).encode() for row in rows]
    columns = {"response": "response"} if row_format == "response" else {"messages": row_format}
    has_pairs = row_format.startswith("pair")
    config: dict[str, Any] = {} if has_pairs or draw.random() < 0.5 else dict(columns)
    num_intact = int(not has_pairs and not config)  # without named columns, the first row decides what they are
    lines = [
        Line(content, True) if i < num_intact or draw.random() < 0.5 else Line(mutate_line(draw, row, content), False)
        for i, (row, content) in enumerate(zip(rows, contents, strict=True))
    ]
    for _ in range(draw.choice([0, 0, 1, 3])):
        lines.insert(draw.randint(0, len(lines)), draw.choice([*lines, Line(draw.choice([b"", b" \t"]), False)]))
    if draw.random() < 0.1:
        lines[0] = Line(b"\xef\xbb\xbf" + lines[0].content, lines[0].is_intact)
    if draw.random() < 0.2:
        lines = [Line(line.content + b"\r", line.is_intact) for line in lines]
    config |= {"over_length": draw.choice(["drop", "drop", "cut", "raise"]), "prompt_suffix": draw.choice(["", "?"])}
    return File(lines, config, has_pairs)


# What the package must make of a file.


def all_texts(value: Any) -> set[str]:
    """Returns all texts inside a value."""
    if isinstance(value, str):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for item in items for text in all_texts(item)}


def render_row(row: dict[str, Any], config: SftDataConfig | PreferenceDataConfig) -> tuple[str, ...]:
    """Renders an intact row as the template of the byte tokenizer does: the prompt, then each answer."""
    columns = [row[name] for name in ("messages", "conversations", "response", "chosen", "rejected") if name in row]
    messages = [{"role": "user", "content": row["prompt"]}] if "prompt" in row else columns[0][:-1]
    turns = [
        ({"human": "user", "gpt": "assistant"}.get(role, role), text)
        for role, text in (message.values() for message in messages)
    ]
    if row.get("system"):
        turns.insert(0, ("system", row["system"]))
    prompt = "".join(f"[{role}]{text}{'<end>' if role == 'assistant' else ''}" for role, text in turns)
    answers = (column if isinstance(column, str) else list(column[-1].values())[1] for column in columns)
    return f"{prompt}{config.prompt_suffix}[assistant]", *(f"{answer}<end>" for answer in answers)


def decode_examples(examples: TokenizedDataset, chat: ChatTokenizer) -> list[tuple[str, ...]]:
    """Decodes each example: the prompt, then each answer."""
    decode = chat.tokenizer.decode
    decoded = []
    for segments in examples:
        (prompt,) = {decode(segment.token_ids[: segment.answer_start]) for segment in segments}
        decoded.append((prompt, *(decode(segment.token_ids[segment.answer_start :]) for segment in segments)))
    return decoded


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of its pairs. A key that is given twice is ambiguous, so it is an error."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def comes_from(example: tuple[str, ...], line: bytes, config: SftDataConfig | PreferenceDataConfig) -> bool:
    """Tells whether the line contains every text of an example."""
    try:
        texts = all_texts(json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_keys))
    except (ValueError, RecursionError):
        return False
    prompt, *answers = example
    pieces = TURN_TAGS.split(prompt.removesuffix("[assistant]").removesuffix(config.prompt_suffix))
    return all(piece in texts for piece in pieces if piece) and all(
        answer.removesuffix("<end>") in texts
        if answer.endswith("<end>")
        else config.over_length == "cut" and any(text.startswith(answer.rstrip("\ufffd")) for text in texts)
        for answer in answers
    )


def checked_message(error: UserError, path: object) -> str:
    """Returns the message of an error, which must name the file and be printable."""
    message = str(error)
    assert message.startswith(str(path))
    assert message.encode()
    return message


def error_of(config: SftDataConfig | PreferenceDataConfig, chat: ChatTokenizer) -> str | None:
    """Returns the message of the error that stops the run, or None."""
    try:
        tokenize_sources([config], chat, row_length=ROW_LENGTH, seed=0)
    except UserError as error:
        return checked_message(error, config.path)
    return None


def check_lines(file: File, path: Path, chat: ChatTokenizer) -> None:
    """`skip` uses every intact row and counts the others. `raise` names the first bad row."""
    content = b"\n".join(line.content for line in file.lines)
    path.write_bytes(content)
    numbered = dict(enumerate(content.split(b"\n"), 1))
    rows = {number: line for number, line in numbered.items() if not BLANK_LINE.fullmatch(line)}
    config_class = PreferenceDataConfig if file.has_pairs else SftDataConfig
    skipping = config_class(path=str(path), on_bad_row="skip", **file.config)
    if not rows or (skipping.over_length == "raise" and error_of(skipping, chat) is not None):
        message = error_of(skipping, chat) or ""
        assert ("there are no rows" if not rows else f"do not fit row_length {ROW_LENGTH}") in message
        return
    dataset = tokenize_sources([skipping], chat, row_length=ROW_LENGTH, seed=0)
    (report,) = dataset.reports
    assert report.rows == len(rows) == report.num_used + sum(report.dropped.values())
    assert report.num_used == len(dataset)
    assert all(reason.strip() and count > 0 for reason, count in report.dropped.items())
    examples = decode_examples(dataset, chat)
    intact = [json.loads(line.content) for line in file.lines if line.is_intact and line.content]
    assert not Counter(render_row(row, skipping) for row in intact) - Counter(examples)
    remaining_lines = iter(rows.values())
    assert all(any(comes_from(example, line, skipping) for line in remaining_lines) for example in examples)

    message = error_of(skipping.model_copy(update={"on_bad_row": "raise"}), chat)
    assert (message is None) == (not report.first_error_by_reason)
    if message is not None:
        assert message in report.first_error_by_reason.values()
        location = re.match(r", line (\d+)[:,]", message.removeprefix(str(path)))
        assert location is not None
        assert int(location[1]) in rows


@pytest.mark.parametrize("hundred", range(10))
def test_a_changed_row_is_trained_on_or_counted_or_named_and_all_others_are_used(
    hundred: int, tmp_path: Path, chat: ChatTokenizer
):
    for seed in range(100 * hundred, 100 * hundred + 100):
        draw = random.Random(seed)
        check_lines(draw_file(draw), tmp_path / f"{seed}.jsonl", chat)


# Damage to compressed files, which are read completely or not at all.


def damage(draw: random.Random, content: bytes, end: int) -> bytes:
    """Changes, removes or adds some bytes before `end`, or cuts the content there, or appends bytes."""
    at, new_bytes = draw.randrange(end), bytes(draw.choices(range(256), k=draw.randint(1, 40)))
    return draw.choice([
        content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
        content[:at] + content[at + len(new_bytes) :],
        content[:at] + new_bytes + content[at:],
        content[:at] + new_bytes + content[at + len(new_bytes) :],
        content[:at] + bytes(len(new_bytes)) + content[at + len(new_bytes) :],
        content[:at],
        content + draw.choice([new_bytes, content[:at], bytes(9)]),
    ])  # fmt: skip


def rows_or_error(path: Path) -> list[object] | None:
    """Returns the rows of a file, or None if reading it is an error that names it."""
    try:
        return [record for _, record in iterate_records(DataSourceConfig(path=str(path)), seed=0)]
    except UserError as error:
        checked_message(error, path)
        return None


def draw_pairs(draw: random.Random, count: int) -> list[dict[str, Any]]:
    return [ROW_MAKERS["pair"](draw, f"<{i}>") | {"more": turns(words(draw, 20), "so")} for i in range(count)]


def test_a_damaged_gz_file_gives_all_of_its_rows_or_is_an_error_with_its_name(tmp_path: Path, chat: ChatTokenizer):
    outcomes = Counter[bool]()
    for seed in range(250):
        draw = random.Random(seed)
        rows = draw_pairs(draw, draw.choice([1, 9, 300]))
        path = tmp_path / "rows.jsonl.gz"
        content = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows), mtime=0)
        path.write_bytes(damage(draw, content, len(content)))
        rows_read = rows_or_error(path)
        outcomes[rows_read is None] += 1
        assert rows_read in (None, rows)
        config = PreferenceDataConfig(path=str(path), on_bad_row="skip")
        assert (error_of(config, chat) is None) == (rows_read is not None)
    assert outcomes[True] > 200
    assert outcomes[False] > 5


def test_a_damaged_parquet_file_gives_all_of_its_rows_or_is_an_error_with_its_name(tmp_path: Path):
    """This holds for files with checksums. They cover the pages only, so the damage is before the footer."""
    import pyarrow
    from pyarrow import parquet

    outcomes = Counter[bool]()
    path = tmp_path / "rows.parquet"
    for seed in range(250):
        draw = random.Random(seed)
        rows = draw_pairs(draw, draw.choice([1, 9, 150]))
        options: dict[str, Any] = {
            "compression": draw.choice(["none", "snappy", "gzip", "zstd"]),
            "row_group_size": 100,
        }
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, path, use_dictionary=draw.random() < 0.5, write_page_checksum=True, **options)
        content = path.read_bytes()
        path.write_bytes(damage(draw, content, footer_start(content)))
        rows_read = rows_or_error(path)
        outcomes[rows_read is None] += 1
        assert rows_read in (None, rows)
    assert outcomes[True] > 150
    assert outcomes[False] > 5


def footer_start(content: bytes) -> int:
    """Returns where the footer of a Parquet file begins."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


def test_a_parquet_file_with_a_damaged_footer_never_has_fewer_rows(tmp_path: Path):
    """No checksum covers the footer, so a changed bit may rename a column. The rows are still counted."""
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": [str(i) for i in range(150)]})
    parquet.write_table(table, path, store_schema=False, write_statistics=False)
    content = path.read_bytes()
    for bit in range(8 * footer_start(content), 8 * len(content)):
        at = bit // 8
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit % 8]) + content[at + 1 :])
        rows_read = rows_or_error(path)
        assert rows_read is None or len(rows_read) == table.num_rows
