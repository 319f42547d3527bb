"""What do the commands share? The composed configuration, the run folder, and how commands start and end."""

import contextlib
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import numpy as np
import pydantic
import yaml
from jax.sharding import Mesh

from thinkpo_jax import __version__
from thinkpo_jax.architecture import Architecture, read_architecture
from thinkpo_jax.benchmarks import BenchmarkConfig
from thinkpo_jax.chat import Chat
from thinkpo_jax.checkpoint import CheckpointConfig
from thinkpo_jax.commands import writing
from thinkpo_jax.config import (
    PathText,
    Section,
    UserError,
    nearest,
    override,
    parse,
    read_json,
    read_yaml,
    together,
)
from thinkpo_jax.convert import abstract_model, check_weights, load_model, random_model
from thinkpo_jax.folder import ModelConfig, content_digest, find_model, fingerprint, stop_ids
from thinkpo_jax.forms import PairData, SftData
from thinkpo_jax.hosts import from_the_first, wait
from thinkpo_jax.log import read_metrics, warn, write_whole
from thinkpo_jax.model import ComputeConfig, Transformer, with_kernel
from thinkpo_jax.objectives import PreferenceConfig
from thinkpo_jax.optimizer import OptimizerConfig
from thinkpo_jax.packing import BatchConfig, ValidationConfig
from thinkpo_jax.sample import SamplingConfig
from thinkpo_jax.sharding import MeshConfig, check_row_length, make_mesh, shardings

STAGE_RECORD = "stage.json"
BASE = "base"  # the name of the start model among the models of a run
RESERVED = (BASE, "evaluation", "plots", "config.yaml", "report.md", "report.json")


DataT = TypeVar("DataT")


def _listed(value: Any) -> Any:
    if not isinstance(value, Mapping | tuple | Section):
        raise ValueError("expected keys (one source), or a list of sources")
    return value if isinstance(value, tuple) else (value,)


# One source, or a list of them.
Sources = Annotated[tuple[DataT, ...], pydantic.BeforeValidator(_listed), pydantic.Field(min_length=1)]


class _Stage(Section):
    """What every stage has. It starts from `start` (a stage, or `base`), by default from the stage before it.

    `on_nonfinite`: whether an update whose loss or gradient is not finite stops the run, or is left out, `max_skipped`
    of them at most.
    """

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    start: str | None = None
    steps: int | None = pydantic.Field(default=None, ge=1)
    epochs: float | None = pydantic.Field(default=None, gt=0, le=1000)
    batch: BatchConfig
    optimizer: OptimizerConfig
    validation: ValidationConfig | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = pydantic.Field(default=10, ge=1)
    checkpoint: CheckpointConfig = CheckpointConfig()

    @pydantic.model_validator(mode="after")
    def _skips_are_allowed(self) -> "_Stage":
        if self.on_nonfinite == "stop" and self.max_skipped != 10:
            raise ValueError("`max_skipped` has no effect without `on_nonfinite: skip`")
        return self

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> "_Stage":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`, one of the two")
        return self


class SftStage(_Stage):
    """Supervised fine-tuning on answers."""

    objective: Literal["sft"]
    data: Sources[SftData]


class ThinkpoStage(_Stage, PreferenceConfig):
    """ThinkPO on (long, short) pairs against the model that the stage starts from."""

    objective: Literal["thinkpo"]
    data: Sources[PairData]


Stage = SftStage | ThinkpoStage


class EvaluationConfig(Section):
    """What every model of the run (the start model and each stage) is asked, and which of them are compared."""

    benchmarks: tuple[BenchmarkConfig, ...] = pydantic.Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    compare: tuple[tuple[str, str], ...] = ()


class RunConfig(Section):
    """One run: a start model, a mesh, an ordered list of stages, and the evaluation at its end."""

    run_dir: PathText
    title: str = "ThinkPO run"
    seed: int = pydantic.Field(default=0, ge=0, lt=2**31)
    model: ModelConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    stages: tuple[Annotated[Stage, pydantic.Field(discriminator="objective")], ...] = ()
    evaluation: EvaluationConfig | None = None

    @pydantic.model_validator(mode="after")
    def _names(self) -> "RunConfig":
        known = [BASE]
        for stage in self.stages:
            if stage.name in known or stage.name in RESERVED:
                raise ValueError(f"stage name {stage.name!r} is taken; names differ, and are none of {RESERVED}")
            if stage.start is not None and stage.start not in known:
                raise ValueError(f"stage {stage.name}: start {stage.start!r} is none of the models before it: {known}")
            known.append(stage.name)
        benchmarks = [benchmark.name for benchmark in (self.evaluation.benchmarks if self.evaluation else ())]
        if len(set(benchmarks)) < len(benchmarks):
            raise ValueError(f"evaluation.benchmarks: a benchmark is named twice: {benchmarks}")
        for name in {name for pair in (self.evaluation.compare if self.evaluation else ()) for name in pair}:
            if name not in known:
                raise ValueError(f"evaluation.compare: no model {name!r}{nearest(name, known)}; there are: {known}")
        return self


@dataclass(frozen=True)
class Run:
    """A run whose configuration and start model have been checked; nothing is written yet."""

    config: RunConfig
    folder: Path
    start_folder: Path
    chat: Chat
    mesh: Mesh
    compute: ComputeConfig  # that of the configuration, with the kernel of attention that the devices take

    def start_of(self, stage: Stage) -> str:
        """The name of the model that a stage starts from."""
        names = self.models()
        return stage.start or names[names.index(stage.name) - 1]

    def models(self) -> list[str]:
        """The names of the models of the run, in order: `base`, then the stages."""
        return [BASE, *(stage.name for stage in self.config.stages)]

    def model_folder(self, name: str) -> Path:
        """The Hugging Face folder of a model of the run; a stage's exists once the stage is finished."""
        return self.start_folder if name == BASE else self.folder / name / "model"

    def load(self, name: str) -> Transformer:
        """A model of the run, on its mesh."""
        compute = self.compute
        if name == BASE and self.config.model.weights == "random":
            return random_model(self.start_folder, compute, self.mesh, seed=self.config.seed)
        return load_model(self.model_folder(name), compute, self.mesh)

    def settings(self, name: str) -> dict[str, Any]:
        """Everything but the data that determines the weights of a stage: a change means another model."""
        stage = next(stage for stage in self.config.stages if stage.name == name)
        # How rows are laid out over devices and time does not change the result (tests/test_step.py).
        # Nor does what happens at updates that are not applied: it can be changed after one stopped the run.
        apart = {"checkpoint", "start", "on_nonfinite", "max_skipped"}
        apart = dict.fromkeys(apart, True) | {"batch": {"rows_per_device"}, "validation": {"every"}}
        own = stage.model_dump(mode="json", exclude=apart)
        start = {"model": self.start_of(stage), "fingerprint": self.fingerprint(self.start_of(stage))}
        return {"stage": own, "seed": self.config.seed, "dtype": self.config.compute.dtype, "start": start}

    def fingerprint(self, name: str) -> str | None:
        """A digest of a model of the run; None for a stage that is not finished."""
        return fingerprint(self.model_folder(name))

    def weights(self, name: str) -> str:
        """What stands for every weight of a model of the run."""
        if name == BASE and self.config.model.weights == "random":
            return f"random, seed {self.config.seed}, {content_digest(self.start_folder)}"
        return content_digest(self.model_folder(name))

    def finished(self, name: str) -> bool:
        """Whether a stage is done, as the first process sees it.

        Raises `UserError` where the folder holds a stage with other settings.
        """
        return bool(from_the_first(np.array(self._finished(name))))

    def _finished(self, name: str) -> bool:
        record = read_record(self.folder / name / STAGE_RECORD, "settings", "summary")
        if record is None:
            return False
        start = self.start_of(next(stage for stage in self.config.stages if stage.name == name))
        if self.fingerprint(start) is None:
            raise UserError(
                f"{self.model_folder(start)}: there is no model, and stage {name!r} was trained from it. Put it back, "
                f"or remove {self.folder / name} to train both again."
            )
        changed = _differences(record["settings"], json.loads(json.dumps(self.settings(name))))
        if changed:
            raise UserError(
                f"{self.folder / name} holds stage {name!r}, trained with other settings: {'; '.join(changed)}. "
                "Choose another run_dir (--set run_dir=...), or remove that folder to train the stage again."
            )
        return record["summary"] is not None and self.model_folder(name).is_dir()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Makes the run folder and writes config.yaml; within it no other run can do the same.

        Several processes begin together: none writes before all have read what is there.
        """
        with writing(self.folder, "run_dir"):
            self._check_others()
            self._write_config()
            wait("the configuration is written")
            if not (self.folder / "config.yaml").exists():
                raise UserError(f"run_dir: {self.folder} is not the first process's: name a folder that all share.")
            yield

    def _check_others(self) -> None:
        """Raises `UserError` where this process runs something else than the first one; all wait for each other."""
        text = self.config.model_dump_json() + json.dumps({**versions(), "devices": ""})
        digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
        if not np.array_equal(digest, from_the_first(digest)):
            raise UserError(
                "this process has another configuration, or other versions, than the first one. Start all of them with "
                "the same --config and --set, from the same installation."
            )

    def _write_config(self) -> None:
        """Writes the resolved configuration, with versions as comments."""
        head = "".join(f"# {name}: {version}\n" for name, version in versions().items())
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_whole(self.folder / "config.yaml", (head + text).encode())


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in {**old, **new} for line in _differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [f"{path.lstrip('.')} was {old!r}, is {new!r}"]


def read_record(path: Path, *keys: str) -> dict[str, Any] | None:
    """A JSON object with these keys that the run wrote; None where there is none yet. Raises `UserError`."""
    if not path.exists():
        return None
    remedy = f"Remove {path.parent} to train the stage again." if path.name == STAGE_RECORD else "Remove the file."
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error} {remedy}") from None
    if lacking := [key for key in keys if key not in record]:
        raise UserError(f"{path}: damaged: {', '.join(lacking)} is not there. {remedy}")
    return record


def versions() -> dict[str, str]:
    """The versions of what computed a run: this package and its commit, Python, jax and its companions, the devices."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    kinds = sorted({device.device_kind for device in jax.devices()})
    devices = f"{len(jax.devices())} x {', '.join(kinds)}"
    return {
        "thinkpo_jax": f"{__version__}, commit {_commit()}",
        "python": sys.version.split()[0],
        **found,
        "devices": devices,
    }


def _commit() -> str:
    here = Path(__file__).parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return told.stdout.strip() if told.returncode == 0 else "unknown"


def model_card(run: Run, name: str, *, step: int, notes: Sequence[str]) -> str:
    """The README.md of a model of the run: from what, with what data and settings it was trained, and how it did.

    `notes` say what the data came to; the metrics are those of update `step`, the scores those of the run's report.
    """
    stage = next(stage for stage in run.config.stages if stage.name == name)
    head = {
        "library_name": "transformers",
        "base_model": run.config.model.path,
        "tags": ["thinkpo_jax", stage.objective],
    }
    lines = [line for line in read_metrics(run.folder / name / "metrics.jsonl") if line["step"] == step]
    record = read_record(run.folder / name / STAGE_RECORD, "data", "summary") or {"data": None, "summary": None}
    report = (
        read_record(run.folder / "report.json", "models") if (record["summary"] or {}).get("steps") == step else None
    )
    scores = {
        benchmark: score
        for benchmark, score in (report["models"].get(name, {}) if report else {}).items()
        if _is_of(run, name, benchmark)
    }
    sections = {
        "Data": [*notes, f"digest of the tokenised data: {record['data']}"],
        f"Metrics of update {step}": [f"{key}: {value:.6g}" for line in lines for key, value in line.items()],
        "Evaluation of the float32 model": [
            f"{benchmark}: accuracy {100 * score['accuracy']:.1f} % (95 % interval {100 * score['ci95'][0]:.1f} to "
            f"{100 * score['ci95'][1]:.1f}, {score['num_questions']} questions), mean response "
            f"{score['mean_response_tokens']:.1f} tokens, {100 * score['truncation_rate']:.1f} % cut off"
            for benchmark, score in scores.items()
        ],
        "Made with": [f"{what}: {version}" for what, version in versions().items()],
    }
    settings = yaml.safe_dump(run.settings(name), sort_keys=False, allow_unicode=True)
    listed = "".join(
        f"\n## {title}\n\n" + "".join(f"- {line}\n" for line in lines) for title, lines in sections.items() if lines
    )
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {run.config.title}: {name}\n\n"
        f"Trained with thinkpo_jax from `{run.config.model.path}`, stage `{name}` ({stage.objective}), which started "
        f"from `{run.start_of(stage)}`.\n\n## Settings\n\n```yaml\n{settings}```\n{listed}"
    )


def _is_of(run: Run, name: str, benchmark: str) -> bool:
    """Whether the answers to a benchmark are those of the model as it is now."""
    record = read_record(run.folder / "evaluation" / name / f"{benchmark}.json", "settings")
    return record is not None and record["settings"]["model"] == run.fingerprint(name)


def load_config(path: Path, assignments: Sequence[str] = ()) -> RunConfig:
    """The configuration of a YAML file with `--set` assignments applied. Raises `UserError`."""
    return parse(RunConfig, override(read_yaml(path), assignments), source=str(path))


def open_run(config: RunConfig) -> Run:
    """Checks what can be checked without training: the mesh, the start model, its tokenizer. Raises `UserError`."""
    mesh = make_mesh(config.mesh)
    folder = find_model(config.model.path)
    arch, chat = check_folder(folder, weights=config.model.weights == "pretrained")
    shardings(abstract_model(arch, config.compute), mesh)
    for stage in config.stages:
        check_row_length(mesh, stage.batch.row_length, f"stages.{stage.name}.batch.row_length")
    warn_of_lengths(config, arch)
    compute = with_kernel(config.compute, arch, mesh, [stage.batch.row_length for stage in config.stages])
    return Run(config, Path(config.run_dir).expanduser(), folder, chat, mesh, compute)


def warn_of_lengths(config: RunConfig, arch: Architecture) -> None:
    """Says which rows are longer than what the model was made for."""
    for stage in config.stages:
        if stage.batch.row_length > arch.max_positions:
            name = f"stages.{stage.name}.batch.row_length"
            warn(f"{name} is {stage.batch.row_length}, the model was made for up to {arch.max_positions} tokens.")


def check_folder(folder: Path, *, weights: bool) -> tuple[Architecture, Chat]:
    """What a model's folder says of network and text. Raises one `UserError` with all that is wrong with it."""
    with together() as attempt:
        arch = attempt(read_architecture, folder)
        if weights:
            attempt(check_weights, folder, arch)
        chat = attempt(lambda: Chat.load(folder, stop_ids=stop_ids(folder)))
        if arch is not None and chat is not None and len(chat.tokenizer) > arch.vocab_size:
            attempt.fail(
                f"{folder}: the tokenizer has {len(chat.tokenizer)} tokens, the embedding only {arch.vocab_size} rows; "
                "take the tokenizer that belongs to the weights."
            )
    assert arch is not None and chat is not None  # noqa: PT018 -- `together` raised otherwise
    return arch, chat
