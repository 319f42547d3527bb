"""Measures updates and reference passes of this package on the first device, for any model shape and row length.

Nothing is written but the model's config.json and a profile. The weights are random, and no checkpoint is made.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from thinkpo_jax.bench.machine import device_memory
from thinkpo_jax.bench.time_by_part import profile_updates
from thinkpo_jax.bench.workload import (
    END_ID,
    MODEL_CONFIGS,
    NAMES,
    Pair,
    count_tokens,
    draw_pairs,
    paper_lengths,
    to_examples,
    write_model_config,
)
from thinkpo_jax.data.batches import BatchPlan, BatchWork
from thinkpo_jax.models.architecture import Architecture
from thinkpo_jax.models.compute_config import ComputeConfig, resolve_attention_kernel
from thinkpo_jax.models.weight_loading import init_model
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import RunError, parse_config
from thinkpo_jax.runtime.devices import peak_flops
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import make_thinkpo_objective, sft_objective
from thinkpo_jax.training.optimizer import make_optimizer
from thinkpo_jax.training.reference_log_probs import make_reference_step
from thinkpo_jax.training.stage_config import StageConfig, ThinkpoStage
from thinkpo_jax.training.throughput import count_update_flops
from thinkpo_jax.training.train_step import init_train_state, make_train_step

SEED = 0
MAX_UPDATES = 20  # that are timed
PROFILED_UPDATES = 2


@dataclass(frozen=True)
class UpdateCase:
    """An update to measure: what is trained, on rows of which length, in how many micro-batches of one row."""

    model: str  # a key of `MODEL_CONFIGS`
    objective: Literal["thinkpo", "sft", "reference"]
    row_length: int
    rows: int
    remat: str
    moment_dtype: str = "float32"
    attention: str = "auto"

    @property
    def title(self) -> str:
        """The name of the case in tables."""
        name = {"thinkpo": "ThinkPO", "sft": "SFT", "reference": "reference pass"}[self.objective]
        return f"{name}, {self.model}, rows of {self.row_length:,}"

    def run_config(self, folder: Path) -> RunConfig:
        """Returns the configuration that a user would write for a model in `folder`."""
        objective = "sft" if self.objective == "sft" else "thinkpo"
        stage: dict[str, Any] = {"name": objective, "objective": objective, "steps": 1000, "data": {"path": "none"}}
        stage["batch"] = {"rows": self.rows, "row_length": self.row_length, "rows_per_device": 1}
        stage["optimizer"] = {"learning_rate": 1e-6, "schedule": "constant", "moment_dtype": self.moment_dtype}
        config = {"run_dir": str(folder), "model": {"path": str(folder), "weights": "random"}, "stages": [stage]}
        config |= {"compute": {"attention": self.attention, "remat": self.remat}, "mesh": {"fsdp": 1}}
        return parse_config(RunConfig, config, source=self.title)

    def draw_pairs(self) -> list[Pair]:
        """Returns the pairs of all updates. Each fits into a row, and their lengths are like the paper's."""
        lengths, vocab_size = paper_lengths(self.row_length), MODEL_CONFIGS[self.model]["vocab_size"]
        pairs: list[Pair] = []
        while count_tokens(pairs) < (MAX_UPDATES + 1) * self.rows * self.row_length:
            options = {"max_length": self.row_length, "vocab_size": vocab_size, "seed": SEED + len(pairs)}
            pairs += draw_pairs(lengths, 64, **options, share_length=True)
        return pairs


def measure_updates(case: Mapping[str, Any], folder: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Measures the updates of an `UpdateCase`, given as its fields, for about `seconds` seconds after compilation.

    Yields speeds, MFU, memory in bytes and compile time, then the same with the shares of time by part. `folder` gets
    the profile. Raises `RunError` if an update is not finite.
    """
    parsed = UpdateCase(**case)
    config = parsed.run_config(Path(folder))
    arch, mesh = write_model_config(parsed.model, Path(folder)), make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    compute = resolve_attention_kernel(config.compute, arch, mesh, [parsed.row_length])
    examples = to_examples(parsed.draw_pairs(), answers=NAMES[1:2] if parsed.objective == "sft" else NAMES[1:])
    options = {"seed": SEED, "num_shards": 1, "num_updates": MAX_UPDATES + 1, "epochs": 1.0}
    batches = BatchPlan(examples, config.stages[0].batch, **options)
    with jax.set_mesh(mesh):
        update = _Update(parsed.objective, config.stages[0], arch, compute, mesh)
        first = put_batch(batches[0], mesh)
        compile_seconds = update.compile(first)
        _timed(update, [first])  # not counted: allocates
        once = _timed(update, [first])
        count = min(MAX_UPDATES, max(PROFILED_UPDATES, round(seconds / once)))
        host_batches = [batches[index] for index in range(1, 1 + count)]
        timed = [put_batch(batch, mesh) for batch in host_batches]
        elapsed = _timed(update, timed)
        work = [batches.count_work(batch) for batch in host_batches]
        update.check_finite()
        result = {**dataclasses.asdict(parsed), "title": parsed.title, "attention": compute.attention}
        result |= {"num_updates": count, "seconds_per_update": elapsed / count, "compile_seconds": compile_seconds}
        result |= speed(parsed.objective, arch, compute, work, elapsed)
        result["packing_efficiency"] = sum(each.tokens for each in work) / (count * batches.tokens_per_update())
        result |= device_memory() | {"compiled_bytes": update.compiled_bytes()}
        yield result | {"profile": {"problem": "the process ended in the profiler"}}
        profile = profile_updates(lambda: _timed(update, timed[:PROFILED_UPDATES]), update.program_text(), Path(folder))
        yield result | {"profile": profile}


def _timed(update: "_Update", batches: Sequence[Any]) -> float:
    start = time.perf_counter()
    for batch in batches:
        update(batch)
    update.wait()
    return time.perf_counter() - start


class _Update:
    """A compiled update or reference pass, with the state that it reads and replaces."""

    def __init__(
        self, objective: str, stage: StageConfig, arch: Architecture, compute: ComputeConfig, mesh: Mesh
    ) -> None:
        model = init_model(arch, compute, mesh, seed=SEED)
        self._is_reference = objective == "reference"
        if self._is_reference:
            self._state, self._function = model, make_reference_step(mesh)
        else:
            optimizer = make_optimizer(stage.optimizer, stage.steps or 1)
            self._state = init_train_state(model, optimizer, mesh)
            loss = make_thinkpo_objective(stage, end_of_turn_id=END_ID) if isinstance(stage, ThinkpoStage) else None
            self._function = make_train_step(loss or sft_objective, optimizer, mesh, self._state)
        self._compiled: Any = None
        self._output: Any = None

    def compile(self, batch: Any) -> float:
        """Compiles the program for a batch and returns the seconds that it took."""
        start = time.perf_counter()
        function: Any = self._function
        self._compiled = function.lower(self._state, batch).compile()
        return time.perf_counter() - start

    def __call__(self, batch: Any) -> None:
        if self._is_reference:
            self._output = self._compiled(self._state, batch)
        else:
            self._state, self._output = self._compiled(self._state, batch)

    def wait(self) -> None:
        """Waits until the device has finished."""
        jax.block_until_ready((self._state, self._output))

    def check_finite(self) -> None:
        """Raises `RunError` if the last update is not finite."""
        if not (bool(jnp.isfinite(self._output).all()) if self._is_reference else bool(self._output["finite"])):
            raise RunError("the last update is not finite")

    def program_text(self) -> str:
        """Returns the optimized program as HLO text."""
        return self._compiled.as_text()

    def compiled_bytes(self) -> int | None:
        """Returns the memory that the compiler reports for the program, or None if it reports none."""
        analysis = self._compiled.memory_analysis()
        if analysis is None:
            return None
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        return sum(getattr(analysis, size) for size in sizes) - analysis.alias_size_in_bytes


def speed(
    objective: str, arch: Architecture, compute: ComputeConfig, work: Sequence[BatchWork], seconds: float
) -> dict[str, float | None]:
    """Returns the speed of updates on one device. MFU counts causal attention and no padding, see `throughput`."""
    total = BatchWork(*(sum(amounts) for amounts in zip(*work, strict=True)))
    flops = count_update_flops(arch, compute, total)
    model, hardware = (flops.model / 3, flops.model / 3) if objective == "reference" else flops
    peak = peak_flops(jax.devices()[0].device_kind) if compute.dtype == "bfloat16" else None
    return {
        "tokens": total.tokens,
        "tokens_per_second": total.tokens / seconds,
        "flops_per_second": model / seconds,
        "hardware_flops_per_second": hardware / seconds,
        "mfu": peak and model / seconds / peak,
        "hfu": peak and hardware / seconds / peak,
    }
