"""The benchmark of generation measures the same answers on both sides."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import needs_trl

from thinkpo_jax.bench import __main__ as bench_command
from thinkpo_jax.bench import generate, generation
from thinkpo_jax.bench.generate import (
    compare_answers,
    describe,
    measure_cache_growth,
    measure_engine_answers,
    measure_engine_step,
    measure_limits,
)
from thinkpo_jax.bench.transformers_generation import measure_transformers_answers, measure_transformers_step
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.runtime.config import UserError

PROMPTS = [[5, 9, 3], [4, 4], [6, 7, 8, 9, 10], [12, 3, 5, 9]]


@pytest.fixture
def model() -> str:
    return str(resolve_model_folder("builtin:miniature"))


@pytest.fixture
def prompts_path(tmp_path: Path) -> str:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return str(path)


def test_both_limits_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "ROUNDS", 1)
    monkeypatch.setattr(generate, "LIMIT_PROMPTS", 8)
    result = measure_limits()
    assert result["equal_lengths"]
    assert 8 < result["longest"] < 64  # the forced start makes the miniature show its work
    assert [len(times) for times in result["seconds"]] == [1, 1]


def test_the_cache_grows_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "LIMITS", (8, 1000))
    result = measure_cache_growth()
    tokens, sizes = zip(*result["rows"], strict=True)
    assert result["tokens"] == 1000
    assert list(tokens) == sorted(tokens)
    assert len(sizes) > 1
    assert list(sizes) == sorted(sizes)
    assert sizes[0] < result["limit_bytes"] <= sizes[-1] < 2.2 * result["limit_bytes"]


def test_mixed_lengths_take_fewer_steps_with_continuous_batching(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(generation, "MIXED_ANSWERS", 24)
    monkeypatch.setattr(generate, "MIXED_SLOTS", 8)
    monkeypatch.setattr(generate, "MIXED_LIMIT", 60)
    result = generate.measure_mixed_lengths(model)
    assert result["answers"] == 24
    assert 2 < result["mean_tokens"] < 12
    assert {name: len(times) for name, times in result["seconds"].items()} == {"continuous": 1, "static": 1}


@needs_trl
@pytest.mark.slow
def test_transformers_gives_the_same_greedy_answers(model: str, prompts_path: str) -> None:
    ours = measure_engine_answers(model, prompts_path, 12)
    theirs = measure_transformers_answers(model, prompts_path, 3, 12)
    assert ours["answers"] == theirs["answers"]
    assert any(ours["answers"])
    for result in (ours, theirs, measure_engine_step(model, 8, 20), measure_transformers_step(model, 8, 20)):
        assert result["seconds"] > 0


def test_the_batch_size_of_transformers_is_the_one_with_the_smallest_time(
    monkeypatch: pytest.MonkeyPatch, model: str, prompts_path: str, tmp_path: Path
) -> None:
    """With 2 rows a step takes 1 s and with 4 rows 1.5 s. The batches wait for 7 + 3 and for 7 tokens."""
    answers = [[1] * 7, [1], [1] * 3, [1] * 2]  # sorted by the length of their prompts: 1, 7, 2, 3

    def run(function: Any, arguments: dict[str, Any], *, folder: Path) -> dict[str, Any]:
        if function is measure_engine_answers:
            return {"answers": answers, "seconds": 2.0}
        if function is measure_transformers_step:
            return {"seconds": {2: 1.0, 4: 1.5}[arguments["rows"]]}
        assert arguments["batch_size"] == 2
        return {"answers": answers, "seconds": 5.0}

    monkeypatch.setattr(generate, "run_in_child", run)
    monkeypatch.setattr(generate, "BATCH_SIZES", (2, 4))
    result = compare_answers(model, Path(prompts_path), tmp_path)
    assert result["predicted_seconds"] == {2: 10.0, 4: 10.5}
    assert (result["ratio"], result["equal"], result["tokens"]) == (2.5, 4, 13)


def test_the_table_shows_results_and_goals() -> None:
    step = {"rows": 64, "context": 256, "ours": [0.2], "transformers": [0.4], "ratio": 2.0}
    result = {
        "limits": {"limits": (64, 32768), "ratio": 1.01},
        "batching": {"answers": 256, "mean_tokens": 101.4, "slots": 32, "ratio": 2.7},
        "step": {"rows": [step, step | {"context": 1, "ours": [0.1]}]},
        "answers": {"answers": 256, "batch_size": 64, "ratio": 2.9, "tokens": 100, "seconds": 1.0, "equal": 255,
                    "transformers_tokens": 100, "transformers_seconds": 2.9},
        "cache": {"rows": [(16, 2**20), (500, 2**21)], "limit_bytes": 2**25},
    }  # fmt: skip
    text = describe(result)
    assert "| decode step of 64 rows at context 256 against transformers, speed | 2.00 | 1.4 |" in text
    assert "Attention to 256 tokens takes 50% of our step." in text
    assert "| 500 | 2.0 |" in text


def test_missing_questions_are_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        bench_command.main(["generate", "--questions", str(tmp_path / "missing.jsonl"), "--model", "builtin:miniature"])
