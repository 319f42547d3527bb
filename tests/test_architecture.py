"""Checks the structure of the package: import order of its folders, and size limits of files and functions."""

import ast
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "thinkpo_jax"
# A folder imports only from itself and from folders before it. `commands` are the files of the package folder itself.
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
# Neither folder of a pair imports the other.
INDEPENDENT_FOLDERS = (
    ("training", "inference"),
    ("training", "evaluation"),
    ("training", "pair_building"),
    ("pair_building", "run"),
)
COMMANDS = ("train.py", "evaluate.py", "export.py", "pairs.py", "plan.py")
MAX_FILE_LINES, MAX_COMMAND_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 100, 60, 8
MAX_PACKAGE_LINES = 22_100
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def _module_name(path: Path) -> str:
    """The name under which a file is imported. For an `__init__.py` it is the name of the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in FILES}


def _imported_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules that the import statements among `nodes` may name: `from a import b` gives `a` and `a.b`."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names.update({node.module or ""}, (f"{node.module}.{alias.name}" for alias in node.names))
    return names


def _nodes_run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a file except those inside functions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _nodes_run_on_import(child)


def _test_id(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def _folder(module: str) -> str:
    """The folder of a module such as `thinkpo_jax.data.batches`, or `commands`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "commands"


def _num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_import_order_lists_every_folder() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(FOLDERS[:-1])


@pytest.mark.parametrize("path", FILES, ids=_test_id)
def test_a_folder_imports_only_from_folders_before_it(path: Path) -> None:
    folder = _folder(_module_name(path))
    for module in _imported_names(ast.walk(TREES[path])):
        if module.startswith("thinkpo_jax.") and module in MODULES:
            imported = _folder(module)
            assert FOLDERS.index(imported) <= FOLDERS.index(folder), module
            assert (folder, imported) not in INDEPENDENT_FOLDERS, module
            assert (imported, folder) not in INDEPENDENT_FOLDERS, module


def test_files_do_not_import_each_other_in_a_cycle() -> None:
    graph = {
        module: (_imported_names(_nodes_run_on_import(TREES[path])) & MODULES.keys()) - {module}
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # CycleError lists the modules of the cycle


def test_only_checkpoints_imports_orbax_and_only_benchmarks_of_others_import_torch() -> None:
    roots = {
        _test_id(path): {name.split(".")[0] for name in _imported_names(ast.walk(tree))} for path, tree in TREES.items()
    }
    assert {name for name, modules in roots.items() if "orbax" in modules} == {"training/checkpoints"}
    assert {name for name, modules in roots.items() if "torch" in modules} == {
        "bench/transformers_generation",
        "bench/trl",
    }


@pytest.mark.parametrize("path", FILES, ids=_test_id)
def test_files_and_functions_stay_small(path: Path) -> None:
    assert _num_lines(path) <= MAX_FILE_LINES
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name
            arguments = node.args
            num_parameters = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            assert num_parameters <= MAX_PARAMETERS + 1, node.name  # one more for `self`


@pytest.mark.parametrize("command", COMMANDS)
def test_command_files_stay_small(command: str) -> None:
    assert _num_lines(PACKAGE / command) <= MAX_COMMAND_LINES


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_every_folder_has_a_docstring(folder: Path) -> None:
    assert ast.get_docstring(TREES[folder / "__init__.py"])


def test_test_files_stay_small() -> None:
    num_lines = {path.relative_to(ROOT).as_posix(): _num_lines(path) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: lines for name, lines in num_lines.items() if lines > MAX_FILE_LINES} == {}


def test_the_package_stays_small() -> None:
    assert sum(map(_num_lines, FILES)) <= MAX_PACKAGE_LINES
