"""The monotonic sweep, against its definition taken literally."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import calibration_error, reliability

data = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), st.booleans()),
    min_size=1,
    max_size=40,
)


def sweep(confidence, correct):
    return len(reliability(confidence, correct, binning="sweep").count)


def rises(confidence, correct, bins):
    table = reliability(confidence, correct, bins=bins, binning="quantile")
    accuracy = table.accuracy[table.count > 0].numpy()
    return bool((np.diff(accuracy) >= 0).all())


@given(data)
def test_the_last_number_of_bins_before_accuracy_falls(rows):
    confidence, correct = zip(*rows, strict=True)
    bins = sweep(confidence, correct)
    assert 1 <= bins <= len(rows)
    assert all(rises(confidence, correct, fewer) for fewer in range(1, bins + 1))
    assert bins == len(rows) or not rises(confidence, correct, bins + 1)


def test_more_predictions_bear_more_bins():
    confidence = torch.rand(100_000, dtype=torch.float64)
    correct = torch.rand(100_000, dtype=torch.float64) < confidence
    few, many = (sweep(confidence[:n], correct[:n]) for n in (100, 100_000))
    assert few < 20 < many


def test_confidence_that_misleads_gets_one_bin():
    assert sweep([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0]) == 1


def test_worked_by_hand():
    confidence, correct = [0.6, 0.7, 0.8, 0.9], [0, 1, 0, 1]
    assert sweep(confidence, correct) == 2
    assert calibration_error(confidence, correct, binning="sweep") == pytest.approx(0.25)
