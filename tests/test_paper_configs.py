"""The configurations in configs/paper have the settings of the paper's tables (arXiv 2502.13173)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.checkpoints import needs_data
from support.configs import CONFIGS, pairs_config, run_config
from support.pairs import write_jsonl
from support.paths import DATA, ROOT
from support.plugins import needs_cuda, needs_libtpu
from support.selection import exhaustive
from support.small import mesh

from thinkpo_jax.data.record_formats import PreferenceDataConfig
from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.weight_mapping import abstract_model, expected_tensor_shapes, flatten_by_name
from thinkpo_jax.pair_building.build_pairs import build_pairs
from thinkpo_jax.runtime.sharding import tree_shardings
from thinkpo_jax.training.stage_config import ThinkpoStage

BESPOKE = "bespokelabs/Bespoke-Stratos-7B"
# Tables 1 to 5 and 7: model, (learning rate, epochs) of SFT, learning rate of ThinkPO
ROWS: dict[str, tuple[str, tuple[float, int] | None, float | None]] = {
    "qwen2_5_7b_instruct": ("Qwen/Qwen2.5-7B-Instruct", (1e-5, 3), 3e-7),
    "qwen2_5_3b": ("Qwen/Qwen2.5-3B", (3e-5, 1), 5e-7),
    "qwen2_5_7b": ("Qwen/Qwen2.5-7B", (3e-5, 1), 8e-8),
    "qwen2_5_14b": ("Qwen/Qwen2.5-14B", (3e-5, 1), 1e-7),
    "qwen2_5_7b_short_cot": ("Qwen/Qwen2.5-7B", (1e-5, 3), 3e-7),
    "thinkpo_r1_distill_qwen_7b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", None, 1e-7),
    "thinkpo_bespoke_stratos_7b": (BESPOKE, None, 5e-7),
    "thinkpo_gap_short": (BESPOKE, None, 5e-7),
    "thinkpo_gap_middle": (BESPOKE, None, 5e-7),
    "thinkpo_gap_long": (BESPOKE, None, 5e-7),
    "control_more_sft": (BESPOKE, (1e-5, 1), None),
    "control_swapped": (BESPOKE, None, 5e-7),
    "control_correct_only": (BESPOKE, None, 5e-7),
    "control_length_matched": (BESPOKE, None, 5e-7),
}
BENCHMARKS = ["math500", "aime24", "gpqa_diamond", "gsm8k", "olympiadbench"]
PUBLISHED_PAIRS = "VanWang/Bespoke_dpo_filter"
QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18_944,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}


@pytest.fixture
def qwen2_7b(tmp_path: Path) -> Path:
    """A model folder that has only a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_7B), encoding="utf-8")
    return tmp_path


def test_every_row_of_the_paper_has_a_configuration():
    assert {path.stem for path in CONFIGS if path.parent.name == "paper"} == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_stages_have_the_papers_settings(name: str):
    run, (model, sft_settings, thinkpo_rate) = run_config(f"paper/{name}"), ROWS[name]
    assert run.model.path == model
    assert (run.compute.dtype, run.compute.remat) == ("bfloat16", "full")
    objectives = ["sft"] * (sft_settings is not None) + ["thinkpo"] * (thinkpo_rate is not None)
    assert [(stage.name, stage.objective) for stage in run.stages] == list(zip(objectives, objectives, strict=True))
    for stage in run.stages:
        optimizer, batch = stage.optimizer, stage.batch
        assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.max_grad_norm) == ("cosine", 0.1, 1.0)
        assert (optimizer.weight_decay, stage.steps, stage.init_from, batch.rows_per_device) == (0, None, None, 1)
        if isinstance(stage, ThinkpoStage):
            assert (optimizer.learning_rate, stage.beta, stage.loss, stage.epochs) == (thinkpo_rate, 0.01, "sigmoid", 1)
            assert (batch.size, batch.row_length) == (48, 8192 + 1280)
        else:
            assert (optimizer.learning_rate, stage.epochs) == sft_settings
            assert (batch.size, batch.row_length) == (32, 10_240)


@pytest.mark.parametrize("name", ROWS)
def test_the_evaluation_is_the_papers_and_compares_each_stage_with_its_start(name: str):
    run, row = run_config(f"paper/{name}"), run_config("paper/thinkpo_bespoke_stratos_7b")
    evaluation = run.evaluation
    assert evaluation is not None
    assert [benchmark.name for benchmark in evaluation.benchmarks] == BENCHMARKS
    assert (evaluation.protocol, evaluation.system_prompt) == ("paper", PUBLISHED_PAIRS)
    sampling = evaluation.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.samples) == (0.7, 1.0, 32768, 1)
    by_start = {(run.initial_model_of(stage), stage.name) for stage in run.stages}
    assert set(evaluation.compare) == by_start | {(other, run.stages[-1].name) for other in evaluation.against}
    against = [f"{row.run_dir}:{row.stages[-1].name}"] if name.startswith("control_") else []
    assert list(evaluation.against.values()) == against


def test_stages_read_the_papers_data_except_for_ablations_and_controls():
    others = {
        ("control_correct_only", "thinkpo"): f"{pairs_config('paper/pairs_correct_only').out}/pairs.parquet",
        ("control_length_matched", "thinkpo"): f"{pairs_config('paper/pairs_length_matched').out}/pairs.parquet",
        ("qwen2_5_7b_short_cot", "sft"): "AI-MO/NuminaMath-CoT",
        **{(f"thinkpo_gap_{gap}", "thinkpo"): f"{PUBLISHED_PAIRS}_len_{gap}" for gap in ("short", "middle", "long")},
    }
    usual = {"sft": "bespokelabs/Bespoke-Stratos-17k", "thinkpo": PUBLISHED_PAIRS}
    for name in ROWS:
        for stage in run_config(f"paper/{name}").stages:
            (data,) = stage.data
            assert data.path == others.get((name, stage.name), usual[stage.name])
            if isinstance(data, PreferenceDataConfig):
                columns = ("rejected", "chosen") if name == "control_swapped" else ("chosen", "rejected")
                assert (data.chosen, data.rejected) == columns


def test_short_answers_for_sft_are_as_many_as_long_ones():
    (data,) = run_config("paper/qwen2_5_7b_short_cot").stages[0].data
    assert round(859_494 * data.weight) == 16_710


@pytest.mark.parametrize("control", ["correct_only", "length_matched"])
def test_the_pairs_of_a_control_are_selected_from_all_published_pairs(control: str):
    pairs = pairs_config(f"paper/pairs_{control}")
    assert (pairs.control, pairs.long.path, pairs.short.by) == (control, PUBLISHED_PAIRS, "join")
    assert (pairs.filters.max_wrong_short_fraction, pairs.select.gap, pairs.select.pairs) == (None, "all", None)
    assert pairs.decontaminate.against == ()


@needs_data
def test_pairs_in_the_published_form_are_selected_by_their_short_answer(tmp_path: Path):
    lines = (DATA / "pairs" / "math500_pairs.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [row for row in map(json.loads, filter(None, lines)) if "√" not in row["short"]]  # `short_correct` is wrong
    complete = [row for row in rows if row["long"].endswith("<|end_of_solution|>")]
    by_question = {row["question"]: row for row in complete}
    records = sorted(by_question.values(), key=lambda row: row["short_correct"])
    records = [*records[:4], *records[-4:]]  # four with a wrong short answer, four with a correct one
    system = {"role": "system", "content": "Think."}

    def conversation(row: dict[str, Any], answer: str) -> list[dict[str, str]]:
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row[answer]}]
        return [system, *turns]

    rows = [{"chosen": conversation(row, "long"), "rejected": conversation(row, "short")} for row in records]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tokenizer").mkdir()
    paths = [f"long.path={path}", f"short.path={path}", f"tokenizer={byte_tokenizer(tmp_path / 'tokenizer')}"]
    pairs = build_pairs(pairs_config("paper/pairs_correct_only", *paths, f"out={tmp_path / 'out'}"))
    assert [(pair.question, pair.chosen, pair.rejected) for pair in pairs] == [
        (row["question"], row["long"], row["short"]) for row in records if row["short_correct"]
    ]
    assert all(pair.prompt[0] == system for pair in pairs)


def test_7b_has_its_published_parameter_count(qwen2_7b: Path):
    arch, compute = read_architecture(qwen2_7b), run_config("paper/qwen2_5_7b").compute
    shapes = expected_tensor_shapes(arch)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_model(arch, compute))) == 7_615_616_512
    assert len(shapes) == 339
    assert shapes["model.layers.27.self_attn.k_proj.weight"] == (512, 3584)
    assert shapes["lm_head.weight"] == (152_064, 3584)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4}], ids=str)
def test_7b_matrices_are_split_evenly_over_eight_devices(sizes: dict[str, int], qwen2_7b: Path):
    model = abstract_model(read_architecture(qwen2_7b), run_config("paper/qwen2_5_7b").compute)
    layout = flatten_by_name(tree_shardings(model, mesh(**sizes)))
    parts = sizes["fsdp"] * sizes.get("tensor", 1)
    for path, leaf in flatten_by_name(model).items():
        if leaf.size > 10**6:  # matrices only, because norms and biases are small
            assert leaf.size == parts * math.prod(layout[path].shard_shape(leaf.shape)), path


@exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        pytest.param("qwen2_5_7b_instruct", "h100:4", marks=needs_cuda),
        pytest.param("thinkpo_bespoke_stratos_7b", "v6e:2x4", marks=needs_libtpu),
    ],
)
def test_a_7b_row_fits_the_hardware_that_its_file_names(name: str, topology: str, qwen2_7b: Path):
    command = [sys.executable, "-m", "thinkpo_jax.plan", "--config", f"configs/paper/{name}.yaml"]
    command += ["--topology", topology, "--set", f"model.path={qwen2_7b}"]
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    for stage in run_config(f"paper/{name}").stages:
        assert f"stage {stage.name} fits" in process.stdout
