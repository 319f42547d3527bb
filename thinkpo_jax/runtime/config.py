"""Reads YAML and `--set` overrides into typed, frozen sections, and defines the two error classes.

The steps are: YAML text, a dict, `apply_overrides`, `parse_config`, a tree of `ConfigSection` objects. Each folder of
the package owns the sections that it reads. All problems of one file are reported together.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, get_args

import pydantic
import yaml


class UserError(ValueError):
    """A problem that the user can fix. Its message says where, what is wrong and what to do. Exit status 2."""


class RunError(RuntimeError):
    """A failure of a run that is configured correctly, such as a loss that is not finite. Exit status 1."""


class ConfigSection(pydantic.BaseModel):
    """A typed, frozen part of the configuration. Unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=ConfigSection)
P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def _check_path(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a path or a name, found an empty text")
    try:
        too_long = any(len(os.fsencode(part)) > 255 for part in Path(text).expanduser().parts)
    except (RuntimeError, UnicodeEncodeError) as error:
        raise ValueError(f"cannot be a path: {error}") from None
    if too_long or "\0" in text:
        raise ValueError("cannot be a path: a name in it is longer than 255 bytes, or has a null character")
    return text


ConfigPath = Annotated[str, pydantic.AfterValidator(_check_path)]  # a path as the user wrote it


def exactly_one_of(first: str, second: str, *, allow_neither: bool = False) -> Any:
    """Returns a validator: a section must give one of two keys, whose default is None.

    Use it as an attribute of a `ConfigSection`: `_one_length = exactly_one_of("steps", "epochs")`.
    """

    def check(section: SectionT) -> SectionT:
        count = sum(value is not None for name, value in section if name in (first, second))
        if count == 2 or (count == 0 and not allow_neither):
            raise ValueError(f"give either `{first}` or `{second}`" + (", not both" if count == 2 else ""))
        return section

    return pydantic.model_validator(mode="after")(check)


def at_most_one_of(first: str, second: str) -> Any:
    """Returns a validator like `exactly_one_of`, but a section may also give neither key."""
    return exactly_one_of(first, second, allow_neither=True)


class ErrorCollector:
    """Calls functions and collects the user errors that they raise."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def __call__(self, function: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT | None:
        """Returns what the function returns, or None if it raised a `UserError`."""
        try:
            return function(*args, **kwargs)
        except UserError as error:
            self.errors.append(error)
            return None

    def fail(self, message: str) -> None:
        """Adds an error."""
        self.errors.append(UserError(message))


@contextlib.contextmanager
def collect_errors() -> Iterator[ErrorCollector]:
    """Yields a collector. At the end of the `with` block, raises all collected errors as one `UserError`."""
    collector = ErrorCollector()
    yield collector
    if collector.errors:
        raise UserError("\n".join(map(str, collector.errors)))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with two changes: a repeated key is an error, and `1e-5` is a number."""

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


_EXPONENT = re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _load_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date or number
        reason = str(error).replace('"<unicode string>", ', "")  # PyYAML's name for a text without a file
        raise UserError(f"{source}: not valid YAML: {reason}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises `UserError` for a missing, malformed or empty file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file. Give an existing YAML file with --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    loaded = _load_yaml(text, str(path))
    if not isinstance(loaded, dict):
        content = "an empty file" if loaded is None else f"a {type(loaded).__name__}"
        raise UserError(f"{path}: expected `key: value` lines at the top, found {content}.")
    return loaded


def apply_overrides(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of `raw` with each `dotted.key=value` of `assignments` set. Values are read as YAML.

    An element of a list is selected by its index or by its `name`: `stages.sft.steps=10`.
    """
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted:
            raise UserError(f"--set {assignment}: expected the form dotted.key=value.")
        raw = _assign(raw, dotted.split("."), _load_yaml(text, f"--set {assignment}"), assignment)
    return raw


def _assign(node: Any, keys: list[str], value: Any, assignment: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        names = [str(item.get("name", i) if isinstance(item, dict) else i) for i, item in enumerate(node)]
        index = names.index(key) if key in names else int(key) if key.isdecimal() else -1
        if not 0 <= index < len(node):
            raise UserError(f"--set {assignment}: no element {key!r}{did_you_mean(key, names)}. There are: {names}.")
        return [_assign(item, rest, value, assignment) if i == index else item for i, item in enumerate(node)]
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise UserError(f"--set {assignment}: {key!r} is below {node!r}, which has no keys.")
    return {**node, key: _assign(node.get(key), rest, value, assignment)}


def parse_config(section: type[SectionT], raw: Mapping[str, Any], *, source: str) -> SectionT:
    """Parses `raw` into a `section`. Raises one `UserError` that lists every problem with its dotted path."""
    try:
        return section.model_validate(_lists_to_tuples(raw), strict=True)  # strict: `steps: yes` is not 1
    except pydantic.ValidationError as error:
        errors: list[Any] = error.errors()
        # A list also counts as too short if its elements are invalid. Those are reported themselves.
        errors = [e for e in errors if e["type"] != "too_short" or len(e["input"]) <= e["ctx"]["actual_length"]]
        raise UserError("\n".join(f"{source}: {_describe(section, raw, detail)}" for detail in errors)) from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply, or an alias contains itself. Write the values out.") from None


def _lists_to_tuples(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _lists_to_tuples(value) for key, value in node.items()}
    return tuple(map(_lists_to_tuples, node)) if isinstance(node, list) else node


EXPECTATION_BY_ERROR_TYPE = {
    "tuple_type": "expected a list",
    "model_type": "expected keys",
    "model_attributes_type": "expected keys",
}


def _describe(section: type[ConfigSection], raw: Mapping[str, Any], detail: Any) -> str:
    """Returns one of pydantic's errors as a line that names the key in the file."""
    error_type, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    keys = _keys_in_file(raw, detail["loc"])
    if error_type == "missing":
        keys.append(detail["loc"][-1])
    elif error_type.startswith("union_tag"):
        keys.append(context["discriminator"].strip("'"))
    path = ".".join(map(str, keys))
    if error_type == "extra_forbidden":
        known = sorted(_known_keys(section, detail["loc"][:-1]))
        hint = did_you_mean(str(keys[-1]), known) or f". Keys here: {', '.join(known)}"
        return f"unknown key {path}{hint}."
    if error_type in ("missing", "union_tag_not_found"):
        return f"{path} is required and not given."
    if error_type == "union_tag_invalid":
        return f"{path}: expected one of {context['expected_tags']} (found {context['tag']!r})."
    message = EXPECTATION_BY_ERROR_TYPE.get(error_type, detail["msg"].removeprefix("Value error, "))
    suffix = f" (found {value!r})" if isinstance(value, str | int | float | bool | None) else ""
    return f"{path}: {message}{suffix}." if path else f"{message}{suffix}."


def _keys_in_file(node: Any, location: tuple[Any, ...]) -> list[str | int]:
    """Returns the part of pydantic's location that exists in the file. The tags of unions do not."""
    keys = []
    for step in location:
        is_key = isinstance(node, Mapping) and step in node
        is_index = isinstance(node, list) and isinstance(step, int) and step < len(node)
        if is_key or is_index:
            node = node[step]
            keys.append(step)
    return keys


def _known_keys(annotation: Any, location: tuple[Any, ...]) -> set[str]:
    """Returns the keys allowed at a location. Follows the annotations of sections through unions and sequences."""
    if not (isinstance(annotation, type) and issubclass(annotation, ConfigSection)):
        return {key for argument in get_args(annotation) for key in _known_keys(argument, location)}
    fields = annotation.model_fields
    if not location:
        return set(fields)
    step, rest = location[0], location[1:]
    if step in fields:
        return _known_keys(fields[step].annotation, rest)
    is_tag = any(step in get_args(field.annotation) for field in fields.values())  # of this member of a union
    return _known_keys(annotation, rest) if is_tag or isinstance(step, int) else set()


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Returns a hint such as ' (did you mean X?)' with the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
