"""Names of TPU slices and of numbers of GPUs, and the table of devices behind them."""

import pytest
from support import small

from thinkpo_jax.planning.topology import SLICES, list_slices, parse_topology
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.devices import DEVICE_SPECS, compiler_options, find_device_spec


def test_names_of_topologies_give_their_devices() -> None:
    sizes = {"v5e:4x4": 16, "V6E:1x1": 1, "v4:2x2x1": 4, "v5p:2x2x2": 8, "tpu7x:2x2x1": 8}
    sizes |= {"a100:1": 1, "h100:8": 8, "h200:16": 16, "b200:6": 6}
    assert {name: parse_topology(name).size for name in sizes} == sizes
    assert parse_topology("h100:16").shape == (2, 8)
    assert parse_topology("h100:8").memory < parse_topology("h100:8").device.memory  # the allocator gets a part
    assert parse_topology("v5e:4x4").memory == parse_topology("v5e:4x4").device.memory


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v5x:4x4", ["no device 'v5x' (did you mean v5", "v5e:4x4", "h100:N"]),
        ("v5e:3x3", ["v5e has the slices", "2x4, 4x4"]),
        ("v5e", ["v5e has the slices"]),
        ("v5p:4x4", ["v5p has the slices", "2x2x1"]),
        ("h100:12", ["1 to 8", "multiple of 8"]),
        ("h100:0", ["1 to 8"]),
        ("h100:x", ["1 to 8"]),
        ("", ["no device ''", "v6e:16x16"]),
    ],
)
def test_the_error_for_an_unknown_topology_lists_those_that_exist(name: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        parse_topology(name)
    assert [part for part in parts if part not in str(raised.value)] == []


@pytest.mark.parametrize("kind", [spec.name for spec in DEVICE_SPECS])
def test_slices_are_listed_from_small_to_large(kind: str) -> None:
    sizes = [topology.size for topology in list_slices(kind)]
    assert sizes == sorted(sizes)
    assert all(topology.device.name == kind for topology in list_slices(kind))


def test_each_device_is_found_by_the_name_that_it_reports() -> None:
    reported = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    reported |= {spec.name: spec.gpu.description for spec in DEVICE_SPECS if spec.gpu is not None}
    assert reported.keys() == {spec.name for spec in DEVICE_SPECS}
    specs = {name: find_device_spec(kind) for name, kind in reported.items()}
    assert {name: spec and spec.name for name, spec in specs.items()} == {name: name for name in reported}
    assert SLICES.keys() == {spec.name for spec in DEVICE_SPECS if spec.gpu is None}
    assert find_device_spec("cpu") is None
    assert compiler_options(small.mesh()) is None
