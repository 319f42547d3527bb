"""Packs examples into rows, and splits off held-out examples by prompt."""

import bisect
from collections.abc import Sequence

import numpy as np
import pydantic

from thinkpo_jax.data.examples import Example
from thinkpo_jax.runtime.config import ConfigSection, UserError


class ValidationConfig(ConfigSection):
    """Examples that are held out to compute loss and metrics on unseen data.

    `share` is the fraction of examples that is held out. Examples with the same prompt are held out together.
    They are evaluated before the first update, after every `every` updates, and after the last update.
    """

    share: float = pydantic.Field(gt=0, le=0.5)
    every: int = pydantic.Field(default=50, ge=1)


def pack_best_fit(sizes: np.ndarray, limits: Sequence[int], order: np.ndarray) -> list[list[int]]:
    """Packs the examples of `order` into rows by best fit, longest first. Returns the example indices of each row.

    `sizes` [n, k] says how much of k resources each example needs. The first one is its length, which decides the fit.
    `limits` [k] says how much of each resource a row has. Only a row with a single example may exceed them.
    Examples of equal length are packed in the order of `order`.
    """
    rows: list[list[int]] = []
    remaining: list[np.ndarray] = []  # by row: what is left of `limits`
    free_tokens: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(order.tolist(), key=lambda i: -sizes[i, 0]):
        for position in range(bisect.bisect_left(free_tokens, (int(sizes[index, 0]), -1)), len(free_tokens)):
            row = free_tokens[position][1]
            if (remaining[row] >= sizes[index]).all():
                del free_tokens[position]
                break
        else:
            row = len(rows)
            rows.append([])
            remaining.append(np.array(limits, np.int64))
        rows[row].append(index)
        remaining[row] = remaining[row] - sizes[index]
        bisect.insort(free_tokens, (int(remaining[row][0]), row))
    return rows


def split_held_out(examples: Sequence[Example], fraction: float, *, seed: int) -> np.ndarray:
    """Returns sorted indices of the validation examples, about `fraction` of all.

    Examples with the same prompt are held out together, so no prompt is in both training and validation. Prompts are
    drawn at random. A prompt that would overshoot the target by more than half its examples is skipped. If every prompt
    is skipped, the prompt with the fewest examples is held out. Raises `UserError` if all examples have the same
    prompt.
    """
    indices_by_prompt: dict[bytes, list[int]] = {}
    for index, (segment, *_) in enumerate(examples):
        indices_by_prompt.setdefault(segment.token_ids[: segment.answer_start].tobytes(), []).append(index)
    groups = list(indices_by_prompt.values())
    if len(groups) < 2:
        raise UserError("validation: all examples have the same prompt. Remove `validation`, or add other prompts.")
    held_out: list[int] = []
    for number in np.random.default_rng((seed, len(examples))).permutation(len(groups)).tolist():
        if len(held_out) + len(groups[number]) / 2 <= fraction * len(examples):
            held_out += groups[number]
    return np.sort(np.array(held_out or min(groups, key=len)))
