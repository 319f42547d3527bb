"""What does a model score on a benchmark, and how certain is that?

The question is the unit of everything here: samples of one question are averaged first, because they share its
difficulty and are no independent evidence. Two models are compared question by question, on the same questions.

How the intervals are made (all are 95 %, all random draws are seeded, so equal input gives equal output):

* One sample per question: Wilson (1927), from `scipy.stats.binomtest`.
* Everything else: percentile bootstrap over questions, from `scipy.stats.bootstrap`. Before resampling accuracies, two
  invented questions are added, one at either end of what could have been seen. This is the device of Agresti & Coull
  (1998) and, for paired answers, of Bonett & Price (2012, JEBS 37:479). Without it a bootstrap of 500 equal answers has
  no width, and four lucky answers among 500 look like proof; with it, what the interval says about zero goes along
  with the sign test.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from thinkpo_jax.evaluation.results import GradedSample, QuestionResult

Interval = tuple[float, float]
Floats = NDArray[np.float64]

_RESAMPLES = 10_000
_SEED = 20250217
_BATCH_CELLS = 2_000_000  # numbers drawn at a time: 16 MB of floats, whatever the number of questions


@dataclass(frozen=True)
class BenchmarkScore:
    """One model on one benchmark. Rates are fractions of 1; lengths are tokens, truncated samples included."""

    accuracy: float
    ci95: Interval
    mean_response_tokens: float
    truncation_rate: float
    num_questions: int
    num_samples: int


@dataclass(frozen=True)
class PairedComparison:
    """`after` minus `before` on the same questions; accuracy in fractions of 1, lengths in tokens.

    `before_better` and `after_better` count the questions on which that side was right more often; the rest are ties.
    `response_tokens_ci95` is (-inf, inf) for a single question: one difference says nothing about the spread.
    """

    accuracy_difference: float
    ci95: Interval
    p_value: float
    response_tokens_difference: float
    response_tokens_ci95: Interval
    num_questions: int
    before_better: int
    after_better: int


@dataclass(frozen=True)
class _Question:
    """The means over one question's samples."""

    accuracy: float
    tokens: float
    truncated: float
    num_samples: int


def score_benchmark(items: Sequence[QuestionResult]) -> BenchmarkScore:
    """Score one model on one benchmark: the mean over questions of the mean over samples.

    The interval is for the mean over the questions of which these are a draw: Wilson for one sample per question, else
    the bootstrap over questions described at the top, with one all-right and one all-wrong question added.

    Raises:
        ValueError: no questions, a question without samples, or a question id that appears twice.
    """
    questions = list(_questions_by_id(items, "items").values())
    accuracy_Q = np.array([question.accuracy for question in questions])
    num_samples = sum(question.num_samples for question in questions)
    if num_samples == len(questions):
        interval = stats.binomtest(round(accuracy_Q.sum()), num_samples).proportion_ci(method="wilson")
        ci95 = (float(interval.low), float(interval.high))
    else:
        ci95 = _bootstrap_mean(np.append(accuracy_Q, [0.0, 1.0]))
    return BenchmarkScore(
        accuracy=float(accuracy_Q.mean()),
        ci95=ci95,
        mean_response_tokens=float(np.mean([question.tokens for question in questions])),
        truncation_rate=float(np.mean([question.truncated for question in questions])),
        num_questions=len(questions),
        num_samples=num_samples,
    )


def compare_paired(before: Sequence[QuestionResult], after: Sequence[QuestionResult]) -> PairedComparison:
    """Is `after` better than `before` on the same questions, and by how much?

    The interval is the bootstrap over per-question differences with the two questions of Bonett & Price added: one that
    `after` wins by a sample, one that `before` wins by a sample. Where every question shows the same difference (two
    models with identical answers, say) nothing was learnt about the spread, and the two are won and lost outright. So n
    equal answers give an interval of about +-3/n around zero, not (0, 0).

    The p-value is that of the two-sided sign-flip permutation test of the mean difference: exact for up to 13 questions
    that differ (for one sample per question it is then the exact sign test), else from 10,000 random flips, so never
    below 2/10,001.

    Raises:
        ValueError: question ids that differ between the two, or anything that `summarise` would refuse.
    """
    old, new = _questions_by_id(before, "before"), _questions_by_id(after, "after")
    _check_same_questions(old, new)
    accuracy_Q = np.array([new[key].accuracy - old[key].accuracy for key in old])
    tokens_Q = np.array([new[key].tokens - old[key].tokens for key in old])
    step = 1.0 / min(question.num_samples for question in [*old.values(), *new.values()])
    step = 1.0 if np.ptp(accuracy_Q) == 0 else step
    return PairedComparison(
        accuracy_difference=float(accuracy_Q.mean()),
        ci95=_bootstrap_mean(np.append(accuracy_Q, [-step, step])),
        p_value=_sign_flip_p_value(accuracy_Q),
        response_tokens_difference=float(tokens_Q.mean()),
        response_tokens_ci95=_bootstrap_mean(tokens_Q) if len(tokens_Q) > 1 else (-math.inf, math.inf),
        num_questions=len(accuracy_Q),
        before_better=int((accuracy_Q < 0).sum()),
        after_better=int((accuracy_Q > 0).sum()),
    )


def compare_pooled_runs(pairs: Sequence[tuple[Sequence[QuestionResult], Sequence[QuestionResult]]]) -> PairedComparison:
    """`compare` over several runs (seeds) at once: the samples of a question, from all runs that put it, are one Item.

    So a question that every run puts counts once, by its mean: what helps it in one run tends to help it in the next,
    and counting it once per run would make the interval too narrow. Questions that only one run puts add up. The
    interval does not cover the variance between training seeds: it speaks of these trained models.

    Raises:
        ValueError: no pairs, or a pair that `compare` would refuse (the message counts pairs from 1).
    """
    if not pairs:
        raise ValueError("no runs to pool: expected at least one pair (items before, items after)")
    for number, (before, after) in enumerate(pairs, start=1):
        try:
            _check_same_questions(_questions_by_id(before, "before"), _questions_by_id(after, "after"))
        except ValueError as error:
            raise ValueError(f"run {number} of {len(pairs)}: {error}") from error
    return compare_paired(_merged([before for before, _ in pairs]), _merged([after for _, after in pairs]))


def _merged(runs: Sequence[Sequence[QuestionResult]]) -> list[QuestionResult]:
    samples: dict[str, tuple[GradedSample, ...]] = {}
    for item in itertools.chain.from_iterable(runs):
        samples[item.question_id] = samples.get(item.question_id, ()) + item.samples
    return [QuestionResult(question_id, found) for question_id, found in samples.items()]


def _questions_by_id(items: Sequence[QuestionResult], name: str) -> dict[str, _Question]:
    if not items:
        raise ValueError(f"{name}: no questions, so there is nothing to score; expected at least one Item")
    repeated = [question_id for question_id, count in Counter(i.question_id for i in items).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{name}: {len(repeated)} question ids appear more than once, for example {repeated[0]!r}; "
            "put all samples of a question into one Item"
        )
    unanswered = [item.question_id for item in items if not item.samples]
    if unanswered:
        raise ValueError(
            f"{name}: {len(unanswered)} questions have no samples, for example {unanswered[0]!r}; "
            "leaving them out would flatter the score, so generate their answers first"
        )
    return {item.question_id: _mean_over_samples(item.samples) for item in items}


def _mean_over_samples(samples: Sequence[GradedSample]) -> _Question:
    return _Question(
        accuracy=float(np.mean([sample.correct for sample in samples])),
        tokens=float(np.mean([sample.tokens for sample in samples])),
        truncated=float(np.mean([sample.truncated for sample in samples])),
        num_samples=len(samples),
    )


def _check_same_questions(old: Mapping[str, _Question], new: Mapping[str, _Question]) -> None:
    problems = [
        f"{len(missing)} of {len(whole)} questions are only in `{name}`, for example {missing[0]!r}"
        for name, whole, other in (("before", old, new), ("after", new, old))
        if (missing := [key for key in whole if key not in other])
    ]
    if problems:
        raise ValueError("; ".join(problems) + "; a paired comparison needs the same questions on both sides")


def _bootstrap_mean(values_Q: Floats) -> Interval:
    """The 95 % percentile bootstrap interval of the mean of two or more values; equal values have one of no width."""
    if np.ptp(values_Q) == 0:
        return float(values_Q[0]), float(values_Q[0])
    result = stats.bootstrap(
        (values_Q,),
        np.mean,
        method="percentile",
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_CELLS // len(values_Q)),
        rng=np.random.default_rng(_SEED),
    )
    low, high = result.confidence_interval
    return round(float(low), 12) + 0.0, round(float(high), 12) + 0.0  # thirds that cancel must give 0, not 1e-18 or -0


def _sign_flip_p_value(differences_Q: Floats) -> float:
    """Two-sided p-value of the mean difference under random signs; ties have no sign to flip and are left out."""
    signed = differences_Q[differences_Q != 0]
    if len(signed) < 2:
        return 1.0  # a single sign is as likely as its opposite
    result = stats.permutation_test(
        (signed,),
        np.sum,
        permutation_type="samples",
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_CELLS // len(signed)),
        rng=np.random.default_rng(_SEED),
    )
    return float(min(result.pvalue, 1.0))


Scores = dict[str, dict[str, BenchmarkScore]]
