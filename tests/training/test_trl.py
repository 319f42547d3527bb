"""Compares thirty updates of DPO and SFT with TRL.

Losses, rewards, log-probs, gradient norms and final weights must be equal.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support import small
from support.byte_tokenizer import byte_tokenizer
from support.checkpoints import needs_trl, tiny_checkpoint
from support.selection import combinations

from thinkpo_jax.data.batches import BatchConfig, BatchPlan
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.record_formats import PreferenceDataConfig, SftDataConfig
from thinkpo_jax.data.tokenization import tokenize_sources
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.models.weight_saving import save_model
from thinkpo_jax.runtime.sharding import put_batch
from thinkpo_jax.training.objectives import PreferenceConfig, make_thinkpo_objective, sft_objective
from thinkpo_jax.training.optimizer import OptimizerConfig, make_optimizer
from thinkpo_jax.training.preference_metrics import finalize_metrics
from thinkpo_jax.training.reference_log_probs import compute_reference
from thinkpo_jax.training.train_step import init_train_state, make_train_step

pytestmark = [pytest.mark.slow, needs_trl, pytest.mark.filterwarnings("ignore")]  # torch and TRL warn
STEPS, BATCH_SIZE = 30, 4
LEARNING_RATE, BETA = 1e-3, 0.1
DPO_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
DPO_METRICS += ("logps/rejected",)


def make_records(seed: int = 0) -> list[dict[str, str]]:
    """Returns pairs of random words with a long chosen and a short rejected answer."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> str:
        return " ".join("".join(map(chr, rng.integers(97, 123, rng.integers(1, 6)))) for _ in range(count))

    return [
        {"prompt": words(3), "chosen": words(int(rng.integers(6, 24))), "rejected": words(int(rng.integers(1, 5)))}
        for _ in range(STEPS * BATCH_SIZE)
    ]


def train_ours(kind: str, folder: Path, out: Path) -> tuple[list[dict[str, float]], list[int]]:
    """Trains and saves a model with this package. Returns the metrics of each update and the order of the records."""
    chat, mesh = ChatTokenizer.from_folder(folder), small.mesh()
    data = (
        PreferenceDataConfig(path=str(out / "rows.jsonl"))
        if kind == "dpo"
        else SftDataConfig(path=str(out / "rows.jsonl"), response="chosen")
    )
    examples = tokenize_sources([data], chat, row_length=512, seed=0)
    with jax.set_mesh(mesh):
        config = BatchConfig(size=BATCH_SIZE, row_length=512, pack=False)
        batches = BatchPlan(examples, config, seed=0, num_shards=1, num_updates=STEPS, epochs=1.0)
        model = load_model(folder, ComputeConfig(dtype="float32"), mesh)
        objective = sft_objective
        if kind == "dpo":
            objective = make_thinkpo_objective(PreferenceConfig(beta=BETA), end_of_turn_id=chat.end_of_turn_id)
            batches.reference_log_probs = compute_reference(model, batches, mesh)
        optimizer = make_optimizer(
            OptimizerConfig(learning_rate=LEARNING_RATE, warmup_ratio=0.1, max_grad_norm=1.0), STEPS
        )
        state = init_train_state(model, optimizer, mesh)
        step = make_train_step(objective, optimizer, mesh, state)
        history, order = [], []
        for index in range(STEPS):
            state, metrics = step(state, put_batch(batches[index], mesh))
            history.append(finalize_metrics({name: float(value) for name, value in jax.device_get(metrics).items()}))
            order += batches[index].example_ids[batches[index].example_ids >= 0].tolist()
        save_model(
            state.model,
            out / "ours",
            template_folder=folder,
            dtype="float32",
            stop_token_ids=chat.stop_token_ids,
            model_card="",
        )
    return history, order


def train_trl(
    kind: str, folder: Path, out: Path, records: Sequence[dict[str, str]]
) -> tuple[list[dict[str, float]], Any]:
    """Trains with TRL on the records in this order. Returns the metrics of each update and the trained model."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl: Any = importlib.import_module("trl")  # it exports lazily
    common: dict[str, Any] = {
        "output_dir": str(out / "trl"),
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "max_length": 512,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 0,
    }
    trainer_class, config_class = (trl.DPOTrainer, trl.DPOConfig) if kind == "dpo" else (trl.SFTTrainer, trl.SFTConfig)

    class OrderedTrainer(trainer_class):
        """Reads the records in order, and keeps the losses unrounded."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    losses: list[float] = []
    column_by_field = {"chosen": "chosen", "rejected": "rejected"} if kind == "dpo" else {"completion": "chosen"}
    conversations = [
        {"prompt": [{"role": "user", "content": record["prompt"]}]}
        | {name: [{"role": "assistant", "content": record[column]}] for name, column in column_by_field.items()}
        for record in records
    ]
    options: dict[str, Any] = {"beta": BETA} if kind == "dpo" else {"completion_only_loss": True}
    trainer = OrderedTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config_class(**common, **options),
        train_dataset=Dataset.from_list(conversations),
        processing_class=AutoTokenizer.from_pretrained(folder, pad_token="<eos>"),
    )
    trainer.train()
    history = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [line | {"loss": loss} for line, loss in zip(history, losses, strict=True)], trainer.model


@pytest.mark.parametrize(
    ("kind", "family"),
    combinations(("dpo", "sft"), ("qwen2", "llama"), short=lambda kind, family: (kind == "dpo") == (family == "qwen2")),
)
def test_thirty_updates_equal_trl(kind: str, family: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    folder = tiny_checkpoint(tmp_path / "model", family=family, tokenizer=tokenizer)
    records = make_records()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    history, order = train_ours(kind, folder, tmp_path)
    assert sorted(order) == list(range(len(records)))
    expected, model = train_trl(kind, folder, tmp_path, [records[i] for i in order])
    assert len(expected) == len(history) == STEPS
    for index, (metrics, trl_metrics) in enumerate(zip(history, expected, strict=True)):
        for name in ("loss", "grad_norm", *(DPO_METRICS if kind == "dpo" else ())):
            assert metrics[name] == pytest.approx(trl_metrics[name], rel=1e-4, abs=1e-5), (index, name)
    trained = load_model(tmp_path / "ours", ComputeConfig(dtype="float32"), small.mesh())
    model.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (tmp_path / "theirs" / name).exists():
            (tmp_path / "theirs" / name).write_bytes((folder / name).read_bytes())
    trl_trained = load_model(tmp_path / "theirs", ComputeConfig(dtype="float32"), small.mesh())
    start = load_model(folder, ComputeConfig(dtype="float32"), small.mesh())
    max_change = 0.0
    for leaf, trl_leaf, start_leaf in zip(*map(jax.tree.leaves, (trained, trl_trained, start)), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(trl_leaf), atol=1e-4, rtol=1e-4)
        max_change = max(max_change, float(np.abs(np.asarray(leaf) - np.asarray(start_leaf)).max()))
    assert max_change > 5e-3  # training did change the weights
