"""Reads YAML files and `--set` assignments into plain values, and writes values as YAML.

Numbers and texts mean what they look like:

| text | PyYAML reads | here |
|---|---|---|
| `1e-5`, `1e3` | a text | the numbers 0.00001 and 1000 |
| `010`, `0o10`, `10:00` | 8, a text, 600 | an error that says what to write |
| `1_000`, `0x10`, `0b1` | 1000, 16, 1 | the same |
| `2024-01-01` | a date | a text |
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from thinkpo_jax.runtime.config import UserError, did_you_mean, element_index
from thinkpo_jax.runtime.limited_files import read_text
from thinkpo_jax.runtime.paths import describe_missing

MAX_YAML_BYTES = 2**20
MAX_YAML_VALUES = 10_000  # Counts a value again for each alias of it. Real configurations have some hundred.

_EXPONENT = re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_LEADING_ZERO = re.compile(r"^[-+]?0[oO]?[0-9_]+$")  # PyYAML reads 010 as a number, and 0o10 and 08 as a text
INT_TAG, FLOAT_TAG, DATE_TAG = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))


class _AmbiguousNumberError(yaml.MarkedYAMLError):
    """A number that people and YAML read in different ways."""


class _TooManyValuesError(yaml.MarkedYAMLError):
    """Aliases that stand for so many values that they would fill the memory."""


class _Resolver(yaml.resolver.Resolver):
    """Tells which plain texts are numbers. The loader and the dumper share it, so a dumped text stays a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- PyYAML's own attribute
        character: [(tag, pattern) for tag, pattern in resolvers if tag != DATE_TAG]
        for character, resolvers in yaml.resolver.Resolver.yaml_implicit_resolvers.items()
    }


_Resolver.add_implicit_resolver(FLOAT_TAG, _EXPONENT, list("-+.0123456789"))
_Resolver.add_implicit_resolver(INT_TAG, _LEADING_ZERO, list("-+0"))


class _Loader(_Resolver, yaml.SafeLoader):
    """YAML's safe loader. A repeated key, an ambiguous number and too many values are errors."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.num_values = 0
        self.sizes: dict[yaml.Node, int] = {}  # the number of values in each node

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, num_before = self.peek_event(), self.num_values
        node: Any = super().compose_node(parent, index)
        # Lists of aliases of lists of aliases would have billions of values.
        self.num_values += self.sizes.get(node, 0) if isinstance(event, yaml.AliasEvent) else 1
        self.sizes.setdefault(node, self.num_values - num_before)
        if self.num_values > MAX_YAML_VALUES:
            problem = f"expected at most {MAX_YAML_VALUES:,} values, with each alias written out. Remove values"
            raise _TooManyValuesError(problem=problem, problem_mark=event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key_node, _ in node.value:
            key = (key_node.tag, str(key_node.value))
            if key in seen:
                problem = f"the key {key_node.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        is_number = node.tag in (INT_TAG, FLOAT_TAG)
        if is_number and (":" in node.value or _LEADING_ZERO.match(node.value)):
            raise _AmbiguousNumberError(problem=_ambiguity(node.value), problem_mark=node.start_mark)
        return node


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    """Returns the number, as an int if it is written without a fraction, such as `1e3`. A float accepts an int too."""
    number = loader.construct_yaml_float(node)
    return int(number) if re.fullmatch(r"[-+]?[0-9]+[eE]\+?[0-9]{1,2}", node.value) else number


_Loader.add_constructor(FLOAT_TAG, _construct_float)


class _Dumper(_Resolver, yaml.SafeDumper):
    """YAML's safe dumper. It quotes a text that `_Loader` would read as a number."""


def _ambiguity(text: str) -> str:
    if ":" in text:
        sign, value = -1 if text.startswith("-") else 1, 0.0
        for part in text.lstrip("+-").replace("_", "").split(":"):
            value = 60 * value + float(part)
        return f"YAML reads {text} in base 60, as {sign * value:g}. Write that number, or '{text}' for a text"
    digits = text.lstrip("+-").lower().removeprefix("0").removeprefix("o").replace("_", "")
    sign, decimal = "-" * text.startswith("-"), digits.lstrip("0") or "0"
    octal = "" if set(digits) & set("89") else f", {sign}{int(digits, 8)} for the octal one"
    return f"{text} may be an octal number. Write {sign}{decimal} for the decimal number{octal}, or '{text}' for a text"


def _load_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (_AmbiguousNumberError, _TooManyValuesError) as error:
        line = 0 if error.problem_mark is None else error.problem_mark.line + 1
        location = source if source.startswith("--set") else f"{source}, line {line}"
        needs_quotes = source.startswith("--set") and isinstance(error, _AmbiguousNumberError)
        hint = " The shell removes one pair of quotes, so write two." if needs_quotes else ""
        raise UserError(f"{location}: {error.problem}.{hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible number
        reason = str(error).replace('"<unicode string>", ', "")  # PyYAML's name for a text without a file
        hint = ' Quote a text that holds `${...}`: "${NAME}/x".' if "${" in text else ""
        if source.startswith("--set"):
            hint += f" Put a text in two pairs of quotes: {source.partition('=')[0]}='\"TEXT\"'."
        raise UserError(f"{source}: not valid YAML: {reason}{hint}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises `UserError` for a missing, malformed or empty file."""
    try:
        text = read_text(path, max_bytes=MAX_YAML_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: {describe_missing(path)}. Give an existing YAML file with --config.") from None
    except UserError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    loaded = _load_yaml(text, str(path))
    if not isinstance(loaded, dict):
        content = "an empty file" if loaded is None else f"a {type(loaded).__name__}"
        raise UserError(f"{path}: expected `key: value` lines at the top, found {content}.")
    return loaded


_UNICODE_LINE_BREAK = re.compile("[\x85\u2028\u2029]")


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Returns values as a YAML text, from which `read_yaml` gives the same values."""
    text = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if not _UNICODE_LINE_BREAK.search(text):
        return text
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)  # PyYAML would read these back as spaces


def apply_overrides(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of `raw` with each `dotted.key=value` of `assignments` set. Values are read as YAML.

    An element of a list is selected by its index or by its `name`: `stages.sft.steps=10`.
    """
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted:
            raise UserError(f"--set {assignment}: expected the form dotted.key=value.")
        raw = _assign(raw, dotted.split("."), _read_value(text, assignment), assignment)
    return raw


def _read_value(text: str, assignment: str) -> Any:
    if text.lstrip().startswith("#"):
        return text.strip()
    value = _load_yaml(text, f"--set {assignment}")
    # There is no comment in an argument. YAML would cut `runs/a #1` short.
    is_plain_text = isinstance(value, str) and not text.lstrip().startswith(("'", '"', "|", ">", "!", "&"))
    return text.strip() if is_plain_text else value


def _assign(node: Any, keys: list[str], value: Any, assignment: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if (index := element_index(node, key)) is None:
            names = [str(item.get("name", i) if isinstance(item, dict) else i) for i, item in enumerate(node)]
            raise UserError(f"--set {assignment}: no element {key!r}{did_you_mean(key, names)}. There are: {names}.")
        return [_assign(item, rest, value, assignment) if i == index else item for i, item in enumerate(node)]
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise UserError(f"--set {assignment}: {key!r} is below {node!r}, which has no keys.")
    return {**node, key: _assign(node.get(key), rest, value, assignment)}
