"""What will the model read? All of a run that needs no device, looked at before it starts: `train --check`."""

import os
import sys
from collections.abc import Iterator

import numpy as np
import yaml

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import Example, TokenizedDataset
from thinkpo_jax.data.packing import pack_best_fit
from thinkpo_jax.models.model_folder import check_folder, resolve_model_folder
from thinkpo_jax.run.evaluate_run import load_all_questions
from thinkpo_jax.run.resolve import warn_if_rows_exceed_model
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.run.stage_data import (
    answer_names,
    count_unclosed_thoughts,
    find_stage_problems,
    held_out_indices,
    tokenize_stage_data,
)
from thinkpo_jax.runtime.config import RunError, collect_errors
from thinkpo_jax.training.stage_config import StageConfig, ThinkpoStage

PREVIEW_CHARACTERS = (1200, 600)  # characters of a text that are shown: from its start, from its end
PERCENTILES = (5, 50, 95, 99)
ROW_LENGTH_FACTORS, ROW_MULTIPLE = (1.25, 1.5, 2), 256  # longer rows that are tried, in what attention kernels take
STYLE_CONTEXT, STYLE_TRAINED, STYLE_RESET = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"  # how a terminal tells them apart


def preview_run_data(config: RunConfig) -> None:
    """Prints what a run would read and train on. Raises `RunError` with all that would make it pointless."""
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None))
    arch, chat = check_folder(resolve_model_folder(config.model.path, weights=False), weights=False)
    warn_if_rows_exceed_model(config, arch)
    keeps = "keeps" if chat.template_keeps_thoughts() else "drops"
    print(f"chat template: {keeps} the thinking of an answer it renders; here answers are appended as ids, whole\n")
    problems: list[str] = []
    with collect_errors() as attempt:
        for stage in config.stages:
            examples = attempt(tokenize_stage_data, config, stage, chat, keep_going=True)
            if examples is None:
                continue
            print(f"stage {stage.name} ({stage.objective})")
            for line in _stage_lines(config, stage, chat, examples):
                print(f"  {line}".rstrip())
            print()
            problems += find_stage_problems(stage, examples)
        for name, questions in (attempt(load_all_questions, config, chat) or {}).items():
            lengths = [len(chat.encode_prompt(question.messages).ids) for question in questions]
            print(f"benchmark {name}: {len(questions)} questions, prompts of up to {max(lengths)} tokens")
    if problems:
        raise RunError("\n".join(problems))


def _stage_lines(
    config: RunConfig, stage: StageConfig, chat: ChatTokenizer, examples: TokenizedDataset
) -> Iterator[str]:
    yield from examples.describe_sources()
    skipped = [
        first
        for report in examples.reports
        for reason, first in report.first_error_by_reason.items()
        if reason not in report.stopping_error_by_reason
    ]
    yield from (f"skipped, the first of its kind: {first}" for first in skipped)
    if not len(examples):
        return
    yield f"{len(examples)} examples in an epoch"
    yield from _length_table(stage, examples.prompt_and_answer_lengths())
    for name, number in zip(answer_names(stage), range(2), strict=False):
        ended = np.mean([example[number].token_ids[-1] == chat.end_of_turn_id for example in examples])
        yield f"{name} answers with an end token: {ended:.1%}"
    unfinished, kept = count_unclosed_thoughts(examples)
    yield f"{answer_names(stage)[0]} answers that begin to think and do not end that: {unfinished} of {kept}"
    epochs = stage.epochs or 1.0
    apart = held_out_indices(config, stage, examples)
    options = {"seed": config.seed, "num_shards": 1, "num_updates": stage.steps, "epochs": epochs, "held_out": apart}
    batches = BatchPlan(examples, stage.batch, **options)
    yield f"on one device: {batches.describe()}"
    yield "full rows: " + ", ".join(f"{fill:.1%} of {length} tokens" for length, fill in _fills(batches))
    yield from _first_example(stage, chat, examples[0])


def _length_table(stage: StageConfig, spans: np.ndarray) -> Iterator[str]:
    """Percentiles of the tokens of prompt and answers; an answer's end token counts."""
    columns = {"prompt": spans[:, 0, 0]} | {name: spans[:, i, 1] for i, name in enumerate(answer_names(stage))}
    if isinstance(stage, ThinkpoStage):
        columns["chosen - rejected"] = spans[:, 0, 1] - spans[:, 1, 1]
    heads = ["mean", "min", *(f"{p} %" for p in PERCENTILES), "max"]
    yield f"{'tokens':<18}" + "".join(f"{head:>9}" for head in heads)
    for name, values in columns.items():
        row = [values.mean(), values.min(), *np.percentile(values, PERCENTILES, method="nearest"), values.max()]
        yield f"{name:<18}" + "".join(f"{value:>9.0f}" for value in row)


def _fills(batches: BatchPlan) -> Iterator[tuple[int, float]]:
    """Which share of their tokens packed rows hold, at this and at greater row lengths."""
    lengths, everything, shortest = batches.sizes[:, :1], np.arange(len(batches.sizes)), batches.config.row_length
    longer = {round(factor * shortest / ROW_MULTIPLE) * ROW_MULTIPLE for factor in ROW_LENGTH_FACTORS}
    for length in (shortest, *sorted(length for length in longer if length > shortest)):
        yield length, lengths.sum() / (len(pack_best_fit(lengths, (length,), everything)) * length)


def _first_example(stage: StageConfig, chat: ChatTokenizer, example: Example) -> Iterator[str]:
    colours = "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    read, trained, plain = (STYLE_CONTEXT, STYLE_TRAINED, STYLE_RESET) if colours else ("", "[[", "]]")
    how = "dim, bold green" if colours else "plain, [[...]]"
    yield f"the first example (read, trained: {how}):"
    for name, segment in zip(answer_names(stage), example, strict=True):
        start = segment.answer_start
        texts = [
            _shortened(chat.tokenizer.decode(ids, skip_special_tokens=False))
            for ids in (segment.token_ids[:start], segment.token_ids[start:])
        ]
        before = f"{read}{texts[0]}{plain if colours else ''}"
        yield from ("", f"--- {name}", *f"{before}{trained}{texts[1]}{plain}".split("\n"))


def _shortened(text: str) -> str:
    first, last = PREVIEW_CHARACTERS
    if len(text) <= first + last:
        return text
    return f"{text[:first]}\n[... {len(text) - first - last:,} characters ...]\n{text[-last:]}"
