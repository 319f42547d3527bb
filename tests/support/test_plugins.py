"""Tests that compile for other devices are skipped if the compiler does not fit jax. The reason names both versions."""

from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.plugins import JAX, cuda_mismatch, mismatch, required_libtpu


def _install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def test_the_cuda_plugin_must_have_the_version_of_jax(tmp_path: Path) -> None:
    assert cuda_mismatch(tmp_path) == f"jax {JAX} compiles with jax-cuda13-plugin=={JAX}, but {tmp_path} has none"
    _install(tmp_path, "jax_cuda13_plugin", JAX)
    assert cuda_mismatch(tmp_path) == f"jax {JAX} compiles with jax-cuda13-pjrt=={JAX}, but {tmp_path} has none"
    _install(tmp_path, "jax_cuda13_pjrt", JAX)
    assert cuda_mismatch(tmp_path) is None
    _install(tmp_path, "jax_cuda13_plugin", "0.9.1")  # pip leaves the metadata of an older version
    both = ", ".join(sorted([JAX, "0.9.1"]))
    assert cuda_mismatch(tmp_path) == (
        f"jax {JAX} compiles with jax-cuda13-plugin=={JAX}, but {tmp_path} has version {both}"
    )


@pytest.mark.parametrize("version", ["0.0.50.1", "0.0.50", "0.0.52"])
def test_libtpu_must_have_the_version_that_jax_requires(version: str, tmp_path: Path) -> None:
    requirements = ["numpy>=2.1", 'jaxlib<=0.12.0; extra == "tpu"', 'libtpu==0.0.50.*; extra == "tpu"']
    _install(tmp_path, "libtpu", version)
    reason = mismatch(tmp_path, [required_libtpu(requirements)])
    assert (reason is None) == version.startswith("0.0.50")
    assert reason in (None, f"jax {JAX} compiles with libtpu==0.0.50.*, but {tmp_path} has version {version}")


def test_the_installed_jax_requires_a_version_of_libtpu() -> None:
    assert required_libtpu(requires("jax") or []).specifier != Requirement("libtpu").specifier
