"""What is proven: scores weigh questions, intervals cover the truth, p-values are the sign test's, pairs are pairs."""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from thinkpo_jax.evaluation.results import GradedSample, QuestionResult
from thinkpo_jax.evaluation.statistics import compare_paired, compare_pooled_runs, score_benchmark


def items(correct, tokens: npt.ArrayLike = 10):
    """One question per row of `correct` ([Q] or [Q, n]); `tokens` broadcasts against it."""
    correct_Qn = np.asarray(correct, dtype=bool).reshape(len(correct), -1)
    tokens_Qn = np.broadcast_to(np.asarray(tokens), correct_Qn.shape)
    return [
        QuestionResult(f"q{index}", tuple(GradedSample("", int(t), bool(c), False) for c, t in zip(*row, strict=True)))
        for index, row in enumerate(zip(correct_Qn, tokens_Qn, strict=True))
    ]


def wins_and_losses(questions, wins, losses=0):
    before, after = np.zeros(questions), np.zeros(questions)
    after[:wins], before[wins : wins + losses] = 1, 1
    return items(before), items(after)


def width(interval):
    return interval[1] - interval[0]


def test_every_question_weighs_the_same_whatever_its_number_of_samples():
    one = QuestionResult("one", (GradedSample("", 100, True, False),))
    four = QuestionResult("four", tuple(GradedSample("", 200, right, True) for right in (True, False, False, False)))
    score = score_benchmark([one, four])
    assert score.accuracy == pytest.approx((1 + 1 / 4) / 2)
    assert score.mean_response_tokens == pytest.approx(150)
    assert score.truncation_rate == pytest.approx(0.5)
    assert (score.num_questions, score.num_samples) == (2, 5)


@pytest.mark.parametrize("right", [0, 7, 20])
def test_one_sample_per_question_has_the_wilson_interval(right):
    score = score_benchmark(items(np.arange(20) < right))
    assert score.ci95 == pytest.approx(tuple(stats.binomtest(right, 20).proportion_ci(method="wilson")))


def test_samples_that_repeat_each_other_add_no_certainty():
    right = np.arange(40) % 2 == 0
    single, repeated = score_benchmark(items(right)), score_benchmark(items(np.repeat(right[:, None], 16, axis=1)))
    assert width(repeated.ci95) == pytest.approx(width(single.ci95), rel=0.1)


def test_the_clustered_interval_covers_the_truth_in_95_of_100_benchmarks():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(150):
        rate_Q = np.where(rng.random(40) < 0.9, 0.97, 0.1)  # most questions easy, a few hard
        low, high = score_benchmark(items(rng.random((40, 4)) < rate_Q[:, None])).ci95
        covered.append(low <= 0.9 * 0.97 + 0.1 * 0.1 <= high)
    assert 0.91 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize(("samples", "effect"), [(1, 0.0), (4, 0.15)])
def test_the_paired_interval_covers_the_truth_in_95_of_100_experiments(samples, effect):
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(150):
        rate_Q1 = rng.uniform(0, 1 - effect, (40, 1))
        before, after = (items(rng.random((40, samples)) < rate_Q1 + shift) for shift in (0, effect))
        low, high = compare_paired(before, after).ci95
        covered.append(low <= effect <= high)
    assert 0.91 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("wins", range(10))
def test_a_few_wins_exclude_zero_exactly_when_the_sign_test_does(wins):
    low, high = compare_paired(*wins_and_losses(200, wins)).ci95
    assert (low > 0) == (wins > 0 and stats.binomtest(wins, wins).pvalue < 0.05)
    assert high > 0


@pytest.mark.parametrize("samples", [1, 8])
def test_equal_answers_do_not_prove_equality(samples):
    same = items(np.ones((100, samples)))
    result = compare_paired(same, same)
    assert result.ci95 == pytest.approx((-0.03, 0.03), abs=0.01)  # the rule of three: 3/n
    assert (result.accuracy_difference, result.p_value) == (0.0, 1.0)
    assert 0.9 < score_benchmark(same).ci95[0] < 1


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 1), (6, 0), (10, 3)])
def test_the_p_value_of_a_few_differences_is_the_exact_sign_test(wins, losses):
    result = compare_paired(*wins_and_losses(30, wins, losses))
    assert result.p_value == pytest.approx(stats.binomtest(wins, wins + losses).pvalue if wins else 1.0)
    assert (result.after_better, result.before_better) == (wins, losses)


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(2)
    rate_Q1 = rng.uniform(0.1, 0.9, (25, 1))
    p_values = [compare_paired(*(items(rng.random((25, 16)) < rate_Q1) for _ in "ab")).p_value for _ in range(150)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_answers_are_paired_by_question_not_by_place():
    rng = np.random.default_rng(3)
    before, after = items(rng.random(50) < 0.5), items(rng.random(50) < 0.7)
    assert compare_paired(before, after[::-1]) == compare_paired(before, after)


def test_pairing_takes_the_difficulty_of_the_questions_out_of_the_interval():
    tokens = np.geomspace(100, 10_000, 50)[:, None]
    before, after = items(np.arange(50) < 25, tokens), items(np.arange(50) < 35, tokens + 10)
    result = compare_paired(before, after)
    assert result.response_tokens_difference == pytest.approx(10, abs=1)
    assert width(result.response_tokens_ci95) < 1
    assert width(result.ci95) < width(score_benchmark(before).ci95)


def test_turning_a_comparison_round_turns_its_signs():
    rng = np.random.default_rng(4)
    before, after = items(rng.random((40, 3)) < 0.5, 30), items(rng.random((40, 3)) < 0.6, 70)
    there, back = compare_paired(before, after), compare_paired(after, before)
    assert there.accuracy_difference == -back.accuracy_difference
    assert there.response_tokens_difference == -back.response_tokens_difference == 40
    assert there.p_value == pytest.approx(back.p_value, abs=0.02)
    assert there.ci95 == pytest.approx((-back.ci95[1], -back.ci95[0]), abs=0.01)


def test_one_question_says_nothing_about_the_spread():
    result = compare_paired(items([0], 10), items([1], 90))
    assert (result.accuracy_difference, result.ci95, result.p_value) == (1.0, (-1.0, 1.0), 1.0)
    assert result.response_tokens_ci95 == (-math.inf, math.inf)


def test_a_pool_of_one_run_is_that_run():
    rng = np.random.default_rng(5)
    run = items(rng.random((50, 2)) < 0.5, 20), items(rng.random((50, 2)) < 0.6, 30)
    assert compare_pooled_runs([run]) == compare_paired(*run)


def renamed(run, name):
    before, after = ([QuestionResult(f"{name} {item.question_id}", item.samples) for item in side] for side in run)
    return before, after


def test_runs_with_other_questions_add_up():
    first, second = wins_and_losses(60, 20, 10), renamed(wins_and_losses(40, 5, 15), "second")
    result = compare_pooled_runs([first, second])
    assert result.accuracy_difference == pytest.approx((20 - 10 + 5 - 15) / 100)
    assert (result.after_better, result.before_better, result.num_questions) == (25, 25, 100)
    four = compare_pooled_runs([renamed(first, number) for number in range(4)])
    assert width(four.ci95) == pytest.approx(width(compare_paired(*first).ci95) / 2, rel=0.1)


def test_a_question_that_every_run_puts_counts_once():
    first = wins_and_losses(60, 20, 10)
    assert compare_pooled_runs([first] * 4).num_questions == 60
    assert width(compare_pooled_runs([first] * 4).ci95) == pytest.approx(width(compare_paired(*first).ci95), rel=0.1)


def test_other_questions_are_an_error_that_names_one():
    before, after = items(np.ones(5)), items(np.ones(4))
    with pytest.raises(ValueError, match=r"1 of 5 questions are only in `before`, for example 'q4'"):
        compare_paired(before, after)
    with pytest.raises(ValueError, match=r"run 2 of 2: 1 of 5 questions are only in `after`, for example 'q4'"):
        compare_pooled_runs([(before, before), (after, before)])


def test_what_cannot_be_scored_is_an_error_that_teaches():
    good = items(np.ones(3))
    with pytest.raises(ValueError, match="nothing to score"):
        score_benchmark([])
    with pytest.raises(ValueError, match="at least one pair"):
        compare_pooled_runs([])
    with pytest.raises(ValueError, match=r"after: 1 question ids appear more than once, for example 'q0'"):
        compare_paired(good, [*good, good[0]])
    with pytest.raises(ValueError, match=r"1 questions have no samples, for example 'q1'"):
        score_benchmark([good[0], dataclasses.replace(good[1], samples=())])
