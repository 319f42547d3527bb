"""What does a stage's program take of devices that are not there?

The programs are those of training, at full shape, without weights and without data: this file, run as a program, lowers
one of them and has XLA compile it. XLA writes what it makes of it before it generates machine code, which takes minutes
and changes nothing that is asked here; so the process is ended once that is written.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from thinkpo_jax.data.batches import NUM_REGIONS, Batch
from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.compute_config import resolve_attention_kernel
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.planning.estimates import (
    ASSUMED_UPDATES,
    BatchShape,
    DeviceMemory,
    abstract_state,
    batch_shape,
    bytes_per_device,
)
from thinkpo_jax.planning.hlo import Collective, find_collectives, total_memory
from thinkpo_jax.planning.topology import Topology, parse_topology
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.cli import handling, run_and_exit
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.runtime.context_parallel import check_row_divides_context
from thinkpo_jax.runtime.files import read_json_object
from thinkpo_jax.runtime.mesh import make_mesh, num_data_shards
from thinkpo_jax.runtime.sharding import BATCH_AXES, partition_spec
from thinkpo_jax.training.objectives import Objective, make_thinkpo_objective, sft_objective
from thinkpo_jax.training.optimizer import make_optimizer
from thinkpo_jax.training.reference_log_probs import make_reference_step
from thinkpo_jax.training.stage_config import SftStage, StageConfig
from thinkpo_jax.training.train_step import make_train_step

UPDATE, REFERENCE = "update", "reference pass"
TPU_LIBRARY = "TPU_LIBRARY_PATH"
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# jax itself computes on the CPU; no service that knows about TPUs is asked, and several processes may compile at once.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
ENVIRONMENT |= {"TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
ENVIRONMENT |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}  # which would change the memory that is read


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled program of a stage, as one device sees it."""

    name: str
    mesh: dict[str, int]
    attention: str
    shape: BatchShape
    memory: DeviceMemory
    exchanges: list[Collective]
    seconds: float  # that compiling took


def program_names(stage: StageConfig) -> tuple[str, ...]:
    """The programs of a stage that memory must hold, each at its time."""
    return (UPDATE,) if isinstance(stage, SftStage) else (REFERENCE, UPDATE)


def lower_program(config: RunConfig, stage: StageConfig, name: str, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """A program of a stage lowered for the devices of a mesh, and what is known of it before it is compiled."""
    arch = read_architecture(resolve_model_folder(config.model.path, weights=False))
    check_row_divides_context(mesh, stage.batch.row_length, f"stages.{stage.name}.batch.row_length")
    compute = resolve_attention_kernel(config.compute, arch, mesh, [stage.batch.row_length])
    state, batch = abstract_state(arch, compute, stage, mesh), _abstract_batch(stage, mesh)
    objective: Objective = (
        sft_objective
        if isinstance(stage, SftStage)
        else make_thinkpo_objective(stage, end_of_turn_id=0, thought_end_token_ids=((0,),))
    )
    known: dict[str, Any] = {
        "mesh": dict(mesh.shape),
        "attention": compute.attention,
        "shape": [*batch.token_ids.shape],
    }
    known["parameters"] = bytes_per_device(state.model)
    known["optimizer"] = bytes_per_device(state) - known["parameters"] if name == UPDATE else 0
    with jax.set_mesh(mesh):
        if name == REFERENCE:
            scoring: Any = make_reference_step(mesh)
            return scoring.lower(state.model, batch), known
        optimizer = make_optimizer(stage.optimizer, stage.steps or ASSUMED_UPDATES)
        step: Any = make_train_step(objective, optimizer, mesh, state)
        return step.lower(state, batch), known


def _abstract_batch(stage: StageConfig, mesh: Mesh) -> Batch[jax.ShapeDtypeStruct]:
    """A batch as `packing.Batches` gives it, one example to a row and all of its tokens trained."""
    micro_batches, rows, length = batch_shape(stage.batch, num_data_shards(mesh))
    answers = 1 if isinstance(stage, SftStage) else 2

    def one(*sizes: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        layout = NamedSharding(mesh, partition_spec(BATCH_AXES))
        return jax.ShapeDtypeStruct((micro_batches, rows, *sizes), dtype, sharding=layout)

    places = [one(length) for _ in range(6)]
    return Batch(*places, example_ids=one(1), reference_log_probs=one(1, answers, NUM_REGIONS, dtype=np.float32))


def compile_stage_program(config: RunConfig, stage: StageConfig, name: str, devices: Topology) -> CompiledProgram:
    """Compiles a program of a stage, in a process of its own. Raises `UserError` where it cannot be compiled."""
    began, environment = time.monotonic(), os.environ | ENVIRONMENT | _compiler_environment(devices)
    # On SIGTERM Python would exit without ending the compiler and removing the folder.
    with handling(signal.default_int_handler, signal.SIGTERM), tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        given = [str(folder), "--stage", stage.name, "--program", name, "--topology", devices.name]
        command = [sys.executable, "-m", "thinkpo_jax.planning.compile", *given]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            try:
                while process.poll() is None and not _finished_dump(folder):
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
        if not _finished_dump(folder):
            raise _failure(folder / "output", process.returncode, devices)
        known = read_json_object(folder / "known.json")
        report, text = _finished_dump(folder)
        found = find_collectives(text.read_text(encoding="utf-8"), devices.size)
        total = total_memory(report.read_text(encoding="utf-8"))
        assert total is not None
    state = known["parameters"] + known["optimizer"]
    memory = DeviceMemory(known["parameters"], known["optimizer"], total - state)
    return CompiledProgram(
        name, known["mesh"], known["attention"], BatchShape(*known["shape"]), memory, found, time.monotonic() - began
    )


def _finished_dump(folder: Path) -> tuple[Path, ...]:
    """The report on memory and the optimised program; nothing before the compiler has written both to their ends."""
    if not list(folder.glob("xla/*debug_options")):  # for GPUs it is written last
        return ()
    for report in folder.glob("xla/*jit_*-memory-usage-report.txt"):
        text = report.with_name(report.name.replace("-memory-usage-report", ""))  # for TPUs it is written later
        if text.exists() and _ends_with(text, b"}") and total_memory(report.read_text(encoding="utf-8")) is not None:
            return report, text
    return ()


def _ends_with(path: Path, end: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16))
        return file.read().rstrip().endswith(end)


def _failure(path: Path, status: int, devices: Topology) -> UserError:
    """The error of a process that compiled nothing. A failed compiler's whole output is kept in a log file."""
    output = path.read_text(encoding="utf-8", errors="replace")
    if told := re.findall(r"(?m)^error: (.*)$", output):
        return UserError("\n".join(told))
    with tempfile.NamedTemporaryFile(prefix="thinkpo_compile_", suffix=".log", delete=False) as log:
        log.write(path.read_bytes())
    *before, last = re.split(r"(?m)^(?=[\w.]+Error\b)", output)
    cause = last.strip()[:2000] if before else output[-2000:].strip()  # the last exception, or what a crash wrote
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    return UserError(
        f"compiling for {devices.name} failed ({ended}), so its memory use is not known:\n{cause}\n"
        f"Fix the cause and run the same command again. The compiler's log: {log.name}"
    )


def _compiler_environment(devices: Topology) -> dict[str, str]:
    """Where the compiler for these devices lies, as variables. Raises `UserError` that says how to install it."""
    folder = Path(sys.prefix)
    if devices.device.gpu is None:
        places = [folder / "libtpu" / "libtpu" / "libtpu.so"]
        if (installed := importlib.util.find_spec("libtpu")) and installed.origin:
            places.insert(0, Path(installed.origin).with_name("libtpu.so"))
        if TPU_LIBRARY in os.environ:
            places = [Path(os.environ[TPU_LIBRARY])]
        if found := next((place for place in places if place.exists()), None):
            return {TPU_LIBRARY: str(found)}
        libtpu = next(each.split(";")[0] for each in importlib.metadata.requires("jax") or () if "libtpu" in each)
        raise UserError(
            f"--topology {devices.name}: the compiler for TPUs, libtpu, is in none of: {', '.join(map(str, places))}. "
            f"Install it apart, so that other commands do not look for a TPU: pip install --no-deps --target "
            f"{folder / 'libtpu'} '{libtpu}'"
        )
    apart, before = folder / "cuda", os.environ.get("PYTHONPATH", "")
    if any((apart / name).is_dir() for name in CUDA_PLUGINS):
        return {"PYTHONPATH": os.pathsep.join(filter(None, (before, str(apart))))}
    if any(importlib.util.find_spec(name) for name in CUDA_PLUGINS):
        return {}
    raise UserError(
        f"--topology {devices.name}: the compiler for NVIDIA GPUs, the CUDA plugin of jax {jax.__version__}, is "
        f"neither installed nor in {apart}. Install it apart: pip install --no-deps --target {apart} "
        f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
    )


def main(arguments: Sequence[str]) -> None:
    """Compiles one program and has the compiler write what it makes of it below a folder; see `compiled`."""
    parser = argparse.ArgumentParser(prog="python -m thinkpo_jax.planning.compile", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    for name in ("stage", "program", "topology"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args(arguments)
    config = parse_config(RunConfig, read_json_object(given.folder / "config.json"), source="config")
    stage = next(stage for stage in config.stages if stage.name == given.stage)
    mesh = make_mesh(config.mesh, parse_topology(given.topology).devices())
    lowered, known = lower_program(config, stage, given.program, mesh)
    (given.folder / "known.json").write_text(json.dumps(known), encoding="utf-8")
    lowered.compile(compiler_options={"xla_dump_to": str(given.folder / "xla"), "xla_dump_hlo_as_text": True})


if __name__ == "__main__":
    run_and_exit(main)
