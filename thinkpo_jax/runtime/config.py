"""How does YAML become typed, frozen sections?

YAML text -> dict -> ``--set a.b=c`` overrides -> a tree of `Section` objects. Each room of the package owns the
section that it reads; `run.py` alone puts them together. Every problem of one file is reported at once.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, cast, get_args

import pydantic
import yaml


class UserError(ValueError):
    """What a person can mend: the message names the place, what was expected, and the remedy. Exit status 2."""


class RunError(RuntimeError):
    """What stops a well-configured run, such as a loss that is not finite. Exit status 1."""


class ConfigSection(pydantic.BaseModel):
    """A typed, frozen part of the configuration. Unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _usable_path(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a path or a name, found an empty text")
    try:
        too_long = any(len(os.fsencode(part)) > 255 for part in Path(text).expanduser().parts)
    except (RuntimeError, UnicodeEncodeError) as error:
        raise ValueError(f"cannot be a path: {error}") from None
    if too_long or "\0" in text:
        raise ValueError("cannot be a path: a name in it is longer than 255 bytes, or holds a null character")
    return text


ConfigPath = Annotated[str, pydantic.AfterValidator(_usable_path)]  # a path as the user wrote it
SectionT = TypeVar("SectionT", bound=ConfigSection)
ArgumentsT = ParamSpec("ArgumentsT")
ResultT = TypeVar("ResultT")


class ErrorCollector:
    """Calls functions and keeps their user errors."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def __call__(
        self, function: Callable[ArgumentsT, ResultT], *args: ArgumentsT.args, **kwargs: ArgumentsT.kwargs
    ) -> ResultT | None:
        """What the function returns; None where it raised a `UserError`, which is kept."""
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
    """Within it `attempt(function, ...)` keeps user errors; at its end all of them are raised as one."""
    attempt = ErrorCollector()
    yield attempt
    if attempt.errors:
        raise UserError("\n".join(map(str, attempt.errors)))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error and `1e-5` is a number."""

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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises `UserError` for a missing, malformed or empty file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file. Give an existing YAML file with --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return _mapping(text, str(path))


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that is none
        raise UserError(f"{source}: not valid YAML: {_without_source(error)}") from None
    if not isinstance(loaded, dict):
        found = "an empty file" if loaded is None else f"a {type(loaded).__name__}"
        raise UserError(f"{source}: expected `key: value` lines at the top, found {found}.")
    return loaded


def _without_source(error: Exception) -> str:
    return str(error).replace('"<unicode string>", ', "")  # the name that PyYAML gives to any text


def apply_overrides(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`raw` with each `dotted.key=value` of `assignments` set; the value is read as YAML.

    An element of a list is named by its index or, where it has one, by its `name`: `stages.sft.steps=10`.
    """
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted:
            raise UserError(f"--set {assignment}: expected the form dotted.key=value.")
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"--set {assignment}: the value is not valid YAML: {_without_source(error)}") from None
        raw = _assign(raw, dotted.split("."), value, assignment)
    return raw


def _assign(node: Any, keys: list[str], value: Any, assignment: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        names = [
            str(item["name"]) if isinstance(item, dict) and "name" in item else str(i) for i, item in enumerate(node)
        ]
        index = names.index(key) if key in names else int(key) if key.isdecimal() else -1
        if not 0 <= index < len(node):
            raise UserError(f"--set {assignment}: no element {key!r}{did_you_mean(key, names)}; there are: {names}.")
        return [_assign(item, rest, value, assignment) if i == index else item for i, item in enumerate(node)]
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise UserError(f"--set {assignment}: {key!r} lies below {node!r}, which has no keys.")
    return {**node, key: _assign(node.get(key), rest, value, assignment)}


def parse_config(section: type[SectionT], raw: Mapping[str, Any], *, source: str) -> SectionT:
    """`raw` as a typed `section`. Raises one `UserError` that lists every problem with its dotted path."""
    try:
        return section.model_validate(_lists_to_tuples(raw), strict=True)  # strict: `steps: yes` is not one step
    except pydantic.ValidationError as error:
        problems = [_problem(section, raw, detail) for detail in error.errors() if not _is_consequence(detail)]
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems)) from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply, or an alias that holds itself. Write the values out.") from None


def _lists_to_tuples(node: Any) -> Any:
    """Lists as tuples, which is what sections hold."""
    if isinstance(node, Mapping):
        return {key: _lists_to_tuples(value) for key, value in node.items()}
    return tuple(map(_lists_to_tuples, node)) if isinstance(node, list) else node


def _is_consequence(detail: Any) -> bool:
    """Whether a list counts as too short only because of its wrong elements, which are reported themselves."""
    return detail["type"] == "too_short" and len(detail["input"]) > detail["ctx"]["actual_length"]


EXPECTATION_BY_ERROR_TYPE = {
    "tuple_type": "expected a list",
    "model_type": "expected keys",
    "model_attributes_type": "expected keys",
}


def _problem(section: type[ConfigSection], raw: Mapping[str, Any], detail: Any) -> str:
    kind, found, context = detail["type"], detail["input"], detail.get("ctx", {})
    location = _location(raw, detail["loc"], missing=kind == "missing")
    if kind.startswith("union_tag"):
        location.append(context["discriminator"].strip("'"))
    path = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        known = sorted(_known_keys(section, detail["loc"][:-1]))
        hint = did_you_mean(str(location[-1]), known) or f". Keys here: {', '.join(known)}"
        return f"unknown key {path}{hint}."
    if kind in ("missing", "union_tag_not_found"):
        return f"{path} is required and not given."
    if kind == "union_tag_invalid":
        return f"{path}: expected one of {context['expected_tags']} (found {context['tag']!r})."
    message = EXPECTATION_BY_ERROR_TYPE.get(kind, detail["msg"].removeprefix("Value error, "))
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool | None) else ""
    return f"{path}: {message}{shown}." if path else f"{message}{shown}."


def _location(raw: Any, location: tuple[str | int, ...], *, missing: bool) -> list[str | int]:
    """pydantic's location without the tags of unions, which are no keys of the file; a missing key is its last."""
    node: Any = raw
    kept: list[str | int] = []
    for step in location[:-1] if missing else location:
        if (isinstance(node, Mapping) and step in node) or (isinstance(node, list) and isinstance(step, int)):
            node = node[cast(Any, step)]
            kept.append(step)
    return [*kept, location[-1]] if missing else kept


def _known_keys(section: type[ConfigSection], location: tuple[Any, ...]) -> set[str]:
    """The keys allowed at a location: walks the annotations of the sections, through unions and sequences."""
    candidates: list[type[ConfigSection]] = [section]
    for step in location:
        if isinstance(step, int):
            continue
        following: list[type[ConfigSection]] = []
        for candidate in candidates:
            if step in candidate.model_fields:
                following += _sections_in(candidate.model_fields[step].annotation)
            elif any(step in get_args(field.annotation) for field in candidate.model_fields.values()):
                following.append(candidate)  # the step is the tag of this member of a union
        candidates = following
    return {key for candidate in candidates for key in candidate.model_fields}


def _sections_in(annotation: Any) -> list[type[ConfigSection]]:
    if isinstance(annotation, type) and issubclass(annotation, ConfigSection):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _sections_in(argument)]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint such as ' (did you mean X?)' with the nearest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
