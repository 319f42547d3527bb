"""Every file in configs/ is valid and names its command."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import needs_data
from support.configs import CONFIGS, PAIRS, pairs_config, run_config
from support.paths import DATA, ROOT
from support.real_tokenizers import real_tokenizer

from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.pair_building.short_answers import GeneratedAnswersConfig
from thinkpo_jax.run.run_config import load_run_config
from thinkpo_jax.run.stage_data import tokenize_stage_data
from thinkpo_jax.training.stage_config import SftStage, ThinkpoStage

GSM8K_FILES = [
    *(f"stages.{stage}.data.path={DATA / 'gsm8k' / 'train.jsonl'}" for stage in ("sft", "thinkpo", "control")),
    *(f"stages.{stage}.data.subset=null" for stage in ("sft", "thinkpo", "control")),
]


@pytest.mark.parametrize("path", CONFIGS + PAIRS, ids=lambda path: path.stem)
def test_config_is_valid_and_its_first_line_is_the_command_that_runs_it(path: Path):
    if path in PAIRS:
        folder, name = pairs_config(path).out, "pairs"
    else:
        folder, name = load_run_config(path).run_dir, "train"
    assert folder == f"runs/{path.stem}"
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ")
    words = shlex.split(first.removeprefix("# "))
    assert words[-4:] == ["-m", f"thinkpo_jax.{name}", "--config", path.relative_to(ROOT).as_posix()]
    assert second == "#"  # a description follows


def test_the_named_configurations_exist_and_never_share_a_run_folder():
    stems = [path.stem for path in CONFIGS + PAIRS]
    assert len(set(stems)) == len(stems)
    assert {"quickstart", "smollm2_135m", "gsm8k_smollm2"} <= set(stems)


def test_set_replaces_a_whole_data_section():
    run = run_config(
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
    pairs = pairs_config("pairs_bespoke_stratos")
    assert isinstance(pairs.short, GeneratedAnswersConfig)
    assert pairs.short.engine == "server"
    sampling = pairs.short.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.samples) == (0.7, 0.9, 1024, 1)
    assert pairs.short.system == "You are a helpful and harmless assistant. Please reason step by step."
    assert pairs.long.path == "bespokelabs/Bespoke-Stratos-17k"
    assert pairs.filters.max_wrong_short_fraction == 2000 / 10080


@needs_data
def test_the_control_on_gsm8k_starts_where_thinkpo_starts_and_costs_as_much():
    """The cost of a token is 3 for a forward and backward pass, and 1 more for the reference pass of ThinkPO."""
    run = run_config("gsm8k_smollm2", *GSM8K_FILES)
    sft, thinkpo, control = run.stages
    assert [run.initial_model_of(stage) for stage in run.stages] == ["base", "sft", "sft"]
    tokenizer = ChatTokenizer.from_folder(real_tokenizer("qwen2_5"))
    datasets = [tokenize_stage_data(stage, tokenizer, seed=0) for stage in run.stages]
    used = [(report.num_used, report.rows) for dataset in datasets for report in dataset.reports]
    assert used == [(2000, 2000), (480, 480), (480, 480)]
    prompts = [{example[0].token_ids[: example[0].answer_start].tobytes() for example in data} for data in datasets]
    assert prompts[1] == prompts[2] < prompts[0]
    tokens = [np.sum(dataset.prompt_and_answer_lengths(), axis=(1, 2)).mean() for dataset in datasets]
    assert thinkpo.steps == control.steps is not None
    assert thinkpo.batch.size is not None
    assert control.batch.size is not None
    cost = [4 * thinkpo.batch.size * tokens[1], 3 * control.batch.size * tokens[2]]
    assert cost[1] == pytest.approx(cost[0], rel=0.05)
    assert sft.optimizer.learning_rate > control.optimizer.learning_rate
