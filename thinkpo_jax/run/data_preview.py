"""What will the model read? All of a run that needs no device, looked at before it starts: `train --check`."""

import os
import sys
from collections.abc import Iterator

import numpy as np
import yaml

from thinkpo_jax.data.batches import Batches
from thinkpo_jax.data.chat_tokenizer import Chat
from thinkpo_jax.data.examples import Example, Examples
from thinkpo_jax.data.packing import pack
from thinkpo_jax.models.model_folder import check_folder, find_model
from thinkpo_jax.run.evaluate_run import read_questions
from thinkpo_jax.run.resolve import warn_of_lengths
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.run.stage_data import _answers, _unfinished, not_trained, pointless, prepared
from thinkpo_jax.runtime.config import RunError, together
from thinkpo_jax.training.stage_config import Stage, ThinkpoStage

SHOWN = (1200, 600)  # characters of a text that are shown: from its start, from its end
PERCENTILES = (5, 50, 95, 99)
LONGER, ROW_MULTIPLE = (1.25, 1.5, 2), 256  # longer rows that are tried, in what attention kernels take
READ, TRAINED, PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"  # how a terminal tells them apart


def check_run(config: RunConfig) -> None:
    """Prints what a run would read and train on. Raises `RunError` with all that would make it pointless."""
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None))
    arch, chat = check_folder(find_model(config.model.path, weights=False), weights=False)
    warn_of_lengths(config, arch)
    keeps = "keeps" if chat.keeps_thinking() else "drops"
    print(f"chat template: {keeps} the thinking of an answer it renders; here answers are appended as ids, whole\n")
    problems: list[str] = []
    with together() as attempt:
        for stage in config.stages:
            examples = attempt(prepared, config, stage, chat, keep_going=True)
            if examples is None:
                continue
            print(f"stage {stage.name} ({stage.objective})")
            for line in _stage_lines(config, stage, chat, examples):
                print(f"  {line}".rstrip())
            print()
            problems += pointless(stage, examples)
        for name, questions in (attempt(read_questions, config, chat) or {}).items():
            lengths = [len(chat.prompt(question.messages).ids) for question in questions]
            print(f"benchmark {name}: {len(questions)} questions, prompts of up to {max(lengths)} tokens")
    if problems:
        raise RunError("\n".join(problems))


def _stage_lines(config: RunConfig, stage: Stage, chat: Chat, examples: Examples) -> Iterator[str]:
    yield from examples.notes()
    skipped = [
        first for report in examples.reports for reason, first in report.bad.items() if reason not in report.fatal
    ]
    yield from (f"skipped, the first of its kind: {first}" for first in skipped)
    if not len(examples):
        return
    yield f"{len(examples)} examples in an epoch"
    yield from _length_table(stage, examples.spans())
    for name, number in zip(_answers(stage), range(2), strict=False):
        ended = np.mean([example[number].tokens[-1] == chat.end_id for example in examples])
        yield f"{name} answers with an end token: {ended:.1%}"
    unfinished, kept = _unfinished(examples)
    yield f"{_answers(stage)[0]} answers that begin to think and do not end that: {unfinished} of {kept}"
    epochs = stage.epochs or 1.0
    apart = not_trained(config, stage, examples)
    options = {"seed": config.seed, "shards": 1, "steps": stage.steps, "epochs": epochs, "held_out": apart}
    batches = Batches(examples, stage.batch, **options)
    yield f"on one device: {batches.describe()}"
    yield "full rows: " + ", ".join(f"{fill:.1%} of {length} tokens" for length, fill in _fills(batches))
    yield from _first_example(stage, chat, examples[0])


def _length_table(stage: Stage, spans: np.ndarray) -> Iterator[str]:
    """Percentiles of the tokens of prompt and answers; an answer's end token counts."""
    columns = {"prompt": spans[:, 0, 0]} | {name: spans[:, i, 1] for i, name in enumerate(_answers(stage))}
    if isinstance(stage, ThinkpoStage):
        columns["chosen - rejected"] = spans[:, 0, 1] - spans[:, 1, 1]
    heads = ["mean", "min", *(f"{p} %" for p in PERCENTILES), "max"]
    yield f"{'tokens':<18}" + "".join(f"{head:>9}" for head in heads)
    for name, values in columns.items():
        row = [values.mean(), values.min(), *np.percentile(values, PERCENTILES, method="nearest"), values.max()]
        yield f"{name:<18}" + "".join(f"{value:>9.0f}" for value in row)


def _fills(batches: Batches) -> Iterator[tuple[int, float]]:
    """Which share of their tokens packed rows hold, at this and at greater row lengths."""
    lengths, everything, shortest = batches.sizes[:, :1], np.arange(len(batches.sizes)), batches.config.row_length
    longer = {round(factor * shortest / ROW_MULTIPLE) * ROW_MULTIPLE for factor in LONGER}
    for length in (shortest, *sorted(length for length in longer if length > shortest)):
        yield length, lengths.sum() / (len(pack(lengths, (length,), everything)) * length)


def _first_example(stage: Stage, chat: Chat, example: Example) -> Iterator[str]:
    colours = "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    read, trained, plain = (READ, TRAINED, PLAIN) if colours else ("", "[[", "]]")
    how = "dim, bold green" if colours else "plain, [[...]]"
    yield f"the first example (read, trained: {how}):"
    for name, segment in zip(_answers(stage), example, strict=True):
        start = segment.answer_start
        texts = [
            _shortened(chat.tokenizer.decode(ids, skip_special_tokens=False))
            for ids in (segment.tokens[:start], segment.tokens[start:])
        ]
        before = f"{read}{texts[0]}{plain if colours else ''}"
        yield from ("", f"--- {name}", *f"{before}{trained}{texts[1]}{plain}".split("\n"))


def _shortened(text: str) -> str:
    first, last = SHOWN
    if len(text) <= first + last:
        return text
    return f"{text[:first]}\n[... {len(text) - first - last:,} characters ...]\n{text[-last:]}"
