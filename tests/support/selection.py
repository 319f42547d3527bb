"""Selects the cases of a parametrized test that `make test` runs. `make test-all` runs all of them."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive


def cases(values: Iterable[Any], *, short: Callable[[Any], bool]) -> list[Any]:
    """Returns the values of one argument as parameters. Values for which `short` is false are marked `exhaustive`."""
    return [value if short(value) else pytest.param(value, marks=exhaustive) for value in values]


def combinations(*values: Iterable[Any], short: Callable[..., bool]) -> list[Any]:
    """Returns all combinations of the values of several arguments. `short` gets one value of each argument."""
    return [
        pytest.param(*case, marks=() if short(*case) else exhaustive) for case in itertools.product(*map(list, values))
    ]
