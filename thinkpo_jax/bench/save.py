"""Measures what the digests of a checkpoint cost, compared with saving it."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thinkpo_jax.runtime.devices import GIB
from thinkpo_jax.runtime.manifest import find_file_damage
from thinkpo_jax.training.checkpoints import CheckpointStore
from thinkpo_jax.training.damaged_checkpoints import ITEMS
from thinkpo_jax.training.train_step import TrainState

NUM_ARRAYS = 4  # in each item


def bench_save(gib: float, repeats: int) -> dict[str, Any]:
    """Times saving a state of `gib` GiB below the temporary folder, and computing all digests of its files.

    Both are in the page cache when their digests are computed, as they are in a save. Prints seconds and returns them.
    """
    with tempfile.TemporaryDirectory() as name, CheckpointStore(Path(name) / "checkpoints", keep=1) as store:
        rounds: list[dict[str, float]] = []
        for step in range(repeats + 1):
            state = _state(gib, seed=step)
            start = time.perf_counter()
            store.save(state, step, wait=True)
            saving = time.perf_counter() - start
            copy = Path(name) / "copy"  # this process knows the digests of the files that it has written
            shutil.copytree(store.folder / str(step), copy)
            start = time.perf_counter()
            damage = [line for item in ITEMS for line in find_file_damage(copy / item)]
            digests = time.perf_counter() - start
            assert not damage, damage
            shutil.rmtree(copy)
            if step:  # the first save also starts threads
                rounds.append({"save": saving, "digests": digests, "ratio": digests / saving})
                print("save {save:.2f} s, digests {digests:.2f} s, digests / save {ratio:.3f}".format(**rounds[-1]))
    ratio = float(np.median([each["ratio"] for each in rounds]))
    print(f"median digests / save: {ratio:.3f}")
    return {"gib": gib, "rounds": rounds, "ratio": ratio}


def _state(gib: float, *, seed: int) -> TrainState:
    """Returns random arrays, which cannot be compressed, of `gib` GiB in all."""
    rng, size = np.random.default_rng(seed), int(gib * GIB) // (2 * NUM_ARRAYS * 4)
    model, moments = (
        {f"{item}{i}": jnp.asarray(rng.standard_normal(size, np.float32)) for i in range(NUM_ARRAYS)} for item in ITEMS
    )
    state: Any = TrainState(model, moments, jnp.int32(seed))  # pyright: ignore[reportArgumentType]
    return jax.block_until_ready(state)
