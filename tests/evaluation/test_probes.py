"""A probe gives the figures of a greedy evaluation. It changes no weight, keeps no memory and compiles once."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from support import small
from support.byte_tokenizer import byte_tokenizer
from support.checkpoints import needs_data
from support.engines import ScriptedEngine
from support.paths import DATA
from support.stages import TIME_METRICS, stage_inputs

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.evaluation import probes
from thinkpo_jax.evaluation.benchmarks import Question, load_questions
from thinkpo_jax.evaluation.evaluate_model import EvaluatedModel, EvaluationConfig, evaluate_model
from thinkpo_jax.evaluation.probes import Probe
from thinkpo_jax.inference import local_engine
from thinkpo_jax.inference.engine import Completion, Request
from thinkpo_jax.inference.inference_model import weight_bytes
from thinkpo_jax.inference.local_engine import LocalEngine
from thinkpo_jax.models.model_folder import ModelConfig, ModelSource, resolve_model_source
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.runtime.mesh import MESH_AXES
from thinkpo_jax.training.train_stage import train_stage

NUM_QUESTIONS, LIMIT = 9, 40


@functools.cache
def _source(weights: Literal["pretrained", "random"] = "pretrained") -> ModelSource:
    return resolve_model_source(ModelConfig(path="builtin:miniature", weights=weights), seed=0)


def _config(**changes: Any) -> EvaluationConfig:
    benchmarks = [{"name": "miniature", "questions": NUM_QUESTIONS}]
    raw: dict[str, Any] = {"benchmarks": benchmarks, "sampling": {"max_new_tokens": LIMIT}} | changes
    return parse_config(EvaluationConfig, raw, source="test")


CONFIG = _config()
QUESTIONS = load_questions(CONFIG.benchmarks[0], seed=0)


def _probe(config: EvaluationConfig = CONFIG, **options: Any) -> Probe:
    return Probe(_source(), small.FLOAT32, config, QUESTIONS, **options)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return small.mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def model(mesh: Mesh) -> Transformer:
    """The start model as a stage holds it."""
    with jax.set_mesh(mesh):
        return _source().load(small.FLOAT32, mesh)


@pytest.fixture
def training(mesh: Mesh) -> Iterator[None]:
    """Makes the mesh of the training the current one, as the loop of a stage does."""
    with jax.set_mesh(mesh):
        yield


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_probe_gives_the_figures_of_a_greedy_evaluation(
    weights: Literal["pretrained", "random"], mesh: Mesh, tmp_path: Path
) -> None:
    source = _source(weights)
    figures = _probe()(source.load(small.FLOAT32, mesh))
    config = _config(sampling={"temperature": 0, "max_new_tokens": LIMIT})
    engine = LocalEngine(source, small.FLOAT32, config.local)
    with jax.set_mesh(None):
        questions = {"miniature": QUESTIONS}
        evaluated = EvaluatedModel("base", source)
        results = evaluate_model(evaluated, engine, config, questions, dtype="float32", seed=0, folder=tmp_path)
    samples = [sample for question in results["miniature"] for sample in question.samples]
    assert len({sample.response for sample in samples}) > 1
    assert figures == pytest.approx(
        {
            "accuracy": np.mean([sample.correct for sample in samples]),
            "mean_response_tokens": np.mean([sample.tokens for sample in samples]),
            "truncation_rate": np.mean([sample.truncated for sample in samples]),
            "finished_thoughts": 1,
        }
    )


@pytest.mark.usefixtures("training")
def test_answers_have_at_most_the_tokens_of_the_probe(model: Transformer) -> None:
    figures = _probe(max_new_tokens=2)(model)
    assert figures["truncation_rate"] == 1
    assert figures["mean_response_tokens"] == 2
    server = {"engine": "server", "server": {"url": "http://localhost:1/v1", "model": "tiny"}}
    assert _probe(_config(**server), max_new_tokens=2)(model) == figures, "the local engine answers"


def _live_bytes() -> int:
    """Returns the bytes of all arrays on all devices."""
    return sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards)


@pytest.mark.usefixtures("training")
def test_a_probe_holds_one_copy_of_the_weights_and_frees_it(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, generate_tokens, during = _probe(max_new_tokens=2), local_engine.generate_tokens, list[int]()

    def generate_and_measure(*args: Any, **options: Any) -> Any:
        during.append(_live_bytes())  # before there is a cache
        return generate_tokens(*args, **options)

    monkeypatch.setattr(local_engine, "generate_tokens", generate_and_measure)
    probe(model)  # may leave small constants
    before = _live_bytes()
    probe(model)
    assert _live_bytes() == before
    size = weight_bytes(_source().architecture, small.FLOAT32)
    assert size <= during[1] - before < 1.01 * size
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model))


@pytest.mark.usefixtures("training")
def test_only_the_first_probe_compiles(model: Transformer) -> None:
    compiled: list[str] = []

    def on_duration(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.clear_caches()  # other tests may have compiled the same programs
    probe = _probe(max_new_tokens=4)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        figures = probe(model)
        assert compiled
        compiled.clear()
        assert probe(model) == figures
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)


@pytest.mark.usefixtures("training")
def test_the_devices_of_the_engine_may_have_another_order(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = _probe(max_new_tokens=8)(model)
    devices = jax.devices()[:2]
    mesh = Mesh(np.array(devices[::-1]).reshape(1, 2, 1, 1), MESH_AXES)
    monkeypatch.setattr(probes, "default_devices", lambda: devices)
    with jax.set_mesh(mesh):
        assert _probe(max_new_tokens=8)(_source().load(small.FLOAT32, mesh)) == figures


@pytest.mark.usefixtures("training")
def test_weights_that_do_not_fit_beside_the_training_are_an_error(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "free_device_memory", lambda device: 1000.0)
    with pytest.raises(UserError, match=r"probe: beside the state of the training, the weights take .* Or remove"):
        _probe()(model)


def _answered_by(monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine) -> None:
    monkeypatch.setattr(probes, "LocalEngine", lambda *_, **__: engine)


@pytest.mark.usefixtures("training")
def test_each_figure_counts_its_answers(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [f"#{question.reference.answers[0]}" for question in QUESTIONS]
    completions = [
        Completion(right[0], 10),
        Completion(f"<think>a</think>{right[1]}", 20),
        Completion("<think>a", 30, "length"),
        Completion(f"<think>{right[3]}", 40),  # wrong, because the thought is open
        Completion("a", 100, "length"),
        Completion(error="the prompt is too long"),
        *(Completion("", 0) for _ in QUESTIONS[6:]),
    ]
    script = {question.id: completion for question, completion in zip(QUESTIONS, completions, strict=True)}
    _answered_by(monkeypatch, ScriptedEngine(lambda request: script[request.key]))
    expected = {"mean_response_tokens": 200 / 8, "truncation_rate": 2 / 8, "finished_thoughts": 6 / 8}
    figures = _probe()(model)
    assert {name: figures[name] for name in expected} == expected
    assert figures["accuracy"] == 2 / 9
    message = "warning: probe on miniature: 1 of 9 answers failed and count as wrong: the prompt is too long"
    assert message in capsys.readouterr().err
    _answered_by(monkeypatch, ScriptedEngine(lambda request: Completion(error="no")))
    assert _probe()(model) == {"accuracy": 0}


@needs_data
def test_real_questions_are_asked_in_their_order_and_graded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: None
) -> None:
    """The questions of GSM8K go to a random model with the byte tokenizer. Every third answer is scripted wrong."""
    arch = replace(small.ARCH, vocab_size=258, max_positions=4096)
    source = ModelSource(Path("unused"), arch, ChatTokenizer.from_folder(byte_tokenizer(tmp_path)))
    path, count = DATA / "gsm8k" / "test.jsonl", 30
    config = _config(benchmarks=[{"name": "gsm8k", "path": str(path)}])
    questions = load_questions(config.benchmarks[0], seed=0)[:count]
    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    answers = [row["answer"].split("####")[1].strip() for row in rows]
    engine = ScriptedEngine(lambda request: _boxed(request, questions, answers))
    _answered_by(monkeypatch, engine)
    figures = Probe(source, small.FLOAT32, config, questions)(small.model(arch=arch))
    assert [
        request.messages[-1]["content"].endswith(row["question"])
        for request, row in zip(engine.requests, rows, strict=True)
    ] == [True] * count
    assert figures["accuracy"] == pytest.approx(2 / 3)


def _boxed(request: Request, questions: Sequence[Question], answers: Sequence[str]) -> Completion:
    index = [question.id for question in questions].index(request.key)
    return Completion("no box" if index % 3 == 0 else f"\\boxed{{{answers[index]}}}", 5)


def test_training_with_a_probe_ends_in_the_same_bytes(tmp_path: Path) -> None:
    states, metrics = [], []
    for name, probe in (("with", _probe(max_new_tokens=4)), ("without", None)):
        inputs = stage_inputs(tmp_path / name, steps=3, probe={"every": 2}, checkpoint={"every": 100})
        inputs = replace(inputs, probe=probe)
        states.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(train_stage(inputs).state)])
        lines = read_metrics(inputs.folder.metrics)
        metrics.append([{name: line[name] for name in line.keys() - TIME_METRICS} for line in lines])
    assert states[0] == states[1]
    assert metrics[0] == metrics[1]
    lines = read_metrics(tmp_path / "with" / "stage" / "probe.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 3]
