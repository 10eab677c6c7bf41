"""The monotonic sweep, against its definition taken literally."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from levelhead.calibration import adaptive_bins, reliability

data = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), st.booleans()),
    min_size=1,
    max_size=40,
)


def rises(confidence, correct, bins):
    table = reliability(confidence, correct, bins=bins, binning="quantile")
    accuracy = table.accuracy[table.count > 0].numpy()
    return bool((np.diff(accuracy) >= 0).all())


@given(data)
def test_the_last_number_of_bins_before_accuracy_falls(rows):
    confidence, correct = zip(*rows, strict=True)
    bins = adaptive_bins(confidence, correct)
    assert 1 <= bins <= len(rows)
    assert all(rises(confidence, correct, fewer) for fewer in range(1, bins + 1))
    assert bins == len(rows) or not rises(confidence, correct, bins + 1)


def test_more_predictions_bear_more_bins():
    confidence = torch.rand(100_000, dtype=torch.float64)
    correct = torch.rand(100_000, dtype=torch.float64) < confidence
    few, many = (adaptive_bins(confidence[:n], correct[:n]) for n in (100, 100_000))
    assert few < 20 < many


def test_confidence_that_misleads_gets_one_bin():
    assert adaptive_bins([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0]) == 1
