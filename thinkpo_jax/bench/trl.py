"""How fast does TRL train the same pairs? Its DPOTrainer, with the settings that suit it best on a CPU.

Among the settings of TRL 1.16 these have no effect on a CPU, or are refused: `padding_free` is disabled in this release
(it warns and pads), Liger's and the Hub's kernels need a GPU, packing is for SFT alone.
"""

import importlib.util
import json
import sys
import time
from typing import Any

from thinkpo_jax.bench.workload import BETA, LEARNING_RATE, SEED, BenchFolder, SideResult, peak_memory, run_side_process

# How TRL can be given two pairs an update: side by side as they come, side by side ordered by length (what
# `train_sampling_strategy: group_by_length` does), or one after the other, which pads least.
VARIANTS = {
    "2 pairs at once": {"at_once": 2, "ordered": False},
    "2 pairs at once, grouped by length": {"at_once": 2, "ordered": True},
    "2 x 1 pair accumulated": {"at_once": 1, "ordered": False},
}


def missing() -> list[str]:
    """What is not installed of what TRL's side needs."""
    return [name for name in ("torch", "trl") if importlib.util.find_spec(name) is None]


def measure(
    folder: BenchFolder, *, at_once: int, ordered: bool, epochs: int, extra: dict[str, Any] | None = None
) -> SideResult:
    """Trains one update that is not timed, then `epochs` epochs of two pairs an update."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    trl: Any = importlib.import_module("trl")  # it exports lazily
    ends: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class Trainer(trl.DPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss))
            return loss

    rows = [json.loads(line) for line in folder.pairs.read_text(encoding="utf-8").splitlines()]
    if ordered:
        rows.sort(key=lambda row: -len(row["chosen"].split()))
    chats = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        for row in rows
    ]
    model = AutoModelForCausalLM.from_pretrained(folder.model, dtype="float32")
    loaded = peak_memory()
    config = trl.DPOConfig(**settings(folder, at_once), **(extra or {}))
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(chats[:2] + chats * epochs),
        processing_class=AutoTokenizer.from_pretrained(folder.model),
        callbacks=[Clock()],
    )
    trainer.train()
    once = trainer.train_dataset[2 : 2 + len(rows)]
    answers = [len(ids) for name in ("chosen_ids", "rejected_ids") for ids in once[name]]
    warm = 2 // at_once
    return SideResult(
        tokens=2 * sum(map(len, once["prompt_ids"])) + sum(answers),
        seconds=ends[-1] - ends[0],
        first_loss=sum(losses[:warm]) / warm,
        mean_loss=sum(losses[warm:]) / len(losses[warm:]),
        reference=(sum(once["ref_chosen_logps"]) / len(rows), sum(once["ref_rejected_logps"]) / len(rows)),
        loaded=loaded,
        peak=peak_memory(),
    )


def settings(folder: BenchFolder, at_once: int) -> dict[str, Any]:
    """TRL's settings for two pairs an update, `at_once` of them side by side."""
    return {
        "output_dir": str(folder.path / "trl"),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": 2 // at_once,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "max_length": None,
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


if __name__ == "__main__":
    run_side_process(measure, sys.argv[1:])
