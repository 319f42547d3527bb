"""How does YAML become typed, frozen sections?

YAML text -> dict -> ``--set a.b=c`` overrides -> a tree of `Section` objects. Each room of the package owns the
section that it reads; `run.py` alone puts them together. Every problem of one file is reported at once.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import pydantic
import yaml


class UserError(ValueError):
    """What a person can mend: the message names the place, what was expected, and the remedy. Exit status 2."""


class RunError(RuntimeError):
    """What stops a well-configured run, such as a loss that is not finite. Exit status 1."""


class Section(pydantic.BaseModel):
    """A typed, frozen part of the configuration. Unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error and `1e-5` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
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
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{source}: expected `key: value` lines at the top, found {type(loaded).__name__}.")
    return loaded


def override(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`raw` with each `dotted.key=value` of `assignments` set; the value is read as YAML.

    An element of a list is named by its index or, where it has one, by its `name`: `stages.sft.steps=10`.
    """
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted:
            raise UserError(f"--set {assignment}: expected the form dotted.key=value.")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise UserError(f"--set {assignment}: the value is not valid YAML: {error}") from None
        raw = _assign(raw, dotted.split("."), value, assignment)
    return raw


def _assign(node: Any, keys: list[str], value: Any, assignment: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        names = [item["name"] if isinstance(item, dict) and "name" in item else str(i) for i, item in enumerate(node)]
        index = names.index(key) if key in names else int(key) if key.isdigit() else -1
        if not 0 <= index < len(node):
            raise UserError(f"--set {assignment}: no element {key!r}{nearest(key, names)}; there are: {names}.")
        return [_assign(item, rest, value, assignment) if i == index else item for i, item in enumerate(node)]
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise UserError(f"--set {assignment}: {key!r} lies below {node!r}, which has no keys.")
    return {**node, key: _assign(node.get(key), rest, value, assignment)}


def parse(section: type[SectionT], raw: Mapping[str, Any], *, source: str) -> SectionT:
    """`raw` as a typed `section`. Raises one `UserError` that lists every problem with its dotted path."""
    try:
        return section.model_validate(raw)
    except pydantic.ValidationError as error:
        problems = [_problem(section, raw, detail) for detail in error.errors()]
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems)) from None


def _problem(section: type[Section], raw: Mapping[str, Any], detail: Any) -> str:
    location = _location(raw, detail["loc"])
    path = ".".join(str(part) for part in location) or "the file"
    if detail["type"] == "extra_forbidden":
        known = sorted(_known_keys(section, detail["loc"][:-1]))
        hint = nearest(str(location[-1]), known) or f". Keys here: {', '.join(known)}"
        return f"unknown key {path}{hint}."
    if detail["type"] == "missing":
        return f"{path} is required and not given."
    message = detail["msg"].removeprefix("Value error, ")
    found = detail["input"]
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool | None) else ""
    return f"{path}: {message}{shown}."


def _location(raw: Any, location: tuple[str | int, ...]) -> list[str | int]:
    """pydantic's location without the tags of unions, which are no keys of the file."""
    node: Any = raw
    kept: list[str | int] = []
    for step in location:
        if (isinstance(node, Mapping) and step in node) or (isinstance(node, list) and isinstance(step, int)):
            node = node[cast(Any, step)]
            kept.append(step)
        elif step == location[-1]:
            kept.append(step)
    return kept


def _known_keys(section: type[Section], location: tuple[Any, ...]) -> set[str]:
    """The keys allowed at a location: walks the annotations of the sections, through unions and sequences."""
    candidates: list[Any] = [section]
    for step in location:
        following: list[Any] = []
        for candidate in candidates:
            if isinstance(step, str) and step in candidate.model_fields:
                following += _sections_in(candidate.model_fields[step].annotation)
        candidates = following or candidates
    return {key for candidate in candidates for key in candidate.model_fields}


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    arguments = annotation.__args__ if "__args__" in dir(annotation) else ()
    return [found for argument in arguments for found in _sections_in(argument)]


def nearest(word: str, known: Sequence[str]) -> str:
    """', did you mean X?'-style hint for the nearest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
