"""Describes the device, the driver and the libraries of a measurement, and the rate of plain matrix products."""

import re
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from thinkpo_jax.runtime.devices import peak_flops
from thinkpo_jax.runtime.files import software_versions

MATMUL_SIZES = {"cpu": 2048}  # of square matrices, by platform
DEFAULT_MATMUL_SIZE = 8192
PRODUCTS_AT_ONCE = 10  # launched before the device is waited for
_GPU_QUERY = ("nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader")


def describe_machine() -> dict[str, Any]:
    """Returns the first device, the driver, the versions, and the rate of bfloat16 matrix products."""
    device = jax.devices()[0]
    driver = "unknown"
    with suppress(OSError, subprocess.SubprocessError):
        gpus = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        driver = "; ".join(sorted(set(gpus)))  # GPUs of one kind have one line
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "driver": driver,
        "limit_bytes": device_memory()["limit_bytes"],
        "peak_flops": peak_flops(device.device_kind),
        "matmul_flops": matmul_rate("bfloat16"),
        "versions": software_versions(),
    }


def matmul_rate(dtype: str) -> float:
    """Returns FLOP/s of products of two square matrices on the first device: the median of several rounds."""
    size = MATMUL_SIZES.get(jax.devices()[0].platform, DEFAULT_MATMUL_SIZE)
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), dtype) for key in keys)
    multiply = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(multiply(left, right))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([multiply(left, right) for _ in range(PRODUCTS_AT_ONCE)])
        seconds.append(time.perf_counter() - start)
    return PRODUCTS_AT_ONCE * 2 * size**3 / sorted(seconds)[len(seconds) // 2]


def device_memory() -> dict[str, int | None]:
    """Returns the largest memory that this process held on the first device, and what it may use, in bytes."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_bytes": stats.get("peak_bytes_in_use"), "limit_bytes": stats.get("bytes_limit")}


def peak_resident_memory() -> int:
    """Returns the largest resident memory of this process so far, in bytes."""
    if sys.platform == "linux":  # There getrusage also counts the parent process.
        return read_process_memory("self", "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read_process_memory(process: int | str, field: str) -> int:
    """Returns a field of /proc/PROCESS/status in bytes, such as VmRSS. 0 for a process that has ended. Needs Linux."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    sizes = re.findall(rf"{field}:\s+(\d+)", status)
    return int(sizes[0]) * 1024 if sizes else 0
