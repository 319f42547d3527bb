"""Thirty updates are those of TRL: losses, rewards, log-probs, gradient norms and the final weights."""

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

pytestmark = [pytest.mark.slow, needs_trl, pytest.mark.filterwarnings("ignore")]  # warnings of torch and TRL
STEPS, SIZE = 30, 4
RATE, BETA = 1e-3, 0.1
DPO_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
DPO_METRICS += ("logps/rejected",)


def rows(seed: int = 0) -> list[dict[str, str]]:
    """Pairs of random words, long against short."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> str:
        return " ".join("".join(map(chr, rng.integers(97, 123, rng.integers(1, 6)))) for _ in range(count))

    return [
        {"prompt": words(3), "chosen": words(int(rng.integers(6, 24))), "rejected": words(int(rng.integers(1, 5)))}
        for _ in range(STEPS * SIZE)
    ]


def ours(kind: str, folder: Path, out: Path) -> tuple[list[dict[str, float]], list[int]]:
    """The metrics of each update, and the order in which the rows were read; the end is saved in `out`."""
    chat, mesh = ChatTokenizer.from_folder(folder), small.mesh()
    data = (
        PreferenceDataConfig(path=str(out / "rows.jsonl"))
        if kind == "dpo"
        else SftDataConfig(path=str(out / "rows.jsonl"), response="chosen")
    )
    examples = tokenize_sources([data], chat, row_length=512, seed=0)
    with jax.set_mesh(mesh):
        config = BatchConfig(size=SIZE, row_length=512, pack=False)
        batches = BatchPlan(examples, config, seed=0, num_shards=1, num_updates=STEPS, epochs=1.0)
        model = load_model(folder, ComputeConfig(dtype="float32"), mesh)
        objective = sft_objective
        if kind == "dpo":
            objective = make_thinkpo_objective(PreferenceConfig(beta=BETA), end_of_turn_id=chat.end_of_turn_id)
            batches.reference_log_probs = compute_reference(model, batches, mesh)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=RATE, warmup_ratio=0.1, max_grad_norm=1.0), STEPS)
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


def theirs(kind: str, folder: Path, out: Path, ordered: Sequence[dict[str, str]]) -> tuple[list[dict[str, float]], Any]:
    """TRL's metrics of each update on the rows in this order, and its trained model."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl: Any = importlib.import_module("trl")  # it exports lazily
    common: dict[str, Any] = {
        "output_dir": str(out / "trl"),
        "per_device_train_batch_size": SIZE,
        "num_train_epochs": 1,
        "learning_rate": RATE,
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

    class InOrder(trainer_class):
        """The rows as they stand, and what is logged without rounding."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    losses: list[float] = []
    turn = {"chosen": "chosen", "rejected": "rejected"} if kind == "dpo" else {"completion": "chosen"}
    found = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {name: [{"role": "assistant", "content": row[column]}] for name, column in turn.items()}
        for row in ordered
    ]
    options: dict[str, Any] = {"beta": BETA} if kind == "dpo" else {"completion_only_loss": True}
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config_class(**common, **options),
        train_dataset=Dataset.from_list(found),
        processing_class=AutoTokenizer.from_pretrained(folder, pad_token="<eos>"),
    )
    trainer.train()
    history = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [line | {"loss": loss} for line, loss in zip(history, losses, strict=True)], trainer.model


@pytest.mark.parametrize(
    ("kind", "family"),
    combinations(("dpo", "sft"), ("qwen2", "llama"), short=lambda kind, family: (kind == "dpo") == (family == "qwen2")),
)
def test_thirty_updates_are_trls(kind: str, family: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    folder = tiny_checkpoint(tmp_path / "model", family=family, tokenizer=tokenizer)
    given = rows()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    history, order = ours(kind, folder, tmp_path)
    assert sorted(order) == list(range(len(given)))
    expected, model = theirs(kind, folder, tmp_path, [given[i] for i in order])
    assert len(expected) == len(history) == STEPS
    for index, (our, their) in enumerate(zip(history, expected, strict=True)):
        for name in ("loss", "grad_norm", *(DPO_METRICS if kind == "dpo" else ())):
            assert our[name] == pytest.approx(their[name], rel=1e-4, abs=1e-5), (index, name)
    trained = load_model(tmp_path / "ours", ComputeConfig(dtype="float32"), small.mesh())
    model.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (tmp_path / "theirs" / name).exists():
            (tmp_path / "theirs" / name).write_bytes((folder / name).read_bytes())
    reference = load_model(tmp_path / "theirs", ComputeConfig(dtype="float32"), small.mesh())
    start = load_model(folder, ComputeConfig(dtype="float32"), small.mesh())
    moved = 0.0
    for ours_leaf, their_leaf, first in zip(*map(jax.tree.leaves, (trained, reference, start)), strict=True):
        np.testing.assert_allclose(np.asarray(ours_leaf), np.asarray(their_leaf), atol=1e-4, rtol=1e-4)
        moved = max(moved, float(np.abs(np.asarray(ours_leaf) - np.asarray(first)).max()))
    assert moved > 5e-3  # they did train
