"""Measures of answers follow their definitions on real and on drawn answers. Failed answers count as wrong only."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from support.checkpoints import needs_data
from support.paths import DATA

from thinkpo_jax.evaluation.measures import count_reflection_words, find_token_budgets, measure_answers
from thinkpo_jax.evaluation.results import GradedSample, QuestionResult
from thinkpo_jax.evaluation.statistics import score_benchmark

FAILED = GradedSample("", 0, correct=False, truncated=False, error="HTTP 400")


def answer(tokens=10, *, right=True, truncated=False, response="", **values):
    return GradedSample(response, tokens, right, truncated, **values)


def questions(*samples_by_question):
    return [QuestionResult(str(number), tuple(samples)) for number, samples in enumerate(samples_by_question)]


def measure(*samples_by_question, budgets=()):
    return measure_answers(questions(*samples_by_question), budgets)


def real_answers(name):
    with (DATA / "raw" / name).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [answer(len(row["response"]) // 4, right=row["graded_correct"], response=row["response"]) for row in rows]


@pytest.mark.parametrize("num_samples", [1, 2, 7, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(num_samples):
    rng = np.random.default_rng(0)
    is_right_Qn = rng.random((12, num_samples)) < rng.random((12, 1))
    measures = measure(*([answer(right=bool(right)) for right in row] for row in is_right_Qn))
    assert list(measures.pass_at_k) == [k for k in (1, 2, 4, 8) if k <= num_samples]
    for k, rate in measures.pass_at_k.items():
        subsets = (list(itertools.combinations(row, k)) for row in is_right_Qn)
        assert rate == pytest.approx(np.mean([np.mean([any(subset) for subset in of_row]) for of_row in subsets]))


def test_pass_at_k_allows_different_numbers_of_samples():
    measures = measure([answer()] * 5, [answer(right=False)] * 1000, [FAILED, FAILED, FAILED, answer()])
    assert measures.pass_at_k == {1: pytest.approx((1 + 0 + 1 / 4) / 3), 2: 0.5, 4: pytest.approx(2 / 3)}


def test_lengths_of_all_and_of_finished_answers():
    cut = answer(900, right=False, truncated=True)
    measures = measure([answer(100), cut], [answer(200), answer(300, right=False)], [FAILED, FAILED], [FAILED, cut])
    assert measures.tokens.mean == pytest.approx((500 + 250 + 900) / 3)
    assert measures.median_tokens == 300
    assert (measures.finished_tokens.mean, measures.median_finished_tokens) == (175, 200)
    assert measures.tokens_per_right_answer == (100 + 900 + 200 + 300 + 900) / 2
    low, high = measures.tokens.ci95
    assert low < measures.tokens.mean < high


def test_answers_without_a_result_and_unfinished_thoughts_leave_out_failures():
    open_thought = answer(right=False, truncated=True, unfinished_thought=True)
    measures = measure([answer(extracted="1")], [answer(extracted="")], [open_thought], [open_thought], [FAILED])
    assert (measures.share_without_result, measures.unfinished_thoughts) == (0.5, 2)


def test_lenient_accuracy_is_apart_from_the_strict_one():
    strict = [[answer(right=number < 3)] for number in range(10)]
    lenient = [[dataclasses.replace(s, lenient_correct=number >= 4)] for number, (s,) in enumerate(strict)]
    measures = measure(*lenient, [FAILED], [FAILED])
    assert measures.lenient_accuracy is not None
    assert measures.lenient_accuracy.mean == 0.5
    assert (
        measures.lenient_accuracy.ci95 == score_benchmark(questions(*([answer(right=i < 6)] for i in range(12)))).ci95
    )
    assert dataclasses.replace(measures, lenient_accuracy=None) == measure(*strict, [FAILED], [FAILED])


def test_accuracy_within_a_budget_counts_right_and_finished_answers():
    rng = np.random.default_rng(1)
    rows = [
        [answer(int(rng.integers(1, 5000)), right=rng.random() < 0.7, truncated=rng.random() < 0.2) for _ in range(3)]
        for _ in range(40)
    ]
    budgets = find_token_budgets([questions(*rows)])
    assert budgets == [1024, 2048, 4096]
    measures = measure(*rows, budgets=budgets)
    for budget, rate in (*measures.accuracy_within_budget.items(), (math.inf, measures.accuracy_finished)):
        solved = [[s.correct and not s.truncated and s.tokens <= budget for s in row] for row in rows]
        assert rate.mean == pytest.approx(np.mean(solved))
        assert rate.ci95[0] < rate.mean < rate.ci95[1]
    accuracies = [rate.mean for rate in measures.accuracy_within_budget.values()]
    assert accuracies == sorted(accuracies)
    assert measures.accuracy_finished.mean < np.mean([s.correct for row in rows for s in row])


def test_an_answer_may_use_its_whole_budget_and_a_budget_is_left_out_if_no_model_exceeds_it():
    short, long = questions([answer(1024)]), questions([answer(1024)], [answer(1025)])
    assert find_token_budgets([short]) == []
    assert find_token_budgets([short, long]) == [1024]
    assert find_token_budgets([questions([FAILED])]) == []
    within = measure([answer(1024)], [answer(1025)], budgets=[1024]).accuracy_within_budget
    assert within[1024].mean == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Wait, wait. WAIT!\nHmm... hmm", 5),
        ("await waiting waited awaits hmmm shmm wait_1", 0),
        ("wait—hmm, 'wait' (Wait)", 4),
    ],
)
def test_reflection_words_are_whole_words_in_any_case(text, words):
    assert count_reflection_words([answer(250, response=text), answer(250)]) == 2 * words


def test_reflection_words_are_counted_by_verdict():
    measures = measure(
        [answer(100, response="wait")], [answer(900, response="hmm, wait")], [answer(500, right=False)], [FAILED]
    )
    assert (measures.reflection_words_if_right, measures.reflection_words_if_wrong) == (3, 0)


@needs_data
def test_long_chains_of_thought_have_more_reflection_words_than_short_answers():
    long, short = (count_reflection_words(real_answers(f"math500_{kind}.jsonl")) for kind in ("long", "short"))
    assert short < 0.05 < 2 < long


@pytest.mark.parametrize(
    "samples", [answer(), answer(right=False), FAILED, answer(0, right=False), answer(right=False, truncated=True)]
)
def test_extreme_answers_can_be_measured(samples):
    measures = measure([samples])
    assert measures.pass_at_k == {1: float(samples.correct)}
    assert measures.tokens.ci95 == measures.finished_tokens.ci95 == (-math.inf, math.inf)
    assert (measures.tokens_per_right_answer == math.inf) == (not samples.correct)
    assert math.isnan(measures.median_tokens) == (samples.error is not None)
    assert math.isnan(measures.median_finished_tokens) == (not samples.finished)
    assert math.isnan(measures.reflection_words_if_wrong) == (samples.correct or not samples.tokens)
