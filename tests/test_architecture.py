"""The package keeps its shape: imports between folders point one way, and files and functions stay small."""

import ast
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "thinkpo_jax"
# A folder imports only from folders before it. Commands are the files of the package folder itself.
FOLDERS = (
    "runtime",
    "data",
    "models",
    "training",
    "inference",
    "evaluation",
    "pair_building",
    "run",
    "planning",
    "bench",
    "commands",
)
# Neither of the two imports the other.
SIBLINGS = (
    ("training", "inference"),
    ("training", "evaluation"),
    ("training", "pair_building"),
    ("pair_building", "run"),
)
FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = {
    path: {
        name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    for path in FILES
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8
MAX_PACKAGE_LINES = 11200


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def _folder(module: str) -> str:
    """The folder of a module such as `thinkpo_jax.data.batches`, or `commands`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "commands"


def test_every_folder_has_a_place_in_the_order() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(FOLDERS[:-1])


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_folder_imports_only_from_folders_before_it(path: Path) -> None:
    folder = _folder("thinkpo_jax." + _name(path).replace("/", "."))
    for module in IMPORTS[path]:
        if module.startswith("thinkpo_jax."):
            imported = _folder(module)
            assert FOLDERS.index(imported) <= FOLDERS.index(folder), module
            assert (folder, imported) not in SIBLINGS, module
            assert (imported, folder) not in SIBLINGS, module


def test_one_file_imports_orbax_and_none_imports_torch() -> None:
    roots = {_name(path): {name.split(".")[0] for name in names} for path, names in IMPORTS.items()}
    assert {name for name, modules in roots.items() if "orbax" in modules} == {"training/checkpoints"}
    assert {name for name, modules in roots.items() if "torch" in modules} == set()


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name
            arguments = node.args
            number = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            assert number <= MAX_PARAMETERS + 1, node.name


def test_the_package_stays_small() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) <= MAX_PACKAGE_LINES
