"""Peak rates, memory and compiler options of each kind of device."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import Mesh

GIB = 2**30


@dataclass(frozen=True)
class GpuCompileTarget:
    """What XLA needs to compile for a GPU that is not attached, besides the fields of `DeviceSpec`."""

    description: str
    compute_capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    shared_memory: tuple[int, int]  # bytes per core, and maximum bytes per block
    l2_cache: int
    clock_ghz: float
    network: float  # bytes per second that leave the host, per device


@dataclass(frozen=True)
class DeviceSpec:
    """One kind of device. As in JAX, a TPU v4 chip is one device and a TPU7x chip is two."""

    name: str  # as users write it
    device_kind_substrings: tuple[str, ...]  # what JAX's `device_kind` contains
    peak: float  # dense bfloat16 FLOP per second
    memory: int  # bytes available to a program, as its compiler or driver reports
    bandwidth: float  # bytes per second of that memory
    interconnect_bandwidth: float  # bytes per second that one device receives over all links to its neighbors
    compiler_options: Mapping[str, Any] = field(default_factory=dict)
    gpu: GpuCompileTarget | None = None


# No collective matmuls (matrix products as rings of transfers), and a second pass of the scheduler that overlaps
# transfers with computation. Source: published settings of 8B models on v6e. Those settings also fuse all-gathers with
# neighboring computation. libtpu 0.0.52 refuses that on all devices but v5e, and warns of wrong results.
_TPU = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000, "xla_latency_hiding_scheduler_rerun": 2}
# Overlap collectives with computation, and send the weights of one layer together.
_GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 2**30,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**30,
    "xla_gpu_all_reduce_combine_threshold_bytes": 2**30,
}
_VMEM_KIB = "xla_tpu_scoped_vmem_limit_kib"  # on-chip memory of one fusion, where it needs more than the default
_HOPPER = {"compute_capability": (9, 0), "cores": 132, "fpus_per_core": 128, "shared_memory": (233_472, 232_448)}
_HOPPER |= {"l2_cache": 50 * 2**20, "clock_ghz": 1.98, "network": 50e9}

# Peaks, bandwidths and links are the vendors' published figures. The memory of a TPU is what libtpu 0.0.52 makes
# available to a program. The memory of a GPU is what the driver reports.
DEVICE_SPECS = (
    DeviceSpec("v4", ("TPU v4",), 275e12, int(30.75 * GIB), 1228e9, 150e9, _TPU),
    DeviceSpec("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 200e9, _TPU),
    DeviceSpec("v5p", ("TPU v5",), 459e12, int(95.73 * GIB), 2765e9, 600e9, _TPU | {_VMEM_KIB: 65_472}),
    DeviceSpec("v6e", ("TPU v6",), 918e12, int(31.24 * GIB), 1640e9, 400e9, _TPU | {_VMEM_KIB: 98_304}),
    DeviceSpec("tpu7x", ("TPU7x",), 2307e12 / 2, int(94.74 * GIB), 7380e9 / 2, 300e9, _TPU),
    DeviceSpec("a100", ("A100",), 312e12, 84_974_239_744, 2039e9, 300e9, _GPU,
           GpuCompileTarget("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, (167_936, 166_912), 40 * 2**20, 1.41, 25e9)),
    DeviceSpec("h100", ("H100",), 989e12, 84_978_434_048, 3352e9, 450e9, _GPU,
           GpuCompileTarget("NVIDIA H100 80GB HBM3", **_HOPPER)),
    DeviceSpec("h200", ("H200",), 989e12, 150_110_011_392, 4800e9, 450e9, _GPU,
           GpuCompileTarget("NVIDIA H200", **_HOPPER)),
    DeviceSpec("b200", ("B200",), 2250e12, 191_500_000_000, 8000e9, 900e9, _GPU,
           GpuCompileTarget("NVIDIA B200", (10, 0), 148, 128, (233_472, 232_448), 126 * 2**20, 1.965, 50e9)),
)  # fmt: skip


def find_device_spec(device_kind: str) -> DeviceSpec | None:
    """Returns the first row whose substrings occur in JAX's `device_kind`, or None (for example for a CPU)."""
    kind = device_kind.lower()
    return next((row for row in DEVICE_SPECS if any(name.lower() in kind for name in row.device_kind_substrings)), None)


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bfloat16 FLOP per second of a device, or None if it is not known."""
    device = find_device_spec(device_kind)
    return None if device is None else device.peak


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Returns the compiler options of `jax.jit` for the devices of a mesh, or None for JAX's defaults."""
    device = find_device_spec(mesh.devices.flat[0].device_kind)
    return None if device is None else dict(device.compiler_options)
