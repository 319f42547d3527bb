"""Measures the answers of one model to one benchmark: pass@k, lengths, reflection words and token budgets.

A failed answer counts as wrong. It has no length and no words, so it is left out of everything else. Means and rates
weigh questions equally. Medians, shares and words per token weigh answers or tokens equally.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thinkpo_jax.evaluation.results import GradedSample, QuestionResult
from thinkpo_jax.evaluation.statistics import Estimate, estimate_mean, estimate_rate

TOKEN_BUDGETS = (1024, 2048, 4096, 8192, 16384, 32768)
_REFLECTION_WORD = re.compile(r"\b(?:wait|hmm)\b", re.IGNORECASE)  # the two words that the paper counts


@dataclass(frozen=True)
class AnswerMeasures:
    """Measures of one model on one benchmark. Rates are fractions of 1, lengths are tokens. NaN: nothing to measure.

    `lenient_accuracy` is by the paper's grader, None if the benchmark has no such grader. Finished answers are those
    that no limit cut off. `tokens_per_right_answer` is infinite if no answer is right. Reflection words are counted per
    1,000 tokens. `accuracy_within_budget` maps a number of tokens to the rate of answers that are right, finished and
    not longer. `accuracy_finished` is the same for all finished answers.
    """

    pass_at_k: Mapping[int, float]
    lenient_accuracy: Estimate | None
    tokens: Estimate
    median_tokens: float
    finished_tokens: Estimate
    median_finished_tokens: float
    tokens_per_right_answer: float
    share_without_result: float
    unfinished_thoughts: int
    reflection_words_if_right: float
    reflection_words_if_wrong: float
    accuracy_within_budget: Mapping[int, Estimate]
    accuracy_finished: Estimate


def measure_answers(results: Sequence[QuestionResult], budgets: Sequence[int]) -> AnswerMeasures:
    """Measures the answers to a benchmark, see `AnswerMeasures`. `budgets` are numbers of tokens.

    The results must be valid for `score_benchmark`.
    """
    samples = [sample for result in results for sample in result.samples]
    answers = [sample for sample in samples if sample.error is None]
    finished = [answer for answer in answers if answer.finished]
    right, wrong = ([answer for answer in answers if answer.correct == is_right] for is_right in (True, False))
    has_lenient_grades = any(answer.lenient_correct is not None for answer in answers)

    def rate(is_success: Callable[[GradedSample], bool]) -> Estimate:
        return estimate_rate([[is_success(sample) for sample in result.samples] for result in results])

    def mean_tokens(is_counted: Callable[[GradedSample], bool]) -> Estimate:
        return estimate_mean([[s.tokens for s in result.samples if is_counted(s)] for result in results])

    return AnswerMeasures(
        pass_at_k=_pass_at_k(results),
        lenient_accuracy=rate(lambda sample: bool(sample.lenient_correct)) if has_lenient_grades else None,
        tokens=mean_tokens(lambda sample: sample.error is None),
        median_tokens=_median_tokens(answers),
        finished_tokens=mean_tokens(lambda sample: sample.finished),
        median_finished_tokens=_median_tokens(finished),
        tokens_per_right_answer=_count_tokens(answers) / len(right) if right else math.inf,
        share_without_result=sum(a.extracted is None for a in answers) / len(answers) if answers else math.nan,
        unfinished_thoughts=sum(answer.unfinished_thought for answer in answers),
        reflection_words_if_right=count_reflection_words(right),
        reflection_words_if_wrong=count_reflection_words(wrong),
        accuracy_within_budget={
            budget: rate(lambda sample, budget=budget: sample.correct and sample.finished and sample.tokens <= budget)
            for budget in budgets
        },
        accuracy_finished=rate(lambda sample: sample.correct and sample.finished),
    )


def find_token_budgets(results: Iterable[Sequence[QuestionResult]]) -> list[int]:
    """Returns the token budgets that some answer exceeds. `results` has the questions of each model on one benchmark.

    A larger budget equals no budget, so it would show nothing new.
    """
    questions = itertools.chain.from_iterable(results)
    longest = max((sample.tokens for question in questions for sample in question.samples), default=0)
    return [budget for budget in TOKEN_BUDGETS if budget < longest]


def count_reflection_words(answers: Iterable[GradedSample]) -> float:
    """Returns how often the whole words "wait" and "hmm" occur per 1,000 tokens, in any case. NaN without tokens."""
    answers = list(answers)
    tokens = _count_tokens(answers)
    words = sum(len(_REFLECTION_WORD.findall(answer.response)) for answer in answers)
    return 1000 * words / tokens if tokens else math.nan


def _pass_at_k(results: Sequence[QuestionResult]) -> dict[int, float]:
    """Returns k -> the chance that one of k answers is right, for the powers of two up to the number of samples.

    Uses the unbiased estimator 1 - C(n - c, k) / C(n, k) for c right answers among n (Chen et al. 2021, arXiv
    2107.03374, equation 1).
    """
    fewest = min(len(result.samples) for result in results)
    right = [(len(result.samples), sum(sample.correct for sample in result.samples)) for result in results]
    return {
        k: float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for n, c in right]))
        for k in (2**exponent for exponent in range(fewest.bit_length()))
    }


def _count_tokens(answers: Sequence[GradedSample]) -> int:
    return sum(answer.tokens for answer in answers)


def _median_tokens(answers: Sequence[GradedSample]) -> float:
    return float(np.median([answer.tokens for answer in answers])) if answers else math.nan
