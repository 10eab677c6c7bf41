"""Brier score and log loss, against scikit-learn; the decomposition adds up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss

from levelhead.calibration import (
    brier_score,
    calibration_error,
    negative_log_likelihood,
    reliability,
)

data = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.3, 1.0])), st.booleans()),
    min_size=1,
    max_size=50,
)


@given(data)
def test_equals_scikit_learn(rows):
    confidence, correct = map(np.array, zip(*rows, strict=True))
    expected = brier_score_loss(correct, confidence, pos_label=True)
    assert brier_score(confidence, correct) == pytest.approx(expected, abs=1e-14)
    both = np.stack([1 - confidence, confidence], 1)
    # log_loss divides by the sum of the two after clipping both: 1 + 2.2e-16.
    expected = log_loss(correct, both, labels=[False, True])
    assert negative_log_likelihood(confidence, correct) == pytest.approx(
        expected, rel=1e-12, abs=1e-15
    )


@given(data, st.integers(1, 12), st.sampled_from(["uniform", "quantile"]))
def test_the_terms_add_up_to_the_score(rows, bins, binning):
    confidence, correct = map(np.array, zip(*rows, strict=True))
    terms = reliability(confidence, correct, bins=bins, binning=binning).brier_decomposition()
    total = terms.reliability - terms.resolution + terms.uncertainty + terms.within_bins
    assert total == pytest.approx(brier_score(confidence, correct), abs=1e-12)
    assert terms.uncertainty == pytest.approx(correct.mean() * (1 - correct.mean()))
    error = calibration_error(confidence, correct, bins=bins, binning=binning, norm="l2")
    assert terms.reliability == pytest.approx(error**2, abs=1e-12)


@given(data, st.integers(1, 10))
def test_within_bins_is_variance_less_twice_covariance(rows, bins):
    confidence, correct = map(np.array, zip(*rows, strict=True))
    edges = np.arange(bins + 1) / bins
    index = np.digitize(confidence, edges[1:-1])
    within = 0.0
    for b in set(index.tolist()):
        c, y = confidence[index == b], correct[index == b].astype(float)
        within += len(c) * (c.var() - 2 * np.mean((c - c.mean()) * (y - y.mean())))
    got = reliability(confidence, correct, bins=bins).brier_decomposition().within_bins
    assert got == pytest.approx(within / len(rows), abs=1e-12)


@given(st.lists(st.tuples(st.sampled_from([0.05, 0.35, 0.95]), st.booleans()), min_size=1))
def test_nothing_within_bins_where_confidences_in_a_bin_are_equal(rows):
    terms = reliability(*zip(*rows, strict=True)).brier_decomposition()
    assert terms.within_bins == pytest.approx(0, abs=1e-12)


def test_certainty():
    assert brier_score([1.0, 0.0], [True, False]) == 0.0
    assert negative_log_likelihood([1.0, 0.0], [True, False]) == pytest.approx(0, abs=1e-15)
    assert brier_score([1.0], [False]) == 1.0
    assert negative_log_likelihood([1.0], [False]) == pytest.approx(52 * np.log(2))
