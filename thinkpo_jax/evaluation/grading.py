"""Graders, which compare responses with reference answers.

A response must give its answer in the form that the prompt asks for. `Grade.correct` never falls back to the last
number of a text, because a truncated response must not be right by chance. `Grade.lenient_correct` does.
"""

import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pebble

from thinkpo_jax.evaluation.answer_extraction import (
    extract_boxed,
    extract_lenient,
    extract_lenient_letter,
    extract_letter,
)
from thinkpo_jax.evaluation.answer_forms import normalize, squeeze
from thinkpo_jax.runtime.console import ProgressReporter

GRADING_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Reference:
    """What a right answer gives: all of `answers`, in any order. One text may list several, such as `$69$,$84$`.

    `tolerances` are the absolute errors that its numbers may have: one for each number, one for all, or none.
    """

    answers: tuple[str, ...]
    tolerances: tuple[float, ...] = ()


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    `extracted` is the answer that was read in it, None if there is none. `lenient_correct` is the verdict on the answer
    that the paper's grader reads, None without such a grader.
    """

    extracted: str | None
    correct: bool
    lenient_correct: bool | None = None


Grader = Callable[[Sequence[str], Sequence[Reference]], list[Grade]]
Compare = Callable[[Sequence[str | None], Sequence[Reference]], list[bool]]


def grade_marked(responses: Sequence[str], references: Sequence[Reference]) -> list[Grade]:
    """Returns whether each response ends in `#` and exactly the reference."""
    grades: list[Grade] = []
    for response, reference in zip(responses, references, strict=True):
        (answer,), (_, mark, extracted) = reference.answers, response.rpartition("#")
        grades.append(Grade(extracted if mark else None, response.endswith("#" + answer)))
    return grades


def grade_boxed(responses: Sequence[str], references: Sequence[Reference]) -> list[Grade]:
    """Returns whether the boxed answer of each response equals the reference, see `compare_answers`."""
    strict = [extract_boxed(response) for response in responses]
    lenient = [extract_lenient(response) for response in responses]
    return _grade_answers(strict, lenient, references, compare_answers)


def grade_letter(responses: Sequence[str], references: Sequence[Reference]) -> list[Grade]:
    """Returns whether each response boxes the letter of the right choice, see `extract_letter`."""
    strict = [extract_letter(response) for response in responses]
    lenient = [extract_lenient_letter(response) for response in responses]
    return _grade_answers(strict, lenient, references, _compare_letters)


def _grade_answers(
    strict: Sequence[str | None], lenient: Sequence[str | None], references: Sequence[Reference], compare: Compare
) -> list[Grade]:
    """Returns the grades of both readings of the responses. Equal readings are compared once."""
    rows = list(zip(strict, lenient, references, strict=True))
    further = {i: (weak, reference) for i, (answer, weak, reference) in enumerate(rows) if _differs(answer, weak)}
    pairs = [*((answer, reference) for answer, _, reference in rows), *further.values()]
    verdicts = compare([answer for answer, _ in pairs], [reference for _, reference in pairs])
    lenient_verdicts = dict(zip(further, verdicts[len(rows) :], strict=True))
    return [
        Grade(answer, verdicts[i], lenient_correct=lenient_verdicts.get(i, verdicts[i]))
        for i, answer in enumerate(strict)
    ]


def _differs(answer: str | None, other: str | None) -> bool:
    return answer != other and (answer is None or other is None or not _is_same_text(answer, other))


def _compare_letters(answers: Sequence[str | None], references: Sequence[Reference]) -> list[bool]:
    return [(answer,) == reference.answers for answer, reference in zip(answers, references, strict=True)]


def compare_answers(answers: Sequence[str | None], references: Sequence[Reference]) -> list[bool]:
    """Returns whether each answer equals the reference as mathematics, see `are_equal`. A missing answer does not.

    Answers that differ as text are compared in worker processes, one limit of `GRADING_TIMEOUT_SECONDS` per answer. A
    process that exceeds it is killed and the answer counts as wrong. So 9^{9^{9^9}} cannot block an evaluation.
    """
    pairs = [(answer, ", ".join(reference.answers)) for answer, reference in zip(answers, references, strict=True)]
    is_correct = [answer is not None and _is_same_text(answer, expected) for answer, expected in pairs]
    pending = [i for i, answer in enumerate(answers) if answer is not None and not is_correct[i]]
    if not pending:
        return is_correct
    limit = GRADING_TIMEOUT_SECONDS
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX's threads may hang
    with pebble.ProcessPool(max_workers=min(2, len(pending)), initializer=_init_worker, context=context) as pool:
        futures = [
            pool.schedule(_is_equal_math, args=(*pairs[i], references[i].tolerances), timeout=limit) for i in pending
        ]
        progress = ProgressReporter("answers compared", len(pending), unit="answer")
        try:
            for num_done, (i, future) in enumerate(zip(pending, futures, strict=True), 1):
                with contextlib.suppress(TimeoutError, pebble.ProcessExpired):
                    is_correct[i] = future.result()
                if num_done < len(pending):  # the last update always prints, so short gradings would not be silent
                    progress.update(num_done)
        except BaseException:
            pool.stop()  # otherwise leaving the pool waits for all remaining answers
            raise
        progress.close()
    return is_correct


def _is_same_text(answer: str, reference: str) -> bool:
    return squeeze(normalize(answer)) == squeeze(normalize(reference))


def _init_worker() -> None:
    # The import takes a second, which must not count against the first answer's limit.
    import thinkpo_jax.evaluation.answer_equality  # noqa: F401 - see above

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C and stops the workers
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are switched off


def _is_equal_math(answer: str, reference: str, tolerances: Sequence[float]) -> bool:
    from thinkpo_jax.evaluation.answer_equality import are_equal  # not above: only the workers need SymPy

    try:
        return are_equal(answer, reference, tolerances)
    except Exception:  # a model can write anything, and SymPy raises anything
        return False
