"""Plans the memory of updates with the compiler for the device, on the CPU, while other measurements run."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkpo_jax.bench.updates import UpdateCase
from thinkpo_jax.bench.workload import write_model_config
from thinkpo_jax.planning.compile import REFERENCE, UPDATE, compile_stage_program
from thinkpo_jax.planning.topology import Topology, list_slices
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.devices import GIB, find_device_spec

REMAT_BY_SPEED = ("none", "projections", "attention", "full")
PLANNED_MEMORY_SHARE = 0.92  # of what a program may use. The rest is for what the planner does not see.


def plan_updates(
    cases: Sequence[Mapping[str, Any]], device_kind: str, limit_bytes: int | None, folder: str
) -> Iterator[dict[str, Any]]:
    """Yields the plans of all cases so far, by title: `remat` and `bytes`, or the `problem`.

    The plan is the fastest remat policy whose memory is below `PLANNED_MEMORY_SHARE` of `limit_bytes`. `cases` are the
    fields of each `UpdateCase`. Nothing is planned for a kind of device that the planner does not know.
    """
    spec = find_device_spec(device_kind)
    topology = next((each for each in list_slices(spec.name) if each.size == 1), None) if spec else None
    plans: dict[str, Any] = {}
    for fields in cases if topology else ():
        case = UpdateCase(**fields)
        assert topology is not None
        limit = min(topology.memory, limit_bytes or topology.memory)
        plans[case.title] = _plan(case, topology, limit, Path(folder))
        yield plans
    yield plans


def _plan(case: UpdateCase, topology: Topology, limit: int, folder: Path) -> dict[str, Any]:
    write_model_config(case.model, folder)
    program = REFERENCE if case.objective == "reference" else UPDATE
    needed = 0
    for remat in REMAT_BY_SPEED:
        config = dataclasses.replace(case, remat=remat).run_config(folder)
        try:
            memory = compile_stage_program(config, config.stages[0], program, topology).memory
        except UserError as error:
            return {"unknown": str(error)}
        if memory.total <= PLANNED_MEMORY_SHARE * limit:
            return {"remat": remat, "bytes": memory.total}
        needed = memory.total
        if memory.parameters + memory.optimizer > limit:
            break  # no policy changes these
    return {"problem": f"needs {needed / GIB:.0f} GiB, and a program gets {limit / GIB:.0f} GiB"}
