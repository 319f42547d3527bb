"""Reads a configuration file, with the files that it extends.

`extends: base.yaml` names another configuration. The path is relative to the folder of the file that names it. The file
then holds only what differs from the base:

| value in the file | effect on the base |
|---|---|
| a mapping | merged key by key, at any depth |
| the list `stages` | merged by `name`. New stages go to the end. `{name: NAME, remove: true}` removes a stage |
| anything else, also every other list | replaces the value of the base |
"""

from pathlib import Path
from typing import Any, NamedTuple

from thinkpo_jax.runtime.config import UserError, did_you_mean
from thinkpo_jax.runtime.paths import expand_path
from thinkpo_jax.runtime.yaml_text import read_yaml

EXTENDS_KEY = "extends"


class ConfigFile(NamedTuple):
    """The values of a configuration, and its name in messages, such as `mine.yaml (extends base.yaml)`."""

    values: dict[str, Any]
    source: str


def read_config(path: Path) -> ConfigFile:
    """Reads a configuration and merges it into the one that it extends.

    Raises `UserError` if a file is missing or malformed, or if files extend each other in a cycle.
    """
    chain = _read_chain(path)
    values: dict[str, Any] = {}
    for file, changes in reversed(chain):
        values = _merge_file(values, changes, file)
    bases = ", ".join(str(file) for file, _ in chain[1:])
    return ConfigFile(values, f"{path} (extends {bases})" if bases else str(path))


def _read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Returns the values of a file, then those of its base, and so on, without the key `extends`."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    file: Path | None = path
    while file is not None:
        values = read_yaml(file)
        base = _base_of(file, values.pop(EXTENDS_KEY)) if EXTENDS_KEY in values else None
        chain.append((file, values))
        if base is not None and base.resolve() in [known.resolve() for known, _ in chain]:
            names = " extends ".join(str(known) for known in (*(known for known, _ in chain), base))
            raise UserError(f"{file}: {names}, which is a cycle. Remove one of the keys `{EXTENDS_KEY}`.")
        file = base
    return chain


def _base_of(file: Path, name: Any) -> Path:
    """Returns the path that the key `extends` of a file names. Raises `UserError` if there is no such file."""
    if not isinstance(name, str):
        raise UserError(f"{file}: {EXTENDS_KEY}: expected the path of one YAML file (found {name!r}).")
    try:
        base = file.parent / expand_path(name)
    except ValueError as error:
        raise UserError(f"{file}: {EXTENDS_KEY}: {error}.") from None
    if not base.is_file():
        remedy = f"Give a path relative to the folder of {file.name}"
        raise UserError(f"{file}: {EXTENDS_KEY} is {name!r}, but there is no file {base}. {remedy}.")
    return base


def _merge_file(base: dict[str, Any], changes: dict[str, Any], file: Path) -> dict[str, Any]:
    merged = _merge(base, changes)
    base_stages, stages = base.get("stages"), changes.get("stages")
    if isinstance(base_stages, list) and isinstance(stages, list):
        merged["stages"] = _merge_stages(base_stages, stages, file)
    return merged


def _merge(base: Any, changes: Any) -> Any:
    """Returns two mappings merged key by key. Any other value of `changes` replaces that of the base."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: _merge(base.get(key), value) for key, value in changes.items()}


def _merge_stages(base: list[Any], changes: list[Any], file: Path) -> list[Any]:
    """Returns the stages of the base, changed, then the new ones. A stage without a name counts as new."""
    names = [_stage_name(change) for change in changes]
    stages = list(base)
    for name, change in zip(names, changes, strict=True):
        if name is not None and names.count(name) > 1:
            raise UserError(f"{file}: stages: the name {name!r} is given twice. Write all its keys in one stage.")
        known = [_stage_name(stage) for stage in stages]
        index = known.index(name) if name is not None and name in known else None
        if change == {"name": name, "remove": True}:
            if index is None:
                hint = did_you_mean(str(name), list(filter(None, known)))
                problem = f"there is no stage {name!r} to remove{hint}"
                raise UserError(f"{file}: stages: {problem}. The stages of its base are: {known}.")
            del stages[index]
        elif index is None:
            stages.append(change)
        else:
            stages[index] = _merge(stages[index], change)
    return stages


def _stage_name(stage: Any) -> str | None:
    name = stage.get("name") if isinstance(stage, dict) else None
    return name if isinstance(name, str) else None
