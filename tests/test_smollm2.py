"""Trains and evaluates SmolLM2 with real weights and real data in a few updates.

Logits, greedy answers and the exported model are compared with transformers and with its server.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import small
from support.checkpoints import needs_data, torch_logits, torch_model
from support.paths import DATA, ROOT
from support.selection import exhaustive

from thinkpo_jax import evaluate
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.evaluation.evaluate_model import read_answers
from thinkpo_jax.evaluation.results import QuestionResult
from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig
from thinkpo_jax.inference.local_engine import LocalEngine, LocalEngineConfig
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.model_folder import ModelConfig, resolve_model_source
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_saving import save_model
from thinkpo_jax.runtime.cli import run_command
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.training.checkpoints import CheckpointStore

pytestmark = [pytest.mark.slow, needs_data]
# (number of pairs, row_length, over_length, max_new_tokens). The short form evaluates nothing.
SIZES = [(1, 256, "cut", None), pytest.param((2, 1024, "drop", 32), marks=exhaustive)]


def _logits(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    positions = TokenPositions(
        jnp.ones(tokens.shape, jnp.int32), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    )
    return np.asarray(jax.jit(lambda model: model(jnp.array(tokens), positions) @ model.lm_head())(model))


def _real_pairs(count: int) -> list[dict[str, str]]:
    lines = (DATA / "pairs" / "math500_pairs.jsonl").read_text(encoding="utf-8").split("\n")
    records = sorted(
        (json.loads(line) for line in lines if line), key=lambda record: len(record["long"] + record["short"])
    )
    # Sorted from long to short, so the shortest pair of each question overwrites the others.
    shortest_by_question = {record["question"]: record for record in reversed(records)}
    return list(shortest_by_question.values())[-count:]


def _text_tokens(folder: Path) -> np.ndarray:
    """Returns the first 256 tokens of a real long answer, [1, 256]."""
    from transformers import AutoTokenizer

    return np.array([AutoTokenizer.from_pretrained(folder)(_real_pairs(1)[0]["long"])["input_ids"][:256]])


@pytest.fixture(scope="module", params=SIZES, ids=["short", "exhaustive"])
def run(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of configs/smollm2_135m.yaml on local files, trained with the command."""
    pytest.importorskip("torch")
    num_pairs, row_length, over_length, max_new_tokens = request.param
    folder = tmp_path_factory.mktemp("smollm2_run")
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in _real_pairs(num_pairs)), encoding="utf-8")
    source = f"path: '{data}', prompt: question, over_length: {over_length}"
    batch, optimizer = (
        f"{{size: {num_pairs}, row_length: {row_length}, rows_per_device: 1}}",
        "{learning_rate: 2.0e-5, schedule: constant, warmup_ratio: 0.0}",
    )
    assignments = [
        f"model.path={smollm2}",
        f"run_dir={folder / 'run'}",
        "compute={dtype: float32, remat: full}",
        f"stages.sft.data={{{source}, response: long}}",
        f"stages.thinkpo.data={{{source}, chosen: long, rejected: short}}",
        *(f"stages.{stage}.{key}={value}" for stage in ("sft", "thinkpo") for key, value in (
            ("batch", batch), ("optimizer", optimizer), ("steps", "2"), ("epochs", "null"))),
    ]  # fmt: skip
    assignments += ["evaluation=null"] if max_new_tokens is None else [
        f"evaluation.benchmarks=[{{name: gsm8k, path: '{DATA / 'gsm8k' / 'test.jsonl'}', questions: 2}}]",
        f"evaluation.sampling={{temperature: 0.7, max_new_tokens: {max_new_tokens}}}",
        "evaluation.local.slots=2",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [
        sys.executable,
        "-m",
        "thinkpo_jax.train",
        "--config",
        "configs/smollm2_135m.yaml",
        "--set",
        *assignments,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_logits_equal_transformers(smollm2: Path) -> None:
    pytest.importorskip("torch")
    tokens = _text_tokens(smollm2)
    logits = _logits(load_model(smollm2, small.FLOAT32, small.mesh()), tokens)
    np.testing.assert_allclose(logits, torch_logits(smollm2, tokens), atol=1e-3)


def _questions(count: int) -> list[str]:
    lines = (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["question"] for line in lines[:count]]


def _generate_greedy(folder: Path, questions: list[str], max_new_tokens: int) -> list[Completion]:
    engine = LocalEngine(
        resolve_model_source(ModelConfig(path=str(folder)), seed=0), small.FLOAT32, LocalEngineConfig()
    )
    requests = [Request(str(i), [{"role": "user", "content": question}]) for i, question in enumerate(questions)]
    sampling = SamplingConfig(temperature=0, max_new_tokens=max_new_tokens)
    completions = dict(engine.generate(requests, sampling, seed=0))
    return [completions[request.key] for request in requests]


@exhaustive
def test_greedy_answers_equal_transformers(smollm2: Path) -> None:
    num_questions, max_new_tokens = 10, 64
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig

    chat = ChatTokenizer.from_folder(smollm2)
    prompts = [
        chat.encode_prompt([{"role": "user", "content": question}]).ids for question in _questions(num_questions)
    ]
    completions = _generate_greedy(smollm2, _questions(num_questions), max_new_tokens)
    reference: Any = torch_model(smollm2)
    reference.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(chat.stop_token_ids), pad_token_id=0
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt_ids = torch.tensor([prompt])
        answer = reference.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids))[0, len(prompt) :].tolist()
        assert completion.token_ids == [token for token in answer if token not in chat.stop_token_ids]


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[str]:
    """Runs `transformers serve` for a model folder and yields its address."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = str(free_socket.getsockname()[1])
    program = str(Path(sys.executable).with_name("transformers"))
    arguments = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(800):
            assert server.poll() is None, "the server ended"
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.5)
        else:
            pytest.fail("the server does not answer")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=600)


def test_an_evaluation_with_a_server_of_the_exported_model_gives_the_answers_of_our_engine(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("torch")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    out = tmp_path / "exported"
    save_model(
        load_model(smollm2, small.FLOAT32, small.mesh()),
        out,
        template_folder=smollm2,
        dtype="float32",
        stop_token_ids=[2],
        model_card="",
    )
    keys = [
        f"benchmarks=[{{name: gsm8k, path: '{DATA / 'gsm8k' / 'test.jsonl'}', questions: 3}}]",
        "sampling={temperature: 0, max_new_tokens: 16}",
    ]

    def evaluate_exported(name: str, *more: str) -> list[QuestionResult]:
        assignments = [f"evaluation.{key}" for key in (*keys, *more)]
        options = ["--config", str(ROOT / "configs/smollm2_135m.yaml"), "--model", str(out), "--out"]
        arguments = [*options, str(tmp_path / name), "--set", "compute.dtype=float32", *assignments]
        assert run_command(evaluate.main, arguments) == 0
        (folder,) = (tmp_path / name / "evaluation").iterdir()
        return read_answers(folder / "gsm8k.json")

    with _server(out) as address:
        server = f"server={{url: '{address}/v1', model: '{out}', concurrency: 2}}"
        from_server = evaluate_exported("server", "engine=server", server)
    local = evaluate_exported("local", "local.slots=3")
    for served, expected in zip(from_server, local, strict=True):
        (first,), (second,) = served.samples, expected.samples
        assert first.response.strip() == second.response.strip() != ""
        assert first.tokens == second.tokens == 16
        assert first.truncated
        assert not first.cut_by_context


def test_the_first_thinkpo_loss_is_ln_2_and_losses_fall(run: Path) -> None:
    sft, thinkpo = (read_metrics(run / stage / "metrics.jsonl") for stage in ("sft", "thinkpo"))
    assert thinkpo[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert sft[-1]["loss"] < sft[0]["loss"]
    assert thinkpo[-1]["loss"] < thinkpo[0]["loss"]
    assert thinkpo[-1]["rewards/accuracies"] == 1.0


def test_the_exported_model_in_transformers_has_the_logits_of_the_trained_model(run: Path) -> None:
    exported = run / "thinkpo" / "model"
    model = load_model(exported, small.FLOAT32, small.mesh())
    with CheckpointStore(run / "thinkpo" / "checkpoints") as checkpoints:
        trained = checkpoints.restore_model(model)
    # Some random token ids amplify float32 rounding forty times, so this uses real text.
    tokens = _text_tokens(exported)[:, :128]
    np.testing.assert_allclose(torch_logits(exported, tokens), _logits(trained, tokens), atol=1e-3)


def test_the_report_holds_answers_to_real_questions(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    if not report["models"]:
        pytest.skip("the short form evaluates nothing")
    assert all(scores["gsm8k"]["num_questions"] == 2 for scores in report["models"].values())
    answers = read_answers(run / "evaluation" / "base" / "gsm8k.json")
    assert all(sample.tokens > 0 and sample.response for result in answers for sample in result.samples)
