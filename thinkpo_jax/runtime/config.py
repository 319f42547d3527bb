"""Turns plain values into typed, frozen sections, and defines the two error classes.

The steps are: YAML text (yaml_text.py), a dict with the values of all extended files (config_file.py), `parse_config`,
a tree of `ConfigSection` objects. Each folder of the package owns the sections that it reads. All problems of one file
are reported together.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ParamSpec, TypeVar, get_args

import pydantic

from thinkpo_jax.runtime.paths import expand_path


class UserError(ValueError):
    """A problem that the user can fix. Its message says where, what is wrong and what to do. Exit status 2."""


class SecretValueError(ValueError):
    """A validator raises it for a value that may be a password or a key. The message does not repeat the value."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class RunError(RuntimeError):
    """A failure of a run that is configured correctly, such as a loss that is not finite. Exit status 1."""


class ConfigSection(pydantic.BaseModel):
    """A typed, frozen part of the configuration. Unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=ConfigSection)
P = ParamSpec("P")
ResultT = TypeVar("ResultT")


# A path or a name of the Hub. `~` and environment variables are replaced when the configuration is read.
ConfigPath = Annotated[str, pydantic.AfterValidator(expand_path)]


def matching(pattern: str, description: str) -> pydantic.AfterValidator:
    """Returns a validator of a text that must match `pattern` as a whole. The error says `description` instead."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"expected {description}")
        return text

    return pydantic.AfterValidator(check)


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


def parse_config(
    section: type[SectionT],
    raw: Mapping[str, Any],
    *,
    source: str,
    assignments: Sequence[str] = (),
    foreign_keys: Mapping[str, str] = MappingProxyType({}),
) -> SectionT:
    """Parses `raw` into a `section`. Raises one `UserError` that lists every problem with its dotted path.

    `assignments` are the overrides in `raw`, which the message repeats. `foreign_keys` are keys of other programs and
    old keys with their dotted path, each with a sentence that says what to write instead. It writes NAME for the name
    of a stage.
    """
    try:
        return section.model_validate(_lists_to_tuples(raw), strict=True)  # strict: `steps: yes` is not 1
    except pydantic.ValidationError as error:
        errors: list[Any] = error.errors()
    except RecursionError:
        raise UserError(f"{source}: nested too deeply, or an alias contains itself. Write the values out.") from None
    # A list also counts as too short if its elements are invalid. Those are reported themselves.
    errors = [e for e in errors if e["type"] != "too_short" or len(e["input"]) <= e["ctx"]["actual_length"]]
    overrides = {tuple(_assigned_keys(raw, text)): text for text in assignments}  # a later one replaces the same key
    lines: list[str] = []
    for detail in errors:
        keys = _keys_in_file(raw, detail["loc"])
        if detail["type"] == "missing":
            keys.append(detail["loc"][-1])
        elif detail["type"].startswith("union_tag"):
            keys.append(detail["ctx"]["discriminator"].strip("'"))
        causes = [text for assigned, text in overrides.items() if keys and _overlap(assigned, tuple(keys))]
        causes = [text.partition("=")[0] if _is_secret(text, detail) else text for text in causes]
        origin = f"{source} with --set {' '.join(causes)}" if causes else source
        path = ".".join(_named_keys(raw, keys))
        if detail["type"] == "extra_forbidden":
            lines.append(f"{origin}: {_describe_unknown_key(section, path, detail, foreign_keys)}")
        else:
            lines.append(f"{origin}: {_describe(path, detail)}")
    raise UserError("\n".join(lines))


def element_index(elements: Sequence[Any], key: str) -> int | None:
    """Returns the position of a list element that `--set` selects by its `name` or its index, or None."""
    names = [str(item.get("name", i) if isinstance(item, dict) else i) for i, item in enumerate(elements)]
    index = names.index(key) if key in names else int(key) if key.isdecimal() else len(names)
    return index if index < len(names) else None


def _assigned_keys(raw: Any, assignment: str) -> list[Any]:
    """Returns the keys that an override sets, with the index of each list element."""
    keys, node = list[Any](), raw
    for key in assignment.partition("=")[0].split("."):
        keys.append(element_index(node, key) if isinstance(node, list) else key)
        node = _child(node, keys[-1])
    return keys


def _child(node: Any, key: Any) -> Any:
    """Returns what a key or an index leads to, or None."""
    if isinstance(node, list):
        return node[key] if isinstance(key, int) and key < len(node) else None
    return node.get(key) if isinstance(node, Mapping) else None


def _overlap(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    length = min(len(first), len(second))
    return first[:length] == second[:length]


def _named_keys(raw: Any, keys: Sequence[Any]) -> list[str]:
    """Returns keys as texts. An element of a list gets its `name`, if it has one, or else its index."""
    names, node = list[str](), raw
    for key in keys:
        node = _child(node, key)
        name = node.get("name") if isinstance(key, int) and isinstance(node, Mapping) else None
        names.append(name if isinstance(name, str) else str(key))
    return names


def _lists_to_tuples(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _lists_to_tuples(value) for key, value in node.items()}
    return tuple(map(_lists_to_tuples, node)) if isinstance(node, list) else node


EXPECTATION_BY_ERROR_TYPE = {
    "tuple_type": "expected a list",
    "model_type": "expected keys",
    "model_attributes_type": "expected keys",
    "string_type": "expected a text",
}


def _describe(path: str, detail: Any) -> str:
    """Returns one of pydantic's errors as a line that names the key in the file."""
    error_type, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if error_type in ("missing", "union_tag_not_found"):
        return f"{path} is required and not given."
    if error_type == "union_tag_invalid":
        return f"{path}: expected one of {context['expected_tags']} (found {context['tag']!r})."
    message = EXPECTATION_BY_ERROR_TYPE.get(error_type, detail["msg"].removeprefix("Value error, "))
    is_shown = isinstance(value, str | int | float | bool | None) and not _is_secret(str(value), detail)
    suffix = f" (found {value!r})" if is_shown else ""
    hint = ""
    if error_type == "string_type" and isinstance(value, bool):
        hint = f" YAML reads {'yes, on and true' if value else 'no, off and false'} so. Put the text in quotes."
    elif error_type == "string_type" and value is None:
        hint = " YAML reads `~` and a missing value so. Put a text in quotes."
    elif error_type == "string_type":
        hint = " Put the text in quotes."
    return (f"{path}: " if path else "") + f"{message}{suffix}.{hint}"


def _is_secret(text: str, detail: Any) -> bool:
    """Tells whether a message should not repeat a text. One with an @ may be a URL with a password."""
    return "@" in text or isinstance(detail.get("ctx", {}).get("error"), SecretValueError)


def _describe_unknown_key(section: type[ConfigSection], path: str, detail: Any, foreign_keys: Mapping[str, str]) -> str:
    *parents, key = detail["loc"]
    name = path.split(".")[1] if path.startswith("stages.") else "NAME"
    if advice := foreign_keys.get(path, foreign_keys.get(key)):
        return f"unknown key {path}. {advice.replace('NAME', name)}."
    known = sorted(_known_keys(section, tuple(parents)))
    if hint := did_you_mean(str(key), known, similarity=0.9):
        return f"unknown key {path}{hint}."
    # The exact name in another section says more than a name here that is only similar.
    paths = {found.replace("stages.NAME", f"stages.{name}") for found in _paths_to(section, key)}
    elsewhere = sorted(found for found in paths - {path} if key not in ("name", "path"))
    if 1 <= len(elsewhere) <= 2:
        return f"unknown key {path}. The key is {' or '.join(elsewhere)}."
    if hint := did_you_mean(str(key), known):
        return f"unknown key {path}{hint}."
    return f"unknown key {path}. Keys here: {', '.join(known)}."


def _paths_to(annotation: Any, key: object, parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the dotted paths of all keys of a name. NAME stands for the name of a list element."""
    if not (isinstance(annotation, type) and issubclass(annotation, ConfigSection)):
        for argument in get_args(annotation):
            yield from _paths_to(argument, key, parents)
        return
    fields = annotation.model_fields
    parents = (*parents, "NAME") if "name" in fields else parents
    if key in fields:
        yield ".".join((*parents, str(key)))
    for name, field in fields.items():
        yield from _paths_to(field.annotation, key, (*parents, name))


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


def did_you_mean(word: str, known: Sequence[str], *, similarity: float = 0.6) -> str:
    """Returns a hint such as ' (did you mean X?)' with the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=similarity)
    return f" (did you mean {close[0]}?)" if close else ""
