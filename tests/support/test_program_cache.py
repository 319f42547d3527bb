"""Tests share programs for one device on disk, and programs for several devices in memory only."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src import compiler
from jax.sharding import NamedSharding, PartitionSpec
from support import small


def _on_disk(name: str) -> list[Path]:
    folder: str = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] -- set at run time
    return list(Path(folder).glob(f"jit_{name}-*"))


def test_only_programs_for_one_device_are_on_disk() -> None:
    def program_of_one_device(x: jax.Array) -> jax.Array:
        return x + 1

    def program_of_two_devices(x: jax.Array) -> jax.Array:
        return x.sum()

    for path in _on_disk("program_of_two_devices"):  # left by a broken version
        path.unlink()
    x = jnp.arange(8.0)
    split = jax.device_put(x, NamedSharding(small.mesh(data=2), PartitionSpec("data")))
    assert jax.jit(program_of_one_device)(x)[0] == 1
    assert jax.jit(program_of_two_devices)(split) == 28
    assert _on_disk("program_of_one_device")
    assert not _on_disk("program_of_two_devices")


def test_a_program_for_several_devices_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_program = compiler.backend_compile_and_load

    def counted(*arguments: Any) -> Any:
        compiled.append(arguments)
        return compile_program(*arguments)

    monkeypatch.setattr(compiler, "backend_compile_and_load", counted)
    counts = []
    for devices in (2, 2, 4):
        x = jax.device_put(jnp.arange(8.0), NamedSharding(small.mesh(data=devices), PartitionSpec("data")))
        before = len(compiled)
        assert float(jax.jit(lambda x: (x * 3).sum())(x)) == 84
        counts.append(len(compiled) - before)
    assert counts == [1, 0, 1]
