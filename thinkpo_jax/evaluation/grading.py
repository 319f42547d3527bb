"""Is this answer right? Checkers take a response and the reference answer; a wrong form is a wrong answer.

No checker falls back to the last number of a text: a response that was cut off must not be right by chance.
"""

import logging
import re
import signal
from collections.abc import Sequence
from concurrent.futures import TimeoutError as CheckTimeout
from typing import Any

import pebble

from thinkpo_jax.runtime.console import ProgressReporter

GRADING_TIMEOUT_SECONDS = 10.0


def grade_marked(responses: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each response ends in `#` and exactly the reference."""
    return [response.endswith("#" + reference) for response, reference in zip(responses, references, strict=True)]


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` of a text; None where there is none or it is not closed."""
    _, box, rest = text.rpartition("\\boxed{")
    if not box:
        return None
    depth = 1
    for found in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are signs, not brackets
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return rest[: found.start()].strip()
    return None


def grade_boxed(responses: Sequence[str], references: Sequence[str]) -> list[bool]:
    r"""Whether the boxed answer of each response equals the reference as mathematics (math-verify).

    Answers that differ as text are compared in processes of their own that are killed after `GRADING_TIMEOUT_SECONDS`: an
    expression such as 9^{9^{9^9}} counts as wrong instead of stopping the evaluation.
    """
    found = [extract_boxed(response) for response in responses]
    results = [
        answer is not None and _normalize(answer) == _normalize(ref)
        for answer, ref in zip(found, references, strict=True)
    ]
    open_ids = [i for i, answer in enumerate(found) if answer is not None and not results[i]]
    if not open_ids:
        return results
    with pebble.ProcessPool(max_workers=min(2, len(open_ids)), initializer=_prepare, context=_spawn()) as pool:
        waiting = [
            pool.schedule(_is_equal_math, args=(found[i], references[i]), timeout=GRADING_TIMEOUT_SECONDS)
            for i in open_ids
        ]
        progress = ProgressReporter("answers compared", len(open_ids), unit="answer")
        try:
            for number, (i, future) in enumerate(zip(open_ids, waiting, strict=True), 1):
                try:
                    results[i] = future.result()
                except (CheckTimeout, pebble.ProcessExpired):
                    results[i] = False
                if number < len(open_ids):  # a quick check says nothing
                    progress.update(number)
        except BaseException:
            pool.stop()  # leaving it would wait for all that is left
            raise
        progress.close()
    return results


def _spawn() -> Any:
    import multiprocessing

    return multiprocessing.get_context("spawn")  # a fork of a process that runs JAX's threads may hang


def _normalize(text: str) -> str:
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)|\$", "", text)  # "1 2" is not 12
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def _prepare() -> None:
    """Imports what takes seconds before the clock of an answer starts."""
    import math_verify  # noqa: F401 - imported for `_equal`

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    # It warns at every answer that it has no time limit of its own; see below.
    logging.getLogger("math_verify").setLevel(logging.ERROR)


def _is_equal_math(answer: str, reference: str) -> bool:
    import math_verify

    # No time limits of its own: they need signals and the main thread; the process is killed instead.
    limits: Any = {"parsing_timeout": None}
    parsed = [math_verify.parse(f"\\boxed{{{text}}}", **limits) for text in (reference, answer)]
    return math_verify.verify(parsed[0], parsed[1], timeout_seconds=None)
