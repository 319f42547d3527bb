"""What do the commands share? The composed configuration, the run folder, and how commands start and end."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jax.sharding import Mesh

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import quick_fingerprint, weights_digest
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_loading import init_random_model, load_model
from thinkpo_jax.run.run_config import BASE_MODEL_NAME, RunConfig
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.files import lock_folder, read_json_object, software_versions, write_atomically
from thinkpo_jax.runtime.processes import barrier, broadcast_from_primary
from thinkpo_jax.training.stage_config import StageConfig

STAGE_RECORD_FILE = "stage.json"


@dataclass(frozen=True)
class Run:
    """A run whose configuration and start model have been checked; nothing is written yet."""

    config: RunConfig
    folder: Path
    start_folder: Path
    chat: ChatTokenizer
    mesh: Mesh
    compute: ComputeConfig  # that of the configuration, with the kernel of attention that the devices take

    def initial_model_of(self, stage: StageConfig) -> str:
        """The name of the model that a stage starts from."""
        names = self.model_names()
        return stage.start or names[names.index(stage.name) - 1]

    def model_names(self) -> list[str]:
        """The names of the models of the run, in order: `base`, then the stages."""
        return [BASE_MODEL_NAME, *(stage.name for stage in self.config.stages)]

    def model_folder(self, name: str) -> Path:
        """The Hugging Face folder of a model of the run; a stage's exists once the stage is finished."""
        return self.start_folder if name == BASE_MODEL_NAME else self.folder / name / "model"

    def load(self, name: str) -> Transformer:
        """A model of the run, on its mesh."""
        compute = self.compute
        if name == BASE_MODEL_NAME and self.config.model.weights == "random":
            return init_random_model(self.start_folder, compute, self.mesh, seed=self.config.seed)
        return load_model(self.model_folder(name), compute, self.mesh)

    def settings(self, name: str) -> dict[str, Any]:
        """Everything but the data that determines the weights of a stage: a change means another model."""
        stage = next(stage for stage in self.config.stages if stage.name == name)
        # How rows are laid out over devices and time does not change the result (tests/test_step.py).
        # Nor does what happens at updates that are not applied: it can be changed after one stopped the run.
        apart = {"checkpoint", "start", "on_nonfinite", "max_skipped"}
        apart = dict.fromkeys(apart, True) | {"batch": {"rows_per_device"}, "validation": {"every"}}
        own = stage.model_dump(mode="json", exclude=apart)
        start = {"model": self.initial_model_of(stage), "fingerprint": self.fingerprint(self.initial_model_of(stage))}
        return {"stage": own, "seed": self.config.seed, "dtype": self.config.compute.dtype, "start": start}

    def fingerprint(self, name: str) -> str | None:
        """A digest of a model of the run; None for a stage that is not finished."""
        return quick_fingerprint(self.model_folder(name))

    def weights_digest(self, name: str) -> str:
        """What stands for every weight of a model of the run."""
        if name == BASE_MODEL_NAME and self.config.model.weights == "random":
            return f"random, seed {self.config.seed}, {weights_digest(self.start_folder)}"
        return weights_digest(self.model_folder(name))

    def finished(self, name: str) -> bool:
        """Whether a stage is done, as the first process sees it.

        Raises `UserError` where the folder holds a stage with other settings.
        """
        return bool(broadcast_from_primary(np.array(self._finished(name))))

    def _finished(self, name: str) -> bool:
        record = read_json_record(self.folder / name / STAGE_RECORD_FILE, "settings", "summary")
        if record is None:
            return False
        start = self.initial_model_of(next(stage for stage in self.config.stages if stage.name == name))
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
        with lock_folder(self.folder, "run_dir"):
            self._check_others()
            self._write_config()
            barrier("the configuration is written")
            if not (self.folder / "config.yaml").exists():
                raise UserError(f"run_dir: {self.folder} is not the first process's: name a folder that all share.")
            yield

    def _check_others(self) -> None:
        """Raises `UserError` where this process runs something else than the first one; all wait for each other."""
        text = self.config.model_dump_json() + json.dumps({**software_versions(), "devices": ""})
        digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
        if not np.array_equal(digest, broadcast_from_primary(digest)):
            raise UserError(
                "this process has another configuration, or other versions, than the first one. Start all of them with "
                "the same --config and --set, from the same installation."
            )

    def _write_config(self) -> None:
        """Writes the resolved configuration, with versions as comments."""
        head = "".join(f"# {name}: {version}\n" for name, version in software_versions().items())
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / "config.yaml", (head + text).encode())


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in {**old, **new} for line in _differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [f"{path.lstrip('.')} was {old!r}, is {new!r}"]


def read_json_record(path: Path, *keys: str) -> dict[str, Any] | None:
    """A JSON object with these keys that the run wrote; None where there is none yet. Raises `UserError`."""
    if not path.exists():
        return None
    remedy = f"Remove {path.parent} to train the stage again." if path.name == STAGE_RECORD_FILE else "Remove the file."
    try:
        record = read_json_object(path)
    except UserError as error:
        raise UserError(f"{error} {remedy}") from None
    if lacking := [key for key in keys if key not in record]:
        raise UserError(f"{path}: damaged: {', '.join(lacking)} is not there. {remedy}")
    return record
