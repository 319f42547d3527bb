"""Every file in configs/ is valid and names its command. The paper's configurations have the paper's values."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import jax
import pytest
from support.paths import ROOT
from support.small import mesh

from thinkpo_jax.models.architecture import Architecture, read_architecture
from thinkpo_jax.models.weight_mapping import abstract_model, expected_tensor_shapes, flatten_by_name
from thinkpo_jax.pair_building.build_pairs import PairsConfig
from thinkpo_jax.pair_building.short_answers import GeneratedAnswersConfig
from thinkpo_jax.run.run_config import RunConfig, load_run_config
from thinkpo_jax.runtime.config import parse_config
from thinkpo_jax.runtime.sharding import tree_shardings
from thinkpo_jax.runtime.yaml_text import read_yaml
from thinkpo_jax.training.stage_config import SftStage, ThinkpoStage

CONFIGS, PAIRS = (
    sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem.startswith("pairs_") == pairs)
    for pairs in (False, True)
)
PAPER = {  # arXiv 2502.13173, Table 7
    "thinkpo_r1_distill_qwen_7b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 1e-7),
    "thinkpo_bespoke_stratos_7b": ("bespokelabs/Bespoke-Stratos-7B", 5e-7),
}
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


def config(name: str, *assignments: str) -> RunConfig:
    return load_run_config(ROOT / "configs" / f"{name}.yaml", assignments)


@pytest.fixture
def qwen2_7b(tmp_path: Path) -> Architecture:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_7B), encoding="utf-8")
    return read_architecture(tmp_path)


@pytest.mark.parametrize("path", CONFIGS + PAIRS, ids=lambda path: path.stem)
def test_config_is_valid_and_its_first_line_is_the_command_that_runs_it(path: Path):
    if path in PAIRS:
        folder, name = parse_config(PairsConfig, read_yaml(path), source=str(path)).out, "pairs"
    else:
        folder, name = load_run_config(path).run_dir, "train"
    assert folder == f"runs/{path.stem}"  # two configurations never share a run folder
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ")
    words = shlex.split(first.removeprefix("# "))
    assert words[-4:] == ["-m", f"thinkpo_jax.{name}", "--config", f"configs/{path.name}"]
    assert second == "#"  # a description follows


def test_the_named_configurations_exist():
    assert {"quickstart", "smollm2_135m", *PAPER} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", PAPER)
def test_paper_configs_have_the_papers_settings(name: str):
    run = config(name)
    (stage,) = run.stages
    assert isinstance(stage, ThinkpoStage)
    optimizer = stage.optimizer
    assert (run.model.path, optimizer.learning_rate) == PAPER[name]
    assert (stage.data[0].path, stage.batch.size, stage.beta) == ("VanWang/Bespoke_dpo_filter", 48, 0.01)
    assert (stage.epochs, stage.steps, stage.init_from) == (1, None, None)
    assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.max_grad_norm) == ("cosine", 0.1, 1.0)
    assert optimizer.weight_decay == 0
    assert stage.batch.row_length == 8192 + 1280
    assert (run.compute.dtype, run.compute.remat, stage.batch.rows_per_device) == ("bfloat16", "full", 1)
    evaluation = run.evaluation
    assert evaluation is not None
    assert [benchmark.name for benchmark in evaluation.benchmarks] == ["math500", "gsm8k"]
    assert (evaluation.sampling.temperature, evaluation.sampling.max_new_tokens) == (0.7, 32768)
    assert evaluation.compare == (("base", "thinkpo"),)


def test_the_two_paper_configs_differ_in_model_and_learning_rate_alone():
    first, second = (config(name).model_dump() for name in PAPER)
    for values in (first, second):
        del values["run_dir"], values["title"], values["model"], values["stages"][0]["optimizer"]["learning_rate"]
    assert first == second


def test_7b_has_its_published_parameter_count(qwen2_7b: Architecture):
    shapes = expected_tensor_shapes(qwen2_7b)
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_model(qwen2_7b, config("quickstart").compute))]
    assert sum(sizes) == 7_615_616_512
    assert len(shapes) == 339
    assert shapes["model.layers.27.self_attn.k_proj.weight"] == (512, 3584)
    assert shapes["lm_head.weight"] == (152_064, 3584)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4}], ids=str)
def test_7b_matrices_are_split_evenly_over_eight_devices(name: str, sizes: dict[str, int], qwen2_7b: Architecture):
    model = abstract_model(qwen2_7b, config(name).compute)
    layout = flatten_by_name(tree_shardings(model, mesh(**sizes)))
    parts = sizes["fsdp"] * sizes.get("tensor", 1)
    for path, leaf in flatten_by_name(model).items():
        if leaf.size > 10**6:  # matrices only, because norms and biases are small
            assert leaf.size == parts * math.prod(layout[path].shard_shape(leaf.shape)), path


def test_set_replaces_a_whole_data_section():
    run = config(
        "smollm2_135m",
        "stages.sft.data={path: pairs.jsonl, prompt: question, response: long}",
        "stages.thinkpo.data={path: pairs.jsonl, prompt: question, chosen: long, rejected: short}",
        "evaluation.benchmarks.gsm8k.path=gsm8k_test.jsonl",
    )
    sft, thinkpo = run.stages
    assert isinstance(sft, SftStage)
    assert isinstance(thinkpo, ThinkpoStage)
    assert (sft.data[0].path, sft.data[0].prompt, sft.data[0].response) == ("pairs.jsonl", "question", "long")
    assert (sft.data[0].messages, sft.data[0].system_column, sft.data[0].limit) == (None, None, None)
    assert (thinkpo.data[0].chosen, thinkpo.data[0].rejected, thinkpo.data[0].limit) == ("long", "short", None)
    assert run.evaluation is not None
    assert run.evaluation.benchmarks[0].path == "gsm8k_test.jsonl"


def test_the_papers_short_answers_are_sampled_with_the_papers_settings():
    path = ROOT / "configs" / "pairs_bespoke_stratos.yaml"
    pairs = parse_config(PairsConfig, read_yaml(path), source=str(path))
    assert isinstance(pairs.short, GeneratedAnswersConfig)
    assert pairs.short.engine == "server"
    sampling = pairs.short.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.samples) == (0.7, 0.9, 1024, 1)
    assert pairs.short.system == "You are a helpful and harmless assistant. Please reason step by step."
    assert pairs.long.path == "bespokelabs/Bespoke-Stratos-17k"
    assert pairs.filters.max_wrong_short_fraction == 2000 / 10080
