"""Scores models on benchmarks and compares two models, with 95 % intervals.

The question is the unit of all statistics. The samples of one question share its difficulty and are not independent, so
they are averaged first. Two models are compared question by question. All random draws are seeded.

* Rates with one sample per question: Wilson (1927), from `scipy.stats.binomtest`.
* All other cases: percentile bootstrap over questions, from `scipy.stats.bootstrap`. Two artificial questions are added
  to rates first: one right and one wrong, or one won by each model. Agresti & Coull (1998) do this for one rate, and
  Bonett & Price (2012, JEBS 37:479) for paired answers. Without them, 500 equal answers would give no width. Four lucky
  answers among 500 would look like proof. With them, the interval and the sign test agree on zero.

An answer that failed counts as wrong. It has no length and is no truncated answer, so other figures leave it out.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from thinkpo_jax.evaluation.results import GradedSample, QuestionResult, split_by_group

Interval = tuple[float, float]
Floats = NDArray[np.float64]
Samples = tuple[GradedSample, ...]  # of one question

_NUM_RESAMPLES = 10_000
_SEED = 20250217
_MAX_BATCH_VALUES = 2_000_000  # values drawn at a time: 16 MB of floats, however many questions there are
# Accuracy differences, in percentage points. A comparison says how many questions would show each.
_POINTS = (1, 2, 5)


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its 95 % interval. NaN and (-inf, inf) if there is nothing to average."""

    mean: float
    ci95: Interval


@dataclass(frozen=True)
class BenchmarkScore:
    """One model on one benchmark. Rates are fractions of 1. Lengths are tokens, including truncated samples.

    If all answers failed, the length and the truncation rate are NaN.
    """

    accuracy: float
    ci95: Interval
    mean_response_tokens: float
    truncation_rate: float
    num_questions: int
    num_samples: int


ScoresByModel = dict[str, dict[str, BenchmarkScore]]  # model name -> benchmark name -> score


@dataclass(frozen=True)
class PairedComparison:
    """`after` minus `before` on the same questions. Accuracy is a fraction of 1, lengths are tokens.

    `before_better` and `after_better` count the questions that this side answered correctly more often.
    For a single question, `response_tokens_ci95` is (-inf, inf), because one difference has no known spread. Lengths
    are compared on the questions with an answer on both sides. Without any, the difference is NaN.
    `questions_needed`: difference in percentage points -> see `count_questions_needed`.
    """

    accuracy_difference: float
    ci95: Interval
    p_value: float
    response_tokens_difference: float
    response_tokens_ci95: Interval
    num_questions: int
    before_better: int
    after_better: int
    questions_needed: Mapping[int, int]


def score_benchmark(results: Sequence[QuestionResult]) -> BenchmarkScore:
    """Returns the score of one model on one benchmark: means over questions of the means over samples.

    The interval is for the mean over all questions of this kind. It treats the given questions as a random sample.
    Raises `ValueError` if there are no questions, a question has no samples, or a question id appears twice.
    """
    questions = list(_samples_by_id(results, "results").values())
    accuracy = estimate_rate([[sample.correct for sample in samples] for samples in questions])
    tokens_Q, truncated_Q = _means_over_answers(questions)
    return BenchmarkScore(
        accuracy=accuracy.mean,
        ci95=accuracy.ci95,
        mean_response_tokens=_mean_of_known(tokens_Q),
        truncation_rate=_mean_of_known(truncated_Q),
        num_questions=len(questions),
        num_samples=sum(map(len, questions)),
    )


def estimate_rate(outcomes: Sequence[Sequence[bool]]) -> Estimate:
    """Returns the mean over questions of the rate of true outcomes. There is one sequence of outcomes per question.

    The bootstrap adds one right and one wrong question, so the interval of a small sample never has width zero.
    """
    rate_Q = np.array([np.mean(of_question) for of_question in outcomes])
    if all(len(of_question) == 1 for of_question in outcomes):
        interval = stats.binomtest(round(rate_Q.sum()), len(rate_Q)).proportion_ci(method="wilson")
        return Estimate(float(rate_Q.mean()), (float(interval.low), float(interval.high)))
    return Estimate(float(rate_Q.mean()), _bootstrap_mean(np.append(rate_Q, [0.0, 1.0])))


def estimate_mean(values: Iterable[Sequence[float]]) -> Estimate:
    """Returns the mean over questions of the mean of each question's values, with a bootstrap interval.

    Questions without values are left out. With fewer than two questions left, the interval is (-inf, inf).
    """
    mean_Q = np.array([np.mean(of_question) for of_question in values if of_question], dtype=np.float64)
    return Estimate(_mean_of_known(mean_Q), _bootstrap_mean(mean_Q))


def compare_paired(before: Sequence[QuestionResult], after: Sequence[QuestionResult]) -> PairedComparison:
    """Compares two models on the same questions.

    The interval is a bootstrap over the differences per question. Each model wins one artificial question, by one
    sample. If all differences are equal (identical answers, for example), their spread is unknown. Then the artificial
    questions are won by a full point. So n equal answers give about +-3/n around zero, not (0, 0).

    The p-value is that of the two-sided sign-flip permutation test of the mean difference. With one sample per question
    it is the exact binomial sign test. With more samples it is exact for up to 13 questions that differ. For more
    questions it comes from 10,000 random flips, so it is at least 2/10,001. Raises `ValueError` if the question ids
    differ, or one side is invalid for `score_benchmark`.
    """
    before_samples, after_samples = _align(before, after)
    before_Q, after_Q = (
        np.array([np.mean([sample.correct for sample in samples]) for samples in side])
        for side in (before_samples, after_samples)
    )
    accuracy_Q = after_Q - before_Q
    tokens_Q = (_means_over_answers(after_samples) - _means_over_answers(before_samples))[0]
    step = 1.0 if np.ptp(accuracy_Q) == 0 else 1.0 / min(map(len, before_samples + after_samples))
    with_artificial = np.append(accuracy_Q, [-step, step])
    variance = float(np.var(with_artificial))
    return PairedComparison(
        accuracy_difference=float(accuracy_Q.mean()),
        ci95=_bootstrap_mean(with_artificial),
        p_value=_sign_flip_p_value(accuracy_Q),
        response_tokens_difference=_mean_of_known(tokens_Q),
        response_tokens_ci95=_bootstrap_mean(tokens_Q[np.isfinite(tokens_Q)]),
        num_questions=len(accuracy_Q),
        before_better=int((accuracy_Q < 0).sum()),
        after_better=int((accuracy_Q > 0).sum()),
        questions_needed={points: count_questions_needed(variance, points / 100, step) for points in _POINTS},
    )


def compare_groups(before: Sequence[QuestionResult], after: Sequence[QuestionResult]) -> dict[str, PairedComparison]:
    """Returns group -> the comparison of two models on its questions. `before` says which question is in which group.

    Raises `KeyError` if `after` lacks a question.
    """
    after_by_id = {result.question_id: result for result in after}
    return {
        group: compare_paired(results, [after_by_id[result.question_id] for result in results])
        for group, results in split_by_group(before).items()
    }


def count_questions_needed(variance: float, difference: float, step: float) -> int:
    """Returns how many questions show a true accuracy difference, with 80 % power at a two-sided level of 5 %.

    n = (z_0.975 + z_0.8)^2 variance / difference^2, for paired differences with this variance (Miller 2024, arXiv
    2411.00640, section on power). `step` is the smallest difference of one question, 1 for one sample. At least
    `difference / step` of the questions must then differ. So the variance is at least `difference (step - difference)`.
    """
    quantiles = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    variance = max(variance, difference * (step - difference))
    return math.ceil(quantiles**2 * variance / difference**2)


def compare_pooled_runs(pairs: Sequence[tuple[Sequence[QuestionResult], Sequence[QuestionResult]]]) -> PairedComparison:
    """Compares two models over several runs (seeds), one (before, after) pair per run.

    A question that several runs share counts once, with the samples of all runs. What helps it in one run tends to help
    it in the next. Counting it once per run would make the interval too narrow. The interval holds for these trained
    models. It does not cover the variance between training seeds. Raises `ValueError` for no pairs, or for a pair that
    `compare_paired` rejects. The message counts pairs from 1.
    """
    if not pairs:
        raise ValueError("no runs to pool. Expected at least one pair of results (before, after).")
    for number, (before, after) in enumerate(pairs, start=1):
        try:
            _align(before, after)
        except ValueError as error:
            raise ValueError(f"run {number} of {len(pairs)}: {error}") from error
    return compare_paired(*(_pool(side) for side in zip(*pairs, strict=True)))


def _pool(runs: Iterable[Sequence[QuestionResult]]) -> list[QuestionResult]:
    samples_by_id: defaultdict[str, Samples] = defaultdict(tuple)
    for result in itertools.chain.from_iterable(runs):
        samples_by_id[result.question_id] += result.samples
    return list(itertools.starmap(QuestionResult, samples_by_id.items()))


def _samples_by_id(results: Sequence[QuestionResult], side: str) -> dict[str, Samples]:
    """Returns question id -> samples. Raises `ValueError` if the results cannot be scored."""
    if not results:
        raise ValueError(f"{side}: no questions, so there is nothing to score.")
    samples_by_id: dict[str, Samples] = {}
    for result in results:
        question = f"{side}: question {result.question_id!r}"
        if result.question_id in samples_by_id:
            raise ValueError(f"{question} appears twice. Put all its samples into one `QuestionResult`.")
        if not result.samples:
            raise ValueError(f"{question} has no samples. Leaving it out would flatter the score, so generate them.")
        samples_by_id[result.question_id] = result.samples
    return samples_by_id


def _align(before: Sequence[QuestionResult], after: Sequence[QuestionResult]) -> tuple[list[Samples], list[Samples]]:
    """Returns the samples of both sides, question by question. Raises `ValueError` if the questions differ."""
    old, new = _samples_by_id(before, "before"), _samples_by_id(after, "after")
    for side, ids, other_ids in (("before", old, new), ("after", new, old)):
        if missing := [question_id for question_id in ids if question_id not in other_ids]:
            problem = f"{len(missing)} of {len(ids)} questions are only in `{side}`, for example {missing[0]!r}"
            raise ValueError(f"{problem}. A paired comparison needs the same questions on both sides.")
    return list(old.values()), [new[question_id] for question_id in old]


def _means_over_answers(questions: Iterable[Samples]) -> Floats:
    """Returns the means of `tokens` and `truncated` over the answers to each question, [2, Q].

    Failed answers are left out. If all answers to a question failed, its means are NaN.
    """
    values = ([(each.tokens, each.truncated) for each in samples if each.error is None] for samples in questions)
    return np.stack([np.mean(values_n2 or [(math.nan, math.nan)], axis=0) for values_n2 in values], axis=1)


def _mean_of_known(values_Q: Floats) -> float:
    """Returns the mean of the values that are not NaN, or NaN if there are none."""
    known = values_Q[~np.isnan(values_Q)]
    return float(known.mean()) if len(known) else math.nan


def _resampling(values_Q: Floats) -> dict[str, Any]:
    batch = max(1, _MAX_BATCH_VALUES // len(values_Q))
    return {"n_resamples": _NUM_RESAMPLES, "batch": batch, "rng": np.random.default_rng(_SEED)}


def _bootstrap_mean(values_Q: Floats) -> Interval:
    """Returns the 95 % percentile bootstrap interval of a mean. It is (-inf, inf) for fewer than two values."""
    if len(values_Q) < 2:
        return -math.inf, math.inf
    if np.ptp(values_Q) == 0:
        return float(values_Q[0]), float(values_Q[0])
    low, high = stats.bootstrap((values_Q,), np.mean, method="percentile", **_resampling(values_Q)).confidence_interval
    return round(float(low), 12) + 0.0, round(float(high), 12) + 0.0  # thirds that cancel must give 0, not 1e-18 or -0


def _sign_flip_p_value(differences_Q: Floats) -> float:
    """Returns the two-sided p-value of the mean difference under random signs. Ties have no sign and are left out."""
    signed = differences_Q[differences_Q != 0]
    if len(signed) == 0:
        return 1.0
    if np.ptp(np.abs(signed)) == 0:  # only the number of positive signs matters
        return float(stats.binomtest(int((signed > 0).sum()), len(signed)).pvalue)
    result = stats.permutation_test((signed,), np.sum, permutation_type="samples", **_resampling(signed))
    return float(min(result.pvalue, 1.0))
