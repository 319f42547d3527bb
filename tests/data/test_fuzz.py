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
from support.byte_tokenizer import byte_tokenizer

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import TokenizedDataset
from thinkpo_jax.data.readers import iterate_records
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig
from thinkpo_jax.data.sources import DataSourceConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.runtime.config import UserError

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
        return draw.choice([row.get(key, [row]), *VALUES])
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
    columns = {"response": "response"} if form == "response" else {"messages": form}
    pair = form.startswith("pair")
    config: dict[str, Any] = {} if pair or draw.random() < 0.5 else dict(columns)
    sound = int(not pair and not config)  # where no column is named, the first row must be able to tell
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


# What must come of it.


def texts(value: Any) -> set[str]:
    """All texts within a value."""
    if isinstance(value, str):
        return {value}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for part in inner for text in texts(part)}


def rendered(row: dict[str, Any], config: SftDataConfig | PreferenceDataConfig) -> tuple[str, ...]:
    """A sound row as the byte tokenizer's template writes it: what is read, then each answer."""
    columns = [row[name] for name in ("messages", "conversations", "response", "chosen", "rejected") if name in row]
    asked = [{"role": "user", "content": row["prompt"]}] if "prompt" in row else columns[0][:-1]
    said = [
        ({"human": "user", "gpt": "assistant"}.get(role, role), text)
        for role, text in (turn.values() for turn in asked)
    ]
    if "system" in row and row["system"] and isinstance(config, SftDataConfig) and config.messages is None:
        said.insert(0, ("system", row["system"]))
    prompt = "".join(f"[{role}]{text}{'<end>' if role == 'assistant' else ''}" for role, text in said)
    answers = (column if isinstance(column, str) else list(column[-1].values())[1] for column in columns)
    return f"{prompt}{config.prompt_suffix}[assistant]", *(f"{answer}<end>" for answer in answers)


def read(examples: TokenizedDataset, chat: ChatTokenizer) -> list[tuple[str, ...]]:
    """What is read before the answers of each example, and the answers."""
    decode = chat.tokenizer.decode
    found = []
    for segments in examples:
        (prompt,) = {decode(segment.token_ids[: segment.answer_start]) for segment in segments}
        found.append((prompt, *(decode(segment.token_ids[segment.answer_start :]) for segment in segments)))
    return found


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a key that is given twice says two things."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def comes_from(example: tuple[str, ...], line: bytes, config: SftDataConfig | PreferenceDataConfig) -> bool:
    """Whether every text of an example is one of the line's."""
    try:
        given = texts(json.loads(line.decode("utf-8-sig"), object_pairs_hook=each_once))
    except (ValueError, RecursionError):
        return False
    prompt, *answers = example
    asked = MARKS.split(prompt.removesuffix("[assistant]").removesuffix(config.prompt_suffix))
    return all(piece in given for piece in asked if piece) and all(
        answer.removesuffix("<end>") in given
        if answer.endswith("<end>")
        else config.over_length == "cut" and any(text.startswith(answer.rstrip("\ufffd")) for text in given)
        for answer in answers
    )


def named(error: UserError, path: object) -> str:
    """The message of an error, once it is seen that it names the file and can be printed."""
    message = str(error)
    assert message.startswith(str(path))
    assert message.encode()
    return message


def error_of(config: SftDataConfig | PreferenceDataConfig, chat: ChatTokenizer) -> str | None:
    """The message with which the run stops; None where it goes on."""
    try:
        tokenize_sources([config], chat, row_length=ROW_LENGTH, seed=0)
    except UserError as error:
        return named(error, config.path)
    return None


def check_lines(file: File, path: Path, chat: ChatTokenizer) -> None:
    """Skipping keeps every sound row and counts the others; raising names the first bad line."""
    content = b"\n".join(line.content for line in file.lines)
    path.write_bytes(content)
    numbered = dict(enumerate(content.split(b"\n"), 1))
    rows = {number: line for number, line in numbered.items() if not NO_LINE.fullmatch(line)}
    kind = PreferenceDataConfig if file.pair else SftDataConfig
    skipping = kind(path=str(path), on_bad_row="skip", **file.config)
    if not rows or (skipping.over_length == "raise" and error_of(skipping, chat) is not None):
        message = error_of(skipping, chat) or ""
        assert ("there are no rows" if not rows else f"do not fit row_length {ROW_LENGTH}") in message
        return
    examples = tokenize_sources([skipping], chat, row_length=ROW_LENGTH, seed=0)
    (report,) = examples.reports
    assert report.rows == len(rows) == report.num_used + sum(report.dropped.values())
    assert report.num_used == len(examples)
    assert all(reason.strip() and count > 0 for reason, count in report.dropped.items())
    found = read(examples, chat)
    sound = Counter(rendered(json.loads(line.content), skipping) for line in file.lines if line.whole and line.content)
    assert not sound - Counter(found)
    left = iter(rows.values())
    assert all(any(comes_from(example, line, skipping) for line in left) for example in found)

    message = error_of(skipping.model_copy(update={"on_bad_row": "raise"}), chat)
    assert (message is None) == (not report.first_error_by_reason)
    if message is not None:
        assert message in report.first_error_by_reason.values()
        place = re.match(r", line (\d+)[:,]", message.removeprefix(str(path)))
        assert place is not None
        assert int(place[1]) in rows


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_folder(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.mark.parametrize("hundred", range(10))
def test_a_changed_line_is_trained_on_or_counted_or_named_and_all_others_are_kept(
    hundred: int, tmp_path: Path, chat: ChatTokenizer
):
    for seed in range(100 * hundred, 100 * hundred + 100):
        draw = random.Random(seed)
        check_lines(fuzzed(draw), tmp_path / f"{seed}.jsonl", chat)


# Damage to compressed files: there is no half of one.


def damaged(draw: random.Random, content: bytes, within: int) -> bytes:
    """Bytes of which some, before `within`, are others, are gone or are new; or of which the end is gone."""
    at, some = draw.randrange(within), bytes(draw.choices(range(256), k=draw.randint(1, 40)))
    return draw.choice([
        content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
        content[:at] + content[at + len(some) :],
        content[:at] + some + content[at:],
        content[:at] + some + content[at + len(some) :],
        content[:at] + bytes(len(some)) + content[at + len(some) :],
        content[:at],
        content + draw.choice([some, content[:at], bytes(9)]),
    ])  # fmt: skip


def rows_or_error(path: Path) -> list[object] | None:
    """The rows of a file; None where it cannot be read as a whole."""
    try:
        return [row for _, row in iterate_records(DataSourceConfig(path=str(path)), seed=0)]
    except UserError as error:
        named(error, path)
        return None


def pairs(draw: random.Random, count: int) -> list[dict[str, Any]]:
    return [FORMS["pair"](draw, f"<{i}>") | {"more": turns(words(draw, 20), "so")} for i in range(count)]


def test_a_damaged_gz_file_gives_all_of_its_rows_or_is_an_error_with_its_name(tmp_path: Path, chat: ChatTokenizer):
    outcomes = Counter[bool]()
    for seed in range(250):
        draw = random.Random(seed)
        rows = pairs(draw, draw.choice([1, 9, 300]))
        path = tmp_path / "rows.jsonl.gz"
        whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows), mtime=0)
        path.write_bytes(damaged(draw, whole, len(whole)))
        found = rows_or_error(path)
        outcomes[found is None] += 1
        assert found in (None, rows)
        config = PreferenceDataConfig(path=str(path), on_bad_row="skip")
        assert (error_of(config, chat) is None) == (found is not None)
    assert outcomes[True] > 200
    assert outcomes[False] > 5


def test_a_damaged_parquet_file_gives_all_of_its_rows_or_is_an_error_with_its_name(tmp_path: Path):
    """Where its writer left checksums; they are of the pages, and what comes after those may then be read wrongly."""
    import pyarrow
    from pyarrow import parquet

    outcomes = Counter[bool]()
    path = tmp_path / "rows.parquet"
    for seed in range(250):
        draw = random.Random(seed)
        rows = pairs(draw, draw.choice([1, 9, 150]))
        options: dict[str, Any] = {
            "compression": draw.choice(["none", "snappy", "gzip", "zstd"]),
            "row_group_size": 100,
        }
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, path, use_dictionary=draw.random() < 0.5, write_page_checksum=True, **options)
        whole = path.read_bytes()
        pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        path.write_bytes(damaged(draw, whole, pages))
        found = rows_or_error(path)
        outcomes[found is None] += 1
        assert found in (None, rows)
    assert outcomes[True] > 150
    assert outcomes[False] > 5


def test_a_parquet_file_with_a_damaged_footer_never_has_fewer_rows(tmp_path: Path):
    """No checksum is of the footer, so that a bit may give a column another name; the rows are still counted."""
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": [str(i) for i in range(150)]})
    parquet.write_table(table, path, store_schema=False, write_statistics=False)
    whole = path.read_bytes()
    for bit in range(8 * (len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")), 8 * len(whole)):
        at = bit // 8
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit % 8]) + whole[at + 1 :])
        found = rows_or_error(path)
        assert found is None or len(found) == table.num_rows
