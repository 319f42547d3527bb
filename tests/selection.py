"""Choose which cases of a parametrized test `make test` runs. `make test-all` runs all of them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive


def cases(values: Iterable[Any], *, short: Callable[[Any], bool]) -> list[Any]:
    """Returns the values as parameters. Those for which `short` is false are marked `exhaustive`."""
    return [value if short(value) else pytest.param(value, marks=exhaustive) for value in values]
