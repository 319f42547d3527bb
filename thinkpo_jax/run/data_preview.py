"""Shows what a run would train on before it starts: `train --check`. Uses no device."""

import os
import sys
from collections.abc import Iterator

import numpy as np
import yaml

from thinkpo_jax.data.batches import BatchPlan, pack_best_fit
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.examples import Example, TokenizedDataset
from thinkpo_jax.models.model_folder import resolve_model_source
from thinkpo_jax.models.safetensors_files import find_weight_problems
from thinkpo_jax.run.evaluate_run import load_all_questions
from thinkpo_jax.run.resolve import check_evaluation_engine, find_length_warnings
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.run.stage_checks import (
    ROW_MULTIPLE,
    answer_names,
    count_unclosed_thoughts,
    find_stage_problems,
    find_stage_warnings,
)
from thinkpo_jax.run.stage_data import held_out_indices, tokenize_stage_data
from thinkpo_jax.runtime.config import RunError, collect_errors
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.training.stage_config import StageConfig, ThinkpoStage

PREVIEW_CHARACTERS = (1200, 600)  # shown of a long text: from its start, from its end
PERCENTILES = (5, 50, 95, 99)
ROW_LENGTH_FACTORS = (1.25, 1.5, 2)  # of the configured row length
STYLE_CONTEXT, STYLE_TRAINED, STYLE_RESET = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"  # of a terminal


def preview_run_data(config: RunConfig) -> None:
    """Prints what a run would read and train on. Uses no device.

    Raises `UserError` if the model, data or questions cannot be read. Raises `RunError`, which lists what would stop a
    stage, or would make its training useless.
    """
    check_evaluation_engine(config)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None))
    source = resolve_model_source(config.model, seed=config.seed, require_weights=False)
    tokenizer = source.tokenizer
    keeps = "keeps" if tokenizer.template.keeps_earlier_thoughts() else "drops"
    print(
        f"chat template: {keeps} the thinking of earlier answers. The last answer does not pass through it, so it "
        "stays whole.\n"
    )
    problems: list[str] = []
    warnings: list[str] = []
    if config.model.weights == "pretrained":
        warnings += find_weight_problems(source.folder)
    longest_prompt = 0
    with collect_errors() as collector:
        questions_by_name = collector(load_all_questions, config, {config.base_name: tokenizer}) or {}
        for stage in config.stages:
            dataset = collector(tokenize_stage_data, stage, tokenizer, seed=config.seed, keep_going=True)
            if dataset is None:
                continue
            print(f"stage {stage.name} ({stage.objective})")
            batches = _plan_batches(stage, dataset, seed=config.seed) if len(dataset) else None
            for line in _stage_lines(stage, tokenizer, dataset, batches):
                print(f"  {line}".rstrip())
            print()
            problems += find_stage_problems(stage, dataset)
            if batches is not None:
                warnings += find_stage_warnings(stage, dataset, tokenizer, questions_by_name)
                warnings += _warn_of_one_update_per_epoch(stage, batches)
        for name, questions in questions_by_name.items():
            lengths = [len(tokenizer.encode_prompt(question.messages).ids) for question in questions]
            longest_prompt = max(longest_prompt, *lengths)
            print(f"benchmark {name}: {len(questions)} questions, prompts of up to {max(lengths)} tokens")
        sys.stdout.flush()  # the warnings are on stderr, and come last
        for warning in [*warnings, *find_length_warnings(config, source.architecture, longest_prompt=longest_prompt)]:
            log_warning(warning)
    if problems:
        raise RunError("\n".join(problems))


def _plan_batches(stage: StageConfig, dataset: TokenizedDataset, *, seed: int) -> BatchPlan:
    held_out, epochs = held_out_indices(stage, dataset, seed=seed), stage.epochs or 1.0
    return BatchPlan(
        dataset, stage.batch, seed=seed, num_shards=1, num_updates=stage.steps, epochs=epochs, held_out=held_out
    )


def _warn_of_one_update_per_epoch(stage: StageConfig, batches: BatchPlan) -> Iterator[str]:
    num_examples = len(batches.train_indices)
    if stage.epochs is not None and batches.updates_per_epoch == 1 and num_examples > 1:
        key = "size" if stage.batch.size is not None else "rows"
        yield (
            f"stage {stage.name}: one batch holds all {num_examples} examples, so an epoch is one update. The stage "
            f"has {len(batches)} in total. Decrease batch.{key} to have more updates."
        )


def _stage_lines(
    stage: StageConfig, tokenizer: ChatTokenizer, dataset: TokenizedDataset, batches: BatchPlan | None
) -> Iterator[str]:
    yield from dataset.describe_sources()
    for report in dataset.reports:
        for reason, first in report.first_error_by_reason.items():
            if reason not in report.stopping_error_by_reason:
                yield f"skipped, the first of its kind: {first}"
    if batches is None:  # no example is left
        return
    yield f"{len(dataset)} examples in an epoch"
    yield from _length_table(stage, dataset.prompt_and_answer_lengths())
    for number, name in enumerate(answer_names(stage)):
        ended = np.mean([example[number].token_ids[-1] == tokenizer.end_of_turn_id for example in dataset])
        yield f"{name} answers with an end token: {ended:.1%}"
    num_unclosed, num_rows = count_unclosed_thoughts(dataset)
    yield f"{answer_names(stage)[0]} answers that open a thought and never close it: {num_unclosed} of {num_rows}"
    yield f"on one device: {batches.describe()}"
    yield f"packing: {', '.join(_packing_by_length(batches))}"
    yield from _first_example(stage, tokenizer, dataset[0])


def _length_table(stage: StageConfig, lengths: np.ndarray) -> Iterator[str]:
    """Yields percentiles of the tokens of prompts and answers. The end token of an answer counts."""
    columns = {"prompt": lengths[:, 0, 0]} | {name: lengths[:, i, 1] for i, name in enumerate(answer_names(stage))}
    if isinstance(stage, ThinkpoStage):
        columns["chosen - rejected"] = lengths[:, 0, 1] - lengths[:, 1, 1]
    heads = ["mean", "min", *(f"{p} %" for p in PERCENTILES), "max"]
    yield f"{'tokens':<18}" + "".join(f"{head:>9}" for head in heads)
    for name, values in columns.items():
        row = [values.mean(), values.min(), *np.percentile(values, PERCENTILES, method="nearest"), values.max()]
        yield f"{name:<18}" + "".join(f"{value:>9.0f}" for value in row)


def _packing_by_length(batches: BatchPlan) -> Iterator[str]:
    """Yields the fraction of tokens that is not padding, for the configured and longer row lengths."""
    lengths, indices, row_length = batches.sizes[:, :1], np.arange(len(batches.sizes)), batches.config.row_length
    longer = {round(factor * row_length / ROW_MULTIPLE) * ROW_MULTIPLE for factor in ROW_LENGTH_FACTORS}
    for length in (row_length, *sorted(length for length in longer if length > row_length)):
        num_rows = len(pack_best_fit(lengths, (length,), indices))
        yield f"{lengths.sum() / (num_rows * length):.1%} of {length} tokens"


def _first_example(stage: StageConfig, tokenizer: ChatTokenizer, example: Example) -> Iterator[str]:
    has_colors = "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    context, trained, reset = (STYLE_CONTEXT, STYLE_TRAINED, STYLE_RESET) if has_colors else ("", "[[", "]]")
    legend = "context is dim, trained tokens are bold green" if has_colors else "trained tokens in [[...]]"
    yield f"the first example ({legend}):"
    for name, segment in zip(answer_names(stage), example, strict=True):
        text, end = "", 0
        for start, stop in segment.loss_spans:
            before, answer = (
                _shortened(tokenizer.tokenizer.decode(segment.token_ids[part], skip_special_tokens=False))
                for part in (slice(end, start), slice(start, stop))
            )
            text += f"{context}{before}{reset if has_colors else ''}{trained}{answer}{reset}"
            end = stop
        yield from ("", f"--- {name}", *text.split("\n"))


def _shortened(text: str) -> str:
    first, last = PREVIEW_CHARACTERS
    if len(text) <= first + last:
        return text
    return f"{text[:first]}\n[... {len(text) - first - last:,} characters ...]\n{text[-last:]}"
