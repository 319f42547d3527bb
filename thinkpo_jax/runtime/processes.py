"""Starts, synchronizes and ends a run of several processes.

Every process runs the same program on its own devices. Only the primary process (process 0) prints and writes. What
decides how a run continues also comes from it. If a process dies, fails or hangs, all of them end (watchdog.py).
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # The key-value store has no public name. Orbax uses it in the same way.
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from thinkpo_jax.runtime.config import UserError, first_line
from thinkpo_jax.runtime.paths import to_display
from thinkpo_jax.runtime.watchdog import HANG_TIMEOUT_MINUTES, Watchdog, format_error

START_TIMEOUT_SECONDS = 100.0  # a process waits so long for the others
HEARTBEAT_TIMEOUT_SECONDS = 60  # a process that is silent for so long counts as dead, and the others end
ValueT = TypeVar("ValueT", np.ndarray, bool, int, bytes)

_watchdog: Watchdog | None = None  # if this process is one of several
_is_connecting = threading.Event()  # stays set if the other processes do not come
_message_numbers = itertools.count()


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator-address, --num-processes, --process-id and --hang-timeout to a command.

    The first three also have their old names.
    """
    group = parser.add_argument_group("several processes", "TPU slices, SLURM and Open MPI need none of them.")
    group.add_argument(
        "--coordinator-address", "--coordinator", metavar="HOST:PORT", help="host of process 0, and a free port there"
    )
    group.add_argument("--num-processes", "--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", "--process", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--hang-timeout", type=_read_minutes, default=HANG_TIMEOUT_MINUTES, metavar="MINUTES",
        help="end all processes after so long without progress (default: %(default)g)",
    )  # fmt: skip


def _read_minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a positive number of minutes")


def initialize_distributed(arguments: argparse.Namespace, *, start_timeout: float = START_TIMEOUT_SECONDS) -> None:
    """Connects this process with the others, if the flags or the cluster say that there are several. Watches them.

    Must be called before JAX is used. A second call does nothing. Raises `UserError` if the flags are invalid or the
    other processes do not start within `start_timeout` seconds.
    """
    global _watchdog
    if jax.distributed.is_initialized():
        return
    address, count, index = arguments.coordinator_address, arguments.num_processes, arguments.process_id
    if (address, count, index) != (None, None, None):
        _check_flags(address, count, index)
        options = {"coordinator_address": address, "num_processes": count, "process_id": index}
        print(
            f"Process {index} of {count} (0-based) is waiting for the other processes at {address}. Start all of them "
            f"within {start_timeout:g} seconds, with the same --coordinator-address.", file=sys.stderr, flush=True,
        )  # fmt: skip
    elif (options := detect_cluster(os.environ)) is None:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, at which a run saves and ends
    _connect(options, start_timeout)
    if is_distributed():
        state = distributed.global_state
        _watchdog = Watchdog(state.client, state.process_id, hang_timeout_minutes=arguments.hang_timeout)


def _connect(options: Mapping[str, Any], timeout: float) -> None:
    """Waits `timeout` seconds for the other processes. Raises `UserError` if they do not come.

    JAX waits in another thread, because it would ignore Ctrl-C and abort this process at its own timeout.
    """
    errors: list[Exception] = []

    def connect() -> None:
        try:
            if "coordinator_address" not in options:
                _check_cluster_port(round(timeout))
            jax.distributed.initialize(
                **options,
                initialization_timeout=round(timeout) + HEARTBEAT_TIMEOUT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            )
        except Exception as error:
            errors.append(error)
        else:
            _is_connecting.clear()

    _is_connecting.set()
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if not _is_connecting.is_set():
        return
    error = errors[0] if errors else None
    if isinstance(error, UserError) or not isinstance(error, RuntimeError | ValueError | OSError | None):
        raise error
    reason = first_line(error) if error else f"not all of them came within {timeout:g} seconds."
    raise UserError(
        f"the processes cannot connect: {reason} Read the last lines of the others. For example, the port of process 0 "
        "may be in use. Start all of them at the same time, each with its own --process-id and with one "
        "--coordinator-address that each of them can reach, or on a TPU slice, or with srun or mpirun."
    )


def _check_flags(address: str | None, count: int | None, index: int | None) -> None:
    if address is None or count is None or index is None:
        raise UserError("--coordinator-address, --num-processes and --process-id go together. Give all three.")
    if count < 1:
        raise UserError(f"--num-processes {count}: expected the number of processes, at least 1.")
    if not 0 <= index < count:
        raise UserError(f"--process-id {index}: with --num-processes {count} it must be one of 0 to {count - 1}.")
    flag = f"--coordinator-address {address}"
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"{flag}: expected HOST:PORT, for example 10.0.0.2:8476.")
    if not re.fullmatch(r"[\w.:-]+", host.strip("[]")):
        raise UserError(f"{flag}: {host} is not the name or IP address of a host.")
    if index == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))  # only here: elsewhere the name may resolve later
            _bind(int(port))
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"{flag}: {error}. Give the name or IP address of the host that runs process 0, and a port above 1023 "
                "that is free there. Pass the same --coordinator-address to every process."
            ) from None


def _check_cluster_port(timeout: int) -> None:
    """Raises `UserError` if this is process 0 of a cluster, and the port that JAX chooses is in use."""
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    address, _, index, _ = ClusterEnv.auto_detect_unset_distributed_params(given, None, None, None, None, timeout)
    if index != 0 or address is None or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    try:
        _bind(int(address.rpartition(":")[2]))
    except OSError as error:
        raise UserError(
            f"{address}: {error}. Another run probably uses this port on the host of process 0. End it, or set "
            "JAX_COORDINATOR_PORT to another port, the same in all processes."
        ) from None


def _bind(port: int) -> None:
    """Binds a port as JAX's coordinator does, which crashes if it cannot. Never listens, so no process connects."""
    is_dual_stack = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if is_dual_stack else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an ended run may linger
        if is_dual_stack:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.bind(("", port))


def detect_cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns what `jax.distributed.initialize` cannot detect itself, or None if there is only this process.

    JAX detects TPU slices, SLURM and Open MPI. Under SLURM it gives a process the one GPU with its number on the node.
    A process that is alone on its node gets all GPUs here. Raises `UserError` if a process count is not a number.
    """
    names = ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_SIZE")
    tasks, nodes, ranks = (_read_count(environment, name) for name in names)
    # An sbatch script without srun has no job step. Its process is alone.
    if tasks > 1 and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        gpus = environment.get("SLURM_GPUS_ON_NODE", "1")
        return {"local_device_ids": [*range(int(gpus))]} if tasks == nodes and gpus.isdigit() else {}
    if ranks > 1:
        return {}
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu").split(","):
        return None
    return {} if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or _is_cloud_tpu_vm(environment) else None


def _read_count(environment: Mapping[str, str], name: str) -> int:
    """Returns the count in an environment variable, or 1 if it is not set."""
    try:
        return int(environment.get(name, 1))
    except ValueError:
        remedy = "Unset this variable, or start the run with srun or mpirun, which set it."
        raise UserError(f"{name}={environment[name]}: expected a whole number. {remedy}") from None


def _is_cloud_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU VM, whose metadata name its slice. A notebook's machine is alone."""
    if "COLAB_RELEASE_TAG" in environment or "TPU_SKIP_MDS_QUERY" in environment:
        return False
    try:
        from jax._src import cloud_tpu_init  # JAX detected it when it was imported
    except ImportError:
        return False
    return cloud_tpu_init.running_in_cloud_tpu_vm


def is_distributed() -> bool:
    """Whether this process is one of several. Touches no device."""
    if _is_connecting.is_set():  # JAX counts as initialized while it still waits for the other processes.
        return False
    return jax.distributed.is_initialized() and distributed.global_state.num_processes > 1


def is_primary_process() -> bool:
    """Whether this process is the one that prints and writes. Touches no device in a run of one process."""
    return not is_distributed() or jax.process_index() == 0


def note_progress() -> None:
    """Notes a sign of life of this process. Without one for a long time, all processes end, see `Watchdog`."""
    if _watchdog is not None:
        _watchdog.note_progress()


def report_failure(status: int, message: str, *, shown: str | None = None) -> None:
    """Shows why this process ends, and tells the other processes. They end with the same exit status.

    `shown` is for stderr, by default an error message. Does not return if another process has failed before.
    """
    message = to_display(message)
    if shown is None:
        shown = format_error(message, distributed.global_state.process_id if is_distributed() else None) + "\n"
    if _watchdog is not None:
        _watchdog.begin_end()
    print(shown, end="", file=sys.stderr, flush=True)
    if _watchdog is not None:
        _watchdog.report_failure(status, message)


def is_communication_error(error: Exception) -> bool:
    """Returns whether an error of JAX may say that another process is gone."""
    if not is_distributed():
        return False
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    return is_of_jax or (isinstance(error, ValueError) and "Gloo" in str(error))


def leave_together() -> None:
    """Waits some seconds until all processes end, after one of them has failed."""
    if _watchdog is not None:
        _watchdog.meet_others()


def share_from_primary(text: str) -> str:
    """Returns the primary process's text in every process.

    It needs no device. So it also works if the processes have different versions of JAX, or different meshes.
    """
    if not is_distributed():
        return text
    state, key = distributed.global_state, f"thinkpo_jax/shared/{next(_message_numbers)}"
    client: Any = state.client
    if state.process_id == 0:
        client.key_value_set(key, text)
        return text
    while True:  # until the watchdog ends this process. Ctrl-C works between two calls.
        try:
            return client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def barrier(name: str) -> None:
    """Waits until every process has called this function with the same name."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def broadcast_from_primary(value: ValueT) -> ValueT:
    """Returns the primary process's value in every process. Arrays must have the same shape in all processes."""
    if not is_distributed():
        return value
    if isinstance(value, np.ndarray):
        return np.array(multihost_utils.broadcast_one_to_all(value))
    if isinstance(value, bytes):
        size = broadcast_from_primary(len(value))
        content = np.frombuffer(value, np.uint8) if is_primary_process() else np.zeros(size, np.uint8)
        return broadcast_from_primary(content).tobytes() if size else b""
    payload = np.array([value], np.int64).view(np.uint8)  # bytes, because JAX turns int64 into int32
    return type(value)(broadcast_from_primary(payload).view(np.int64)[0])


def any_process(flag: bool) -> bool:
    """Whether the flag is set in at least one process."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if is_distributed() else flag


class DelayedVote:
    """Tells which flags are set in any process, without waiting for the programs that the devices run now.

    The devices collect the flags of a call after all programs that were launched before it. So with several processes a
    call returns the answer of the call before it. A single process gets the answer at once.
    """

    def __init__(self, mesh: Mesh, *, num_flags: int = 1) -> None:
        """Compiles the program that collects the flags. All processes must create and call the vote together."""
        self._mesh = mesh
        any_device = functools.partial(jnp.any, axis=tuple(range(1, 1 + len(mesh.axis_names))))
        self._any = jax.jit(any_device, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._answer = self._collect((False,) * num_flags) if is_distributed() else None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """Returns for each flag whether a process has set it. With several processes, they are of the call before."""
        if self._answer is None:
            return flags
        answer, self._answer = self._answer, self._collect(flags)
        return tuple(np.asarray(answer).tolist())

    def _collect(self, flags: tuple[bool, ...]) -> jax.Array:
        shape, spec = self._mesh.devices.shape, PartitionSpec(None, *self._mesh.axis_names)
        own_flags = np.array(flags).reshape(-1, *(1,) * len(shape))
        sharding = NamedSharding(self._mesh, spec)
        return self._any(jax.make_array_from_callback((len(flags), *shape), sharding, lambda _: own_flags))


def gather_to_host(array: jax.Array) -> np.ndarray:
    """Returns a whole array on this host, even if its parts are on devices of several processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    gathered = np.asarray(multihost_utils.process_allgather(array, tiled=True))
    note_progress()
    return gathered


def shutdown_distributed() -> None:
    """Waits until all processes are done. A process that left before would look as if it had died."""
    if is_distributed():
        barrier("the run is finished")  # JAX waits less long than process 0 may need for the report
        if _watchdog is not None:
            _watchdog.stop()
        jax.distributed.shutdown()
