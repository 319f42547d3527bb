r"""Trains SmolLM2-135M on GSM8K with SFT, ThinkPO and an SFT control, and compares their accuracy.

The commands `train` and `evaluate` do the work, in child processes. All data come from GSM8K:

| use | text |
|---|---|
| prompt | the question of the training split, with the instruction of the benchmark |
| SFT and chosen answer | the gold solution without calculator marks, then `The answer is \boxed{N}.` |
| rejected answer | the last step of the same solution, and the same last sentence |

The rejected answer is right and short. So a pair differs only in the steps that it shows, and ThinkPO cannot gain from
wrong answers. Real long chains of thought have a median of 1,628 tokens, and sampling that many tokens takes too long.
Pairs need a solution of at least three steps.

The control trains on the chosen answers from the SFT model. It has as many updates as ThinkPO. Its updates have more
examples, so that it also reads about as many tokens. Loss and beta are the paper's. The learning rates are higher than
the paper's, because the model is smaller. They were not tuned for accuracy.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from thinkpo_jax.bench.pack import WEIGHTS
from thinkpo_jax.bench.smollm2 import write_smollm2
from thinkpo_jax.data.gsm8k import BOXED_INSTRUCTION, split_solution
from thinkpo_jax.data.readers import DataSourceConfig, iterate_valid_records
from thinkpo_jax.evaluation.evaluate_model import read_answers
from thinkpo_jax.evaluation.statistics import compare_pooled_runs
from thinkpo_jax.planning.topology import GPU_MEMORY_FRACTION
from thinkpo_jax.run.run_folder import RunFolder
from thinkpo_jax.runtime.cli import handling
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import read_metrics
from thinkpo_jax.runtime.files import read_json_object

BENCHMARK = "gsm8k"
MIN_STEPS = 3  # of a solution that becomes a pair
SFT_RATE, CONTROL_RATE, THINKPO_RATE = 3e-4, 1e-4, 5e-6  # peak learning rates
COMPARISONS = (("base", "sft"), ("sft", "thinkpo"), ("sft", "control"), ("control", "thinkpo"))
Row = dict[str, str]


@dataclass(frozen=True)
class QualitySettings:
    """The size of the experiment. Lengths are tokens, `size` is examples per update."""

    num_solutions: int | None = None  # the shortest ones (None: all)
    size: int = 64
    sft_epochs: float = 2
    thinkpo_epochs: float = 1
    sft_row_length: int = 1024
    pair_row_length: int = 2048
    questions: int | None = None
    samples: int = 2
    max_new_tokens: int = 320
    batch_size: int = 400  # of the sampler, for all seeds that share a device
    dtype: str = "bfloat16"


FULL = QualitySettings()
SMALL = QualitySettings(
    num_solutions=2, size=1, sft_epochs=1, sft_row_length=192, pair_row_length=320, questions=3, max_new_tokens=8,
    batch_size=6, dtype="float32",
)  # fmt: skip


def measure_quality(
    data: Path,
    work: Path,
    *,
    seconds: float,
    seeds: Sequence[int] = (0, 1, 2),
    at_once: int = 1,
    environment: Mapping[str, str] | None = None,
    is_small: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates each seed, and stops after `seconds`. Touches no device in this process.

    `data` has gsm8k/train.jsonl, gsm8k/test.jsonl and smollm2.gguf. `work` is a folder for models and runs, about 7 GB
    per seed. `at_once` seeds share the device. By the planner, each needs about 20 GiB of its memory. `environment` has
    further variables of the child processes. `is_small` is for CPUs: one seed, 2 rows and 2 updates per stage.

    Returns a JSON object. Accuracies and rates are fractions of 1, lengths are tokens:

    - `settings`, `num_solutions`, `num_pairs`, `seconds`
    - `seeds`: for each finished seed its scores by model, its comparisons and its stages
    - `pooled`: the comparisons over all finished seeds
    - `unfinished`: for each other seed the reason

    Raises:
        UserError: data, weights or the package gguf are missing.
    """
    start = time.monotonic()
    settings, seeds = (SMALL, seeds[:1]) if is_small else (FULL, seeds)
    settings = replace(settings, batch_size=max(1, settings.batch_size // at_once))
    train, test = (data / BENCHMARK / f"{split}.jsonl" for split in ("train", "test"))
    for path in (train, test, data / WEIGHTS):
        if not path.is_file():
            raise UserError(
                f"{path}: there is no such file. `python -m thinkpo_jax.bench.pack` builds a folder with it."
            )
    work = work.resolve()
    model = write_smollm2(data / WEIGHTS, work / "smollm2")
    rows = write_training_data(train, work, limit=settings.num_solutions)
    config = make_run_config(settings, rows, work, model=model, test=test.resolve())
    (work / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    remaining = seconds - (time.monotonic() - start)
    variables = {"XDG_CACHE_HOME": str(work / "cache"), "HF_HUB_OFFLINE": "1", **(environment or {})}
    if not is_small:  # The seeds compile the same programs.
        variables["JAX_COMPILATION_CACHE_DIR"] = str(work / "programs")
    if at_once > 1:
        variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{GPU_MEMORY_FRACTION / at_once:.2f}"
    unfinished = run_seeds(work, seeds, seconds=remaining, at_once=at_once, environment=variables)
    runs = {seed: work / f"seed{seed}" for seed in seeds if seed not in unfinished}
    return {
        "settings": asdict(settings),
        "num_solutions": len(rows),
        "num_pairs": len(select_pairs(rows)),
        "seeds": {str(seed): read_scores(run) for seed, run in runs.items()},
        "pooled": pool_seeds(list(runs.values())),
        "unfinished": {str(seed): reason for seed, reason in unfinished.items()},
        "seconds": time.monotonic() - start,
    }


def make_answers(answer: str) -> tuple[str, str | None] | None:
    """Returns the long and the short answer of one GSM8K row, or None if the row has no number after `####`.

    The short answer is None if the solution has fewer than `MIN_STEPS` steps.
    """
    solution, result = split_solution(answer)
    steps = [line.strip() for line in solution.split("\n") if line.strip()]
    if not steps or not result:
        return None
    end = f"The answer is \\boxed{{{result}}}."
    return "\n".join((*steps, end)), f"{steps[-1]}\n{end}" if len(steps) >= MIN_STEPS else None


def write_training_data(train: Path, work: Path, *, limit: int | None = None) -> list[Row]:
    """Writes sft.jsonl and pairs.jsonl into `work`. Returns the rows of sft.jsonl: `question`, `long` and `short`.

    Rows that give no pair have no `short`. With a `limit`, uses that many of the shortest rows that give a pair. Raises
    `UserError` if the file cannot be read, or no row gives a pair.
    """
    rows: list[Row] = []
    for _, record in iterate_valid_records(DataSourceConfig(path=str(train)), seed=0):
        if answers := make_answers(str(record.get("answer"))):
            long, short = answers
            row = {"question": BOXED_INSTRUCTION + str(record.get("question")), "long": long}
            rows.append(row if short is None else row | {"short": short})
    if limit is not None:
        rows = sorted(select_pairs(rows), key=lambda row: len(row["question"] + row["long"]))[:limit]
    if not select_pairs(rows):
        raise UserError(f"{train}: no solution has {MIN_STEPS} steps. Give the training split of GSM8K.")
    work.mkdir(parents=True, exist_ok=True)
    for name, lines in (("sft", rows), ("pairs", select_pairs(rows))):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return rows


def select_pairs(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that have a short answer."""
    return [row for row in rows if "short" in row]


def make_run_config(
    settings: QualitySettings, rows: Sequence[Row], work: Path, *, model: Path, test: Path
) -> dict[str, Any]:
    """Returns the configuration of a run, without its seed and folder."""
    pairs = select_pairs(rows)
    num_updates = max(1, round(settings.thinkpo_epochs * len(pairs) / settings.size))
    # An update of the control reads as much text as one of ThinkPO, which reads the question and the answer twice.
    pair_length = sum(2 * len(row["question"]) + len(row["long"]) + len(row["short"]) for row in pairs)
    control_size = round(settings.size * pair_length / sum(len(row["question"] + row["long"]) for row in pairs))

    def stage(name: str, size: int, row_length: int, learning_rate: float, **keys: Any) -> dict[str, Any]:
        batch = {"size": size, "row_length": row_length}
        optimizer = {"learning_rate": learning_rate, "schedule": "cosine", "warmup_ratio": 0.1}
        return {"name": name, **keys, "batch": batch, "optimizer": optimizer, "checkpoint": {"every": 100_000}}

    sft = {"path": str(work / "sft.jsonl"), "prompt": "question", "response": "long"}
    chosen = sft | {"path": str(work / "pairs.jsonl")}
    pair = {"path": chosen["path"], "prompt": "question", "chosen": "long", "rejected": "short"}
    size, length = settings.size, settings.sft_row_length
    sampling = {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": settings.max_new_tokens}
    sampling |= {"samples": settings.samples}
    return {
        "run_dir": str(work / "run"),
        "title": "ThinkPO of SmolLM2-135M on GSM8K",
        "model": {"path": str(model)},
        "compute": {"dtype": settings.dtype},
        "stages": [
            stage("sft", size, length, SFT_RATE, objective="sft", data=sft, epochs=settings.sft_epochs),
            stage("thinkpo", size, settings.pair_row_length, THINKPO_RATE, objective="thinkpo", data=pair,
                  steps=num_updates, beta=0.01),
            stage("control", control_size, length, CONTROL_RATE, objective="sft", data=chosen, steps=num_updates,
                  init_from="sft"),
        ],
        "evaluation": {
            "benchmarks": [{"name": BENCHMARK, "path": str(test), "questions": settings.questions}],
            "sampling": sampling,
            "local": {"slots": settings.batch_size},
            "compare": [list(names) for names in COMPARISONS],
        },
    }  # fmt: skip


def run_seeds(
    work: Path, seeds: Sequence[int], *, seconds: float, at_once: int = 1, environment: Mapping[str, str] | None = None
) -> dict[int, str]:
    """Runs `train` on `work`/config.yaml for each seed. Returns the reason for each seed that did not finish.

    A seed has the run folder `work`/seedN and the log `work`/seedN.log. After `seconds`, all processes are killed.
    """
    deadline, pending = time.monotonic() + seconds, list(seeds)
    running: dict[int, subprocess.Popen[bytes]] = {}
    unfinished: dict[int, str] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(_kill, running)
        stack.enter_context(handling(signal.default_int_handler, signal.SIGTERM))  # so that the stack is left
        while (pending or running) and time.monotonic() < deadline:
            while pending and len(running) < at_once:
                running[pending[0]] = _start_seed(work, pending[0], os.environ | (environment or {}))
                pending.pop(0)
            for seed in [seed for seed, process in running.items() if process.poll() is not None]:
                if status := running.pop(seed).returncode:
                    log = (work / f"seed{seed}.log").read_text(encoding="utf-8", errors="replace")
                    unfinished[seed] = f"exit status {status}: {log.strip()[-500:]}"
            time.sleep(0.1)
    limit = f"the time limit of {seconds:.0f} s"
    stopped = {
        seed: f"stopped by {limit}, {_progress(work / f'seed{seed}')}"
        for seed, process in running.items()
        if process.returncode  # 0 if it ended just before
    }
    return unfinished | stopped | dict.fromkeys(pending, f"not started before {limit}")


def _start_seed(work: Path, seed: int, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "thinkpo_jax.train", "--config", str(work / "config.yaml")]
    command += ["--set", f"seed={seed}", f"run_dir={work / f'seed{seed}'}"]
    with (work / f"seed{seed}.log").open("wb") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,  # so that one signal reaches all of its processes
        )  # fmt: skip


def _kill(running: Mapping[int, "subprocess.Popen[bytes]"]) -> None:
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the graders too, which are its child processes
        process.wait()


def _progress(run: Path) -> str:
    """Returns which models of a run are trained and evaluated."""
    trained = sorted(path.parent.name for path in run.glob("*/model"))
    evaluated = sorted(path.parent.name for path in run.glob(f"evaluation/*/{BENCHMARK}.json"))
    return f"trained: {', '.join(trained) or 'none'}, evaluated: {', '.join(evaluated) or 'none'}"


def read_scores(run: Path) -> dict[str, Any]:
    """Returns `models`, `comparisons` and `stages` of a finished run, with the metrics of each stage's last update."""
    folder = RunFolder(run)
    report = read_json_object(folder.report)
    stages = [
        {key: stage[key] for key in ("name", "objective", "start", "steps", "seconds")}
        | {"last_update": read_metrics(folder.stage(stage["name"]).metrics)[-1]}
        for stage in report["stages"]
    ]
    models = {name: scores[BENCHMARK] for name, scores in report["models"].items()}
    return {"models": models, "comparisons": report["comparisons"], "stages": stages}


def pool_seeds(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the comparisons over several finished runs, as `evaluate --pool` does. No runs give no comparisons."""
    folders = [RunFolder(run) for run in runs]
    comparisons: list[dict[str, Any]] = []
    for before, after in COMPARISONS if folders else ():
        pairs = [
            (read_answers(folder.answers(before) / file), read_answers(folder.answers(after) / file))
            for folder in folders
            for file in [f"{BENCHMARK}.json"]
        ]
        comparisons.append({"from": before, "to": after, **asdict(compare_pooled_runs(pairs))})
    return comparisons


def quality_table(result: Mapping[str, Any]) -> str:
    """Returns the scores of each seed, the pooled comparisons and the unfinished seeds as Markdown."""
    lines = ["| seed | model | accuracy % (95 % interval) | response tokens | truncated % |", "|---|---|---|--:|--:|"]
    for seed, scores in result["seeds"].items():
        for name, score in scores["models"].items():
            accuracy, low, high = (100 * rate for rate in (score["accuracy"], *score["ci95"]))
            lengths = f"{score['mean_response_tokens']:.1f} | {100 * score['truncation_rate']:.1f}"
            lines.append(f"| {seed} | {name} | {accuracy:.1f} ({low:.1f} to {high:.1f}) | {lengths} |")
    if result["pooled"]:
        header = f"comparison, {len(result['seeds'])} seed(s) | accuracy, points (95 % interval) | p | response tokens"
        lines += ["", f"| {header} (95 % interval) |", "|---|---|--:|---|"]
    for row in result["pooled"]:
        points = [100 * value for value in (row["accuracy_difference"], *row["ci95"])]
        tokens = (row["response_tokens_difference"], *row["response_tokens_ci95"])
        points_text, tokens_text = ("{:+.1f} ({:+.1f} to {:+.1f})".format(*values) for values in (points, tokens))
        lines.append(f"| {row['from']} to {row['to']} | {points_text} | {row['p_value']:.2g} | {tokens_text} |")
    if result["unfinished"]:
        lines += ["", *(f"- Seed {seed} did not finish: {why}" for seed, why in result["unfinished"].items())]
    return "\n".join(lines) + "\n"
