"""Saves checkpoints until the disk is full. The argument is a folder on a file system of 30 MB."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from thinkpo_jax.runtime.config import RunError
from thinkpo_jax.training.checkpoints import CheckpointStore
from thinkpo_jax.training.train_step import TrainState


def state(megabytes: int) -> TrainState:
    values = np.random.default_rng(0).normal(size=megabytes * 2**18).astype(np.float32)
    model: object = {"weights": jnp.asarray(values)}
    return TrainState(model, {"moment": jnp.ones(3)}, jnp.int32(0))  # pyright: ignore[reportArgumentType]


folder = Path(sys.argv[1])
with CheckpointStore(folder, keep=2) as store:
    for step in (1, 2):
        store.save(state(9), step, wait=True)
    print(f"kept {sorted(map(int, (path.name for path in folder.iterdir())))}")
    try:
        store.save(state(40), 3, wait=True)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
    print(f"too large: {sorted(map(int, (path.name for path in folder.iterdir() if path.name.isdigit())))}")
with CheckpointStore(folder, keep=2) as store:
    store.save(state(9), 5, wait=True)
    print(f"again {sorted(map(int, (path.name for path in folder.iterdir())))}")
with CheckpointStore(folder) as store:
    print(f"newest {store.latest_step()}")
print(f"names {sorted(path.name for path in folder.iterdir())}")
