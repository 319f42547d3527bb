"""The compilers for TPUs and GPUs that are not attached, and whether they match the installed jax.

`make` installs both below the folder of the virtual environment, where jax does not load them by itself. A compiler
for another version of jax may reject a correct program. Then the tests that need it are skipped with the reason.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LIBTPU, CUDA = Path(sys.prefix) / "libtpu", Path(sys.prefix) / "cuda"
LIBTPU_LIBRARY = LIBTPU / "libtpu" / "libtpu.so"
JAX = version("jax")


def required_libtpu(requirements: Sequence[str]) -> Requirement:
    """Returns the libtpu that the extra `tpu` of jax requires, given all requirements of jax."""
    parsed = map(Requirement, requirements)
    return next(
        requirement
        for requirement in parsed
        if requirement.name == "libtpu" and requirement.marker and requirement.marker.evaluate({"extra": "tpu"})
    )


def mismatch(folder: Path, requirements: Sequence[Requirement]) -> str | None:
    """Returns which requirement the packages in a folder do not meet, with both versions, or None if they meet all."""
    for requirement in requirements:
        versions = sorted(package.version for package in distributions(name=requirement.name, path=[str(folder)]))
        if not versions:
            return f"jax {JAX} compiles with {requirement.name}{requirement.specifier}, but {folder} has none"
        if not all(requirement.specifier.contains(version, prereleases=True) for version in versions):
            return (
                f"jax {JAX} compiles with {requirement.name}{requirement.specifier}, "
                f"but {folder} has version {', '.join(versions)}"
            )
    return None


def cuda_mismatch(folder: Path) -> str | None:
    """Returns why the CUDA plugin in a folder does not fit the installed jax, or None if it fits."""
    cuda = "cuda12" if (folder / "jax_cuda12_plugin").is_dir() else "cuda13"
    return mismatch(folder, [Requirement(f"jax-{cuda}-{part}=={JAX}") for part in ("plugin", "pjrt")])


NO_LIBTPU = mismatch(LIBTPU, [required_libtpu(requires("jax") or [])])
NO_CUDA = cuda_mismatch(CUDA)
needs_libtpu = pytest.mark.skipif(NO_LIBTPU is not None, reason=str(NO_LIBTPU))
needs_cuda = pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA))
