"""The house keeps its shape: imports point down, files and functions stay small, only one file knows orbax."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "thinkpo_jax"
# Each room imports only from floors above it in this list (the ground floor comes first).
FLOORS = (
    ("config", "losses", "rope"),
    ("hosts",),
    ("log", "sharding", "devices", "hlo"),
    (
        "commands",
        "architecture",
        "folder",
        "chat",
        "optimizer",
        "logprobs",
        "splash",
        "cudnn",
        "miniature",
        "answers",
    ),
    ("attention",),
    ("model", "rows"),
    ("convert", "sample", "forms", "benchmarks"),
    ("data", "server", "curation", "bench_pairs"),
    ("packing", "bench_trl"),
    ("objectives", "flops", "scoring"),
    ("step", "reference"),
    ("checkpoint", "bench_step"),
    ("run", "report"),
    ("evaluate", "export", "short_answers"),
    ("check", "pairs", "footprint"),
    ("compiled",),
    ("search", "bench_growth"),
    ("train", "plan", "bench"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 60, 8
# All lines of the package; raised where it is needed, with the reason. 4750: Qwen3, stretched RoPE, checks of a model
# folder, streamed loading, the lock and the error messages of damaged runs. 6820: more sources and forms of rows,
# prepared tokens on disk, the look before training, building pairs, asking a server,
# the losses that users of TRL expect and metrics by region and length. 8150: the reference kept by content, held-out
# examples, attention by blocks, a head that is split over devices, operations counted, and a race against TRL. 8200:
# remat policies by name, gradients of products and norms written out. 10300: a context axis, several processes, the
# kernels of TPU and GPU, and the planner with its table of devices. 10380: checks for input that would crash JAX or a
# compiler, and cuDNN attention of three versions of jax.
MAX_PACKAGE = 10380


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_room_has_a_floor() -> None:
    assert {path.stem for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_room_imports_only_from_lower_floors(path: Path) -> None:
    rooms = {name.removeprefix("thinkpo_jax.") for name in _imports(path) if name.startswith("thinkpo_jax.")}
    assert {room for room in rooms if FLOOR[room] >= FLOOR[path.stem]} == set()


def test_one_file_imports_orbax_and_none_imports_torch() -> None:
    roots = {path.stem: {name.split(".")[0] for name in _imports(path)} for path in FILES}
    assert {room for room, names in roots.items() if "orbax" in names} == {"checkpoint"}
    assert {room for room, names in roots.items() if "torch" in names} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            name = f"{path.stem}.{node.name}"
            limit = 120 if name == "train.train_stage" else MAX_FUNCTION
            assert (node.end_lineno or 0) - node.lineno < limit, name
            arguments = node.args
            assert len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) <= MAX_PARAMETERS + 1, name


def test_the_package_stays_small() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) <= MAX_PACKAGE
