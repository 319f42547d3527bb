"""Saved answers are reused only for the same prompts."""

import shutil
from pathlib import Path

import jax
import pytest
from support import small

from thinkpo_jax.evaluation.benchmarks import load_questions
from thinkpo_jax.evaluation.evaluate_model import EvaluationConfig, evaluate_model
from thinkpo_jax.evaluation.results import QuestionResult
from thinkpo_jax.models.model_folder import ModelConfig, ModelSource, resolve_model_folder, resolve_model_source
from thinkpo_jax.runtime.config import parse_config


def test_answers_are_generated_again_for_other_template_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(resolve_model_folder("builtin:miniature"), tmp_path / "model"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt and first %}{{ first }}{% endif %}")
    raw = {"benchmarks": [{"name": "miniature", "questions": 2}], "sampling": {"max_new_tokens": 4, "batch_size": 2}}
    config, mesh = parse_config(EvaluationConfig, raw, source="test"), small.mesh()
    questions = {"miniature": load_questions(config.benchmarks[0], seed=0)}
    loads: list[ModelSource] = []
    load = ModelSource.load
    monkeypatch.setattr(ModelSource, "load", lambda self, *options: loads.append(self) or load(self, *options))

    def evaluate(**arguments: str) -> list[QuestionResult]:
        source = resolve_model_source(ModelConfig(path=str(folder), template_arguments=arguments), seed=0)
        options = {"compute": small.FLOAT32, "mesh": mesh, "seed": 0, "folder": tmp_path / "answers"}
        with jax.set_mesh(mesh):
            return evaluate_model("model", source, config, questions, **options)["miniature"]

    answers = evaluate()
    assert evaluate() == answers
    assert len(loads) == 1
    evaluate(first="#")
    assert len(loads) == 2
