"""Packs examples into rows, and splits off held-out examples by prompt."""

import bisect
from collections.abc import Sequence

import numpy as np
import pydantic

from thinkpo_jax.data.examples import Example
from thinkpo_jax.runtime.config import ConfigSection, UserError


class ValidationConfig(ConfigSection):
    """Examples that are not trained, for the loss and the metrics on what the model has not seen.

    `share` of the examples are held out, all examples of a prompt together; they are computed before the first update,
    after every `every` updates, and after the last.
    """

    share: float = pydantic.Field(gt=0, le=0.5)
    every: int = pydantic.Field(default=50, ge=1)


def pack_best_fit(sizes: np.ndarray, limits: Sequence[int], order: np.ndarray) -> list[list[int]]:
    """Rows of example indices: best fit, longest first; among equal lengths the given order decides.

    Every index of `order` stands in exactly one row. `sizes` [n, k] are what an example takes of each of the k things
    that a row has `limits` of; the first is its length, which decides the fit. No row exceeds a limit, unless by one
    example alone.
    """
    rows: list[list[int]] = []
    left: list[np.ndarray] = []  # of each row, what is left of the limits
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(order.tolist(), key=lambda i: -sizes[i, 0]):
        place = bisect.bisect_left(room, (int(sizes[index, 0]), -1))
        while place < len(room) and (left[room[place][1]] < sizes[index]).any():
            place += 1
        if place < len(room):
            row = room.pop(place)[1]
        else:
            row = len(rows)
            rows.append([])
            left.append(np.array(limits, np.int64))
        rows[row].append(index)
        left[row] = left[row] - sizes[index]
        bisect.insort(room, (int(left[row][0]), row))
    return rows


def split_held_out(examples: Sequence[Example], fraction: float, *, seed: int) -> np.ndarray:
    """The indices of about `share` of the examples, drawn by prompt: one prompt is never on both sides.

    Prompts that would go far beyond the share are passed over; where that leaves none, it is the one with the fewest
    examples. Raises `UserError` where there is only one prompt.
    """
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example[0].token_ids[: example[0].answer_start].tobytes(), []).append(index)
    prompts = list(groups.values())
    if len(prompts) < 2:
        raise UserError("validation: all examples have the same prompt. Leave `validation` out, or add data.")
    drawn: list[int] = []
    for number in np.random.default_rng((seed, len(examples))).permutation(len(prompts)).tolist():
        if len(drawn) + len(prompts[number]) / 2 <= fraction * len(examples):
            drawn += prompts[number]
    return np.sort(np.array(drawn or min(prompts, key=len)))
