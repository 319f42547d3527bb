"""Compiles a program of a stage for devices that are not attached, and reads its memory use and collectives.

The programs are those of training at full shape, without weights and data. This file, run as a program, compiles one of
them. Its process is ended as soon as XLA has dumped the optimized program. XLA would then generate machine code, which
takes minutes and changes no result.
"""

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from thinkpo_jax.data.batches import NUM_REGIONS, Batch
from thinkpo_jax.models.compute_config import resolve_attention_kernel
from thinkpo_jax.models.model_folder import resolve_architecture
from thinkpo_jax.planning import estimates
from thinkpo_jax.planning.estimates import BatchShape, DeviceMemory, TimeBounds
from thinkpo_jax.planning.hlo import Collective, find_collectives, total_memory
from thinkpo_jax.planning.topology import Topology, parse_topology
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.cli import describe_exit_status, handling, last_error, printed_errors, run_and_exit
from thinkpo_jax.runtime.config import RunError, UserError, parse_config
from thinkpo_jax.runtime.context_parallel import check_row_divides_context
from thinkpo_jax.runtime.files import read_json_object
from thinkpo_jax.runtime.mesh import make_mesh, num_data_shards
from thinkpo_jax.runtime.sharding import BATCH_AXES, partition_spec
from thinkpo_jax.training.objectives import Objective, make_thinkpo_objective, sft_objective
from thinkpo_jax.training.optimizer import make_optimizer
from thinkpo_jax.training.reference_log_probs import make_reference_step
from thinkpo_jax.training.stage_config import SftStage, StageConfig
from thinkpo_jax.training.throughput import FlopCount
from thinkpo_jax.training.train_step import make_train_step

UPDATE, REFERENCE = "update", "reference pass"
TPU_LIBRARY = "TPU_LIBRARY_PATH"
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# jax itself runs on the CPU and asks no TPU metadata service. Several processes may compile at once.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
ENVIRONMENT |= {"TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
ENVIRONMENT |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}  # It would change the memory use.


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled program of a stage, as one device sees it."""

    name: str
    mesh: dict[str, int]
    attention: str
    shape: BatchShape
    memory: DeviceMemory
    collectives: list[Collective]
    flops: FlopCount  # for full rows
    bounds: TimeBounds  # estimated, not validated on hardware
    compile_seconds: float


def program_names(stage: StageConfig) -> tuple[str, ...]:
    """Returns the programs of a stage. Device memory must hold each of them, one at a time."""
    return (UPDATE,) if isinstance(stage, SftStage) else (REFERENCE, UPDATE)


def lower_program(config: RunConfig, stage: StageConfig, name: str, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """Lowers a program of a stage for the devices of a mesh. Returns it with what is known before it is compiled."""
    arch = resolve_architecture(config.model)
    check_row_divides_context(mesh, stage.batch.row_length, f"stages.{stage.name}.batch.row_length")
    compute = resolve_attention_kernel(config.compute, arch, mesh, [stage.batch.row_length])
    state, batch = estimates.abstract_state(arch, compute, stage, mesh), _abstract_batch(stage, mesh)
    objective: Objective = sft_objective
    if not isinstance(stage, SftStage):  # It computes constants, which it cannot do on a mesh of stand-ins.
        objective = make_thinkpo_objective(stage, end_of_turn_id=0, thought_end_token_ids=((0,),))
    parameters, optimizer_state, _ = estimates.state_memory(state)
    known: dict[str, Any] = {"mesh": dict(mesh.shape), "attention": compute.attention, "shape": batch.token_ids.shape}
    known["state_bytes"] = [parameters, optimizer_state if name == UPDATE else 0]
    with jax.set_mesh(mesh):
        if name == REFERENCE:
            reference_step: Any = make_reference_step(mesh)
            return reference_step.lower(state.model, batch), known
        optimizer = make_optimizer(stage.optimizer, stage.steps or estimates.ASSUMED_UPDATES)
        train_step: Any = make_train_step(objective, optimizer, mesh, state)
        return train_step.lower(state, batch), known


def _abstract_batch(stage: StageConfig, mesh: Mesh) -> Batch[jax.ShapeDtypeStruct]:
    """Returns a batch like those of `BatchPlan`, with one example per row and all of its tokens trained."""
    num_micro_batches, rows, length = estimates.batch_shape(stage.batch, num_data_shards(mesh))
    answers = 1 if isinstance(stage, SftStage) else 2
    sharding = NamedSharding(mesh, partition_spec(BATCH_AXES))

    def array(*sizes: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_micro_batches, rows, *sizes), dtype, sharding=sharding)

    tokens = [array(length) for _ in range(6)]
    return Batch(*tokens, example_ids=array(1), reference_log_probs=array(1, answers, NUM_REGIONS, dtype=np.float32))


def compile_stage_program(config: RunConfig, stage: StageConfig, name: str, topology: Topology) -> CompiledProgram:
    """Compiles a program of a stage in its own process. Raises `UserError` if it cannot be compiled."""
    stages = tuple(stage if each.name == stage.name else each for each in config.stages)
    request = {"config": config.model_copy(update={"stages": stages}).model_dump(mode="json")}
    dump = dump_program("thinkpo_jax.planning.compile", request | {"stage": stage.name, "program": name}, topology)
    known, collectives = dump.known, find_collectives(dump.program, topology.size)
    parameters, optimizer = known["state_bytes"]
    memory = DeviceMemory(parameters, optimizer, dump.total - parameters - optimizer)
    shape, arch = BatchShape(*known["shape"]), resolve_architecture(config.model)
    flops = estimates.max_update_flops(arch, config.compute, shape)
    if name == REFERENCE:  # A forward pass is a third of an update without recomputation.
        flops = FlopCount(flops.model / 3, flops.model / 3)
    options = {"mesh": known["mesh"], "collectives": collectives, "topology": topology}
    bounds = estimates.estimated_seconds(arch, config.compute, shape, **options, forward_only=name == REFERENCE)
    seconds, mesh = dump.compile_seconds, known["mesh"]
    return CompiledProgram(name, mesh, known["attention"], shape, memory, collectives, flops, bounds, seconds)


class DumpedProgram(NamedTuple):
    """What XLA dumped of a program, and what was known before it was compiled."""

    known: dict[str, Any]
    total: int  # bytes of each device, arguments included
    program: str  # HLO text
    compile_seconds: float


def dump_program(module: str, request: dict[str, Any], topology: Topology) -> DumpedProgram:
    """Compiles a program in its own process, which runs `module` with a folder that holds the request.

    That process calls `compile_into`. Raises `RunError` if that process reports that the program does not fit, and
    `UserError` if the program cannot be compiled.
    """
    start, environment = time.monotonic(), os.environ | ENVIRONMENT | _compiler_environment(topology)
    # The default action of SIGTERM would leave the compiler and the folder behind.
    with handling(signal.default_int_handler, signal.SIGTERM), tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        (folder / "request.json").write_text(json.dumps(request | {"topology": topology.name}), encoding="utf-8")
        command = [sys.executable, "-m", module, folder_name]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            try:
                while process.poll() is None and _finished_dump(folder) is None:
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
        if (problem := folder / "problem").exists():
            raise RunError(problem.read_text(encoding="utf-8"))
        dump = _finished_dump(folder)
        if dump is None:
            raise _compile_error(folder / "output", process.returncode, topology)
        known, program = read_json_object(folder / "known.json"), dump[1].read_text(encoding="utf-8")
    return DumpedProgram(known, dump[0], program, time.monotonic() - start)


def compile_into(folder: Path, lowered: Any, known: dict[str, Any]) -> None:
    """Writes `known` to known.json, then compiles the program, which XLA dumps to the folder."""
    (folder / "known.json").write_text(json.dumps(known), encoding="utf-8")
    lowered.compile(compiler_options={"xla_dump_to": str(folder / "xla"), "xla_dump_hlo_as_text": True})


def _finished_dump(folder: Path) -> tuple[int, Path] | None:
    """Returns total memory and the file of the optimized program. None until XLA has completely written both."""
    if not list(folder.glob("xla/*debug_options")):  # For GPUs this file is written last.
        return None
    for report in folder.glob("xla/*jit_*-memory-usage-report.txt"):
        program = report.with_name(report.name.replace("-memory-usage-report", ""))  # For TPUs this one is.
        total = total_memory(report.read_text(encoding="utf-8"))
        if total is not None and program.exists() and program.read_bytes().rstrip().endswith(b"}"):
            return total, program
    return None


def _compile_error(output_path: Path, status: int, topology: Topology) -> UserError:
    """Returns the error of a process that compiled nothing. The output of a failed compiler goes to a log file."""
    output = output_path.read_text(encoding="utf-8", errors="replace")
    if user_errors := printed_errors(output):
        return UserError(user_errors)
    with tempfile.NamedTemporaryFile(prefix="thinkpo_compile_", suffix=".log", delete=False) as log:
        log.write(output_path.read_bytes())
    return UserError(
        f"compiling for {topology.name} failed ({describe_exit_status(status)}), so its memory use is unknown:\n"
        f"{last_error(output)}\n"
        f"Fix the cause and run the same command again. The compiler's log: {log.name}"
    )


def _compiler_environment(topology: Topology) -> dict[str, str]:
    """Returns the variables that locate the compiler for these devices. Raises `UserError` if it is not installed."""
    prefix = Path(sys.prefix)
    if topology.device.gpu is None:
        spec = importlib.util.find_spec("libtpu")
        libraries = [Path(spec.origin).with_name("libtpu.so")] if spec and spec.origin else []
        libraries.append(prefix / "libtpu" / "libtpu" / "libtpu.so")
        if TPU_LIBRARY in os.environ:
            libraries = [Path(os.environ[TPU_LIBRARY])]
        if library := next((path for path in libraries if path.exists()), None):
            return {TPU_LIBRARY: str(library)}
        requirement = next(line.split(";")[0] for line in importlib.metadata.requires("jax") or () if "libtpu" in line)
        missing = f"libtpu, the compiler for TPUs, is not at {' or '.join(map(str, libraries))}"
        target, packages = prefix / "libtpu", f"'{requirement}'"
    else:
        target, python_path = prefix / "cuda", os.environ.get("PYTHONPATH", "")
        if any((target / name).is_dir() for name in CUDA_PLUGINS):
            return {"PYTHONPATH": os.pathsep.join(filter(None, (python_path, str(target))))}
        if any(importlib.util.find_spec(name) for name in CUDA_PLUGINS):
            return {}
        missing = (
            f"the CUDA plugin of jax {jax.__version__}, the compiler for GPUs, is neither installed nor in {target}"
        )
        packages = f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
    raise UserError(
        f"--topology {topology.name}: {missing}. Install it in its own folder, so that other commands do not look for "
        f"such a device: pip install --no-deps --target {target} {packages}"
    )


def main(arguments: Sequence[str]) -> None:
    """Compiles the program of a request in a folder. XLA dumps it there. See `compile_stage_program`."""
    folder = Path(arguments[0])
    request = read_json_object(folder / "request.json")
    config = parse_config(RunConfig, request["config"], source="config")
    stage = next(stage for stage in config.stages if stage.name == request["stage"])
    mesh = make_mesh(config.mesh, parse_topology(request["topology"]).devices())
    lowered, known = lower_program(config, stage, request["program"], mesh)
    compile_into(folder, lowered, known)


if __name__ == "__main__":
    run_and_exit(main)
