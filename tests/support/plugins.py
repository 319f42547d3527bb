"""The compilers for TPUs and GPUs that are not attached, and whether they match the installed jax.

`make` installs both apart from jax, below the folder of the virtual environment. A compiler for another version of jax
may reject a correct program, so the tests that need it are skipped with the reason.
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
    """Returns what the extra `tpu` of jax asks for, given all requirements of jax."""
    parsed = map(Requirement, requirements)
    return next(
        each for each in parsed if each.name == "libtpu" and each.marker and each.marker.evaluate({"extra": "tpu"})
    )


def mismatch(folder: Path, requirements: Sequence[Requirement]) -> str | None:
    """Returns which requirement the packages in a folder do not meet, with both versions. None if they meet all."""
    for requirement in requirements:
        found = sorted(each.version for each in distributions(name=requirement.name, path=[str(folder)]))
        if not found:
            return f"jax {JAX} compiles with {requirement.name}{requirement.specifier}, but {folder} has none"
        if not all(requirement.specifier.contains(each, prereleases=True) for each in found):
            return (
                f"jax {JAX} compiles with {requirement.name}{requirement.specifier}, "
                f"but {folder} has version {', '.join(found)}"
            )
    return None


def cuda_mismatch(folder: Path) -> str | None:
    """Returns why the CUDA plugin in a folder does not fit the installed jax. None if it fits."""
    cuda = "cuda12" if (folder / "jax_cuda12_plugin").is_dir() else "cuda13"
    return mismatch(folder, [Requirement(f"jax-{cuda}-{part}=={JAX}") for part in ("plugin", "pjrt")])


NO_LIBTPU = mismatch(LIBTPU, [required_libtpu(requires("jax") or [])])
NO_CUDA = cuda_mismatch(CUDA)
needs_libtpu = pytest.mark.skipif(NO_LIBTPU is not None, reason=str(NO_LIBTPU))
needs_cuda = pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA))
