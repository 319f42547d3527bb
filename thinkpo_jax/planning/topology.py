"""Turns the name of a TPU slice or of a number of GPUs into devices that programs can be compiled for.

`v5e:4x4` is a TPU slice and `h100:8` is eight GPUs. This machine does not need to have any of them.
"""

import math
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from thinkpo_jax.runtime.config import UserError, did_you_mean
from thinkpo_jax.runtime.devices import DEVICE_SPECS, GIB, DeviceSpec, GpuCompileTarget

# The slices that can be rented: chips along each axis of the torus.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT, "tpu7x": _DEEP}
GPUS_PER_HOST = 8
_GPU_COUNTS = f"1 to {GPUS_PER_HOST}, or a multiple of {GPUS_PER_HOST}"
GPU_MEMORY_FRACTION = 0.9  # what programs get with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9


@dataclass(frozen=True)
class Topology:
    """Devices that programs are compiled for."""

    name: str
    device: DeviceSpec
    shape: tuple[int, ...]  # TPU: chips along each axis. GPU: hosts, GPUs per host.

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.shape) * (2 if self.device.name == "tpu7x" else 1)

    @property
    def memory(self) -> int:
        """Bytes that a program may use on one device."""
        return self.device.memory if self.device.gpu is None else int(self.device.memory * GPU_MEMORY_FRACTION)

    def describe_share(self, size: int) -> str:
        """Returns a sentence part that says how much of each device's memory so many bytes are."""
        memory = f"{size / GIB:.2f} GiB of the {self.memory / GIB:.2f} GiB of each {self.device.name}"
        return f"{memory} ({size / self.memory:.0%})"

    def describe_memory_fraction(self) -> str:
        """Returns a sentence that says which part of a GPU's memory programs get."""
        setting = f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MEMORY_FRACTION}"
        return f"Programs get {GPU_MEMORY_FRACTION:.0%} of a GPU's memory: set {setting}."

    def devices(self) -> list[Any]:
        """Returns stand-ins for the devices, in the order of a mesh. Needs libtpu or the CUDA plugin."""
        shape = "x".join(map(str, self.shape))
        if self.device.gpu is not None:
            target = _target_config(self.device.gpu, self.device)
            description = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x{shape}")
            return list(description.devices)
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.device.name == "v4" else {}
        if self.shape == (1, 1):
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{self.device.name}:{shape}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def parse_topology(name: str) -> Topology:
    """Returns the topology of a name such as `v5e:4x4` or `h100:8`. Raises `UserError` if there is none."""
    kind, _, shape = name.lower().partition(":")
    device = _find_device(kind, name)
    if device.gpu is None:
        if shape not in SLICES[kind]:
            slices = ", ".join(SLICES[kind])
            raise UserError(f"--topology {name}: {kind} has the slices {slices} (chips along each axis). Choose one.")
        return Topology(name.lower(), device, tuple(map(int, shape.split("x"))))
    count = int(shape) if shape.isascii() and shape.isdecimal() and len(shape) < 6 else 0
    hosts = max(1, count // GPUS_PER_HOST)
    if count < 1 or count != hosts * min(count, GPUS_PER_HOST):
        raise UserError(f"--topology {name}: expected {kind}:N, where N is the number of GPUs ({_GPU_COUNTS}).")
    return Topology(name.lower(), device, (hosts, count // hosts))


def list_slices(kind: str) -> list[Topology]:
    """Returns all slices of a kind of device, the smallest first. Raises `UserError` if there is no such kind."""
    _find_device(kind, kind)
    names = SLICES.get(kind, tuple(str(count) for count in (1, 2, 4, 8, *range(16, 65, 8), 128, 256)))
    return [parse_topology(f"{kind}:{name}") for name in names]


def _find_device(kind: str, name: str) -> DeviceSpec:
    device = next((spec for spec in DEVICE_SPECS if spec.name == kind), None)
    if device is not None:
        return device
    slices = ", ".join(f"{kind}:{shape}" for kind, shapes in SLICES.items() for shape in shapes)
    gpus = ", ".join(f"{spec.name}:N" for spec in DEVICE_SPECS if spec.gpu is not None)
    raise UserError(
        f"--topology {name}: there is no device {kind!r}{did_you_mean(kind, [spec.name for spec in DEVICE_SPECS])}. "
        f"TPU slices: {slices}. GPUs: {gpus}, where N is the number of GPUs ({_GPU_COUNTS})."
    )


def _target_config(gpu: GpuCompileTarget, device: DeviceSpec) -> str:
    """Describes a GPU in the text format of XLA's compile targets."""
    major, minor = gpu.compute_capability
    features = "" if major < 9 else " feature_extension: ACCELERATED_FEATURES"
    return (
        "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
        f"shared_memory_per_core: {gpu.shared_memory[0]} shared_memory_per_block_optin: {gpu.shared_memory[1]} "
        f"threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: {gpu.fpus_per_core} "
        "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
        f"memory_bandwidth: {int(device.bandwidth)} l2_cache_size: {gpu.l2_cache} clock_rate_ghz: {gpu.clock_ghz} "
        f"device_memory_size: {device.memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536 "
        f"cuda_compute_capability {{ major: {major} minor: {minor}{features} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }} '
        f'device_description_str: "{gpu.description}"'
    )
