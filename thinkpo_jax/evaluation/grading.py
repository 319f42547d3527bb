"""Graders, which compare responses with reference answers.

A response must give its answer in the form that the prompt asks for. No grader falls back to the last number of a text,
because a truncated response must not be right by chance.
"""

import contextlib
import logging
import multiprocessing
import re
import signal
from collections.abc import Sequence
from typing import Any

import pebble

from thinkpo_jax.runtime.console import ProgressReporter

GRADING_TIMEOUT_SECONDS = 10.0


def grade_marked(responses: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Returns whether each response ends in `#` and exactly the reference."""
    return [response.endswith("#" + reference) for response, reference in zip(responses, references, strict=True)]


def extract_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` of a text, or None if there is none or it is not closed."""
    _, box, rest = text.rpartition("\\boxed{")
    if not box:
        return None
    depth = 1
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are characters of the answer, not brackets
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return rest[: match.start()].strip()
    return None


def grade_boxed(responses: Sequence[str], references: Sequence[str]) -> list[bool]:
    r"""Returns whether the boxed answer of each response equals the reference as mathematics (math-verify).

    Answers that differ as text are compared in worker processes, one limit of `GRADING_TIMEOUT_SECONDS` per answer. A
    process that exceeds it is killed and the answer counts as wrong. So 9^{9^{9^9}} cannot block an evaluation.
    """
    answers = [extract_boxed(response) for response in responses]
    is_correct = [a is not None and _normalize(a) == _normalize(r) for a, r in zip(answers, references, strict=True)]
    pending = [i for i, answer in enumerate(answers) if answer is not None and not is_correct[i]]
    if not pending:
        return is_correct
    limit = GRADING_TIMEOUT_SECONDS
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX's threads may hang
    with pebble.ProcessPool(max_workers=min(2, len(pending)), initializer=_init_worker, context=context) as pool:
        futures = [pool.schedule(_is_equal_math, args=(answers[i], references[i]), timeout=limit) for i in pending]
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


def _normalize(text: str) -> str:
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)|\$", "", text)  # "1 2" is not 12
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def _init_worker() -> None:
    import math_verify  # noqa: F401 - it takes seconds, which must not count against the first answer's limit

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C and stops the workers
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing limits of `_is_equal_math`


def _is_equal_math(answer: str, reference: str) -> bool:
    import math_verify

    # math-verify's own limits need signals and the main thread. The pool kills the process instead.
    limits: Any = {"parsing_timeout": None}
    parsed = [math_verify.parse(f"\\boxed{{{text}}}", **limits) for text in (reference, answer)]
    return math_verify.verify(parsed[0], parsed[1], timeout_seconds=None)
