"""What will the model read? All of a run that needs no device, looked at before it starts: `train --check`."""

import os
import sys
from collections.abc import Iterator

import numpy as np
import yaml

from thinkpo_jax.chat import Chat
from thinkpo_jax.config import RunError, UserError, together
from thinkpo_jax.data import Example, Examples, prepare
from thinkpo_jax.evaluate import read_questions
from thinkpo_jax.folder import find_model
from thinkpo_jax.packing import Batches, held_out, pack
from thinkpo_jax.run import RunConfig, Stage, ThinkpoStage, check_folder, warn_of_lengths

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


def prepared(config: RunConfig, stage: Stage, chat: Chat, *, keep_going: bool = False) -> Examples:
    """The tokenised examples of a stage; see `prepare`. Raises `UserError` that names the stage."""
    options = {"row_length": stage.batch.row_length, "seed": config.seed, "title": f"{stage.name} data"}
    try:
        return prepare(stage.data, chat, **options, keep_going=keep_going)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def not_trained(config: RunConfig, stage: Stage, examples: Examples) -> np.ndarray:
    """The indices of the examples that a stage holds out; none without `validation`. Raises `UserError`."""
    if stage.validation is None:
        return np.zeros(0, np.int64)
    try:
        return held_out(examples, stage.validation.share, seed=config.seed)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


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


def _answers(stage: Stage) -> tuple[str, ...]:
    return ("chosen", "rejected") if isinstance(stage, ThinkpoStage) else ("response",)


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


def _unfinished(examples: Examples) -> tuple[int, int]:
    """How many (chosen) answers do not end the thinking that they begin, of how many rows."""
    return sum(report.open_thinking for report in examples.reports), sum(report.kept for report in examples.reports)


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


def pointless(stage: Stage, examples: Examples) -> list[str]:
    """What would stop a stage, or make it pointless."""
    found = [
        f"{report.name}: {report.dropped[reason]} rows: {reason}; the first: {first}"
        for report in examples.reports
        for reason, first in report.fatal.items()
    ]
    if not len(examples):
        found.append("no example is left. Raise batch.row_length, or mend the data.")
    unfinished, kept = _unfinished(examples)
    if 2 * unfinished > kept:
        found.append(
            f"{unfinished} of {kept} {_answers(stage)[0]} answers begin to think and never end that: the model would "
            "learn not to come to an end. Leave cut answers out."
        )
    if isinstance(stage, ThinkpoStage):
        spans = examples.spans()
        shorter = int((spans[:, 0, 1] < spans[:, 1, 1]).sum())
        if 2 * shorter > len(spans):
            found.append(
                f"chosen is shorter than rejected in {shorter} of {len(spans)} pairs: ThinkPO prefers the long answer. "
                "Unless this is the control of swapped pairs, `chosen` and `rejected` are the wrong way round."
            )
    return [f"stage {stage.name}: {problem}" for problem in found]
