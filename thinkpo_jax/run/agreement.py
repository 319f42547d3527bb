"""Checks that all processes of a run read the same and run the same programs. Otherwise they would wait forever."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from thinkpo_jax.run.run_config import PATH_KEYS, RunConfig
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.files import package_versions
from thinkpo_jax.runtime.processes import broadcast_from_primary, share_from_primary


def check_same_run(config: RunConfig) -> None:
    """Raises `UserError`, which names the keys, if this process has another configuration or versions than process 0.

    Paths of models and data may differ among hosts. Must be the first exchange, because a configuration decides about
    all others. Uses no device.
    """
    own = {**package_versions(), **config.model_dump(mode="json", exclude=PATH_KEYS)}
    text = json.dumps(own)
    differences = find_differences(json.loads(share_from_primary(text)), json.loads(text))
    if differences:
        keys = "; ".join(f"{key} is {own!r}, not {expected!r}" for key, expected, own in differences)
        raise UserError(
            f"this process differs from process 0: {keys}. Start all processes with the same --config and --set, from "
            "the same installation."
        )


def is_same_on_all_processes(text: str) -> bool:
    """Returns whether process 0 has the same text as this process."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return np.array_equal(digest, broadcast_from_primary(digest))


def find_differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Returns the keys whose values differ, each with both values, for example `("stages.0.beta", 0.1, 0.2)`.

    Where data is does not count, because it has a digest.
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = {**old, **new}
        for key in ("path", "data_state"):
            keys.pop(key, None)
        return [each for key in keys for each in find_differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [(path.lstrip("."), old, new)]
