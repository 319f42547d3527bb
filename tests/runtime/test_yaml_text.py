"""YAML texts and `--set` values mean what they look like."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from support.faults import Outcome

from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.yaml_text import MAX_YAML_BYTES, MAX_YAML_VALUES, apply_overrides, dump_yaml, read_yaml


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


AMBIGUOUS = {
    "010": "010 may be an octal number. Write 10 for the decimal number, 8 for the octal one, or '010' for a text",
    "-07": "-07 may be an octal number. Write -7 for the decimal number, -7 for the octal one, or '-07' for a text",
    "0o10": "0o10 may be an octal number. Write 10 for the decimal number, 8 for the octal one, or '0o10' for a text",
    "08": "08 may be an octal number. Write 8 for the decimal number, or '08' for a text",
    "00": "00 may be an octal number. Write 0 for the decimal number, 0 for the octal one, or '00' for a text",
    "10:00": "YAML reads 10:00 in base 60, as 600. Write that number, or '10:00' for a text",
    "1:30.5": "YAML reads 1:30.5 in base 60, as 90.5. Write that number, or '1:30.5' for a text",
    "-1:30": "YAML reads -1:30 in base 60, as -90. Write that number, or '-1:30' for a text",
}


@pytest.mark.parametrize("written", AMBIGUOUS)
def test_an_ambiguous_number_is_an_error_that_says_what_to_write(written: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, f"title: x\nlist: [1, {{seed: {written}}}]\n")
    assert str(error.value) == f"{tmp_path / 'run.yaml'}, line 2: {AMBIGUOUS[written]}."
    with pytest.raises(UserError) as error:
        apply_overrides({}, [f"seed={written}"])
    hint = "The shell removes one pair of quotes, so write two."
    assert str(error.value) == f"--set seed={written}: {AMBIGUOUS[written]}. {hint}"


VALUES: dict[str, Any] = {
    "0": 0, "-3": -3, "1_000": 1000, "0x10": 16, "0b11": 3, "1e-5": 1e-5, "0.5": 0.5, "010.5": 10.5, "1_000.5": 1000.5,
    "'010'": "010", '"10:00"': "10:00", "2024-01-01": "2024-01-01", "2026-13-45": "2026-13-45", "yes": True,
    "off": False, "v010": "v010", "09:30": "09:30", "0xfg": "0xfg", "null": None, "~": None,
}  # fmt: skip


@pytest.mark.parametrize("written", VALUES)
def test_other_values_mean_what_they_look_like(written: str, tmp_path: Path) -> None:
    value, assigned = read(tmp_path, f"key: {written}\n")["key"], apply_overrides({}, [f"key={written}"])["key"]
    assert value == assigned == VALUES[written]
    assert type(value) is type(assigned) is type(VALUES[written])


@pytest.mark.parametrize("text", [*AMBIGUOUS, *VALUES, "a: b", "a #b", "ünï", "{", "1e5", "[1]", "=", "on", " x", ""])
def test_a_dumped_text_is_read_back_as_the_same_text(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, dump_yaml({"key": text, "list": [text]})) == {"key": text, "list": [text]}


@pytest.mark.parametrize(
    ("text", "value"), [("a #1", "a #1"), ("'a' #1", "a"), ("/x/exp[1] 100% #", "/x/exp[1] 100% #"), (" a  b ", "a  b")]
)
def test_the_text_of_an_override_has_no_comment(text: str, value: str) -> None:
    assert apply_overrides({}, [f"run_dir={text}"]) == {"run_dir": value}


@pytest.mark.parametrize("text", ["*x", "[1]exp", "@x", "%x"])
def test_an_override_that_yaml_cannot_read_says_how_to_quote_it(text: str) -> None:
    with pytest.raises(UserError, match=r"""Put a text in two pairs of quotes: --set run_dir='"TEXT"'\.$"""):
        apply_overrides({}, [f"run_dir={text}"])
    assert apply_overrides({}, [f'run_dir="{text}"']) == {"run_dir": text}


def test_a_variable_in_braces_must_be_quoted_inside_braces(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'Quote a text that holds `\$\{\.\.\.\}`: "\$\{NAME\}/x"'):
        read(tmp_path, "data: {path: ${SCRATCH}/x}\n")
    assert read(tmp_path, "run_dir: ${SCRATCH}/x\n") == {"run_dir": "${SCRATCH}/x"}


def test_a_text_of_set_that_begins_with_a_hash_is_a_text() -> None:
    assert apply_overrides({}, ["system=# Solve"]) == {"system": "# Solve"}


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b", "\u2029", "é 六"])
def test_dumped_texts_with_any_line_break_are_read_back(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump_yaml({"title": text}), encoding="utf-8")
    assert read_yaml(path) == {"title": text}


@pytest.mark.parametrize(
    ("text", "value"), [("1e3", 1000), ("2E+2", 200), ("1e-5", 1e-5), ("1.5e3", 1500.0), ("-1e1", -10)]
)
def test_an_exponent_without_a_fraction_is_an_integer(text: str, value: float) -> None:
    read = apply_overrides({}, [f"steps={text}"])["steps"]
    assert (read, type(read)) == (value, type(value))


LETTERS = "abcdefghijklmnop"


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_of_aliases_are_refused(form: str, tmp_path: Path) -> None:
    """Written out, the last line has 10**15 values. A merge key repeats them even before the values are built."""
    first = "a: &a {k: 1}\n"
    lines = (f"{b}: &{b} {form.format(', '.join([f'*{a}'] * 10))}\n" for a, b in itertools.pairwise(LETTERS))
    with pytest.raises(
        UserError, match=r"run.yaml, line 5: expected at most 10,000 values, with each alias written out"
    ):
        read(tmp_path, first + "".join(lines))


def test_aliases_of_a_section_are_read(tmp_path: Path) -> None:
    text = "a: &a {k: 1, l: [2]}\nb: *a\nc: {<<: *a, k: 3}\n"
    assert read(tmp_path, text) == {"a": {"k": 1, "l": [2]}, "b": {"k": 1, "l": [2]}, "c": {"k": 3, "l": [2]}}


@pytest.mark.faults(Outcome.REFUSED)
def test_a_large_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.yaml: expected at most 1,048,576 bytes"):
        read(tmp_path, f"a: {'x' * MAX_YAML_BYTES}")
    with pytest.raises(UserError, match="expected at most 10,000 values"):
        read(tmp_path, f"a: [{'1, ' * MAX_YAML_VALUES}]")
