"""Tools for sections and their errors: one key of two, and several errors reported as one."""

import pytest

from thinkpo_jax.runtime.config import (
    ConfigSection,
    ErrorCollector,
    UserError,
    at_most_one_of,
    collect_errors,
    exactly_one_of,
    parse_config,
)


class EitherSection(ConfigSection):
    steps: int | None = None
    epochs: float | None = None
    system: str | None = None
    column: str | None = None
    _one_length = exactly_one_of("steps", "epochs")
    _one_system = at_most_one_of("system", "column")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"steps": 0}, None),
        ({"epochs": 1.0, "system": ""}, None),
        ({"steps": 1, "column": "c"}, None),
        ({}, "give either `steps` or `epochs`."),
        ({"steps": None}, "give either `steps` or `epochs`."),
        ({"steps": 1, "epochs": 1.0}, "give either `steps` or `epochs`, not both."),
        ({"steps": 1, "system": "", "column": ""}, "give either `system` or `column`, not both."),
    ],
)
def test_one_of_two_keys(raw: dict[str, object], message: str | None):
    if message is None:
        assert parse_config(EitherSection, raw, source="run.yaml").model_dump(exclude_none=True) == raw
    else:
        with pytest.raises(UserError) as error:
            parse_config(EitherSection, raw, source="run.yaml")
        assert str(error.value) == f"run.yaml: {message}"


def test_collected_errors_are_raised_as_one_at_the_end() -> None:
    def fail(message: str) -> None:
        raise UserError(message)

    def collect(collector: ErrorCollector) -> None:
        assert collector(int, "3") == 3
        assert collector(fail, "first") is None
        collector.fail("second")

    with pytest.raises(UserError, match=r"^first\nsecond$"), collect_errors() as collector:
        collect(collector)
    with collect_errors() as collector:
        assert collector(int, "3") == 3
