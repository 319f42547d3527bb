"""Which devices are there, what can each do, and how is a program compiled for it?

One row for each kind of device. `topology` turns the name of a slice or of a number of GPUs, `v5e:4x4` or `h100:8`,
into devices that programs can be compiled for, whether or not this machine has them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh

from thinkpo_jax.config import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What XLA must know of a GPU that is not there, beside what every `Device` says."""

    description: str
    compute_capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    shared_memory: tuple[int, int]  # bytes of a core, and most bytes of a block
    l2_cache: int
    clock_ghz: float
    network: float  # bytes per second of one device's share of what leaves its host


@dataclass(frozen=True)
class Device:
    """One kind of device. A TPU v4 chip is one device (as jax runs it), a TPU7x chip two."""

    name: str  # what users write
    kinds: tuple[str, ...]  # what a device of this kind has in its `device_kind`
    peak: float  # dense bfloat16 operations per second
    memory: int  # bytes that a program may use, as its compiler or driver says
    bandwidth: float  # bytes per second of that memory
    network: float  # bytes per second that a device receives over all its links to its neighbours
    options: Mapping[str, Any] = field(default_factory=dict)  # given to the compiler
    gpu: Gpu | None = None


# Products are not split into a ring of exchanges (collective matmul), and the scheduler looks again at what it found to
# overlap: from the published settings of 8B models on v6e. (Those fuse gathers with what runs beside them too, which
# libtpu 0.0.52 refuses on all but v5e: it warns of wrong results.)
_TPU = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_latency_hiding_scheduler_rerun": 2,
}
# Exchanges run beside computation, and the weights of a layer travel together.
_GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 2**30,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**30,
    "xla_gpu_all_reduce_combine_threshold_bytes": 2**30,
}


def _vmem(kib: int) -> dict[str, Any]:
    """More of the on-chip memory for one fusion than by default."""
    return {**_TPU, "xla_tpu_scoped_vmem_limit_kib": kib}


_HOPPER = {"compute_capability": (9, 0), "cores": 132, "fpus_per_core": 128, "shared_memory": (233_472, 232_448)}
_HOPPER |= {"l2_cache": 50 * 2**20, "clock_ghz": 1.98, "network": 50e9}

# Peaks, bandwidths and links as the vendors publish them; the memory of TPUs is what libtpu 0.0.52 lets a program use,
# that of GPUs what the driver reports.
DEVICES = (
    Device("v4", ("TPU v4",), 275e12, int(30.75 * GIB), 1228e9, 150e9, _TPU),
    Device("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 200e9, _TPU),
    Device("v5p", ("TPU v5",), 459e12, int(95.73 * GIB), 2765e9, 600e9, _vmem(65_472)),
    Device("v6e", ("TPU v6",), 918e12, int(31.24 * GIB), 1640e9, 400e9, _vmem(98_304)),
    Device("tpu7x", ("TPU7x",), 2307e12 / 2, int(94.74 * GIB), 7380e9 / 2, 300e9, _TPU),
    Device("a100", ("A100",), 312e12, 84_974_239_744, 2039e9, 300e9, _GPU,
           Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, (167_936, 166_912), 40 * 2**20, 1.41, 25e9)),
    Device("h100", ("H100",), 989e12, 84_978_434_048, 3352e9, 450e9, _GPU,
           Gpu("NVIDIA H100 80GB HBM3", **_HOPPER)),
    Device("h200", ("H200",), 989e12, 150_110_011_392, 4800e9, 450e9, _GPU,
           Gpu("NVIDIA H200", **_HOPPER)),
    Device("b200", ("B200",), 2250e12, 191_500_000_000, 8000e9, 900e9, _GPU,
           Gpu("NVIDIA B200", (10, 0), 148, 128, (233_472, 232_448), 126 * 2**20, 1.965, 50e9)),
)  # fmt: skip

# What can be rented: chips along each axis of the torus.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT, "tpu7x": _DEEP}
PER_HOST = 8  # GPUs
FRACTION = 0.9  # of a GPU's memory that programs get with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9


def of_kind(device_kind: str) -> Device | None:
    """The row of a device by what it calls itself; None where there is none (a CPU). The first that fits counts."""
    kind = device_kind.lower()
    return next((row for row in DEVICES if any(name.lower() in kind for name in row.kinds)), None)


def peak(device_kind: str) -> float | None:
    """Peak bfloat16 operations per second of a device; None where it is not known."""
    found = of_kind(device_kind)
    return None if found is None else found.peak


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """What `jax.jit` gives the compiler for the devices of a mesh; None (its defaults) where they have no row."""
    found = of_kind(mesh.devices.flat[0].device_kind)
    return None if found is None else dict(found.options)


@dataclass(frozen=True)
class Topology:
    """Devices that programs are compiled for."""

    name: str
    device: Device
    shape: tuple[int, ...]  # TPU: chips along each axis; GPU: hosts, GPUs of each

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.shape) * (2 if self.device.name == "tpu7x" else 1)

    @property
    def memory(self) -> int:
        """Bytes that a program may use of one device."""
        return self.device.memory if self.device.gpu is None else int(self.device.memory * FRACTION)

    def devices(self) -> list[Any]:
        """Stand-ins for the devices, in the order of a mesh. Needs libtpu, or the plugin for CUDA."""
        gpu, dimensions = self.device.gpu, "x".join(map(str, self.shape))
        if gpu is not None:
            target = _target(gpu, self.device)
            found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x{dimensions}")
            return list(found.devices)
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.device.name == "v4" else {}
        if self.shape == (1, 1):
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{self.device.name}:{dimensions}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def topology(name: str) -> Topology:
    """The topology of a name such as `v5e:4x4` or `h100:8`. Raises `UserError` that lists those that there are."""
    kind, _, shape = name.lower().partition(":")
    device = next((row for row in DEVICES if row.name == kind), None)
    if device is None:
        raise UserError(
            f"--topology {name}: no device {kind!r}{nearest(kind, [row.name for row in DEVICES])}. {listed()}"
        )
    if device.gpu is None:
        if shape not in SLICES[kind]:
            raise UserError(
                f"--topology {name}: {kind} has the slices {', '.join(SLICES[kind])} (chips along each axis)."
            )
        return Topology(name.lower(), device, tuple(map(int, shape.split("x"))))
    count = int(shape) if shape.isascii() and shape.isdecimal() and len(shape) < 6 else 0
    hosts = max(1, count // PER_HOST)
    if count < 1 or count != hosts * min(count, PER_HOST):
        raise UserError(
            f"--topology {name}: give {kind} a number of GPUs: 1 to {PER_HOST}, or a multiple of {PER_HOST} (hosts)."
        )
    return Topology(name.lower(), device, (hosts, count // hosts))


def slices(kind: str) -> list[Topology]:
    """All slices of a kind of device, the smallest first. Raises `UserError` where there is no such kind."""
    if kind not in (kinds := [row.name for row in DEVICES]):
        raise UserError(f"--topology {kind}: no such device{nearest(kind, kinds)}. Choose one of {', '.join(kinds)}.")
    names = SLICES.get(kind, tuple(str(count) for count in (1, 2, 4, 8, *range(16, 65, 8), 128, 256)))
    return [topology(f"{kind}:{name}") for name in names]


def listed() -> str:
    """All names that `topology` knows, in words."""
    lines = [f"{name}:{shape}" for name, shapes in SLICES.items() for shape in shapes]
    gpus = ", ".join(f"{row.name}:N" for row in DEVICES if row.gpu is not None)
    return f"There are {', '.join(lines)}; {gpus} with N GPUs (1 to {PER_HOST}, or a multiple of {PER_HOST})."


def _target(gpu: Gpu, device: Device) -> str:
    """A GPU as XLA's text form of a target describes it."""
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
