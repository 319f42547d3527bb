"""How do several processes make one run? Who they are, what they agree on, and how they wait for each other.

Every process runs the same program on its own devices. The first one alone speaks and writes; what decides how a run
goes on is what the first one sees. A process that ends early is missed by the others, who then end too.
"""

import argparse
import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from thinkpo_jax.runtime.config import UserError

HEARTBEAT_TIMEOUT_SECONDS = 60  # after so long without a sign of life a process counts as dead, and the others end


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes and --process to a command."""
    group = parser.add_argument_group("several processes", "TPU slices, SLURM and Open MPI need none of these.")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a free port there")
    group.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")


def initialize_distributed(arguments: argparse.Namespace) -> None:
    """Makes this process one of several, by its arguments or by what a cluster says of itself.

    Must be called before JAX is used; a second time it does nothing. Raises `UserError` where the arguments make no
    sense, or the others do not come.
    """
    if jax.distributed.is_initialized():
        return
    given = {
        "coordinator_address": arguments.coordinator,
        "num_processes": arguments.processes,
        "process_id": arguments.process,
    }
    if any(value is not None for value in given.values()):
        _check(arguments)
        # Said before they come: where one never does, JAX ends the process itself, and no handler of ours is called.
        print(
            f"process {arguments.process} of {arguments.processes} (counted from 0) waits for the others at "
            f"{arguments.coordinator}; all must start within five minutes, with the same --coordinator.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    else:
        found = detect_cluster(os.environ)
        if found is None:
            return
        given = found
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM, at which a run saves and ends
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the processes do not come together: {str(error).splitlines()[0]} Start all of them within five minutes, "
            "with one --coordinator that each of them can reach, or on a TPU slice, under srun or mpirun."
        ) from None


def _check(arguments: argparse.Namespace) -> None:
    coordinator, count, index = arguments.coordinator, arguments.processes, arguments.process
    if None in (coordinator, count, index):
        raise UserError("--coordinator HOST:PORT, --processes N and --process I go together.")
    if count < 1:
        raise UserError(f"--processes {count}: expected how many processes there are, at least 1.")
    if not 0 <= index < count:
        raise UserError(f"--process {index}: with --processes {count} it is one of 0 to {count - 1}.")
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {coordinator}: expected HOST:PORT, for example 10.0.0.2:8476.")
    if not re.fullmatch(r"[\w.:-]+", host.strip("[]")):
        raise UserError(f"--coordinator {coordinator}: {host} is not the name or IP address of a host.")
    if index == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))  # for other processes the name may appear later
            _bind(int(port))
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"--coordinator {coordinator}: {error}. Give the name or IP address of the host that runs process 0, "
                "and a port above 1023 that is free there. Pass the same --coordinator to every process."
            ) from None


def _bind(port: int) -> None:
    """Binds the port as JAX's coordinator does, which crashes if it cannot. Never listens, so no process connects."""
    dual = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if dual else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an ended run may linger
        if dual:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.bind(("", port))


def detect_cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs beyond what it finds by itself; None where this process is alone.

    JAX knows TPU slices, SLURM and Open MPI. Under SLURM it gives each process the one GPU of its number on the node;
    where a node has one process, that gets all of them. Raises `UserError` where a count is not a number.
    """
    names = ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_SIZE")
    tasks, nodes, ranks = (_number(environment, name) for name in names)
    # In a script of sbatch, outside of srun, there is no step: the process is alone.
    if tasks > 1 and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        gpus = environment.get("SLURM_GPUS_ON_NODE", "1")
        return {"local_device_ids": [*range(int(gpus))]} if tasks == nodes and gpus.isdigit() else {}
    if ranks > 1:
        return {}
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu").split(","):
        return None
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return {}
    return {} if _on_a_tpu_vm(environment) else None


def _number(environment: Mapping[str, str], name: str) -> int:
    """Returns the count in an environment variable, or 1 if it is not set."""
    try:
        return int(environment.get(name, 1))
    except ValueError:
        raise UserError(
            f"{name}={environment[name]}: expected a whole number. Unset this variable, or start the run with srun or "
            "mpirun, which set it."
        ) from None


def _on_a_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU VM, whose metadata say what slice it belongs to. A notebook's machine is alone."""
    if "COLAB_RELEASE_TAG" in environment or "TPU_SKIP_MDS_QUERY" in environment:
        return False
    try:
        from jax._src import cloud_tpu_init  # where JAX itself keeps what it found when it was imported
    except ImportError:
        return False
    return cloud_tpu_init.running_in_cloud_tpu_vm


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_primary_process() -> bool:
    """Whether this process is the one that speaks and writes; touches no device where it is alone."""
    return not is_distributed() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here; `what` names the place."""
    if is_distributed():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def broadcast_from_primary(array: np.ndarray) -> np.ndarray:
    """The array of the first process, in every process; of the same shape in all of them."""
    if not is_distributed():
        return array
    from jax.experimental import multihost_utils

    return np.array(multihost_utils.broadcast_one_to_all(array))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in one of the processes."""
    if not is_distributed():
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def gather_to_host(array: jax.Array) -> np.ndarray:
    """An array that lies on devices of several processes, on this host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def shutdown_distributed() -> None:
    """Waits until all processes are done: one that goes first would look as if it had died."""
    if is_distributed():
        jax.distributed.shutdown()
