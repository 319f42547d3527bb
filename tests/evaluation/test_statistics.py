"""Scores weigh questions equally. Intervals cover the truth. The p-values are those of the sign test."""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from thinkpo_jax.evaluation.results import GradedSample, QuestionResult
from thinkpo_jax.evaluation.statistics import (
    compare_groups,
    compare_paired,
    compare_pooled_runs,
    estimate_mean,
    score_benchmark,
)

FAILED = GradedSample("", 0, correct=False, truncated=False, error="the prompt is too long")


def make_results(correct, tokens: npt.ArrayLike = 10):
    """Returns one question per row of `correct` ([Q] or [Q, n]), to which `tokens` is broadcast."""
    correct_Qn = np.asarray(correct, dtype=bool).reshape(len(correct), -1)
    tokens_Qn = np.broadcast_to(np.asarray(tokens), correct_Qn.shape)
    return [
        QuestionResult(f"q{index}", tuple(GradedSample("", int(t), bool(c), False) for c, t in zip(*row, strict=True)))
        for index, row in enumerate(zip(correct_Qn, tokens_Qn, strict=True))
    ]


def wins_and_losses(questions, wins, losses=0):
    before, after = np.zeros(questions), np.zeros(questions)
    after[:wins], before[wins : wins + losses] = 1, 1
    return make_results(before), make_results(after)


def width(interval):
    return interval[1] - interval[0]


def test_every_question_has_the_same_weight_for_any_number_of_samples():
    single = QuestionResult("one", (GradedSample("", 100, True, False),))
    four = QuestionResult("four", tuple(GradedSample("", 200, right, True) for right in (True, False, False, False)))
    score = score_benchmark([single, four])
    assert score.accuracy == pytest.approx((1 + 1 / 4) / 2)
    assert score.mean_response_tokens == pytest.approx(150)
    assert score.truncation_rate == pytest.approx(0.5)
    assert (score.num_questions, score.num_samples) == (2, 5)


@pytest.mark.parametrize("num_correct", [0, 7, 20])
def test_one_sample_per_question_has_the_wilson_interval(num_correct):
    score = score_benchmark(make_results(np.arange(20) < num_correct))
    assert score.ci95 == pytest.approx(tuple(stats.binomtest(num_correct, 20).proportion_ci(method="wilson")))


def test_identical_samples_of_a_question_do_not_narrow_the_interval():
    is_correct = np.arange(40) % 2 == 0
    single = score_benchmark(make_results(is_correct))
    repeated = score_benchmark(make_results(np.repeat(is_correct[:, None], 16, axis=1)))
    assert width(repeated.ci95) == pytest.approx(width(single.ci95), rel=0.1)


def test_the_clustered_interval_covers_the_truth_in_95_of_100_benchmarks():
    rng = np.random.default_rng(0)
    is_covered = []
    for _ in range(150):
        rate_Q = np.where(rng.random(40) < 0.9, 0.97, 0.1)  # most questions easy, a few hard
        low, high = score_benchmark(make_results(rng.random((40, 4)) < rate_Q[:, None])).ci95
        is_covered.append(low <= 0.9 * 0.97 + 0.1 * 0.1 <= high)
    assert 0.91 <= np.mean(is_covered) <= 0.99


@pytest.mark.parametrize(("samples", "effect"), [(1, 0.0), (4, 0.15)])
def test_the_paired_interval_covers_the_truth_in_95_of_100_experiments(samples, effect):
    rng = np.random.default_rng(1)
    is_covered = []
    for _ in range(150):
        rate_Q1 = rng.uniform(0, 1 - effect, (40, 1))
        before, after = (make_results(rng.random((40, samples)) < rate_Q1 + shift) for shift in (0, effect))
        low, high = compare_paired(before, after).ci95
        is_covered.append(low <= effect <= high)
    assert 0.91 <= np.mean(is_covered) <= 0.99


@pytest.mark.parametrize("wins", range(10))
def test_a_few_wins_exclude_zero_exactly_when_the_sign_test_does(wins):
    low, high = compare_paired(*wins_and_losses(200, wins)).ci95
    assert (low > 0) == (wins > 0 and stats.binomtest(wins, wins).pvalue < 0.05)
    assert high > 0


@pytest.mark.parametrize("samples", [1, 8])
def test_equal_answers_do_not_prove_equality(samples):
    same = make_results(np.ones((100, samples)))
    result = compare_paired(same, same)
    assert result.ci95 == pytest.approx((-0.03, 0.03), abs=0.01)  # the rule of three: 3/n
    assert (result.accuracy_difference, result.p_value) == (0.0, 1.0)
    assert 0.9 < score_benchmark(same).ci95[0] < 1


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 1), (6, 0), (10, 3), (40, 20), (330, 170)])
def test_the_p_value_of_one_sample_per_question_is_the_exact_sign_test(wins, losses):
    result = compare_paired(*wins_and_losses(500, wins, losses))
    expected = stats.binomtest(wins, wins + losses).pvalue if wins else 1.0
    assert result.p_value == pytest.approx(expected, rel=1e-12)
    assert (result.after_better, result.before_better) == (wins, losses)


@pytest.mark.parametrize(
    ("points", "loss_rate"), [(5, 0.1), (5, 0.0), (2, 0.03), (1, 0.004), (1, 0.1), (2, 0.2), (5, 0.005)]
)
def test_the_needed_questions_show_the_difference_in_80_of_100_experiments(points, loss_rate):
    win_rate = loss_rate + points / 100
    pilot = wins_and_losses(1000, round(1000 * win_rate), round(1000 * loss_rate))
    questions = compare_paired(*pilot).questions_needed[points]
    rates = [win_rate, loss_rate, 1 - win_rate - loss_rate]
    wins, losses, _ = np.random.default_rng(6).multinomial(questions, rates, size=4000).T
    p_values = 2 * stats.binom.cdf(np.minimum(wins, losses), wins + losses, 0.5)
    assert 0.76 < np.mean((p_values < 0.05) & (wins > losses)) < 0.84


def test_equal_answers_need_as_many_questions_as_one_sided_differences():
    # With 80 % power, the sign test must see about 8 wins and no loss.
    needed = compare_paired(*wins_and_losses(500, 0)).questions_needed
    assert {points: round(count * points / 100) for points, count in needed.items()} == {1: 8, 2: 8, 5: 8}


def test_more_samples_per_question_need_fewer_questions():
    rng = np.random.default_rng(7)
    rate_Q1 = rng.uniform(0, 1, (300, 1))
    needed = [
        compare_paired(*(make_results(rng.random((300, samples)) < rate_Q1) for _ in "ab")).questions_needed[2]
        for samples in (1, 4)
    ]
    assert needed[1] == pytest.approx(needed[0] / 4, rel=0.25)


def test_failed_answers_are_wrong_but_have_no_length():
    answered, failed = make_results([1, 1], [[100], [300]]), QuestionResult("q2", (FAILED,))
    score = score_benchmark([*answered, failed])
    assert (score.accuracy, score.mean_response_tokens) == (pytest.approx(2 / 3), 200)
    longer = [*make_results([1, 1], [[150], [350]]), QuestionResult("q2", (GradedSample("", 9000, False, False),))]
    result = compare_paired([*answered, failed], longer)
    assert (result.response_tokens_difference, result.num_questions) == (50, 3)
    truncated = make_results([0, 0])
    truncated[0] = QuestionResult("q0", (FAILED, GradedSample("", 7, correct=False, truncated=True)))
    assert score_benchmark(truncated).truncation_rate == 0.5


def test_models_of_which_all_answers_failed_can_be_compared():
    failed = [QuestionResult(result.question_id, (FAILED,)) for result in make_results(np.ones(4))]
    score, result = score_benchmark(failed), compare_paired(failed, make_results(np.ones(4)))
    assert (score.accuracy, math.isnan(score.mean_response_tokens), math.isnan(score.truncation_rate)) == (
        0,
        True,
        True,
    )
    assert (result.accuracy_difference, result.response_tokens_ci95) == (1, (-math.inf, math.inf))
    assert math.isnan(result.response_tokens_difference)


def test_groups_are_compared_by_their_own_questions_in_natural_order():
    rng = np.random.default_rng(8)
    before, after = (make_results(rng.random(60) < rate) for rate in (0.4, 0.6))
    before = [dataclasses.replace(r, group=("", "10 steps", "9 steps")[i % 3]) for i, r in enumerate(before)]
    groups = compare_groups(before, after[::-1])
    assert list(groups) == ["9 steps", "10 steps"]
    assert groups["10 steps"] == compare_paired(before[1::3], after[1::3])


def test_the_interval_of_a_mean_covers_the_truth_in_95_of_100_benchmarks():
    rng = np.random.default_rng(9)
    is_covered = []
    for _ in range(150):
        mean_Q = rng.exponential(1000, 60)
        low, high = estimate_mean([*(rng.normal(mean, 100, 4).tolist() for mean in mean_Q), []]).ci95
        is_covered.append(low <= 1000 <= high)
    assert 0.89 <= np.mean(is_covered) <= 0.99


def test_p_values_are_uniform_if_the_models_are_equally_good():
    rng = np.random.default_rng(2)
    rate_Q1 = rng.uniform(0.1, 0.9, (25, 1))
    runs = ([make_results(rng.random((25, 16)) < rate_Q1) for _ in "ab"] for _ in range(150))
    p_values = [compare_paired(before, after).p_value for before, after in runs]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_answers_are_paired_by_question_id_not_by_position():
    rng = np.random.default_rng(3)
    before, after = make_results(rng.random(50) < 0.5), make_results(rng.random(50) < 0.7)
    assert compare_paired(before, after[::-1]) == compare_paired(before, after)


def test_pairing_removes_the_difficulty_of_questions_from_the_interval():
    tokens = np.geomspace(100, 10_000, 50)[:, None]
    before, after = make_results(np.arange(50) < 25, tokens), make_results(np.arange(50) < 35, tokens + 10)
    result = compare_paired(before, after)
    assert result.response_tokens_difference == pytest.approx(10, abs=1)
    assert width(result.response_tokens_ci95) < 1
    assert width(result.ci95) < width(score_benchmark(before).ci95)


def test_swapping_the_models_flips_the_signs():
    rng = np.random.default_rng(4)
    before, after = make_results(rng.random((40, 3)) < 0.5, 30), make_results(rng.random((40, 3)) < 0.6, 70)
    forward, backward = compare_paired(before, after), compare_paired(after, before)
    assert forward.accuracy_difference == -backward.accuracy_difference
    assert forward.response_tokens_difference == -backward.response_tokens_difference == 40
    assert forward.p_value == pytest.approx(backward.p_value, abs=0.02)
    assert forward.ci95 == pytest.approx((-backward.ci95[1], -backward.ci95[0]), abs=0.01)


def test_a_single_question_gives_no_information_about_the_spread():
    result = compare_paired(make_results([0], 10), make_results([1], 90))
    assert (result.accuracy_difference, result.ci95, result.p_value) == (1.0, (-1.0, 1.0), 1.0)
    assert result.response_tokens_ci95 == (-math.inf, math.inf)


def test_pooling_one_run_equals_the_comparison_of_that_run():
    rng = np.random.default_rng(5)
    run = make_results(rng.random((50, 2)) < 0.5, 20), make_results(rng.random((50, 2)) < 0.6, 30)
    assert compare_pooled_runs([run]) == compare_paired(*run)


def with_other_ids(run, prefix):
    before, after = (
        [QuestionResult(f"{prefix} {result.question_id}", result.samples) for result in side] for side in run
    )
    return before, after


def test_pooled_runs_with_different_questions_add_up():
    first, second = wins_and_losses(60, 20, 10), with_other_ids(wins_and_losses(40, 5, 15), "second")
    result = compare_pooled_runs([first, second])
    assert result.accuracy_difference == pytest.approx((20 - 10 + 5 - 15) / 100)
    assert (result.after_better, result.before_better, result.num_questions) == (25, 25, 100)
    pooled = compare_pooled_runs([with_other_ids(first, number) for number in range(4)])
    assert width(pooled.ci95) == pytest.approx(width(compare_paired(*first).ci95) / 2, rel=0.1)


def test_a_question_that_all_runs_share_counts_once():
    first = wins_and_losses(60, 20, 10)
    assert compare_pooled_runs([first] * 4).num_questions == 60
    assert width(compare_pooled_runs([first] * 4).ci95) == pytest.approx(width(compare_paired(*first).ci95), rel=0.1)


def test_differing_questions_are_an_error_with_an_example():
    before, after = make_results(np.ones(5)), make_results(np.ones(4))
    with pytest.raises(ValueError, match=r"1 of 5 questions are only in `before`, for example 'q4'"):
        compare_paired(before, after)
    with pytest.raises(ValueError, match=r"run 2 of 2: 1 of 5 questions are only in `after`, for example 'q4'"):
        compare_pooled_runs([(before, before), (after, before)])


def test_results_that_cannot_be_scored_are_an_error_that_says_why():
    good = make_results(np.ones(3))
    with pytest.raises(ValueError, match="nothing to score"):
        score_benchmark([])
    with pytest.raises(ValueError, match="at least one pair"):
        compare_pooled_runs([])
    with pytest.raises(ValueError, match=r"after: question 'q0' appears twice. Put all its samples into one"):
        compare_paired(good, [*good, good[0]])
    with pytest.raises(ValueError, match=r"results: question 'q1' has no samples. .* generate them"):
        score_benchmark([good[0], dataclasses.replace(good[1], samples=())])
