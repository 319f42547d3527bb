"""Compares counts of drawn tokens with probabilities."""

import numpy as np
import scipy.stats


def assert_drawn_from(expected: np.ndarray, counts: np.ndarray) -> None:
    """Tests the counts against the probabilities with chi-square. Rare ids share one cell."""
    expected_counts = expected * counts.sum()
    is_common = expected_counts >= 5
    assert expected[is_common].sum() > 0.95
    assert counts[expected == 0].sum() == 0
    observed = np.append(counts[is_common], counts[~is_common].sum())
    predicted = np.append(expected_counts[is_common], expected[~is_common].sum() * counts.sum())
    cells = predicted > 0
    assert scipy.stats.chisquare(observed[cells], predicted[cells]).pvalue > 0.001
